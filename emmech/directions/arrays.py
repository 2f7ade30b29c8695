"""Arrays of vectors, checked and normalised."""

from __future__ import annotations

from typing import Any

import numpy as np

from emmech.errors import EmmechError

__all__ = ["checked_array", "checked_matrix", "unit_rows"]


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows ``[..., d_model]`` to norm 1; rows of zeros stay zero."""
    wide = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)


def checked_array(value: Any, what: str) -> np.ndarray:
    """An array or tensor of numbers as finite float32, copied.

    Raises:
        EmmechError: not numbers, or not finite.
    """
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise EmmechError(
            "make a Direction",
            f"{what}: {type(value).__name__}",
            "it is not an array of numbers",
            "an array or tensor [layers, d_model]",
        )
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise EmmechError(
            "make a Direction",
            f"{what} with {int((~np.isfinite(array)).sum())} values that are not finite, first at {bad}",
            "NaN or infinity in a direction poisons every activation it touches",
            "look for an empty group, or an overflow in float16",
        )
    return array


def checked_matrix(value: Any, what: str) -> np.ndarray:
    """The same as ``[layers, d_model]``, read-only.

    Raises:
        EmmechError: not two-dimensional, or empty.
    """
    array = checked_array(value, what)
    if array.ndim != 2 or 0 in array.shape:
        raise EmmechError(
            "make a Direction",
            f"{what} of shape {list(array.shape)}",
            "a direction has one row per layer: [layers, d_model]",
            "Direction.single(vector, layer, n_layers) for one vector" if array.ndim == 1 else None,
        )
    array.setflags(write=False)
    return array
