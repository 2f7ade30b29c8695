"""Which conversation each row of a forward pass belongs to, for interventions that differ by row.

Sampling sorts prompts by length, reads one only once for all its samples, and lets finished rows leave; scoring sorts
by length. An intervention with one coefficient per conversation must then be told which rows are before it, or it would
steer the wrong ones in silence. So whoever reorders rows announces them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Int

__all__ = ["Rows", "announced_rows", "announcing"]


@dataclass(frozen=True)
class Rows:
    """The conversation that each row of a batch belongs to, and how many there are in all."""

    conversation: Int[torch.Tensor, " batch"]
    total: int


_ANNOUNCED: ContextVar[Rows | None] = ContextVar("rows", default=None)


@contextmanager
def announcing(conversation: torch.Tensor | Sequence[int], total: int) -> Iterator[None]:
    """During the block, row i of every forward pass belongs to ``conversation[i]``."""
    token = _ANNOUNCED.set(Rows(torch.as_tensor(conversation, dtype=torch.long), total))
    try:
        yield
    finally:
        _ANNOUNCED.reset(token)


def announced_rows() -> Rows | None:
    """The rows of the present forward pass; None where they are the caller's own batch."""
    return _ANNOUNCED.get()
