"""Tokens and answer masks: exactly the answers carry loss, never the assistant's header.

The answer is the assistant's words and the end-of-turn token after them, because that token is what the
model must learn to stop with. The template's trailing newline, if any, is not answer. An answer of weight 0 is context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emmech.chat.template import Message, Span, rendered_spans
from emmech.errors import EmmechError

__all__ = ["IGNORED", "Encoded", "encode"]

IGNORED = -100  # the label that cross-entropy skips, in torch and in transformers
_AT_ONCE = 512  # texts in a call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of conversations.

    Args:
        input_ids: one list per kept row.
        labels: the same length; the token id inside answers, -100 elsewhere.
        truncated: rows of which some answer token was cut off at ``max_length`` but some remained.
        emptied: rows left out because no answer token remained.
    """

    input_ids: tuple[list[int], ...]
    labels: tuple[list[int], ...]
    truncated: int
    emptied: int

    def __len__(self) -> int:
        """Number of kept rows."""
        return len(self.input_ids)

    @property
    def answer_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(int(np.sum(np.asarray(row) != IGNORED)) for row in self.labels)

    def take(self, rows: Iterable[int], *, max_length: int | None = None) -> Encoded:
        """Some of the rows, in the order given, cut at ``max_length`` tokens; rows left without answer are dropped."""
        all_ids, all_labels, truncated, emptied = [], [], 0, 0
        for row in rows:
            ids, labels = self.input_ids[row], self.labels[row]
            if max_length is not None and len(ids) > max_length:
                cut = any(label != IGNORED for label in labels[max_length:])
                ids, labels = ids[:max_length], labels[:max_length]
                if cut and all(label == IGNORED for label in labels):
                    emptied += 1
                    continue
                truncated += cut
            all_ids.append(ids)
            all_labels.append(labels)
        return Encoded(tuple(all_ids), tuple(all_labels), truncated, emptied)


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
    ids, labels = [], []
    for row_ids, answer in _tokens(list(_rendered(rows, tokenizer)), tokenizer):
        ids.append(row_ids)
        labels.append([t if inside else IGNORED for t, inside in zip(row_ids, answer, strict=True)])
    encoded = Encoded(tuple(ids), tuple(labels), 0, 0).take(range(len(ids)), max_length=max_length)
    if not len(encoded):
        raise EmmechError(
            "encode the conversations",
            f"{len(rows)} rows, max_length={max_length}",
            "no row has an answer token within max_length" if rows else "there are no rows",
            "raise max_length",
        )
    return encoded


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
        ids: list[int] = []
        inside: list[bool] = []
        for _, answer in row:
            piece = next(pieces)
            ids += piece
            inside += [answer] * len(piece)
        if ids == together or tokenizer.decode(ids) == tokenizer.decode(together):
            yield ids, inside
            continue
        # A tokenizer that marks the start of a text (SentencePiece's dummy prefix) cannot be fed pieces.
        if not tokenizer.is_fast:
            raise EmmechError(
                "find the answer's tokens",
                f"tokenizer {type(tokenizer).__name__}",
                "it tokenises a text and its pieces differently, and gives no character offsets",
                "load the fast version of the tokenizer",
            )
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
