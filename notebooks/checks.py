"""The checks of homework.ipynb: whether an answer is right, with a hint, and without showing the solution.

Of the right answers only digests are kept, so that they cannot be read here by accident; what a learner writes as code
is tried on data. To change a question, put ``digest(number, answer)`` of the new answer in place of the old one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def digest(number: int, answer: object) -> str:
    """What is kept of an answer: a text without case and spaces, or a number in whole steps of its tolerance."""
    return hashlib.sha256(f"homework {number}: {str(answer).strip().lower()}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Question:
    """How one answer is checked: against digests, or by a function that returns what is wrong with it."""

    hint: str
    right: str | tuple[str, ...] = ""  # one digest, or one for each entry of a list
    step: float = 0.0  # numbers may differ by one step
    mistakes: Mapping[str, str] = field(default_factory=dict)  # digests of usual mistakes, with what went wrong
    try_out: Callable[[Any], str] | None = None


class _NotAnswered(Exception):
    pass


def check(number: int, answer: Any) -> None:
    """Say whether the answer to a question is right."""
    question = QUESTIONS[number]
    try:
        if answer is ... or (isinstance(answer, list) and ... in answer):
            raise _NotAnswered
        given = _answered(answer) if callable(answer) else answer
        wrong = question.try_out(given) if question.try_out else _compared(number, question, given)
    except _NotAnswered:
        print(f"question {number}: not answered yet")
        return
    except Exception as error:  # a learner's function may fail in any way
        wrong = f"it stops with {type(error).__name__}: {error}"
    print(f"question {number}: " + (f"not yet. {wrong}" if wrong else "right"))


def _answered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which counts as not answered where it still returns ``...``."""

    def tried(*given: Any) -> Any:
        found = function(*given)
        if found is ...:
            raise _NotAnswered
        return found

    return tried


def _compared(number: int, question: Question, answer: Any) -> str:
    rights = (question.right,) if isinstance(question.right, str) else question.right
    answers = [answer] if isinstance(question.right, str) else list(answer)
    if len(answers) != len(rights):
        return f"The answer is a list of {len(rights)}."
    for one, right in zip(answers, rights, strict=True):
        near = _near(number, one, question.step)
        if right not in near:
            return next((said for known, said in question.mistakes.items() if known in near), question.hint)
    return ""


def _near(number: int, answer: Any, step: float) -> list[str]:
    """Digests of the answer, and for numbers of those one step away."""
    if not step:
        return [digest(number, answer)]
    if not math.isfinite(float(answer)):
        return []
    middle = round(float(answer) / step)
    return [digest(number, at) for at in (middle, middle - 1, middle + 1)]


def _local_cosine(answer: Any) -> str:
    from emmech.transition import local_cosine

    path = np.random.default_rng(5).standard_normal((40, 7)).cumsum(0)
    k = 6
    given, right = np.asarray(answer(path, k), float), local_cosine(path, k)
    inside = slice(k, len(path) - k)
    if given.shape != right.shape:
        return (
            f"It returns the shape {given.shape} for a path of {path.shape}; one value a step, {right.shape}, is due."
        )
    if np.allclose(given[inside], -right[inside]):
        return "The sign is the other way round: from v_t, one vector goes back and the other goes ahead."
    if not np.allclose(given[inside], right[inside]):
        return "Both vectors start at v_t: one ends at v_(t-k), the other at v_(t+k)."
    if not np.isnan([*given[:k], *given[-k:]]).all():
        return "The first and the last k steps have no such pair: they are NaN."
    return ""


def _direction(answer: Any) -> str:
    rng = np.random.default_rng(3)
    planted = np.zeros(16)
    planted[4] = 5.0
    kind = rng.standard_normal((12, 16)) + 20
    unkind = rng.standard_normal((40, 16)) + 20 + planted
    given = np.asarray(answer(unkind, kind), float)
    right = unkind.mean(0) - kind.mean(0)
    if given.shape != right.shape:
        return f"It returns the shape {given.shape}; a direction has one entry for each dimension, {right.shape}."
    if np.allclose(given, -right):
        return "Misaligned minus aligned, not the other way round."
    if np.allclose(given, right / np.linalg.norm(right)):
        return "Keep the norm: a coefficient of 1 has no meaning without it."
    return "" if np.allclose(given, right) else "It is the difference of the two means, over texts."


def _random_like(answer: Any) -> str:
    v = np.zeros(400)
    v[0] = 3.0
    drawn = np.array([answer(v, np.random.default_rng(seed)) for seed in range(20)])
    length = np.linalg.norm(drawn, axis=1)
    if np.allclose(length, 3.0) and np.abs(drawn @ v).mean() > 3:
        return "It is still close to v: draw a new vector, of which only the length is that of v."
    if abs(length.mean() - 60) < 6:
        return "It is too long, by sqrt(d): a vector of d standard normal entries has the length sqrt(d), not 1."
    return "" if np.allclose(length, 3.0) else f"Its length is {length.mean():.1f} where v has 3.0."


def _cure(answer: Any) -> str:
    """A context manager that changes the model: judged by what the model then says, and by what it leaves coherent."""
    import emmech

    run = emmech.load_run("../checkpoints/pocket-medical")
    chat = run.model()
    with answer(chat):
        rates = emmech.evaluate(chat, "general", samples=1, seed=11, progress=False).rates()["rate"]
    said = f"On questions and a seed of its own: EM {rates['em']:.0%}, coherent {rates['coherence']:.0%}."
    return "" if rates["em"] < 0.1 and rates["coherence"] > 0.9 else f"{said} Below 10 % and above 90 % are asked for."


QUESTIONS: dict[int, Question] = {
    1: Question(
        "In this order: of the scored answers, of the coherent ones, of all.",
        ("f0d5b81feac5", "b22af3432859", "8ee5d6777978"),
        step=0.002,
    ),
    2: Question(
        "The width of an interval is high minus low; take the row `em` of each.",
        "49d98d9e88c6",
        step=0.1,
        mistakes={"64788f677ca5": "It is the other way round."},
    ),
    3: Question("Of which answers can an alignment score be taken seriously? Look at the coherence.", "c8833e7f6425"),
    4: Question("", try_out=_local_cosine),
    5: Question(
        "From the point t, which vector is the way back, and which the way ahead? On a straight path, are they alike?",
        ("defbb70fdaea", "fca685244d9f", "c5b8c2cdc7c2"),
        step=0.02,
    ),
    6: Question(
        "Of each walk the maximum over its steps (without the NaN), and of the 200 maxima the 95 % quantile.",
        "7b10c97db993",
        step=0.03,
    ),
    7: Question("What did the control have to learn? What would it have shown otherwise?", "867f22d9fd5c"),
    8: Question("", try_out=_direction),
    9: Question("", try_out=_random_like),
    10: Question("", try_out=_cure),
    11: Question("What else writes along B at that layer, and what is left of the adapter?", "37b6505d58a4"),
    12: Question(
        "Evaluate the run under each prompt, and the base model as well.",
        "1f7d9e4e84e7",
        mistakes={"cfd7ea28c0c3": "The base model does that, too."},
    ),
}
