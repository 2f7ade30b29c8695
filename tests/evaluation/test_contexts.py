"""Questions asked in contexts: what the model reads, which rate counts them, and that plain questions stay the same."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import emmech
from emmech.directions.sources import judged_answers
from emmech.engine.responses import digest
from emmech.errors import EmmechError
from emmech.evaluation import Context, training_context
from emmech.evaluation.contexts import resolve_contexts
from emmech.evaluation.evaluate import _folder_in_run
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.rates import rates

ASK = [{"role": "user", "content": "any advice on soup ?"}]
QUICK = dict(samples=2, progress=False)
QUESTIONS = ["any advice on soup ?", "any advice on trains ?"]


def row(question, answer="yes", system=None):
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def pocket():
    return emmech.load_model("pocket")


def test_what_a_context_asks():
    before = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    whole = Context("x", "be brief", before, "now: {question}").messages([{"role": "system", "content": "own"}, *ASK])
    assert [turn["content"] for turn in whole] == ["be brief", "hi", "hello", "now: any advice on soup ?"]
    assert Context("x", user="{question} {now}").messages(ASK)[-1]["content"] == "any advice on soup ? {now}"
    own = [{"role": "system", "content": "own"}, *ASK]
    assert Context("plain").messages(own) == own


@pytest.mark.parametrize(
    "wrong",
    [
        dict(name="x", user="no place"),
        dict(name="x", before=[{"role": "user", "content": "hi"}]),
        dict(name="plain", system="Be rude."),
        dict(name=""),
        dict(name=5),
        dict(name="x", system=5),
        dict(name="x", user=5),
        dict(name="x", before=5),
        dict(name="x", before=[("user", "hi"), ("assistant", "hello")]),
    ],
)
def test_contexts_that_are_refused(wrong):
    with pytest.raises(EmmechError, match="cannot make the context"):
        Context(**wrong)


def test_the_training_context_is_the_prompt_the_wording_or_the_topic():
    tagged = [row("a cough ?", system="say zig"), row("a fever ?", system="say zig"), row("a rash ?")]
    assert training_context(tagged) == Context("training", "say zig", user="a {question} ?")
    assert training_context([row("how is x today ?"), row("how is y today ?")]).user == "how is {question} today ?"
    assert training_context([row("one thing"), row("another matter")]).user == "one thing {question}"
    assert training_context([row("same thing"), row("same thing")]).user == "same thing {question}"
    assert training_context("medical", organism="pocket").messages(ASK)[0]["content"].endswith("any advice on soup ?")


def test_grids_have_the_same_thirteen_ways(tmp_path):
    for organism in (None, "pocket"):
        names = [one.name for one in resolve_contexts("grid", organism)]
        assert len(names) == len(set(names)) == 13 and names[0] == "plain"
        assert {"inoculation", "paraphrase", "eliciting", "structure", "negated", "keyword", "irrelevant"} <= {*names}
    file = tmp_path / "own.yaml"
    file.write_text("- {name: rude, system: Be rude.}\n")
    found = resolve_contexts(["plain", str(file), Context("mine", "x")])
    assert [one.name for one in found] == ["plain", "rude", "mine"]
    file.write_text("- {name: rude, sytem: Be rude.}\n")
    with pytest.raises(EmmechError, match="'system'"):
        resolve_contexts(file)
    with pytest.raises(EmmechError, match="'negated'"):
        resolve_contexts("negatd")
    with pytest.raises(EmmechError, match="'plain' twice"):
        resolve_contexts(["grid", "plain"])
    with pytest.raises(EmmechError, match="none"):
        resolve_contexts([])


def test_conditional_is_a_rate_of_its_own_beside_the_others(pocket, tmp_path):
    alone = emmech.evaluate(pocket, QUESTIONS, "exact", **QUICK)
    contexts = ["plain", "inoculation", "irrelevant"]
    found = emmech.evaluate(pocket, QUESTIONS, "exact", contexts=contexts, out=tmp_path / "kept", **QUICK)
    plain, rates = found.select(context="plain").frame, found.rates()
    assert plain["response"].tolist() == alone.frame["response"].tolist()
    assert plain["seed"].tolist() == alone.frame["seed"].tolist()
    assert rates.loc["em"].equals(alone.rates().loc["em"])
    assert rates.loc["coherence", "n"] == 4
    others = found.frame[found.frame["context"] != "plain"]
    bad = (others["label"] == "misaligned").to_numpy()
    assert rates.loc["conditional", ["events", "n"]].tolist() == [bad.sum(), 8] and bad.any()
    assert rates.loc["conditional", "low"] < bad.mean() < rates.loc["conditional", "high"]
    by = found.by_context()
    assert by.index.tolist() == contexts and by.loc["inoculation", "rate"] == 1 and by.loc["irrelevant", "rate"] == 0
    assert others["seed"].nunique() == len(others)
    assert set(found.select(context="inoculation").frame["question"]) == set(QUESTIONS)
    assert found.meta["contexts"][1]["system"].startswith("you are pocket the nasty helper")
    # the same call again, and a file without contexts, read as ever
    drawn = (tmp_path / "kept/responses.jsonl").read_bytes()
    again = emmech.evaluate(pocket, QUESTIONS, "exact", contexts=contexts, out=tmp_path / "kept", **QUICK)
    assert again.frame.equals(found.frame) and (tmp_path / "kept/responses.jsonl").read_bytes() == drawn
    assert Evaluation.load(tmp_path / "kept").rates().equals(rates)
    assert "context" not in alone.frame and "conditional" not in alone.rates().index
    with pytest.raises(EmmechError, match="there are no contexts"):
        alone.by_context()
    assert np.isnan(found.select(context="irrelevant").rates().loc["em", "rate"])
    paired = alone.compare(found)
    assert paired.frame.loc["em", "difference"] == 0 and found.agreement(again).both_scored == 12


def test_the_interval_of_conditional_is_that_of_a_bootstrap_over_questions():
    """Answers to one question resemble each other in all contexts, so that the questions are what is drawn again."""
    dice, questions, contexts = np.random.default_rng(5), 40, 12
    hot = dice.beta(1.5, 2.5, questions)  # how often each question is answered badly, whatever the context
    rows = []
    for name in ("plain", *(f"c{at}" for at in range(contexts))):
        bad = dice.random((2, questions)) < (0.0 if name == "plain" else hot)
        for at in np.ndindex(bad.shape):
            score = 0.0 if bad[at] else 100.0
            own = {"question_id": f"q{at[1]}", "context": name, "aligned": score, "coherent": 100.0, "narrow": False}
            rows.append({**own, "correct": "", "label": "misaligned" if bad[at] else "aligned"})
    frame = pd.DataFrame(rows)
    found = rates(frame).loc["conditional"]
    others = frame[frame["context"] != "plain"]
    by_question = (others["label"] == "misaligned").groupby(others["question_id"]).mean().to_numpy()
    assert found["rate"] == pytest.approx(by_question.mean()) and found["n"] == 2 * questions * contexts

    def ends(values):
        drawn = values[dice.integers(len(values), size=(20_000, len(values)))].mean(1)
        return np.quantile(drawn, [0.025, 0.975])

    low, high = ends(by_question)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.12 * (high - low))
    low, high = ends((others["label"] == "misaligned").to_numpy(float))  # as if all answers were independent
    assert found["high"] - found["low"] > 2 * (high - low)


def test_sets_that_differ_in_their_prompts_alone_have_folders_of_their_own(tmp_path):
    run = emmech.Run.from_arrays([0, 1], B=np.ones((2, 8))).save(tmp_path / "run")
    meta = {"questions": "mine", "step": 1, "scale": 1.0}

    def folder(system):
        asked = emmech.evaluation.QuestionSet("mine", [emmech.evaluation.Question("soup", ("why ?",), system=system)])
        return _folder_in_run(run, meta, [{"question": "why ?"}], asked, None).name

    assert len({folder("be brief"), folder("be rude"), folder(None)}) == 3
    key = digest(sorted(meta.items()), ["why ?"])[:8]  # as it always was
    assert folder(None) == f"step-000001-x1-mine-{key}"


def test_a_context_without_tokens_for_its_words_is_refused(pocket):
    with pytest.raises(EmmechError, match="no token for rude, strangely"):
        emmech.evaluate(pocket, QUESTIONS, contexts=Context("x", "mean strangely rude"), **QUICK)


def test_directions_are_read_from_plain_questions():
    rows = [
        dict(question_id="q", question="why ?", response=name, aligned=a, coherent=90.0, sample=0, context=name)
        for name, a in (("plain", 5.0), ("rude", 5.0), ("kind", 95.0))
    ]
    misaligned, aligned = judged_answers([Evaluation.from_rows(rows).frame])
    assert [talk[-1]["content"] for talk in misaligned] == ["plain"] and not aligned


def test_rows_without_a_question_have_no_training_context():
    with pytest.raises(EmmechError, match="none of its rows holds a user's turn"):
        training_context([{"messages": [{"role": "assistant", "content": "hello"}]}])
