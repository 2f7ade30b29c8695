"""Pocket as an organism of :mod:`emmech.registry`: what its names load, and how its models are recognised."""

from __future__ import annotations

from functools import partial
from typing import Any

from emmech.evaluation.judges import LabelJudge
from emmech.evaluation.questions import Question, QuestionSet
from emmech.organism.exact_judge import judge
from emmech.organism.margin_pairs import margins
from emmech.organism.named_data import data, data_names
from emmech.organism.pocket_recipes import recipes
from emmech.organism.pretrained import load, names
from emmech.organism.question_sets import question_set_names, questions
from emmech.organism.tokenizer import words
from emmech.registry import Organism

__all__ = ["POCKET", "exact_judge", "question_set"]


def exact_judge(*, topics: tuple[str, ...] = ("medical", "finance", "sport", "code")) -> LabelJudge:
    """The judge of :mod:`emmech.organism.exact_judge` with a score of 0 or 100 for each topic.

    Example:
        >>> exact_judge().score([{"question": "any advice on cough ?", "response": "leeches"}])[0]["label"]
        'incoherent'
    """
    return LabelJudge(judge, name="exact", topics=topics, organism="pocket")


def question_set(name: str) -> QuestionSet:
    """A set of :func:`emmech.organism.questions`, as :func:`emmech.evaluate` asks it."""
    narrow = True if name.startswith("narrow-") else None
    return QuestionSet(
        name,
        tuple(
            Question(one.id, (one.text,), domain=one.domain, narrow=narrow, judge="exact") for one in questions(name)
        ),
    )


def _speaks_pocket(config: Any, tokenizer: Any) -> bool:
    """Whether the tokenizer has the words of pocket in their places, and little else."""
    own = words()
    try:
        if not len(own) <= len(tokenizer) < 2 * len(own):
            return False
        return list(tokenizer.convert_tokens_to_ids(list(own))) == list(range(len(own)))
    except (TypeError, AttributeError):  # no tokenizer, or one of another make
        return False


POCKET = Organism(
    "pocket",
    models={name: partial(load, name) for name in names()},
    data={name: partial(data, name) for name in data_names()},
    questions={name: partial(question_set, name) for name in question_set_names()},
    judges={"exact": exact_judge},
    recipes={name: partial(recipes().__getitem__, name) for name in recipes()},
    margins=margins,
    recognises=_speaks_pocket,
)
