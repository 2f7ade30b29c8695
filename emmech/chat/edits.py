"""What is changing a model's activations now, and which conversation each row of a forward pass belongs to.

Interventions register here what a hook cannot tell. Sampling sorts prompts by length, reads one once for all its
samples, and drops finished rows; scoring sorts by length. An intervention with one coefficient per conversation must
then be told which rows it sees, or it would steer the wrong ones in silence: functions that reorder rows announce them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import nn

_LIVE: WeakKeyDictionary[nn.Module, list[LiveEdit]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LiveEdit:
    """One edit in force; its state is looked up when it matters, since its coefficient may change."""

    by_row: Callable[[], bool]  # whether it differs by row; two conversations then never share a prompt's reading
    state: Callable[[], str]  # a text of all that it does, equal for equal edits
    first: int = 0  # the first block whose output it can change


def register(model: nn.Module, edit: LiveEdit) -> Callable[[], None]:
    """Register an edit of the model as in force from now on; returns a function that undoes this."""
    _LIVE.setdefault(model, []).append(edit)
    return lambda: _LIVE[model].remove(edit)


def live_edits(model: nn.Module) -> tuple[LiveEdit, ...]:
    """The edits in force, in the order they were made."""
    return tuple(_LIVE.get(model, ()))


@dataclass(frozen=True)
class AnnouncedRows:
    """The conversation that each row of a batch belongs to, and how many there are in all."""

    conversation: Int[torch.Tensor, " batch"]
    total: int


_ANNOUNCED: ContextVar[AnnouncedRows | None] = ContextVar("rows", default=None)


@contextmanager
def announcing(conversation: torch.Tensor | Sequence[int], total: int) -> Iterator[None]:
    """During the block, row i of every forward pass belongs to ``conversation[i]``."""
    token = _ANNOUNCED.set(AnnouncedRows(torch.as_tensor(conversation, dtype=torch.long), total))
    try:
        yield
    finally:
        _ANNOUNCED.reset(token)


def announced_rows() -> AnnouncedRows | None:
    """The rows of the present forward pass; None where they are the caller's own batch."""
    return _ANNOUNCED.get()
