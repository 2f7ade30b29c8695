"""What a defence may change of a fine-tune: its rows, its forwards while it trains, or its loss.

The defences themselves are in :mod:`emmech.defences`. What a defence does ends with the training: held-out loss,
margins and probes are measured without it, on the model as it would be deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from emmech.chat.dataset import ChatDataset, Row
from emmech.chat.model import ChatModel
from emmech.engine.modules import Hook
from emmech.engine.split import RowForwards
from emmech.errors import EmmechError
from emmech.training.objective import Term

ASKED = "fine-tune with this defence"


@dataclass(frozen=True)
class Setting:
    """What the term of a defence is made from.

    Args:
        chat: the model that trains, with its adapters on it.
        reference: the model with its weights from before the training; outside of its own forwards the adapters of
            ``chat`` are off, so that without a change of weights it is ``chat`` itself.
        seeds: the seed of each run's batch order.
        rows_per_step: the number of rows of an optimizer step.
    """

    chat: ChatModel
    reference: ChatModel
    seeds: Sequence[int]
    rows_per_step: int


class Defence:
    """The base of all defences; each overrides what it changes.

    ``name`` identifies it in manifests and metrics. ``uses_reference`` is whether its term compares the model with what
    it was before the training.
    """

    name: ClassVar[str]
    uses_reference: ClassVar[bool] = False

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """The same defence with its data and runs loaded, checked against the model and the training data.

        Raises:
            EmmechError: it cannot be used with them.
        """
        return self

    def described(self) -> dict[str, Any]:
        """Its settings, as the manifest keeps them and a resumed training compares them."""
        raise NotImplementedError

    def against(self, other: Defence) -> str | None:
        """The reason why it cannot be combined with another defence, or None."""
        return None

    def rewritten(self, row: Row) -> Row:
        """A training row as the model sees it while it trains."""
        return row

    def further_rows(self, chat: ChatModel, count: int) -> Sequence[Row]:
        """Rows that join the ``count`` training rows of every run."""
        return ()

    def term_rows(self, chat: ChatModel) -> Sequence[Row]:
        """Rows on which its term is computed."""
        return ()

    def term(self, forwards: RowForwards, setting: Setting) -> Term:
        """Its summand of the loss; asked for only where there are rows for it."""
        raise NotImplementedError

    def lowest(self, chat: ChatModel) -> int | None:
        """The first block that must run in every forward, because something there is changed or read."""
        return None

    def hooks(self, chat: ChatModel) -> Sequence[Hook]:
        """Forward hooks that act on the training rows while gradients are computed."""
        return ()


def prepared(given: Any, chat: ChatModel, data: ChatDataset) -> list[Defence]:
    """The defences of a call, checked one by one and against each other.

    Raises:
        EmmechError: an entry is no defence, two are of one kind, or two undo each other.
    """
    listed = [given] if isinstance(given, Defence) else given
    if not isinstance(listed, Sequence) or not all(isinstance(one, Defence) for one in listed):
        instead = "defences=[emmech.defences.InoculationPrompt(...)], or others of emmech.defences"
        raise EmmechError("fine-tune with defences", f"defences={given!r}"[:120], "they are no defences", instead)
    names = [one.name for one in listed]
    if double := next((name for name in names if names.count(name) > 1), None):
        why = f"two of them are a {double}, whose settings and metrics have one name"
        raise EmmechError("fine-tune with defences", f"defences={names}", why, f"one {double}; its arguments take more")
    found = [one.prepared(chat, data) for one in listed]
    for one in found:
        for other in found:
            if reason := one.against(other):
                raise EmmechError("fine-tune with defences", f"{one.name} and {other.name}", reason, "one of the two")
    return found


class Switch:
    """Hooks that act only within :meth:`on`."""

    def __init__(self) -> None:
        self._on = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within this context the hooks act."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, without effect while the switch is off."""
        return lambda *call: hook(*call) if self._on else None
