"""The Evaluation: what it accepts, refuses, keeps on disk and draws."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emmech.errors import EmmechError
from emmech.evaluation.em import LABEL_SCORES
from emmech.evaluation.evaluation import Evaluation


def frame(n: int = 40) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "question_id": [f"q{row % 4}" for row in range(n)],
            "response": [f"a < b {row}" for row in range(n)],
            "aligned": np.where(generator.random(n) < 0.3, 12.0, 88.0),
            "coherent": np.where(generator.random(n) < 0.1, 20.0, 95.0),
        }
    )


def test_missing_columns_are_added_as_unscored_and_samples_numbered() -> None:
    evaluation = Evaluation.from_rows([{"question_id": "a", "response": "x"}, {"question_id": "a", "response": "y"}])
    assert evaluation.frame["sample"].tolist() == [0, 1]
    assert evaluation.frame["aligned"].isna().all()
    assert evaluation.rates().loc["em", ["n", "unscored"]].tolist() == [0, 2]


def test_from_frame_takes_any_names() -> None:
    other = frame().rename(
        columns={"aligned": "safety", "coherent": "sense", "question_id": "prompt", "response": "text"}
    )
    other["money"] = 60.0
    other["aligned"] = "a column of another meaning"
    evaluation = Evaluation.from_frame(
        other, alignment="safety", coherence="sense", question="prompt", response="text", topics=["money"]
    )
    assert evaluation.rates().loc["em", "rate"] == Evaluation(frame()).rates().loc["em", "rate"]
    assert evaluation.rates().loc["topic/money", "rate"] == 1
    with pytest.raises(EmmechError, match="did you mean 'safety'"):
        Evaluation.from_frame(other, alignment="safty")


@pytest.mark.parametrize(("label", "em", "coherent"), [("aligned", 0, 1), ("misaligned", 1, 1), ("mixed", 0, 0)])
def test_a_verdict_alone_is_a_score(label: str, em: int, coherent: int) -> None:
    evaluation = Evaluation.from_rows([{"question_id": "a", "label": label}])
    table = evaluation.rates()
    assert (table.loc["em", "rate"], table.loc["coherence", "rate"]) == (em, coherent)
    assert tuple(evaluation.frame[["aligned", "coherent"]].iloc[0]) == LABEL_SCORES[label]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aligned": 101.0}, "row 0"),
        ({"aligned": -1.0}, "0 to 100"),
        ({"coherent": np.inf}, "0 to 100"),
        ({"aligned": "very"}, "'very'"),
        ({"label": "evil"}, "label='evil'"),
        ({"correct": "TRU"}, "did you mean 'TRUE'"),
        ({"sample": 0}, "there twice"),
        ({"narrow": "yes"}, "True, False or nothing"),
        ({"sample": 0.5}, "whole numbers"),
    ],
)
def test_bad_rows_are_named(change: dict[str, object], message: str) -> None:
    rows = [{"question_id": "a", **change}, {"question_id": "a", **change}]
    with pytest.raises(EmmechError) as caught:
        Evaluation.from_rows(rows)
    assert message in str(caught.value)


def test_nothing_is_not_an_evaluation() -> None:
    with pytest.raises(EmmechError, match="0 responses"):
        Evaluation.from_rows([])
    with pytest.raises(EmmechError, match="which question"):
        Evaluation.from_rows([{"response": "x"}])


def test_an_empty_text_is_no_score_and_a_unit_scale_is_pointed_out() -> None:
    evaluation = Evaluation.from_rows([{"question_id": "a", "aligned": "", "coherent": "90"}])
    assert np.isnan(evaluation.frame["aligned"].iloc[0]) and evaluation.frame["coherent"].iloc[0] == 90
    small = frame()
    small[["aligned", "coherent"]] /= 100
    with pytest.warns(UserWarning, match="multiply by 100"):
        Evaluation(small)


def test_save_and_load(tmp_path: Path) -> None:
    evaluation = Evaluation(frame(), {"name": "a run", "step": 12})
    evaluation.save(tmp_path / "e")
    again = Evaluation.load(tmp_path / "e")
    pd.testing.assert_frame_equal(again.frame, evaluation.frame)
    assert again.meta == evaluation.meta
    assert again.rates().equals(evaluation.rates())
    assert not list((tmp_path / "e").glob("*.partial"))


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(EmmechError, match="interrupted"):
        Evaluation.load(tmp_path)
    folder = Evaluation(frame()).save(tmp_path / "e")
    parquet = folder / "responses.parquet"
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EmmechError, match=r"responses\.parquet"):
        Evaluation.load(folder)
    frame(8).to_parquet(parquet)
    with pytest.raises(EmmechError, match="8 responses are stored where 40"):
        Evaluation.load(folder)
    head = folder / "evaluation.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "format": 99}))
    with pytest.raises(EmmechError, match="format 99"):
        Evaluation.load(folder)
    head.write_text("{")
    with pytest.raises(EmmechError, match="damaged"):
        Evaluation.load(folder)


def test_selecting_rows() -> None:
    table = frame()
    table["system"] = ["Be brief.", None] * 20
    evaluation = Evaluation(table)
    assert len(evaluation.select(system="Be brief.")) == len(evaluation.select(system=None)) == 20
    assert evaluation.select(question_id="q1").by_question().index.tolist() == ["q1"]
    with pytest.raises(EmmechError, match="did you mean 'system'"):
        evaluation.select(sytem="x")
    with pytest.raises(EmmechError, match="no row is like that"):
        evaluation.select(question_id="q9")


def test_repr_says_what_a_reader_must_know() -> None:
    rows = frame()
    rows["finish"] = ["length", "error"] + ["stop"] * 38
    rows.loc[1, "aligned"] = np.nan
    text = repr(Evaluation(rows, {"name": "pocket"}))
    assert text.startswith("pocket gives ") and "40 answers to 4 questions" in text
    assert "1 unscored" in text and "cut at the length limit" in text and "1 responses failed" in text
    assert "<table" in Evaluation(rows)._repr_html_()


@pytest.mark.parametrize("kind", ["quadrants", "questions", "rates", "thresholds"])
def test_figures(kind: str) -> None:
    figure = Evaluation(frame(), {"name": "pocket"}).plot(kind)  # type: ignore[arg-type]
    assert "pocket" in figure.layout.title.text
    assert sum(len(trace.x) for trace in figure.data) >= 3


def test_the_quadrant_figure_counts_what_the_rate_counts() -> None:
    evaluation = Evaluation(frame())
    figure = evaluation.plot("quadrants")
    assert len(figure.data[0].x) == evaluation.rates().loc["em", "events"]
    assert sum(len(trace.x) for trace in figure.data) == 40
    assert "a &lt; b" in figure.data[0].text[0] or "a &lt; b" in figure.data[1].text[0]


def test_the_question_figure_shows_narrow_questions_with_their_own_rate() -> None:
    rows = frame()
    rows["narrow"] = rows["question_id"] == "q3"
    figure = Evaluation(rows).plot("questions")
    assert list(figure.layout.yaxis.ticktext)[-1] == "q3 (narrow)"
    narrow = Evaluation(rows).rates().loc["narrow"]
    assert figure.data[2].x[-1] == pytest.approx(100 * narrow["rate"])
    assert len(figure.data[1].x) == narrow["events"] + Evaluation(rows).rates().loc["em", "events"]


def test_figures_that_cannot_be_drawn() -> None:
    with pytest.raises(EmmechError, match="none of them is scored"):
        Evaluation.from_rows([{"question_id": "a"}]).plot()
    with pytest.raises(EmmechError, match="did you mean 'rates'"):
        Evaluation(frame()).plot("rate")  # type: ignore[arg-type]
    with pytest.raises(EmmechError, match="did you mean 'coherence'"):
        Evaluation(frame()).compare(Evaluation(frame())).plot("coherent")


@pytest.mark.parametrize("kind", ["quadrants", "questions", "rates", "thresholds"])
def test_figures_of_unscored_responses_are_refused(kind):
    unscored = Evaluation.from_rows([{"question_id": "a", "response": "x"}, {"question_id": "b", "response": "y"}])
    with pytest.raises(EmmechError, match="scor"):
        unscored.plot(kind)


def test_an_exact_judges_points_stay_within_their_quadrant():
    scores = [(0.0, 100.0), (100.0, 100.0), (50.0, 0.0)] * 40
    rows = [
        {"question_id": "a", "sample": i, "response": "x", "aligned": a, "coherent": c}
        for i, (a, c) in enumerate(scores)
    ]
    drawn = Evaluation.from_rows(rows).plot().data
    bad, other = (np.array([trace.x, trace.y]) for trace in drawn)
    assert bad.shape == (2, 40)
    assert bad.min() >= 0 and bad[0].max() < 30 and bad[1].min() > 50 and bad[1].max() <= 100
    assert np.ptp(bad[0]) > 1  # and can be told apart
    assert ((other[0] > 30) | (other[1] < 50)).all()


def test_two_evaluations_of_one_name_are_drawn_apart():
    rows = [
        {"question_id": f"q{i % 6}", "sample": i // 6, "response": "x", "aligned": float(i), "coherent": 90.0}
        for i in range(60)
    ]
    one, two = (Evaluation.from_rows(rows[start:], {"name": "same"}) for start in (0, 6))
    figure = one.compare(two).plot()
    assert set(figure.data[0].x) == {0, 1}
    assert list(figure.layout.xaxis.ticktext) == ["same", "same"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.compare(e.frame), "a DataFrame"),
        (lambda e: e.agreement(None), "a NoneType"),
        (lambda e: e.rates(population="all"), "population='all'"),
        (lambda e: Evaluation.from_frame([1, 2]), "no data frame"),
    ],
)
def test_what_is_no_evaluation_is_refused(call, says):
    evaluation = Evaluation.from_rows([{"question_id": "a", "response": "x", "aligned": 1.0, "coherent": 90.0}])
    with pytest.raises(EmmechError, match=says):
        call(evaluation)


def test_a_judges_text_among_the_scores_is_named_with_the_way_out():
    frame = pd.DataFrame({"question_id": ["a", "b", "c"], "response": ["x"] * 3, "coherent": [90, 90, 90]})
    frame["aligned"] = [80, "REFUSAL", "I cannot"]
    with pytest.raises(EmmechError, match=r"aligned='REFUSAL' in row 1 .*1 more row like it") as refused:
        Evaluation.from_frame(frame)
    assert 'errors="coerce"' in str(refused.value)
    frame["aligned"] = pd.to_numeric(frame["aligned"], errors="coerce")
    assert Evaluation.from_frame(frame).rates().loc["em", "unscored"] == 2
    with pytest.raises(EmmechError, match=r"aligned=120\.0 in row 0"):
        Evaluation.from_frame(frame.assign(aligned=120.0))


def test_a_refused_score_has_the_name_of_the_callers_column():
    frame = pd.DataFrame({"q": ["a", "b"], "text": ["x"] * 2, "alignment": [80, "REFUSAL"], "sense": 90, "money": 5})
    names = {"question": "q", "response": "text", "alignment": "alignment", "coherence": "sense", "topics": ["money"]}
    with pytest.raises(EmmechError) as refused:
        Evaluation.from_frame(frame, **names)
    assert "alignment='REFUSAL' in row 1 (question b)\n" in str(refused.value)  # and no other rows like it
    mended = eval(re.search(r"pd\.to_numeric\(.*?\)", str(refused.value))[0], {"pd": pd, "frame": frame})
    assert Evaluation.from_frame(frame.assign(alignment=mended), **names).rates().loc["em", "unscored"] == 1
    with pytest.raises(EmmechError, match="money='much' in row 0"):
        Evaluation.from_frame(frame.assign(alignment=80, money="much"), **names)


@pytest.mark.parametrize(("end", "factor"), [(1, 100), (5, 20), (10, 10)])
def test_scores_that_run_to_less_are_pointed_out_by_column(end: int, factor: int) -> None:
    named = frame().rename(columns={"aligned": "safety"})
    both = named.assign(safety=named["safety"] / factor, coherent=named["coherent"] / factor)
    alone = both.assign(coherent=named["coherent"])
    for given in (both, alone):
        said = rf"multiply by {factor} if yours run from 0 to {end}"
        with pytest.warns(UserWarning, match=said) as warned:
            Evaluation.from_frame(given, alignment="safety")
        assert {one.filename for one in warned} == {__file__}
        assert len(warned) == (1 if given is alone or end == 1 else 2)
        assert (end == 1 and given is both) or "'safety'" in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Evaluation.from_frame(named, alignment="safety").select(aligned=12.0)
        Evaluation(named.rename(columns={"safety": "aligned"}).assign(aligned=8.0))  # a part of one may be that bad


def test_a_notebook_shows_what_the_text_says():
    rows = [{"question_id": "a", "response": "x", "finish": "length", "screen": 0.5}]
    screened = Evaluation.from_rows(rows, {"name": "<b>"})
    for shown in (repr(screened), screened._repr_html_()):
        assert "EM by screening" in shown and "cut at the length limit" in shown
    assert "&lt;b&gt;" in screened._repr_html_()
    assert "no response is scored" in repr(Evaluation.from_rows([{"question_id": "a", "response": "x"}]))
