"""Does the conclusion hang on one question, or on where the thresholds are set?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from emmech.errors import EmmechError
from emmech.evaluation.em import ALIGNMENT_GRID, COHERENCE_GRID, Denominator, Thresholds
from emmech.evaluation.rates import check, outcome
from emmech.results import Card, Result
from emmech.view.plots import thresholds

__all__ = ["ThresholdSweep", "leave_one_out", "threshold_sweep"]


def leave_one_out(
    frame: pd.DataFrame,
    measure: str = "em",
    denominator: Denominator = "scored",
    *,
    thresholds: Thresholds | None = None,
) -> pd.DataFrame:
    """The overall rate with each question left out in turn.

    Returns:
        A frame indexed by the question left out with ``rate`` (without it), ``shift`` (that minus the rate of all),
        ``share`` (its part of all events), ``n``; the largest absolute shift comes first.

    Raises:
        EmmechError: fewer than two questions.
    """
    per = outcome(frame, measure, denominator, thresholds).per(frame["question_id"])
    per = per[per["n"] > 0]
    if len(per) < 2:
        raise EmmechError(
            "leave one question out",
            f"{len(per)} question(s) with rows that count",
            "nothing is left without it",
            "evaluate on at least two questions",
        )
    events, n = per["events"].sum(), per["n"].sum()
    table = pd.DataFrame(
        {
            "rate": (events - per["events"]) / (n - per["n"]),
            "share": per["events"] / events if events else np.nan,
            "n": n - per["n"],
        }
    )
    table.insert(1, "shift", table["rate"] - events / n)
    table.index.name = "left_out"
    return table.sort_values("shift", key=np.abs, ascending=False, kind="stable")


@dataclass(frozen=True, eq=False, repr=False)
class ThresholdSweep(Result):
    """A rate on a grid of thresholds: ``frame`` has rows = alignment below, columns = coherence above."""

    measure: str
    denominator: str
    frame: pd.DataFrame
    name: str = ""

    def _card(self) -> Card:
        rates = self.frame.to_numpy()
        rates = rates[np.isfinite(rates)]
        said = f"{rates.min():.1%} to {rates.max():.1%}" if len(rates) else "not measurable"
        grid = f"{len(self.frame)} x {self.frame.shape[1]} thresholds"
        what = f"{self.measure} of {self.name}, " if self.name else f"{self.measure} of "
        return Card(f"ThresholdSweep({what}{self.denominator} rows: {said} over {grid})")

    def plot(self) -> Any:
        """The rate against the alignment threshold, one line per coherence threshold; a plotly figure."""
        if not np.isfinite(self.frame.to_numpy(float)).any():
            raise EmmechError(
                "plot the thresholds",
                f"{self.measure} of {self.name or 'responses'}",
                "no response has both scores",
                "judge the responses first",
            )
        limits, name = Thresholds(), f"{self.measure} of {self.name or 'responses'}"
        return thresholds(self.frame, (limits.alignment_below, limits.coherence_above), self.denominator, name)


def threshold_sweep(
    frame: pd.DataFrame,
    measure: str = "em",
    denominator: Denominator = "scored",
    *,
    alignment_below: Sequence[float] = ALIGNMENT_GRID,
    coherence_above: Sequence[float] = COHERENCE_GRID,
    name: str = "",
) -> ThresholdSweep:
    """The rate at every pair of thresholds, the field's choice among them by default.

    Raises:
        EmmechError: no rows, an empty grid, a threshold outside 0 to 100.
    """
    check(frame, denominator, measure)
    if not len(alignment_below) or not len(coherence_above):
        raise EmmechError("sweep the thresholds", why="the grid is empty", instead="name at least one of each")
    grid = np.full((len(alignment_below), len(coherence_above)), np.nan)
    for row, alignment in enumerate(alignment_below):
        for column, coherence in enumerate(coherence_above):
            found = outcome(frame, measure, denominator, Thresholds(alignment, coherence))
            if found.counted.any():
                grid[row, column] = found.event.sum() / found.counted.sum()
    table = pd.DataFrame(
        grid,
        index=pd.Index(list(alignment_below), name="alignment_below"),
        columns=pd.Index(list(coherence_above), name="coherence_above"),
    )
    return ThresholdSweep(measure, denominator, table, name)
