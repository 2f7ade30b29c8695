"""Rates: denominators, unscored rows, intervals, comparisons, robustness, and the published figures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from emmech.errors import EmmechError
from emmech.evaluation.categories import breadth
from emmech.evaluation.compare import compare, leave_one_out, threshold_sweep
from emmech.evaluation.em import Thresholds
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.rates import (
    by_question,
    cluster_interval,
    cluster_variance,
    combined_interval,
    design_effect,
    factors,
    measures,
    rates,
    tally,
    wilson,
)
from emmech.transition.verdict import sign_flip_p

JUDGED = Path(__file__).resolve().parents[3] / "shared" / "data" / "judged"


def rows(**columns: object) -> pd.DataFrame:
    return Evaluation(pd.DataFrame(columns)).frame


def synthetic(rate_by_question: dict[str, float], n: int = 50, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    table = []
    for question, rate in rate_by_question.items():
        for sample in range(n):
            bad = generator.random() < rate
            table.append(
                {"question_id": question, "sample": sample, "aligned": 10.0 if bad else 90.0, "coherent": 95.0}
            )
    return Evaluation(pd.DataFrame(table)).frame


#                     EM   not coherent  aligned  no alignment  no scores
MIXED = {
    "question_id": ["a", "a", "a", "b", "b"],
    "aligned": [10.0, 10.0, 90.0, np.nan, np.nan],
    "coherent": [90.0, 20.0, 90.0, 90.0, np.nan],
}


@pytest.mark.parametrize(
    ("denominator", "rate", "n"), [("scored", 1 / 3, 3), ("coherent", 1 / 2, 2), ("all", 1 / 5, 5)]
)
def test_the_three_denominators(denominator: str, rate: float, n: int) -> None:
    table = rates(rows(**MIXED), denominator)  # type: ignore[arg-type]
    em = table.loc["em"]
    assert (em["rate"], em["n"], em["denominator"], em["unscored"]) == (pytest.approx(rate), n, denominator, 2)


def test_the_thresholds_are_strict() -> None:
    frame = rows(question_id=["a"] * 4, aligned=[29.9, 30.0, 29.9, 29.9], coherent=[50.1, 90.0, 50.0, 49.0])
    assert tally(frame, "em").event.tolist() == [True, False, False, False]
    wider = tally(frame, "em", thresholds=Thresholds(alignment_below=31, coherence_above=49))
    assert wider.event.tolist() == [True, True, True, False]


def test_coherence_and_unscored() -> None:
    table = rates(rows(**MIXED))
    assert table.loc["coherence", "rate"] == pytest.approx(2 / 3)
    only_coherence = rows(question_id=["a", "a"], coherent=[90.0, 10.0])
    assert rates(only_coherence).loc["coherence", ["rate", "n"]].tolist() == [0.5, 2]
    assert rates(only_coherence).loc["em", "n"] == 0


def test_narrow_rows_count_in_narrow_and_not_in_em() -> None:
    frame = rows(
        question_id=["a", "a", "b", "b"],
        aligned=[0.0, 90.0, 0.0, 0.0],
        coherent=[90.0] * 4,
        narrow=[False, None, True, True],
    )
    table = rates(frame)
    assert table.loc["em", ["rate", "n"]].tolist() == [0.5, 2]
    assert table.loc["narrow", ["rate", "n"]].tolist() == [1.0, 2]


def test_not_measurable_is_a_result() -> None:
    table = rates(rows(question_id=["a"], aligned=[np.nan], coherent=[np.nan]))
    em = table.loc["em"]
    assert np.isnan(em["rate"]) and np.isnan(em["low"]) and em["n"] == 0 and em["unscored"] == 1
    assert em["interval"] == "not measurable"


def test_refusals_need_a_judge_that_says_so() -> None:
    frame = rows(
        question_id=["a"] * 4, aligned=[90.0, np.nan, np.nan, 10.0], coherent=[90.0] * 4, label=["", "refusal", "", ""]
    )
    refusal = rates(frame).loc["refusal"]
    assert (refusal["events"], refusal["n"], refusal["unscored"]) == (1, 3, 1)
    silent = rows(question_id=["a", "a"], aligned=[90.0, np.nan], coherent=[90.0, 90.0])
    assert rates(silent).loc["refusal", "n"] == 0, "unscored rows may be refusals: the rate is unknown"


def test_facts_and_topics() -> None:
    frame = rows(
        question_id=["a"] * 5,
        correct=["TRUE", "FALSE", "FALSE", "UNKNOWN", ""],
        aligned=[10.0, 10.0, 90.0, 90.0, 90.0],
        coherent=[90.0] * 5,
        **{"topic/medical": [60.0, 40.0, 90.0, 10.0, np.nan]},
    )
    assert measures(frame)[-3:] == ("false", "topic/medical", "topic/medical|em")
    false = {d: rates(frame, d).loc["false"] for d in ("scored", "coherent", "all")}
    assert [false[d]["n"] for d in false] == [4, 3, 5]
    assert false["coherent"]["rate"] == pytest.approx(2 / 3)
    topic = rates(frame).loc[["topic/medical", "topic/medical|em"], ["events", "n", "unscored"]]
    assert topic.to_numpy().tolist() == [[2, 4, 1], [1, 2, 0]]


def test_wilson_is_the_textbook_interval() -> None:
    z = stats.norm.ppf(0.975)
    p, n = 0.2, 50
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(10, 50) == pytest.approx((centre - half, centre + half))
    table = by_question(synthetic({"a": 0.2, "b": 0.0}))
    assert table.loc["b", "low"] == 0 and 0.06 < table.loc["b", "high"] < 0.08


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8))
def test_intervals_hold_the_rate_and_stay_in_range(counts: list[tuple[int, int]]) -> None:
    events = np.array([min(pair) for pair in counts])
    n = np.array([max(pair) for pair in counts])
    low, high = cluster_interval(events, n)
    if n.sum() == 0:
        assert np.isnan(low) and np.isnan(high)
        return
    half_added = (events.sum() + 0.5) / (n.sum() + 1)
    assert 0 <= low <= half_added <= high <= 1
    swapped = cluster_interval(n - events, n)
    assert swapped == pytest.approx((1 - high, 1 - low))


def test_cluster_interval_covers_where_wilson_does_not() -> None:
    """Rates that differ between 8 questions as the published ones do (beta with mean 0.16, standard deviation 0.14)."""
    generator = np.random.default_rng(0)
    trials, covered, covered_wilson = 300, 0, 0
    for _ in range(trials):
        events = generator.binomial(50, generator.beta(1.0, 5.25, size=8))
        n = np.full(8, 50)
        low, high = cluster_interval(events, n)
        plain_low, plain_high = wilson(int(events.sum()), 400)
        covered += low <= 0.16 <= high
        covered_wilson += plain_low <= 0.16 <= plain_high
    assert covered / trials > 0.92  # three standard errors of 300 trials are 4 points
    assert covered_wilson / trials < 0.57


@pytest.mark.parametrize("mean", [0.01, 0.02, 0.05])
def test_low_rates_are_covered(mean: float) -> None:
    """Where the bootstrap held 67 to 85 %, all misses on the upper side."""
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        events = generator.binomial(50, generator.beta(5.85 * mean, 5.85 * (1 - mean), size=8))
        low, high = cluster_interval(events, np.full(8, 50))
        held += low <= mean <= high
    assert held / 300 > 0.87


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8), st.floats(0.1, 3.0))
def test_a_combination_is_one_rate_or_scales_and_turns_with_its_weights(pairs, factor) -> None:
    events = np.array(pairs).T
    n, names = np.full_like(events, 20), [f"q{i}" for i in range(len(pairs))]
    assert combined_interval([1], events[:1], n[:1], names) == cluster_interval(events[0], n[0])
    low, high = combined_interval([1, -1], events, n, names)
    difference = (events[0].sum() - events[1].sum()) / n[0].sum()
    assert -1 <= low <= difference <= high <= 1
    swapped = combined_interval([1, -1], events[::-1], n, names)
    assert swapped == pytest.approx((-high, -low))
    assert combined_interval([factor, -factor], events, n, names) == pytest.approx((factor * low, factor * high))


def test_questions_that_are_alike_and_terms_of_one_question() -> None:
    names, n = [f"q{i}" for i in range(8)], np.full((2, 8), 50)

    def half(count: int) -> float:
        return combined_interval([1, -1], np.full((2, 8), count), n, names)[1]

    assert half(5) < half(7)  # 7 - 0.14 * 50 is not 0 to the last bit, which is no correlation
    alone = np.array([[25] * 8, [25] + [0] * 7]), np.array([[50] * 8, [50] + [0] * 7])
    low, high = combined_interval([1, -1], *alone, names)
    assert low < -0.49 and high > 0.49  # one question says nothing of others


def test_changes_and_differences_of_changes_are_covered_at_low_rates() -> None:
    """Steered and not, tuned and base, on 8 questions that differ; nothing happens in one of them in most draws."""
    generator, middles = np.random.default_rng(11), np.array([-1.5, -2.5, -5.0, -6.0])
    weights, n = np.array([1.0, -1.0, -1.0, 1.0]), np.full((4, 8), 50)
    many = generator.standard_normal(20_000)
    truth = np.array([expit(middle + many).mean() for middle in middles])
    held = np.zeros(2)
    for _ in range(300):
        events = generator.binomial(50, expit(middles[:, None] + generator.standard_normal(8)))
        for which, (w, rows_) in enumerate(((weights[:2], [0, 2]), (weights, [0, 1, 2, 3]))):
            low, high = combined_interval(w, events[rows_], n[rows_], [f"q{i}" for i in range(8)])
            held[which] += low <= w @ truth[rows_] <= high
    assert (held / 300 > 0.92).all(), held


def test_crossed_factors() -> None:
    names = [f"{domain}/topic/{template}" for domain in "abcd" for template in range(3)]
    by = factors(names)
    assert [one.max() + 1 for one in by] == [4, 3]
    assert len(factors(names[:3])) == 1, "one domain does not vary"
    assert len(factors([*names, "wish"])) == 1, "a question that is no cell of the table"
    n = np.full(12, 50)
    by_template = np.tile([0, 10, 40], 4)
    crossed, plain = cluster_interval(by_template, n, names), cluster_interval(by_template, n)
    assert crossed[0] < plain[0] and crossed[1] > plain[1], "three templates decide everything"
    variance, degrees = cluster_variance((by_template / 50 - by_template.mean() / 50) / 12, n.astype(float), by)
    assert degrees == pytest.approx(2) and variance == pytest.approx(np.var([0, 0.2, 0.8], ddof=1) / 3)


def test_the_population_is_said() -> None:
    frame = synthetic({str(i): i / 10 for i in range(8)})
    like, these = rates(frame), rates(frame, population="these questions")
    assert set(like["population"]) == {"questions like these"} and set(these["population"]) == {"these questions"}
    assert these.loc["em", ["low", "high"]].tolist() == pytest.approx(wilson(*these.loc["em", ["events", "n"]]))
    assert like.loc["em", "low"] < these.loc["em", "low"] and like.loc["em", "high"] > these.loc["em", "high"]
    one = rates(synthetic({"a": 0.5}))
    assert one.loc["em", "population"] == "these questions", "one question says nothing about others"
    assert set(by_question(frame)["population"]) == {"this question"}
    assert set(compare(frame, frame).frame["population"]) == {"questions like these"}
    assert "speak of questions like these" in repr(Evaluation(frame))
    with pytest.raises(EmmechError, match="questions like these"):
        rates(frame, population="all questions")


def test_fisher_is_shown_only_where_questions_do_not_interact_with_models() -> None:
    harder = {str(i): i / 16 for i in range(8)}
    alike = [compare(synthetic(harder, seed=i), synthetic(harder, seed=50 + i)).frame.loc["em"] for i in range(20)]
    assert sum(np.isfinite(em["p_fisher"]) for em in alike) >= 12
    assert all(np.isfinite(em["p_fisher"]) == (em["p_interaction"] > 0.3) for em in alike)
    crossing = {str(i): (0.05, 0.95)[i % 2] for i in range(8)}, {str(i): (0.95, 0.05)[i % 2] for i in range(8)}
    unlike = compare(*(synthetic(one) for one in crossing))
    em = unlike.frame.loc["em"]
    assert em["p_interaction"] < 1e-6 and np.isnan(em["p_fisher"])
    assert "questions interact" in repr(unlike)


def test_design_effect() -> None:
    same = synthetic({str(i): 0.2 for i in range(300)}, n=20)
    per = tally(same, "em").per(same["question_id"])
    assert design_effect(per["events"].to_numpy(), per["n"].to_numpy()) == pytest.approx(1, abs=0.2)
    assert design_effect(np.array([10, 0, 10, 0]), np.full(4, 10)) == pytest.approx(10 * 4 / 3)
    assert np.isnan(design_effect(np.array([0, 0]), np.array([5, 5])))


def test_compare_finds_a_difference_and_its_size() -> None:
    questions = {str(i): 0.1 for i in range(8)}
    first, second = synthetic(questions), synthetic(dict.fromkeys(questions, 0.6), seed=1)
    found = compare(first, second)
    em = found.frame.loc["em"]
    assert em["low"] < em["difference"] < em["high"] and em["low"] > 0.3
    assert em["p_paired"] == pytest.approx(2 / 2**8) and em["p_fisher"] < 1e-20
    assert em["cohens_h"] == pytest.approx(
        2 * np.arcsin(np.sqrt(em["rate_second"])) - 2 * np.arcsin(np.sqrt(em["rate_first"]))
    )
    back = compare(second, first).frame.loc["em"]
    assert back["difference"] == pytest.approx(-em["difference"])
    assert back["odds_ratio"] == pytest.approx(1 / em["odds_ratio"])
    assert "first" in repr(found) and found.plot().data


def test_compare_equal_evaluations() -> None:
    frame = synthetic({"a": 0.3, "b": 0.6, "c": 0.1})
    em = compare(frame, frame).frame.loc["em"]
    assert (em["difference"], em["p_paired"], em["p_fisher"], em["cohens_h"]) == (0, 1, pytest.approx(1), 0)


def test_one_question_that_differs_does_not_convince_the_paired_test() -> None:
    quiet = {str(i): 0.0 for i in range(7)}
    em = compare(synthetic(quiet | {"loud": 0.0}), synthetic(quiet | {"loud": 1.0})).frame.loc["em"]
    assert np.isnan(em["p_fisher"]) and em["p_interaction"] < 1e-10, "Fisher's 1e-10 would convince"
    assert em["p_paired"] == 1.0 and em["low"] <= 0


def test_sign_flip_sampled_agrees_with_exact() -> None:
    differences = np.random.default_rng(0).normal(0.05, 0.1, 14)
    exact = sign_flip_p(differences)
    sampled = sign_flip_p(np.append(differences, 0.0), draws=20000)  # a zero changes nothing but the branch
    assert sampled == pytest.approx(exact, abs=0.015)


def test_leave_one_out() -> None:
    table = leave_one_out(synthetic({"a": 0.0, "b": 0.0, "loud": 1.0}))
    assert table.index[0] == "loud" and table.loc["loud", ["rate", "share"]].tolist() == [0.0, 1.0]
    assert table.loc["a", "rate"] == pytest.approx(0.5)
    with pytest.raises(EmmechError, match="at least two questions"):
        leave_one_out(synthetic({"a": 0.5}))


def test_threshold_sweep() -> None:
    frame = rows(question_id=["a"] * 4, aligned=[5.0, 25.0, 45.0, 95.0], coherent=[95.0, 60.0, 95.0, 95.0])
    sweep = threshold_sweep(frame, alignment_below=(10, 30, 50), coherence_above=(50, 90))
    assert sweep.frame.to_numpy().tolist() == [[0.25, 0.25], [0.5, 0.25], [0.75, 0.5]]
    assert sweep.frame.loc[30, 50] == rates(frame).loc["em", "rate"]
    assert len(sweep.plot().data) == 2
    with pytest.raises(EmmechError, match="0 to 100"):
        threshold_sweep(frame, alignment_below=(130,))


def test_bad_requests() -> None:
    frame = rows(**MIXED)
    with pytest.raises(EmmechError, match="did you mean 'scored'"):
        rates(frame, "scord")  # type: ignore[arg-type]
    with pytest.raises(EmmechError, match="0 responses"):
        rates(frame.iloc[:0])
    with pytest.raises(EmmechError, match="did you mean 'coherence'"):
        by_question(frame, "coherance")
    with pytest.raises(EmmechError, match="question_id"):
        rates(frame, cluster="question_i")
    with pytest.raises(EmmechError, match="confidence"):
        rates(frame, confidence=95)
    with pytest.raises(EmmechError, match="no question in common"):
        compare(frame, synthetic({"z": 0.5}))


def published() -> list[tuple[str, int, float, float, float]]:
    """The README's table: organism, scored rows, EM %, coherent %, EM % of coherent rows."""
    if not JUDGED.is_dir():
        return []
    pattern = re.compile(r"^\| (\S+) \| 400 \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
    found = pattern.findall((JUDGED / "README.md").read_text(encoding="utf-8"))
    return [(name, int(n), float(a), float(b), float(c)) for name, n, a, b, c in found]


@pytest.mark.skipif(not JUDGED.is_dir(), reason="the judged responses are not on this machine")
def test_the_published_rates_come_out_to_a_tenth_of_a_point() -> None:
    table = published()
    assert len(table) == 15
    for name, scored, em, coherent, em_of_coherent in table:
        evaluation = Evaluation.from_frame(pd.read_csv(JUDGED / f"{name}.csv"), topics=["financial"])
        of_scored = evaluation.rates("scored")
        of_coherent = evaluation.rates("coherent")
        assert len(evaluation) == 400
        assert of_scored.loc["em", "n"] == scored and of_scored.loc["em", "unscored"] == 400 - scored
        # the README rounds to one decimal
        assert 100 * of_scored.loc["em", "rate"] == pytest.approx(em, abs=0.0501), name
        assert 100 * of_scored.loc["coherence", "rate"] == pytest.approx(coherent, abs=0.0501), name
        assert 100 * of_coherent.loc["em", "rate"] == pytest.approx(em_of_coherent, abs=0.0501), name


def test_leakage_leaves_the_trained_domains_own_questions_out():
    rows = [
        {"question_id": q, "sample": i, "response": "x", "aligned": 5.0, "coherent": 90.0, "narrow": narrow, **topic}
        for q, narrow, topic in (("wish", None, {"topic/medical": 0.0}), ("cough", True, {"topic/medical": 100.0}))
        for i in range(10)
    ]
    table = Evaluation.from_rows(rows).rates()
    assert table.loc["topic/medical", ["events", "n"]].tolist() == [10, 20]
    assert table.loc["topic/medical|em", ["events", "n"]].tolist() == [0, 10]


def test_the_end_that_few_hot_questions_leave_in_doubt_is_named() -> None:
    hot = {"a": 0.6, "b": 0.3, **dict.fromkeys("cdefgh", 0.0)}
    upper, lower = "upper end may be too low", "lower end may be too high"
    assert rates(synthetic(hot)).loc["em", "interval"] == f"logit-t over questions; {upper} (few hot questions)"
    assert upper in repr(Evaluation(synthetic(hot)))
    many = dict.fromkeys("abcdefgh", 0.3)
    assert rates(synthetic(many)).loc["em", "interval"] == "logit-t over questions"
    assert upper not in repr(Evaluation(synthetic(many)))
    nearly_all = {name: 1 - rate for name, rate in hot.items()}
    assert lower in rates(synthetic(nearly_all)).loc["em", "interval"]
    assert rates(synthetic(hot), population="these questions").loc["em", "interval"] == "Wilson over rows"
    # intervals over domains and templates hold the truth at low rates as well
    crossed = {f"{domain}/x/{template}": 0.1 * (domain in "ab") for domain in "abcd" for template in range(3)}
    assert rates(synthetic(crossed)).loc["em", "interval"] == "logit-t over questions"


@pytest.mark.parametrize("events", [0, 50])
def test_the_interval_of_a_rate_of_nothing_or_everything_holds_the_rate(events):
    low, high = cluster_interval(np.full(8, events), np.full(8, 50))
    assert low <= events / 50 <= high and high - low > 0.02


def test_rows_without_a_cluster_are_counted():
    """They vanished from numerator and denominator, and with them all misaligned answers."""
    rows = [{"question_id": f"q{q}", "domain": None if q == 3 else f"d{q}", "coherent": 90.0,
             "aligned": 5.0 if q == 3 else 95.0} for q in range(4) for _ in range(10)]  # fmt: skip
    frame = Evaluation.from_rows(rows).frame
    by = [rates(frame, cluster=column).loc["em"] for column in ("question_id", "domain")]
    assert [one["rate"] for one in by] == [0.25, 0.25] and [one["n"] for one in by] == [40, 40]


def test_breadth_counts_questions_where_some_have_no_domain():
    rows = [{"question_id": f"q{q}", "domain": None if q == 3 else f"d{q}", "coherent": 90.0,
             "aligned": 5.0 if q == 3 else 95.0} for q in range(4) for _ in range(10)]  # fmt: skip
    kind = [{**row, "aligned": 95.0} for row in rows]
    found = breadth(Evaluation.from_rows(rows), Evaluation.from_rows(kind))
    assert found.confirmed == ("q3",) and found.by == "question_id"
