"""Does the conclusion hang on one question, or on where the thresholds are set?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from emmech.errors import EmmechError
from emmech.evaluation.em import ALIGNMENT_GRID, COHERENCE_GRID, Denominator, Thresholds
from emmech.evaluation.rates import check, outcome

if TYPE_CHECKING:
    import plotly.graph_objects as go

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


@dataclass(frozen=True, eq=False)
class ThresholdSweep:
    """A rate on a grid of thresholds: ``frame`` has rows = alignment below, columns = coherence above."""

    measure: str
    denominator: str
    frame: pd.DataFrame
    name: str = ""

    def __repr__(self) -> str:
        rates = self.frame.to_numpy()
        rates = rates[np.isfinite(rates)]
        said = f"{rates.min():.1%} to {rates.max():.1%}" if len(rates) else "not measurable"
        return (
            f"ThresholdSweep({self.measure} of {self.denominator} rows: {said} over "
            f"{len(self.frame)} x {self.frame.shape[1]} thresholds)"
        )

    def _repr_html_(self) -> str:
        return self.frame.to_html(float_format="%.3f")

    def to_frame(self) -> pd.DataFrame:
        """The grid of rates."""
        return self.frame.copy()

    def plot(self) -> go.Figure:
        """The rate against the alignment threshold, one line per coherence threshold."""
        from emmech.evaluation.plots import threshold_figure

        return threshold_figure(self)


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
