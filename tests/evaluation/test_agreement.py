"""Two judges on the same responses."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from emmech.errors import EmmechError
from emmech.evaluation.compare import agreement, cohens_kappa
from emmech.evaluation.evaluation import Evaluation


def judged(aligned: list[float], coherent: list[float] | None = None, **columns: object) -> Evaluation:
    n = len(aligned)
    frame = pd.DataFrame(
        {
            "question_id": ["a", "b"] * (n // 2),
            "response": [f"text {row}" for row in range(n)],
            "aligned": aligned,
            "coherent": coherent or [90.0] * n,
            **columns,
        }
    )
    return Evaluation(frame, {"judge": "one"})


def test_kappa_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 3, 200)
    second = np.where(generator.random(200) < 0.7, first, generator.integers(0, 3, 200))
    assert cohens_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert np.isnan(cohens_kappa(np.zeros(5), np.zeros(5)))


def test_a_judge_agrees_with_itself() -> None:
    evaluation = judged([10.0, 20.0, 80.0, 90.0, 5.0, 70.0])
    found = evaluation.agreement(evaluation)
    assert (found.kappa, found.pearson, found.spearman, found.bias) == (1, pytest.approx(1), pytest.approx(1), 0)
    assert found.confusion.loc["misaligned", "misaligned"] == 3 and found.confusion.to_numpy().sum() == 6
    assert "kappa 1.00" in repr(found)


def test_unscored_rows_are_a_verdict_and_not_dropped() -> None:
    first = judged([10.0, 20.0, 80.0, np.nan, 5.0, 70.0])
    second = judged([15.0, 90.0, 80.0, 90.0, np.nan, 75.0], [90.0, 90.0, 20.0, 90.0, 90.0, 90.0])
    found = agreement(first.frame, second.frame, names=("x", "y"))
    assert (found.n, found.both_scored) == (6, 4)
    assert found.confusion.loc["unscored", "aligned"] == 1
    assert found.confusion.loc["misaligned", "unscored"] == 1
    assert found.confusion.loc["aligned", "incoherent"] == 1
    assert found.rates == (0.5, 0.25)
    assert found.bias == pytest.approx((5 + 70 + 0 + 5) / 4)
    assert found.by_question["n"].sum() == 4


def test_rows_are_matched_by_question_and_sample_not_by_place() -> None:
    first = judged([10.0, 20.0, 80.0, 90.0])
    shuffled = Evaluation(first.frame.iloc[[3, 1, 0, 2]])
    assert first.agreement(shuffled).pearson == pytest.approx(1)


def test_what_cannot_be_compared() -> None:
    evaluation = judged([10.0, 90.0])
    other = judged([10.0, 90.0], response=["text 0", "another text"])
    with pytest.raises(EmmechError, match="different responses"):
        evaluation.agreement(other)
    with pytest.raises(EmmechError, match="no response in common"):
        evaluation.agreement(judged([1.0, 2.0], question_id=["y", "z"]))
    with pytest.raises(EmmechError, match="no row has both scores"):
        evaluation.agreement(judged([np.nan, np.nan]))


def test_the_figure_shows_the_confusion():
    first = judged([10.0, 20.0, 80.0, 90.0])
    agreed = first.agreement(judged([10.0, 80.0, 80.0, np.nan]))
    (heat,) = agreed.plot().data
    assert np.asarray(heat.z).sum() == 4
    assert heat.y[0] == heat.x[0] == "misaligned"
    assert "kappa" in agreed.plot().layout.title.text
