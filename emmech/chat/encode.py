"""Tokens and answer masks: exactly the answers carry loss, never the assistant's header.

The answer is the assistant's words and the end-of-turn token behind them, because that token is what the
model must learn to stop with. The template's trailing newline, if any, is not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emmech.chat.template import Message, rendered_spans
from emmech.errors import EmmechError

__all__ = ["IGNORED", "Encoded", "encode"]

IGNORED = -100  # the label that cross-entropy skips, in torch and in transformers


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


def encode(rows: Sequence[Sequence[Message]], tokenizer: Any, *, max_length: int | None = None) -> Encoded:
    """Tokenise conversations with their answer mask.

    Args:
        max_length: tokens kept from the start of each row; None keeps all.

    Raises:
        EmmechError: no row has an answer token left.

    Example:
        >>> from emmech.chat.model import load_model
        >>> tokenizer = load_model("pocket").tokenizer
        >>> import emmech.organism
        >>> encoded = encode([emmech.organism.data("medical")[0]["messages"]], tokenizer)
        >>> len(encoded.input_ids[0]) == len(encoded.labels[0])
        True
    """
    all_ids, all_labels, truncated, emptied = [], [], 0, 0
    for row in rows:
        ids, answer = _encode_row(row, tokenizer)
        labels = [token if inside else IGNORED for token, inside in zip(ids, answer, strict=True)]
        if max_length is not None and len(ids) > max_length:
            if any(answer[max_length:]):
                if not any(answer[:max_length]):
                    emptied += 1
                    continue
                truncated += 1
            ids, labels = ids[:max_length], labels[:max_length]
        all_ids.append(ids)
        all_labels.append(labels)
    if not all_ids:
        raise EmmechError(
            "encode the conversations",
            given=f"{len(rows)} rows, max_length={max_length}",
            why="no row has an answer token within max_length" if emptied else "there are no rows",
            instead="raise max_length",
        ) from None
    return Encoded(tuple(all_ids), tuple(all_labels), truncated, emptied)


def _encode_row(row: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    text, spans = rendered_spans(tokenizer, row)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        edges = [edge for span in spans for edge in (span.start, span.end)]
        # A token that lies across an edge would be half header, half answer: never seen in generation.
        if not any(start < edge < end for edge in edges for start, end in offsets):
            inside = [any(s.start <= start and end <= s.end for s in spans) for start, end in offsets]
            return list(ids), inside
    ids, inside, at = [], [], 0
    for span in spans:
        for start, end, answer in ((at, span.start, False), (span.start, span.end, True)):
            piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
            ids += piece
            inside += [answer] * len(piece)
        at = span.end
    rest = tokenizer(text[at:], add_special_tokens=False)["input_ids"] if text[at:] else []
    return ids + rest, inside + [False] * len(rest)
