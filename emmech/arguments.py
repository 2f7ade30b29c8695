"""Numbers, texts, folders and runs that a caller gives, checked where they come in.

A wrong number is found out late, inside numpy or torch, where nothing says which argument it was. Here a string, a
fraction among steps or a NaN among scales is refused by the argument's own name. Numbers of any library pass: a step
read back from a data frame may well be ``numpy.float64(250.0)``.

These are for arguments of public functions. What our own functions hand to each other is typed, not checked twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from emmech.errors import EmmechError

__all__ = ["check_folder", "check_texts", "finite", "finites", "not_a_run", "whole", "wholes"]


def whole(asked: str, name: str, value: Any, *, least: int | None = None) -> int:
    """One whole number, at least ``least``.

    Args:
        asked: what cannot be done otherwise, as in :class:`EmmechError`.
        name: of the argument.

    Raises:
        EmmechError: anything else, ``True`` among it.

    Example:
        >>> whole("train", "seed", 3.0)
        3
        >>> whole("train", "seed", 1.5)
        Traceback (most recent call last):
        emmech.errors.EmmechError: cannot train
          given:   seed=1.5
          because: seed is a whole number
          instead: seed=1
    """
    if _is_whole(value) and (least is None or value >= least):
        return int(value)
    bound = "" if least is None else f", at least {least}"
    raise EmmechError(
        asked,
        given=f"{name}={value!r}"[:120],
        why=f"{name} is a whole number{bound}",
        instead=f"{name}={1 if least is None else max(1, least)}",
    ) from None


def wholes(asked: str, name: str, values: Any) -> list[int]:
    """Whole numbers; a single one is a list of one, and there may be none.

    Example:
        >>> wholes("sweep", "steps", range(0, 30, 10))
        [0, 10, 20]
    """
    given = _listed(values)
    if given is None or not all(map(_is_whole, given)):
        raise EmmechError(
            asked,
            given=f"{name}={values!r}"[:120],
            why=f"{name} are whole numbers",
            instead=f"{name}=[0, 10, 20]",
        ) from None
    return [int(value) for value in given]


def finite(asked: str, name: str, value: Any) -> float:
    """One finite number.

    Example:
        >>> finite("scan", "scale", 5)
        5.0
    """
    if _is_number(value) and math.isfinite(value):
        return float(value)
    raise EmmechError(
        asked, given=f"{name}={value!r}"[:120], why=f"{name} is a finite number", instead=f"{name}=1.0"
    ) from None


def finites(asked: str, name: str, values: Any) -> list[float]:
    """Finite numbers, at least one; a single one is a list of one.

    Example:
        >>> finites("sweep", "scales", (1, 5, 10, 20))
        [1.0, 5.0, 10.0, 20.0]
    """
    given = _listed(values)
    if not given or not all(_is_number(value) and math.isfinite(value) for value in given):
        raise EmmechError(
            asked,
            given=f"{name}={values!r}"[:120],
            why=f"{name} are finite numbers, at least one",
            instead=f"{name}=(1,)",
        ) from None
    return [float(value) for value in given]


def check_texts(asked: str, name: str, texts: Any, *, strings: bool = True) -> None:
    """Refuse what is not a list of texts: user's words or conversations, at least one.

    A conversation is a list of messages with role and content, or a row ``{"messages": [...]}``.

    Args:
        strings: whether user's words are texts here, or conversations alone.

    Example:
        >>> check_texts("read the next token", "prompts", "Hello")
        Traceback (most recent call last):
        emmech.errors.EmmechError: cannot read the next token
          given:   prompts='Hello'
          because: prompts are a list of strings or conversations (messages with role and content), at least one
          instead: prompts=["Hello"]
    """
    kinds = "strings or conversations" if strings else "conversations"
    several = isinstance(texts, Collection) and not isinstance(texts, str | Mapping) and len(texts) > 0
    for at, one in enumerate(texts if several else [texts]):
        if several and (_is_conversation(one) or (strings and isinstance(one, str))):
            continue
        raise EmmechError(
            asked,
            given=f"{name}[{at}]={one!r}"[:120] if several else f"{name}={texts!r}"[:120],
            why=f"{name} are a list of {kinds} (messages with role and content), at least one",
            instead=f'{name}=["Hello"]' if strings else f"{name}=emmech.load_chat(path).rows",
        ) from None


def check_folder(asked: str, name: str, path: Any) -> None:
    """Refuse what names no folder."""
    if not isinstance(path, str | os.PathLike):
        raise EmmechError(
            asked, given=f"{name}={path!r}"[:120], why="a run is a folder", instead=f'{name}="runs/mine"'
        ) from None


def not_a_run(asked: str, given: Any, *, name: str = "run") -> EmmechError:
    """The refusal of something else where a run is wanted."""
    return EmmechError(
        asked,
        given=f"{name}={given!r}"[:120],
        why="it is not a run",
        instead="emmech.load_run(folder), or emmech.Run.from_arrays(steps, B=...)",
    )


def _is_conversation(row: Any) -> bool:
    turns = row.get("messages") if isinstance(row, Mapping) else row
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return False
    return all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, Integral) or float(value).is_integer())


def _listed(values: Any) -> list[Any] | None:
    """The entries of what may be one number, or None where it is neither a number nor a row of things."""
    if _is_number(values):
        return [values]
    if isinstance(values, str) or not isinstance(values, Iterable):
        return None
    return list(np.asarray(values).reshape(-1)) if hasattr(values, "shape") else list(values)
