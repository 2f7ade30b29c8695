"""Does the turn detector find what is there and nothing else? Seeds here were never used while it was written.

The default suite runs a small version of the calibration table (``calibration.py``): null paths with heavy tails,
outliers, memory, optimisers in bowls and arcs, and abrupt turns; and paths with correlated noise. ``slow`` runs the
whole table, and adds 100 turned, 200 straight and 200 diffusing paths of other seeds, step sizes that decay,
dimensions, lengths and kinds of noise.
"""

from __future__ import annotations

import numpy as np
import pytest
from calibration import Row, measure
from generators import NULLS, TURNS
from paths import make_path

from emmech.transition.detectors import compact
from emmech.transition.turn import find_turn
from tests.tables import share

TEST_SEEDS = 900_000
N_NULL = 39  # the smallest p-value is 0.025


def decide(path: np.ndarray, seed: int, n_null: int = N_NULL) -> tuple[float, int]:
    v = compact(path.astype(np.float64))
    turn = find_turn(v, np.arange(float(len(v))), n_null, np.random.default_rng(seed))
    return turn.p_value, turn.location.record


def found(count: int, **kinds: object) -> int:
    hits = 0
    for i in range(count):
        path, record = make_path("turn", TEST_SEEDS + i, **kinds)  # type: ignore[arg-type]
        p, where = decide(path, i, 99)
        hits += p < 0.05 and abs(where - record) <= 1
    return hits


def called(kind: str, count: int, **kinds: object) -> int:
    offset = {"straight": 10_000, "walk": 20_000}[kind]
    paths = (make_path(kind, TEST_SEEDS + offset + i, **kinds)[0] for i in range(count))  # type: ignore[arg-type]
    return sum(decide(path, i)[0] < 0.05 for i, path in enumerate(paths))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [False, True])
def test_a_planted_turn_of_60_degrees_is_found_within_one_record(decay: bool) -> None:
    # the step length falls to 2 % under constant noise: the turn is told from smooth paths in nine of ten
    assert found(100, decay=decay) >= (90 if decay else 95)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("kind", ["straight", "walk"])
def test_at_most_5_percent_of_paths_without_a_turn_are_called(kind: str, decay: bool) -> None:
    assert called(kind, 200, decay=decay) <= 10


@pytest.mark.parametrize("kind", ["straight", "walk"])
@pytest.mark.parametrize("noise", ["ar0.5", "record"])
def test_correlated_noise_is_not_called_either(kind: str, noise: str) -> None:
    assert called(kind, 60, noise=noise) <= 6  # 5 % with a chance of 3 % to see more


@pytest.mark.parametrize("noise", ["ar0.5", "record"])
def test_a_turn_is_found_under_correlated_noise(noise: str) -> None:
    assert found(20, noise=noise) >= 18


def pooled(rows: list[Row]) -> Row:
    return Row("pooled", sum(r.count for r in rows), sum(r.calls for r in rows), sum(r.held for r in rows))


def test_a_small_version_of_the_calibration_table() -> None:
    """8 paths of each null kind: more than 11 calls of 112 have a chance of 1.5 % where the true rate is 5 %."""
    false = pooled([measure(name, generator, 8) for name, generator in NULLS.items()])
    assert false.calls <= 11
    found = measure("abrupt turn, Gaussian", TURNS["abrupt turn, Gaussian"], 20)
    assert found.calls >= 17 and found.held >= found.calls - 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NULLS)
def test_at_most_5_percent_of_each_kind_of_null_path_are_called(name: str) -> None:
    row = measure(name, NULLS[name], 200)
    assert row.calls <= 10 and share(row.calls, row.count)[2] <= 9


@pytest.mark.slow
def test_nine_of_ten_abrupt_turns_are_found_and_held_by_their_interval() -> None:
    row = measure("abrupt turn, Gaussian", TURNS["abrupt turn, Gaussian"], 200)
    assert row.calls >= 180 and row.held >= 0.95 * row.calls


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100, 400])
@pytest.mark.parametrize("d", [64, 2048])
@pytest.mark.parametrize("decay", [False, True])
def test_calibration_by_size(d: int, steps: int, decay: bool) -> None:
    # where the step length falls to 2 % under constant noise, the shorter path has too little left after the turn
    assert found(100, d=d, steps=steps, decay=decay) >= ((90 if steps > 100 else 65) if decay else 95)
    assert called("straight", 200, d=d, steps=steps, decay=decay) <= 10
    assert called("walk", 200, d=d, steps=steps, decay=decay) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["ar0.5", "ar0.9", "record"])
@pytest.mark.parametrize("noise_decays", [False, True])
def test_calibration_by_noise(noise: str, noise_decays: bool) -> None:
    options = {"noise": noise, "decay": True, "noise_decays": noise_decays, "steps": 200}
    assert called("straight", 200, **options) <= 10
    assert called("walk", 200, **options) <= 10
    # constant noise over a fading step hides the turn in long memory, and noise with a memory of 0.9 bends as smoothly
    # as the turn at any step
    if noise == "record" or (noise_decays and noise == "ar0.5"):
        assert found(100, **options) >= 80
