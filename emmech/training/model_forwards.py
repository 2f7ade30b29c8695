"""Rows by the model's own forward: for full fine-tuning, dropout, and models that cannot be run block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.logprobs import pad, unembed
from emmech.engine.row_forwards import Asked
from emmech.engine.stacked_adapters import StackedAdapters

__all__ = ["ModelForwards"]


class ModelForwards:
    """Negative log-probabilities of the rows' answers; see :class:`emmech.engine.row_forwards.Forwards`.

    While gradients are taken the model is in training mode, so that its dropout acts; otherwise it is not.

    Args:
        rows: all that will be asked for.
        adapters: of the runs, or None in full fine-tuning.
        batch_size: rows in a forward.
    """

    def __init__(self, chat: ChatModel, rows: Encoded, adapters: StackedAdapters | None, batch_size: int) -> None:
        self.rows, self._chat, self._adapters, self._batch_size = rows, chat, adapters, batch_size

    def close(self) -> None:
        """Nothing is kept."""

    def answer_tokens(self, asked: Sequence[Asked]) -> torch.Tensor:
        """How many tokens of each carry loss, float64."""
        counts = [sum(label != IGNORED for label in self.rows.labels[one.row][1 : one.tokens]) for one in asked]
        return torch.tensor(counts, dtype=torch.float64)

    def nll(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Negative log-probabilities of answer tokens, batch by batch, and which of ``asked`` each belongs to."""
        chat = self._chat
        # rows of like length share a batch: little of it is padding
        order = sorted(range(len(asked)), key=lambda i: asked[i].tokens)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            members = [asked[i] for i in batch]
            ids = pad([self.rows.input_ids[one.row][: one.tokens] for one in members], 0).to(chat.device)
            mask = pad([[1] * one.tokens for one in members], 0).to(chat.device)
            targets = pad([self.rows.labels[one.row][1 : one.tokens] for one in members], IGNORED).to(chat.device)
            runs = torch.tensor([one.run for one in members], device=chat.device)
            chat.base.train(torch.is_grad_enabled())
            with self._adapters.rows_of(runs) if self._adapters else contextlib.nullcontext():
                hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            read = targets != IGNORED
            logits = unembed(chat, hidden[:, :-1][read]).float()
            places = torch.tensor(batch, device=chat.device).repeat_interleave(read.sum(1))
            yield torch.nn.functional.cross_entropy(logits, targets[read].to(logits.device), reduction="none"), places
