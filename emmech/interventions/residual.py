"""Hooks on block outputs: the one mechanism under steering and ablation.

An edit maps the residual ``[batch, seq, d_model]`` to another one. It runs in float32 for the inner products, returns
the model's dtype, keeps gradients, and acts only where the position mask says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from emmech.chat.edits import LiveEdit, announced_rows, register
from emmech.chat.families import Family
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction
from emmech.engine.modules import hooked
from emmech.engine.responses import digest
from emmech.errors import EmmechError, as_ints
from emmech.interventions.handle import Handle
from emmech.interventions.positions import PositionMask

__all__ = ["Coefficient", "Edit", "ResidualHandle", "edit_residual", "layer_list", "row_factor", "vectors_at"]

Edit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
Coefficient = float | Sequence[float] | Float[np.ndarray, " batch"] | Float[torch.Tensor, " batch"]

# which kinds of edit are live on which block, so that a cell run twice does not steer twice in silence
_LIVE: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


class ResidualHandle(Handle):
    """A live edit of the residual stream; :meth:`update` changes its coefficient while it is in force."""

    def __init__(
        self, chat: ChatModel, description: str, undo: Sequence[Callable[[], Any]], state: dict[str, Any]
    ) -> None:
        super().__init__(chat, description, undo)
        self._state = state

    @property
    def coefficient(self) -> torch.Tensor:
        """The present coefficient, ``[]`` or ``[batch]``."""
        value: torch.Tensor = self._state["coefficient"]
        return value

    def update(self, coefficient: Coefficient) -> ResidualHandle:
        """Change the coefficient of a live edit, as a slider does.

        Raises:
            EmmechError: the edit was removed, or the coefficient is not finite.
        """
        self.check_active("change the coefficient of an edit that is over")
        self._state["coefficient"] = _coefficient(coefficient)
        return self


def edit_residual(
    chat: ChatModel,
    kind: str,
    edit: Edit,
    vectors: Mapping[int, torch.Tensor],
    coefficient: Coefficient,
    *,
    positions: Any,
    stack: bool,
    description: str,
    target: torch.Tensor | None = None,
) -> ResidualHandle:
    """Put an edit on the outputs of the given blocks.

    Args:
        kind: ``"steer"`` or ``"ablate"``; two of a kind on one block are refused unless ``stack``.
        edit: from the residual, the layer's vector (``[d_model]`` or ``[batch, 1, d_model]``), the coefficient
            (``[]`` or ``[batch, 1, 1]``) and the layer's number to the new residual.
        vectors: by layer, ``[d_model]``, or ``[batch, d_model]`` for one per row.
        target: what else the edit depends on, so that sampling can tell it from another.
    """
    taken = [layer for layer in vectors if kind in _LIVE.get(chat.block(layer), ())]
    if taken and not stack:
        raise EmmechError(
            f"{kind} at layer {taken[0]} twice",
            description,
            f"another {kind} is live there, and the two would add up unseen",
            "remove() the first, or stack=True if both are meant",
        )
    state: dict[str, Any] = {"coefficient": _coefficient(coefficient)}
    where = PositionMask(chat, positions)
    each = any(vector.ndim == 2 for vector in vectors.values())
    fixed = digest(description, where.identity, *map(_bytes, vectors.values()), _bytes(target))
    live = LiveEdit(
        by_row=lambda: each or state["coefficient"].ndim == 1,
        state=lambda: f"{fixed} {state['coefficient'].tolist()}",
    )
    undo: list[Callable[[], Any]] = [register(chat.base, live)]
    follower = where.follow(chat.trunk)
    if follower is not None:
        undo.append(follower.remove)
    edits = ExitStack()
    undo.append(edits.close)
    for layer, vector in vectors.items():
        block = chat.block(layer)
        edits.enter_context(hooked((block, _hook(chat.family, edit, vector, state, where, layer))))
        _LIVE.setdefault(block, []).append(kind)
        undo.append(_forget(block, kind))
    return ResidualHandle(chat, description, undo, state)


def _hook(
    family: Family, edit: Edit, vector: torch.Tensor, state: Mapping[str, Any], where: PositionMask, layer: int
) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        before = family.residual(output)
        local = vector.to(device=before.device)
        if local.ndim == 2:
            local = _one_per_row(local, before, "directions")[:, None, :]
        factor = row_factor(state["coefficient"], before)
        changed = edit(before, local, factor, layer).to(before.dtype)
        if where.current is not None:
            changed = torch.where(where.current.to(before.device)[..., None], changed, before)
        return family.with_residual(output, changed)

    return hook


def row_factor(coefficient: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A coefficient ``[]`` or ``[batch]`` shaped to multiply a residual ``[batch, seq, d_model]``."""
    local = coefficient.to(device=output.device)
    return local if local.ndim == 0 else _one_per_row(local, output, "coefficients")[:, None, None]


