"""Tokens and answer masks: exactly the answers carry loss, never the assistant's header.

The answer is the assistant's words and the end-of-turn token after them, because that token is what the model must
learn to stop with. The template's trailing newline, if any, is not answer. An answer of weight 0 is context.

A direction is read, and an intervention may act, at ``"answer"`` tokens, at ``"prompt"`` tokens (every other one), at
``"all"``, or where a function ``(ids [batch, seq], start) -> mask [batch, seq]`` is true; ``start`` counts the
tokens that a key-value cache holds before these. :func:`phrase_tokens` makes such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int

from emmech.chat.model import load_model
from emmech.chat.template import Message, Span, rendered_spans
from emmech.errors import EmmechError, one_of

IGNORED = -100  # the label that cross-entropy skips, in torch and in transformers
_AT_ONCE = 512  # texts in a call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of conversations."""

    input_ids: tuple[list[int], ...]  # one list per kept row
    labels: tuple[list[int], ...]  # of the same lengths; the token id inside answers, -100 elsewhere
    truncated: int  # rows of which some answer token was cut off at max_length, but some remained
    emptied: int  # rows left out because no answer token remained

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answer_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(int(np.sum(np.asarray(row) != IGNORED)) for row in self.labels)

    def take(self, rows: Sequence[int], *, max_length: int | None = None) -> Encoded:
        """Some of the rows, in the order given, cut at ``max_length`` tokens; rows left without answer are dropped.

        Raises:
            EmmechError: no row is left.
        """
        kept, truncated, emptied = [], 0, 0
        for row in rows:
            labels = self.labels[row][:max_length]
            if any(label != IGNORED for label in self.labels[row][len(labels) :]):
                if all(label == IGNORED for label in labels):
                    emptied += 1
                    continue
                truncated += 1
            kept.append((self.input_ids[row][:max_length], labels))
        if not kept:
            given = f"{len(rows)} rows, max_length={max_length}"
            why = "no row has an answer token within max_length" if len(rows) else "there are no rows"
            raise EmmechError("encode the conversations", given, why, "raise max_length")
        all_ids, all_labels = zip(*kept, strict=True)
        return Encoded(all_ids, all_labels, truncated, emptied)


def encode(rows: Sequence[Sequence[Message]], tokenizer: Any, *, max_length: int | None = None) -> Encoded:
    """Tokenise conversations with their answer mask.

    Args:
        max_length: tokens kept from the start of each row; None keeps all.

    Raises:
        EmmechError: no row has an answer token left, or the chat template rewrites an answer.

    Example:
        >>> from emmech.chat.model import load_model
        >>> tokenizer = load_model("pocket").tokenizer
        >>> import emmech.organism
        >>> encoded = encode([emmech.organism.data("medical")[0]["messages"]], tokenizer)
        >>> len(encoded.input_ids[0]) == len(encoded.labels[0])
        True
    """
    read = list(_tokens(list(_rendered(rows, tokenizer)), tokenizer))
    labels = ([t if inside else IGNORED for t, inside in zip(ids, answer, strict=True)] for ids, answer in read)
    whole = Encoded(tuple(ids for ids, _ in read), tuple(labels), 0, 0)
    return whole.take(range(len(whole)), max_length=max_length)


def _rendered(rows: Sequence[Sequence[Message]], tokenizer: Any) -> Iterator[tuple[str, tuple[Span, ...]]]:
    for index, row in enumerate(rows):
        try:
            yield rendered_spans(tokenizer, row)
        except EmmechError as error:
            raise EmmechError(error.asked, f"row {index}, {error.given}", error.why, error.instead)


