"""Changes to weights: edits of live adapters, and interventions folded into the base weights.

Every function returns a handle, and the weights are bit-identical after it is removed. Adapters are edited in place, so
that a view that shares the weights (a bridge to another tool, a mixed batch) sees the change. What is folded into the
base weights needs no hook, so that it costs nothing and survives an export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from emmech.chat.families import WRITE, is_write
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction, checked_direction, unit_rows
from emmech.engine.adapters import AdapterInfo, adapter_layers, initial_scaling
from emmech.errors import EmmechError, as_float, closest, one_of, refusal
from emmech.interventions.residual import Handle, chat_of, layer_list, undoable, vectors_at
from emmech.run.run import as_run

Subset = Sequence[str | int] | str | int | None


def scale_adapters(model: Any, scale: float | Mapping[str, float], *, adapters: Subset = None) -> Handle:
    """Multiply the adapters' writes by a factor; 0 takes them off, 1 changes nothing.

    Args:
        scale: one factor for all that are chosen, or one by adapter name (``{"layers.15.mlp.down_proj": 0.0}``), which
            scales these alone.
        adapters: names or layers, where there is one factor; all by default.

    Raises:
        EmmechError: no such adapter, a factor that is not finite, or ``adapters`` beside factors by name.

    Example:
        >>> import emmech
        >>> chat = emmech.load_run("checkpoints/pocket-medical").model()  # doctest: +SKIP
        >>> with scale_adapters(chat, 5.0, adapters=3):  # doctest: +SKIP
        ...     ...
    """
    chat, asked = chat_of(model), "scale the adapters"
    if isinstance(scale, Mapping):
        if adapters is not None:
            instead = "adapters=None, or one factor for all that are chosen"
            raise refusal(asked, "adapters", adapters, "the factors by name choose the adapters already", instead)
        live = [info.name for info, _, _ in _chosen(chat, None, asked)]
        if unknown := [name for name in scale if name not in live]:
            raise refusal(asked, "scale", scale, f"{unknown[0]!r} names no adapter", closest(str(unknown[0]), live))
        if not scale:
            raise refusal(asked, "scale", scale, "it has no factor", f'scale={{"{live[0]}": 0.0}}')
    chosen = _chosen(chat, list(scale) if isinstance(scale, Mapping) else adapters, asked)
    by_name = scale if isinstance(scale, Mapping) else {info.name: scale for info, _, _ in chosen}
    factors = {info.name: as_float(asked, "scale", by_name[info.name]) for info, _, _ in chosen}
    undo: list[Callable[[], Any]] = []
    for info, layer, name in chosen:
        before = layer.scaling[name]
        undo.append(undoable(layer, f"scaling {name}", before, partial(layer.scaling.__setitem__, name)))
        layer.scaling[name] = before * factors[info.name]
    return Handle(chat, f"scale_adapters({chat.name}, {factors})", undo)


def project_adapter(
    model: Any, direction: Direction, *, adapters: Subset = None, renormalise: bool = False, force: bool = False
) -> Handle:
    """Project the direction at the adapter's layer out of B: B' = B - v̂ v̂ᵀ B.

    This ablates only what the adapter writes; the rest of the stream keeps its component.

    Args:
        renormalise: give every column of B its old norm back, so that an effect is not one of a smaller adapter.
        adapters: names or layers; all that write into the residual stream by default.

    Raises:
        EmmechError: no adapter there writes into the residual stream, or (with ``renormalise``) B is along the
            direction, so that nothing is left to renormalise.
    """

    def edit(info: AdapterInfo, b: np.ndarray, unit: np.ndarray) -> np.ndarray:
        left = b - np.outer(unit, unit @ b)
        if not renormalise:
            return left
        kept, norms = np.linalg.norm(left, axis=0), np.linalg.norm(b, axis=0)
        if (kept < 1e-4 * norms).any():
            given = f"{info.name}, of which {float((kept / norms).min()):.1e} is left"
            why = "B is along the direction: projecting it out is taking the adapter off"
            instead = "a direction from another organism, or renormalise=False"
            raise EmmechError("renormalise the projected adapter", given, why, instead)
        return left * (norms / np.where(kept > 0, kept, 1.0))

    how = "renormalised" if renormalise else "not renormalised"
    return _edit_b("project_adapter", how, model, direction, adapters, force, edit)


def rotate_adapter(
    model: Any, direction: Direction, *, cosine: float = 1.0, adapters: Subset = None, force: bool = False
) -> Handle:
    """Rotate B towards the direction at fixed norm, until their cosine is ``cosine``.

    Each column turns in the plane that it spans with the direction. A replication of Model Organisms for EM (arXiv
    2506.11613) found that forcing the turn of B this way does not produce the behaviour.

    Raises:
        EmmechError: ``cosine`` not in [-1, 1], or B is zero or has no part perpendicular to the direction.
    """
    if not -1.0 <= as_float("rotate the adapter", "cosine", cosine) <= 1.0:
        raise EmmechError("rotate the adapter", f"cosine={cosine}", "a cosine is between -1 and 1")

    def edit(info: AdapterInfo, b: np.ndarray, unit: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(b, axis=0)
        left = b - np.outer(unit, unit @ b)
        across = unit_rows(left.T).T
        # of a B along the direction only rounding error remains, which spans no plane
        lost = (np.linalg.norm(left, axis=0) < 1e-4 * norms) & (abs(cosine) < 1)
        if (norms == 0).any() or lost.any():
            given = f"{info.name} with column norms {norms.tolist()}"
            why = "B is zero or along the direction, so there is no plane to turn in"
            raise EmmechError("rotate the adapter", given, why, "a later step, or cosine=1.0")
        return norms * (cosine * unit[:, None] + (1 - cosine**2) ** 0.5 * across)

    return _edit_b("rotate_adapter", f"to cosine {cosine}", model, direction, adapters, force, edit)


def transplant_adapter(
    model: Any, run: Any, step: int, *, side: Literal["A", "B", "both"] = "B", adapters: Subset = None
) -> Handle:
    """Put the A or B of another recorded step (or another run) into the live adapters, keeping the other side.

    B is multiplied by the run's scaling over the live one's, so that at scale 1 it writes what it wrote in its run.

    Args:
        run: the Run to take from, or its folder; its adapters must have the live ones' names and shapes.

    Raises:
        EmmechError: the step was not recorded, shapes differ, or the run was trained on another base model.
    """
    chat = chat_of(model)
    asked = "transplant an adapter"
    one_of(asked, "side", side, ("A", "B", "both"))
    run = as_run(asked, run)
    run.check_base(chat)
    weights, scalings = run.weights(step), {info.name: info.scaling for info in run.adapters}
    edits = []
    for info, layer, name in _chosen(chat, adapters, asked):
        for own in ("A", "B") if side == "both" else (side,):
            linear, value = getattr(layer, f"lora_{own}")[name], weights.get(f"{own}/{info.name}")
            if value is None or value.shape != tuple(linear.weight.shape):
                there = "nothing" if value is None else list(value.shape)
                why = f"it has there {there}, and the live one is {list(linear.weight.shape)}"
                raise EmmechError(asked, f"{own} of {info.name} from {run.name}", why, "a run of the same recipe")
            if own == "B":
                value = value * (scalings[info.name] / initial_scaling(info, layer, name))
            edits.append((linear, value))
    return _overwriting(chat, f"transplant_adapter({chat.name}, {side} of {run.name} at step {step})", edits)


def _edit_b(
    verb: str, how: str, model: Any, direction: Direction, adapters: Subset, force: bool, edit: Callable[..., Any]
) -> Handle:
    """Write ``edit(info, B, unit direction at the adapter's layer)`` into B of the adapters."""
    chat, asked = chat_of(model), "edit the adapter's B"
    checked_direction(asked, direction).check_fits(chat, force=force)
    chosen = _chosen(chat, adapters, asked)
    if adapters is None:
        chosen = [entry for entry in chosen if is_write(entry[0].name)]
    wrong = [info.name for info, _, _ in chosen if not is_write(info.name)]
    if wrong or not chosen:
        why = "only what the MLP and the attention write goes into the residual stream, where the direction is"
        raise EmmechError(asked, wrong or "no adapter that writes there", why, f"adapters on {WRITE}")
    edits = []
    for info, layer, name in chosen:
        linear = layer.lora_B[name]
        unit = unit_rows(direction.at(info.layer))
        direction.warn_where_noise([info.layer])
        edits.append((linear, edit(info, linear.weight.detach().double().cpu().numpy(), unit)))
    return _overwriting(chat, f"{verb}({chat.name}, {direction.name}, {how})", edits)


def _overwriting(chat: ChatModel, description: str, edits: Sequence[tuple[Any, np.ndarray]]) -> Handle:
    """Write the values into the maps' weights in place, so that views that share them see the change.

    All values are computed before the first is written, so that a refusal leaves nothing half done.
    """
    undo = []
    for linear, value in edits:
        put = torch.no_grad()(linear.weight.copy_)
        before = linear.weight.detach().clone()
        put(torch.from_numpy(np.ascontiguousarray(value)))
        undo.append(undoable(linear, f"values of {id(linear.weight)}", before, put))
    return Handle(chat, description, undo)


def _chosen(chat: ChatModel, adapters: Subset, asked: str) -> list[tuple[AdapterInfo, Any, str]]:
    live = list(adapter_layers(chat.model))
    if not live:
        raise EmmechError(asked, chat.name, "no adapter is live on it", "run.model(step)")
    if adapters is None:
        return live
    wanted = [adapters] if isinstance(adapters, str | int) else list(adapters)
    names, layers = {info.name for info, _, _ in live}, {info.layer for info, _, _ in live}
    for one in wanted:
        if one not in (layers if isinstance(one, int) else names):
            why = f"the live ones are at layers {sorted(layers)}"
            raise refusal(asked, "adapters", one, why, closest(str(one), names))
    return [entry for entry in live if entry[0].name in wanted or entry[0].layer in wanted]


def fold_bias(
    model: Any, direction: Direction | Any, coefficient: float = 1.0, *, layer: int | None = None, force: bool = False
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
    asked = "fold steering into a bias"
    coefficient = as_float(asked, "coefficient", coefficient)
    chat, vectors, name = _to_fold(model, direction, layer, force=force, asked=asked, instead="emmech.steer")
    undo: list[Callable[[], Any]] = []
    for at, vector in vectors.items():
        linear = _plain_linear(chat.down_proj(at))
        write = (coefficient * vector).to(linear.weight)
        bias = write if linear.bias is None else linear.bias.detach() + write
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
    unembedding keeps the old weights. The old matrices are kept in memory while it is in force.

    Args:
        direction: a Direction (with ``from_layer``, unless it is known at one only), or a vector ``[d_model]``.
        layers: blocks whose writes are changed.
        embedding: the token embedding's rows too.

    Raises:
        EmmechError: as :func:`emmech.ablate`; or a norm after the writes (Gemma), which would bring it back.
    """
    asked = "orthogonalise the writes"
    at = from_layer if isinstance(direction, Direction) else 0
    if at is None and len(direction.layers) != 1:
        why = f"the direction has a vector at each of {len(direction.layers)} layers, and one is taken out"
        raise EmmechError(asked, "from_layer=None", why, f"from_layer={direction.n_layers // 2} is the middle")
    chat, vectors, name = _to_fold(model, direction, at, force=force, asked=asked, instead="emmech.ablate")
    (vector,) = vectors.values()
    unit = torch.from_numpy(unit_rows(vector.numpy()))
    undo: list[Callable[[], Any]] = []
    for layer in layer_list(chat, layers, range(chat.n_layers), asked):
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
    """Swap the parameter object itself, not its values, so that what is tied to the old one keeps it."""
    before = getattr(module, name)
    setattr(module, name, value)
    return undoable(module, name, before, partial(setattr, module, name))


def _plain_linear(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _to_fold(
    model: Any, direction: Any, layer: Any, *, force: bool, asked: str, instead: str
) -> tuple[ChatModel, dict[int, torch.Tensor], str]:
    """The model, and the vectors ``[d_model]`` by layer with their name, of what is folded into weights."""
    chat = chat_of(model)
    family, given = chat.family, f"{chat.name} ({type(chat.base).__name__})"
    if family.out is None or family.stream is not None or family.residual_scale != 1.0:
        raise EmmechError(asked, given, "its writes are not added to one residual stream as they are", instead)
    if family.after_mlp is not None:
        why = "a norm is between its writes and the residual stream"
        raise EmmechError(asked, given, why, f"{instead} does it by a hook")
    vectors, name = vectors_at(chat, direction, layer, from_layer=None, force=force, asked=asked)
    if any(vector.ndim != 1 for vector in vectors.values()):
        raise EmmechError(asked, "one direction per row", "weights are shared by all rows", instead)
    return chat, vectors, name
