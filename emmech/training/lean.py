"""The blocks above the adapters with a backward written by hand: frozen weights, float32, short rows, one core.

In a small model the matrix products are a third of a training step; the rest is element-wise passes over memory
that eager code reads and writes several times. Here each half of a block is one autograd function that keeps only
what its backward needs, works in place, and computes no gradient of a frozen weight. In the last block, queries and
MLP run only at the positions that are read. Everything else is left to the model's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emmech.chat.model import ChatModel

__all__ = ["LeanBlocks", "lean_blocks"]

_FAMILIES = ("qwen2", "llama")  # RMS norm before each half, rotary positions, gated SiLU, nothing behind a half


@dataclass(frozen=True)
class _Norm:
    """An RMS norm over the last dimension, in place where it can be."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed ``x [tokens, width]``, and one over each token's root mean square ``[tokens, 1]``."""
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(self.eps).rsqrt_()[:, None]
        return (x * scale).mul_(self.weight), scale

    def add_back(
        self, onto: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """``onto`` plus the gradient at ``x`` for ``grad`` at the normed ``x``; overwrites both, returns the first."""
        grad.mul_(self.weight)
        along = torch.linalg.vecdot(grad, x)[:, None] * scale.pow(3) / x.shape[-1]
        return onto.addcmul_(grad, scale).addcmul_(x, along, value=-1)


@dataclass(frozen=True)
class _Mlp:
    norm: _Norm
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class _Attention:
    norm: _Norm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: torch.Tensor
    scaling: float
    d_head: int


@dataclass(frozen=True)
class _Places:
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


class _Attend(torch.autograd.Function):
    """``x + attention(norm(x))`` of rows behind their stems, at the places that ask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stem_keys: torch.Tensor | None,
        stem_values: torch.Tensor | None,
        part: _Attention,
        places: _Places,
    ) -> torch.Tensor:
        """From ``x [rows * tokens, d_model]`` to ``[rows * asking, d_model]``."""
        rows, d_head, asking = places.rows, part.d_head, places.queries
        normed, scale = part.norm(x)
        tokens, heads = len(x) // rows, part.key.out_features // d_head
        stem = 0 if stem_keys is None else stem_keys.shape[2]
        keys, values = (x.new_empty(rows, heads, stem + tokens, d_head) for _ in range(2))
        if stem_keys is not None and stem_values is not None:
            keys[:, :, :stem], values[:, :, :stem] = stem_keys[places.of_stem], stem_values[places.of_stem]
        own = part.key(normed).view(rows, tokens, heads, d_head).transpose(1, 2)
        _rotated(own, places.cos, places.sin, keys[:, :, stem:])
        values[:, :, stem:] = part.value(normed).view(rows, tokens, heads, d_head).transpose(1, 2)
        cos, sin = places.cos, places.sin
        if asking is not None:
            normed = normed[asking]
            cos, sin = (
                table[asking % tokens].view(rows, 1, 1, -1, 1, d_head // 2) for table in (cos, sin)
            )
        raw = part.query(normed).view(rows, -1, heads, part.query.out_features // (heads * d_head), d_head)
        raw = raw.permute(0, 2, 3, 1, 4)  # [rows, heads, group, asking, d_head]
        queries = _rotated(raw, cos, sin, x.new_empty(raw.shape)).view(rows * heads, -1, d_head)
        keys, values = keys.view(rows * heads, -1, d_head), values.view(rows * heads, -1, d_head)
        mask = places.mask.repeat(1, raw.shape[2], 1)
        mask = mask.expand(rows * heads, -1, -1) if len(mask) == 1 else mask.repeat_interleave(heads, 0)
        weights = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=part.scaling).softmax(-1)
        read = (weights @ values).view(raw.shape).permute(0, 3, 1, 2, 4).reshape(len(normed), -1)
        ctx.kept = x, scale, queries, keys, values, weights, cos, sin
        ctx.part, ctx.places, ctx.stem = part, places, stem
        ctx.stems = 0 if stem_keys is None else len(stem_keys)
        return torch.addmm(x if asking is None else x[asking], read, part.out.T)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Gradients at ``x`` and at the stems' keys and values."""
        x, scale, queries, keys, values, weights, cos, sin = ctx.kept
        ctx.kept = None
        part, places, stem = ctx.part, ctx.places, ctx.stem
        rows, d_head, asking = places.rows, part.d_head, places.queries
        heads = len(keys) // rows
        split = (rows, -1, heads, part.query.out_features // (heads * d_head), d_head)
        read = (grad @ part.out).view(split).permute(0, 2, 3, 1, 4).reshape(queries.shape)
        d_values = (weights.transpose(1, 2) @ read).view(rows, heads, -1, d_head)
        d_scores = torch._softmax_backward_data(read @ values.transpose(1, 2), weights, -1, weights.dtype)
        d_scores.mul_(part.scaling)
        d_keys = (d_scores.transpose(1, 2) @ queries).view(rows, heads, -1, d_head)
        d_queries = (d_scores @ keys).view(rows, heads, split[3], -1, d_head)
        turned = x.new_empty(rows, d_queries.shape[3], heads, split[3], d_head)
        _rotated(d_queries, cos, sin, turned.permute(0, 2, 3, 1, 4), back=True)
        asked = turned.view(-1, part.query.out_features) @ part.query.weight
        tokens = len(x) // rows
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
            shape = (ctx.stems, heads, stem, d_head)
            d_stem = [
                x.new_zeros(shape).index_add_(0, places.of_stem, d[:, :, :stem]) for d in (d_keys, d_values)
            ]
        return part.norm.add_back(onto, normed, x, scale), *d_stem, None, None


class _Think(torch.autograd.Function):
    """``x + mlp(norm(x))``, ``[tokens, d_model]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: _Mlp) -> torch.Tensor:
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


class LeanBlocks:
    """Blocks from ``first`` on; made by :func:`lean_blocks`."""

    def __init__(self, chat: ChatModel, first: int) -> None:
        self._chat, self._first = chat, first
        self._attention = [_attention(block) for block in chat.blocks[first:]]
        # None: an adapter sits in it, so that the model's own modules run
        self._mlp = [_mlp(block) for block in chat.blocks[first:]]

    def __call__(
        self,
        entering: torch.Tensor,
        stem: int,
        read: torch.Tensor,
        past: Any = None,
        of_past: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The residual behind the last block at the places that are read, ``[places, d_model]``.

        Args:
            entering: residual of the rows' own tokens ``[rows, tokens, d_model]``, right-padded.
            stem: tokens before them.
            read: ``[rows, tokens]``.
            past: keys and values of the stems, a cache of transformers, from block ``first`` on.
            of_past: which stem each row follows ``[rows]``.
        """
        rows, tokens, width = entering.shape
        positions = torch.arange(stem, stem + tokens)
        cos, sin = (
            table[0, :, None, : table.shape[-1] // 2]
            for table in self._chat.trunk.rotary_emb(entering, positions[None])
        )
        hidden = entering.reshape(rows * tokens, width)
        masks: dict[tuple[int, int | None], torch.Tensor] = {}
        for at, (attention, mlp) in enumerate(zip(self._attention, self._mlp, strict=True)):
            block = self._chat.block(self._first + at)
            layer = past.layers[self._first + at] if past is not None else None
            keys, values = (layer.keys, layer.values) if layer is not None else (None, None)
            before = 0 if keys is None else keys.shape[2]
            kind = before, getattr(block.self_attn, "sliding_window", None)
            if kind not in masks:
                masks[kind] = _mask(tokens, *kind).to(entering)
            places = _Places(cos, sin, rows, None, masks[kind][None], of_past)
            kept = None
            if at == len(self._mlp) - 1:
                queries, kept = _asking(read)
                mask = masks[kind][queries % tokens].view(rows, -1, before + tokens)
                places = _Places(cos, sin, rows, queries, mask, of_past)
            hidden = _Attend.apply(hidden, keys, values, attention, places)  # type: ignore[no-untyped-call]
            if mlp is not None:
                hidden = _Think.apply(hidden, mlp)  # type: ignore[no-untyped-call]
            else:
                by_row = hidden.view(rows, -1, width)
                hidden = (by_row + block.mlp(block.post_attention_layernorm(by_row))).flatten(0, 1)  # type: ignore[operator]
        return hidden if kept is None else hidden[kept]


def lean_blocks(chat: ChatModel, first: int) -> LeanBlocks | None:
    """Blocks from ``first`` on, or None where the model's own forward has to run.

    That is so off the CPU, in other dtypes, in other architectures than Qwen2's and Llama's, where an adapter acts
    in attention, and where nothing lies above ``first``.
    """
    plain = chat.device.type == "cpu" and chat.dtype == torch.float32
    if first == chat.n_layers or not plain or chat.config.model_type not in _FAMILIES:
        return None
    blocks = list(chat.blocks[first:])
    if chat.config.hidden_act != "silu" or any(_attention(block) is None for block in blocks):
        return None
    return LeanBlocks(chat, first)


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight.detach(), module.variance_epsilon)


def _is_frozen(module: nn.Module, *, bias: bool = False) -> bool:
    """A plain linear map that does not train."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    return (bias or module.bias is None) and not any(p.requires_grad for p in module.parameters())


def _attention(block: Any) -> _Attention | None:
    own = block.self_attn
    inner = (own.q_proj, own.k_proj, own.v_proj)
    if not all(_is_frozen(module, bias=True) for module in inner) or not _is_frozen(own.o_proj):
        return None
    return _Attention(_norm(block.input_layernorm), *inner, own.o_proj.weight, own.scaling, own.head_dim)


def _mlp(block: Any) -> _Mlp | None:
    maps = (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
    if not all(_is_frozen(module) for module in maps):
        return None
    return _Mlp(_norm(block.post_attention_layernorm), *(module.weight for module in maps))


def _mask(tokens: int, before: int, window: int | None) -> torch.Tensor:
    """0 where a token sees a key and -inf elsewhere, ``[tokens, before + tokens]``; ``before`` are the stem's last."""
    distance = torch.arange(before, before + tokens)[:, None] - torch.arange(before + tokens)
    seen = (distance >= 0) & (distance < (window or before + tokens))
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _asking(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Places that ask in the last block, as many in each row, and which of them are read (None: all).

    Example:
        >>> _asking(torch.tensor([[False, True, True], [False, False, True]]))
        (tensor([1, 2, 5, 3]), tensor([0, 1, 2]))
    """
    order = torch.argsort(read.int(), dim=1, descending=True, stable=True)[:, : int(read.sum(1).max())]
    flat = (order + torch.arange(len(read))[:, None] * read.shape[1]).flatten()
    valid = read.flatten()[flat]
    return flat, None if bool(valid.all()) else valid.nonzero()[:, 0]
