"""Figures over recorded runs; each is returned as a plotly figure, never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emmech.errors import EmmechError
from emmech.run.run import Run

__all__ = ["COLOURS", "LAYOUT", "metric_figure"]

# Colour-blind safe (Okabe & Ito): the run, its control, and further conditions in this order.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LAYOUT: dict[str, Any] = dict(
    template="plotly_white",
    font=dict(family="system-ui, sans-serif", size=13, color="#1c2430"),
    margin=dict(l=60, r=20, t=48, b=50),
    hovermode="x unified",
    legend=dict(orientation="h", y=1.12, x=0),
)


def metric_figure(
    runs: Mapping[str, Run], columns: Mapping[str, str], *, heights: int = 300, zero: Sequence[str] = ()
) -> Any:
    """Metrics by step, one panel per metric, one line per run.

    Args:
        runs: by the name in the legend.
        columns: metric name to the panel's title.
        zero: metrics that get a line at zero.

    Raises:
        EmmechError: no run recorded one of the metrics.
    """
    from plotly.subplots import make_subplots

    for column in columns:
        if not any(column in run.metrics and run.metrics[column].notna().any() for run in runs.values()):
            raise EmmechError(
                f"plot {column!r}",
                f"runs {list(runs)}",
                "none of them recorded it",
                "run.metrics.columns lists what was recorded",
            )
    figure = make_subplots(rows=1, cols=len(columns), subplot_titles=list(columns.values()))
    for panel, column in enumerate(columns, start=1):
        for index, (name, run) in enumerate(runs.items()):
            series = run.metrics.get(column)
            if series is None:
                continue
            series = series.dropna()
            figure.add_scatter(
                x=series.index,
                y=series,
                name=name,
                legendgroup=name,
                showlegend=panel == 1,
                mode="lines+markers" if len(series) <= 40 else "lines",
                line=dict(color=COLOURS[index % len(COLOURS)], width=2),
                row=1,
                col=panel,
            )
        if column in zero:
            figure.add_hline(y=0, line=dict(color="#9aa4b1", width=1, dash="dot"), row=1, col=panel)
        figure.update_xaxes(title_text="step", row=1, col=panel)
    return figure.update_layout(**LAYOUT, height=heights)
