"""Steering: add a direction to the residual stream while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.interventions.handle import chat_of
from emmech.interventions.positions import Positions
from emmech.interventions.residual import Coefficient, ResidualHandle, edit_residual, vectors_at

__all__ = ["steer"]


def steer(
    model: Any,
    direction: Direction | Sequence[Direction] | Any,
    coefficient: Coefficient = 1.0,
    *,
    layer: int | Sequence[int] | Literal["all"] | None = None,
    positions: Positions = "all",
    units: Literal["raw", "residual"] = "raw",
    stack: bool = False,
    force: bool = False,
) -> ResidualHandle:
    """Add a multiple of a direction to the residual stream: x' = x + c v.

    The block's output is where it is added (Convergent Linear Representations of EM, arXiv 2506.11618).

    In force from the call on; undone by ``.remove()`` or at the end of a ``with`` block. It acts in every forward call,
    generation behind a key-value cache included, and keeps gradients.

    Args:
        model: a ChatModel, or a transformers or PEFT model in memory.
        direction: a Direction; several, one per batch row; or an array ``[d_model]`` or ``[batch, d_model]``.
        coefficient: a number, or one per batch row ``[batch]``: one call then gives a dose-response curve.
        layer: the block after which it is added; several, or ``"all"``; may be left out when the direction is known at
            one layer only.
        positions: ``"all"``, ``"answer"``, ``"prompt"``, a bool tensor ``[batch, seq]``, or a function that makes one
            from the token ids, such as :func:`emmech.directions.phrase_tokens`.
        units: ``"raw"`` keeps the direction's norm (1.0 adds the measured difference); ``"residual"`` adds that
            fraction of each token's own residual norm, along the unit direction.
        stack: allow a second steering of a layer that is steered already.
        force: accept a direction of another base model of the same shape.

    Raises:
        EmmechError: wrong width or layer, zero or non-finite direction, another base model, or steering twice.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> d = emmech.Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
        >>> with emmech.steer(chat, d, 0.1, layer=2, units="residual", positions="answer") as steered:
        ...     steered.update(0.2).active
        True
    """
    if units not in ("raw", "residual"):
        raise EmmechError("steer", f"units={units!r}", "there are two units", '"raw" or "residual"')
    chat = chat_of(model)
    vectors, name = vectors_at(chat, direction, layer, from_layer=None, force=force, asked="steer")
    if units == "residual":
        vectors = {at: vector / vector.norm(dim=-1, keepdim=True) for at, vector in vectors.items()}
    return edit_residual(
        chat,
        "steer",
        _add if units == "raw" else _add_fraction,
        vectors,
        coefficient,
        positions=positions,
        stack=stack,
        description=f"steer({chat.name}, {name}, layers {sorted(vectors)}, {units} units)",
    )


def _add(x: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, layer: int) -> torch.Tensor:
    return x + (factor * vector).to(x.dtype)


def _add_fraction(x: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, layer: int) -> torch.Tensor:
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x + (factor * size * vector).to(x.dtype)
