"""What :func:`emmech.finetune` is given, checked before a model is touched or a folder made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from emmech.chat.model import ChatModel
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError, as_int
from emmech.run.run import Run

__all__ = ["check_margins", "check_start", "checked_seeds", "refuse_adapters"]


def checked_seeds(name: str, given: Any) -> int | list[int]:
    """One seed, or one for each of several runs.

    Raises:
        EmmechError: not whole, or negative.

    Example:
        >>> checked_seeds("seed", range(3))
        [0, 1, 2]
    """
    if isinstance(given, Iterable) and not isinstance(given, str):
        return [as_int("fine-tune", name, one, least=0) for one in given]
    return as_int("fine-tune", name, given, least=0)


def check_start(start: Any) -> None:
    """Refuse what is neither None nor a run and a step of it.

    Raises:
        EmmechError: something else, or a step that was not recorded.
    """
    if start is None:
        return
    if not isinstance(start, tuple | list) or len(start) != 2 or not isinstance(start[0], Run):
        raise EmmechError(
            "go on from a run",
            f"start={start!r}"[:120],
            "it is a run and one of its steps",
            "start=(run, int(run.steps[-1])), or emmech.realign(run, data)",
        )
    start[0].check_step(start[1])


def check_margins(margins: Any) -> None:
    """Refuse what is neither None nor named lists of pairs.

    Raises:
        EmmechError: something else.
    """
    fine = isinstance(margins, Mapping) and all(
        isinstance(pairs, Collection) and all(isinstance(pair, MarginPair) for pair in pairs)
        for pairs in margins.values()
    )
    if margins is not None and not fine:
        raise EmmechError(
            "measure margins",
            f"margins={margins!r}"[:120],
            "they are lists of MarginPair, each with a name",
            'margins={"broad": [MarginPair(question, misaligned, aligned)]}, or {} for none',
        )


def refuse_adapters(chat: ChatModel) -> None:
    """Refuse a model that has adapters already.

    Raises:
        EmmechError: with their names.
    """
    from emmech.engine.adapters import adapter_layers

    found = [info.name for info, _, _ in adapter_layers(chat.model)]
    if found:
        raise EmmechError(
            f"fine-tune {chat.name}",
            f"a model with adapters on {found[:3]}",
            "a second adapter would be stacked on the first",
            "model.unload() for the base, model.merge_and_unload() to keep its effect, or "
            "emmech.realign(run, data) to go on training it",
        )
