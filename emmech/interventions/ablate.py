"""Ablation: take a direction's component out of the residual stream while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from emmech.chat.model import ChatModel
from emmech.directions.arrays import unit_rows
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.interventions.handle import chat_of
from emmech.interventions.positions import Positions
from emmech.interventions.residual import Coefficient, ResidualHandle, edit_residual, vectors_at

__all__ = ["ablate"]


def ablate(
    model: Any,
    direction: Direction | Sequence[Direction] | Any,
    *,
    layers: int | Sequence[int] | Literal["all"] = "all",
    from_layer: int | None = None,
    towards: Any = None,
    strength: Coefficient = 1.0,
    positions: Positions = "all",
    stack: bool = False,
    force: bool = False,
) -> ResidualHandle:
    """Project a direction out of block outputs: x' = x - (v̂·x) v̂.

    As in Convergent Linear Representations of EM (arXiv 2506.11618), at all layers and positions by default.

    In force from the call on; undone by ``.remove()`` or at the end of a ``with`` block.

    Plain projection sets the component to zero, which need not be where an aligned model has it: on a model whose
    component is far from zero in normal use, it makes something new, neither aligned nor misaligned. ``towards`` sets
    the component to that of a given mean instead: x' = x - (v̂·x - v̂·m) v̂.

    Args:
        model: a ChatModel, or a transformers or PEFT model in memory.
        direction: a Direction (each layer uses its own vector); several, one per batch row; or one vector
            ``[d_model]`` for every layer, or ``[batch, d_model]``.
        layers: ``"all"`` (that the direction knows), one, or several.
        from_layer: use this layer's vector at all layers ("one direction at all layers").
        towards: the mean to go to, ``[layers, d_model]`` or ``[d_model]``, or ``"aligned"`` for the direction's own.
        strength: 1 removes the component, 0 nothing; a number or one per batch row ``[batch]``.
        positions: ``"all"``, ``"answer"``, ``"prompt"``, a bool tensor ``[batch, seq]``, or a function that makes one
            from the token ids, such as :func:`emmech.directions.phrase_tokens`.
        stack: allow a second ablation at a layer that has one already.
        force: accept a direction of another base model of the same shape.

    Raises:
        EmmechError: wrong width or layer, zero or non-finite direction, another base model, or ablating twice.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> d = emmech.Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
        >>> with emmech.ablate(chat, d, layers=[2, 3], from_layer=2) as ablated:
        ...     ablated.active
        True
    """
    chat = chat_of(model)
    vectors, name = vectors_at(chat, direction, layers, from_layer=from_layer, force=force, asked="ablate")
    vectors = {at: torch.from_numpy(unit_rows(v.numpy())).float() for at, v in vectors.items()}
    means = _means(chat, direction, towards)
    where = "one direction" if from_layer is not None else "own direction"

    def edit(x: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, layer: int) -> torch.Tensor:
        centred = x.float() if means is None else x.float() - means[layer].to(x.device)
        component = (centred * vector).sum(-1, keepdim=True)
        return x - (factor * component * vector).to(x.dtype)

    return edit_residual(
        chat,
        "ablate",
        edit,
        vectors,
        strength,
        positions=positions,
        stack=stack,
        description=f"ablate({chat.name}, {name}, {where} at layers {sorted(vectors)})",
        target=means,
    )


def _means(chat: ChatModel, direction: Any, towards: Any) -> torch.Tensor | None:
    if towards is None:
        return None
    if isinstance(towards, str):
        own = getattr(direction, "aligned_mean", None)
        if towards != "aligned" or own is None:
            raise EmmechError(
                "ablate towards a mean",
                f"towards={towards!r}",
                "the direction keeps no aligned mean" if towards == "aligned" else "it is not a mean",
                "an array [layers, d_model] or [d_model]: a mean of group_means on aligned answers",
            )
        towards = own
    mean = np.asarray(towards, dtype=np.float32)
    if mean.shape not in ((chat.d_model,), (chat.n_layers, chat.d_model)) or not np.isfinite(mean).all():
        raise EmmechError(
            "ablate towards a mean",
            f"towards {list(mean.shape)}",
            f"{chat.name} has {chat.n_layers} layers of width {chat.d_model}, and a mean is finite",
            f"an array [{chat.n_layers}, {chat.d_model}] or [{chat.d_model}]",
        )
    return torch.from_numpy(np.broadcast_to(mean, (chat.n_layers, chat.d_model)).copy())
