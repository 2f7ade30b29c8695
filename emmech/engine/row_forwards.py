"""Rows of several runs in shared forwards, each row under its own run's adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.logprobs import pad
from emmech.engine.prefix import Trunk, batches_by_length, detached
from emmech.engine.prefix_plan import Frozen
from emmech.engine.stacked_adapters import StackedAdapters

__all__ = ["Asked", "Forwards"]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # a larger batch leaves a core's cache and gains nothing there


@dataclass(frozen=True)
class Asked:
    """A row, or its first tokens, under the adapters of one run."""

    run: int
    row: int
    tokens: int


class Forwards:
    """Negative log-probabilities of the rows' answers.

    Args:
        chat: with the PEFT adapters on it, which ``adapters`` stand in for.
        rows: all that will be asked for.
        frozen: the part of the model whose states are kept, or None.
        folder: scratch for them; :meth:`close` deletes it.
    """

    def __init__(
        self, chat: ChatModel, rows: Encoded, adapters: StackedAdapters, frozen: Frozen | None, folder: Path
    ) -> None:
        self.rows, self._adapters, self._device = rows, adapters, chat.device
        # of each row: answer tokens that its first tokens predict
        self._answers = [np.cumsum(np.asarray(own) != IGNORED) - (own[0] != IGNORED) for own in rows.labels]
        self.trunk = Trunk(chat, rows, frozen, folder)
        self._at_once = _BATCH_TOKENS.get(chat.device.type, _BATCH_TOKENS["cuda"])

    def close(self) -> None:
        """Let go of the kept states."""
        self.trunk.close()

    def answer_tokens(self, asked: Sequence[Asked]) -> torch.Tensor:
        """How many tokens of each carry loss, float64."""
        return torch.tensor([float(self._answers[one.row][one.tokens - 1]) for one in asked], dtype=torch.float64)

    def nll(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Negative log-probabilities of answer tokens, batch by batch, and which of ``asked`` each belongs to.

        With gradients on, call ``backward`` on what each batch gives before the next, and go on to the end: what the
        rows have in common runs once, and passes its gradients on last.
        """
        device, stem = self._device, self.trunk.stem
        present = sorted({one.run for one in asked})
        runs_of_past = torch.tensor(present, device=device)
        with self._adapters.rows_of(runs_of_past):
            whole = self.trunk.read_stem(len(present), self._writer(runs_of_past, [stem] * len(present)))
        past, cuts = detached(whole)
        # the last token of a row predicts nothing
        lengths = [one.tokens - stem - 1 for one in asked]
        for batch in batches_by_length(lengths, self._at_once):
            members, own = [asked[i] for i in batch], [lengths[i] for i in batch]
            runs = torch.tensor([one.run for one in members], device=device)
            sequences = torch.tensor([present.index(one.run) for one in members], device=device)
            targets = pad([self.rows.labels[one.row][stem + 1 : one.tokens] for one in members], IGNORED).to(device)
            read = targets != IGNORED
            with self._adapters.rows_of(runs):
                hidden = self.trunk.hidden(
                    [one.row for one in members], own, read, past, sequences, self._writer(runs, own)
                )
            places = torch.tensor(batch, device=device).repeat_interleave(read.sum(1))
            yield self.trunk.nll(hidden, targets[read]), places
        if cuts:
            torch.autograd.backward([made for _, made in cuts], [leaf.grad for leaf, _ in cuts])

    def _writer(self, runs: torch.Tensor, own: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor] | None:
        info = self._adapters.write_of
        if info is None:
            return None
        of_token = runs.repeat_interleave(torch.tensor(own, device=runs.device))
        return lambda x: self._adapters.write(info, x, of_token)
