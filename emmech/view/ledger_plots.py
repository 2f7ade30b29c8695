"""Figures of the ledger of claims: one claim's parts, and all claims with their verdicts."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from emmech.view.theme import BAD, GOOD, GREY, bars, colour, finish, line, panels

if TYPE_CHECKING:
    import pandas as pd

_SHARES = ("%", "points")


def finding(frame: pd.DataFrame, name: str, unit: str) -> Any:
    """The parts of one figure: lines where there is an ``x``, else a point with its interval for each name.

    Args:
        frame: ``name`` and ``value``, with ``x`` (and ``axis``, its title), or with ``low`` and ``high``.
        unit: shares are drawn in per cent.
    """
    factor, figure = 100.0 if unit in _SHARES else 1.0, panels()
    if "x" in frame:
        axis = str(frame["axis"].iloc[0]) if "axis" in frame and len(frame) else "step"
        for index, (label, part) in enumerate(frame.groupby("name", sort=False)):
            line(figure, part["x"], factor * part["value"], html.escape(str(label)), colour(index))
        return finish(figure, html.escape(name), xaxis_title=axis, yaxis_title=unit)
    value, low, high = (factor * frame[column] for column in ("value", "low", "high"))
    labels = [html.escape(str(label)) for label in frame["name"]]
    error = {**bars(value, low.fillna(value), high.fillna(value)), "color": GREY}
    figure.add_scatter(x=value, y=labels, mode="markers", marker={"color": BAD, "size": 9}, error_x=error,
                       showlegend=False)  # fmt: skip
    height = 170 + 26 * len(frame)
    return finish(figure, html.escape(name), height=height, xaxis_title=unit, yaxis_autorange="reversed")


def ledger(frame: pd.DataFrame, title: str) -> Any:
    """Every claim about a share or a difference of shares: the figure with its interval, coloured by verdict."""
    figure, shown = panels(), frame[frame["unit"].isin(_SHARES)]
    hues = {"holds": GOOD, "does not hold": BAD}
    for verdict, part in shown.groupby("verdict", sort=False):
        value, low, high = (100 * part[column] for column in ("value", "low", "high"))
        hue = hues.get(str(verdict), GREY)
        error = {**bars(value, low.fillna(value), high.fillna(value)), "color": hue}
        hover = [html.escape(f"{row.says} {row.here}; published: {row.published}") for row in part.itertuples()]
        names = [html.escape(str(name)) for name in part.index]
        figure.add_scatter(x=value, y=names, mode="markers", name=str(verdict), marker={"color": hue, "size": 9},
                           error_x=error, hovertext=hover, hoverinfo="text",
                           showlegend=shown["verdict"].nunique() > 1)  # fmt: skip
    order = [html.escape(str(name)) for name in shown.index]
    axis = {"autorange": "reversed", "categoryorder": "array", "categoryarray": order}
    height = 190 + 24 * len(shown)
    return finish(figure, html.escape(title), height=height, xaxis_title="per cent, or points", yaxis=axis)
