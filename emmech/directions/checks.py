"""Directions that a caller gives, checked where they come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emmech.directions.direction import Direction
from emmech.errors import EmmechError

__all__ = ["checked_direction", "checked_directions"]


def checked_direction(asked: str, given: Any, *, name: str = "direction") -> Direction:
    """One Direction.

    Raises:
        EmmechError: something else.
    """
    if isinstance(given, Direction):
        return given
    raise EmmechError(
        asked,
        f"{name}={given!r}"[:120],
        "it is not a Direction",
        "emmech.misalignment_direction(run), or Direction(vectors) of an array [layers, d_model]",
    )


def checked_directions(asked: str, name: str, given: Any) -> Mapping[str, Direction]:
    """Directions by name.

    Raises:
        EmmechError: no mapping, or something in it that is not a Direction.

    Example:
        >>> list(checked_directions("compare", "directions", {"toy": Direction.single([1.0], layer=0, n_layers=1)}))
        ['toy']
    """
    if isinstance(given, Mapping):
        return {key: checked_direction(asked, one, name=f"{name}[{key!r}]") for key, one in given.items()}
    raise EmmechError(
        asked,
        f"{name}={given!r}"[:120],
        "it is not a mapping from names to Directions",
        f'{name}={{"mine": emmech.misalignment_direction(run)}}',
    )
