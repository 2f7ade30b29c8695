"""Rows of one batch under adapters of their own.

A rank-r adapter writes ``scale * scaling * (x A^T) B^T``. With A and B stacked over variants, one batched product
serves any number of variants in one forward: the base weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.families import Family

__all__ = [
    "Capture",
    "RowAdapter",
    "RowSteering",
    "Rows",
    "Site",
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
class Rows:
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

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        """The rows with every tensor ``[groups, ...]`` replaced by a function of it: some groups, say."""
        pick = {field.name: {k: function(v) for k, v in getattr(self, field.name).items()} for field in fields(self)}
        return Rows(**pick)  # type: ignore[arg-type]


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
    handful of groups the surplus is a few vectors beside a whole weight matrix.

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

    def __init__(self, base: nn.Module, rows: Rows, name: str) -> None:
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

    def __init__(self, block: nn.Module, rows: Rows, layer: int, family: Family) -> None:
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


class Capture(nn.Module):
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
