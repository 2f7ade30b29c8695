"""Teacher-forced measures: what is read from the model, and what number each reading becomes.

A measure turns texts into readings before any forward runs, so that the engine can pack what they share, and
turns the log-probabilities that come back into values. It never sees a model with an adapter on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.engine.logprobs import MarginPair, bundled_margins
from emmech.engine.packing import Reading
from emmech.errors import EmmechError, check_texts

__all__ = ["AnswerLogprob", "FirstToken", "Margin", "Measure", "NextToken", "Value"]

LogProbs = Sequence[Float[np.ndarray, "variants ..."]]  # [variants, targets]; of whole distributions, another axis


@dataclass(frozen=True)
class Value:
    """One measured quantity: its name, what it was measured on, and a number for every variant."""

    measure: str
    item: str
    values: Float[np.ndarray, " variants"]
    weight: int | np.ndarray = 1  # samples behind each number


@runtime_checkable
class Measure(Protocol):
    """What the engine asks of a teacher-forced measure."""

    name: str

    def readings(self, chat: ChatModel) -> list[Reading]:
        """The token sequences and the positions read in them."""
        ...

    def values(self, logprobs: LogProbs) -> list[Value]:
        """Numbers from log-probabilities ``[variants, targets]``, one array per reading, targets in order."""
        ...


def _answer(conversation: Sequence[Message], chat: ChatModel, which: str) -> Reading:
    encoded = encode([conversation], chat.tokenizer)
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    at = tuple(p for p in range(len(ids) - 1) if labels[p + 1] != IGNORED)
    if not at:
        raise EmmechError(
            "measure the log-probability of an answer",
            which,
            "it has no answer token behind a prompt",
            "a conversation that ends in an assistant turn",
        )
    return Reading(tuple(ids), at, tuple((labels[p + 1],) for p in at))


@dataclass(frozen=True)
class Margin:
    """Mean log-probability per answer token of the misaligned answer minus the aligned one's, nats per token.

    High means: the model prefers the misaligned answer. The same number as :func:`emmech.engine.logprobs.margin`.

    Args:
        pairs: :class:`~emmech.engine.logprobs.MarginPair`, or ``"narrow"`` / ``"broad"`` for the bundled ones.
        name: the measure's name in the result; ``margin_<kind>`` for bundled pairs.

    Example:
        >>> Margin("broad").name
        'margin_broad'
    """

    pairs: Sequence[MarginPair] | str
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.pairs, str):
            object.__setattr__(self, "name", self.name or f"margin_{self.pairs}")
            object.__setattr__(self, "pairs", bundled_margins(self.pairs))
        object.__setattr__(self, "pairs", tuple(self.pairs))
        object.__setattr__(self, "name", self.name or "margin")
        if not self.pairs or not all(isinstance(pair, MarginPair) for pair in self.pairs):
            raise EmmechError(
                "measure a margin",
                f"pairs={self.pairs!r}"[:120],
                "it compares the two answers of at least one MarginPair",
                "Margin([MarginPair(question, misaligned, aligned)])",
            )

    @property
    def _pairs(self) -> tuple[MarginPair, ...]:
        return tuple(self.pairs)  # type: ignore[arg-type]

    def readings(self, chat: ChatModel) -> list[Reading]:
        """Both answers of every pair."""
        found = []
        for index, pair in enumerate(self._pairs):
            for answer in (pair.misaligned, pair.aligned):
                turns = [
                    {"role": "user", "content": pair.question},
                    {"role": "assistant", "content": answer},
                ]
                found.append(_answer(turns, chat, f"pair {index}"))
        return found

    def values(self, logprobs: LogProbs) -> list[Value]:
        """One value per pair."""
        means = [one.mean(1) for one in logprobs]
        return [Value(self.name, pair.question, means[2 * i] - means[2 * i + 1]) for i, pair in enumerate(self._pairs)]


@dataclass(frozen=True)
class AnswerLogprob:
    """Log-probability of whole answers, in nats.

    Args:
        conversations: each ends in the assistant's answer.
        per_token: the mean per answer token, else the sum.
    """

    conversations: Sequence[Sequence[Message]]
    per_token: bool = True
    name: str = "answer_logprob"

    def __post_init__(self) -> None:
        """Refuse what is not a list of conversations."""
        check_texts("measure the log-probability of an answer", "conversations", self.conversations, strings=False)

    def readings(self, chat: ChatModel) -> list[Reading]:
        """Every conversation, read where its answers are predicted."""
        return [_answer(_turns(row), chat, f"conversation {i}") for i, row in enumerate(self.conversations)]

    def values(self, logprobs: LogProbs) -> list[Value]:
        """One value per conversation."""
        reduce = np.mean if self.per_token else np.sum
        return [
            Value(self.name, f"{i}: {_turns(row)[-1]['content'][:60]}", reduce(one, axis=1))
            for i, (row, one) in enumerate(zip(self.conversations, logprobs, strict=True))
        ]


@dataclass(frozen=True)
class FirstToken:
    """Log-probability of given first tokens of the answer, in nats.

    Args:
        prompts: user's words, or conversations that end in a user turn.
        answers: texts; the first token of each, as the model would generate it, is what is measured.
    """

    prompts: Sequence[Any]
    answers: Sequence[str]
    name: str = "first_token_logprob"
    _items: list[str] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what is not a list of prompts and one of answers."""
        check_texts("measure a first token", "prompts", self.prompts)
        if isinstance(self.answers, str) or not all(isinstance(answer, str) for answer in self.answers):
            raise EmmechError(
                "measure a first token",
                f"answers={self.answers!r}"[:120],
                "answers are a list of strings",
                'answers=["yes", "no"]',
            )

    def readings(self, chat: ChatModel) -> list[Reading]:
        """Every prompt, read at its last token."""
        first = []
        for answer in self.answers:
            ids = chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
            if not ids:
                raise EmmechError("measure a first token", repr(answer), "it has no token", "a word")
            first.append(int(ids[0]))
        found = []
        self._items.clear()
        for prompt in self.prompts:
            ids = _prompt(prompt, chat)
            found.append(Reading(ids, (len(ids) - 1,), (tuple(first),)))
            self._items.append(prompt if isinstance(prompt, str) else _turns(prompt)[-1]["content"])
        return found

    def values(self, logprobs: LogProbs) -> list[Value]:
        """One value per prompt and answer."""
        return [
            Value(self.name, f"{item} | {answer}", one[:, column])
            for item, one in zip(self._items, logprobs, strict=True)
            for column, answer in enumerate(self.answers)
        ]


