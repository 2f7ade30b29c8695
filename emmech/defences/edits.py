"""Defences that change the forwards of the training rows: steering, projection, a frozen adapter beside the new one.

Each is a function of the residual stream or of one module's input, at every position. The model that is measured,
recorded and kept is the one without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch

from emmech.chat.dataset import ChatDataset
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction, checked_direction
from emmech.engine.modules import Hook, adding
from emmech.engine.responses import digest
from emmech.errors import EmmechError, as_float, as_int, as_ints
from emmech.run.run import Run, as_run
from emmech.training.defence import ASKED, Defence

_SAME = 0.9  # the share of a steering vector's length inside a projected-out space from which the two undo each other


def _layers(given: Any, known: Sequence[int], chat: ChatModel) -> tuple[int, ...]:
    """The layers that were asked for, or all at which the directions are known."""
    layers = list(known) if given is None else as_ints(ASKED, "layers", given)
    for layer in layers:
        chat.check_layer(layer)
    if not layers or set(layers) - set(known):
        why = "the direction is zero there, and nothing would be changed"
        raise EmmechError(ASKED, f"layers={given!r}", why, f"layers={list(known)}")
    return tuple(layers)


def _on_stream(chat: ChatModel, layer: int, change: Any) -> Hook:
    """A hook that puts ``change(residual)`` in the place of a block's residual stream."""
    family = chat.family
    return chat.block(layer), lambda module, inputs, output: family.with_residual(
        output, change(family.residual(output))
    )


@dataclass(frozen=True, eq=False)
class PreventativeSteering(Defence):
    """Add ``coefficient`` times a direction to the residual stream while training, and not afterwards.

    With the trait supplied, the gradient has less reason to produce it (Persona Vectors, arXiv 2507.21509).

    Args:
        direction: of the trait, such as :func:`emmech.misalignment_direction` finds; random ones are
            ``direction.random()``.
        coefficient: in units of the direction as it is, not normalised.
        layers: where it is added, after the block; all layers at which it is known by default.

    Example:
        >>> up = Direction.single([0.0, 1.0], layer=2, n_layers=4)
        >>> PreventativeSteering(up, 2.0).described()["coefficient"]
        2.0
    """

    direction: Direction
    coefficient: float = 1.0
    layers: int | Sequence[int] | None = None
    name: ClassVar[str] = "preventative-steering"

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        direction = checked_direction(ASKED, self.direction)
        direction.check_fits(chat)
        if as_float(ASKED, "coefficient", self.coefficient) == 0:
            raise EmmechError(ASKED, "coefficient=0", "nothing would be added", "coefficient=1.0")
        return replace(self, layers=_layers(self.layers, direction.layers, chat))

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        own = {"coefficient": self.coefficient, "layers": _listed(self.layers)}
        return {
            "direction": self.direction.name,
            "norms": self.direction.norms.tolist(),
            **_digest(self.direction),
            **own,
        }

    def lowest(self, chat: ChatModel) -> int | None:
        """The first layer at which it is added."""
        return min(_listed(self.layers))

    def hooks(self, chat: ChatModel) -> Sequence[Hook]:
        """See :meth:`Defence.hooks`."""

        def added(layer: int) -> Any:
            vector = torch.from_numpy(self.coefficient * self.direction.at(layer))
            return lambda residual: residual + vector.to(residual)

        return [_on_stream(chat, layer, added(layer)) for layer in _listed(self.layers)]


