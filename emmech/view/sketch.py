"""Small drawings in SVG for cards: a few kilobytes each, without a script, in the ink of the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.view.theme import BAD, GOOD, GREY, colour, faint

if TYPE_CHECKING:
    import pandas as pd

_WIDE, _HIGH = 362, 150
_LETTER = 6.3  # pixels of a letter at this size
_BOLD = 7.4
_POINTS = 120  # of one curve at most
_SOFT = 'opacity="0.75"'


def curves(
    lines: Iterable[tuple[str, Any, Any]], title: str, *, axis: str = "step", mark: Sequence[float] | None = None,
    level: float | None = None, percent: bool = False, dots: Sequence[tuple[float, float]] = (),
) -> str:  # fmt: skip
    """Lines with their names at their ends; "" where no line has two known points.

    Args:
        lines: name, x and y of each; the first is in the colour of a finding.
        mark: a place on the x axis with the ends of its interval, shaded.
        level: a horizontal dotted line.
        dots: points (x, y) that are drawn on top.
    """
    kept = []
    for name, x, y in lines:
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        known = np.isfinite(xs) & np.isfinite(ys)
        if known.sum() > 1:
            thin = np.unique(np.linspace(0, known.sum() - 1, _POINTS).round().astype(int))
            kept.append((name, xs[known][thin], ys[known][thin]))
    if not kept:
        return ""
    every_x, every_y = (np.concatenate([line[at] for line in kept]) for at in (1, 2))
    every_y = np.r_[every_y, [y for _, y in dots], [] if level is None else level, [0.0] if percent else []]
    right = 12 + _BOLD * max(min(len(name), 20) for name, *_ in kept)
    x, y = _axes(every_x, every_y, 46, _WIDE - right, 24, _HIGH - 34)
    parts = _rules(every_y, y, 46, _WIDE - right, percent=percent)
    parts += [_text(x(at), _HIGH - 20, f"{at:.4g}", "middle") for at in _ticks(every_x)]
    parts.append(_text((46 + _WIDE - right) / 2, _HIGH - 5, axis, "middle"))
    if mark is not None:
        at, low, high = (min(max(x(one), 46), _WIDE - right) for one in mark)
        parts.append(f'<rect x="{low:.1f}" y="24" width="{max(high - low, 1):.1f}" height="{_HIGH - 58}" '
                     f'fill="{faint(GREY, 0.25)}"/>')  # fmt: skip
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="24" y2="{_HIGH - 34}" stroke="currentColor" '
                     'stroke-dasharray="3 3"/>')  # fmt: skip
    if level is not None:
        parts.append(f'<line x1="46" x2="{_WIDE - right:.1f}" y1="{y(level):.1f}" y2="{y(level):.1f}" '
                     f'stroke="{GREY}" stroke-dasharray="2 3"/>')  # fmt: skip
    ends = []
    for index, (name, xs, ys) in enumerate(kept):
        hue = _hue(index)
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{hue}" stroke-width="2"/>')
        ends.append((y(float(ys[-1])), name, hue))
    parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="currentColor"/>' for a, b in dots]
    place = -99.0
    for index, (wanted, name, hue) in enumerate(sorted(ends)):
        place = max(place + 13, min(wanted, _HIGH - 34 - 13 * (len(ends) - 1 - index)))
        parts.append(_text(_WIDE - right + 6, place + 4, _short(name, 20), fill=hue))
    return _svg(parts, title, _HIGH)


def intervals(
    rows: Iterable[tuple[str, float, float, float]], title: str, *, percent: bool = False, zero: bool = False,
    ends: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """A dot and its interval for each row, under one axis; "" where nothing is known.

    Args:
        rows: name, value, and the ends of its interval.
        percent: whether the numbers are shares.
        zero: draw a line at zero.
        ends: of the axis; by default those of the numbers.
    """
    known = [row for row in rows if math.isfinite(row[1])]
    if not known:
        return ""
    numbers = np.array([[value, *(end if math.isfinite(end) else value for end in both)] for _, value, *both in known])
    span = np.r_[numbers.ravel(), [0.0] if zero else [], list(ends or ())]
    left, high = 12 + _LETTER * max(min(len(name), 26) for name, *_ in known), 48 + 20 * len(known)
    x, _ = _axes(span, np.zeros(1), left, _WIDE - 24, 0, 1)
    floor, parts = high - 22, []
    for at in _ticks(span):
        parts.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="24" y2="{floor}" stroke="{faint(GREY, 0.3)}"/>')
        parts.append(_text(x(at), high - 7, _number(at, percent), "middle"))
    if zero:
        parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="24" y2="{floor}" stroke="currentColor" '
                     'stroke-dasharray="3 3"/>')  # fmt: skip
    for index, ((name, *_), (value, low, top)) in enumerate(zip(known, numbers, strict=True)):
        y = 38 + 20 * index
        parts.append(_text(left - 8, y + 4, _short(name, 26), "end"))
        parts.append(f'<line x1="{x(low):.1f}" x2="{x(top):.1f}" y1="{y}" y2="{y}" stroke="{BAD}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="{BAD}"/>')
    return _svg(parts, title, high)


def cells(table: pd.DataFrame, title: str, *, axes: tuple[str, str] = ("", ""), written: str = "{:.2g}") -> str:
    """A table as shaded cells, at most 14 rows and 8 columns of it: one colour above zero, another below.

    Args:
        axes: what the rows and the columns are, in a few letters.
        written: the format of the numbers.
    """
    rows, columns = (np.unique(np.linspace(0, n - 1, most).round().astype(int))
                     for n, most in zip(table.shape, (14, 8), strict=True))  # fmt: skip
    shown = table.iloc[rows, columns]
    values = shown.to_numpy(float)
    if not np.isfinite(values).any():
        return ""
    top = float(np.nanmax(np.abs(values))) or 1.0
    names = [_short(_named(one), 16) for one in shown.index]
    left, high = 12 + _LETTER * max(map(len, [*names, axes[0]])), 48 + 19 * len(names)
    wide = (_WIDE - left - 6) / max(len(columns), 3)
    parts = [_text(left - 8, 38, axes[0], "end"), _text(_WIDE - 6, 13, axes[1], "end")]
    for column, head in enumerate(shown.columns):
        parts.append(_text(left + (column + 0.5) * wide, 38, _short(_named(head), int(wide / _LETTER)), "middle"))
    for row, name in enumerate(names):
        y = 44 + 19 * row
        parts.append(_text(left - 8, y + 13, name, "end"))
        for column, value in enumerate(values[row]):
            if math.isfinite(value):
                fill = faint(BAD if value > 0 else GOOD, 0.75 * abs(value) / top)
                x = left + column * wide
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="18" fill="{fill}"/>')
                parts.append(_text(x + wide / 2, y + 13, written.format(value), "middle", soft=False))
    return _svg(parts, title, high)


def _svg(parts: Sequence[str], title: str, high: float) -> str:
    heading = f'<text x="4" y="13" font-weight="600">{escape(title)}</text>'
    return (
        f'<svg viewBox="0 0 {_WIDE} {high:.0f}" width="{_WIDE}" role="img" aria-label="{escape(title)}" '
        f'style="max-width: 100%; height: auto" font-size="11.5" fill="currentColor">{heading}{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", *, fill: str = "", soft: bool = True) -> str:
    look = f'fill="{fill}" font-weight="600"' if fill else _SOFT if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {look}>{escape(text)}</text>'


def _axes(
    x: np.ndarray, y: np.ndarray, left: float, right: float, top: float, bottom: float
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Maps from values to pixels."""
    (x0, wide), (y0, high) = (_span(one) for one in (x, y))
    return (lambda at: left + (at - x0) / wide * (right - left), lambda at: bottom - (at - y0) / high * (bottom - top))