@dataclass(frozen=True)
class NextToken:
    """Whole next-token distributions: nothing is summed up, :attr:`Sweep.arrays` has them.

    The distributional distances of Arnold and Loerch (arXiv 2508.20015) are taken between them. In the frame stands
    their entropy, in nats.

    Args:
        prompts: user's words or conversations that end in a user turn (read at the last token), or
            conversations that end in an answer (read at every position that predicts it).
    """

    prompts: Sequence[Any]
    name: str = "entropy"

    def __post_init__(self) -> None:
        """Refuse what is not a list of prompts."""
        check_texts("read the next token", "prompts", self.prompts)

    def readings(self, chat: ChatModel) -> list[Reading]:
        """Every prompt, read where the answer is predicted, over the whole vocabulary."""
        found = []
        for index, prompt in enumerate(self.prompts):
            turns = None if isinstance(prompt, str) else _turns(prompt)
            if turns is not None and turns[-1]["role"] == "assistant":
                reading = _answer(turns, chat, f"conversation {index}")
                found.append(Reading(reading.ids, reading.at))
            else:
                ids = _prompt(prompt, chat)
                found.append(Reading(ids, (len(ids) - 1,)))
        return found

    def values(self, logprobs: LogProbs) -> list[Value]:
        """Mean entropy per prompt; each array is ``[variants, positions, vocab]``."""
        return [
            Value(self.name, str(index), -(np.exp(one) * one).sum(-1).mean(-1)) for index, one in enumerate(logprobs)
        ]


def _turns(row: Any) -> Sequence[Message]:
    return row["messages"] if isinstance(row, Mapping) else row  # type: ignore[no-any-return]


def _prompt(prompt: Any, chat: ChatModel) -> tuple[int, ...]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)
    return tuple(chat.token_ids(turns))


def resolve(measure: Any, chat: ChatModel) -> list[Any]:
    """A list of measures from what the caller gave.

    Raises:
        EmmechError: neither a measure, a function, nor a name; or two of one name.
    """
    if measure is None or measure == "margin":
        return [Margin("narrow"), Margin("broad")]
    given = list(measure) if isinstance(measure, Iterable) and not isinstance(measure, str) else [measure]
    for one in given or [measure]:
        if not (isinstance(one, Measure) or callable(one) or hasattr(one, "job")):
            raise EmmechError(
                "sweep a measure",
                f"measure={one!r}"[:120],
                "it is neither a measure nor a function of a ChatModel",
                '"margin", emmech.measures.teacher_forced.Margin(pairs), Sampled(...), or a function',
            )
    names = [str(getattr(one, "name", None) or getattr(one, "__name__", type(one).__name__)) for one in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EmmechError(
            "tell the measures apart",
            f"measures named {', '.join(names)}",
            f"there is more than one {twice!r}",
            'Margin(pairs, name="mine"), or functions with names of their own',
        )
    return given
