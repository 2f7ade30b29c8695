"""Dissimilarities against their textbook forms, and what judging can explain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from emmech.errors import EmmechError
from emmech.transition.distribution import KINDS, dissimilarity, distribution_shift, explained_share, label_distribution

seeds = st.integers(0, 10_000)


def pair(seed, outcomes=6):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(outcomes, 0.4), 2)
    return p, q


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_they_are_what_the_textbooks_say(seed):
    p, q = pair(seed)
    assert dissimilarity(p, q, "total-variation") == pytest.approx(np.abs(p - q).sum() / 2)
    assert dissimilarity(p, q, "jensen-shannon") == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    # the defining expectation, with g(x) = 2x - 1
    x, y = p / (p + q), q / (p + q)
    assert dissimilarity(p, q, "linear") == pytest.approx(0.5 * (p @ (2 * x - 1) + q @ (2 * y - 1)))


@given(seeds, st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_they_are_symmetric_bounded_and_never_grow_by_forgetting(seed, kind):
    p, q = pair(seed)
    whole = dissimilarity(p, q, kind)
    assert whole == pytest.approx(dissimilarity(q, p, kind)) and -1e-12 <= whole <= 1 + 1e-12
    merged = dissimilarity(p.reshape(3, 2).sum(1), q.reshape(3, 2).sum(1), kind)
    assert merged <= whole + 1e-12
    assert dissimilarity(p, p, kind) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_disjoint_distributions_differ_by_one(kind):
    assert dissimilarity(np.array([1.0, 0]), np.array([0, 1.0]), kind) == pytest.approx(1)


@pytest.mark.parametrize("window", [1, 3])
def test_a_planted_change_is_found_and_a_judge_that_sees_it_explains_it(window):
    steps = np.arange(0, 100, 10)
    before, after = np.array([0.6, 0.4, 0, 0]), np.array([0, 0, 0.3, 0.7])
    p = np.array([before if step < 50 else after for step in steps])
    whole = distribution_shift(steps, p, window=window)
    assert whole.peak == 45
    seen = distribution_shift(steps, p.reshape(10, 2, 2).sum(2), window=window)
    blind = distribution_shift(steps, np.ones((10, 1)), window=window)
    at = int(np.argmax(whole.values))
    assert explained_share(seen, whole)[at] == pytest.approx(1)
    assert explained_share(blind, whole)[at] == pytest.approx(0)
    if window == 1:
        assert np.isnan(explained_share(seen, whole)[0])  # nothing changes there


def test_labels_are_counted_by_step():
    import pandas as pd

    frame = pd.DataFrame({"step": [5, 0, 0, 5], "label": ["misaligned", "aligned", "aligned", "aligned"]})
    steps, shares, labels = label_distribution(frame)
    assert steps.tolist() == [0, 5] and labels == ["aligned", "misaligned"]
    assert shares.tolist() == [[1, 0], [0.5, 0.5]]


def test_bad_input_is_refused():
    p = np.array([[0.5, 0.5], [1, 0]])
    with pytest.raises(EmmechError, match="jensen-shannon"):
        dissimilarity(p, p, "jensen")
    with pytest.raises(EmmechError, match="sum to 1"):
        dissimilarity(np.log(p + 0.1), p)
    with pytest.raises(EmmechError, match="one distribution per step"):
        distribution_shift([0, 1, 2], p)
    with pytest.raises(EmmechError, match="same dissimilarity"):
        explained_share(distribution_shift([0, 1], p), distribution_shift([0, 1], p, kind="total-variation"))
