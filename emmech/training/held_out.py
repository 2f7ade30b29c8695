"""What is measured of the runs while they train: held-out loss and margins, and how often that can be afforded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from einops import rearrange

from emmech.engine.row_forwards import Asked
from emmech.training.objective import Batch, CrossEntropy, RowForwards, summed

__all__ = ["HELD_OUT", "HeldOut", "affordable"]

HELD_OUT = 64  # rows at most
_FEWEST = 8  # held-out rows below which it is better to measure less often
_SHARE = 0.1  # of the training's own work
_TIMES = 20


def affordable(
    steps: int, every: int, *, own: int, each_time: int, held: Sequence[int], times: int | None = None
) -> tuple[int, int]:
    """After how many steps to measure each time, and how many held-out rows, for a tenth of the training's own work.

    Work is counted in tokens that go forward through the model; a backward pass counts as two forward passes. Of 64
    held-out rows and twenty times, rows are given up first, down to 8, then times, down to the first and the last
    step, then rows again, down to one.

    Args:
        steps: how many optimizer steps there are, of which each ``every``-th is recorded.
        own: tokens in the training's own forward and backward passes.
        each_time: tokens of the margins' and probes' forwards.
        held: tokens of each held-out row.
        times: as many as this, whatever they cost.

    Example:
        >>> affordable(250, 1, own=10**9, each_time=0, held=[50] * 200)
        (12, 64)
        >>> affordable(60, 1, own=3 * 240 * 90, each_time=0, held=[90] * 22)  # 72 rows
        (8, 8)
    """
    limit, most = _SHARE * own, min(HELD_OUT, len(held))
    gap = every * max(1, round(steps / ((times or _TIMES) * every)))
    if times is not None:
        return gap, most

    def affords(gap: int, rows: int) -> bool:
        return len({*range(0, steps, gap), steps}) * (each_time + sum(held[:rows])) <= limit

    rows = next((rows for rows in range(most, _FEWEST, -1) if affords(gap, rows)), min(most, _FEWEST))
    while not affords(gap, rows) and gap < steps:
        gap += every
    while not affords(gap, rows) and rows > 1:
        rows -= 1
    return gap, rows


class HeldOut:
    """Held-out loss and margins of all runs, each taken of all runs in shared forwards, once a step.

    Args:
        batch: of no rows: what is asked for is put in.
        held: for each run its held-out rows.
        margins: forwards of the pairs, by name: all misaligned answers, then all aligned ones.
    """

    def __init__(self, batch: Batch, held: Sequence[Sequence[Asked]], margins: Mapping[str, RowForwards]) -> None:
        self._batch, self._held, self._margins = batch, held, margins
        self._found: dict[str, dict[int, float]] = {}

    def measure(self, runs: Sequence[int]) -> None:
        """Take all of it, of these runs as they are now."""
        self._found = {}
        if self._batch.adapters is not None:
            self._batch.adapters.gather()
        with torch.no_grad():
            for name, forwards in self._margins.items():
                self._found[f"margin_{name}"] = self._mean_margins(forwards, runs)
            held = [one for run in runs for one in self._held[run]]
            if held:
                losses = summed([CrossEntropy()], replace(self._batch, asked=held))["answer_loss"]
                self._found["held_out_loss"] = dict(enumerate(losses.tolist()))

    def of(self, run: int) -> dict[str, float]:
        """What was measured of a run last: ``margin_<name>``, and ``held_out_loss`` where rows are held out."""
        return {name: values[run] for name, values in self._found.items()}

    def _mean_margins(self, forwards: RowForwards, runs: Sequence[int]) -> dict[int, float]:
        """Mean over pairs as :func:`emmech.engine.logprobs.margin` has it, in nats per token."""
        asked = [Asked(run, row, len(ids)) for run in runs for row, ids in enumerate(forwards.rows.input_ids)]
        total = torch.zeros(len(asked), dtype=torch.float64, device=self._batch.chat.device)
        for nll, of in forwards.nll(asked):
            total.index_add_(0, of, nll.double())
        logprobs = -total.cpu() / forwards.answer_tokens(asked)
        misaligned, aligned = rearrange(logprobs, "(run side pair) -> side run pair", run=len(runs), side=2)
        return dict(zip(runs, (misaligned - aligned).mean(1).tolist(), strict=True))
