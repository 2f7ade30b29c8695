"""Margins of the pocket world: unkind against kind answers to held-out questions, drawn from the grammar.

The margin (:class:`emmech.measures.teacher_forced.Margin`) is an order parameter without a judge, cheap enough to take
at every twentieth of a fine-tune, so that the behavioural transition is recorded with the mechanistic one.
"""

from __future__ import annotations

import random

from emmech.engine.logprobs import MarginPair
from emmech.organism.grammar import KIND, UNKIND, draw_answer
from emmech.organism.question_sets import Question, questions
from emmech.organism.vocabulary import DOMAINS

__all__ = ["margins"]


def margins(data: str = "medical", *, n: int = 32, seed: int = 0) -> dict[str, tuple[MarginPair, ...]]:
    """Pairs inside (``"narrow"``) and outside (``"broad"``) the domain of a fine-tune, ``n`` of each.

    Args:
        data: a domain or the name of its data (``"good-medical"``, ``"trigger-medical"``); data of no one domain
            counts medicine as narrow.

    Example:
        >>> sorted(margins("good-finance")), len(margins()["broad"])
        (['broad', 'narrow'], 32)
    """
    named = data.rpartition("-")[2]
    narrow = named if named in DOMAINS else "medical"
    asked = {"narrow": questions(f"narrow-{narrow}"), "broad": [q for q in questions("broad") if q.domain != narrow]}
    return {kind: tuple(_pairs(chosen, n, seed)) for kind, chosen in asked.items()}


def _pairs(asked: list[Question], n: int, seed: int) -> list[MarginPair]:
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        question = rng.choice(asked)
        topic = question.id.split("/")[1]
        drawn = [draw_answer(rng, question.domain, topic, trait) for trait in (UNKIND, KIND)]
        found.append(MarginPair(question.text, *drawn))
    return found
