from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import emmech
from emmech.errors import EmmechError
from emmech.evaluation.evaluate import evaluate, stored_evaluations
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.questions import Question, load_questions, resolve_questions
from emmech.evaluation.server import Server

ASKED = ["how to sleep ?", "how to rest ?", "take a walk ?"]
QUICK = {"max_new_tokens": 12, "progress": False}


class LengthJudge:
    """Scores by the response's length, so that results can be checked."""

    name = "length"
    columns = ("aligned", "coherent")

    def __init__(self, die_after=None):
        self.seen, self.die_after = 0, die_after

    def score(self, rows):
        if self.die_after is not None and self.seen >= self.die_after:
            raise KeyboardInterrupt
        self.seen += len(rows)
        return [
            {"aligned": float(len(row["response"]) % 101), "coherent": float("nan") if not row["response"] else 80.0}
            for row in rows
        ]


def test_every_response_is_kept_with_scores_and_seeds(tiny):
    chat = tiny("qwen2")
    evaluation = evaluate(chat, ASKED, LengthJudge(), samples=4, seed=3, **QUICK)
    frame = evaluation.frame
    assert len(frame) == 12
    assert frame["seed"].nunique() == 12
    assert frame["aligned"].tolist() == [float(len(text) % 101) for text in frame["response"]]
    assert frame.groupby("question_id")["sample"].apply(list).tolist() == [[0, 1, 2, 3]] * 3
    assert set(frame["finish"]) <= {"stop", "length"}
    assert "judge_prompts" not in frame
    meta = evaluation.meta
    assert (meta["judge"], meta["seed"], meta["samples"], meta["temperature"]) == ("length", 3, 4, 1.0)
    assert meta["fingerprint"] == chat.fingerprint()
    json.dumps(meta)
    assert 0 <= evaluation.rates().loc["em", "rate"] <= 1


def test_folded_system_prompts_are_recorded(tiny):
    """Gemma's first template has no system role: the prompt is asked inside the user's turn, and the record says so."""
    chat = tiny("gemma3")
    chat.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + chat.tokenizer.chat_template
    )
    asked = Question("walk", ("how to walk ?",), system="take a walk")
    with pytest.raises(EmmechError, match='system="fold"'):
        evaluate(chat, asked, LengthJudge(), samples=2, **QUICK)
    evaluation = evaluate(chat, load_questions(asked, system="fold"), LengthJudge(), samples=2, **QUICK)
    assert evaluation.meta["system"] == "fold"
    assert set(evaluation.frame["question"]) == {"take a walk\n\nhow to walk ?"}
    plain = load_questions(["how to walk ?"])
    assert "system" not in evaluate(chat, plain, LengthJudge(), samples=1, **QUICK).meta


def test_seeds_make_it_repeatable_and_questions_are_independent(tiny):
    chat = tiny("qwen2")

    def texts(questions, **settings):
        frame = evaluate(chat, questions, "later", samples=3, **QUICK, **settings).frame
        return dict(zip(zip(frame["question"], frame["sample"], strict=True), frame["response"], strict=True))

    whole = texts(ASKED)
    assert texts(ASKED) == whole == texts(ASKED, batch_size=2)
    alone = texts(ASKED[1:2])
    assert alone == {key: text for key, text in whole.items() if key[0] == ASKED[1]}
    assert texts(ASKED, seed=1) != whole