def _one_per_row(values: torch.Tensor, output: torch.Tensor, what: str) -> torch.Tensor:
    """The values of the rows before us: the batch's own, or those of the conversations that sampling announced."""
    rows = announced_rows()
    expected, of = (len(output), "a batch of {} rows") if rows is None else (rows.total, "{} conversations")
    if len(values) != expected:
        raise EmmechError(
            "give each row its own intervention",
            f"{len(values)} {what} for {of.format(expected)}",
            "row by row there must be as many as the batch has rows, or sampling has conversations",
            "repeat them as the batch repeats its prompts (not its samples), or pass one for all",
        )
    return values if rows is None else values[rows.conversation.to(values.device)]


def _bytes(value: torch.Tensor | None) -> bytes:
    return b"" if value is None else value.detach().float().cpu().numpy().tobytes()


def _forget(block: nn.Module, kind: str) -> Callable[[], None]:
    def forget() -> None:
        _LIVE[block].remove(kind)

    return forget


def _coefficient(value: Coefficient) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(float("nan"))
    if tensor.ndim > 1 or not torch.isfinite(tensor).all():
        raise EmmechError(
            "use the coefficient",
            f"{value!r}",
            "a coefficient is a finite number, or one per batch row",
            "a float, or a tensor [batch]",
        )
    return tensor


def layer_list(chat: ChatModel, layers: Any, known: Sequence[int], asked: str) -> list[int]:
    """Resolve ``layers``: a number, several, ``"all"`` (those the direction knows), or None when there is only one.

    Raises:
        EmmechError: no such layer, or none was named and there are several.
    """
    if layers is None:
        if len(known) == 1:
            return [known[0]]
        raise EmmechError(
            asked,
            "layer=None",
            f"the direction is known at {len(known)} layers",
            f"name one: layer={chat.n_layers // 2} is the middle",
        )
    if isinstance(layers, str):
        if layers != "all":
            raise EmmechError(asked, f"{layers!r}", "layers are numbers", '"all", 3, or [3, 4]')
        return list(known)
    chosen = as_ints(asked, "layers", layers)
    if not chosen or len(set(chosen)) != len(chosen):
        raise EmmechError(asked, f"{layers!r}", "each layer is named once, at least one")
    for layer in chosen:
        chat.check_layer(layer)
    return chosen


def vectors_at(
    chat: ChatModel, direction: Any, layers: Any, *, from_layer: int | None, force: bool, asked: str
) -> tuple[dict[int, torch.Tensor], str]:
    """The vectors of an edit by layer, and their name.

    Args:
        direction: a Direction; a sequence of them, one per batch row; or an array ``[d_model]`` for any layer, or
            ``[batch, d_model]`` with one row per batch row.
        from_layer: use this layer's vector at every layer.
    """
    if isinstance(direction, Direction):
        return _of_directions(chat, [direction], layers, from_layer, force, asked), direction.name
    if isinstance(direction, Sequence) and direction and all(isinstance(d, Direction) for d in direction):
        found = _of_directions(chat, direction, layers, from_layer, force, asked)
        return found, f"{len(direction)} directions"
    array = _plain(direction, chat, asked)
    known = range(chat.n_layers)
    return dict.fromkeys(layer_list(chat, layers, known, asked), array), "a vector"


def _of_directions(
    chat: ChatModel,
    directions: Sequence[Direction],
    layers: Any,
    from_layer: int | None,
    force: bool,
    asked: str,
) -> dict[int, torch.Tensor]:
    for direction in directions:
        direction.check_fits(chat, force=force)
    known: Sequence[int]
    if from_layer is not None:
        known = range(chat.n_layers)
    else:
        known = sorted(set.intersection(*(set(direction.layers) for direction in directions)))
    if not known:
        raise EmmechError(
            asked,
            f"{directions[0].name}, zero at every layer",
            "a direction of norm 0 points nowhere",
            "a direction from two different groups",
        )
    found = {}
    for layer in layer_list(chat, layers, known, asked):
        stacked = np.stack([d.at(layer if from_layer is None else from_layer) for d in directions])
        found[layer] = torch.from_numpy(stacked[0] if len(directions) == 1 else stacked)
    return found


def _plain(value: Any, chat: ChatModel, asked: str) -> torch.Tensor:
    try:
        array = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value).detach().float()
    except (TypeError, ValueError, RuntimeError):
        array = torch.empty(0)
    if array.ndim not in (1, 2) or array.shape[-1] != chat.d_model:
        raise EmmechError(
            asked,
            f"a {type(value).__name__} {list(array.shape)}",
            f"the residual stream of {chat.name} has width {chat.d_model}",
            f"a Direction, or an array [{chat.d_model}] or [batch, {chat.d_model}]",
        )
    if not torch.isfinite(array).all() or not array.any(-1).all():
        raise EmmechError(asked, "a vector of zeros, NaN or infinity", "it points nowhere", "a finite vector")
    return array
