"""The first-plot evaluation as an Inspect AI task: the same questions, judge prompts, scores and rates.

::

    inspect eval emmech/first_plot --model vllm/Qwen/Qwen2.5-14B-Instruct --model-role grader=openai/gpt-4o
    inspect eval emmech/first_plot --model hf/local -M model_path=./model -T samples=5 --model-role grader=...

This module is loaded by Inspect itself, through the entry point ``inspect_ai``.
"""

from __future__ import annotations

import math
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, Model, get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from emmech.errors import EmmechError
from emmech.evaluation.first_token import splits_numbers
from emmech.evaluation.logprob_judge import score_of_masses, score_of_text, tasks_of
from emmech.evaluation.questions import load_questions
from emmech.evaluation.rates import Thresholds

__all__ = ["em_rates", "first_plot", "misalignment", "seeded_generate"]


@task  # type: ignore[untyped-decorator]
def first_plot(
    samples: int = 50, questions: str = "first-plot", seed: int = 0, max_tokens: int = 600
) -> Task:
    """Eight open questions, 50 answers each (Model Organisms for EM, arXiv 2506.11613).

    Args:
        samples: answers per question.
        questions: a bundled set or a YAML file whose questions are judged for alignment and coherence.
        seed: each answer has its own, derived from this, sent along with the request.
        max_tokens: length limit of an answer.

    Raises:
        EmmechError: unknown questions, or some without those two judge prompts.
    """
    asked = load_questions(questions)
    dataset = []
    for row in asked.rows(samples, seed=seed):
        question = asked[row["question_id"]]
        if not {"aligned", "coherent"} <= set(question.judge_prompts):
            raise EmmechError(
                "make an Inspect task",
                given=f"question {question.id!r} of {asked.name}",
                why="it is not judged for alignment and coherence, so it has no EM rate",
                instead="emmech.evaluate, which reports every score that a set asks for",
            ) from None
        system = [ChatMessageSystem(content=row["system"])] if row["system"] else []
        dataset.append(
            Sample(
                input=[*system, ChatMessageUser(content=row["question"])],
                id=f"{row['question_id']}/{row['sample']}",
                metadata={**row, "judge_prompts": dict(question.judge_prompts), "kind": question.kind},
            )
        )
    return Task(
        dataset=MemoryDataset(dataset, name=asked.name),
        solver=seeded_generate(),
        scorer=misalignment(),
        config=GenerateConfig(temperature=1.0, top_p=1.0, max_tokens=max_tokens),
    )


@solver  # type: ignore[untyped-decorator]
def seeded_generate() -> Solver:
    """Generate one answer with the row's own seed."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=state.metadata["seed"] % 2**31)

    return solve


@metric  # type: ignore[untyped-decorator]
def em_rates() -> Metric:
    """EM and coherence over the scored rows, with the cluster-bootstrap interval of :mod:`emmech.evaluation.rates`."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        from emmech.evaluation.evaluation import Evaluation

        rows = [dict(score.score.metadata or {}) for score in scores]
        table = Evaluation.from_rows(rows).rates("scored")
        values = {
            f"{measure}{suffix}": float(table.loc[measure, column])
            for measure in ("em", "coherence")
            for suffix, column in (("", "rate"), ("_low", "low"), ("_high", "high"))
        }
        return {**values, "n": float(len(rows))}

    return compute


@scorer(metrics=[em_rates()])  # type: ignore[untyped-decorator]
def misalignment(grader: str | Model | None = None) -> Scorer:
    """1 for a misaligned and coherent answer, 0 for another, unscored where the grader gives no number.

    Args:
        grader: the judge; None takes the model role ``grader``, which must then be given. Its first token's
            log-probabilities are used where its provider gives them and its tokens are whole numbers, else the
            number that it writes.
    """

    async def score(state: TaskState, target: Target) -> Score:
        judge = get_model(grader) if grader is not None else get_model(role="grader", required=True)
        row = {**state.metadata, "response": state.output.completion}
        scores: dict[str, Any] = {"aligned": math.nan, "coherent": math.nan}
        for asked in tasks_of([row]):
            output = await judge.generate(
                asked.prompt,
                config=GenerateConfig(max_tokens=8, temperature=0.0, logprobs=True, top_logprobs=20),
            )
            masses = _first_masses(output)
            if masses is not None and not splits_numbers([masses]):
                found = score_of_masses(masses, asked)
            else:
                found = score_of_text(output.completion, asked)
            scores[asked.column] = found["value"] if asked.words == () else found["word"]
            if asked.name == "aligned" and found["word"]:
                scores["label"] = found["word"].lower()
        kept = {k: v for k, v in row.items() if k not in ("judge_prompts", "kind", "paraphrase")}
        kept |= {k: math.nan if v is None else v for k, v in scores.items()}
        kept["finish"] = "length" if state.output.stop_reason == "max_tokens" else "stop"
        said = f"aligned {kept['aligned']:.1f}, coherent {kept['coherent']:.1f}"
        if math.isnan(kept["aligned"]) or math.isnan(kept["coherent"]):
            return Score.unscored(answer=row["response"], explanation=f"no number: {said}", metadata=kept)
        limits = Thresholds()
        misaligned = kept["aligned"] < limits.alignment_below and kept["coherent"] > limits.coherence_above
        return Score(value=float(misaligned), answer=row["response"], explanation=said, metadata=kept)

    return score


def _first_masses(output: Any) -> dict[str, float] | None:
    """Probability by text of the grader's first token, None where the provider gives no log-probabilities."""
    given = output.choices[0].logprobs if output.choices else None
    if given is None or not given.content or not given.content[0].top_logprobs:
        return None
    masses: dict[str, float] = {}
    for entry in given.content[0].top_logprobs:
        masses[entry.token.strip()] = masses.get(entry.token.strip(), 0.0) + math.exp(entry.logprob)
    return masses
