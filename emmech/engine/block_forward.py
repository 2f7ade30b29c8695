"""One new token of many rows through decoder blocks, without the modules in between.

A decoding step has one token per row, where a module's forward is made for sequences: it turns heads and positions
around, joins halves that it has just cut and calls a dozen wrappers. Here norms, rotations and gates are written in
place, and a row's new keys lie where the cache wants them.

What is written out here is how four families put a block together; what a block is made of (linear maps, quantised or
not, with an adapter on them or not, activations) is called as it is. A block that is put together otherwise, or that
somebody listens to with a hook, is left to the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.hooks import has_hooks
from emmech.engine.row_adapters import AtReads, RowSteering, Skip
from emmech.engine.shared_prompt_cache import Branches

__all__ = ["Straight", "straight"]

_BLOCKS = frozenset({"Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "Gemma3DecoderLayer"})
_ATTENTIONS = frozenset({"Qwen2Attention", "Qwen3Attention", "LlamaAttention", "Gemma3Attention"})
_MLPS = frozenset({"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "Gemma3MLP"})
_NORMS = frozenset({"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm"})  # that multiply by their weight


class Straight:
    """A view of a trunk as a function of one token per row.

    Args:
        view: the trunk, in which some submodules are replaced.
        blocks: its blocks.
    """

    def __init__(self, view: Any, blocks: Sequence[nn.Module], final_norm: nn.Module, kinds: Sequence[str]) -> None:
        self.view, self.blocks, self.final_norm, self.kinds = view, blocks, final_norm, kinds

    @torch.no_grad()
    def __call__(
        self,
        hidden: Float[torch.Tensor, "rows d_model"],
        positions: Int[torch.Tensor, " rows"],
        cache: Branches,
    ) -> Float[torch.Tensor, "rows d_model"]:
        """What the trunk makes of the rows' new tokens."""
        turns = self._turns(hidden, positions)
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            hidden = _block(block, hidden, turns[kind], cache)
        return _normed(self.final_norm, hidden)

    def _turns(self, hidden: torch.Tensor, positions: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines ``[rows, 1, width]`` by kind of layer; there are few distinct positions."""
        distinct, inverse = torch.unique(positions, return_inverse=True)
        found = {}
        for kind in set(self.kinds):
            several = (kind,) if hasattr(self.view.rotary_emb, "layer_types") else ()
            cos, sin = self.view.rotary_emb(hidden[:1, None], distinct[None], *several)
            found[kind] = (cos[0].index_select(0, inverse)[:, None], sin[0].index_select(0, inverse)[:, None])
        return found


def straight(view: Any, chat: ChatModel) -> Straight | None:
    """The view as a function of one token per row; None where a block is not one that is known here."""
    blocks = list(view.get_submodule(chat.family.blocks))
    kinds = list(getattr(chat.config, "layer_types", None) or ["full_attention"] * len(blocks))
    norm = view.get_submodule(chat.family.final_norm)
    if not hasattr(view, "rotary_emb") or has_hooks(view) or not all(map(_known, blocks)):
        return None
    return Straight(view, blocks, norm, kinds[: len(blocks)])


def _known(block: nn.Module) -> bool:
    """Whether the block is put together as :func:`_block` does it."""
    if isinstance(block, Skip):
        return True
    block = _bare(block)
    attention, mlp = getattr(block, "self_attn", None), _bare(getattr(block, "mlp", nn.Identity()))
    return (
        type(block).__name__ in _BLOCKS
        and type(attention).__name__ in _ATTENTIONS
        and type(mlp).__name__ in _MLPS
        and not any(map(has_hooks, (block, attention, mlp)))
        and getattr(attention, "attn_logit_softcapping", None) is None
    )


def _bare(module: nn.Module) -> nn.Module:
    if isinstance(module, RowSteering):
        return module.block
    return module.mlp if isinstance(module, AtReads) else module


def _block(
    block: Any,
    hidden: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    cache: Branches,
) -> torch.Tensor:
    if isinstance(block, Skip):
        return hidden
    if isinstance(block, RowSteering):
        return block.steered(_block(block.block, hidden, turn, cache))
    attended = _attention(block.self_attn, _normed(block.input_layernorm, hidden), turn, cache)
    before, behind = block.post_attention_layernorm, None
    if (gemma := getattr(block, "pre_feedforward_layernorm", None)) is not None:
        attended = _normed(before, attended)  # Gemma norms what is written as well
        before, behind = gemma, block.post_feedforward_layernorm
    hidden = hidden + attended
    mlp: Any = _bare(block.mlp)
    read = _normed(before, hidden)
    gate = _linear(mlp.gate_proj, read)
    wrote = _linear(mlp.down_proj, mlp.act_fn(gate).mul_(_linear(mlp.up_proj, read)))
    return hidden + (wrote if behind is None else _normed(behind, wrote))


def _attention(
    module: Any,
    read: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    cache: Branches,
) -> torch.Tensor:
    query, keys, values = (
        _linear(one, read).reshape(len(read), -1, module.head_dim)
        for one in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, keys = _normed(module.q_norm, query), _normed(module.k_norm, keys)
    cache.put(module.layer_idx, _turned(keys, *turn), values)
    window = getattr(module, "sliding_window", None)
    found = cache.attend(_turned(query, *turn).mul_(module.scaling), module.layer_idx, window)
    return _linear(module.o_proj, found.reshape(len(read), -1))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, ``[rows, heads, width]``."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if type(module) is nn.Linear and not has_hooks(module):
        return nn.functional.linear(x, module.weight, module.bias)
    return module(x)  # type: ignore[no-any-return]


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    if type(module).__name__ not in _NORMS or x.dtype != torch.float32 or has_hooks(module):
        return module(x)  # type: ignore[no-any-return]
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return (x * mean.add_(module.variance_epsilon).rsqrt_()).mul_(module.weight)
