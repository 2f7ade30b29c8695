"""One protocol for whatever is measured of a chat model: while it trains, in a sweep, and under an intervention.

A measure has a name and turns a chat model as it is (hooks and adapters included) into items: values with the question
that each belongs to. Their mean is the number. A teacher-forced measure also says what it reads and what it makes of
the log-probabilities that come back, so that a sweep can read many variants of a model in shared forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from emmech.chat.model import ChatModel
from emmech.engine.logprobs import reading_logprobs
from emmech.engine.packing import Reading
from emmech.errors import EmmechError

LogProbs = Sequence[Float[np.ndarray, "variants ..."]]  # [variants, targets]; of whole distributions, another axis


@dataclass(frozen=True)
class Items:
    """Values of one or several outcomes, one per item.

    Args:
        values: ``[items]`` by outcome; NaN where an outcome is not measured on an item.
        questions: ``[items]`` the question each item belongs to; items of one question resemble each other.

    Example:
        >>> Items({"em": np.array([1.0, 0.0, np.nan])}, ["a", "a", "b"]).means()
        {'em': 0.5}
    """

    values: Mapping[str, Float[np.ndarray, " items"]]
    questions: Sequence[str]

    def means(self) -> dict[str, float]:
        """The mean of each outcome over the items that have it; NaN where none has."""
        finite = {name: values[np.isfinite(values)] for name, values in self.values.items()}
        return {name: float(values.mean()) if len(values) else np.nan for name, values in finite.items()}

    @classmethod
    def joined(cls, parts: Sequence[Items]) -> Items:
        """The items of several measures after each other, NaN where an outcome is of another measure."""
        starts = np.cumsum([0, *(len(part.questions) for part in parts)])
        values: dict[str, np.ndarray] = {}
        for start, part in zip(starts, parts, strict=False):
            for name, own in part.values.items():
                whole = values.setdefault(name, np.full(starts[-1], np.nan))
                whole[start : start + len(part.questions)] = own
        return cls(values, [question for part in parts for question in part.questions])


@dataclass(frozen=True)
class Value:
    """One measured quantity: its name, what it was measured on, and a number for every variant of the model."""

    measure: str
    item: str
    values: Float[np.ndarray, " variants"]
    weight: int | np.ndarray = 1  # samples that each number is a mean of


def wrong_way(changed: Float[np.ndarray, " items"], before: Float[np.ndarray, " items"]) -> float:
    """The share of items that a change moves against their mean change.

    A mean hides it: steering that raises the mean lowers some samples, for many vectors nearly half of them (Analyzing
    the Generalization and Reliability of Steering Vectors, arXiv 2407.12404, calls these samples anti-steerable). 0
    means that none went the other way, and half of the items is what a change without a direction gives.

    Args:
        changed, before: the same items with and without the change; those without a value in one are left out.

    Returns:
        NaN where no item has both values, or where the mean does not change.

    Example:
        >>> wrong_way(np.array([2.0, 2.0, 2.0, -1.0]), np.zeros(4)), wrong_way(np.array([1.0, 0.0]), np.zeros(2))
        (0.25, 0.0)
    """
    moved = np.asarray(changed, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    moved = moved[np.isfinite(moved)]
    if not len(moved) or abs(moved.mean()) <= 1e-12 * max(float(np.abs(moved).max()), 1e-300):
        return float("nan")
    return float((moved * np.sign(moved.mean()) < 0).mean())


class Measure(Protocol):
    """Anything with a name that turns a model into items; a function of a model serves too (:class:`Function`)."""

    @property
    def name(self) -> str:
        """The name of its outcome, or of the first of them."""

    def __call__(self, chat: ChatModel) -> Items:
        """Measure the model as it is now, hooks and adapters included."""


@runtime_checkable
class TeacherForced(Protocol):
    """A measure that is read from log-probabilities of given texts; it need not know which variant it reads."""

    name: str

    def readings(self, chat: ChatModel) -> list[Reading]:
        """The token sequences and the positions read in them."""

    def values(self, logprobs: LogProbs) -> list[Value]:
        """Numbers from log-probabilities ``[variants, targets]``, one array per reading, targets in order."""


@dataclass(frozen=True)
class Function:
    """A user's own function of a chat model as a measure.

    Args:
        function: returns a number, a dict of numbers, or :class:`Items`.
        name: of the outcome, where it returns a number.

    Example:
        >>> Function(len, "size")([1, 2, 3]).means()
        {'size': 3.0}
    """

    function: Callable[[ChatModel], Any]
    name: str

    def __call__(self, chat: ChatModel) -> Items:
        """Call the function.

        Raises:
            EmmechError: it returned something else.
        """
        returned = self.function(chat)
        if isinstance(returned, Items):
            return returned
        entries = returned if isinstance(returned, Mapping) else {self.name: returned}
        try:
            return Items({str(name): np.array([float(value)]) for name, value in entries.items()}, [""])
        except (TypeError, ValueError):
            why = "a measure gives a number, a dict of numbers, or Items"
            instead = "return float(...), {'name': float(...)}, or Items({'outcome': values}, questions)"
            raise EmmechError(f"take the measure {self.name!r}", f"it returned {returned!r}"[:120], why, instead)


def measure_all(chat: ChatModel, measures: Sequence[Any]) -> Items:
    """The items of all measures of the model as it is; what teacher-forced ones read in common is read once."""
    wanted = {at: one.readings(chat) for at, one in enumerate(measures) if isinstance(one, TeacherForced)}
    unique = list(dict.fromkeys(reading for readings in wanted.values() for reading in readings))
    found = dict(zip(unique, reading_logprobs(chat, unique) if unique else (), strict=True))
    parts = []
    for at, one in enumerate(measures):
        if at in wanted:
            values = one.values([found[reading] for reading in wanted[at]])
            parts += [Items({v.measure: np.asarray(v.values, np.float64)}, [v.item]) for v in values]
        else:
            parts.append(one(chat))
    return Items.joined(parts)


def measure_name(one: Any) -> str:
    """The name of a measure or function."""
    return str(getattr(one, "name", None) or getattr(one, "__name__", None) or type(one).__name__)
