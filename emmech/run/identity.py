"""What tells one value from another when results are kept: settings, functions, data and runs as plain values."""

from __future__ import annotations

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

    Data count by their contents, runs by their last weights, functions by their code, closure and defaults, methods
    also by their object's attributes, judges and servers by the ``identity`` that they state, and other dataclasses
    by the fields that are compared.

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
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (
            str(value.dtype),
            tuple(value.shape),
            digest(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()),
        )
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        names = [str(name) for name in getattr(value, "columns", [value.name if hasattr(value, "name") else ""])]
        return type(value).__name__, names, identity(pd.util.hash_pandas_object(value).to_numpy())
    if isinstance(value, np.ndarray):
        content = value.tobytes() if value.dtype != object else repr(identity(value.tolist())).encode()
        return digest(str(value.dtype), value.shape, content)
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
        given = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
        return value.__qualname__, identity(value.__code__), [identity(one) for one in given if one is not value]
    if isinstance(value, MethodType):  # of an object, whose settings count
        return identity(value.__func__), _state(value.__self__)
    if isinstance(value, partial):
        return identity(value.func), identity(value.args), identity(value.keywords)
    return getattr(value, "__qualname__", None) or repr(value)


def _state(value: Any) -> Any:
    """An object by its class and its attributes, where it has some of its own."""
    if isinstance(value, type) or is_dataclass(value) or not hasattr(value, "__dict__"):
        return identity(value)
    return type(value).__qualname__, identity(vars(value))
