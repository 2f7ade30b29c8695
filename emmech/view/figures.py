"""What every figure is drawn with: panels, lines with intervals, bands, marked steps and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.view.theme import DIVERGING, GREY, SEQUENTIAL, faint

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["band", "bars", "heat", "level", "line", "mark", "panels"]

Place = tuple[int, int]
FIRST: Place = (1, 1)


def panels(titles: Sequence[str] = ("",), *, columns: int = 1, **how: Any) -> Any:
    """An empty figure with one panel per title, in rows of ``columns``; ``how`` as ``make_subplots`` takes it."""
    from plotly.subplots import make_subplots

    rows = -(-len(titles) // columns)
    how.setdefault("vertical_spacing", 0.3 / rows)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles if any(titles) else None, **how)
    return figure.update_annotations(font_size=14)


def bars(value: Any, low: Any, high: Any) -> dict[str, Any]:
    """Error bars from an interval; they never point inwards."""
    up, down = (np.maximum(np.asarray(one, float), 0) for one in (high - value, value - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 3}


def line(
    figure: Any, x: Any, y: Any, name: str, colour: str, *, at: Place = FIRST, error: Any = None, dash: str = "solid",
    mode: str | None = None, legend: bool = True, hover: str | None = None, width: float = 2, **how: Any,
) -> None:  # fmt: skip
    """A line, with markers where the points are few; ``error`` is what :func:`bars` gives."""
    error = error and {"color": faint(colour, 0.5), **error}
    figure.add_scatter(
        x=x, y=y, name=name, mode=mode or ("lines+markers" if len(x) <= 40 else "lines"), error_y=error,
        line={"color": colour, "width": width, "dash": dash}, marker={"color": colour}, showlegend=legend,
        hovertemplate=hover and f"{hover}<extra></extra>", row=at[0], col=at[1], **how,
    )  # fmt: skip


def band(figure: Any, x: Any, low: Any, high: Any, name: str, *, at: Place = FIRST) -> None:
    """The area between two curves, where both are known."""
    x, low, high = (np.asarray(one, dtype=float) for one in (x, low, high))
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    figure.add_scatter(
        x=np.r_[x, x[::-1]], y=np.r_[high, low[::-1]], fill="toself", fillcolor=faint(GREY, 0.25), line={"width": 0},
        mode="lines", hoverinfo="skip", name=name, row=at[0], col=at[1],
    )  # fmt: skip


def mark(
    figure: Any, x: float, colour: str, label: str = "", *, low: Any = None, high: Any = None, at: Place = FIRST
) -> None:
    """A vertical line at a step, shaded over its interval."""
    where: dict[str, Any] = {"row": at[0], "col": at[1]}
    if low is not None and high is not None and low != high:
        figure.add_vrect(low, high, fillcolor=faint(colour, 0.15), line_width=0, layer="below", **where)
    figure.add_vline(x, line={"color": colour, "dash": "dot", "width": 1.5}, **where, **_written(label, "top right"))


def level(figure: Any, y: float, label: str = "", *, at: Place = FIRST) -> None:
    """A horizontal grey line: zero, chance, or the untouched model."""
    style = {"color": GREY, "dash": "dot", "width": 1.2}
    figure.add_hline(y, line=style, row=at[0], col=at[1], **_written(label, "top right"))


def _written(label: str, position: str) -> dict[str, Any]:
    return {"annotation": {"text": label, "font": {"color": GREY}}, "annotation_position": position} if label else {}


def heat(
    figure: Any, table: pd.DataFrame, title: str = "", *, at: Place = FIRST, low: float | None = None,
    high: float | None = None, signed: bool = False, written: str | None = None, scale: bool = True, hover: str = "",
) -> None:  # fmt: skip
    """A heat map of a table, rows downwards as they are; ``written`` is the format of the numbers in its cells."""
    values = table.to_numpy(float)
    cells = None if written is None else np.vectorize(lambda v: "" if np.isnan(v) else written.format(v))(values)
    figure.add_heatmap(
        z=table.to_numpy(), x=list(table.columns), y=list(table.index), zmin=low, zmax=high, text=cells,
        texttemplate=None if written is None else "%{text}", colorscale=DIVERGING if signed else SEQUENTIAL,
        showscale=scale, colorbar={"title": {"text": title, "side": "right"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate=f"{hover or '%{y}, %{x}: %{z:.3f}'}<extra></extra>", row=at[0], col=at[1],
    )  # fmt: skip
