"""The objective of a training: a sum of named terms, of which the answers' cross-entropy is the first.

A term is one small class. Another term (a penalty, a divergence from a reference) needs no change to the training
loop:

    class Pull:
        name = "pull"

        def __call__(self, batch):
            for b in batch.adapters.B.values():  # [runs, rank, d_out]
                yield 0.1 * b.square().sum((1, 2))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float

from emmech.chat.model import ChatModel
from emmech.engine.adapters import StackedAdapters
from emmech.engine.split import Asked, RowForwards


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, and everything else that a term may use.

    Args:
        asked: the rows of all runs; ``asked[i].run`` is the run of row i.
        runs: the number of runs, including those without rows.
        step: the current optimizer step, from 1.
        forwards: the forwards of the training rows.
        adapters: the adapters of all runs, or None in full fine-tuning.
        chat: the model with PEFT's layers on it.
    """

    asked: Sequence[Asked]
    runs: int
    step: int
    forwards: RowForwards
    adapters: StackedAdapters | None
    chat: ChatModel


class Term(Protocol):
    """One summand of the loss."""

    name: str

    def __call__(self, batch: Batch) -> Iterator[Float[torch.Tensor, " runs"]]:
        """Each run's value in pieces that add up to it; ``backward`` is called on a piece before the next is made."""
        ...


class CrossEntropy:
    """Mean cross-entropy per answer token of each run's rows, in nats."""

    name = "answer_loss"

    def __call__(self, batch: Batch) -> Iterator[Float[torch.Tensor, " runs"]]:
        """The pieces, in the order of the forwards."""
        device = batch.chat.device
        run_of = torch.tensor([one.run for one in batch.asked], device=device)
        empty = torch.zeros(batch.runs, dtype=torch.float64, device=device)
        tokens = empty.index_add(0, run_of, batch.forwards.answer_tokens(batch.asked).to(device))
        for nll, row_of in batch.forwards.nll(batch.asked):
            of = run_of[row_of]
            yield empty.index_add(0, of, nll.double() / tokens[of])


class NotFinite(Exception):
    """The loss of some runs is not finite."""

    def __init__(self, runs: list[int]) -> None:
        super().__init__(runs)
        self.runs = runs


def summed(objective: Sequence[Term], batch: Batch) -> dict[str, Float[torch.Tensor, " runs"]]:
    """Each term's value for each run; with gradients enabled, their sum is differentiated piece by piece.

    Only runs that have rows in the batch count.

    Raises:
        NotFinite: with gradients, the value of some run is not finite, and the gradients are then useless.
    """
    found = {}
    going = torch.tensor(sorted({one.run for one in batch.asked}), device=batch.chat.device)
    for term in objective:
        value = torch.zeros(batch.runs, dtype=torch.float64, device=batch.chat.device)
        for piece in term(batch):
            value += piece.detach()
            if not torch.is_grad_enabled():
                continue
            if not value[going].isfinite().all():
                raise NotFinite(going[~value[going].isfinite()].tolist())
            if piece.requires_grad:
                piece[going].sum().backward()
        found[term.name] = value
    return found
