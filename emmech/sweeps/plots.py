"""The phase diagram of a sweep: how a measure depends on the step and on the adapter's scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from emmech.sweeps.result import Sweep

__all__ = ["phase_diagram"]

_RATES = {"em": "EM rate", "narrow": "narrow misalignment rate", "coherent": "coherent share"}


def phase_diagram(sweep: Sweep, measure: str) -> Any:
    """Heat maps, steps along x and scales along y, one panel per run and coefficient; lines where an axis is single."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    summary = sweep.to_frame(measure)
    panels = list(summary.groupby(["run", "coefficient"], sort=False))
    many = summary["coefficient"].nunique() > 1
    titles = [f"{run}, coefficient {c:g}" if many else str(run) for (run, c), _ in panels]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles, shared_yaxes=True)
    flat = summary["step"].nunique() == 1 or summary["scale"].nunique() == 1
    finite = summary["value"].to_numpy(float)
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    signed = measure not in _RATES and low < 0 < high
    reach = max(abs(low), abs(high))
    for column, (_, part) in enumerate(panels, start=1):
        if flat:
            axis = "step" if summary["scale"].nunique() == 1 else "scale"
            figure.add_trace(
                go.Scatter(
                    x=part[axis],
                    y=part["value"],
                    error_y={"array": part["error"], "thickness": 1},
                    mode="lines+markers",
                    name=titles[column - 1],
                ),
                row=1,
                col=column,
            )
            figure.update_xaxes(title_text=axis, row=1, col=column)
            continue
        table = part.pivot(index="scale", columns="step", values="value")
        figure.add_trace(
            go.Heatmap(
                z=table.to_numpy(),
                x=[str(step) for step in table.columns],
                y=[f"{scale:g}" for scale in table.index],
                zmin=0.0 if measure in _RATES else (-reach if signed else low),
                zmax=1.0 if measure in _RATES else (reach if signed else high),
                colorscale="RdBu_r" if signed else "Viridis",
                coloraxis=None,
                showscale=column == len(panels),
                colorbar={"title": {"text": _RATES.get(measure, measure)}},
                hovertemplate="step %{x}, scale %{y}: %{z:.3f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text="step", type="category", row=1, col=column)
    shown = _RATES.get(measure, measure)
    figure.update_yaxes(
        title_text=shown if flat else "scale on the adapter",
        type="linear" if flat else "category",
        row=1,
        col=1,
    )
    figure.update_layout(title=f"{shown} by step and scale", template="plotly_white", showlegend=False)
    return figure
