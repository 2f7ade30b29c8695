"""The adapters of many runs as stacked parameters: one forward for all, one AdamW step for all.

Every row of a batch belongs to one run and sees only that run's A and B. The runs' low-rank maps are laid side
by side, so that one matrix product computes all of them, and each row keeps its own run's part; at rank 1 and a
handful of runs the surplus is a few vectors beside a whole weight matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from emmech.chat.model import ChatModel
from emmech.engine.adapters import AdapterInfo, adapter_layers
from emmech.engine.row_adapters import write_of

__all__ = ["AdamW", "StackedAdapters", "clip_by_run"]


class StackedAdapters:
    """A and B of every adapter for every run.

    Args:
        chat: with the PEFT adapters on it, whose places and scaling these take over.
        starts: for each run ``"A/<name>" [rank, d_in]`` and ``"B/<name>" [d_out, rank]``.

    ``write_of`` is an adapter whose write the caller makes itself, by :meth:`write`.
    """

    write_of: AdapterInfo | None = None

    def __init__(self, chat: ChatModel, starts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._layers = list(adapter_layers(chat.model))
        self.infos: tuple[AdapterInfo, ...] = tuple(info for info, _, _ in self._layers)
        self.runs = len(starts)
        self.A: dict[str, torch.Tensor] = {}
        self.B: dict[str, torch.Tensor] = {}
        for info in self.infos:
            a = torch.stack([start[f"A/{info.name}"] for start in starts])
            b = torch.stack([start[f"B/{info.name}"].T for start in starts])  # as [rank, d_out], for the product
            self.A[info.name] = a.to(chat.device).requires_grad_()
            self.B[info.name] = b.to(chat.device).requires_grad_()
        self._rows: torch.Tensor | None = None  # which run each row of the present forward belongs to

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All A ``[runs, rank, d_in]`` and B ``[runs, rank, d_out]``, in the adapters' order."""
        return [p for info in self.infos for p in (self.A[info.name], self.B[info.name])]

    def write(self, info: AdapterInfo, x: torch.Tensor, run_of: torch.Tensor) -> torch.Tensor:
        """What the adapters add: ``scaling * (x A_run.T) B_run``, in the adapters' dtype.

        Args:
            x: ``[..., d_in]``.
            run_of: the run of each entry, ``[...]`` or broadcastable to it.
        """
        return write_of(x, self.A[info.name].transpose(1, 2), self.B[info.name], run_of) * info.scaling

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """PEFT's adapters off and these on, each row by the run that :meth:`rows_of` named."""
        handles = []
        for info, layer, _ in self._layers:
            layer._disable_adapters = True  # enable_adapters(False) would change requires_grad as well
            if info != self.write_of:
                handles.append(layer.register_forward_hook(self._hook(info)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, layer, _ in self._layers:
                layer._disable_adapters = False

    def _hook(self, info: AdapterInfo) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if self._rows is None:
                return output
            return (output + self.write(info, inputs[0], self._rows[:, None])).to(output.dtype)

        return hook

    @contextlib.contextmanager
    def rows_of(self, runs: torch.Tensor) -> Iterator[None]:
        """Within: row i of every forward belongs to run ``runs[i]``."""
        before, self._rows = self._rows, runs
        try:
            yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def only(self, run: int) -> Iterator[None]:
        """One run's adapters in PEFT's own layers, for whatever looks at the model as a whole."""
        with torch.no_grad():
            for info, layer, name in self._layers:
                layer.lora_A[name].weight.copy_(self.A[info.name][run])
                layer.lora_B[name].weight.copy_(self.B[info.name][run].T)
                layer._disable_adapters = False
        try:
            yield
        finally:
            for _, layer, _ in self._layers:
                layer._disable_adapters = True

    def arrays(self, run: int) -> dict[str, np.ndarray]:
        """``"A/<name>"`` and ``"B/<name>"`` as a Run records them: vectors at rank 1."""
        found = {}
        for info in self.infos:
            a, b = (side[info.name][run].detach().cpu().float() for side in (self.A, self.B))
            a, b = (a[0], b[0]) if info.rank == 1 else (a, b.T.contiguous())
            found[f"A/{info.name}"], found[f"B/{info.name}"] = a.numpy().copy(), b.numpy().copy()
        return found

    def forget(self, runs: Iterable[int]) -> None:
        """Set some runs' A and B to zero: what is not finite would spread through the shared products."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter[list(runs)] = 0.0

    def zero_gradients(self, runs: Iterable[int] | None = None) -> None:
        """Gradients of zero: of some runs, or of all where a step has no rows left."""
        for parameter in self.parameters:
            if parameter.grad is None or runs is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad[list(runs)] = 0.0

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """``"grad_norm_A/<name>"`` and ``"grad_norm_B/<name>"``, each ``[runs]``."""
        norms = {}
        for info in self.infos:
            for side, parameter in (("A", self.A[info.name]), ("B", self.B[info.name])):
                assert parameter.grad is not None
                norms[f"grad_norm_{side}/{info.name}"] = torch.linalg.vector_norm(parameter.grad, dim=(1, 2))
        return norms


def clip_by_run(parameters: Sequence[torch.Tensor], total: torch.Tensor, limit: float) -> None:
    """Scale each run's gradients so that their norm is at most ``limit``, as ``clip_grad_norm_`` does for one.

    Args:
        total: norms before clipping ``[runs]``.
        limit: 0 clips nothing.
    """
    if limit <= 0:
        return
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(factor[:, None, None])


@dataclass
class AdamW:
    """AdamW (arXiv 1711.05101) on parameters whose first dimension is the run; torch's arithmetic, step for step.

    Args:
        parameters: each ``[runs, ...]``.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """

    parameters: Sequence[torch.Tensor]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        """Start with moments of zero."""
        self._steps = 0
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self, learning_rates: Sequence[float]) -> None:
        """Take one step, each run at its own learning rate (0 leaves a run where it is), and drop the gradients."""
        self._steps += 1
        beta1, beta2 = self.betas
        rates = torch.tensor(learning_rates, dtype=torch.float64)
        first = rates / (1 - beta1**self._steps)
        root = (1 - beta2**self._steps) ** 0.5
        for parameter, (mean, square) in zip(self.parameters, self._moments, strict=True):
            assert parameter.grad is not None
            shape = (-1, *[1] * (parameter.ndim - 1))
            decay = (1 - rates * self.weight_decay).to(parameter).view(shape)
            parameter.mul_(decay)
            mean.lerp_(parameter.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            parameter.sub_(first.to(parameter).view(shape) * (mean / ((square.sqrt() / root).add_(self.eps))))
            parameter.grad = None
