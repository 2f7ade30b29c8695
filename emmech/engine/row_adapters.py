"""Rows of one batch under adapters of their own.

A rank-r adapter writes ``scale * scaling * (x A^T) B^T``. With A and B stacked over variants, one batched product
serves any number of variants in one forward: the base weights are read once for all of them. Runs that train together
have theirs in :class:`StackedAdapters`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.families import Family
from emmech.chat.model import ChatModel
from emmech.engine.adapters import AdapterInfo, adapter_layers

__all__ = [
    "ReadWrite",
    "RowAdapter",
    "RowSteering",
    "Site",
    "StackedAdapters",
    "VariantWeights",
    "inner",
    "write",
    "write_of",
]


@dataclass(frozen=True)
class Site:
    """Where some run has an adapter: ``path`` is relative to the block; ``rank`` is the largest of all runs."""

    layer: int
    path: str
    rank: int


@dataclass
class VariantWeights:
    """Which adapter each row of the batch under way has.

    A batch of ``groups * n`` rows belongs to ``groups`` variants in order, n rows each.

    Args:
        A: per module ``[groups, d_in, rank]``.
        B: per module ``[groups, rank, d_out]``, with scale and scaling multiplied in.
        steering: per layer ``[groups, d_model]``, with the coefficient multiplied in.
    """

    A: Mapping[str, torch.Tensor] = field(default_factory=dict)
    B: Mapping[str, torch.Tensor] = field(default_factory=dict)
    steering: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of variants."""
        return len(next(iter((*self.A.values(), *self.steering.values())), ()))

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VariantWeights:
        """The rows with every tensor ``[groups, ...]`` replaced by a function of it: some groups, say."""
        pick = {field.name: {k: function(v) for k, v in getattr(self, field.name).items()} for field in fields(self)}
        return VariantWeights(**pick)  # type: ignore[arg-type]


def write(
    out: Float[torch.Tensor, "*tokens d_out"],
    z: Float[torch.Tensor, "groups seq rank"],
    B: Float[torch.Tensor, "groups rank d_out"],
    *,
    in_place: bool = False,
) -> Float[torch.Tensor, "*tokens d_out"]:
    """``out + z B`` with each group's own B; added in the adapter's dtype, as PEFT does."""
    grouped = out.reshape(B.shape[0], -1, out.shape[-1])
    in_place = in_place and grouped.dtype == B.dtype and not torch.is_grad_enabled()
    if not in_place:  # contiguous: a sum with an expanded tensor is laid out otherwise, and products of it are slow
        grouped = grouped.to(B.dtype).contiguous()
    if B.shape[1] == 1:  # rank 1 is one pass over memory, where a batch of products has a price per entry
        added = grouped.addcmul_(z, B) if in_place else torch.addcmul(grouped, z, B)
    else:
        added = grouped.baddbmm_(z, B) if in_place else torch.baddbmm(grouped, z, B)
    return added.to(out.dtype).reshape(out.shape)


def inner(
    x: Float[torch.Tensor, "tokens d_in"], A: Float[torch.Tensor, "groups d_in rank"]
) -> Float[torch.Tensor, "tokens groups rank"]:
    """``x A`` under every group's A, in one product and in the adapters' dtype."""
    return rearrange(x.to(A.dtype) @ rearrange(A, "g i r -> i (g r)"), "t (g r) -> t g r", g=len(A))


def write_of(
    x: Float[torch.Tensor, "*tokens d_in"],
    A: Float[torch.Tensor, "groups d_in rank"],
    B: Float[torch.Tensor, "groups rank d_out"],
    of: Int[torch.Tensor, "..."],
) -> Float[torch.Tensor, "*tokens d_out"]:
    """What tokens add that belong to groups in any order: ``x A B`` of each one's own.

    The groups' maps are side by side in one product, and each token keeps its own group's part: at rank 1 and a
    handful of groups the surplus is a few vectors against a whole weight matrix.

    Args:
        of: the group of each token, or broadcastable to that.
    """
    z = inner(x.flatten(0, -2), A)
    if len(A) > 1:
        own = of.expand(x.shape[:-1]).reshape(-1, 1) == torch.arange(len(A), device=of.device)
        z = torch.where(own[..., None], z, 0.0)
    return (z.flatten(1) @ B.flatten(0, 1)).view(*x.shape[:-1], -1)


class RowAdapter(nn.Module):
    """A linear module with a per-row adapter on it."""

    def __init__(self, base: nn.Module, rows: VariantWeights, name: str) -> None:
        super().__init__()
        self.base, self.rows, self.name = base, rows, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output with each row's own write added."""
        a = self.rows.A[self.name]
        z = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]).to(a.dtype), a)
        # what the linear module returned is used here only
        return write(self.base(x), z, self.rows.B[self.name], in_place=True)


class RowSteering(nn.Module):
    """A block with a vector added to its residual stream, each group's own."""

    def __init__(self, block: nn.Module, rows: VariantWeights, layer: int, family: Family) -> None:
        super().__init__()
        self.block, self.rows, self.layer, self._family = block, rows, layer, family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output plus coefficient times direction."""
        out = self.block(*args, **kwargs)
        return self._family.with_residual(out, self.steered(self._family.residual(out)))

    def steered(self, out: torch.Tensor) -> torch.Tensor:
        """A residual stream with its vector added."""
        vectors = self.rows.steering[self.layer]
        shaped = out.reshape(vectors.shape[0], -1, out.shape[-1])
        return (shaped + vectors[:, None].to(out.dtype)).reshape(out.shape)


class ReadWrite(nn.Module):
    """A module that keeps what it last read and wrote."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.read: torch.Tensor = torch.empty(0)
        self.wrote: torch.Tensor = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's own output."""
        self.read, self.wrote = x, self.base(x)
        return self.wrote

    def taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What it read and wrote, which it then lets go of."""
        taken = self.read, self.wrote
        self.read = self.wrote = torch.empty(0)
        return taken


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
