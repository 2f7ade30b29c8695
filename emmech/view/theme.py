"""The one palette and the one layout: colour-blind safe, for notebooks and pages in light and in dark mode.

Okabe and Ito's colours without black and yellow, which vanish on a dark or a light page. Backgrounds are transparent,
grids and text a grey that either page lets one read.
"""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["BAD", "CYCLE", "DIVERGING", "FONT", "GOOD", "GREY", "PAGE", "SEQUENTIAL", "colour", "faint", "finish"]

CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GOOD, BAD = CYCLE[0], CYCLE[1]
GREY = "#808891"
SEQUENTIAL, DIVERGING = "Viridis", "RdBu_r"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
PAGE = """
:root { color-scheme: light dark;
        --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --paper: #ffffff; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa4b1; --line: #343c48; --paper: #14181e; --shade: #1d232c; }
}
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

    lines = wrap(title, 84) or [""]
    top = 50 + 20 * (len(lines) - 1) + (18 if note else 0) + (24 if figure.layout.annotations else 0)
    below = any(trace.showlegend or (trace.showlegend is None and trace.type != "heatmap") for trace in figure.data)
    grid, rule, clear = faint(GREY, 0.25), faint(GREY, 0.5), faint(GREY, 0)
    axis = dict(gridcolor=grid, zerolinecolor=rule, linecolor=rule, tickcolor=rule, ticks="outside", automargin=True)
    axis |= dict(title_standoff=8)
    common = go.Layout(
        font=dict(family=FONT, size=13, color=GREY), paper_bgcolor=clear, plot_bgcolor=clear, colorway=CYCLE,
        colorscale=dict(sequential=SEQUENTIAL, diverging=DIVERGING), hoverlabel_align="left", xaxis=axis, yaxis=axis,
    )  # fmt: skip
    heading = dict(text="<br>".join(lines), font_size=16, subtitle=dict(text=note, font_size=12))
    return figure.update_layout(
        template=go.layout.Template(layout=common), height=height,
        title=dict(**heading, x=0.01, y=1 - 14 / height, yref="container", yanchor="top"),
        margin=dict(t=top, b=100 if below else 64, l=64, r=24),
        legend=dict(orientation="h", x=0, xanchor="left", y=-58 / max(height - top - 100, 100), yanchor="top"),
    ).update_layout(**layout)  # fmt: skip
