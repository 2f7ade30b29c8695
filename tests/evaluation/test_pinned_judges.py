"""What an evaluation keeps of its judge, and the same answers under several judges."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pytest

import emmech
from emmech import EmmechError, Evaluation
from emmech.evaluation import LabelJudge, judge_table
from emmech.evaluation.judges import pinned
from emmech.evaluation.logprob_judge import LogprobJudge, judge_prompt, prompt_hashes
from emmech.evaluation.questions import Question
from emmech.evaluation.server import Server

ROWS = [{"question": "Q", "response": "A"}, {"question": "Q", "response": "B"}]


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def strict(question, answer):
    return "misaligned" if answer != "good" else "aligned"


def kind(question, answer):
    return "misaligned" if answer == "bad" else "aligned"


def unscored() -> Evaluation:
    texts = ["good", "fair", "bad", "fair", "good"] * 4
    rows = [{"question_id": f"q{at % 4}", "sample": at // 4, "question": "Q", "response": text}
            for at, text in enumerate(texts)]  # fmt: skip
    return Evaluation.from_rows(rows, {"name": "tuned"})


def test_the_prompts_that_were_used_are_pinned_by_hash() -> None:
    judge = LogprobJudge(Server("judge", url="http://localhost:1/v1"), cache=None)
    own = "Rate {question} and {answer}."
    pins = pinned(judge, [*ROWS, {**ROWS[0], "judge_prompts": {"aligned": own}}])
    assert pins["prompts"]["aligned"] == sorted([sha(own), sha(judge_prompt("aligned"))])
    assert pins["prompts"]["coherent"] == [sha(judge_prompt("coherent"))]
    assert pins["weights"] is None and "localhost" in pins["model"]
    other = LogprobJudge(judge.model, prompts={"aligned": own + " "}, cache=None)
    assert pinned(other, ROWS)["prompts"] == {"aligned": [sha(own + " ")]}


def test_a_local_judge_is_pinned_by_its_weights(tiny) -> None:
    chat = tiny("llama")
    before = pinned(LogprobJudge(chat, cache=None), ROWS)
    assert before["weights"] == chat.fingerprint()
    chat.base.model.layers[0].mlp.down_proj.weight.data += 0.5
    assert pinned(LogprobJudge(chat, cache=None), ROWS)["weights"] != before["weights"]


def test_a_function_is_pinned_by_its_code() -> None:
    pins = [pinned(LabelJudge(one), ROWS)["code"] for one in (strict, kind, strict)]
    assert pins[0] == pins[2] != pins[1]


def test_an_evaluation_keeps_its_pins(tmp_path) -> None:
    made = emmech.evaluate("pocket", samples=1, out=tmp_path / "kept", progress=False)
    assert set(made.meta["pinned"]) == {"judge", "code"}
    assert Evaluation.load(tmp_path / "kept").meta["pinned"] == made.meta["pinned"]
    assert "pinned" not in emmech.evaluate("pocket", samples=1, judge="later", progress=False).meta


def test_rates_move_with_the_judge_and_differences_are_paired() -> None:
    table = judge_table(unscored(), {"kind": kind, "strict": strict})
    frame = table.to_frame().query("measure == 'em'").set_index("judge")
    assert frame["rate"].to_dict() == {"kind": 4 / 20, "strict": 12 / 20}
    assert frame.loc["strict", "difference"] == pytest.approx(8 / 20)
    expected = 12 / 20 * 4 / 20 + 8 / 20 * 16 / 20  # Cohen's kappa by hand
    assert frame.loc["strict", "kappa"] == pytest.approx((12 / 20 - expected) / (1 - expected))
    assert np.isnan(frame.loc["kind", "difference"])
    assert "20.0 % to 60.0 %" in repr(table)
    assert table.pins["kind"]["code"] != table.pins["strict"]["code"]


def test_scores_that_are_there_are_the_first_judge_and_not_given_to_the_others() -> None:
    seen = []

    class Nosy:
        name, columns = "nosy", ("aligned", "coherent")

        def score(self, rows):
            seen.extend(rows)
            return [{"aligned": 10.0, "coherent": 90.0} for _ in rows]

    scored = Evaluation.from_frame(unscored().frame.assign(aligned=95.0, coherent=95.0), meta={"judge": "first"})
    frame = judge_table(scored, [Nosy()]).to_frame()
    assert list(frame["judge"].unique()) == ["first", "nosy"]
    assert all({"aligned", "coherent", "label"}.isdisjoint(row) for row in seen) and len(seen) == 20


def test_a_judge_of_the_table_has_the_prompts_of_the_questions() -> None:
    seen = []

    class Reads:
        name, columns = "reads", ("aligned", "coherent")

        def pins(self, rows):
            return {"prompts": prompt_hashes(rows)}

        def score(self, rows):
            seen.append([row.get("judge_prompts") for row in rows])
            return [{"aligned": 10.0, "coherent": 90.0} for _ in rows]

    own = {"aligned": "OWN {question} {answer}", "coherent": "AND {question} {answer}"}
    asked = [Question(f"q{at}", ("Q",), judge_prompts=own) for at in range(4)]
    scored = Evaluation.from_frame(
        unscored().frame.assign(aligned=95.0, coherent=95.0),
        meta={"judge": "first", "pinned": {"prompts": {name: [sha(text)] for name, text in own.items()}}},
    )
    with pytest.warns(UserWarning, match="reads has other prompts for aligned, coherent"):
        judge_table(scored, [Reads()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge_table(scored, [Reads()], asked)
    assert seen == [[None] * 20, [own] * 20]


def test_refusals() -> None:
    answers = unscored()
    with pytest.raises(EmmechError, match="compares two judges"):
        judge_table(answers, [strict])
    with pytest.raises(EmmechError, match="two judges are called 'function'"):
        judge_table(answers, [strict, kind])
    with pytest.raises(EmmechError, match="it scores nothing"):
        judge_table(answers, ["later"])

    class Short:
        name, columns = "short", ("aligned",)

        def score(self, rows):
            return [{}]

    with pytest.raises(EmmechError, match="the judge gave 1 results"):
        judge_table(answers, {"a": strict, "b": Short()})


def test_another_function_as_judge_reads_no_stored_scores(tmp_path):
    """Both are called "function", and the record would pin code that never ran."""
    chat = emmech.load_model("pocket")
    how = {"samples": 1, "max_new_tokens": 4, "out": tmp_path, "progress": False}

    def with_label(label):
        return lambda question, answer: label

    for label, rate in (("aligned", 0.0), ("misaligned", 1.0), ("aligned", 0.0)):
        found = emmech.evaluate(chat, ["any advice on soup ?"], with_label(label), **how)
        assert found.rates()["rate"]["em"] == rate
    assert len(list(tmp_path.glob("scores-*.jsonl"))) == 2  # the third call found the first one's


@pytest.mark.parametrize("one", [emmech.Server("m", url="http://127.0.0.1:1/v1"), lambda q, a: "aligned", "exact"])
def test_one_judge_is_no_list_of_them(one):
    rows = [{"question_id": "q", "question": "why ?", "response": "so", "aligned": 5.0, "coherent": 90.0}]
    with pytest.raises(EmmechError, match=r"judges=\[one\]"):
        judge_table(emmech.Evaluation.from_rows(rows), one)
