"""When behaviour changes: a sigmoid fitted to an order parameter measured along training.

The order parameter needs no judge: the mean log-probability margin, in nats per token, of misaligned over aligned
answers to held-out questions, narrow (the training domain) and broad (other domains).

Neighbouring points belong to one trajectory, so a flat series with autocorrelated noise can look like a sigmoid, and a
benign fine-tune moves the margin a little as it settles. A step is therefore reported only where two tests agree, each
under autoregressive noise with the memory that makes it least certain:

- *size*: the best sigmoid against no change, under noise with any memory up to 0.9 per point;
- *shape*: the best sigmoid against a straight line with an exponential approach, which have no middle, under noise
  with a memory up to the upper end of what the residuals allow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emmech.transition.series import correlated

Array = npt.NDArray[np.float64]

FEWEST = 6  # points: enough for four parameters and for judging the fit
MEMORIES = (0.0, 0.5, 0.8, 0.9)  # of the noise, per point
APPROACH = 10.0  # rate of the exponential approach, per length of the run
N_NULL = 199
_TEN_TO_NINETY = 4.4  # widths from 10 to 90 % of a sigmoid's change


@dataclass(frozen=True)
class Sigmoid:
    """y = start + (end - start) / (1 + exp(-(step - middle) / width)), with a 95 % interval of the middle.

    Attributes:
        middle, low, high: step of half the change and its interval. Where fewer than two points lie within the change,
            the interval reaches at least to the points on either side.
        width: steps.
        start, end: levels before and after.
        p_value: larger of the tests for size and shape.
    """

    middle: float
    low: float
    high: float
    width: float
    start: float
    end: float
    p_value: float

    @property
    def duration(self) -> float:
        """Steps from 10 to 90 % of the change."""
        return _TEN_TO_NINETY * self.width

    def __call__(self, steps: npt.ArrayLike) -> Array:
        """The curve at the given steps."""
        from scipy.special import expit

        t = np.asarray(steps, dtype=np.float64)
        return self.start + (self.end - self.start) * expit((t - self.middle) / self.width)


def fit_sigmoid(steps: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Sigmoid | None, str]:
    """Fit a sigmoid by least squares; ``(None, why)`` where the middle of the change cannot be measured.

    Points that are NaN were not measured and are left out.
    """
    from scipy.optimize import OptimizeWarning, curve_fit
    from scipy.special import expit
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
    p, memory = _test(t, y)
    if p >= 0.05:
        return None, f"not measurable: noise and a gradual approach explain its change (p = {p:.2g})"

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
    _, (middle, width, start, change), covariance = best
    # correlated residuals hold fewer independent observations than points
    spread_out = np.sqrt((1 + memory) / (1 - memory) * max(float(covariance[0, 0]), 0.0))
    half = float(t_distribution.ppf(0.975, n - 4) * spread_out)
    low, high = middle - half, middle + half
    if not np.isfinite(half) or low <= t[0] - 0.25 * span or high >= t[-1] + 0.25 * span:
        so_far = f"{y[-1] - y[0]:+.2g} from step {t[0]:.0f} to {t[-1]:.0f}"
        return None, f"not measurable: the change ({so_far}) is not complete within the recorded steps"
    if np.count_nonzero(np.abs(t - middle) < _TEN_TO_NINETY / 2 * width) < 2:  # the points say nothing of where between
        low, high = min(low, float(t[t <= middle].max())), max(high, float(t[t >= middle].min()))
    low, high = max(low, float(t[0])), min(high, float(t[-1]))
    return Sigmoid(float(middle), low, high, float(width), float(start), float(start + change), p), ""


def _test(t: Array, y: Array) -> tuple[float, float]:
    """The larger of the p-values for size and shape, and the memory of the residuals with a margin for its error."""
    from scipy.special import expit

    time = (t - t[0]) / (t[-1] - t[0])
    n = len(t)
    middles, widths = (grid.ravel() for grid in np.meshgrid(np.linspace(0.04, 0.96, 47), (0.005, 0.02, 0.05, 0.1)))
    curves = expit((time[:, None] - middles) / widths)
    flat = np.ones((n, 1))
    gradual = np.column_stack([flat, time, np.exp(-APPROACH * time)])
    rng = np.random.default_rng(0)

    def improvement(null: Array, series: Array) -> tuple[Array, Array]:
        """Improvement by the best sigmoid over what it leaves, by series ``[rows, n]``; the first one's residuals."""
        basis, _ = np.linalg.qr(null)
        shape = curves - basis @ (basis.T @ curves)
        size = np.linalg.norm(shape, axis=0)
        shape = shape[:, size > 0.02 * np.sqrt(n)] / size[size > 0.02 * np.sqrt(n)]
        rest = series - (series @ basis) @ basis.T
        along = rest @ shape
        best = (along**2).max(axis=1)
        which = int(np.argmax(along[0] ** 2))
        return best / np.maximum((rest**2).sum(axis=1) - best, 1e-300), rest[0] - along[0, which] * shape[:, which]

    def p_value(null: Array, memories: Iterable[float]) -> float:
        observed = improvement(null, y[None])[0][0]
        worst = max(np.count_nonzero(improvement(null, correlated(N_NULL, n, m, rng))[0] >= observed) for m in memories)
        return (1 + worst) / (1 + N_NULL)

    residual = improvement(gradual, y[None])[1]
    raw = float(residual[1:] @ residual[:-1] / max(float(residual @ residual), 1e-300))
    # residuals of a fit with five parameters look less correlated than the noise
    memory = float(np.clip(raw + (6 + 4 * max(raw, 0.0)) / n, 0.0, 0.9))
    highest = min(memory + 2.5 / np.sqrt(n), MEMORIES[-1])
    p = max(p_value(flat, MEMORIES), p_value(gradual, {min(m, highest) for m in MEMORIES}))
    return p, min(memory + 1.5 / np.sqrt(n), MEMORIES[-1])
