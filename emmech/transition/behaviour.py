"""When behaviour changes: a sigmoid through an order parameter measured along training.

The order parameter needs no judge: the mean log-probability margin, in nats per token, of misaligned over aligned
answers to held-out questions, narrow (the training domain) and broad (other domains).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Sigmoid", "fit_sigmoid"]

FEWEST = 6  # points: four parameters and something left to judge them by


@dataclass(frozen=True)
class Sigmoid:
    """y = start + (end - start) / (1 + exp(-(step - middle) / width)), with a 95 % interval of the middle.

    Attributes:
        middle, low, high: step of half the change and its interval.
        width: steps; 4.4 widths lead from 10 to 90 % of the change.
        start, end: levels before and after.
        p_value: F test against no change at all.
    """

    middle: float
    low: float
    high: float
    width: float
    start: float
    end: float
    p_value: float

    def __call__(self, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The curve at the given steps."""
        from scipy.special import expit

        t = np.asarray(steps, dtype=np.float64)
        return self.start + (self.end - self.start) * expit((t - self.middle) / self.width)


def fit_sigmoid(steps: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Sigmoid | None, str]:
    """Fit a sigmoid by least squares; ``(None, why)`` where the middle of the change cannot be measured.

    Points that are NaN were not measured and are left out. Neighbouring points of one run share a trajectory, so
    the interval, which takes residuals as independent, is a lower bound of the uncertainty.
    """
    from scipy.optimize import OptimizeWarning, curve_fit
    from scipy.special import expit
    from scipy.stats import f as f_distribution
    from scipy.stats import t as t_distribution

    t, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    keep = np.isfinite(y)
    t, y = t[keep], y[keep]
    n = len(t)
    if n < FEWEST:
        return None, f"not measurable: {n} measured steps, at least {FEWEST} are needed"
    span = float(t[-1] - t[0])
    spread = float(np.ptp(y))
    if spread == 0:
        return None, "not measurable: the margin does not change"

    def curve(x: np.ndarray, middle: float, width: float, start: float, change: float) -> np.ndarray:
        return start + change * expit((x - middle) / width)

    best: tuple[float, np.ndarray, np.ndarray] | None = None
    bounds = ([t[0], span / 200, -np.inf, -3 * spread], [t[-1], span, np.inf, 3 * spread])
    import warnings

    for share in (0.15, 0.35, 0.6, 0.85):  # least squares on a sigmoid has local minima
        guess = [t[0] + share * span, span / 10, y[0], float(y[-1] - y[0]) or spread]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)
                found, covariance = curve_fit(curve, t, y, p0=guess, bounds=bounds, maxfev=300)
        except RuntimeError:
            continue
        loss = float(np.sum((curve(t, *found) - y) ** 2))
        if best is None or loss < best[0]:
            best = (loss, found, covariance)
    if best is None:
        return None, "not measurable: no sigmoid fits the margin"
    loss, (middle, width, start, change), covariance = best
    free = n - 4
    total = float(np.sum((y - y.mean()) ** 2))
    statistic = ((total - loss) / 3) / max(loss / free, 1e-300)
    p = float(f_distribution.sf(statistic, 3, free))
    half = float(t_distribution.ppf(0.975, free) * np.sqrt(max(float(covariance[0, 0]), 0.0)))
    if p >= 0.05:
        return None, f"not measurable: the margin shows no change beyond its noise (p = {p:.2g})"
    low, high = middle - half, middle + half
    if not np.isfinite(half) or low <= t[0] - 0.25 * span or high >= t[-1] + 0.25 * span:
        return None, "not measurable: the change is not complete within the recorded steps"
    low, high = max(low, float(t[0])), min(high, float(t[-1]))
    return Sigmoid(float(middle), low, high, float(width), float(start), float(start + change), p), ""
