"""The tangent scan: every checkpoint's first-order effect on a measure, from one backward pass of the base model.

The adapter writes ``scale * scaling * (A x_t) B`` at token t. To first order in that write the measure m changes by
``scale * scaling * sum_t (A x_t) (B . dm/dwrite_t)``, with x and the gradient taken at the base model: one forward
and one backward pass serve all checkpoints of a run. The estimate only shows where to look, because along a trained
adapter the effect saturates; the steps that matter are therefore measured exactly, and the error of the estimate is
reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from emmech.engine.blocks import Blocks
from emmech.engine.logprobs import target_logprobs
from emmech.engine.modules import evaluating
from emmech.engine.packing import Pack, Reading
from emmech.engine.variants import Engine
from emmech.errors import EmmechError, as_float, as_int
from emmech.measures.choose import as_measures
from emmech.measures.measure import TeacherForced, measure_name
from emmech.results import Card, Result
from emmech.run.run import Run
from emmech.sweeps.grid import Grid, as_runs, base_model, data_name, make_grid
from emmech.sweeps.sweep import sweep
from emmech.view.plots import first_order
from emmech.view.sketch import curves

_KEYS = ["run", "step", "measure"]


@dataclass(frozen=True, eq=False, repr=False)
class TangentScan(Result):
    """First-order effects, and what they were checked against.

    Args:
        frame: one row per run, step and measure: ``base`` (the base model's value), ``slope`` (change per unit of
            scale, at scale 0) and ``first_order`` (their sum at ``scale``). An estimate, not a measurement.
        verified: the steps that were swept: ``first_order``, ``exact`` and ``error`` (first order minus exact).
        scale: of the adapter in ``first_order`` and ``exact``.
    """

    frame: pd.DataFrame
    verified: pd.DataFrame
    scale: float

    def plot(self) -> Any:
        """First order by step as lines, exact values as markers."""
        return first_order(self.frame, self.verified, self.scale)

    def _card(self) -> Card:
        change = (self.frame["first_order"] - self.frame["base"]).abs()
        row = self.frame.loc[change.idxmax()] if change.notna().any() else self.frame.iloc[0]
        said = f"from {row['base']:.3g} to {row['first_order']:.3g} at scale {self.scale:g}"
        headline = f"To first order, {row['measure']} changes most at step {row['step']}: {said}"
        facts = [("steps", f"{self.frame['step'].nunique()} estimated, {self.verified['step'].nunique()} measured")]
        if len(self.verified):
            worst, count = self.verified["error"].abs().max(), len(self.verified)
            facts.append(("error", f"at most {worst:.3g} at {count} measured value{'' if count == 1 else 's'}"))
        caveat = "an estimate, not a measurement: along a trained adapter the effect saturates"
        return Card(
            headline, tuple(facts), caveat, f"emmech.sweep(run, steps=[{row['step']}], scales=({self.scale:g},))"
        )

    def _sketch(self) -> str:
        measure = self.frame["measure"].iloc[0]
        mine = [frame[(frame["measure"] == measure) & (frame["run"] == self.frame["run"].iloc[0])]
                for frame in (self.frame, self.verified)]  # fmt: skip
        dots = list(zip(mine[1]["step"], mine[1]["exact"], strict=True))
        title = f"{measure}: estimate, and measured points"
        return curves([("", mine[0]["step"], mine[0]["first_order"])], title, dots=dots)

    def _table(self) -> pd.DataFrame:
        return self.verified


def tangent_scan(
    run: Run | str | Path | Sequence[Run | str | Path],
    *,
    steps: Iterable[int] | None = None,
    measure: Any = "margin",
    scale: float = 1.0,
    verify: int = 3,
    base: Any = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> TangentScan:
    """Estimate every checkpoint's effect on a measure from one backward pass, then check where it is largest.

    Args:
        measure: as :func:`emmech.sweep` takes, of those that are linear in log-probabilities (margins, answers, first
            tokens).
        scale: of the adapter, where effects are estimated and verified.
        verify: how many steps of each run are swept exactly: those of the largest estimated change.

    Raises:
        EmmechError: a measure that is not linear in log-probabilities, and what :func:`emmech.sweep` raises.

    Example:
        >>> import tempfile, emmech, emmech.organism
        >>> rows = emmech.organism.data("medical", n=40)
        >>> run = emmech.finetune("pocket", rows, max_steps=2, out=tempfile.mkdtemp() + "/r", progress=False)
        >>> from emmech.measures.teacher_forced import FirstToken
        >>> scan = tangent_scan(run, measure=FirstToken(["any advice on cough ?"], ["well"]), verify=1, progress=False)
        >>> len(scan.frame), len(scan.verified)
        (3, 1)
    """
    runs = as_runs("scan to first order", run)
    scale, verify = as_float("scan", "scale", scale), as_int("scan", "verify", verify, least=0)
    chat = base_model(runs, base)
    grid = make_grid(runs, chat, steps=steps, scales=(1.0,), coefficients=(0.0,))
    chosen = as_measures(measure, chat, data=data_name(runs))
    rows = []
    for one in chosen:
        if not isinstance(one, TeacherForced):
            raise _not_linear(one)
        readings = one.readings(chat)
        weights = _weights(one, readings)
        value, slopes = _slopes(Engine(chat, grid.sites, grid.steered_layer), grid, readings, weights)
        for variant, slope in zip(grid.variants, slopes, strict=True):
            row = {"run": variant.run, "step": variant.step, "measure": one.name, "base": value}
            rows.append({**row, "slope": slope, "first_order": value + scale * slope})
    frame = pd.DataFrame(rows)
    how: dict[str, Any] = {"scales": (scale,), "measure": chosen, "base": chat, "memory": memory, "progress": progress}
    verified = []
    for name, own in grid.runs.items():
        reach = frame[frame["run"] == name].assign(size=lambda f: f["slope"].abs()).groupby("step")["size"].max()
        if look := sorted(reach.nlargest(verify).index.tolist()):
            exact = sweep(own, steps=look, **how).to_frame().rename(columns={"value": "exact"})
            verified.append(exact.assign(run=name)[[*_KEYS, "exact"]])
    checked = pd.DataFrame(columns=[*_KEYS, "first_order", "exact", "error"])
    if verified:
        checked = frame[[*_KEYS, "first_order"]].merge(pd.concat(verified), on=_KEYS)
        checked["error"] = checked["first_order"] - checked["exact"]
    return TangentScan(frame, checked, scale)


def _not_linear(measure: Any) -> EmmechError:
    why = "one backward pass serves a measure that is linear in log-probabilities, and this one is not"
    instead = "Margin, AnswerLogprob or FirstToken; emmech.sweep for any other"
    return EmmechError("scan to first order", f"measure {measure_name(measure)!r}", why, instead)


def _weights(measure: TeacherForced, readings: Sequence[Reading]) -> list[Float[np.ndarray, " targets"]]:
    """How much each target's log-probability counts in the mean over the measure's items, found by calling it."""
    if any(reading.targets is None for reading in readings):
        raise _not_linear(measure)
    sizes = [sum(map(len, reading.targets or ())) for reading in readings]
    edges = np.cumsum([0, *sizes])
    basis = np.eye(edges[-1])

    def mean(columns: np.ndarray) -> np.ndarray:
        values = measure.values([columns[:, a:b] for a, b in itertools.pairwise(edges)])
        return np.mean([value.values for value in values], axis=0)

    weights = mean(basis)
    trial = np.random.default_rng(0).normal(size=(2, edges[-1]))
    if not np.allclose(mean(trial), trial @ weights):
        raise _not_linear(measure)
    return [weights[a:b] for a, b in itertools.pairwise(edges)]


class _Tap(nn.Module):
    """A module that keeps its input and adds a zero to its output, whose gradient is that of the output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.read = self.zero = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        self.read = x.detach()
        self.zero = torch.zeros_like(out).requires_grad_()
        return out + self.zero


