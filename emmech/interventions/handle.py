"""What every change to a model returns: a handle that is also a context manager, and that undoes it exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from emmech.errors import EmmechError

if TYPE_CHECKING:
    from torch import nn

    from emmech.chat.model import ChatModel

__all__ = ["Handle", "chat_of", "undoable"]

# for every place that is changed now: the value before each change, oldest first
_BEFORE: WeakKeyDictionary[nn.Module, dict[str, list[list[Any]]]] = WeakKeyDictionary()


class Handle:
    """A live change to a model, in force from the call that made it until :meth:`remove` or the end of a ``with``.

    Afterwards the model is bit-identical to what it was, also when the block ends in an exception.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> up = emmech.Direction(np.ones((chat.n_layers, chat.d_model)))
        >>> with emmech.steer(chat, up, 0.5, layer=2) as steered:
        ...     steered.active
        True
        >>> steered.active
        False
    """

    def __init__(self, chat: ChatModel, description: str, undo: Sequence[Callable[[], Any]]) -> None:
        self.chat = chat
        self.description = description
        self._undo = list(undo)
        self._entered = False
        self.active = True

    def remove(self) -> None:
        """Take the change back. Harmless when it is gone already."""
        self.active = False
        while self._undo:
            self._undo.pop()()  # in reverse: a tensor changed twice gets its first value back last

    def check_active(self, asked: str) -> None:
        """Refuse to act through a handle that is closed.

        Raises:
            EmmechError: it was removed.
        """
        if not self.active:
            raise EmmechError(
                asked,
                self.description,
                "it was removed, so the model would answer as if it had never been",
                "generate inside the with block, or make the change anew",
            )

    def generate(self, prompts: Sequence[Any], **kwargs: Any) -> Any:
        """Sample answers from the changed model: :func:`emmech.engine.sample.sample` with its arguments.

        An intervention of one row each has one per prompt there, for all its samples.

        Raises:
            EmmechError: the change is over.
        """
        self.check_active("generate with a change that is over")
        from emmech.engine.sample import sample

        return sample(self.chat, prompts, **kwargs)

    def __enter__(self) -> Self:
        self.check_active("enter a context that is over")
        if self._entered:
            raise EmmechError(
                "enter a context twice",
                self.description,
                "the change is in force already, and would end with the inner block",
                "one with block, or a second handle",
            )
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{self.description} ({'active' if self.active else 'removed'})"


def chat_of(model: Any) -> ChatModel:
    """The chat model behind a ChatModel, a Run (its last step) or a transformers model.

    Raises:
        EmmechError: a name, which would load a model that nobody else holds.
    """
    from emmech.chat.model import load_model

    if isinstance(model, str | os.PathLike):
        raise EmmechError(
            "change a model",
            f"{model!r}",
            "a name loads a new model, and the change would be to one that you do not hold",
            f"chat = emmech.load_model({model!r}), then pass chat",
        )
    if hasattr(model, "manifest") and hasattr(model, "model"):
        raise EmmechError(
            "change a model",
            f"the run {getattr(model, 'name', '')!r}",
            "a run makes a new model at each call, and the change would be to one that you do not hold",
            "chat = run.model(step), then pass chat",
        )
    return load_model(model)


def undoable(owner: nn.Module, place: str, before: Any, put: Callable[[Any], Any]) -> Callable[[], None]:
    """The way back from a change that was made in place, right in any order of removal.

    Changes of one place cover each other. When an older one is taken back under a newer one, the newer one's effect
    stays, and its own way back leads to the older value; after the last removal the first value is there, bit for bit.

    Args:
        owner: the module that was changed.
        place: what of it.
        before: the value that the change covered.
        put: puts a value there.
    """
    stack = _BEFORE.setdefault(owner, {}).setdefault(place, [])
    entry = [before]
    stack.append(entry)

    def take_back() -> None:
        index = next(i for i, one in enumerate(stack) if one is entry)
        if index == len(stack) - 1:
            put(entry[0])
        else:
            stack[index + 1][0] = entry[0]
        del stack[index]

    return take_back
