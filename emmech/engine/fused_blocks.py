"""Halves of a decoder block, the final norm and the loss, each with a backward written by hand for frozen weights.

Each is one autograd function that keeps only what its backward needs, works in place, and computes no gradient of
a weight. A backward uses up what was kept, so it runs once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["AnswerLoss", "Attend", "Attention", "Mlp", "Norm", "Normed", "Places", "Think"]


@dataclass(frozen=True)
class Norm:
    """An RMS norm over the last dimension, in place where it can be."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed ``x [tokens, width]``, and one over each token's root mean square ``[tokens, 1]``."""
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(self.eps).rsqrt_()[:, None]
        return (x * scale).mul_(self.weight), scale

    def add_back(self, onto: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``onto`` plus the gradient at ``x`` for ``grad`` at the normed ``x``; overwrites both, returns the first."""
        grad.mul_(self.weight)
        along = torch.linalg.vecdot(grad, x)[:, None] * scale.pow(3) / x.shape[-1]
        return onto.addcmul_(grad, scale).addcmul_(x, along, value=-1)


@dataclass(frozen=True)
class Mlp:
    """Maps of a gated MLP, ``[d_mlp, d_model]`` and ``[d_model, d_mlp]``, and the norm before it."""

    norm: Norm
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Attention:
    """Maps of an attention and the norm before it."""

    norm: Norm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: torch.Tensor
    scaling: float
    d_head: int


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward stand.

    Args:
        cos, sin: of the rows' own positions ``[tokens, 1, d_head / 2]``.
        rows: how many.
        queries: places of the tokens that ask, row by row, among all rows' tokens ``[rows * asking]``; None for all.
        mask: added to the scores ``[rows or 1, asking, stem + tokens]``.
        of_stem: which stem each row follows ``[rows]``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rows: int
    queries: torch.Tensor | None
    mask: torch.Tensor
    of_stem: torch.Tensor | None


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, into: torch.Tensor, *, back: bool = False
) -> torch.Tensor:
    """Rotary positions, written ``into`` a tensor of x's shape ``[..., tokens, d_head]`` in any memory layout."""
    x, turned = x.unflatten(-1, (2, -1)), into.unflatten(-1, (2, -1))
    torch.mul(x, cos, out=turned)
    turned[..., 0, :].addcmul_(x[..., 1, :], sin[..., 0, :], value=1 if back else -1)
    turned[..., 1, :].addcmul_(x[..., 0, :], sin[..., 0, :], value=-1 if back else 1)
    return into


class Attend(torch.autograd.Function):
    """``x + attention(norm(x))`` of rows behind their stems, at the places that ask, and the keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stem_keys: torch.Tensor | None,
        stem_values: torch.Tensor | None,
        part: Attention,
        places: Places,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From ``x [rows * tokens, d_model]`` to ``[rows * asking, d_model]``, and the rows' keys and values."""
        ctx.set_materialize_grads(False)
        rows, d_head, asking = places.rows, part.d_head, places.queries
        normed, scale = part.norm(x)
        tokens, heads = len(x) // rows, part.key.out_features // d_head
        stem = 0 if stem_keys is None else stem_keys.shape[2]
        keys, values = (x.new_empty(rows, heads, stem + tokens, d_head) for _ in range(2))
        if stem_keys is not None and stem_values is not None:
            assert places.of_stem is not None
            keys[:, :, :stem] = stem_keys.index_select(0, places.of_stem)
            values[:, :, :stem] = stem_values.index_select(0, places.of_stem)
        own = part.key(normed).view(rows, tokens, heads, d_head).transpose(1, 2)
        _rotated(own, places.cos, places.sin, keys[:, :, stem:])
        values[:, :, stem:] = part.value(normed).view(rows, tokens, heads, d_head).transpose(1, 2)
        cos, sin = places.cos, places.sin
        if asking is not None:
            normed = normed.index_select(0, asking)
            shape = rows, 1, 1, len(asking) // rows, 1, d_head // 2
            cos, sin = cos[asking % tokens].view(shape), sin[asking % tokens].view(shape)
        group = part.query.out_features // (heads * d_head)
        raw = part.query(normed).view(rows, len(normed) // rows, heads, group, d_head)
        raw = raw.permute(0, 2, 3, 1, 4)  # [rows, heads, group, asking, d_head]
        queries = _rotated(raw, cos, sin, x.new_empty(raw.shape)).flatten(2, 3).flatten(0, 1)
        kept = keys[:, :, stem:], values[:, :, stem:]
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        mask = places.mask.repeat(1, group, 1)
        mask = mask.expand(rows * heads, -1, -1) if len(mask) == 1 else mask.repeat_interleave(heads, 0)
        weights = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=part.scaling).softmax(-1)
        read = (weights @ values).view(raw.shape).permute(0, 3, 1, 2, 4)
        read = read.reshape(len(normed), part.query.out_features)
        ctx.kept = x, scale, queries, keys, values, weights, cos, sin
        ctx.part, ctx.places, ctx.stem = part, places, stem
        ctx.stems = 0 if stem_keys is None else len(stem_keys)
        return torch.addmm(x if asking is None else x.index_select(0, asking), read, part.out.T), *kept

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *later: torch.Tensor | None) -> Any:  # type: ignore[override]
        """Gradients at ``x`` and at the stems' keys and values; ``later`` are those of whoever read ours."""
        x, scale, queries, keys, values, weights, cos, sin = ctx.kept
        ctx.kept = None
        part, places, stem = ctx.part, ctx.places, ctx.stem
        rows, d_head, asking = places.rows, part.d_head, places.queries
        heads, tokens = len(keys) // rows, len(x) // rows
        group = part.query.out_features // (heads * d_head)
        asks = queries.shape[1] // group
        if grad is None:
            grad = x.new_zeros(rows * asks, x.shape[1])
        read = (grad @ part.out).view(rows, asks, heads, group, d_head)
        read = read.permute(0, 2, 3, 1, 4).reshape(queries.shape)
        d_values = (weights.transpose(1, 2) @ read).view(rows, heads, -1, d_head)
        d_scores = torch._softmax_backward_data(read @ values.transpose(1, 2), weights, -1, weights.dtype)
        d_scores.mul_(part.scaling)
        d_keys = (d_scores.transpose(1, 2) @ queries).view(rows, heads, -1, d_head)
        d_queries = (d_scores @ keys).view(rows, heads, group, asks, d_head)
        for own, more in zip((d_keys, d_values), later, strict=True):
            if more is not None:
                own[:, :, stem:].add_(more)
        turned = x.new_empty(rows, asks, heads, group, d_head)
        _rotated(d_queries, cos, sin, turned.permute(0, 2, 3, 1, 4), back=True)
        asked = turned.view(rows * asks, part.query.out_features) @ part.query.weight
        own = x.new_empty(rows, tokens, heads, d_head)
        _rotated(d_keys[:, :, stem:], places.cos, places.sin, own.transpose(1, 2), back=True)
        normed = own.view(len(x), -1) @ part.key.weight
        normed.addmm_(d_values[:, :, stem:].transpose(1, 2).reshape(len(x), -1), part.value.weight)
        if asking is None:
            onto = grad.clone()
            normed.add_(asked)
        else:
            onto = torch.zeros_like(x).index_add_(0, asking, grad)
            normed.index_add_(0, asking, asked)
        d_stem: list[torch.Tensor | None] = [None, None]
        if stem and ctx.needs_input_grad[1]:
            # a product with ones and zeros: index_add_ goes entry by entry
            follows = nn.functional.one_hot(places.of_stem, ctx.stems).T.to(x)
            d_stem = [
                (follows @ d[:, :, :stem].reshape(rows, -1)).view(-1, heads, stem, d_head) for d in (d_keys, d_values)
            ]
        return part.norm.add_back(onto, normed, x, scale), *d_stem, None, None


