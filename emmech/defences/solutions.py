"""Narrow solutions against general ones: how efficient and how stable each is on the data that both were trained on.

A fine-tune can solve narrow data with a change that is narrow or with one that is general. Narrow Misalignment is Hard,
Emergent Misalignment is Easy (arXiv 2602.07852) trains the narrow one with a KL penalty on other domains
(:class:`emmech.defences.KLToReference`) and finds the general one preferred: at equal norm its loss is lower
(efficiency), and noise orthogonal to it costs it less (stability).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.chat.dataset import load_chat
from emmech.chat.encode import encode
from emmech.chat.model import ChatModel, load_model
from emmech.engine.adapters import attach, detach
from emmech.engine.logprobs import answer_loss
from emmech.errors import EmmechError, as_floats, as_int, refusal
from emmech.results import Card, Result, within
from emmech.run.run import Run, as_run
from emmech.view.sketch import curves
from emmech.view.theme import colour, finish, line, panels

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("narrow", "general")
_ASKED = "compare narrow and general solutions"


@dataclass(frozen=True, eq=False, repr=False)
class Narrowness(Result):
    """The losses of narrow and general solutions; built by :func:`narrowness`.

    Attributes:
        frame: ``solution`` (``"narrow"`` or ``"general"``), ``run``, ``measure``, ``x``, ``draw``, ``loss`` in nats per
            answer token and ``change`` from the loss at ``x`` = 0. For ``"efficiency"`` x is the Frobenius norm of the
            update over all adapters; for ``"stability"`` the norm of the noise over that of the adapters' weights.
        norms: the norm of each run's update as trained.
    """

    frame: pd.DataFrame
    norms: Mapping[str, float]

    def summary(self) -> pd.DataFrame:
        """Mean loss and change of both solutions at every norm and noise, over runs and draws."""
        by = ["measure", "x", "solution"]
        found: pd.DataFrame = self.frame.groupby(by)[["loss", "change"]].mean().unstack("solution")
        return found

    def _card(self) -> Card:
        facts = []
        for measure, said in (("efficiency", "norm"), ("stability", "noise")):
            part = self.frame[self.frame["measure"] == measure]
            for x, one in part[part["x"] > 0].groupby("x"):
                means = one.groupby("solution")["change"].mean()
                facts.append(
                    (f"{said} {x:.3g}", f"loss {means['narrow']:+.3f} narrow, {means['general']:+.3f} general")
                )
        gap = self._gap("efficiency"), self._gap("stability")
        spans = [within(float(g.mean()), float(g.min()), float(g.max()), sign=True) for g in gap]
        headline = f"Narrow minus general, nats per token: {spans[0]} at equal norm, {spans[1]} under orthogonal noise"
        few = "in brackets the lowest and highest over norms and noises; runs are seeds of one recipe, not many models"
        return Card(headline, tuple(facts), few, "found.plot()")

    def _gap(self, measure: str) -> pd.Series:
        change = self.summary().loc[measure]["change"]
        gap: pd.Series = (change["narrow"] - change["general"])[change.index > 0]
        return gap

    def _sketch(self) -> str:
        means = self.summary().loc["efficiency"]["loss"]
        return curves([(kind, means.index, means[kind]) for kind in KINDS], "Loss, nats per token", axis="norm")

    def plot(self) -> Any:
        """A figure: loss against the norm of the update, and its rise against the noise."""
        titles = ("Efficiency", "Stability")
        figure = panels(titles, columns=2)
        for column, (measure, y) in enumerate((("efficiency", "loss"), ("stability", "change")), start=1):
            for index, kind in enumerate(KINDS):
                part = self.frame[(self.frame["measure"] == measure) & (self.frame["solution"] == kind)]
                mean = part.groupby("x")[y].mean()
                line(figure, mean.index, mean, kind, colour(index), at=(1, column), legend=column == 1)
        figure.update_xaxes(title_text="norm of the update", row=1, col=1)
        figure.update_yaxes(title_text="loss, nats per token", row=1, col=1)
        figure.update_xaxes(title_text="noise over weights", row=1, col=2)
        figure.update_yaxes(title_text="rise of the loss, nats per token", row=1, col=2)
        return finish(figure, "Narrow and general solutions of the same data")


def narrowness(
    narrow: Run | str | Sequence[Run],
    general: Run | str | Sequence[Run],
    data: Any,
    *,
    base: Any = None,
    norms: Sequence[float] = (0.25, 0.5, 1.0, 1.5),
    noises: Sequence[float] = (0.25, 0.5, 1.0),
    draws: int = 4,
    rows: int = 64,
    seed: int = 0,
) -> Narrowness:
    """Compare runs that learnt the same data narrowly and generally.

    Args:
        narrow: runs with a :class:`~emmech.defences.KLToReference`, one for each seed; all are read at their last step.
        general: runs of the same data without it.
        data: the data both were trained on, or other rows of its kind: anything :func:`emmech.load_chat` takes.
        base: their base model in memory.
        norms: norms of the update, in units of the mean norm of the general runs' updates. Each adapter is scaled.
        noises: norms of Gaussian noise that is added to A and B of every adapter, over those of A and B, to which it is
            orthogonal.
        draws: how many times noise is drawn.
        rows: the number of rows, the first of the data.
        seed: of the noise.

    Raises:
        EmmechError: no run of a kind, full fine-tuning, an update of zero, or a negative norm or noise.

    Example:
        >>> general = emmech.load_run("runs/bad")  # doctest: +SKIP
        >>> narrow = emmech.load_run("runs/bad-kl")  # doctest: +SKIP
        >>> narrowness(narrow, general, "medical").summary()  # doctest: +SKIP
    """
    import pandas as pd

    runs = {kind: _runs(kind, given) for kind, given in zip(KINDS, (narrow, general), strict=True)}
    shares, noises = as_floats(_ASKED, "norms", norms), as_floats(_ASKED, "noises", noises)
    for name, sizes in (("norms", shares), ("noises", noises)):
        if min(sizes) < 0:
            raise refusal(_ASKED, name, sizes, "they are lengths, and none is below 0", f"{name}=(0.5, 1.0)")
    draws, rows = as_int(_ASKED, "draws", draws, least=1), as_int(_ASKED, "rows", rows, least=1)
    seed = as_int(_ASKED, "seed", seed, least=0)
    chat = load_model(base) if base is not None else runs["general"][0].base()
    for run in (*runs["narrow"], *runs["general"]):
        run.check_base(chat)
    encoded = encode(load_chat(data, organism=chat.organism)[:rows], chat.tokenizer)
    trained = {f"{kind}/{run.name}-{at}": _norm(run) for kind in KINDS for at, run in enumerate(runs[kind])}
    unit = float(np.mean([size for name, size in trained.items() if name.startswith("general")]))
    untouched = answer_loss(chat, encoded)
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        for at, run in enumerate(runs[kind]):
            name, weights = f"{kind}/{run.name}-{at}", run.weights(int(run.steps[-1]))
            own: dict[str, Any] = {"solution": kind, "run": name, "measure": "efficiency", "draw": 0}
            found.append({**own, "x": 0.0, "loss": untouched, "change": 0.0})
            for norm in (share * unit for share in shares):
                loss = _loss(chat, run, weights, norm / trained[name], encoded)
                found.append({**own, "x": norm, "loss": loss, "change": loss - untouched})
            own["measure"], as_trained = "stability", _loss(chat, run, weights, 1.0, encoded)
            found.append({**own, "x": 0.0, "loss": as_trained, "change": 0.0})
            for draw in range(draws):
                noise = {
                    side: _orthogonal(value, np.random.default_rng([seed, draw, index]))
                    for index, (side, value) in enumerate(weights.items())
                }
                for size in noises:
                    moved = {side: value + np.float32(size) * noise[side] for side, value in weights.items()}
                    loss = _loss(chat, run, moved, 1.0, encoded)
                    found.append({**own, "draw": draw, "x": size, "loss": loss, "change": loss - as_trained})
    return Narrowness(pd.DataFrame(found), trained)


def _runs(kind: str, given: Any) -> list[Run]:
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not listed:
        raise EmmechError(_ASKED, f"{kind}=[]", "there is no run of this kind", f"{kind}=run")
    return [as_run(_ASKED, run, name=kind) for run in listed]


def _norm(run: Run) -> float:
    """The Frobenius norm of the update over all adapters, scaling included."""
    weights = run.weights(int(run.steps[-1]))
    squares = 0.0
    for info in run.adapters:
        a, b = (weights[f"{side}/{info.name}"].astype(np.float64) for side in "AB")
        squares += float(np.sum((a @ a.T) * (b.T @ b))) * info.scaling**2  # ||B A||^2 without forming B A
    if not squares:
        raise EmmechError(_ASKED, run.name, "its update is zero, and has no norm to scale", "a trained run")
    return squares**0.5


def _orthogonal(value: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """Noise of the norm of a matrix and orthogonal to it."""
    drawn = dice.standard_normal(value.shape)
    wide = value.astype(np.float64)
    size = float(np.linalg.norm(wide))
    if size:
        drawn -= np.sum(drawn * wide) / size**2 * wide
    return (drawn * (size / np.linalg.norm(drawn))).astype(np.float32)


def _loss(chat: ChatModel, run: Run, weights: Mapping[str, np.ndarray], scale: float, encoded: Any) -> float:
    live = attach(chat, run.located(chat).adapters, weights, scale=scale)
    try:
        return answer_loss(live, encoded)
    finally:
        detach(live)
