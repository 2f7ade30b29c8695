"""Figures of judged responses: every point a response, every rate with its interval."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.view.figures import bars, heat, level, line, mark, panels
from emmech.view.theme import BAD, GOOD, GREY, colour, faint, finish

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["confusion", "paired_rates", "quadrants", "questions", "rates", "thresholds"]

_ALIGNMENT = "alignment (0 misaligned, 100 aligned)"


def quadrants(responses: pd.DataFrame, misaligned: np.ndarray, limits: tuple[float, float], name: str) -> Any:
    """Alignment against coherence of every scored response, with the quadrant that counts as misaligned.

    Args:
        responses: ``question_id``, ``response``, ``aligned`` and ``coherent``.
        misaligned: ``[responses]`` which of them count as misaligned and coherent.
        limits: misaligned is below the first, coherent above the second.
    """
    scored = np.isfinite(responses["aligned"]) & np.isfinite(responses["coherent"]).to_numpy()
    figure = panels()
    figure.add_shape(type="rect", x0=0, x1=limits[0], y0=limits[1], y1=100, fillcolor=faint(BAD, 0.1), line_width=0,
                     layer="below")  # fmt: skip
    spread = [_spread(responses[axis], seed) for seed, axis in enumerate(("aligned", "coherent"))]
    groups = (("misaligned and coherent", misaligned, BAD), ("other scored responses", scored & ~misaligned, GOOD))
    for label, rows, hue in groups:
        _points(figure, spread[0][rows], spread[1][rows], f"{label} ({int(rows.sum())})", hue, responses[rows])
    mark(figure, limits[0], GREY)
    level(figure, limits[1])
    few = any(responses[axis].nunique() < 12 for axis in ("aligned", "coherent"))
    return finish(
        figure, f"{name}: {int(scored.sum())} scored responses, {int((~scored).sum())} unscored", height=560,
        note="scores that take few values are spread out, so that every response is seen" if few else "",
        xaxis={"title": _ALIGNMENT, "range": [-5, 105]},
        yaxis={"title": "coherence (0 nonsense, 100 coherent)", "range": [-5, 105]},
    )  # fmt: skip


def questions(
    responses: pd.DataFrame, misaligned: np.ndarray, broad: pd.DataFrame, narrow: pd.DataFrame, limit: float,
    counted: str, name: str,
) -> Any:  # fmt: skip
    """Every response's alignment by question, next to the question's rate with its Wilson interval.

    Questions of the fine-tune's own domain, which count as ``narrow`` and not as ``em``, come above the others.

    Args:
        broad, narrow: tables by question with ``events``, ``n``, ``rate``, ``low`` and ``high``.
        counted: the rows that are counted, for the axis.
    """
    import pandas as pd

    tables = [table[table["n"] > 0].sort_values("rate", kind="stable") for table in (broad, narrow)]
    without = [question for question in broad.index if all(question not in table.index for table in tables)]
    rate = pd.concat([broad.loc[without], *tables])
    order = list(rate.index)
    place = {question: row for row, question in enumerate(order)}
    figure = panels(("", ""), columns=2, shared_yaxes=True, column_widths=[0.68, 0.32], horizontal_spacing=0.03)
    height = responses["question_id"].map(place) + np.random.default_rng(1).uniform(-0.3, 0.3, len(responses))
    scored, aligned = np.isfinite(responses["aligned"]).to_numpy(), _spread(responses["aligned"], 0)
    for label, rows, hue in (("other", scored & ~misaligned, GOOD), ("misaligned and coherent", misaligned, BAD)):
        rows = rows & scored
        _points(figure, aligned[rows], height[rows], label, hue, responses[rows], size=5)
    _rates(figure, rate, list(range(len(order))), BAD, column=2)
    mark(figure, limit, GREY)
    names = [f"{question} (narrow)" if question in tables[1].index else str(question) for question in order]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(order))), ticktext=names, col=1)
    upper = 1.06 * float(np.nanmax([*(100 * rate["high"]), 5.0]))
    finish(figure, f"{name}: by question", height=190 + 40 * len(order))
    figure.update_xaxes(title_text="alignment of each response", range=[-5, 105], col=1)
    return figure.update_xaxes(title_text=f"misaligned, % of {counted} rows", range=[-0.03 * upper, upper], col=2)


def rates(table: pd.DataFrame, counted: str, name: str) -> Any:
    """Every rate of a table (``rate``, ``low``, ``high``, ``events``, ``n``, ``unscored``) with its interval."""
    table = table.iloc[::-1]
    figure = panels()
    _rates(figure, table, list(table.index), GOOD)
    for row in table.itertuples():
        figure.add_annotation(x=1.02, xref="paper", y=row.Index, text=f"{row.rate:.1%}  (n = {row.n})", showarrow=False,
                              xanchor="left")  # fmt: skip
    title = f"{name}: rates over {counted} rows, 95 % interval over questions"
    finish(figure, title, height=170 + 40 * len(table), xaxis={"title": "%", "range": [-2, 102]})
    return figure.update_layout(margin_r=150)


def thresholds(grid: pd.DataFrame, limits: tuple[float, float], counted: str, name: str) -> Any:
    """A rate against the alignment threshold, a line per coherence threshold; the field's choice is marked."""
    figure = panels()
    for index, coherence in enumerate(grid.columns):
        usual = coherence == limits[1]
        line(figure, grid.index, 100 * grid[coherence], f"coherence > {coherence:g}", colour(index),
             width=3.5 if usual else 1.5)  # fmt: skip
    mark(figure, limits[0], GREY, "the field's threshold")
    return finish(
        figure, f"{name}: does the rate hang on the thresholds?", height=460, xaxis_title="alignment below",
        yaxis={"title": f"% of {counted} rows", "rangemode": "tozero"},
    )  # fmt: skip


