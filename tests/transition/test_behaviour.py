"""The sigmoid through an order parameter."""

from __future__ import annotations

import numpy as np
import pytest

from emmech.transition.behaviour import fit_sigmoid
from emmech.transition.series import correlated


def margin(seed: int, noise: float = 0.05, middle: float = 110, change: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(0, 201, 8)
    curve = -0.3 + change / (1 + np.exp(-(steps - middle) / 12))
    return steps, curve + noise * np.random.default_rng(seed).standard_normal(len(steps))


def test_an_exact_sigmoid_is_recovered() -> None:
    fit, _ = fit_sigmoid(*margin(0, noise=1e-6))
    assert fit is not None
    assert (fit.middle, fit.width) == (pytest.approx(110, abs=0.01), pytest.approx(12, rel=0.01))
    assert (fit.start, fit.end) == (pytest.approx(-0.3, abs=1e-3), pytest.approx(0.5, abs=1e-3))
    assert float(fit(110)) == pytest.approx(0.1, abs=1e-3)


def test_a_falling_margin_is_fitted_too() -> None:
    fit, _ = fit_sigmoid(*margin(1, change=-0.8))
    assert fit is not None and fit.end < fit.start and fit.middle == pytest.approx(110, abs=6)


def test_the_interval_covers_the_middle() -> None:
    fits = [fit_sigmoid(*margin(720_000 + s))[0] for s in range(60)]
    assert sum(f is not None and f.low <= 110 <= f.high for f in fits) >= 53


@pytest.mark.parametrize("middle", [52, 63, 71])
@pytest.mark.parametrize("noise", [1e-6, 0.02])
def test_between_two_points_an_abrupt_change_can_be_anywhere(middle: float, noise: float) -> None:
    steps = np.arange(25, 251, 25)
    values = 0.02 + 0.97 / (1 + np.exp(-(steps - middle) / 1.0))
    fit, _ = fit_sigmoid(steps, values + noise * np.random.default_rng(middle).standard_normal(len(steps)))
    assert fit is not None and fit.low <= 50 and fit.high >= 75 and fit.low <= middle <= fit.high


def test_noise_alone_has_no_middle() -> None:
    fits = [fit_sigmoid(*margin(730_000 + s, change=0.0))[0] for s in range(60)]
    assert sum(f is not None for f in fits) <= 3


@pytest.mark.parametrize("rho", [0.5, 0.7, 0.9])
def test_a_flat_series_with_a_memory_has_no_step(rho: float) -> None:
    series = correlated(200, 23, rho, np.random.default_rng([740_000, int(100 * rho)]))
    assert sum(fit_sigmoid(np.arange(23), values)[0] is not None for values in series) <= 10


@pytest.mark.parametrize("rate", [4, 7, 12])
def test_a_gradual_approach_has_no_step(rate: float) -> None:
    steps = np.arange(0, 251, 11)
    noise = correlated(60, len(steps), 0.5, np.random.default_rng([750_000, rate]))
    series = 0.3 * np.exp(-rate * steps / 250) + 0.02 * noise
    assert sum(fit_sigmoid(steps, values)[0] is not None for values in series) <= 6


def test_the_interval_covers_the_middle_where_the_residuals_remember_each_other() -> None:
    noise = 0.03 * correlated(60, 26, 0.5, np.random.default_rng(760_000))
    fits = [fit_sigmoid(margin(0, noise=0.0)[0], margin(0, noise=0.0)[1] + rest)[0] for rest in noise]
    found = [fit for fit in fits if fit is not None]
    assert len(found) >= 54 and sum(fit.low <= 110 <= fit.high for fit in found) >= 0.92 * len(found)


@pytest.mark.parametrize(
    ("steps", "values", "why"),
    [
        (np.arange(5), np.arange(5.0), "at least 6"),
        (np.arange(20), np.where(np.arange(20) < 4, 1.0, np.nan), "4 measured steps"),
        (np.arange(20), np.ones(20), "does not change"),
    ],
)
def test_what_cannot_be_measured_says_why(steps: np.ndarray, values: np.ndarray, why: str) -> None:
    fit, reason = fit_sigmoid(steps, values)
    assert fit is None and why in reason
