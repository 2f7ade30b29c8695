"""The adapters of several runs in one module: one forward serves the rows of all of them.

Every row of a batch belongs to one run and sees only that run's A and B. The runs' low-rank maps are put next to
each other, so that one matrix product computes all of them, and each row keeps its own run's part; at rank 1 and a
handful of runs the surplus is a few vectors against a whole weight matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.adapters import AdapterInfo, adapter_layers
from emmech.engine.row_adapters import write_of

__all__ = ["StackedAdapters"]


class StackedAdapters(nn.Module):
    """A and B of every adapter for every run; the parameters are those of each run by itself.

    Forwards use copies of all runs' weights that :meth:`gather` stacks; after the backward passes :meth:`spread`
    hands their gradients to the parameters, whose hooks, clipping and optimizer know nothing of the stack.

    Args:
        chat: with the PEFT adapters on it, whose places and scaling are used.
        starts: for each run ``"A/<name>" [rank, d_in]`` and ``"B/<name>" [d_out, rank]``.
        dropout: share of an adapter's inputs set to zero while gradients are taken.

    ``write_of`` is an adapter whose write the caller adds itself, by :meth:`write`. ``lost_at`` holds for each run
    the step at which its loss was no longer finite, -1 for those in good order.
    """

    write_of: AdapterInfo | None = None
    lost_at: torch.Tensor

    def __init__(self, chat: ChatModel, starts: Sequence[Mapping[str, torch.Tensor]], *, dropout: float = 0.0) -> None:
        super().__init__()
        self._layers = list(adapter_layers(chat.model))
        self.infos: tuple[AdapterInfo, ...] = tuple(info for info, _, _ in self._layers)
        self.runs = len(starts)
        self.dropout = dropout
        # as PEFT keeps them: a model may be spread over devices
        peft = {
            f"{side}/{info.name}": getattr(layer, f"lora_{side}")[name].weight
            for info, layer, name in self._layers
            for side in ("A", "B")
        }
        self._own = nn.ModuleList(
            nn.ParameterList(nn.Parameter(start[side].detach().clone().to(like)) for side, like in peft.items())
            for start in starts
        )
        self.register_buffer("lost_at", torch.full((self.runs,), -1))
        if hasattr(chat.base, "hf_device_map"):  # the Trainer then leaves every adapter on its layer's device
            self.hf_device_map = chat.base.hf_device_map
        self._rows: torch.Tensor | None = None  # which run each row of the present forward belongs to
        self.gather()

    def of(self, run: int) -> list[tuple[AdapterInfo, nn.Parameter, nn.Parameter]]:
        """The adapters of one run: where each is, A ``[rank, d_in]`` and B ``[d_out, rank]``."""
        own = list(self._own[run].parameters())
        return list(zip(self.infos, own[::2], own[1::2], strict=True))

    def gather(self) -> None:
        """Stack all runs' present weights: ``A[name] [runs, rank, d_in]`` and ``B[name] [runs, rank, d_out]``."""
        self.A: dict[str, torch.Tensor] = {}
        self.B: dict[str, torch.Tensor] = {}
        for i, info in enumerate(self.infos):
            self.A[info.name] = torch.stack([own[2 * i] for own in self._own]).detach().requires_grad_()  # type: ignore[index]
            self.B[info.name] = torch.stack([own[2 * i + 1].T for own in self._own]).detach().requires_grad_()  # type: ignore[index]

    def spread(self, runs: Iterable[int]) -> None:
        """Pass the stacks' gradients on to the parameters of some runs."""
        for run in runs:
            for info, a, b in self.of(run):
                grads = [side.grad for side in (self.A[info.name], self.B[info.name])]
                of_a, of_b = (None if grad is None else grad[run] for grad in grads)
                torch.autograd.backward(
                    [a, b],
                    [
                        torch.zeros_like(a) if of_a is None else of_a,
                        torch.zeros_like(b) if of_b is None else of_b.T.contiguous(),
                    ],
                )

    def write(self, info: AdapterInfo, x: torch.Tensor, run_of: torch.Tensor) -> torch.Tensor:
        """What the adapters add: ``scaling * (x A_run.T) B_run``, in the adapters' dtype.

        Args:
            x: ``[..., d_in]``.
            run_of: the run of each entry, ``[...]`` or broadcastable to it.
        """
        if self.dropout and torch.is_grad_enabled():
            x = nn.functional.dropout(x, self.dropout)
        return write_of(x, self.A[info.name].transpose(1, 2), self.B[info.name], run_of) * info.scaling

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """PEFT's own adapters off and these on, each row by the run that :meth:`rows_of` names."""
        handles = []
        for info, layer, _ in self._layers:
            if info != self.write_of:
                handles.append(layer.register_forward_hook(self._hook(info)))
        try:
            with self._own_writes(False):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, info: AdapterInfo) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if self._rows is None:
                return output
            return (output + self.write(info, inputs[0], self._rows[:, None].to(output.device))).to(output.dtype)

        return hook

    @contextlib.contextmanager
    def _own_writes(self, on: bool) -> Iterator[None]:
        before = [layer._disable_adapters for _, layer, _ in self._layers]
        for _, layer, _ in self._layers:
            layer._disable_adapters = not on  # enable_adapters() would change requires_grad as well
        try:
            yield
        finally:
            for (_, layer, _), was in zip(self._layers, before, strict=True):
                layer._disable_adapters = was

    @contextlib.contextmanager
    def rows_of(self, runs: torch.Tensor) -> Iterator[None]:
        """Within: row i of every forward belongs to run ``runs[i]``."""
        before, self._rows = self._rows, runs
        try:
            with self._own_writes(False):
                yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def only(self, run: int) -> Iterator[None]:
        """One run's adapters in PEFT's own layers, for whatever looks at the model as a whole."""
        for (_, layer, name), (_, a, b) in zip(self._layers, self.of(run), strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.data, b.data
        with self._own_writes(True):
            yield

    @torch.no_grad()
    def lose(self, run: int, step: int) -> None:
        """Give a run up at this step: its weights become zero, since what is not finite would spread in products."""
        self.lost_at[run] = step
        for parameter in self._own[run].parameters():
            parameter.zero_()
            parameter.grad = None
