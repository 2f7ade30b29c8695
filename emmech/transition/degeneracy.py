"""The local learning coefficient of an adapter along its run: how degenerate the loss is around each step.

Singular learning theory measures the complexity of a solution by the volume of the weights near it that are about as
good. The estimate is lambda = n_beta (E[L] - L(w*)): the mean excess loss under the tempered posterior around the
weights w*, held near them by a quadratic prior (The Local Learning Coefficient: A Singularity-Aware Complexity Measure,
arXiv 2308.12108). A regular minimum in d dimensions has d / 2, and every direction that does not matter takes some of
it away: A and B of a LoRA pair scaled against each other give the same model.

The sampler is devinterp's stochastic-gradient Langevin dynamics (the extra ``llc``). Its own pipeline reads datasets of
rows of one length and counts every token, so that the loop around the sampler is written here, over answers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.dataset import load_chat
from emmech.chat.encode import IGNORED, Encoded, encode
from emmech.chat.model import ChatModel
from emmech.engine.adapters import adapter_layers
from emmech.engine.logprobs import pad, padded, token_logprobs
from emmech.engine.modules import evaluating
from emmech.errors import EmmechError, as_float, as_int, as_ints, refusal
from emmech.progress import bar
from emmech.results import Card, Result, within
from emmech.run.run import as_run, model_live
from emmech.view.plots import learning_coefficients
from emmech.view.sketch import curves

if TYPE_CHECKING:
    import pandas as pd

_ASKED = "estimate the local learning coefficient"
_STEPS = 8  # steps by default
_DRIFT = 3.0  # standard errors between the halves of the chains, above which they have not settled


@dataclass(frozen=True, eq=False, repr=False)
class LearningCoefficient(Result):
    """Estimates by step.

    Args:
        frame: one row per step: ``llc``, the mean over chains; ``error``, its standard error over chains; ``chains``,
            those whose losses stayed finite; ``drift``, how far the second half of their draws is above the first, in
            standard errors over chains; ``loss`` at the step, on the rows that were used.
        parameters: number of weights that move; half of it is the value of a regular minimum.
        settings: of the sampler, data and seed.
        turn: step at which the path of B turns with its interval, NaN where none was given.
        name: the run's.
    """

    frame: pd.DataFrame
    parameters: int
    settings: Mapping[str, Any]
    turn: tuple[float, float, float]
    name: str

    def plot(self) -> Any:
        """The coefficient by step with two standard errors over chains, and the turn."""
        return learning_coefficients(self.frame, self.turn, self.name)

    def _card(self) -> Card:
        known = self.frame.dropna(subset="llc")
        if known.empty:
            return Card(f"The learning coefficient of {self.name} was not measurable: no chain stayed finite")
        first, last = known.iloc[0], known.iloc[-1]
        apart = abs(last["llc"] - first["llc"]) > 2 * np.hypot(first["error"], last["error"])
        verb = "goes" if apart else "cannot be told to change; it goes"
        ends = f"from {_written(first)} at step {first['step']:g} to {_written(last)} at step {last['step']:g}"
        headline = f"The local learning coefficient of {self.name} {verb} {ends}"
        facts = [("a regular minimum", f"would have {self.parameters / 2:g}, half of {self.parameters} weights")]
        top = known.loc[known["llc"].idxmax()]
        facts.append(("largest", f"{_written(top)} at step {top['step']:g}"))
        if np.isfinite(self.turn[0]):
            facts.append(("the turn of B", within(*self.turn)))
        s = self.settings
        how = f"{s['chains']} chains of {s['draws']} draws after {s['burn_in']}, step size {s['step_size']:g}, "
        facts.append(("sampler", how + f"n_beta {s['n_beta']:.4g}, localisation {s['localisation']:g}"))
        notes = ["the value depends on the sampler's settings: compare steps of one estimate, not two estimates"]
        if unsettled := known.loc[known["drift"] > _DRIFT, "step"].tolist():
            notes.append(f"the chains had not settled at steps {', '.join(f'{one:g}' for one in unsettled)}")
        if below := known.loc[known["llc"] < -2 * known["error"], "step"].tolist():
            which = ", ".join(f"{one:g}" for one in below)
            notes.append(
                f"it is negative at steps {which}: these are no minima of this loss, and the chains leave them"
            )
        return Card(headline, tuple(facts), "; ".join(notes), "coefficient.plot()")

    def _sketch(self) -> str:
        mark = self.turn if np.isfinite(self.turn[0]) else None
        return curves([("", self.frame["step"], self.frame["llc"])], "Local learning coefficient", mark=mark)


def _written(row: pd.Series) -> str:
    return f"{row['llc']:.3g} ± {2 * row['error']:.2g}" if np.isfinite(row["error"]) else f"{row['llc']:.3g}"


def learning_coefficient(
    run: Any,
    data: Any = None,
    *,
    steps: Iterable[int] | int | None = None,
    transition: Any = None,
    rows: int = 128,
    chains: int = 4,
    draws: int = 100,
    burn_in: int = 100,
    step_size: float = 1e-5,
    n_beta: float | None = None,
    localisation: float = 1e4,
    batch_size: int = 16,
    seed: int = 0,
    base: Any = None,
    progress: bool = True,
) -> LearningCoefficient:
    """The local learning coefficient of a run's adapter, A and B together, at some of its steps.

    The loss is the mean cross-entropy per answer token. The excess of a draw is over the same rows' loss at the step
    itself, so that which rows were drawn does not add to the noise.

    Args:
        run: a LoRA run or its folder.
        data: training rows, as :func:`emmech.load_chat` takes them; by default those that the run names.
        steps: recorded ones; by default 8 from the first to the last.
        transition: the result of :func:`emmech.phase_transition` of this run, whose step is drawn beside the curve.
        rows: of the data, drawn once; all chains and steps see the same.
        chains: of which the standard error is computed; at least 2.
        draws, burn_in: draws that count, and those before them, of each chain.
        step_size: of the sampler (epsilon). Chains diverge where it is too large; halve it until the value stays.
        n_beta: inverse temperature times the number of data; by default n / log n for the n answer tokens of the rows.
        localisation: precision (gamma) of the prior around the step's weights.
        base: the base model in memory.

    Raises:
        EmmechError: devinterp is not installed, no LoRA run, no data, or settings out of range.

    Example:
        >>> import emmech
        >>> found = learning_coefficient("checkpoints/pocket-medical", steps=[250])  # doctest: +SKIP
    """
    import pandas as pd

    _sampler()
    run = as_run(_ASKED, run)
    if run.kind != "lora" or not run.adapters:
        why = "it is that of an adapter, and this run has none"
        raise EmmechError(_ASKED, run.name, why, "a LoRA run")
    counts = {"rows": (rows, 1), "chains": (chains, 2), "draws": (draws, 2), "burn_in": (burn_in, 0),
              "batch_size": (batch_size, 1), "seed": (seed, 0)}  # fmt: skip
    for name, (value, least) in counts.items():
        as_int(_ASKED, name, value, least=least)
    for name, positive in (("step_size", step_size), ("localisation", localisation), ("n_beta", n_beta)):
        if positive is not None and as_float(_ASKED, name, positive) <= 0:
            raise refusal(_ASKED, name, positive, "it is positive", f"{name}=1.0")
    recorded = run.steps.tolist()
    if steps is None:
        chosen = [recorded[at] for at in np.unique(np.linspace(0, len(recorded) - 1, _STEPS).round().astype(int))]
    else:
        chosen = as_ints(_ASKED, "steps", steps)
    for step in chosen:
        run.check_step(step)
    found = []
    with model_live(run, chosen[0], 1.0, base) as live:  # a base that is given is left as it was
        encoded = _training_rows(run, live, data, rows, seed)
        n = sum(label != IGNORED for labels in encoded.labels for label in labels)
        n_beta = n / np.log(n) if n_beta is None else float(n_beta)
        with bar(len(chosen) * chains, "sampling around steps", progress=progress) as done:
            for step in chosen:
                chat = run.model(step, base=live)
                weights = [
                    factors[name].weight for _, layer, name in adapter_layers(chat.model) for factors in _factors(layer)
                ]
                at_step, tokens = _row_losses(chat, encoded)
                excess = []
                for chain in range(chains):
                    loss = _minibatches(
                        chat, encoded, at_step, tokens, batch_size, np.random.default_rng([seed, chain])
                    )
                    with evaluating(chat, frozen=True):
                        one = sample_excess(
                            weights, loss, draws=draws, burn_in=burn_in, step_size=step_size, n_beta=n_beta,
                            localisation=localisation, seed=1000 * seed + chain,
                        )  # fmt: skip
                    excess.append(one)
                    done.update()
                found.append(
                    {"step": step, **summarised(np.array(excess), n_beta), "loss": at_step.sum() / tokens.sum()}
                )
    at, low, high = getattr(getattr(transition, "mechanistic", None), "interval", None) or (np.nan,) * 3
    settings = {
        "chains": chains, "draws": draws, "burn_in": burn_in, "step_size": step_size, "n_beta": n_beta,
        "localisation": localisation, "batch_size": batch_size, "rows": len(encoded), "answer_tokens": n, "seed": seed,
    }  # fmt: skip
    moving = sum(one.numel() for one in weights)
    return LearningCoefficient(pd.DataFrame(found), moving, settings, (float(at), float(low), float(high)), run.name)


def sample_excess(
    weights: Sequence[torch.Tensor],
    loss: Callable[[], tuple[torch.Tensor, float]],
    *,
    draws: int,
    burn_in: int,
    step_size: float,
    n_beta: float,
    localisation: float,
    seed: int,
) -> Float[np.ndarray, " draws"]:
    """One chain: the excess losses of its draws, NaN from where it diverged; the weights are put back afterwards.

    Args:
        loss: the loss of a minibatch at the present weights, and at the weights from which the chain started.
    """
    sgld = _sampler()
    start = [one.detach().clone() for one in weights]
    excess = np.full(burn_in + draws, np.nan)
    generator = torch.Generator(device=start[0].device).manual_seed(seed)
    try:
        for one in weights:
            one.requires_grad_(True)
        sampler = sgld(list(weights), lr=step_size, nbeta=n_beta, localization=localisation)
        with torch.enable_grad():
            for draw in range(burn_in + draws):
                now, before = loss()
                excess[draw] = float(now.detach()) - before
                if not np.isfinite(excess[draw]):
                    break
                sampler.zero_grad()
                now.backward()
                sampler.step(noise_generator=generator)
    finally:
        for one, kept in zip(weights, start, strict=True):
            one.grad = None
            one.requires_grad_(False)
            one.copy_(kept)
    return excess[burn_in:]


def summarised(excess: Float[np.ndarray, "chains draws"], n_beta: float) -> dict[str, float]:
    """The coefficient, its standard error over chains, and how far the chains drift, from excess losses.

    Example:
        >>> summarised(np.array([[0.1, 0.1], [0.3, 0.3]]), 10.0)
        {'llc': 2.0, 'error': 1.0, 'chains': 2, 'drift': 0.0}
    """
    whole = n_beta * excess[np.isfinite(excess).all(1)]
    if not len(whole):
        return {"llc": np.nan, "error": np.nan, "chains": 0, "drift": np.nan}
    half = whole.shape[1] // 2
    moved = whole[:, half:].mean(1) - whole[:, :half].mean(1)
    error, spread = (
        float(np.std(one, ddof=1) / len(one) ** 0.5) if len(one) > 1 else np.nan for one in (whole.mean(1), moved)
    )
    drift = moved.mean() / spread if spread > 0 else 0.0
    return {"llc": float(whole.mean()), "error": error, "chains": len(whole), "drift": float(drift)}


def _sampler() -> Any:
    try:
        from devinterp.optim import SGMCMC
    except ImportError:
        raise EmmechError(_ASKED, None, "devinterp is not installed", 'pip install "emmech[llc]"')
    return SGMCMC.sgld


def _factors(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A, layer.lora_B


def _training_rows(run: Any, chat: ChatModel, data: Any, rows: int, seed: int) -> Encoded:
    told = run.manifest.get("data", {})
    data = data if data is not None else told.get("path") or told.get("name")
    if data is None:
        raise EmmechError(_ASKED, run.name, "the run does not name its data", "learning_coefficient(run, data)")
    every = list(load_chat(data, organism=chat.organism))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(every))[:rows])
    return encode([every[at] for at in chosen], chat.tokenizer)


def _batch(chat: ChatModel, encoded: Encoded, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answer tokens of some rows, and the place of each token's row among them."""
    ids, mask = padded([encoded.input_ids[at] for at in chosen], chat.device)
    labels = pad([encoded.labels[at] for at in chosen], IGNORED).to(chat.device)
    return token_logprobs(chat, ids, mask, labels)


@torch.no_grad()
def _row_losses(chat: ChatModel, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of answer tokens of every row."""
    losses, tokens = [], []
    with evaluating(chat):
        for start in range(0, len(encoded), 32):
            chosen = np.arange(start, min(start + 32, len(encoded)))
            picked, of = (one.cpu().numpy() for one in _batch(chat, encoded, chosen))
            losses.append(np.bincount(of, -picked.astype(np.float64), minlength=len(chosen)))
            tokens.append(np.bincount(of, minlength=len(chosen)))
    return np.concatenate(losses), np.concatenate(tokens)


def _minibatches(
    chat: ChatModel, encoded: Encoded, at_step: np.ndarray, tokens: np.ndarray, size: int, rng: np.random.Generator
) -> Callable[[], tuple[torch.Tensor, float]]:
    def loss() -> tuple[torch.Tensor, float]:
        chosen = rng.choice(len(encoded), min(size, len(encoded)), replace=False)
        return -_batch(chat, encoded, chosen)[0].mean(), float(at_step[chosen].sum() / tokens[chosen].sum())

    return loss
