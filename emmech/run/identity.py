"""What tells one value from another when results are kept: settings, functions, data and runs as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from emmech.chat.dataset import ChatDataset
from emmech.engine.responses import digest
from emmech.run.run import Run


def identity(value: Any) -> Any:
    """What tells a value from another, as plain values.

    Data count by their contents, runs by their last weights, functions by their code, closure and defaults, judges and
    servers by the ``identity`` that they state, and other dataclasses by the fields that are compared.

    Example:
        >>> identity(lambda x: x + 1) == identity(lambda x: x + 2)
        False
    """
    if isinstance(own := getattr(value, "identity", None), str):
        return type(value).__name__, own
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, ChatDataset):
            return type(value).__name__, value.sha256
        return type(value).__name__, {
            one.name: identity(getattr(value, one.name)) for one in fields(value) if one.compare
        }
    if isinstance(value, Run):
        return value.name, identity(value.weights(int(value.steps[-1])))
    if isinstance(value, np.ndarray):
        return digest(value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return {str(key): identity(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):  # whose order is another in every process
        return sorted(repr(identity(one)) for one in value)
    if isinstance(value, list | tuple):
        return [identity(one) for one in value]
    if isinstance(value, CodeType):  # its repr has an address
        return value.co_code.hex(), value.co_names, identity(value.co_consts)
    if isinstance(value, FunctionType):  # the name alone does not say what it does
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        around = [identity(one) for one in (*cells, *(value.__defaults__ or ())) if one is not value]
        return value.__qualname__, identity(value.__code__), around
    return getattr(value, "__qualname__", None) or repr(value)