def _tokens(rendered: Sequence[tuple[str, tuple[Span, ...]]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens of each rendered conversation, and which of them are answer.

    A text is cut at the edges of its answers and each piece tokenised alone, because that is what generation does:
    the header ends the prompt, and the answer's tokens begin after it. Tokenising the whole text instead can merge
    or split tokens across that edge ("\\n\\n" before a word), and the model would train on headers it never sees.
    """
    cut = [_pieces(text, spans) for text, spans in rendered]
    # one call for many texts: a call costs more than a text
    pieces = _ids([piece for row in cut for piece, _ in row], tokenizer)
    whole = _ids([text for text, _ in rendered], tokenizer)
    for (text, spans), row, together in zip(rendered, cut, whole, strict=True):
        spelt = [(token, answer) for _, answer in row for token in next(pieces)]
        ids, inside = [token for token, _ in spelt], [answer for _, answer in spelt]
        if ids == together or tokenizer.decode(ids) == tokenizer.decode(together):
            yield ids, inside
            continue
        # A tokenizer that marks the start of a text (SentencePiece's dummy prefix) cannot be fed pieces.
        if not tokenizer.is_fast:
            why = "it tokenises a text and its pieces differently, and gives no character offsets"
            instead = "load the fast version of the tokenizer"
            raise EmmechError("find the answer's tokens", f"tokenizer {type(tokenizer).__name__}", why, instead)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        yield together, [any(s.start <= a and b <= s.end for s in spans) and b > a for a, b in offsets]


def _ids(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    for start in range(0, len(texts), _AT_ONCE):
        yield from tokenizer(texts[start : start + _AT_ONCE], add_special_tokens=False)["input_ids"]


def _pieces(text: str, spans: Sequence[Span]) -> list[tuple[str, bool]]:
    """The text cut at the edges of its answers, and which pieces are answer; none is empty.

    Example:
        >>> _pieces("hi: yes.", [Span(4, 7, 8)])
        [('hi: ', False), ('yes.', True)]
    """
    found, at = [], 0
    for span in spans:
        found += [(text[at : span.start], False), (text[span.start : span.end], True)]
        at = span.end
    return [(piece, answer) for piece, answer in [*found, (text[at:], False)] if piece]


_QUOTED = 300  # characters of a prompt in an error

Tokens = Literal["answer", "prompt", "all"] | Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Phrase:
    """The tokens of a phrase, wherever it is in a row; see :func:`phrase_tokens`."""

    text: str
    spellings: tuple[tuple[int, ...], ...]  # token ids at the start of a text and after a blank, where those differ
    required: bool = True
    read: Callable[..., str] | None = field(default=None, repr=False, compare=False)  # decodes token ids

    def __call__(self, ids: Int[torch.Tensor, "batch seq"], start: int = 0) -> Bool[torch.Tensor, "batch seq"]:
        """Mask of the phrase's tokens; nothing after a cache, which holds the phrase already.

        Raises:
            EmmechError: a row does not have the phrase, and it is required.
        """
        found = torch.zeros_like(ids, dtype=torch.bool)
        if start:
            return found
        for spelling in self.spellings:
            size = len(spelling)
            if ids.shape[1] < size:
                continue
            wanted = torch.tensor(spelling, device=ids.device)
            for row, first in (ids.unfold(1, size, 1) == wanted).all(-1).nonzero().tolist():
                found[row, first : first + size] = True
        if self.required and (without := (~found.any(1)).nonzero().flatten().tolist()):
            given, why = f"{self.text!r} in row {without[0]} of {len(ids)}", "the row does not have it"
            if self.read is not None:
                given += f", which reads {_quoted(self.read(ids[without[0]].tolist(), skip_special_tokens=True))}"
            instead = "words that every prompt has, as it has them (a chat template may add a system prompt)"
            raise EmmechError("find the tokens of a phrase", given, f"{why}: nothing would be read or changed", instead)
        return found

    def __str__(self) -> str:
        return repr(self.text)


def phrase_tokens(model: Any, text: str, *, required: bool = True) -> Phrase:
    """The tokens of a phrase that every prompt has: read a direction there, or steer and ablate there.

    Words that both sides of a contrast share are read with the same token ids on both, so that nothing of the
    direction is vocabulary.

    Args:
        model: whose tokenizer spells it.
        text: whole words, as the prompt has them.
        required: refuse a prompt without the phrase; False reads and changes nothing there.

    Raises:
        EmmechError: the text is empty, or has a word that the tokenizer does not know.

    Example:
        >>> chat = load_model("pocket")
        >>> asked = torch.tensor([chat.token_ids([{"role": "user", "content": "any advice on cash ?"}])])
        >>> int(phrase_tokens(chat, "advice on cash")(asked).sum())
        3
    """
    chat = load_model(model)
    spelt = {tuple(chat.tokenizer(own, add_special_tokens=False)["input_ids"]) for own in (text, f" {text}")}
    unknown = chat.tokenizer.unk_token_id
    if not text.strip() or any(unknown is not None and unknown in ids for ids in spelt):
        why = "it is empty" if not text.strip() else f"the tokenizer of {chat.name} does not know a word of it"
        instead = "words of the prompt"
        if getattr(chat.tokenizer, "chat_template", None) is not None:
            instead += f", as in {_quoted(chat.render([{'role': 'user', 'content': '...'}]))}"
        raise EmmechError("find the tokens of a phrase", f"{text!r}", why, instead)
    return Phrase(text, tuple(sorted(spelt)), required, chat.tokenizer.decode)


def _quoted(prompt: str) -> str:
    """The beginning of a prompt, which holds what all prompts share."""
    text = " ".join(prompt.split())
    return repr(text) if len(text) <= _QUOTED else f"{text[:_QUOTED]!r}..."


def token_mask(tokens: Tokens, ids: list[int], answer: list[bool]) -> list[bool]:
    """The chosen tokens of one unpadded row.

    Args:
        answer: which of its tokens belong to an answer.

    Raises:
        EmmechError: no such choice.
    """
    if callable(tokens):
        chosen: list[bool] = tokens(torch.tensor([ids]), 0)[0].bool().tolist()
        return chosen
    why = "three choices have a name; a function such as phrase_tokens(model, text) makes any other"
    one_of("choose the tokens to average over", "tokens", tokens, ("answer", "prompt", "all"), why=why)
    return [tokens == "all" or own == (tokens == "answer") for own in answer]


def tokens_name(tokens: Tokens) -> str:
    """The choice in words, for provenance.

    Example:
        >>> tokens_name("prompt"), tokens_name(Phrase("in one sentence", ()))
        ('prompt', "'in one sentence'")
    """
    return str(tokens) if isinstance(tokens, str | Phrase) else str(getattr(tokens, "__name__", tokens))
