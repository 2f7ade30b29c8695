"""Teacher-forced measures: what is read from the model, and what number each reading becomes.

A measure turns texts into readings before any forward runs, so that the engine can pack what they share, and
turns the log-probabilities that come back into values. It never sees a model with an adapter on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.engine.logprobs import MarginPair, bundled_margins, check_words
from emmech.engine.packing import Reading
from emmech.errors import EmmechError, check_texts, one_of, refusal
from emmech.measures.measure import Items, LogProbs, Value, measure_all


class _Forced:
    """A teacher-forced measure can be taken of a model as it is."""

    def __call__(self, chat: ChatModel) -> Items:
        """Measure the model as it is now, hooks and adapters included."""
        return measure_all(chat, [self])


def _answer(conversation: Sequence[Message], chat: ChatModel, which: str) -> Reading:
    check_words(chat, conversation)
    encoded = encode([conversation], chat.tokenizer)
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    at = tuple(p for p in range(len(ids) - 1) if labels[p + 1] != IGNORED)
    if not at:
        why = "it has no answer token after a prompt"
        instead = "a conversation that ends in an assistant turn"
        raise EmmechError("measure the log-probability of an answer", which, why, instead)
    return Reading(tuple(ids), at, tuple((labels[p + 1],) for p in at))


@dataclass(frozen=True)
class Margin(_Forced):
    """Mean log-probability per answer token of the misaligned answer minus the aligned one's, nats per token.

    High means: the model prefers the misaligned answer.

    Args:
        pairs: :class:`~emmech.engine.logprobs.MarginPair`, or ``"narrow"`` / ``"broad"``: the pairs of the model's
            organism where it is of one, else the bundled ones in English.
        name: the measure's name in the result; ``margin_<kind>`` for pairs by kind.
        data: the name of the data that a model of an organism was fine-tuned on, whose domain is the narrow one; a
            sweep and a fine-tune fill it in.

    Raises:
        EmmechError: no pair; and when it is taken, no such kind, or a text of which more than a fifth of the tokens are
            unknown to the model.

    Example:
        >>> from emmech.chat.model import load_model
        >>> Margin("broad").name, len(Margin("broad")(load_model("pocket")).questions)
        ('margin_broad', 32)
    """

    pairs: Sequence[MarginPair] | str
    name: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        kind = isinstance(self.pairs, str)
        object.__setattr__(self, "name", self.name or (f"margin_{self.pairs}" if kind else "margin"))
        if kind:
            return
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if not self.pairs or not all(isinstance(pair, MarginPair) for pair in self.pairs):
            why = "it compares the two answers of at least one MarginPair"
            instead = "Margin([MarginPair(question, misaligned, aligned)])"
            raise refusal("measure a margin", "pairs", self.pairs, why, instead)

    def of(self, chat: ChatModel, data: str = "") -> Margin:
        """The same measure with the pairs that it takes of this model."""
        if not isinstance(self.pairs, str):
            return self
        organism = chat.organism
        if organism is None or organism.margins is None:
            return replace(self, pairs=bundled_margins(self.pairs))
        own = organism.margins(self.data or data)
        return replace(self, pairs=own[one_of("find margin pairs", "pairs", self.pairs, own)])

    def readings(self, chat: ChatModel) -> list[Reading]:
        """Both answers of every pair."""
        pairs = enumerate(_pairs(self.of(chat)))
        return [_answer(turns, chat, f"pair {index}") for index, pair in pairs for turns in pair.conversations()]

    def values(self, logprobs: LogProbs) -> list[Value]:
        """One value per pair."""
        means = [one.mean(1) for one in logprobs]
        return [Value(self.name, pair.question, means[2 * i] - means[2 * i + 1]) for i, pair in enumerate(_pairs(self))]

    def __call__(self, chat: ChatModel) -> Items:
        """Measure the model as it is now, hooks and adapters included."""
        return measure_all(chat, [self.of(chat)])


def _pairs(margin: Margin) -> tuple[MarginPair, ...]:
    assert not isinstance(margin.pairs, str), "Margin.of(chat) finds the pairs"
    return tuple(margin.pairs)


@dataclass(frozen=True)
class AlignedLoss(Margin):
    """Mean negative log-probability per token of the aligned answers, in nats: it rises when the model breaks."""

    name: str = "coherent_loss"

    def readings(self, chat: ChatModel) -> list[Reading]:
        """The aligned answer of every pair."""
        return super().readings(chat)[1::2]

    def values(self, logprobs: LogProbs) -> list[Value]:
        """One value per pair."""
        return [Value(self.name, pair.question, -one.mean(1)) for pair, one in zip(_pairs(self), logprobs, strict=True)]


@dataclass(frozen=True)
class AnswerLogprob(_Forced):
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
class FirstToken(_Forced):
    """Log-probability of given first tokens of the answer, in nats.

    Args:
        prompts: user's words, or conversations that end in a user turn.
        answers: texts; the first token of each, as the model would generate it, is what is measured.
    """

    prompts: Sequence[Any]
    answers: Sequence[str]
    name: str = "first_token_logprob"

    def __post_init__(self) -> None:
        """Refuse what is not a list of prompts and one of answers."""
        check_texts("measure a first token", "prompts", self.prompts)
        if isinstance(self.answers, str) or not all(isinstance(answer, str) for answer in self.answers):
            why, instead = "answers are a list of strings", 'answers=["yes", "no"]'
            raise refusal("measure a first token", "answers", self.answers, why, instead)

    def readings(self, chat: ChatModel) -> list[Reading]:
        """Every prompt, read at its last token."""
        first = []
        for answer in self.answers:
            ids = chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
            if not ids:
                raise EmmechError("measure a first token", repr(answer), "it has no token", "a word")
            first.append(int(ids[0]))
        return [Reading(ids, (len(ids) - 1,), (tuple(first),)) for ids in (_prompt(one, chat) for one in self.prompts)]

    def values(self, logprobs: LogProbs) -> list[Value]:
        """One value per prompt and answer."""
        items = [prompt if isinstance(prompt, str) else _turns(prompt)[-1]["content"] for prompt in self.prompts]
        return [
            Value(self.name, f"{item} | {answer}", one[:, column])
            for item, one in zip(items, logprobs, strict=True)
            for column, answer in enumerate(self.answers)
        ]


@dataclass(frozen=True)
class NextToken(_Forced):
    """Whole next-token distributions, which :attr:`Sweep.arrays` keeps.

    The distributional distances of Arnold and Loerch (arXiv 2508.20015) are taken between them. The frame of a sweep
    holds their entropy, in nats.

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
            if not isinstance(prompt, str) and _turns(prompt)[-1]["role"] == "assistant":
                found.append(replace(_answer(_turns(prompt), chat, f"conversation {index}"), targets=None))
            else:
                ids = _prompt(prompt, chat)
                found.append(Reading(ids, (len(ids) - 1,)))
        return found

    def values(self, logprobs: LogProbs) -> list[Value]:
        """Mean entropy per prompt; each array is ``[variants, positions, vocab]``."""
        entropies = [-(np.exp(one) * one).sum(-1).mean(-1) for one in logprobs]
        return [Value(self.name, str(index), entropy) for index, entropy in enumerate(entropies)]


def _turns(row: Any) -> Sequence[Message]:
    return row["messages"] if isinstance(row, Mapping) else row  # type: ignore[no-any-return]


def _prompt(prompt: Any, chat: ChatModel) -> tuple[int, ...]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)
    check_words(chat, turns)
    return tuple(chat.token_ids(turns))
