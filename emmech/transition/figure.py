"""The figure of a phase transition: one panel per quantity, the control drawn dashed over the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from emmech.transition.result import PhaseTransition, Side

__all__ = ["draw"]

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e6bbf", "#b8860b", "#444444")
CONTROL = "#888888"
TITLES = {  # title, x axis, y axis
    "cosine": ("Local cosine (-1 straight, +1 reversal)", "step", "c_k"),
    "gradient": ("Gradient norm before clipping", "step", "gradient norm"),
    "components": ("Principal components of B", "PC1", "PC2"),
    "norm": ("Norm of B", "step", "||B||"),
    "margin": ("Misaligned over aligned answers", "step", "nats per token"),
    "comp": ("Similarity to the last step", "step", "comp score"),
}
_RECORDED: dict[str, Callable[[Side], bool]] = {
    "gradient": lambda side: side.gradient is not None,
    "margin": lambda side: bool(side.margins),
    "comp": lambda side: side.comp is not None,
}


def draw(transition: PhaseTransition) -> Any:
    """Panels of local cosine, gradient norm, principal components, norm, and margins or comp where recorded."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    run, control = transition.run, transition.control
    panels = ["cosine", "components", "norm"]
    sides = [side for side in (run, control) if side is not None]
    panels += [name for name, there in _RECORDED.items() if any(there(side) for side in sides)]
    rows = (len(panels) + 1) // 2
    figure = make_subplots(
        rows=rows,
        cols=2,
        subplot_titles=[TITLES[panel][0] for panel in panels],
        vertical_spacing=0.3 / rows,
        horizontal_spacing=0.1,
    )
    place = {panel: (1 + i // 2, 1 + i % 2) for i, panel in enumerate(panels)}
    largest = max(run.path.cosines, default=None) if control is not None else None
    for side in sides:
        other = side is control
        _cosines(figure, go, side, is_control=other, only=largest)
        _components(figure, go, side, place["components"], is_control=other)
        _line(figure, go, side, side.path.steps, side.path.norm, "norm", other, place["norm"])
        if side.gradient is not None:
            _line(figure, go, side, *side.gradient, "gradient norm", other, place["gradient"])
        for i, (label, (steps, values)) in enumerate(side.margins.items()):
            _line(figure, go, side, steps, values, label, other, place["margin"], COLOURS[i])
        if side.comp is not None:
            _line(figure, go, side, side.path.steps, side.comp, "comp", other, place["comp"])
    for panel, (row, column) in place.items():
        figure.update_xaxes(title_text=TITLES[panel][1], row=row, col=column)
        figure.update_yaxes(title_text=TITLES[panel][2], row=row, col=column)
    _mark(figure, transition, [where for panel, where in place.items() if panel != "components"])
    subject = run.name if control is None else f"{run.name} (solid) and control {control.name} (dashed)"
    figure.update_layout(
        title={"text": f"Phase transition of {subject}", "y": 0.985, "yanchor": "top"},
        template="plotly_white",
        height=340 * rows + 130,
        margin={"t": 90, "b": 60, "l": 70, "r": 20},
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
    place: tuple[int, int],
    colour: str | None = None,
) -> None:
    colour = colour or (CONTROL if is_control else COLOURS[0])
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines",
            name=f"{label}, {'control' if is_control else 'run'}",
            line={"color": colour, "dash": "dash" if is_control else "solid"},
            hovertemplate=f"{side.name}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        ),
        row=place[0],
        col=place[1],
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
            figure,
            go,
            side,
            side.path.steps,
            values,
            f"k = {k}",
            is_control,
            (1, 1),
            COLOURS[i % len(COLOURS)],
        )


def _components(figure: Any, go: Any, side: Side, place: tuple[int, int], *, is_control: bool) -> None:
    scores = side.path.scores
    if scores.shape[1] < 2:
        return
    share = side.path.explained
    label = f"PC1 {100 * share[0]:.0f} %, PC2 {100 * share[1]:.0f} %"
    _line(figure, go, side, scores[:, 0], scores[:, 1], label, is_control, place)
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
            row=place[0],
            col=place[1],
        )


def _mark(figure: Any, transition: PhaseTransition, places: list[tuple[int, int]]) -> None:
    found = transition.mechanistic
    if not found:
        return
    for row, column in places:
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
        figure.add_vline(x=found.step, line={"color": COLOURS[1], "dash": "dot", "width": 1}, row=row, col=column)