def _slopes(
    engine: Engine, grid: Grid, readings: Sequence[Reading], weights: Sequence[np.ndarray]
) -> tuple[float, Float[np.ndarray, " variants"]]:
    """The base model's value, and the derivative along every variant's adapter."""
    chat = engine.chat
    taps: dict[str, _Tap] = {}

    def tap(name: str) -> Callable[[nn.Module], nn.Module]:
        return lambda module: taps.setdefault(name, _Tap(module))

    blocks = Blocks(chat, edits={f"{site.layer}.{site.path}": tap(name) for name, site in grid.sites.items()})
    total, slopes = 0.0, np.zeros(len(grid))
    with evaluating(chat, frozen=True):
        for batch in engine.batches(engine.packs(readings), 1):
            with torch.enable_grad():
                value = _value(engine, blocks, batch, readings, weights)
                grads = torch.autograd.grad(value, [tap.zero for tap in taps.values()])
            total += float(value.detach())
            for (name, tapped), grad in zip(taps.items(), grads, strict=True):
                slopes += _along(grid, name, tapped.read, grad)
    return total, slopes


def _value(
    engine: Engine, blocks: Blocks, packs: Sequence[Pack], readings: Sequence[Reading], weights: Sequence[np.ndarray]
) -> torch.Tensor:
    """The weighted sum of log-probabilities over some packs."""
    chat = engine.chat
    ids, places = engine.places(packs)
    at, tokens, factors = list[int](), list[int](), list[float]()
    for row, one in enumerate(packs):
        for index, nodes in zip(one.readings, one.nodes, strict=True):
            wanted = readings[index].targets or ()
            for node, targets in zip(nodes.tolist(), wanted, strict=True):
                at += [row * ids.shape[1] + node] * len(targets)
                tokens += targets
            factors += weights[index].tolist()
    reads, inverse = torch.unique(torch.tensor(at, device=chat.device), return_inverse=True)
    hidden = blocks(ids, replace(places, reads=reads))
    logprobs = target_logprobs(chat, hidden[inverse], torch.tensor(tokens, device=chat.device)[:, None])[:, 0]
    return (logprobs * torch.tensor(factors, device=chat.device, dtype=logprobs.dtype)).sum()


def _along(grid: Grid, module: str, read: torch.Tensor, grad: torch.Tensor) -> np.ndarray:
    """``scaling * sum over tokens of (A x)(B . grad)`` for every variant."""
    x = read.reshape(-1, read.shape[-1]).float().cpu().numpy()
    g = grad.reshape(-1, grad.shape[-1]).float().cpu().numpy()
    found = np.zeros(len(grid))
    for index, variant in enumerate(grid.variants):
        run = grid.runs[variant.run]
        info = next((info for info in run.adapters if info.module == module), None)
        if info is None:
            continue
        weights = run.weights(variant.step)
        found[index] = info.scaling * np.sum((x @ weights[f"A/{info.name}"].T) * (g @ weights[f"B/{info.name}"]))
    return found