def paired_rates(
    table: pd.DataFrame, overall: tuple[float, float], names: Sequence[str], title: str, counted: str
) -> Any:
    """Each question's rate in two evaluations, joined by a line, and that of all questions.

    Args:
        table: ``question_id``, and ``first`` and ``second`` in per cent.
    """
    ends = [0, 1]  # positions, not names: two evaluations may have the same one
    figure = panels()
    for row in table.itertuples():
        line(figure, ends, [row.first, row.second], str(row.question_id), GREY, width=1.2, legend=False,
             cliponaxis=False, hover=f"{html.escape(str(row.question_id))}: %{{y:.1f}} %")  # fmt: skip
    for end, asked in _near(table, 0.035 * max(table[["first", "second"]].to_numpy(float).max(initial=1.0), 1.0)):
        label = ", ".join(asked) if len(asked) < 4 else f"{asked[0]} and {len(asked) - 1} more"
        figure.add_annotation(x=1, y=end, text=html.escape(label), showarrow=False, xanchor="left", xshift=12,
                              font={"size": 11})  # fmt: skip
    line(figure, ends, list(overall), "all questions", BAD, width=4, cliponaxis=False)
    return finish(
        figure, title, height=520, xaxis={"range": [-0.25, 1.75], "tickvals": ends, "ticktext": list(names)},
        yaxis={"title": f"% of {counted} rows", "rangemode": "tozero"},
    )  # fmt: skip


def confusion(table: pd.DataFrame, names: Sequence[str], title: str) -> Any:
    """How many responses two judges gave which verdict."""
    figure = panels()
    heat(figure, table, written="{:.0f}", scale=False, hover="%{y}, then %{x}: %{z}")
    return finish(figure, title, height=440, xaxis_title=names[1], yaxis={"title": names[0], "autorange": "reversed"})


def _points(figure: Any, x: Any, y: Any, name: str, hue: str, rows: pd.DataFrame, size: int = 7) -> None:
    hover = [
        f"<b>{html.escape(str(row.question_id))}</b> · alignment {row.aligned:.0f}, coherence {row.coherent:.0f}<br>"
        + "<br>".join(html.escape(part, quote=False) for part in textwrap.wrap(str(row.response), 70)[:8])
        for row in rows.itertuples()
    ]
    marker = {"color": hue, "size": size, "opacity": 0.55}
    figure.add_scatter(x=x, y=y, mode="markers", name=name, marker=marker, text=hover, row=1, col=1,
                       hovertemplate="%{text}<extra></extra>")  # fmt: skip


def _rates(figure: Any, table: pd.DataFrame, y: Collection[Any], hue: str, *, column: int = 1) -> None:
    low, rate, high = (100 * table[name] for name in ("low", "rate", "high"))
    counts = [f"{row.events} of {row.n}" for row in table.itertuples()]
    figure.add_scatter(
        x=rate, y=y, error_x={**bars(rate, low, high), "color": hue}, mode="markers", showlegend=False,
        marker={"color": hue, "size": 9, "symbol": "diamond"}, row=1, col=column, text=counts,
        hovertemplate="%{x:.1f} % (%{text})<extra></extra>",
    )  # fmt: skip


def _spread(scores: pd.Series, seed: int) -> pd.Series:
    """Scores to draw: shifted a little inwards where they take few values, as an exact judge's do, else untouched.

    A log-probability judge's score must stay on its side of a threshold.
    """
    if scores.nunique() >= 12:
        return scores
    shift = np.random.default_rng(seed).uniform(-1, 1, len(scores))
    outer = np.where(scores >= 95, -np.abs(shift), np.where(scores <= 5, np.abs(shift), shift / 2))
    return scores + 9.0 * outer


def _near(table: pd.DataFrame, apart: float) -> list[tuple[float, list[str]]]:
    """Questions whose lines end within ``apart`` of each other, to be named by one label."""
    groups: list[tuple[float, list[str]]] = []
    for row in table.sort_values("second").itertuples():
        if not groups or row.second - groups[-1][0] > apart:
            groups.append((row.second, []))
        groups[-1][1].append(str(row.question_id))
    return groups
