"""Sampled EM in a sweep: every variant answers the same questions with the same seeds, and a judge reads them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emmech.chat.model import ChatModel
from emmech.engine.decode import Answer, context, decode_variants
from emmech.engine.row_adapters import Rows
from emmech.engine.variants import Engine
from emmech.errors import EmmechError
from emmech.evaluation.judges import Judge, resolve_judge
from emmech.evaluation.questions import resolve_questions
from emmech.measures.measure import Value
from emmech.measures.sampled import Sampled
from emmech.registry import Organism
from emmech.sweeps.forced import Plan, plan
from emmech.sweeps.grid import Grid
from emmech.sweeps.parts import Arrays, Outcome, as_bytes, from_bytes

__all__ = ["SampledJob"]


class SampledJob:
    """Draws and judges the answers of one group of variants after another."""

    def __init__(self, measure: Sampled, chat: ChatModel, grid: Grid, budget: int, size: int) -> None:
        self.measure, self.chat = measure, chat
        self.kind = f"sampled-{measure.name}"
        questions = resolve_questions(measure.questions, chat.organism)
        self.judge = _judge(measure.judge, chat.organism)
        self.rows = questions.rows(measure.samples, seed=measure.seed)
        self.ids = [question.id for question in questions]
        prompts = [tuple(chat.token_ids(_turns(row))) for row in self.rows]
        self.prompts = sorted(set(prompts))
        self.which = [self.prompts.index(prompt) for prompt in prompts]
        self.texts: dict[tuple[int, ...], str] = {}
        self.verdicts: dict[tuple[str, str], dict[str, Any]] = {}
        self.engine = Engine(chat, grid.sites, grid.steered_layer)
        longest = max(map(len, self.prompts))
        tokens = min(longest + measure.max_new_tokens, context(chat))
        cache = chat.cache_bytes * tokens
        self.plan: Plan = plan(chat, grid, self.engine, longest, size, max(budget - cache, 1))
        self.engine.tokens = self.plan.tokens
        # all rows of some variants decode together: as many as half of the budget holds keys and values for
        self.variants_at_once = max(1, (budget // 2) // (cache * len(self.rows)))
        if cache * len(self.rows) > budget:
            raise EmmechError(
                "keep to the memory budget",
                f"memory={budget} bytes, {len(self.rows)} answers of up to {measure.max_new_tokens} tokens",
                f"the keys and values of one variant's answers take {cache * len(self.rows)} bytes",
                "fewer samples or questions, a smaller max_new_tokens, or a larger memory=",
            )

    def __len__(self) -> int:
        return len(self.rows)

    def request(self) -> object:
        """What identifies this job's work."""
        one = self.measure
        numbers = (
            one.samples,
            one.max_new_tokens,
            one.temperature,
            one.top_p,
            one.seed,
            *vars(one.thresholds).values(),
        )
        return one.name, getattr(self.judge, "name", ""), numbers, self.rows

    def run(self, rows: Rows, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Answers and verdicts of a group of variants."""
        records: list[list[dict[str, Any]]] = []
        for start in range(0, len(group), self.variants_at_once):
            chosen = rows.each(lambda one, at=start: one[at : at + self.variants_at_once])  # type: ignore[misc]
            answers = decode_variants(
                self.engine,
                chosen,
                self.prompts,
                self.which,
                [row["seed"] for row in self.rows],
                max_new_tokens=self.measure.max_new_tokens,
                temperature=self.measure.temperature,
                top_p=self.measure.top_p,
                at_once=self.plan.logit_rows * 8,
                ended=update,
            )
            for first in range(0, len(answers), len(self.rows)):
                own = answers[first : first + len(self.rows)]
                records.append(self._judged([{"response": self._text(one), "finish": one.finish} for one in own]))
        return {"records": as_bytes(records)}

    def _text(self, answer: Answer) -> str:
        """The answer in words; most variants write what another has written already."""
        if answer.ids not in self.texts:
            self.texts[answer.ids] = self.chat.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        return self.texts[answer.ids]

    def _judged(self, drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
        full = [{**row, **answer} for row, answer in zip(self.rows, drawn, strict=True)]
        return [{**answer, **score} for answer, score in zip(drawn, self._scores(full), strict=True)]

    def _scores(self, full: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Verdicts; the judge of an organism is a function of question and answer, and reads the same answer once."""
        if getattr(self.judge, "organism", None) is None:
            return list(self.judge.score(full))
        asked = [(row["question"], row["response"]) for row in full]
        fresh = {key: row for key, row in zip(asked, full, strict=True) if key not in self.verdicts}
        self.verdicts.update(zip(fresh, self.judge.score(list(fresh.values())), strict=True))
        return [self.verdicts[key] for key in asked]

    def finish(self, parts: Sequence[Arrays]) -> Outcome:
        """Rates by question, and every response with its verdict."""
        records = [one for part in parts for one in from_bytes(part["records"])]
        one, limits = self.measure, self.measure.thresholds
        aligned = np.array([[_number(r, "aligned") for r in rows] for rows in records])
        coherent = np.array([[_number(r, "coherent") for r in rows] for rows in records])
        scored, em = limits.scored(aligned, coherent), limits.misaligned(aligned, coherent)
        fine = scored & limits.coherent(coherent)
        values = []
        for question in self.ids:
            own = np.array([row["question_id"] == question for row in self.rows])
            narrow = any(row["narrow"] for row, mine in zip(self.rows, own, strict=True) if mine)
            count = scored[:, own].sum(1)
            with np.errstate(invalid="ignore"):
                rate, whole = em[:, own].sum(1) / count, fine[:, own].sum(1) / count
            values.append(Value("narrow" if narrow else one.name, question, rate, count))
            values.append(Value("coherent", question, whole, count))
        responses = [
            {"variant": variant, **self.rows[place], **record}
            for variant, rows in enumerate(records)
            for place, record in enumerate(rows)
        ]
        return Outcome(values, responses=responses)


def _judge(judge: Any, organism: Organism | None) -> Judge:
    resolved = resolve_judge(judge, organism)
    if resolved is None:
        raise EmmechError(
            "sweep sampled answers",
            f"judge={judge!r}",
            "a rate needs verdicts now",
            "a judge, or emmech.evaluate(run, step=..., scale=..., judge='later') one at a time",
        )
    return resolved


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["question"]}]


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float("nan") if value is None else float(value)
