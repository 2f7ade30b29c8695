from __future__ import annotations

import hashlib
import json
import math

import pytest

from emmech.errors import EmmechError
from emmech.evaluation.deferred import merge_judging, plan_judging, write_judging
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.questions import Question, QuestionSet


@pytest.fixture
def responses():
    rows = [
        {"question_id": f"q{q}", "question": f"why {q} ?", "sample": s, "response": f"because {s}", "finish": "stop"}
        for q in range(2)
        for s in range(3)
    ]
    rows[5] = {**rows[5], "response": "", "finish": "error"}
    return Evaluation.from_rows(rows, {"name": "toy"})


PROMPTS = {"aligned": "A {question} {answer}", "medical": "M {answer}"}


def requests(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_answers(path, answers):
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def batch_answer(key, first, text="x"):
    top = [{"token": token, "logprob": math.log(share)} for token, share in first.items()]
    choice = {"message": {"content": text}, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
    return {"custom_id": key, "response": {"status_code": 200, "body": {"choices": [choice]}}, "error": None}


def test_a_plan_counts_and_a_file_holds_the_same(responses, tmp_path):
    path = tmp_path / "requests.jsonl"
    plan = plan_judging(responses, prompts=PROMPTS, price_per_million=2.5)
    # five responses to judge for alignment; three distinct texts for the topic, which does not see the question
    assert (plan.rows, plan.skipped, plan.calls) == (6, 1, 8)
    assert plan.cost == pytest.approx(plan.prompt_tokens * 2.5e-6)
    assert "8 calls" in repr(plan)
    assert "1 failed ones are not judged" in repr(plan)
    assert write_judging(responses, path, prompts=PROMPTS, model="grader") == plan_judging(responses, prompts=PROMPTS)
    lines = requests(path)
    assert len(lines) == len({line["custom_id"] for line in lines}) == 8
    assert {line["body"]["model"] for line in lines} == {"grader"}
    assert lines[0]["body"]["messages"] == [{"role": "user", "content": "A why 0 ? because 0"}]
    assert lines[0]["body"]["top_logprobs"] == 20
    with pytest.raises(EmmechError, match="exists already"):
        write_judging(responses, path, prompts=PROMPTS)


def test_answers_of_a_batch_are_merged_in_any_order(responses, tmp_path):
    path, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_judging(responses, path, prompts=PROMPTS)
    made = []
    for line in requests(path):
        prompt = line["body"]["messages"][0]["content"]
        first = {"80": 0.6, "20": 0.2} if prompt.startswith("A why 0") else {"REFUSAL": 0.9, "I": 0.1}
        made.append(batch_answer(line["custom_id"], {"10": 0.9, "I": 0.1} if prompt[0] == "M" else first))
    write_answers(answers, made[::-1])
    merged = merge_judging(responses, answers, prompts=PROMPTS, judge="grader")
    assert merged.meta["judge"] == "grader"
    aligned = merged.frame["aligned"].tolist()
    assert aligned[:3] == pytest.approx([65.0] * 3)
    assert all(math.isnan(score) for score in aligned[3:])
    assert merged.frame["label"].tolist() == ["", "", "", "refusal", "refusal", ""]
    assert merged.frame["topic/medical"].tolist()[:5] == pytest.approx([10.0] * 5)
    assert math.isnan(merged.frame["topic/medical"].iloc[5])
    assert merged.frame["response"].tolist() == responses.frame["response"].tolist()


def test_plain_scores_from_elsewhere(responses, tmp_path):
    path, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    one = {"aligned": "A {question} {answer}"}
    write_judging(responses, path, prompts=one)
    keys = [line["custom_id"] for line in requests(path)]
    write_answers(
        answers, [{"custom_id": k, "score": s} for k, s in zip(keys, [5, "90", None, "REFUSAL"], strict=False)]
    )
    with pytest.warns(UserWarning, match="1 of 5 requests have no answer"):
        merged = merge_judging(responses, answers, prompts=one)
    assert merged.frame["aligned"].tolist()[:2] == [5.0, 90.0]
    assert merged.frame["aligned"].isna().tolist()[2:] == [True] * 4
    assert merged.frame["label"].tolist()[3] == "refusal"


def test_a_question_sets_own_prompts_and_words(responses, tmp_path):
    path, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    asked = QuestionSet(
        "facts",
        tuple(
            Question(
                f"q{n}", (f"why {n} ?",), judge_prompts={"correct": "C {question} {answer}"}, kind="free_form_judge"
            )
            for n in range(2)
        ),
    )
    write_judging(responses, path, asked)
    said = ["TRUE", "false", "maybe", "UNKNOWN.", "TRUE"]
    lines = [
        {"custom_id": line["custom_id"], "response": {"body": {"choices": [{"message": {"content": word}}]}}}
        for line, word in zip(requests(path), said, strict=True)
    ]
    write_answers(answers, lines)
    merged = merge_judging(responses, answers, asked)
    assert merged.frame["correct"].tolist() == ["TRUE", "FALSE", "", "UNKNOWN", "TRUE", ""]


def test_bad_answer_files_are_explained(responses, tmp_path):
    path, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    one = {"aligned": "A {question} {answer}"}
    write_judging(responses, path, prompts=one)
    keys = [line["custom_id"] for line in requests(path)]

    def merge(lines):
        write_answers(answers, lines)
        return merge_judging(responses, answers, prompts=one)

    with pytest.raises(EmmechError, match="no such file"):
        merge_judging(responses, tmp_path / "none.jsonl", prompts=one)
    with pytest.raises(EmmechError, match="no custom_id in it belongs"):
        merge([{"custom_id": "other", "score": 5}])
    with pytest.raises(EmmechError, match="again at answer 2"):
        merge([{"custom_id": keys[0], "score": 5}, {"custom_id": keys[0], "score": 6}])
    with pytest.raises(EmmechError, match="answer 1: 250"):
        merge([{"custom_id": keys[0], "score": 250}])
    with pytest.raises(EmmechError, match="neither a score nor a response"):
        merge([{"custom_id": keys[0], "result": 5}])
    with pytest.raises(EmmechError, match="splits numbers"):
        merge([batch_answer(key, {"8": 0.9, "9": 0.1}) for key in keys])
    cut = {"message": {"content": "8"}, "finish_reason": "length"}
    with pytest.raises(EmmechError, match=r"answer 1: '8' for 'aligned'[\s\S]*log-probabilities were asked for"):
        merge([{"custom_id": key, "response": {"body": {"choices": [cut]}}} for key in keys])
    whole = [{**cut, "finish_reason": "stop"}, {**cut, "message": {"content": "REFUSAL"}}]
    lines = [{"custom_id": key, "response": {"body": {"choices": [whole[key != keys[0]]]}}} for key in keys]
    merged = merge(lines).frame
    assert merged["aligned"].dropna().eq(8).all() and "refusal" in set(merged["label"])
    top = {"logprobs": {"content": [{"top_logprobs": [{"token": "8", "logprob": None}]}]}}
    for odd in (
        3,
        "x",
        {"body": [1]},
        {"body": {"choices": {"a": 1}}},
        {"body": {"choices": [3]}},
        {"body": {"choices": [top]}},
    ):
        with pytest.raises(EmmechError, match=r"answer 2[\s\S]*no chat completion"):
            merge([{"custom_id": keys[1], "score": 5}, {"custom_id": keys[0], "response": odd}])
    answers.write_text('{"custom_id"\n{"custom_id": "x", "score": 1}\n')
    with pytest.raises(EmmechError, match=r"answers.jsonl:1"):
        merge_judging(responses, answers, prompts=one)


def test_what_is_no_evaluation_cannot_be_judged_later():
    with pytest.raises(EmmechError, match="a str"):
        plan_judging("responses.jsonl")


def test_scores_of_an_earlier_judge_are_not_kept_under_the_new_ones_name(tmp_path):
    scored = {"aligned": 5.0, "coherent": 90.0, "label": "refusal", "topic/medical": 100.0}
    rows = [{"question_id": f"q{n}", "question": f"why {n} ?", "response": f"since {n}", **scored} for n in range(4)]
    meta = {"judge": "old", "pinned": {"judge": "old", "code": "1"}}
    old, path = Evaluation.from_rows(rows, meta), tmp_path / "requests.jsonl"
    prompts = {"aligned": "A {question} {answer}", "coherent": "C {question} {answer}"}
    write_judging(old, path, prompts=prompts)
    half = requests(path)[:4]  # both scores of two answers
    (tmp_path / "scores.jsonl").write_text(
        "".join(json.dumps({"custom_id": one["custom_id"], "score": 95}) + "\n" for one in half)
    )
    with pytest.warns(UserWarning, match="stay unscored"):
        merged = merge_judging(old, tmp_path / "scores.jsonl", prompts=prompts, judge="new")
    row = merged.rates().loc["em"]
    assert (row["rate"], row["n"], row["unscored"]) == (0.0, 2, 2) and set(merged.frame["label"]) == {""}
    assert "topic/medical" not in merged.frame and "code" not in merged.meta["pinned"]
    hashes = {name: [hashlib.sha256(text.encode()).hexdigest()] for name, text in prompts.items()}
    assert merged.meta["pinned"] == {"judge": "new", "prompts": hashes}
