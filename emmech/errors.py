"""The one exception of emmech, and the one shape of its message.

A message says what was asked, what was given, why that cannot work, and the nearest valid choice. An
:class:`EmmechError` hides the exception that it replaces, so that a traceback ends at the caller's own line instead of
inside torch. Arguments of public functions are checked first: a wrong number would otherwise fail late, inside numpy or
torch, where nothing says which argument it was. Numbers of any library pass: a step read back from a data frame may
well be ``numpy.float64(250.0)``. What our own functions pass to each other is typed, not checked again.
"""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

_LONGEST = 600  # characters of one part of a message


class EmmechError(Exception):
    """An error that says what emmech cannot do and what to ask for instead.

    Each part of the message is cut at 600 characters, and what a terminal could not print is escaped.

    Args:
        asked: what was attempted, as a phrase that follows "cannot": ``"read the dataset advice.jsonl"``.
        given: the offending value as the caller would recognise it (shape, dtype, layer, step, file:line).
        why: the reason, one sentence.
        instead: the nearest valid choice, one sentence.

    Example:
        >>> from emmech.errors import EmmechError
        >>> print(EmmechError("steer at layer 40", "layer=40", "the model has 24 layers (0..23)", "layer=23 or lower"))
        cannot steer at layer 40
          given:   layer=40
          because: the model has 24 layers (0..23)
          instead: layer=23 or lower
    """

    def __init__(self, asked: str, given: object = None, why: str = "", instead: str | None = None) -> None:
        self.asked, self.given, self.why, self.instead = asked, given, why, instead
        super().__init__(str(self))
        self.__suppress_context__ = True  # the error inside torch or numpy does not help the caller

    def __str__(self) -> str:
        lines = [f"cannot {_bounded(self.asked)}"]
        if self.given is not None:
            lines.append(f"  given:   {_bounded(self.given)}")
        lines.append(f"  because: {_bounded(self.why)}")
        if self.instead is not None:
            lines.append(f"  instead: {_bounded(self.instead)}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return EmmechError, (self.asked, self.given, self.why, self.instead)


def shown(value: Any) -> str:
    """The representation of a value of any size and depth, shortened as it is built.

    Example:
        >>> shown([[list(range(1000))] * 3, "a" * 1000])[:60]
        '[[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...], [0, 1, 2, 3, '
    """
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxdict = short.maxlist = short.maxtuple = short.maxset = short.maxfrozenset = short.maxarray = 12
    short.maxstring = short.maxother = short.maxlong = 120
    return short.repr(value)


def refusal(asked: str, name: str, value: Any, why: str, instead: str | None = None) -> EmmechError:
    """The error about one argument, with ``name=value``, cut at 120 characters, as what was given.

    Example:
        >>> refusal("steer at a layer", "layer", 40, "the model has 24 layers (0..23)").given
        'layer=40'
    """
    return EmmechError(asked, f"{name}={value!r}"[:120], why, instead)


def broken_text(text: str) -> str:
    """The reason why a text cannot be written as UTF-8, or "".

    Example:
        >>> broken_text("a\\ud83d")
        'half of a surrogate pair (U+D83D) at character 1'
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
    return ""


def _bounded(part: object) -> str:
    text = shown(part) if isinstance(part, list | tuple | set | frozenset | Mapping) else str(part)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
    return text.encode(errors="backslashreplace").decode()


def closest(name: str, choices: Iterable[str]) -> str:
    """A suggestion for a mistyped name: ``"did you mean 'sport'? choices: finance, medical, sport"``.

    Example:
        >>> closest("sprot", ["medical", "finance", "sport"])
        "did you mean 'sport'? choices: finance, medical, sport"
    """
    names = sorted(str(choice) for choice in choices)
    listing = f"choices: {', '.join(names)}" if names else "there are none"
    match = difflib.get_close_matches(str(name)[:200], names, n=1)
    return f"did you mean '{match[0]}'? {listing}" if match else listing


def one_of(asked: str, name: str, value: Any, choices: Iterable[str], *, why: str = "") -> str:
    """Check that a value is one of several names, and return it.

    Args:
        asked: what cannot be done otherwise, as in :class:`EmmechError`.
        name: the name of the argument.
        why: the reason for the refusal, where the default says too little.

    Raises:
        EmmechError: the value is none of the names; the nearest is suggested.

    Example:
        >>> one_of("draw", "kind", "lines", ["line", "bar"])
        Traceback (most recent call last):
        emmech.errors.EmmechError: cannot draw
          given:   kind='lines'
          because: kind is one of 2 names, and this is none of them
          instead: did you mean 'line'? choices: bar, line
    """
    names = list(choices)
    if isinstance(value, str) and value in names:
        return value
    reason = why or f"{name} is one of {len(names)} names, and this is none of them"
    raise refusal(asked, name, value, reason, closest(str(value), names))


def as_int(asked: str, name: str, value: Any, *, least: int | None = None) -> int:
    """One whole number, at least ``least``.

    Args:
        asked: what cannot be done otherwise, as in :class:`EmmechError`.
        name: the name of the argument.

    Raises:
        EmmechError: the value is anything else, including ``True``.

    Example:
        >>> as_int("train", "seed", 3.0)
        3
        >>> as_int("train", "seed", 1.5)
        Traceback (most recent call last):
        emmech.errors.EmmechError: cannot train
          given:   seed=1.5
          because: seed is a whole number
          instead: seed=1
    """
    if _is_whole(value) and (least is None or value >= least):
        return int(value)
    bound = "" if least is None else f", at least {least}"
    instead = f"{name}={1 if least is None else max(1, least)}"
    raise refusal(asked, name, value, f"{name} is a whole number{bound}", instead)


def as_ints(asked: str, name: str, values: Any) -> list[int]:
    """Whole numbers; a single number becomes a list of one, and the list may be empty.

    Example:
        >>> as_ints("sweep", "steps", range(0, 30, 10))
        [0, 10, 20]
    """
    given = _listed(values)
    if given is None or not all(map(_is_whole, given)):
        raise refusal(asked, name, values, f"{name} are whole numbers", f"{name}=[0, 10, 20]")
    return [int(value) for value in given]


def as_float(asked: str, name: str, value: Any) -> float:
    """One finite number.

    Example:
        >>> as_float("scan", "scale", 5)
        5.0
    """
    if _is_number(value) and math.isfinite(value):
        return float(value)
    raise refusal(asked, name, value, f"{name} is a finite number", f"{name}=1.0")


def as_floats(asked: str, name: str, values: Any) -> list[float]:
    """Finite numbers, at least one; a single number becomes a list of one.

    Example:
        >>> as_floats("sweep", "scales", (1, 5, 10, 20))
        [1.0, 5.0, 10.0, 20.0]
    """
    given = _listed(values)
    if not given or not all(_is_number(value) and math.isfinite(value) for value in given):
        raise refusal(asked, name, values, f"{name} are finite numbers, at least one", f"{name}=(1,)")
    return [float(value) for value in given]


def check_texts(asked: str, name: str, texts: Any, *, strings: bool = True) -> None:
    """Refuse anything but a list of at least one text, which is a user's words or a conversation.

    A conversation is a list of messages with role and content, or a row ``{"messages": [...]}``.

    Args:
        strings: whether a user's words count as a text here, or only conversations.

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
        given = f"{name}[{at}]={one!r}" if several else f"{name}={texts!r}"
        why = f"{name} are a list of {kinds} (messages with role and content), at least one"
        instead = f'{name}=["Hello"]' if strings else f"{name}=emmech.load_chat(path).rows"
        raise EmmechError(asked, given[:120], why, instead)


def check_folder(asked: str, name: str, path: Any) -> None:
    """Refuse a value that names no folder."""
    if not isinstance(path, str | os.PathLike):
        raise refusal(asked, name, path, "a run is a folder", f'{name}="runs/mine"')
    if "\0" in str(path):
        raise refusal(asked, name, path, "a path holds no NUL character", f'{name}="runs/mine"')


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
    """The entries of a value that may be one number, or None if it is neither a number nor a sequence."""
    if _is_number(values):
        return [values]
    if isinstance(values, str) or not isinstance(values, Iterable):
        return None
    return list(np.asarray(values).reshape(-1)) if hasattr(values, "shape") else list(values)