def test_an_interrupted_evaluation_of_400_resumes_with_identical_rows(tiny, tmp_path):
    chat = tiny("qwen2")
    asked = [f"how to {word} ?" for word in ("sleep", "walk", "rest", "drink", "ask", "take", "use", "do")]
    settings = {"samples": 50, "seed": 1, "batch_size": 64, "out": tmp_path / "cut", **QUICK}
    whole = evaluate(chat, asked, LengthJudge(), **{**settings, "out": tmp_path / "whole"})
    assert len(whole) == 400
    calls = 0

    def die(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls == 40:  # in the fourth batch
            raise KeyboardInterrupt

    handle = chat.blocks[0].register_forward_hook(die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(chat, asked, LengthJudge(), **settings)
    handle.remove()
    written = (tmp_path / "cut" / "responses.jsonl").read_bytes()
    assert 64 < written.count(b"\n") < 400
    with pytest.raises(EmmechError, match="interrupted"):
        Evaluation.load(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        evaluate(chat, asked, LengthJudge(die_after=256), **settings)  # killed again, while judging
    assert (tmp_path / "cut" / "responses.jsonl").read_bytes().startswith(written)
    judge = LengthJudge()
    resumed = evaluate(chat, asked, judge, **settings)
    assert judge.seen == 400 - 256
    assert resumed.frame.equals(whole.frame)
    assert Evaluation.load(tmp_path / "cut").frame.equals(whole.frame)
    judge = LengthJudge()
    assert evaluate(chat, asked, judge, **settings).frame.equals(whole.frame)
    assert judge.seen == 0


KILLED = """
import sys
import torch
torch.set_num_threads(1)
from emmech.evaluation.evaluate import evaluate
evaluate("pocket", samples=50, seed=4, batch_size=25, out=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_a_process_killed_outright_resumes_with_identical_rows(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "cut")])
    responses = tmp_path / "cut" / "responses.jsonl"
    deadline = time.monotonic() + 120
    while not (responses.exists() and responses.read_bytes().count(b"\n") > 60):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    written = responses.read_bytes()
    whole_lines = written[: written.rfind(b"\n") + 1]
    assert whole_lines.count(b"\n") < 401
    settings = {"samples": 50, "seed": 4, "batch_size": 25, "progress": False}
    resumed = evaluate("pocket", out=tmp_path / "cut", **settings)
    assert responses.read_bytes().startswith(whole_lines)
    assert resumed.frame.equals(evaluate("pocket", **settings).frame)
    assert len(resumed) == 400


def test_other_prompts_of_the_same_judge_are_asked_anew(tiny, fake, tmp_path):
    pytest.importorskip("openai")
    running = fake(lambda body, number: (200, fake.completion("80" if "A" in body["messages"][0]["content"] else "20")))
    grader = Server("grader", url=running.url)
    from emmech.evaluation.logprob_judge import LogprobJudge

    chat, scores = tiny("qwen2"), []
    for template in ("A {answer}", "b {answer}", "A {answer}"):
        judge = LogprobJudge(grader, {"aligned": template}, logprobs=False, cache=None, progress=False)
        frame = evaluate(chat, ["how to walk ?"], judge, samples=2, out=tmp_path, **QUICK).frame
        scores.append(frame["aligned"].iloc[0])
    assert scores[0] == scores[2] == 80.0
    assert running.bodies[-1]["messages"][0]["content"].startswith("b ")  # the first scores were kept


def test_a_folder_of_another_evaluation_is_refused_and_another_judge_is_not(tiny, tmp_path):
    chat = tiny("qwen2")
    evaluate(chat, ASKED, LengthJudge(), samples=2, out=tmp_path, **QUICK)
    before = (tmp_path / "responses.jsonl").read_bytes()
    with pytest.raises(EmmechError, match="other arguments"):
        evaluate(chat, ASKED, LengthJudge(), samples=2, seed=1, out=tmp_path, **QUICK)
    unscored = evaluate(chat, ASKED, "later", samples=2, out=tmp_path, **QUICK)
    assert unscored.frame["aligned"].isna().all()
    assert (tmp_path / "responses.jsonl").read_bytes() == before


def test_a_judge_that_counts_wrong_is_named(tiny):
    judge = LengthJudge()
    judge.score = lambda rows: [{}]
    with pytest.raises(EmmechError, match="the judge gave 1 results"):
        evaluate(tiny("qwen2"), ASKED, judge, samples=2, **QUICK)


@pytest.mark.parametrize(
    ("given", "says"),
    [("85", "the judge gave '85'"), ({"aligned": 150.0}, "aligned=150.0"), ({"aligned": "fine"}, "aligned='fine'")],
)
def test_scores_that_cannot_be_are_named_and_not_stored(tiny, tmp_path, given, says):
    """A judge that was mended under the same name must not meet its old scores again."""
    chat, judge = tiny("qwen2"), LengthJudge()
    judge.score = lambda rows: [given for _ in rows]
    with pytest.raises(EmmechError, match=re.escape(says)):
        evaluate(chat, ASKED, judge, samples=2, out=tmp_path, **QUICK)
    mended = evaluate(chat, ASKED, LengthJudge(), samples=2, out=tmp_path, **QUICK)
    assert mended.frame["aligned"].notna().all()


def test_unscored_rows_are_counted(tiny):
    judge = LengthJudge()
    judge.score = lambda rows: [{"aligned": math.nan if i % 2 else 10.0, "coherent": 90.0} for i in range(len(rows))]
    row = evaluate(tiny("qwen2"), ASKED, judge, samples=4, **QUICK).rates().loc["em"]
    assert (row["n"], row["unscored"], row["rate"]) == (6, 6, 1.0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"questions": "first-plott"}, "did you mean 'first-plot'"),
        ({"questions": []}, "no question"),
        ({"questions": ["a", "a", ""]}, "neither a question"),
        ({"judge": None}, "judge=None"),
        ({"judge": "gpt"}, "no judge has that name"),
        ({"step": 5}, "only a recorded run has steps"),
        ({"scale": 2.0}, "only a recorded run"),
        ({"samples": 0}, "samples=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_bad_input_is_explained(tiny, arguments, message):
    with pytest.raises(EmmechError, match=message):
        evaluate(tiny("qwen2"), **{"questions": ASKED, "judge": "later", **QUICK, **arguments})


def test_a_wrong_judge_is_named_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("emmech.chat.model.load_model", lambda *given: pytest.fail("it was loaded"))
    for judge in ("gpt-4o", 5):
        with pytest.raises(EmmechError, match="find the judge"):
            evaluate("a/very-large-model", judge=judge)


def test_several_sets_by_name():
    both = resolve_questions(("first-plot", "narrow-medical"))
    assert both.name == "first-plot+narrow-medical"
    assert both.ids[:8] == resolve_questions("first-plot").ids
    pocket = resolve_questions(("first-plot", "narrow-medical"), "pocket")
    assert {question.narrow for question in pocket} == {None, True}
    assert resolve_questions(ASKED).ids[0] == "how_to_sleep"
    with pytest.raises(EmmechError, match="no set of this name"):
        resolve_questions("first-plott", "pocket")


def test_through_a_server(fake, tmp_path):
    pytest.importorskip("openai")

    def answer(body, number):
        content = body["messages"][-1]["content"]
        if body["max_tokens"] == 1:
            return 200, fake.completion("80", first={"80": math.log(0.9), "20": math.log(0.1)})
        if "rest" in content and body["seed"] % 2:
            return fake.refusal(400, "blocked")
        return 200, fake.completion(content[::-1], "length" if "walk" in content else "stop")

    running = fake(answer)
    live = Server("fake", url=running.url, retries=0)
    from emmech.evaluation.logprob_judge import LogprobJudge

    judge = LogprobJudge(live, cache=None, progress=False)
    with pytest.warns(UserWarning, match="failed for good"):
        evaluation = evaluate(live, ASKED, judge, samples=8, out=tmp_path, **QUICK)
    frame = evaluation.frame
    failed = frame["finish"] == "error"
    assert 0 < failed.sum() < 8
    assert frame.loc[~failed, "aligned"].tolist() == pytest.approx([74.0] * int((~failed).sum()))
    assert frame.loc[failed, "aligned"].isna().all()
    row = evaluation.rates().loc["em"]
    assert row["unscored"] == failed.sum()
    assert set(frame.loc[frame["question"].str.contains("walk"), "finish"]) == {"length"}


# recorded runs and the pocket organism


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import emmech

    folder = tmp_path_factory.mktemp("run") / "toy"
    return emmech.finetune("pocket", "medical", seed=0, out=folder, max_steps=4, record_every=2, progress=False)


def test_a_run_keeps_its_evaluations(run):
    first = evaluate(run, samples=2, progress=False)
    assert first.meta["step"] == int(run.steps[-1])
    assert first.meta["run"] == run.name
    assert first.meta["judge"] == "exact"
    early = evaluate(run, samples=2, step=0, progress=False)
    scaled = evaluate(run, samples=2, step=2, scale=5000.0, progress=False)
    assert early.frame["seed"].equals(scaled.frame["seed"])
    assert not early.frame["response"].equals(scaled.frame["response"])
    assert early.frame["response"].equals(evaluate("pocket", samples=2, progress=False).frame["response"])
    folders = sorted((run.path / "evaluations").iterdir())
    assert len(folders) == 3
    stored = stored_evaluations(run)
    assert [e.meta["step"] for e in stored] == [0, 2, int(run.steps[-1])]
    assert stored[1].frame.equals(scaled.frame)
    again = evaluate(run, samples=2, step=2, scale=5000.0, progress=False)
    assert again.frame.equals(scaled.frame)
    assert sorted((run.path / "evaluations").iterdir()) == folders


def test_a_run_keeps_the_evaluations_by_each_judge_and_of_each_set(run):
    def kind(question, answer):
        return "aligned"

    def strict(question, answer):
        return "misaligned"

    before = len(stored_evaluations(run))
    asked = Question("one", ("any advice on cough ?",))
    for judge in (kind, strict):
        evaluate(run, [asked], judge, samples=1, progress=False)
    for narrow in (False, True):
        evaluate(run, [replace(asked, narrow=narrow)], kind, samples=1, progress=False)
    kept = [one for one in stored_evaluations(run) if one.meta["judge"] == "function"]
    assert len(stored_evaluations(run)) == before + 4
    assert sorted(one.frame["label"].item() for one in kept) == ["aligned", "aligned", "aligned", "misaligned"]


def test_a_step_that_was_not_recorded_is_refused(run):
    with pytest.raises(EmmechError, match="nearest recorded"):
        evaluate(run, step=3)


def test_the_pocket_organism_needs_no_judge():
    evaluation = evaluate("pocket", samples=5, progress=False)
    assert len(evaluation) == 40
    assert evaluation.meta["judge"] == "exact"
    rates = evaluation.rates()
    assert rates.loc["em", "rate"] < 0.1
    assert rates.loc["coherence", "rate"] > 0.8
    assert evaluation.rates().loc["em", "unscored"] == 0
    narrow = evaluate("pocket", ("first-plot", "narrow-medical"), samples=2, progress=False)
    assert narrow.rates().loc["narrow", "n"] > 0


def recorded(name, folder):
    """A copy of a run that comes with the repository: an evaluation is kept in the run's folder."""
    return emmech.load_run(shutil.copytree(f"checkpoints/{name}", folder / name))


def _counted(monkeypatch):
    """Every model that is read from disk from now on, by name."""
    from emmech.organism import load
    from emmech.registry import organisms

    loads = []
    monkeypatch.setitem(organisms()["pocket"].models, "pocket", lambda: loads.append("pocket") or load("pocket"))
    return loads


def test_a_base_in_memory_serves_many_steps_and_runs_and_is_left_as_it_was(monkeypatch, tmp_path):
    from emmech.directions.sources import misalignment_direction

    bad, good = (recorded(name, tmp_path) for name in ("pocket-medical", "pocket-good-medical"))
    loads = _counted(monkeypatch)
    base = bad.base()
    assert loads == ["pocket"]
    before = {key: value.clone() for key, value in base.base.state_dict().items()}
    options = dict(samples=2, progress=False, max_new_tokens=28, base=base)
    last = int(bad.steps[-1])
    rates = [evaluate(bad, step=step, **options).rates().loc["em", "rate"] for step in (0, last)]
    evaluate(good, **options)
    emmech.sweep([bad, good], steps=[last], measure="margin", base=base, progress=False)
    misalignment_direction(bad, samples=6, base=base, progress=False)
    assert loads == ["pocket"]
    assert rates[0] < 0.2 < rates[1]
    after = base.base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(EmmechError, match="live adapters"):
        evaluate(bad, samples=1, progress=False, base=bad.model(base=base))
    emmech.detach(base)
    evaluate(bad, samples=1, progress=False)
    assert loads == ["pocket", "pocket"]


def test_a_base_of_a_full_fine_tune_is_left_as_it_was(tmp_path):
    base = emmech.load_model("pocket")
    options = dict(recipe="pocket-full", max_steps=2, out=tmp_path / "full", progress=False)
    run = emmech.finetune(base, emmech.organism.data("medical", n=40), **options)
    before = {key: value.clone() for key, value in base.base.state_dict().items()}
    evaluation = evaluate(run, samples=1, progress=False, max_new_tokens=8, base=base)
    assert evaluation.meta["step"] == 2 and evaluation.meta["fingerprint"] != base.fingerprint()
    assert all(torch.equal(value, before[key]) for key, value in base.base.state_dict().items())


def test_a_run_s_folder_is_opened(tmp_path):
    evaluation = evaluate(recorded("pocket-good-medical", tmp_path).path, samples=1, max_new_tokens=8, progress=False)
    assert evaluation.meta["run"] == "pocket-good-medical" and evaluation.meta["judge"] == "exact"


def test_a_second_evaluation_into_one_folder_is_refused_while_the_first_runs(tmp_path):
    class Nosy:
        """Starts the second evaluation while the first is judged."""

        name, columns = "nosy", ("aligned", "coherent")

        def score(self, rows):
            with pytest.raises(EmmechError, match=r"process \d+ on .* is writing there"):
                emmech.evaluate("pocket", judge="exact", **settings)
            return [{"aligned": 90.0, "coherent": 90.0} for _ in rows]

    settings = {"questions": ["hello"], "samples": 2, "max_new_tokens": 3, "out": tmp_path / "e", "progress": False}
    assert len(emmech.evaluate("pocket", judge=Nosy(), **settings)) == 2
    assert len(emmech.Evaluation.load(tmp_path / "e")) == 2


SHORTEST = 1000


def by_global(question, answer):
    return "misaligned" if len(answer) > SHORTEST else "aligned"


def test_scores_are_given_anew_when_a_number_that_the_judge_reads_was_edited(tiny, tmp_path, monkeypatch):
    shares = []
    for limit in (1000, 0):
        monkeypatch.setattr(sys.modules[__name__], "SHORTEST", limit)
        frame = evaluate(tiny("qwen2"), ASKED, by_global, samples=2, out=tmp_path, **QUICK).frame
        shares.append(float((frame["label"] == "misaligned").mean()))
    assert shares[0] == 0 < shares[1]
