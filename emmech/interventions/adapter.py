"""Surgery on live adapters: scale any subset, project a direction out of B, rotate B, put another step's B in.

Every function returns a handle, and the adapter is bit-identical afterwards. The edits are made in place, so that a
view that shares the weights (a bridge to another tool, a mixed batch) sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from emmech.chat.families import WRITE, is_write
from emmech.chat.model import ChatModel
from emmech.directions.arrays import unit_rows
from emmech.directions.direction import Direction, checked_direction
from emmech.engine.adapters import AdapterInfo, adapter_layers
from emmech.errors import EmmechError, as_float, closest
from emmech.interventions.handle import Handle, chat_of, undoable
from emmech.run.run import as_run

__all__ = ["project_adapter", "rotate_adapter", "scale_adapters", "transplant_adapter"]

Subset = Sequence[str | int] | str | int | None


def scale_adapters(model: Any, scale: float | Mapping[str, float], *, adapters: Subset = None) -> Handle:
    """Multiply the adapters' writes by a factor; 0 takes them off, 1 changes nothing.

    Args:
        scale: one factor for all that are chosen, or one by adapter name.
        adapters: names (``"layers.15.mlp.down_proj"``) or layers; all by default.

    Raises:
        EmmechError: no such adapter, or a factor that is not finite.

    Example:
        >>> import emmech
        >>> chat = emmech.load_run("checkpoints/pocket-medical").model()  # doctest: +SKIP
        >>> with scale_adapters(chat, 5.0, adapters=3):  # doctest: +SKIP
        ...     ...
    """
    chat = chat_of(model)
    chosen = _chosen(chat, list(scale) if isinstance(scale, Mapping) else adapters, "scale the adapters")
    factors = {
        info.name: as_float("scale the adapters", "scale", scale[info.name] if isinstance(scale, Mapping) else scale)
        for info, _, _ in chosen
    }
    undo: list[Callable[[], Any]] = []
    for info, layer, name in chosen:
        before = layer.scaling[name]
        undo.append(undoable(layer, f"scaling {name}", before, partial(layer.scaling.__setitem__, name)))
        layer.scaling[name] = before * factors[info.name]
    return Handle(chat, f"scale_adapters({chat.name}, {factors})", undo)


def project_adapter(
    model: Any,
    direction: Direction,
    *,
    adapters: Subset = None,
    renormalise: bool = False,
    force: bool = False,
) -> Handle:
    """Project the direction at the adapter's layer out of B: B' = B - v̂ v̂ᵀ B.

    The weight-space form of ablating only what the adapter writes; the rest of the stream keeps its component.

    Args:
        renormalise: give every column of B its old norm back, so that an effect is not one of a smaller adapter.
        adapters: names or layers; all that write into the residual stream by default.

    Raises:
        EmmechError: no adapter there writes into the residual stream, or (with ``renormalise``) B lies along the
            direction, so that nothing is left to renormalise.
    """
    chat = chat_of(model)
    checked_direction("project the adapter", direction)

    def edit(info: AdapterInfo, b: np.ndarray, unit: np.ndarray) -> np.ndarray:
        left = b - np.outer(unit, unit @ b)
        if not renormalise:
            return left
        kept, norms = np.linalg.norm(left, axis=0), np.linalg.norm(b, axis=0)
        if (kept < 1e-4 * norms).any():
            raise EmmechError(
                "renormalise the projected adapter",
                f"{info.name}, of which {float((kept / norms).min()):.1e} is left",
                "B lies along the direction: projecting it out is taking the adapter off",
                "a direction from another organism, or renormalise=False",
            )
        return left * (norms / np.where(kept > 0, kept, 1.0))

    how = "renormalised" if renormalise else "not renormalised"
    return _edit_b(chat, direction, adapters, edit, f"project_adapter({chat.name}, {direction.name}, {how})", force)


def rotate_adapter(
    model: Any,
    direction: Direction,
    *,
    cosine: float = 1.0,
    adapters: Subset = None,
    force: bool = False,
) -> Handle:
    """Rotate B towards the direction at fixed norm, until their cosine is ``cosine``.

    Each column turns in the plane that it spans with the direction. A replication of Model Organisms for EM (arXiv
    2506.11613) found that forcing the turn of B this way does not make the behaviour.

    Raises:
        EmmechError: ``cosine`` not in [-1, 1], or B is zero or has no part across the direction to turn through.
    """
    chat = chat_of(model)
    checked_direction("rotate the adapter", direction)
    if not -1.0 <= as_float("rotate the adapter", "cosine", cosine) <= 1.0:
        raise EmmechError("rotate the adapter", f"cosine={cosine}", "a cosine lies between -1 and 1")

    def edit(info: AdapterInfo, b: np.ndarray, unit: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(b, axis=0)
        left = b - np.outer(unit, unit @ b)
        across = unit_rows(left.T).T
        # what rounding leaves of a B along the direction is no plane to turn in
        lost = (np.linalg.norm(left, axis=0) < 1e-4 * norms) & (abs(cosine) < 1)
        if (norms == 0).any() or lost.any():
            raise EmmechError(
                "rotate the adapter",
                f"{info.name} with column norms {norms.tolist()}",
                "B is zero or lies along the direction, so there is no plane to turn in",
                "a later step, or cosine=1.0",
            )
        return norms * (cosine * unit[:, None] + (1 - cosine**2) ** 0.5 * across)

    described = f"rotate_adapter({chat.name}, to cosine {cosine} with {direction.name})"
    return _edit_b(chat, direction, adapters, edit, described, force)


def transplant_adapter(
    model: Any, run: Any, step: int, *, side: Literal["A", "B", "both"] = "B", adapters: Subset = None
) -> Handle:
    """Put the A or B of another recorded step (or another run) into the live adapters, keeping the other side.

    Args:
        run: the Run to take from, or its folder; its adapters must have the live ones' names and shapes.

    Raises:
        EmmechError: the step was not recorded, or shapes differ.
    """
    chat = chat_of(model)
    if side not in ("A", "B", "both"):
        raise EmmechError("transplant an adapter", f"side={side!r}", "it has two sides", '"A", "B" or "both"')
    weights = as_run("transplant an adapter", run).weights(step)
    undo: list[Callable[[], Any]] = []
    for info, layer, name in _chosen(chat, adapters, "transplant an adapter"):
        for own in ("A", "B") if side == "both" else (side,):
            value = weights.get(f"{own}/{info.name}")
            linear = getattr(layer, f"lora_{own}")[name]
            parameter = linear.weight
            if value is None or value.shape != tuple(parameter.shape):
                for take_back in reversed(undo):
                    take_back()
                raise EmmechError(
                    "transplant an adapter",
                    f"{own} of {info.name} from {run.name}",
                    f"it has there {'nothing' if value is None else list(value.shape)}, "
                    f"and the live one is {list(parameter.shape)}",
                    "a run of the same recipe",
                )
            undo.append(_overwrite(linear, value))
    return Handle(chat, f"transplant_adapter({chat.name}, {side} of {run.name} at step {step})", undo)


def _edit_b(
    chat: ChatModel,
    direction: Direction,
    adapters: Subset,
    edit: Callable[[AdapterInfo, np.ndarray, np.ndarray], np.ndarray],
    description: str,
    force: bool,
) -> Handle:
    direction.check_fits(chat, force=force)
    chosen = _chosen(chat, adapters, "edit the adapter's B")
    if adapters is None:
        chosen = [entry for entry in chosen if is_write(entry[0].name)]
    wrong = [info.name for info, _, _ in chosen if not is_write(info.name)]
    if wrong or not chosen:
        raise EmmechError(
            "edit the adapter's B",
            wrong or "no adapter that writes there",
            "only what the MLP and the attention write goes into the residual stream, where the direction is",
            f"adapters on {WRITE}",
        )
    # all edits are computed before the first is made, so that a refusal leaves nothing half done
    edits = []
    for info, layer, name in chosen:
        linear = layer.lora_B[name]
        unit = unit_rows(direction.at(info.layer))
        edits.append((linear, edit(info, linear.weight.detach().double().cpu().numpy(), unit)))
    return Handle(chat, description, [_overwrite(linear, value) for linear, value in edits])


def _overwrite(linear: Any, value: np.ndarray) -> Callable[[], Any]:
    """Write into the weight in place: who shares it sees the change."""
    parameter = linear.weight
    before = parameter.detach().clone()

    def put(weight: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(weight)

    put(torch.from_numpy(np.ascontiguousarray(value)))
    return undoable(linear, f"values of {id(parameter)}", before, put)


def _chosen(chat: ChatModel, adapters: Subset, asked: str) -> list[tuple[AdapterInfo, Any, str]]:
    live = list(adapter_layers(chat.model))
    if not live:
        raise EmmechError(asked, chat.name, "no adapter is live on it", "run.model(step)")
    if any(getattr(layer, "merged", False) for _, layer, _ in live):
        raise EmmechError(
            asked,
            chat.name,
            "the adapter is merged into the weights, and editing it would change nothing",
            "unmerge_adapter() first",
        )
    if adapters is None:
        return live
    wanted = [adapters] if isinstance(adapters, str | int) else list(adapters)
    names = {info.name for info, _, _ in live}
    known_layers = {info.layer for info, _, _ in live}
    for one in wanted:
        if one not in (known_layers if isinstance(one, int) else names):
            raise EmmechError(
                asked,
                f"adapters={one!r}",
                f"the live ones are at layers {sorted(known_layers)}",
                closest(str(one), names),
            )
    return [entry for entry in live if entry[0].name in wanted or entry[0].layer in wanted]
