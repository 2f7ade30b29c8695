"""Rows of one batch under adapters of their own.

A rank-r adapter writes ``scale * scaling * (x A^T) B^T``. With A and B stacked over variants, one batched product
serves any number of variants in one forward: the base weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import nn

__all__ = [
    "AtReads",
    "Capture",
    "RowAdapter",
    "RowSteering",
    "Rows",
    "Site",
    "Skip",
    "with_attention",
    "with_module",
    "write",
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


class RowAdapter(nn.Module):
    """A linear module with a per-row adapter on it."""

    def __init__(self, base: nn.Module, rows: Rows, name: str) -> None:
        super().__init__()
        self.base, self.rows, self.name = base, rows, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output with each row's own write added."""
        a = self.rows.A[self.name]
        z = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]).to(a.dtype), a)
        # what the linear module returned is nobody else's
        return write(self.base(x), z, self.rows.B[self.name], in_place=True)


class RowSteering(nn.Module):
    """A block with a vector added to its output, each group's own."""

    def __init__(self, block: nn.Module, rows: Rows, layer: int) -> None:
        super().__init__()
        self.block, self.rows, self.layer = block, rows, layer

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The block's output plus coefficient times direction."""
        return self.steered(self.block(*args, **kwargs))

    def steered(self, out: torch.Tensor) -> torch.Tensor:
        """A block's output with its vector added."""
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


class AtReads(nn.Module):
    """The last block's MLP, run at read positions only: nothing above it looks at the others."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.flat: torch.Tensor | None = None  # indices into [rows * seq]; None runs everywhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's output at read positions, zero elsewhere."""
        if self.flat is None:
            return self.mlp(x)  # type: ignore[no-any-return]
        every = x.reshape(-1, x.shape[-1])
        read = self.mlp(every[self.flat])
        return read.new_zeros(every.shape[0], read.shape[-1]).index_copy(0, self.flat, read).reshape(x.shape)


class Skip(nn.Module):
    """Stands for a block that has already run, so that the layers above keep their numbers."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What came in."""
        return hidden


def with_module(root: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A view of ``root`` with the submodule at ``path`` replaced; everything else is shared, ``root`` untouched.

    Example:
        >>> body = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> view = with_module(body, "1", nn.Identity())
        >>> view[0] is body[0], type(body[1]).__name__
        (True, 'ReLU')
    """
    if not path:
        return replacement
    import copy

    head, _, rest = path.partition(".")
    view = copy.copy(root)
    view._modules = dict(root._modules)
    child = root.get_submodule(head)
    view._modules[head] = with_module(child, rest, replacement) if rest else replacement
    return view


def with_attention(view: nn.Module, name: str) -> nn.Module:
    """A view of a trunk whose attention modules call the registered attention function ``name``."""
    import copy

    for path, module in list(view.named_modules()):
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            twin, config = copy.copy(view.get_submodule(path)), copy.copy(cast("Any", module.config))
            config._attn_implementation = name
            twin.config = config
            view = with_module(view, path, twin)
    return view
