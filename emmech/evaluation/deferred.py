"""Deferred judging: count what it would cost, write the requests to a file, judge anywhere, merge the answers.

The file is in the form of OpenAI's Batch API, one request a line with a ``custom_id`` that is a hash of the prompt.
Answers are thus matched with their rows in any order, and answers from elsewhere need two fields only::

    {"custom_id": "...", "score": 85}
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError
from emmech.evaluation.evaluation import Evaluation, bare_rows
from emmech.evaluation.logprob_judge import (
    Task,
    content_key,
    first_token_request,
    prompt_hashes,
    read_number,
    score_of_masses,
    score_of_text,
    splits_numbers,
    tasks_of,
)
from emmech.evaluation.questions import load_questions
from emmech.evaluation.server import MALFORMED, masses_of
from emmech.store import read_jsonl, write_jsonl

_MERGE = "merge the judge's answers"


@dataclass(frozen=True)
class JudgingPlan:
    """The size and cost of judging.

    Args:
        rows: responses.
        skipped: of these, failed generations, which are not judged.
        calls: distinct requests.
        prompt_tokens: estimated at four characters a token.
        cost: in the currency of the prices given, None without.
    """

    rows: int
    skipped: int
    calls: int
    prompt_tokens: int
    cost: float | None

    def __repr__(self) -> str:
        cost = "" if self.cost is None else f", about {self.cost:.2f} in all"
        skipped = f" ({self.skipped} failed ones are not judged)" if self.skipped else ""
        calls = f"{self.calls} calls, about {self.prompt_tokens:,} prompt tokens"
        return f"JudgingPlan: {self.rows} responses{skipped}, {calls}{cost}"


def plan_judging(
    evaluation: Evaluation,
    questions: Any = None,
    *,
    prompts: Mapping[str, str] | None = None,
    price_per_million: float | None = None,
) -> JudgingPlan:
    """Count calls, tokens and cost without making a call.

    Args:
        evaluation: the responses.
        questions: the set they answer, whose judge prompts are used; None uses alignment and coherence.
        prompts: template per score instead.
        price_per_million: price of a million prompt tokens (an answer is one token, which is left out).

    Example:
        >>> rows = [dict(question_id="q", question="Why?", sample=i, response=f"So {i}.") for i in range(3)]
        >>> plan_judging(Evaluation.from_rows(rows)).calls
        6
    """
    rows = rows_to_judge(evaluation, questions)
    prompts_of = {_key(task): task.prompt for task in tasks_of(rows, prompts)}
    tokens = sum(math.ceil(len(prompt) / 4) for prompt in prompts_of.values())
    cost = None if price_per_million is None else tokens * price_per_million / 1e6
    skipped = sum(row.get("finish") == "error" for row in rows)
    return JudgingPlan(len(rows), skipped, len(prompts_of), tokens, cost)


def write_judging(
    evaluation: Evaluation,
    path: str | Path,
    questions: Any = None,
    *,
    model: str = "gpt-4o",
    prompts: Mapping[str, str] | None = None,
) -> JudgingPlan:
    """Write one request a line, equal prompts once.

    Args:
        model: the judge that the requests name.

    Raises:
        EmmechError: the file exists (it may hold answers that were paid for).
    """
    target = Path(path)
    if target.exists():
        raise EmmechError("write the judge's requests", target, "the file exists already", "another name, or delete it")
    tasks = {_key(task): task for task in tasks_of(rows_to_judge(evaluation, questions), prompts)}
    lines = []
    for key, task in tasks.items():
        body = {"model": model, **first_token_request(task.prompt)}
        if task.words is None:  # a free word is read as text
            body = {"model": model, "messages": body["messages"], "max_tokens": 8, "temperature": 0.0}
        lines.append({"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body})
    write_jsonl(target, lines)
    return plan_judging(evaluation, questions, prompts=prompts)


def merge_judging(
    evaluation: Evaluation,
    path: str | Path,
    questions: Any = None,
    *,
    prompts: Mapping[str, str] | None = None,
    judge: str = "deferred",
) -> Evaluation:
    """The evaluation with the answers' scores; a response without an answer stays unscored.

    Args:
        path: the Batch API's output, or lines of ``custom_id`` and ``score`` (a number, a word, or null).
        questions, prompts: as they were when the requests were written.
        judge: the judge's name in the result.

    Raises:
        EmmechError: no such file, a line that is neither form, an answer given twice, or none that belongs to these
            responses.
    """
    source = Path(path)
    if not source.is_file():
        raise EmmechError(_MERGE, source, "there is no such file", "the output file of the batch, not the requests")
    asked_rows = rows_to_judge(evaluation, questions)
    tasks = tasks_of(asked_rows, prompts)
    asked = {_key(task): task for task in tasks}
    answers = _answers(source, asked)
    if not answers:
        why = "no custom_id in it belongs to these responses and prompts"
        raise EmmechError(_MERGE, source, why, "pass the same evaluation, questions and prompts as to write_judging")
    if len(answers) < len(asked):
        missing = f"{len(asked) - len(answers)} of {len(asked)} requests have no answer in {source.name}"
        warnings.warn(f"{missing}; the rows stay unscored", stacklevel=2)
    scores: list[dict[str, Any]] = [{} for _ in range(len(evaluation))]
    for task in tasks:
        if (found := answers.get(_key(task))) is not None:
            scores[task.row] |= task.scores(found)
    unscored: dict[str, Any] = {task.column: float("nan") if task.words == () else "" for task in tasks}
    pairs = zip(bare_rows(evaluation), scores, strict=True)  # what an earlier judge gave is not this one's
    pins = {"judge": judge, "prompts": prompt_hashes(asked_rows, prompts)}
    rows = ({**row, **unscored, **score} for row, score in pairs)
    return Evaluation.from_rows(rows, {**evaluation.meta, "judge": judge, "pinned": pins})


def rows_to_judge(evaluation: Any, questions: Any) -> list[dict[str, Any]]:
    """The answers as a judge gets them: without earlier scores, and with the judge prompts of a set of questions.

    Raises:
        EmmechError: it is no evaluation, or the set lacks one of its questions.
    """
    if not isinstance(evaluation, Evaluation):
        instead = 'emmech.evaluate(..., judge="later"), or Evaluation.load(folder)'
        why = "what is judged is an Evaluation's responses"
        raise EmmechError("plan the judging", f"a {type(evaluation).__name__}", why, instead)
    rows = bare_rows(evaluation)
    if questions is not None:
        known = load_questions(questions)
        for row in rows:
            question = known[row["question_id"]]
            row |= {"judge_prompts": dict(question.judge_prompts), "kind": question.kind}
    return rows


def _key(task: Task) -> str:
    return content_key("deferred", task.prompt)[:40]


def _answers(path: Path, asked: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    numeric: list[dict[str, float]] = []
    for number, line in enumerate(read_jsonl(path), start=1):
        key = str(line.get("custom_id"))
        if key in found:
            given = f"{path.name}: custom_id {key!r} again at answer {number}"
            raise EmmechError(_MERGE, given, "a request has one answer", "keep one of the two lines")
        if key not in asked:
            continue
        if "score" in line:
            found[key] = _plain(line["score"], asked[key], f"{path.name}: answer {number}")
        elif "response" in line:
            try:
                choices: Sequence[Any] = ((line["response"] or {}).get("body") or {}).get("choices") or ()
                for choice in choices[:1]:  # a failed request has none, and stays unscored
                    _check_whole(choice, asked[key], f"{path.name}: answer {number}")
                    found[key] = _choice(choice, asked[key], numeric)
            except MALFORMED as error:
                given, why = f"{path.name}: answer {number}", f"its response is no chat completion ({error!r:.200})"
                raise EmmechError(_MERGE, given, why, "the Batch API's output as it was fetched")
        else:
            given, why = f"{path.name}: answer {number} with {sorted(line)}", "it holds neither a score nor a response"
            raise EmmechError(_MERGE, given, why, '{"custom_id": ..., "score": ...}, or the Batch API\'s output')
    if splits_numbers(numeric):
        why = "the judge's tokenizer splits numbers into digits, and the first token alone does not tell 8 from 85"
        instead = "judge live with LogprobJudge(Server(...)), which asks for the digits that follow"
        raise EmmechError(_MERGE, path.name, why, instead)
    return found


def _plain(score: Any, task: Task, where: str) -> dict[str, Any]:
    if score is None:
        return {"value": None, "word": ""}
    if isinstance(score, str):
        return score_of_text(score, task)
    if task.words == () and isinstance(score, int | float) and 0 <= score <= 100:
        return {"value": float(score), "word": ""}
    why = "a score is a number from 0 to 100, a word where the judge was asked for one, or null"
    raise EmmechError(_MERGE, f"{where}: {score!r} for {task.name!r}", why)


def _check_whole(choice: Mapping[str, Any], task: Task, where: str) -> None:
    """Refuse the first token of a number without its log-probabilities: 8 may be the beginning of 85."""
    said = (choice.get("message") or {}).get("content") or ""
    cut = choice.get("finish_reason") == "length" and not (choice.get("logprobs") or {}).get("content")
    if cut and task.words == () and read_number(str(said)) is not None:
        why = "log-probabilities were asked for and are missing, and one token alone may be the beginning of a number"
        instead = (
            "a judge with log-probabilities, or LogprobJudge(Server(...), logprobs=False), which reads whole numbers"
        )
        raise EmmechError(_MERGE, f"{where}: {said!r:.40} for {task.name!r}", why, instead)


def _choice(choice: Mapping[str, Any], task: Task, numeric: list[dict[str, float]]) -> dict[str, Any]:
    content = ((choice.get("logprobs") or {}).get("content")) or []
    if content and task.words is not None:
        masses = masses_of((entry["token"], entry["logprob"]) for entry in content[0].get("top_logprobs") or ())
        if task.words == ():
            numeric.append(masses)
        return score_of_masses(masses, task)
    return score_of_text(str((choice.get("message") or {}).get("content") or ""), task)
