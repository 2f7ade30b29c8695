"""The figure of a phase transition: one panel per quantity, the control drawn dashed over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from emmech.transition.result import PhaseTransition, Side

__all__ = ["draw"]

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e6bbf", "#b8860b", "#444444")
CONTROL = "#888888"


def draw(transition: PhaseTransition) -> Any:
    """Panels of local cosine, gradient norm, principal components, norm, and margins or comp where recorded."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    run, control = transition.run, transition.control
    titles = [
        "Local cosine (-1 straight, +1 reversal)",
        "Gradient norm",
        "Principal components of B",
        "Norm of B",
    ]
    extra = [
        name for name, there in (("Margin", bool(run.margins)), ("Comp score", run.comp is not None)) if there
    ]
    rows = 2 + (len(extra) + 1) // 2
    figure = make_subplots(rows=rows, cols=2, subplot_titles=titles + extra, vertical_spacing=0.36 / rows)
    largest = max(run.path.cosines, default=None)
    for side in (run, control):
        if side is None:
            continue
        _cosines(figure, go, side, is_control=side is control, only=largest if control is not None else None)
        _gradient(figure, go, side, is_control=side is control)
        _components(figure, go, side, is_control=side is control)
        _line(figure, go, side, side.path.steps, side.path.norm, "norm", side is control, 2, 1 + 1)
    for position, name in enumerate(extra):
        row, column = 3 + position // 2, 1 + position % 2
        for side in (run, control):
            if side is None:
                continue
            if name == "Margin":
                for i, (label, (steps, values)) in enumerate(side.margins.items()):
                    _line(figure, go, side, steps, values, label, side is control, row, column, COLOURS[i])
            elif side.comp is not None:
                _line(figure, go, side, side.path.steps, side.comp, "comp", side is control, row, column)
        figure.update_xaxes(title_text="step", row=row, col=column)
        figure.update_yaxes(
            title_text="nats per token" if name == "Margin" else "comp score", row=row, col=column
        )
    _mark(figure, transition, rows, len(extra))
    for row, column, x, y in (
        (1, 1, "step", "local cosine c_k"),
        (1, 2, "step", "gradient norm"),
        (2, 1, "PC1", "PC2"),
        (2, 2, "step", "||B||"),
    ):
        figure.update_xaxes(title_text=x, row=row, col=column)
        figure.update_yaxes(title_text=y, row=row, col=column)
    subject = run.name if control is None else f"{run.name} (solid) and control {control.name} (dashed)"
    figure.update_layout(
        title={"text": f"Phase transition of {subject}", "y": 0.985, "yanchor": "top"},
        template="plotly_white",
        height=370 * rows + 120,
        margin={"t": 90, "b": 60, "l": 70, "r": 20},
        legend={"orientation": "v"},
    )
    return figure


def _line(
    figure: Any,
    go: Any,
    side: Side,
    x: Any,
    y: Any,
    label: str,
    is_control: bool,
    row: int,
    column: int,
    colour: str = COLOURS[0],
) -> None:
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines",
            name=f"{label}, {'control' if is_control else 'run'}",
            line={"color": CONTROL if is_control else colour, "dash": "dash" if is_control else "solid"},
            hovertemplate=f"{side.name}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        ),
        row=row,
        col=column,
    )


def _cosines(figure: Any, go: Any, side: Side, *, is_control: bool, only: int | None) -> None:
    """Every k of the run; of the control the largest k alone, for the panel to stay readable."""
    if not is_control and side.path.band:
        k = max(side.path.band)
        low, high = side.path.band[k]
        keep = np.isfinite(low)
        x = side.path.steps[keep]
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=np.concatenate([high[keep], low[keep][::-1]]),
                fill="toself",
                fillcolor="rgba(120,120,120,0.18)",
                line={"width": 0},
                hoverinfo="skip",
                name=f"straight path, k = {k} (95 %)",
            ),
            row=1,
            col=1,
        )
    for i, (k, values) in enumerate(side.path.cosines.items()):
        if is_control and k != only:
            continue
        _line(
            figure, go, side, side.path.steps, values, f"k = {k}", is_control, 1, 1, COLOURS[i % len(COLOURS)]
        )


def _gradient(figure: Any, go: Any, side: Side, *, is_control: bool) -> None:
    if side.gradient is not None:
        _line(figure, go, side, *side.gradient, "gradient norm", is_control, 1, 2)
    elif not is_control:
        figure.add_annotation(
            text="not recorded", showarrow=False, xref="x2 domain", yref="y2 domain", x=0.5, y=0.5
        )


def _components(figure: Any, go: Any, side: Side, *, is_control: bool) -> None:
    scores = side.path.scores
    if scores.shape[1] < 2:
        return
    share = side.path.explained
    label = f"PC1 {100 * share[0]:.0f} %, PC2 {100 * share[1]:.0f} %"
    _line(figure, go, side, scores[:, 0], scores[:, 1], label, is_control, 2, 1)
    where = side.path.location
    if where is not None and side.turns:
        figure.add_trace(
            go.Scatter(
                x=[scores[where.record, 0]],
                y=[scores[where.record, 1]],
                mode="markers",
                marker={"size": 10, "color": CONTROL if is_control else COLOURS[1]},
                name=f"turn, {'control' if is_control else 'run'} (step {side.path.steps[where.record]})",
            ),
            row=2,
            col=1,
        )


def _mark(figure: Any, transition: PhaseTransition, rows: int, extra: int) -> None:
    found = transition.mechanistic
    if not found:
        return
    panels = [(1, 1), (1, 2), (2, 2)] + [(3 + i // 2, 1 + i % 2) for i in range(extra)]
    for row, column in panels:
        if (row, column) == (1, 2) and transition.run.gradient is None:
            continue
        if found.high != found.low:
            figure.add_vrect(
                x0=found.low,
                x1=found.high,
                fillcolor=COLOURS[1],
                opacity=0.12,
                line_width=0,
                row=row,
                col=column,
            )
        figure.add_vline(
            x=found.step, line={"color": COLOURS[1], "dash": "dot", "width": 1}, row=row, col=column
        )