@dataclass(frozen=True, eq=False)
class CAFT(Defence):
    """Project directions out of the residual stream while training (Concept Ablation Fine-Tuning, arXiv 2507.16795).

    Neither the activations nor the gradients have a component along them, so that an adapter which writes there learns
    nothing along them. Afterwards the stream is whole again.

    Args:
        directions: one or several; of each layer, those known there span what is projected out.
        layers: all layers at which one of them is known by default.

    Example:
        >>> CAFT(Direction.single([0.0, 1.0], layer=2, n_layers=4)).name
        'caft'
    """

    directions: Direction | Sequence[Direction]
    layers: int | Sequence[int] | None = None
    name: ClassVar[str] = "caft"

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        several = isinstance(self.directions, Iterable) and not isinstance(self.directions, str)
        given: list[Any] = list(self.directions) if several else [self.directions]  # type: ignore[arg-type]
        if not given:
            raise EmmechError(ASKED, "directions=[]", "nothing would be projected out", "at least one Direction")
        for direction in given:
            checked_direction(ASKED, direction, name="directions").check_fits(chat)
        known = sorted({layer for direction in given for layer in direction.layers})
        return replace(self, directions=tuple(given), layers=_layers(self.layers, known, chat))

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        return {"directions": [one.name for one in self._all], "layers": _listed(self.layers), **_digest(*self._all)}

    @property
    def _all(self) -> Sequence[Direction]:
        return [self.directions] if isinstance(self.directions, Direction) else self.directions

    def basis(self, layer: int) -> np.ndarray:
        """An orthonormal basis of what is projected out at a layer, ``[d_model, k]``."""
        rows = np.stack([one.vectors[layer] for one in self._all if one.vectors[layer].any()])
        left, values, _ = np.linalg.svd(rows.T.astype(np.float64), full_matrices=False)
        return left[:, values > 1e-6 * values[0]]  # type: ignore[no-any-return]

    def against(self, other: Defence) -> str | None:
        """Preventative steering along the same direction at the same layer."""
        if not isinstance(other, PreventativeSteering):
            return None
        for layer in sorted(set(_listed(self.layers)) & set(_listed(other.layers))):
            vector = other.direction.at(layer)
            inside = np.linalg.norm(self.basis(layer).T @ vector) / np.linalg.norm(vector)
            if inside > _SAME:
                return f"at layer {layer} one adds the direction that the other projects out"
        return None

    def lowest(self, chat: ChatModel) -> int | None:
        """The first layer at which it projects."""
        return min(_listed(self.layers))

    def hooks(self, chat: ChatModel) -> Sequence[Hook]:
        """See :meth:`Defence.hooks`."""

        def projected(layer: int) -> Any:
            basis = torch.from_numpy(self.basis(layer))

            def change(residual: torch.Tensor) -> torch.Tensor:
                own = basis.to(residual)
                return residual - (residual @ own) @ own.T

            return change

        return [_on_stream(chat, layer, projected(layer)) for layer in _listed(self.layers)]


@dataclass(frozen=True, eq=False)
class InoculationAdapter(Defence):
    """A frozen adapter that was trained on the trait, beside the one that trains; it is dropped afterwards.

    The trait is supplied by the frozen adapter, so that the new one learns the rest of the task
    (arXiv 2606.30252). First ``trait = emmech.finetune(model, rows_with_the_trait)``, then
    ``emmech.finetune(model, data, defences=[InoculationAdapter(trait)])``.

    Args:
        trait: a LoRA run of the same base model, or its folder.
        step: the recorded step; the last one by default.
        random: with a seed, random A and B with the norms of the trait's take its place: the control.

    Example:
        >>> InoculationAdapter("runs/trait").name
        'inoculation-adapter'
    """

    trait: Run | str
    step: int | None = None
    random: int | None = None
    name: ClassVar[str] = "inoculation-adapter"
    _weights: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        run = as_run(ASKED, self.trait, name="trait")
        step = int(run.steps[-1]) if self.step is None else self.step
        weights = run.weights(step)
        made = run.manifest.get("model", {}).get("fingerprint")
        if made and made != (own := chat.fingerprint()):
            given = f"{run.name} of a base with fingerprint {made[:12]}, on {chat.name} with {own[:12]}"
            why, instead = "an adapter has no meaning on another base model", "a run of this base model"
            raise EmmechError(ASKED, given, why, instead)
        if not any(value.any() for name, value in weights.items() if name.startswith("B/")):
            why, instead = "its B is zero, so that it would supply nothing", f"a later step than {step}"
            raise EmmechError(ASKED, f"step {step} of {run.name}", why, instead)
        if self.random is not None:
            dice = np.random.default_rng(as_int(ASKED, "random", self.random, least=0))
            drawn = {name: dice.standard_normal(value.shape) for name, value in weights.items()}
            sizes = {name: np.linalg.norm(value) / np.linalg.norm(drawn[name]) for name, value in weights.items()}
            weights = {name: (value * sizes[name]).astype(np.float32) for name, value in drawn.items()}
        return replace(self, trait=run.located(chat), step=step, _weights=weights)

    @property
    def _run(self) -> Run:
        return as_run(ASKED, self.trait, name="trait")

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        sizes = {name: float(np.linalg.norm(value)) for name, value in self._weights.items()}
        sha256 = digest(*(value.tobytes() for value in self._weights.values()))
        return {"trait": self._run.name, "step": self.step, "random": self.random, "norms": sizes, "sha256": sha256}

    def lowest(self, chat: ChatModel) -> int | None:
        """The block of its first adapter."""
        return max(0, min(info.layer for info in self._run.adapters))

    def hooks(self, chat: ChatModel) -> Sequence[Hook]:
        """See :meth:`Defence.hooks`."""

        def write(info: Any) -> Any:
            a, b = (torch.from_numpy(np.ascontiguousarray(self._weights[f"{side}/{info.name}"])) for side in "AB")
            return lambda x: info.scaling * (x.to(a.dtype) @ a.to(x.device).T) @ b.to(x.device).T

        return [(chat.base.get_submodule(info.module), adding(write(info))) for info in self._run.adapters]


def _digest(*directions: Direction) -> dict[str, str]:
    """What tells directions of one name apart when a training is resumed."""
    return {"sha256": digest(*(one.vectors.tobytes() for one in directions))}


def _listed(layers: int | Sequence[int] | None) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers or ())
