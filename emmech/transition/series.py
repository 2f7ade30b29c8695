"""A peak in a positive series along training, such as the gradient norm of B.

The strength is the prominence of the largest peak of the smoothed logarithm (a ratio: gradient norms scale with
everything). Its position has an interval but no p-value: every rise and fall has a peak, that of a warm-up too, and no
null model here tells such a peak from a transition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Peak:
    """The largest peak of a series: index with a 95 % interval, and ratio over its base."""

    index: int
    low: int
    high: int
    ratio: float
    smooth: Array


def find_peak(values: npt.ArrayLike, rng: np.random.Generator) -> Peak | None:
    """Largest peak of a positive series ``[n]`` with n of at least 10; None where it has no interior peak."""
    y = np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-12 * float(np.max(values)) + 1e-300))
    n = len(y)
    width = max(5, n // 12) | 1
    smooth = _smooth(y[None], width)[0]
    rest = y - smooth
    correction = 1 - 1 / width
    local = np.sqrt(_smooth(rest[None] ** 2, min(4 * width, n) | 1)[0] / correction)
    # smoothing leaves residuals that look less correlated than the noise, by about 1 / width
    correlation = float(np.sum(rest[1:] * rest[:-1]) / max(float(np.sum(rest**2)), 1e-300))
    correlation = float(np.clip((correlation + 1.5 / width) / correction, 0.0, 0.9))
    prominence, index = _largest(smooth[None])
    if prominence[0] <= 0:
        return None
    _, again = _largest(_smooth(smooth + correlated(100, n, correlation, rng) * local, width))
    low, high = np.quantile(again[again >= 0], [0.025, 0.975], method="nearest") if (again >= 0).any() else (0, n - 1)
    at = int(index[0])
    return Peak(at, min(int(low), at), max(int(high), at), float(np.exp(prominence[0])), np.exp(smooth))


def _smooth(y: Array, width: int) -> Array:
    from scipy.ndimage import uniform_filter1d

    return uniform_filter1d(y, width, axis=-1, mode="nearest")


def _largest(smooth: Array) -> tuple[Array, npt.NDArray[np.int64]]:
    """Prominence and index of each row's most prominent peak (0 and -1 without one)."""
    from scipy.signal import find_peaks

    height, index = np.zeros(len(smooth)), np.full(len(smooth), -1)
    for i, row in enumerate(smooth):
        peaks, found = find_peaks(row, prominence=0.0)
        if len(peaks):
            best = int(np.argmax(found["prominences"]))
            height[i], index[i] = found["prominences"][best], peaks[best]
    return height, index


def correlated(count: int, n: int, correlation: float, rng: np.random.Generator) -> Array:
    """Autoregressive noise of unit variance, ``[count, n]``."""
    from scipy.signal import lfilter

    z = rng.standard_normal((count, n + 50))
    return lfilter([np.sqrt(1 - correlation**2)], [1.0, -correlation], z, axis=-1)[:, 50:]
