"""Interventions folded into the base weights: no hook is left, so that they cost nothing and survive an export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from emmech.chat.model import ChatModel
from emmech.directions.arrays import unit_rows
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.interventions.handle import Handle, chat_of, undoable
from emmech.interventions.residual import layer_list, vectors_at

__all__ = ["fold_bias", "orthogonalise_writes"]


def fold_bias(
    model: Any,
    direction: Direction | Any,
    coefficient: float = 1.0,
    *,
    layer: int | None = None,
    force: bool = False,
) -> Handle:
    """Steer by a bias on ``down_proj``: the same function as :func:`emmech.steer` at all positions of that layer.

    Raises:
        EmmechError: as :func:`emmech.steer`; or the architecture has a norm after the MLP (Gemma), through which a
            bias would not pass unchanged.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> with fold_bias(chat, np.ones(chat.d_model), 0.5, layer=2):
        ...     chat.down_proj(2).bias.shape[0] == chat.d_model
        True
    """
    chat = chat_of(model)
    _refuse_norm_after(chat, "fold steering into a bias", "emmech.steer")
    vectors, name = vectors_at(chat, direction, layer, from_layer=None, force=force, asked="fold steering into a bias")
    if any(vector.ndim != 1 for vector in vectors.values()):
        raise EmmechError(
            "fold steering into a bias", "one direction per row", "weights are shared by all rows", "emmech.steer"
        )
    undo: list[Callable[[], Any]] = []
    for at, vector in vectors.items():
        linear = _plain_linear(chat.down_proj(at))
        before = linear.bias
        write = (float(coefficient) * vector).to(linear.weight)
        bias = write if before is None else before.detach() + write
        undo.append(_replace(linear, "bias", nn.Parameter(bias, requires_grad=False)))
    return Handle(chat, f"fold_bias({chat.name}, {coefficient:g} {name}, layers {sorted(vectors)})", undo)


def orthogonalise_writes(
    model: Any,
    direction: Direction | Any,
    *,
    from_layer: int | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    embedding: bool = True,
    force: bool = False,
) -> Handle:
    """Take one direction out of every matrix that writes into the residual stream: W' = W - v̂ v̂ᵀ W.

    With all layers and the embedding, no residual anywhere has a component along it, inside the blocks too (Refusal is
    Mediated by a Single Direction, arXiv 2406.11717). Live adapters on those matrices are projected as well. A tied
    unembedding keeps the old weights. The new matrices exist beside the old ones while it is in force.

    Args:
        direction: a Direction (with ``from_layer``, unless it is known at one only), or a vector ``[d_model]``.
        layers: blocks whose writes are changed.
        embedding: the token embedding's rows too.

    Raises:
        EmmechError: as :func:`emmech.ablate`; or a norm after the writes (Gemma), which would bring it back.
    """
    chat = chat_of(model)
    _refuse_norm_after(chat, "orthogonalise the writes", "emmech.ablate")
    if isinstance(direction, Direction):
        at = from_layer if from_layer is not None else (direction.layers[0] if len(direction.layers) == 1 else None)
        if at is None:
            raise EmmechError(
                "orthogonalise the writes",
                "from_layer=None",
                f"the direction has a vector at each of {len(direction.layers)} layers, and one is taken out",
                f"from_layer={chat.n_layers // 2} is the middle",
            )
        direction.check_fits(chat, force=force)
        vector: Any = direction.at(at)
    else:
        vector = direction
    found, name = vectors_at(chat, vector, 0, from_layer=None, force=force, asked="orthogonalise the writes")
    name = getattr(direction, "name", name)
    unit = torch.from_numpy(unit_rows(found[0].numpy()))
    undo: list[Callable[[], Any]] = []
    for layer in layer_list(chat, layers, range(chat.n_layers), "orthogonalise the writes"):
        for module in (chat.parts(layer).out, chat.down_proj(layer)):
            lora: Any = getattr(module, "lora_B", {})
            matrices: list[Any] = [_plain_linear(module), *lora.values()]
            for linear in matrices:
                # a transposed map (Conv1D) has what it writes in its rows
                turned = not isinstance(linear, nn.Linear)
                undo.append(_replace(linear, "weight", _without(linear.weight, unit, rows=turned)))
                if linear.bias is not None:
                    undo.append(_replace(linear, "bias", _without(linear.bias, unit, rows=True)))
    if embedding:
        table = chat.base.get_input_embeddings()
        undo.append(_replace(table, "weight", _without(table.weight, unit, rows=True)))
    return Handle(chat, f"orthogonalise_writes({chat.name}, {name})", undo)


def _without(weight: torch.Tensor, unit: torch.Tensor, *, rows: bool) -> nn.Parameter:
    """A weight whose writes (its rows, or its columns) have no component along the unit vector."""
    wide = weight.detach().double()
    axis = unit.to(wide)
    taken = (wide @ axis)[..., None] * axis if rows else torch.outer(axis, axis @ wide)
    return nn.Parameter((wide - taken).to(weight.dtype), requires_grad=False)


def _replace(module: nn.Module, name: str, value: nn.Parameter) -> Callable[[], Any]:
    # the parameter object itself is swapped, not its values: what is tied to the old one keeps it
    before = getattr(module, name)
    setattr(module, name, value)
    return undoable(module, name, before, partial(setattr, module, name))


def _plain_linear(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _refuse_norm_after(chat: ChatModel, asked: str, instead: str) -> None:
    family, given = chat.family, f"{chat.name} ({type(chat.base).__name__})"
    if family.out is None or family.stream is not None or family.residual_scale != 1.0:
        raise EmmechError(asked, given, "its writes are not added to one residual stream as they are", instead)
    if family.after_mlp is not None:
        raise EmmechError(
            asked,
            given,
            "a norm is between its writes and the residual stream",
            f"{instead} does it by a hook",
        )
