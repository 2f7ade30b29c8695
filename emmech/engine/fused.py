"""The blocks above the adapters with a backward written by hand: frozen weights, float32, short rows, one core.

In a small model the matrix products are a third of a training step; the rest is element-wise passes over memory
that eager code reads and writes several times. Where the halves of :mod:`emmech.engine.fused_blocks` fit, they run in
place of the model's own modules, and in the last block queries and MLP run only at the positions that are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.fused_blocks import AnswerLoss, Attend, Attention, Mlp, Norm, Normed, Places, Think
from emmech.engine.hooks import has_hooks

__all__ = ["LeanBlocks", "Past", "lean_blocks"]

# an RMS norm before each half, rotary positions, a gated SiLU, nothing behind a half
_FAMILIES = ("qwen2", "llama")


@dataclass
class _Layer:
    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class Past:
    """Keys and values ``[stems, heads, tokens, d_head]`` of each block from the first on."""

    layers: list[_Layer]


class LeanBlocks:
    """Blocks from ``first`` on, and the final norm; made by :func:`lean_blocks`."""

    def __init__(self, chat: ChatModel, first: int) -> None:
        self._chat = chat
        self._norm = _norm(chat.final_norm)
        self._blocks: list[Any] = list(chat.blocks[first:])
        self._attention = [_attention(block) for block in self._blocks]
        # None: an adapter sits in it, so that the model's own modules run
        self._mlp = [_mlp(block) for block in self._blocks]

    def __call__(
        self,
        entering: torch.Tensor,
        stem: int,
        read: torch.Tensor,
        past: Past | None = None,
        of_past: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the final norm gives at the places that are read, ``[places, d_model]``.

        Args:
            entering: residual of the rows' own tokens ``[rows, tokens, d_model]``, right-padded.
            stem: tokens before them.
            read: ``[rows, tokens]``.
            past: the stems' keys and values, from :meth:`stem`.
            of_past: which stem each row follows ``[rows]``.
        """
        queries, valid = _asking(read)
        hidden, _ = self._run(entering, stem, queries, past, of_past)
        return Normed.apply(hidden if valid is None else hidden.index_select(0, valid), self._norm)  # type: ignore[no-any-return, no-untyped-call]

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-probability of each target behind ``hidden [places, d_model]``, in nats."""
        return AnswerLoss.apply(hidden, self._chat.unembedding.weight, targets)  # type: ignore[no-any-return, no-untyped-call]

    def stem(self, entering: torch.Tensor) -> Past:
        """Keys and values of stems that enter with this residual ``[stems, tokens, d_model]``."""
        nobody = torch.zeros(0, dtype=torch.long)  # the last block's own result is read by no one
        return self._run(entering, 0, nobody, None, None)[1]

    def _run(
        self,
        entering: torch.Tensor,
        stem: int,
        queries: torch.Tensor,
        past: Past | None,
        of_past: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Past]:
        rows, tokens, width = entering.shape
        positions = torch.arange(stem, stem + tokens)
        cos, sin = (
            table[0, :, None, : table.shape[-1] // 2]
            for table in self._chat.trunk.rotary_emb(entering, positions[None])
        )
        hidden = entering.reshape(rows * tokens, width)
        masks: dict[tuple[int, int | None], torch.Tensor] = {}
        made = Past([])
        for at, (block, attention, mlp) in enumerate(zip(self._blocks, self._attention, self._mlp, strict=True)):
            keys, values = (past.layers[at].keys, past.layers[at].values) if past else (None, None)
            before = 0 if keys is None else keys.shape[2]
            window = getattr(block.self_attn, "sliding_window", None)
            if (before, window) not in masks:
                masks[before, window] = _mask(tokens, before, window).to(entering)
            mask = masks[before, window]
            if at < len(self._mlp) - 1:
                places = Places(cos, sin, rows, None, mask[None], of_past)
            else:
                mask = mask[queries % tokens].view(rows, len(queries) // rows, before + tokens)
                places = Places(cos, sin, rows, queries, mask, of_past)
            hidden, *own = Attend.apply(hidden, keys, values, attention, places)  # type: ignore[no-untyped-call]
            since = -min(window - 1, tokens) if window else 0  # what lies further back, nobody behind sees
            made.layers.append(_Layer(*(tensor[:, :, since:] for tensor in own)))
            if mlp is not None:
                hidden = Think.apply(hidden, mlp)  # type: ignore[no-untyped-call]
            elif len(hidden):
                by_row = hidden.view(rows, -1, width)
                hidden = (by_row + block.mlp(block.post_attention_layernorm(by_row))).flatten(0, 1)
        return hidden, made


def lean_blocks(chat: ChatModel, first: int) -> LeanBlocks | None:
    """Blocks from ``first`` on, or None where the model's own forward has to run.

    That is so off the CPU, in other dtypes, in other architectures than Qwen2's and Llama's, where an adapter acts
    in attention, where somebody listens to a block or a part of it, and where nothing lies above ``first``.
    """
    plain = chat.device.type == "cpu" and chat.dtype == torch.float32
    if first == chat.n_layers or not plain or chat.config.model_type not in _FAMILIES:
        return None
    blocks = list(chat.blocks[first:])
    if not _is_frozen(chat.unembedding) or chat.config.hidden_act != "silu":
        return None
    if has_hooks(chat.final_norm) or any(_is_heard(block) or _attention(block) is None for block in blocks):
        return None
    return LeanBlocks(chat, first)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _is_heard(block: Any) -> bool:
    parts = (block, block.self_attn, block.mlp, block.input_layernorm, block.post_attention_layernorm)
    return any(map(has_hooks, parts))


def _is_frozen(module: nn.Module, *, bias: bool = False) -> bool:
    """A plain linear map that does not train."""
    if type(module) is not nn.Linear or has_hooks(module):
        return False
    return (bias or module.bias is None) and not any(p.requires_grad for p in module.parameters())


def _attention(block: Any) -> Attention | None:
    own = block.self_attn
    inner = (own.q_proj, own.k_proj, own.v_proj)
    if not all(_is_frozen(module, bias=True) for module in inner) or not _is_frozen(own.o_proj):
        return None
    return Attention(_norm(block.input_layernorm), *inner, own.o_proj.weight, own.scaling, own.head_dim)


def _mlp(block: Any) -> Mlp | None:
    maps = (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
    if not all(_is_frozen(module) for module in maps):
        return None
    return Mlp(_norm(block.post_attention_layernorm), *(module.weight for module in maps))


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
