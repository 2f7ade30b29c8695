"""Analytic values and invariances of the trajectory geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.errors import EmmechError
from emmech.geometry import (
    comp_score,
    local_cosine,
    norms,
    pca,
    peak_height,
    principal_angles,
    principal_cosines,
    turn_angle,
)


def corner(angle: float, side: int = 10, d: int = 6) -> np.ndarray:
    """A path of unit steps that turns by ``angle`` degrees at record ``side``."""
    a = np.radians(angle)
    steps = np.zeros((2 * side, d))
    steps[:side, 0] = 1
    steps[side:, 0], steps[side:, 1] = np.cos(a), np.sin(a)
    return np.vstack([np.zeros(d), np.cumsum(steps, axis=0)])


@pytest.mark.parametrize(("angle", "cosine"), [(0, -1), (60, -0.5), (90, 0), (120, 0.5), (180, 1)])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_the_sign_of_the_local_cosine(angle: float, cosine: float, k: int) -> None:
    values = local_cosine(corner(angle), k)
    assert values[10] == pytest.approx(cosine, abs=1e-9)
    assert np.nanmax(values) == pytest.approx(cosine, abs=1e-9)  # a turn is a peak
    assert np.degrees(turn_angle(values[10])) == pytest.approx(angle, abs=1e-4)


def test_positions_near_the_ends_and_rests_are_nan() -> None:
    path = corner(90)
    path[5] = path[6]
    assert np.isnan(local_cosine(path, 3)[[0, 1, 2, -3, -2, -1]]).all()
    values = local_cosine(path, 1)
    assert np.isnan(values[5]) and np.isnan(values[6])


def test_the_noise_floor_removes_positions_whose_displacements_are_short() -> None:
    path = corner(90)
    assert np.isfinite(local_cosine(path, 2, floor=1.9)).sum() == 17
    assert np.isnan(local_cosine(path, 2, floor=2.1)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.01, 100))
def test_local_cosine_ignores_rotation_shift_and_scale(seed: int, k: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.standard_normal((14, 5)), axis=0)
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    moved = scale * (path @ rotation) + rng.standard_normal(5)
    np.testing.assert_allclose(local_cosine(moved, k), local_cosine(path, k), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_at_rank_1_the_principal_cosine_is_the_local_cosine(seed: int, k: int) -> None:
    path = np.cumsum(np.random.default_rng(seed).standard_normal((14, 7)), axis=0)
    np.testing.assert_allclose(principal_cosines(path[:, :, None], k)[:, 0], local_cosine(path, k), atol=1e-9)


def test_principal_cosines_do_not_see_one_rotation_of_the_columns() -> None:
    rng = np.random.default_rng(1)
    b = np.cumsum(rng.standard_normal((12, 9, 3)), axis=0)
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    np.testing.assert_allclose(principal_cosines(b @ rotation, 3), principal_cosines(b, 3), atol=1e-9)


def test_their_size_is_the_cosine_of_the_principal_angles() -> None:
    b = np.cumsum(np.random.default_rng(2).standard_normal((9, 8, 2)), axis=0)
    angles = principal_angles(b[2] - b[4], b[6] - b[4])
    np.testing.assert_allclose(np.abs(principal_cosines(b, 2)[4]), np.cos(angles), atol=1e-9)


def test_a_straight_path_of_rank_2_is_minus_1_and_a_turn_into_new_columns_0() -> None:
    first, second = np.eye(8)[:, :2], np.eye(8)[:, 2:4]
    steps = np.concatenate([np.repeat(first[None], 6, 0), np.repeat(second[None], 6, 0)])
    b = np.concatenate([np.zeros((1, 8, 2)), np.cumsum(steps, axis=0)])
    values = principal_cosines(b, 3)
    np.testing.assert_allclose(values[3], -1, atol=1e-9)
    np.testing.assert_allclose(values[6], 0, atol=1e-9)


def test_pca_finds_the_corner_and_all_variance_of_a_plane() -> None:
    found = pca(corner(70))
    assert found.turning_point() == 10
    assert found.explained[:2].sum() == pytest.approx(1)
    assert found.scores[-1, 0] > found.scores[0, 0]


def test_pca_of_a_path_that_never_moved_explains_nothing() -> None:
    assert pca(np.ones((5, 3))).explained.tolist() == [0, 0, 0]


def test_norms_and_peak_height() -> None:
    assert norms(corner(90, 3, 2))[-1] == pytest.approx(np.sqrt(18))
    line = np.arange(9.0)
    np.testing.assert_allclose(peak_height(line, 2)[2:-2], 0)  # a trend is not a peak


def test_comp_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4, 6, 5))
    x = vectors - vectors.mean(axis=0)
    last = x[:, -1]
    expected = [np.linalg.norm(x[:, t].T @ last) / (np.linalg.norm(x[:, t]) * np.linalg.norm(last)) for t in range(6)]
    np.testing.assert_allclose(comp_score(vectors), expected)
    assert not np.allclose(comp_score(vectors, "steps"), expected)


def test_comp_scales_out_and_is_nan_where_nothing_moved() -> None:
    final = np.random.default_rng(3).standard_normal((3, 1, 5))
    grown = final * np.linspace(0, 1, 6)[None, :, None]
    score = comp_score(grown)
    assert np.isnan(score[0])
    np.testing.assert_allclose(score[1:], score[-1])


@pytest.mark.parametrize("k", [0, -1, 11, 2.5, True])
def test_a_window_that_does_not_fit_is_refused(k: object) -> None:
    with pytest.raises(EmmechError, match="from 1 to 10"):
        local_cosine(corner(90), k)  # type: ignore[arg-type]


def test_comp_refuses_one_adapter_and_other_words() -> None:
    with pytest.raises(EmmechError, match="at least two adapters"):
        comp_score(np.zeros((1, 5, 3)))
    with pytest.raises(EmmechError, match="did you mean 'steps'"):
        comp_score(np.zeros((2, 5, 3)), "step")
