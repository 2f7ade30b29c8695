"""The one palette, the one layout, and the elements of every figure: panels, lines, bands, marked steps, heat maps.

The colours are those of Okabe and Ito without black and yellow, which vanish on a dark or a light page. Backgrounds are
transparent, and grids and text are grey, so that figures can be read in light and in dark mode.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Place = tuple[int, int]
FIRST: Place = (1, 1)
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GOOD, BAD = CYCLE[0], CYCLE[1]
RUNS = (BAD, GOOD, *CYCLE[2:])  # a run, its control, further controls
GREY = "#808891"
SEQUENTIAL, DIVERGING = "Viridis", "RdBu_r"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
LIGHT = "--ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --paper: #ffffff; --shade: #f6f8fa; --alarm: #b3261e;"
DARK = "--ink: #e4e8ee; --soft: #9aa4b1; --line: #343c48; --paper: #14181e; --shade: #1d232c; --alarm: #ff8a80;"
PAGE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
"""


def colour(index: int) -> str:
    """The colour of the ``index``-th condition, beginning again after the last.

    Example:
        >>> colour(0) == colour(6)
        True
    """
    return CYCLE[index % len(CYCLE)]


def faint(base: str, share: float) -> str:
    """A colour of the palette that lets the page show through, as an area or a shaded word.

    Example:
        >>> faint(CYCLE[0], 0.5)
        'rgba(0, 114, 178, 0.50)'
    """
    red, green, blue = (int(base[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {share:.2f})"


def finish(figure: go.Figure, title: str, *, note: str = "", height: int = 420, **layout: Any) -> go.Figure:
    """Give a figure its title and the common layout; the legend is a line of entries below the axes.

    Args:
        title, note: the heading, broken where it is long, and a smaller line below it.
        height: in pixels; the width is the page's.
        layout: whatever else ``update_layout`` takes.
    """
    import plotly.graph_objects as go

    lines = wrap(title, 84) if title else []
    top = (
        30
        + 20 * len(lines)
        + (18 if note else 0)
        + (24 if any(one.yref != "y" for one in figure.layout.annotations) else 0)
    )
    below = any(trace.showlegend or (trace.showlegend is None and trace.type != "heatmap") for trace in figure.data)
    grid, rule, clear = faint(GREY, 0.25), faint(GREY, 0.5), faint(GREY, 0)
    axis = dict(gridcolor=grid, zerolinecolor=rule, linecolor=rule, tickcolor=rule, ticks="outside", automargin=True)
    axis |= dict(title=dict(standoff=8, font_size=13), exponentformat="power")
    common = go.Layout(
        font=dict(family=FONT, size=13, color=GREY), paper_bgcolor=clear, plot_bgcolor=clear, colorway=CYCLE,
        colorscale=dict(sequential=SEQUENTIAL, diverging=DIVERGING), hoverlabel_align="left", xaxis=axis, yaxis=axis,
    )  # fmt: skip
    down = 14 + 11 * max(len(lines) - 1, 0)
    heading = dict(text="<br>".join(lines), font_size=16, subtitle=dict(text=note, font_size=12))
    figure.update_layout(
        template=go.layout.Template(layout=common), height=height,
        title=dict(**heading, x=0.01, y=1 - down / height, yref="container", yanchor="top"),
        margin=dict(t=top, b=100 if below else 64, l=64, r=24),
        legend=dict(orientation="h", x=0, xanchor="left", y=-58 / max(height - top - 100, 100), yanchor="top"),
    ).update_layout(**layout)  # fmt: skip
    _name_ends(figure, height - top - (100 if below else 64))
    return figure


def panels(titles: Sequence[str] = ("",), *, columns: int = 1, **how: Any) -> Any:
    """An empty figure with one panel per title, in rows of ``columns``; ``how`` as ``make_subplots`` takes it."""
    from plotly.subplots import make_subplots

    rows = -(-len(titles) // columns)
    how.setdefault("vertical_spacing", 0.3 / rows)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles if any(titles) else None, **how)
    titled = (at for at, title in enumerate(titles) if title)
    for annotation, at in zip(figure.layout.annotations, titled, strict=True):
        annotation.x = figure.get_subplot(at // columns + 1, at % columns + 1).xaxis.domain[0]
    return figure.update_annotations(font_size=14, xanchor="left")


def bars(value: Any, low: Any, high: Any) -> dict[str, Any]:
    """Error bars from an interval; they never point inwards."""
    up, down = (np.maximum(np.asarray(one, float), 0) for one in (high - value, value - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 3}


def line(
    figure: Any, x: Any, y: Any, name: str, colour: str, *, at: Place = FIRST, error: Any = None, dash: str = "solid",
    mode: str | None = None, legend: bool = True, hover: str | None = None, width: float = 2, end: str = "", **how: Any,
) -> None:  # fmt: skip
    """A line, with markers where the points are few.

    Args:
        error: what :func:`bars` gives.
        end: a name to be written at the line's right end, instead of an entry in the legend.
    """
    error = error and {"color": faint(colour, 0.7), **error}
    figure.add_scatter(
        x=x, y=y, name=name, mode=mode or ("lines+markers" if len(x) <= 40 else "lines"), error_y=error,
        line={"color": colour, "width": width, "dash": dash}, marker={"color": colour}, showlegend=legend and not end,
        meta=end or None,
        hovertemplate=hover and f"{hover}<extra></extra>", row=at[0], col=at[1], **how,
    )  # fmt: skip


def _name_ends(figure: go.Figure, tall: float) -> None:
    """Write the names of lines at their right ends, apart from each other; the axes of a column leave room for them.

    Args:
        tall: the height of the axes together, in pixels.
    """
    room: dict[tuple[float, float], float] = {}
    for x, y in dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data if trace.meta):
        across, up = figure.layout[f"xaxis{x[1:]}"], figure.layout[f"yaxis{y[1:]}"]
        mine = [one for one in figure.data if (one.xaxis or "x", one.yaxis or "y") == (x, y)]
        heights = np.concatenate([np.asarray(one.y, float) for one in mine])
        bounds = up.range or (np.nanmin(heights, initial=np.inf), np.nanmax(heights, initial=-np.inf))
        ends = []
        for trace in (one for one in mine if one.meta):
            known = np.flatnonzero(np.isfinite(np.asarray(trace.y, float)))
            if len(known):
                ends.append((float(trace.y[known[-1]]), trace))
        ends.sort(key=lambda end: end[0])
        apart = 16 * ((bounds[1] - bounds[0]) or 1.0) / max(tall * (up.domain[1] - up.domain[0]), 1)
        placed = [end[0] for end in ends]
        for _ in range(100):
            for at in range(len(placed) - 1):
                lack = max(apart - (placed[at + 1] - placed[at]), 0) / 2
                placed[at], placed[at + 1] = placed[at] - lack, placed[at + 1] + lack
        if up.range:  # a name beyond a fixed range would not be shown
            placed = [min(one, bounds[1] - apart * (len(placed) - 1 - at)) for at, one in enumerate(placed)]
        for height, (_, trace) in zip(placed, ends, strict=True):
            figure.add_annotation(
                x=1, y=height, xref=f"{x} domain", yref=y, text=html.escape(trace.meta), showarrow=False,
                xanchor="left", xshift=5, font={"size": 12, "color": trace.line.color},
            )  # fmt: skip
        wide = (7 * max((len(trace.meta) for _, trace in ends), default=0) + 10) / 710  # of a notebook's usual width
        room[across.domain] = max(room.get(across.domain, 0.0), min(wide, (across.domain[1] - across.domain[0]) / 2))
    for axis in figure.select_xaxes():
        axis.domain = (axis.domain[0], axis.domain[1] - room.get(axis.domain, 0.0))


def band(
    figure: Any, x: Any, low: Any, high: Any, name: str, *, at: Place = FIRST, colour: str = GREY, legend: bool = True
) -> None:
    """The area between two curves, where both are known."""
    x, low, high = (np.asarray(one, dtype=float) for one in (x, low, high))
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    figure.add_scatter(
        x=np.r_[x, x[::-1]], y=np.r_[high, low[::-1]], fill="toself", fillcolor=faint(colour, 0.25), line={"width": 0},
        mode="lines", hoverinfo="skip", name=name, showlegend=legend, row=at[0], col=at[1],
    )  # fmt: skip


def mark(
    figure: Any, x: float, colour: str, label: str = "", *, low: Any = None, high: Any = None, at: Place = FIRST,
    dash: str = "dot",
) -> None:  # fmt: skip
    """A vertical line at a step, shaded over its interval."""
    where: dict[str, Any] = {"row": at[0], "col": at[1]}
    if low is not None and high is not None and low != high:
        figure.add_vrect(low, high, fillcolor=faint(colour, 0.15), line_width=0, layer="below", **where)
    figure.add_vline(x, line={"color": colour, "dash": dash, "width": 1.5}, **where, **_written(label, "top"))


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
        showscale=scale, colorbar={"title": {"text": title, "side": "top"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate=f"{hover or '%{y}, %{x}: %{z:.3f}'}<extra></extra>", row=at[0], col=at[1],
    )  # fmt: skip