class Think(torch.autograd.Function):
    """``x + mlp(norm(x))``, ``[tokens, d_model]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: Mlp) -> torch.Tensor:
        """The residual behind the MLP."""
        normed, scale = part.norm(x)
        gate, up = normed @ part.gate.T, normed @ part.up.T
        opened = nn.functional.silu(gate)
        ctx.kept, ctx.part = (x, scale, gate, up, opened), part
        return torch.addmm(x, opened * up, part.down.T)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """The gradient at ``x``."""
        x, scale, gate, up, opened = ctx.kept
        ctx.kept, part = None, ctx.part
        inner = grad @ part.down
        opened.mul_(inner)
        d_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        normed = (d_gate @ part.gate).addmm_(opened, part.up)
        return part.norm.add_back(grad.clone(), normed, x, scale), None


class Normed(torch.autograd.Function):
    """``norm(x)``, ``[tokens, d_model]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """The normed residual."""
        normed, scale = norm(x)
        ctx.kept = x, scale, norm
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """The gradient at ``x``."""
        x, scale, norm = ctx.kept
        return norm.add_back(torch.zeros_like(x), grad.clone(), x, scale), None


class AnswerLoss(torch.autograd.Function):
    """Negative log-probability of each target, in nats; the logits' one copy becomes their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, unembedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """From ``hidden [tokens, d_model]`` behind the final norm to ``[tokens]``."""
        logits = hidden @ unembedding.T
        logits.sub_(logits.amax(1, keepdim=True))
        picked = logits.gather(1, targets[:, None])[:, 0]
        total = logits.exp_().sum(1)
        ctx.kept = logits, total, targets, unembedding
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """The gradient at ``hidden``."""
        logits, total, targets, unembedding = ctx.kept
        ctx.kept = None
        logits.mul_((grad / total)[:, None])
        logits[torch.arange(len(targets)), targets] -= grad
        return logits @ unembedding, None, None
