"""What is changing a model's activations now, for whoever must know: sampling, which must not mix up rows or files.

Interventions live in a higher room; they register here what a hook cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["LiveEdit", "live_edits", "register"]

_LIVE: WeakKeyDictionary[nn.Module, list[LiveEdit]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LiveEdit:
    """One edit in force, asked about itself when it matters, since its coefficient may change.

    Args:
        by_row: whether it differs by row; two conversations then never share a prompt's reading.
        state: a text of all that it does, equal for equal edits.
    """

    by_row: Callable[[], bool]
    state: Callable[[], str]


def register(model: nn.Module, edit: LiveEdit) -> Callable[[], None]:
    """Say that an edit of the model is in force from now on; returns what takes that back."""
    _LIVE.setdefault(model, []).append(edit)
    return lambda: _LIVE[model].remove(edit)


def live_edits(model: nn.Module) -> tuple[LiveEdit, ...]:
    """The edits in force, in the order they were made."""
    return tuple(_LIVE.get(model, ()))
