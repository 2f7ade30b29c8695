"""Differences between conditions measured on the same questions, with intervals that respect the questions.

Items of one question resemble each other, so the question is the unit: a difference of pooled means is linearised over
questions (a ratio estimator) and gets a t interval on their number. For outcomes of 0 and 1 it is never narrower than
the interval that independent rows would give (Newcombe's, from Wilson's), because a cluster variance cannot see what
did not happen: no misaligned answer in 8 questions is not certainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from emmech.evaluation.rates import wilson
from emmech.measures.measure import Items

__all__ = ["Estimate", "combination"]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of its items."""

    value: float
    low: float
    high: float
    n: int


def combination(
    terms: Sequence[tuple[float, Items]], outcome: str, *, spread: float = 0.0, confidence: float = 0.95
) -> Estimate:
    """A weighted sum of the pooled means of one outcome, over conditions measured on the same questions.

    Args:
        terms: weight and items of each condition: ``[(1, steered), (-1, untouched)]`` is a change.
        spread: a further variance, of control directions drawn at random.

    Returns:
        NaN values when an item-less condition takes part.

    Example:
        >>> on = Items({"em": np.array([1.0, 1.0, 0.0, 1.0])}, ["a", "a", "b", "b"])
        >>> off = Items({"em": np.zeros(4)}, ["a", "a", "b", "b"])
        >>> round(combination([(1, on), (-1, off)], "em").value, 2)
        0.75
    """
    from scipy import stats

    names = sorted({question for _, items in terms for question in items.questions})
    place = {name: index for index, name in enumerate(names)}
    value, residual, n, binary = 0.0, np.zeros(len(names)), 0, True
    below, above = spread, spread
    for weight, items in terms:
        values = np.asarray(items.values[outcome], dtype=np.float64)
        kept = np.isfinite(values)
        if not kept.any():
            return Estimate(np.nan, np.nan, np.nan, 0)
        index = np.array([place[q] for q in items.questions])[kept]
        values = values[kept]
        mean = float(values.mean())
        value += weight * mean
        residual += weight * np.bincount(index, values - mean, minlength=len(names)) / len(values)
        n = max(n, len(values))
        binary = binary and bool(np.isin(values, (0.0, 1.0)).all())
        low, high = wilson(int(values.sum()), len(values), confidence) if binary else (mean, mean)
        sides = (weight * (mean - low), weight * (high - mean))
        down, up = sides if weight > 0 else (-sides[1], -sides[0])
        below, above = below + down**2, above + up**2
    used = int(np.count_nonzero(_seen(terms, outcome, place)))
    half = np.inf
    if used > 1:
        variance = used / (used - 1) * float((residual**2).sum()) + spread
        half = float(stats.t.ppf(0.5 + confidence / 2, used - 1)) * variance**0.5
    if binary:
        # with one question there is nothing but the rows
        lower, upper = (half, half) if used > 1 else (0.0, 0.0)
        return Estimate(value, value - max(lower, below**0.5), value + max(upper, above**0.5), n)
    return Estimate(value, value - half, value + half, n)


def _seen(
    terms: Sequence[tuple[float, Items]], outcome: str, place: Mapping[str, int]
) -> Float[np.ndarray, " questions"]:
    seen = np.zeros(len(place))
    for _, items in terms:
        for question, value in zip(items.questions, items.values[outcome], strict=True):
            seen[place[question]] += np.isfinite(value)
    return seen
