"""The check of shapes that the tests put on the package: jaxtyping's import hook with beartype, as equinox has it.

An array has to have the shape that its annotation names, and axes of one name have one size within a call. All else is
left to mypy: many tests give a wrong type on purpose, to see it refused by an :class:`EmmechError`, and a check of the
type before the call would hide that. Import this module before the package.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

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


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the shapes of its arguments and its result checked at each call."""
    hints = function.__annotations__
    if function.__qualname__ in CONVERTS or not any(map(has_shape, hints.values())):
        return function
    function.__annotations__ = {name: shape_of(hint) for name, hint in hints.items()}
    return beartype(function)


# only modules with shapes: the hook costs every function that it wraps some time at each call
ROOT = Path(__file__).resolve().parents[1]
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "emmech").rglob("*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
install_import_hook(SHAPED, "tests.shapes.check_shapes")
