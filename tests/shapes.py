"""The check of shapes that the tests put on the package: jaxtyping's import hook with beartype, as equinox has it.

An array has to have the shape that its annotation names, and axes of one name have one size within a call. All else is
left to mypy: many tests give a wrong type on purpose, to see it refused by an :class:`EmmechError`, and a check of the
type before the call would hide that. Import this module before the package.

Only what has a shape is wrapped, and its arguments are checked once: a wrapper costs every call time, and a function
within a function the making of it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import jaxtyping
import numpy as np
import torch
from beartype import beartype
from beartype.vale import Is
from jaxtyping import AbstractArray, install_import_hook

# these take arrays of any kind, and refuse those of a wrong shape in words; what they return is annotated
CONVERTS = {"Direction.__init__", "Run.from_arrays", "differences_of_four"}
NoArray = Annotated[object, Is[lambda value: not isinstance(value, np.ndarray | torch.Tensor)]]


def has_shape(hint: Any) -> bool:
    """Whether a jaxtyping annotation is in a type hint."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))


def shape_of(hint: Any) -> Any:
    """A hint that asks arrays for their shape and everything else for nothing."""
    if not has_shape(hint):
        return Any
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return Union[(*filter(has_shape, members), NoArray)]


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The hints of a function that have shapes; a generator's own are of what it yields, and not checked."""
    found = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        try:
            read = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except NameError:  # of a name that only type checkers import
            continue
        if has_shape(read) and not (name == "return" and inspect.isgeneratorfunction(function)):
            found[name] = shape_of(read)
    return found


def check_shapes(function: Any) -> Any:
    """A function, method, property or dataclass whose calls check the shapes of arguments and results."""
    if isinstance(function, property):
        return property(*(one and check_shapes(one) for one in (function.fget, function.fset, function.fdel)))
    if isinstance(function, classmethod | staticmethod):
        return type(function)(check_shapes(function.__func__))
    if isinstance(function, type):
        if "__dataclass_fields__" in vars(function) and "__init__" in vars(function):
            function.__init__ = check_shapes(function.__init__)
        return function
    # generated constructors of dataclasses can share their code
    known = (function.__module__, function.__qualname__, getattr(function, "__code__", None))
    if known in WITHOUT or function.__qualname__ in CONVERTS:
        return function
    if not (hints := hints_of(function)):
        WITHOUT.add(known)
        return function
    written, function.__annotations__ = function.__annotations__, hints
    checked = JAXTYPED(beartype(function), typechecker=None)
    function.__annotations__ = checked.__annotations__ = written
    return checked


WITHOUT: set[tuple[Any, ...]] = set()  # functions that are known to have no shape
ROOT = Path(__file__).resolve().parents[1]
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "emmech").rglob("*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
JAXTYPED = jaxtyping.jaxtyped
jaxtyping.jaxtyped = lambda **_: check_shapes  # what the hook writes above every definition
install_import_hook(SHAPED, "tests.shapes.check_shapes")
