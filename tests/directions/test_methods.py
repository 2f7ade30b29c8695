from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.directions.direction import unit_rows
from emmech.directions.extract import (
    adapter_write,
    differences_of_four,
    logistic_probe,
    mean_difference,
    pca_of_differences,
    probe_auc,
)
from emmech.directions.sources import lexical_share
from emmech.errors import EmmechError


def _clouds(gap, answers=120, layers=2, width=20, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(answers) % 2 == 0
    axis = unit_rows(rng.standard_normal((layers, width)))
    x = rng.standard_normal((answers, layers, width))
    x += np.where(labels, gap / 2, -gap / 2)[:, None, None] * axis
    return x, labels, axis, np.arange(answers) // 6


def test_four_means_are_taken_apart_additively():
    rng = np.random.default_rng(0)
    origin, text, model, extra = rng.standard_normal((4, 3, 5))
    means = np.array([[origin, origin + text], [origin + model, origin + text + model + extra]])
    found = differences_of_four(means)
    np.testing.assert_allclose(found["text/aligned model"], text)
    np.testing.assert_allclose(found["text/tuned model"], text + extra)
    np.testing.assert_allclose(found["model/aligned text"], model)
    np.testing.assert_allclose(found["interaction"], extra)
    np.testing.assert_allclose(found["both"], found["text"] + found["model"])
    with pytest.raises(EmmechError, match="axes model, text"):
        differences_of_four(means[0])


def test_pca_finds_the_shift_that_centring_loses():
    rng = np.random.default_rng(1)
    base = rng.standard_normal((50, 2, 16))
    shift, wobble = np.zeros(16), np.zeros(16)
    shift[3], wobble[7] = 2.0, 1.0
    noise = 0.01 * rng.standard_normal(base.shape)
    tuned = base + shift + rng.standard_normal((50, 1, 1)) * wobble + noise
    found = pca_of_differences(tuned, base, components=2)
    assert abs(unit_rows(found[0, 0])[3]) > 0.95 and found[0, 0][3] > 0
    np.testing.assert_allclose(np.linalg.norm(found[0, 0]), 2.0, rtol=0.15)
    centred = pca_of_differences(tuned, base, centre=True)
    assert abs(unit_rows(centred[0, 1])[7]) > 0.99
    with pytest.raises(EmmechError, match="more answers than components"):
        pca_of_differences(tuned[:1], base[:1])


def test_a_probe_finds_the_axis_and_its_norm_is_the_gap():
    x, labels, axis, questions = _clouds(6.0)
    found = logistic_probe(x, labels)
    cosine = np.einsum("ld,ld->l", unit_rows(found), axis)
    assert cosine.min() > 0.8
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 6 * cosine, rtol=0.15)
    assert probe_auc(x, labels, questions).min() > 0.97


def test_held_out_auc_is_chance_on_noise():
    x, labels, _, questions = _clouds(0.0, answers=300)
    assert abs(probe_auc(x, labels, questions).mean() - 0.5) < 0.12
    assert np.isnan(probe_auc(x, labels, np.zeros(300))).all()  # one question only: nothing to hold out
    with pytest.raises(EmmechError, match="of both classes"):
        logistic_probe(x, np.ones(300, dtype=bool))


def test_the_write_of_an_adapter():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1, 7)), rng.standard_normal((5, 1))
    np.testing.assert_allclose(adapter_write(a, b, 16.0), 16 * b[:, 0])
    a, b = rng.standard_normal((3, 7)), rng.standard_normal((5, 3))
    left, singular, _ = np.linalg.svd(b @ a)
    found = adapter_write(a, b, 2.0)
    np.testing.assert_allclose(abs(found @ left[:, 0]), 2 * singular[0])
    np.testing.assert_allclose(np.linalg.norm(found), 2 * singular[0])


@st.composite
def _answers(draw):
    rows, labels = [], []
    for label in (True, False):
        for _ in range(draw(st.integers(1, 4))):
            ids = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)))
            rows.append(
                (ids, np.array(draw(st.lists(st.floats(-5, 5), min_size=len(ids), max_size=len(ids))))[:, None])
            )
            labels.append(label)
    return rows, np.array(labels)


@given(_answers(), st.floats(-100, 100))
@settings(max_examples=80, deadline=None)
def test_the_lexical_part_and_the_rest_make_the_whole_and_the_origin_does_not_matter(answers, shift):
    rows, labels = answers
    gap = np.mean(np.concatenate([v[:, 0] for (_, v), own in zip(rows, labels, strict=True) if own]))
    gap -= np.mean(np.concatenate([v[:, 0] for (_, v), own in zip(rows, labels, strict=True) if not own]))
    if abs(gap) < 0.1:
        return
    share = lexical_share(rows, labels)[0]
    moved = lexical_share([(ids, v + shift) for ids, v in rows], labels)[0]
    assert moved == pytest.approx(share, abs=1e-6 * (1 + abs(shift)) / abs(gap))
    # swapping the labels turns the direction round and leaves the share
    assert lexical_share(rows, ~labels)[0] == pytest.approx(share, abs=1e-9)


def test_a_mean_difference_is_antisymmetric():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 4))
    np.testing.assert_array_equal(mean_difference(a, b), -mean_difference(b, a))