def _span(values: np.ndarray) -> tuple[float, float]:
    """The least value and the range; one value alone comes to the middle of a range of its own size."""
    least, wide = float(values.min()), float(np.ptp(values))
    return (least, wide) if wide else (least - max(abs(least), 1.0) / 2, max(abs(least), 1.0))


def _rules(values: np.ndarray, y: Callable[[float], float], left: float, right: float, *, percent: bool) -> list[str]:
    parts = []
    for at in _ticks(values):
        parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y(at):.1f}" y2="{y(at):.1f}" '
                     f'stroke="{faint(GREY, 0.3)}"/>')  # fmt: skip
        parts.append(_text(left - 6, y(at) + 4, _number(at, percent), "end"))
    return parts


def _ticks(values: np.ndarray) -> list[float]:
    """Three to six round numbers within the range of some values.

    Example:
        >>> _ticks(np.array([0.0, 250.0])), _ticks(np.array([-0.43, 0.19]))
        ([0.0, 100.0, 200.0], [-0.4, -0.2, 0.0])
    """
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return [low]
    unit = 10.0 ** math.floor(math.log10(high - low))
    for step in (5 * unit, 2 * unit, unit, unit / 2, unit / 5, unit / 10):
        within = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(within) > 2:
            break
    return [at * step + 0.0 for at in within]


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.4g} %" if percent else f"{value:.4g}"


def _hue(index: int) -> str:
    """The first curve is the finding, the second what it is compared with in grey, and the others have a hue each."""
    return (BAD, GREY, GOOD)[index] if index < 3 else colour(index - 1)


def _named(name: Any) -> str:
    return f"{name:.4g}" if isinstance(name, float) else str(name)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: max(most - 1, 1)]}…"
