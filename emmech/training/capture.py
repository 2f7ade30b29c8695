"""What is read off a model at one training step: adapters, gradient norms before clipping, projected updates.

Two forms. LoRA: A and B of every pair, whole. Full fine-tuning: the update itself is as large as the model, so
each weight's update W is kept as ``P W Q`` with seeded Gaussian P ``[16, rows]`` and Q ``[columns, 16]`` (a
bilinear Johnson-Lindenstrauss projection: inner products are kept in expectation), beside its exact norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from emmech.engine.adapters import AdapterInfo, adapter_layers

__all__ = ["Capture", "FullCapture", "GradientNorms", "LoraCapture", "find_capture"]

_SKETCH = 16


class Capture(Protocol):
    """Reads a trajectory's tensors and scalars off a model in training."""

    kind: str
    adapters: tuple[AdapterInfo, ...]

    def tensors(self) -> dict[str, np.ndarray]:
        """What is recorded at a step."""
        ...

    def scalars(self) -> dict[str, float]:
        """Numbers that go to the metrics."""
        ...

    def watched(self) -> dict[str, nn.Parameter]:
        """Parameters whose gradient norms are recorded, by metric name."""
        ...


def find_capture(model: Any, *, seed: int = 0, start: Mapping[str, torch.Tensor] | None = None) -> Capture:
    """LoRA pairs if the model has any, else the weights that require a gradient."""
    pairs = [
        (info, layer.lora_A[name].weight, layer.lora_B[name].weight) for info, layer, name in adapter_layers(model)
    ]
    return LoraCapture(pairs) if pairs else FullCapture(model, seed=seed, start=start)


class LoraCapture:
    """A ``[rank, d_in]`` and B ``[d_out, rank]`` of every pair, squeezed to vectors at rank 1.

    Whatever is added here is recorded wherever adapters train: in anyone's Trainer and in each of several runs.

    Args:
        pairs: each adapter with its A and B.
    """

    kind = "lora"

    def __init__(self, pairs: Sequence[tuple[AdapterInfo, nn.Parameter, nn.Parameter]]) -> None:
        self._pairs = pairs
        self.adapters = tuple(info for info, _, _ in pairs)

    def tensors(self) -> dict[str, np.ndarray]:
        """``"A/<adapter>"`` and ``"B/<adapter>"`` in float32."""
        found = {}
        for info, *sides in self._pairs:
            a, b = (sides[0][0], sides[1][:, 0]) if info.rank == 1 else sides
            found[f"A/{info.name}"], found[f"B/{info.name}"] = _float32(a), _float32(b)
        return found

    def scalars(self) -> dict[str, float]:
        """Nothing: norms follow from A and B."""
        return {}

    def watched(self) -> dict[str, nn.Parameter]:
        """A and B of every pair."""
        return {
            f"grad_norm_{side}/{info.name}": parameter
            for info, *sides in self._pairs
            for side, parameter in zip("AB", sides, strict=True)
        }


class FullCapture:
    """The update of all trained weights: seeded projection, and its norm by block.

    Args:
        start: copies of the weights before training, on the CPU; by default as they are now.
    """

    kind = "full"
    adapters: tuple[AdapterInfo, ...] = ()

    def __init__(self, model: nn.Module, *, seed: int, start: Mapping[str, torch.Tensor] | None = None) -> None:
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        known = start or {}
        self.start = {n: known[n] if n in known else p.detach().cpu().clone() for n, p in self.weights.items()}
        self._seed = seed

    def _updates(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.weights.items():
            yield name, parameter.detach().cpu().float() - self.start[name].float()

    def tensors(self) -> dict[str, np.ndarray]:
        """``"projection" [k]``, k = 256 per matrix and 16 per vector."""
        generator = torch.Generator().manual_seed(self._seed)  # anew each time: the same P and Q at every step
        parts = []
        with torch.no_grad():
            for _, update in self._updates():
                rows = update.reshape(-1, update.shape[-1])
                right = torch.randn(rows.shape[1], _SKETCH, generator=generator) / _SKETCH**0.5
                sketch = rows @ right
                if rows.shape[0] > 1:
                    left = torch.randn(_SKETCH, rows.shape[0], generator=generator) / _SKETCH**0.5
                    sketch = left @ sketch
                parts.append(sketch.reshape(-1))
        return {"projection": torch.cat(parts).numpy()}

    def scalars(self) -> dict[str, float]:
        """``update_norm/<block>``: exact Frobenius norm of the update by block, and in all."""
        squares: dict[str, float] = {}
        with torch.no_grad():
            for name, update in self._updates():
                parts = name.split(".")
                place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
                group = f"{parts[place - 1]}.{parts[place]}" if place else parts[-2]
                squares[group] = squares.get(group, 0.0) + float(update.double().square().sum())
        norms = {f"update_norm/{group}": value**0.5 for group, value in squares.items()}
        return {"update_norm": sum(squares.values()) ** 0.5, **norms}

    def watched(self) -> dict[str, nn.Parameter]:
        """Nothing: the Trainer logs the whole gradient's norm."""
        return {}


class GradientNorms:
    """Norms of accumulated gradients as backward leaves them, that is, before the Trainer clips.

    ``on_pre_optimizer_step`` sees gradients that are already clipped; a post-accumulate hook fires in
    backward, after each micro-batch, and the last one before the optimizer step holds the whole gradient.
    The norms stay on the device until they are read, so that no step waits for them.
    """

    def __init__(self, watched: dict[str, nn.Parameter]) -> None:
        self._norms: dict[str, torch.Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._keep(name)) for name, parameter in watched.items()
        ]

    def _keep(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._norms[name] = torch.linalg.vector_norm(parameter.grad)

        return hook

    def read(self) -> dict[str, float]:
        """The norms of the last step's gradients."""
        return {name: float(norm) for name, norm in self._norms.items()}

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).numpy()
