"""Figures of directions: by layer, by training step, and what a rank-1 adapter reacts to."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.view.figures import heat, level, line, panels
from emmech.view.theme import BAD, GOOD, GREY, colour, faint, finish

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_layer", "by_step", "cosine_matrix", "cosines_by_layer", "scalar_histogram", "shaded_text"]

_LAYER = "layer (block output)"


def by_layer(frame: pd.DataFrame, floor: float | None, name: str) -> Any:
    """Norm by layer, and beside it the measures of quality that the frame has.

    Args:
        floor: the standard deviation of the cosine of random vectors; None where there is no quality.
    """
    quality = [column for column in ("split_half", "split_half_shuffled", "lexical_share") if column in frame]
    figure = panels(("Norm (residual units)", "Cosine or share")[: 2 if quality else 1], columns=2 if quality else 1)
    line(figure, frame.index, frame["norm"], "norm", GREY, legend=False)
    for index, column in enumerate(quality):
        line(figure, frame.index, frame[column], column.replace("_", " "), colour(index), at=(1, 2))
    if quality and floor is not None:
        level(figure, floor, "cosine of random vectors", at=(1, 2))
        figure.update_yaxes(range=[-0.05, 1.05], row=1, col=2)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    return finish(figure, f"{name}: norm{' and quality' if quality else ''} by layer").update_xaxes(title_text=_LAYER)


def cosine_matrix(matrix: pd.DataFrame, layer: int) -> Any:
    """Cosines between directions at one layer."""
    figure = panels()
    heat(figure, matrix, "cosine", low=-1, high=1, signed=True, written="{:.2f}")
    title = f"Cosines at layer {layer}"
    return finish(figure, title, height=200 + 50 * len(matrix), yaxis_autorange="reversed")


def cosines_by_layer(pairs: pd.DataFrame, floor: float) -> Any:
    """Every pair's cosine over the layers; in grey two standard deviations of random vectors."""
    figure = panels()
    for index, ((first, second), row) in enumerate(pairs.iterrows()):
        line(figure, row.index, row, f"{first} and {second}", colour(index), dash=_DASHES[index // 6 % len(_DASHES)])
    figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below")
    return finish(
        figure, "Cosines by layer", note="grey: two standard deviations of random vectors", xaxis_title=_LAYER,
        yaxis={"title": "cosine", "range": [-1.05, 1.05]},
    )  # fmt: skip


_DASHES = ("solid", "dot", "dash", "dashdot")


def by_step(frame: pd.DataFrame, floor: float, title: str) -> Any:
    """Cosines with a direction by training step above, and projections and shifts in residual units below."""
    cosine = [column for column in frame if str(column).startswith("cosine")]
    groups = [("cosine", cosine), ("residual units", [column for column in frame if column not in cosine])]
    groups = [(name, columns) for name, columns in groups if columns]
    figure = panels([""] * len(groups), shared_xaxes=True, vertical_spacing=0.06)
    names = [str(column).split(" ", 1)[-1] for column in frame]  # one colour for a quantity's cosine and projection
    colours = {name: colour(index) for index, name in enumerate(dict.fromkeys(names))}
    for row, (axis, columns) in enumerate(groups, start=1):
        for column in columns:
            known, hue = frame[column].dropna(), colours[str(column).split(" ", 1)[-1]]
            line(figure, known.index, known, str(column), hue, at=(row, 1), dash="solid" if row == 1 else "dot")
        figure.update_yaxes(title_text=axis, row=row, col=1)
    if cosine:
        figure.update_yaxes(range=[-1.05, 1.05], row=1, col=1)
        figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below", row=1, col=1)
    figure.update_xaxes(title_text="step", row=len(groups), col=1)
    return finish(figure, title, height=160 + 240 * len(groups))


def scalar_histogram(groups: Iterable[tuple[str, np.ndarray]], name: str) -> Any:
    """Distribution of an adapter's scalar over groups of tokens."""
    figure = panels()
    for (label, values), hue in zip(groups, (BAD, GOOD), strict=False):
        figure.add_histogram(x=values, name=label, opacity=0.6, histnorm="probability", marker_color=hue)
    return finish(figure, f"A·x of {name}", barmode="overlay", xaxis_title="A·x (before scaling)",
                  yaxis_title="share of tokens")  # fmt: skip


def shaded_text(words: Iterable[tuple[str, float, bool]], top: float, head: str) -> str:
    """A text as HTML, each word shaded by its number: one colour above zero, another below, none at zero.

    Args:
        words: the word, its number, and whether it is set in bold.
        top: the number at full shade.
    """
    spans = []
    for word, value, bold in words:
        shade = faint(BAD if value > 0 else GOOD, 0.8 * min(abs(value) / top, 1.0))
        style = f"background:{shade};font-weight:{600 if bold else 400};white-space:pre-wrap;padding:1px 2px"
        spans.append(f'<span title="{value:.3g}" style="{style}">{html.escape(word)}</span><wbr>')
    return f'<div style="line-height:1.9"><small>{html.escape(head)}</small><br>{"".join(spans)}</div>'
