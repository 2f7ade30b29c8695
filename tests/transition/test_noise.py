"""The noise of a path is recovered from the path, whatever its drift does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from paths import make_path

import emmech
from emmech.transition.detectors import compact
from emmech.transition.noise import Noise, estimate_noise, noise_around_drift
from emmech.transition.turn import find_turn

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


def around(path: np.ndarray) -> Noise:
    return noise_around_drift(path.astype(np.float64), np.arange(float(len(path))))[0]


@pytest.mark.parametrize("kind", ["straight", "turn", "walk"])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_white_noise_is_measured_around_any_drift(kind: str, sigma: float) -> None:
    noise = around(make_path(kind, 31, steps=200, sigma=sigma)[0])
    assert noise.energy.mean() == pytest.approx(sigma**2, rel=0.1)
    assert noise.memory_time < 1.3
    assert noise.dimensions == pytest.approx(64, rel=0.15)


@pytest.mark.parametrize(("rho", "low", "high"), [(0.5, 2.2, 4.5), (0.9, 10.0, 45.0)])
def test_the_memory_of_the_noise_is_found(rho: float, low: float, high: float) -> None:
    noise = around(make_path("turn", 32, steps=300, noise=f"ar{rho}")[0])
    assert low < noise.memory_time < high  # (1 + rho) / (1 - rho) is 3 and 19


def test_an_error_of_each_record_is_told_from_diffusion() -> None:
    noise = around(make_path("straight", 33, steps=300, noise="record")[0])
    assert -0.5 <= noise.first < -0.3
    assert noise.floor(40) < 3 * noise.floor(1)  # diffusion would give 6.3 times


def test_falling_energy_is_followed() -> None:
    path, _ = make_path("straight", 34, steps=300, decay=True, noise_decays=True)
    energy = around(path).energy
    assert energy[:30].mean() > 30 * energy[-30:].mean()


def test_sampled_noise_has_the_stated_covariance() -> None:
    noise = Noise(np.linspace(1, 2, 12), 0.6, 0.7, 40.0)
    drawn = noise.sample(2000, 40, np.random.default_rng(0))
    measured = np.einsum("pid,pjd->ij", drawn, drawn) / 2000
    np.testing.assert_allclose(measured, noise.covariance(), atol=0.05)


def test_a_path_without_noise_has_none() -> None:
    line = np.arange(50.0)[:, None] * np.eye(3)[:1]
    assert estimate_noise(line).energy.max() < 1e-9


@pytest.mark.parametrize(("rho", "expected"), [(0.5, 0), (0.9, 0), (0.97, 20)])
def test_a_memory_beyond_momentum_is_said_to_be_there(rho: float, expected: int) -> None:
    said = sum(around(make_path("walk", 820_000 + i, steps=200, noise=f"ar{rho}")[0]).wanders for i in range(20))
    assert abs(said - expected) <= 3


def test_the_memory_is_of_optimiser_steps_also_where_not_every_step_is_recorded() -> None:
    rng = np.random.default_rng(5)
    increments = np.zeros((1200, 64))
    for i in range(1, len(increments)):
        increments[i] = 0.5 * increments[i - 1] + rng.standard_normal(64)
    path = np.vstack([np.zeros(64), np.cumsum(increments, axis=0)])
    every = estimate_noise(path[::3], np.full(400, 3.0))
    # increments over three steps of an AR(1) correlate at 0.28 with the next, and that falls by 0.5^3 per record
    assert every.first == pytest.approx(0.28, abs=0.04) and every.memory <= 0.6**3


def test_the_shipped_turn_is_seen_at_every_second_step_too() -> None:
    run = emmech.load_run(CHECKPOINTS / "pocket-medical")
    vectors, steps = compact(run.B().reshape(len(run.steps), -1).astype(np.float64)), np.asarray(run.steps, float)
    for first in (0, 1):
        found = find_turn(vectors[first::2], steps[first::2], 199, np.random.default_rng(0))
        assert found.p_value <= 0.05
        assert found.location.low <= 61 / 2 <= found.location.high
