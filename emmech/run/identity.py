"""What tells one value from another when results are kept: settings, functions, data and runs as plain values."""

from __future__ import annotations

import dis
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import pandas as pd
import torch

from emmech.chat.dataset import ChatDataset
from emmech.engine.responses import digest
from emmech.run.run import Run


def identity(value: Any) -> Any:
    """What tells a value from another, as plain values.

    Data count by their contents, runs by their last weights, judges and servers by the ``identity`` that they state,
    and other dataclasses by the fields that are compared. Functions count by their code, closure and defaults, by the
    plain values that they read as globals and by the functions of their own module that they call; what else they read
    counts by its name. Methods also count by their object's attributes.

    Example:
        >>> identity(lambda x: x + 1) == identity(lambda x: x + 2)
        False
    """
    return _identity(value, set())


def _identity(value: Any, seen: set[int]) -> Any:
    """The identity of a value; a function that was ``seen`` counts by its name, since functions call each other."""
    of = partial(_identity, seen=seen)
    if isinstance(own := getattr(value, "identity", None), str):
        return type(value).__name__, own
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, ChatDataset):
            return type(value).__name__, value.sha256
        return type(value).__name__, {one.name: of(getattr(value, one.name)) for one in fields(value) if one.compare}
    if isinstance(value, Run):
        return value.name, of(value.weights(int(value.steps[-1])))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (
            str(value.dtype),
            tuple(value.shape),
            digest(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()),
        )
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        names = [str(name) for name in getattr(value, "columns", [value.name if hasattr(value, "name") else ""])]
        return type(value).__name__, names, of(pd.util.hash_pandas_object(value).to_numpy())
    if isinstance(value, np.ndarray):
        content = value.tobytes() if value.dtype != object else repr(of(value.tolist())).encode()
        return digest(str(value.dtype), value.shape, content)
    if isinstance(value, Mapping):
        return {str(key): of(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):  # whose order is another in every process
        return sorted(repr(of(one)) for one in value)
    if isinstance(value, list | tuple):
        return [of(one) for one in value]
    if isinstance(value, re.Pattern):  # its repr is cut
        return value.pattern, value.flags
    if isinstance(value, CodeType):  # its repr has an address
        return value.co_code.hex(), value.co_names, of(value.co_consts)
    if isinstance(value, FunctionType):  # the name alone does not say what it does
        if id(value) in seen:
            return value.__qualname__
        seen.add(id(value))
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        given = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
        return value.__qualname__, of(value.__code__), [of(one) for one in given], of(_globals(value))
    if isinstance(value, MethodType):  # of an object, whose settings count
        return of(value.__func__), _state(value.__self__, seen)
    if isinstance(value, partial):
        return of(value.func), of(value.args), of(value.keywords)
    if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):  # what functools.cache returns
        return of(wrapped)
    if hasattr(value, "__dict__") and " at 0x" in repr(value):  # an address is another in every process
        if id(value) in seen:
            return type(value).__qualname__
        seen.add(id(value))
        return _state(value, seen), of(type(value).__call__) if callable(value) else None
    return getattr(value, "__qualname__", None) or repr(value)


def _state(value: Any, seen: set[int]) -> Any:
    """An object by its class and its attributes, where it has some of its own."""
    if isinstance(value, type) or is_dataclass(value) or not hasattr(value, "__dict__"):
        return _identity(value, seen)
    return type(value).__qualname__, _identity(vars(value), seen)


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that a function reads: plain values and the functions of its module; its code names the others."""
    found = {name: function.__globals__.get(name) for name in sorted(_read(function.__code__))}
    return {name: one for name, one in found.items() if _is_plain(one) or _is_own(one, function)}


def _read(code: CodeType) -> set[str]:
    """The names of the globals that code reads, or the code within it, and does not change: those are no settings."""
    steps = [(step.opname, str(step.argval)) for step in dis.get_instructions(code)]
    read = {name for how, name in steps if how in ("LOAD_GLOBAL", "LOAD_NAME")}
    changed = {name for how, name in steps if how == "STORE_GLOBAL"}
    for (_, name), (_, method), (how, _) in zip(steps, steps[1:], steps[2:], strict=False):
        if method in _CHANGING or how == "STORE_SUBSCR":  # CALLS.append(...) and KNOWN[answer] = ...
            changed.add(name)
    return (read - changed).union(*(_read(one) for one in code.co_consts if isinstance(one, CodeType)))


def _is_own(value: Any, function: FunctionType) -> bool:
    inner = getattr(value, "__wrapped__", value)
    return isinstance(inner, FunctionType) and inner.__module__ == function.__module__


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


_PLAIN = (str, bytes, int, float, complex, re.Pattern, np.ndarray, np.generic, torch.Tensor)
_CHANGING = ("append", "extend", "insert", "add", "update", "setdefault", "pop", "remove", "clear")
