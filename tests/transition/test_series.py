"""Peaks of gradient norms: found where planted, with an interval; a picture without a p-value."""

from __future__ import annotations

import numpy as np
import pytest

from emmech.transition.series import find_peak


def series(seed: int, height: float, n: int = 150, rho: float = 0.0) -> np.ndarray:
    """Gradient norms falling threefold, with 20 % noise and a peak of the given log height at 60."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal(n + 50)
    for i in range(1, len(e)):
        e[i] = rho * e[i - 1] + np.sqrt(1 - rho**2) * e[i]
    t = np.arange(n)
    return np.exp(0.2 * e[-n:] - t * np.log(3) / n + height * np.exp(-(((t - 60) / 15) ** 2)))


def test_a_peak_is_found_where_it_is() -> None:
    peaks = [find_peak(series(700_000 + s, 1.5), np.random.default_rng(s)) for s in range(40)]
    assert sum(p is not None and abs(p.index - 59) <= 6 for p in peaks) >= 36  # the trend moves the top by one
    assert sum(p is not None and p.low <= 59 <= p.high for p in peaks) >= 34
    assert np.median([p.ratio for p in peaks if p is not None]) == pytest.approx(np.exp(1.4), rel=0.3)


def test_a_monotone_series_has_no_peak() -> None:
    assert find_peak(np.linspace(3, 1, 40), np.random.default_rng(0)) is None
