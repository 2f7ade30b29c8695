"""The decoding loop: one prefill per distinct prompt, then one token per live row and step.

It drives the Hugging Face model's own forward, so LoRA adapters and forward hooks (steering, ablation) act
as they do anywhere else. Three things make it quick: a prompt that is answered many times is read once and
its cache is copied; the cache grows in blocks instead of being copied at every token; finished rows leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emmech.chat.edits import announcing
from emmech.chat.model import ChatModel
from emmech.engine.gumbel import draw
from emmech.engine.logprobs import pad

__all__ = ["Decoded", "decode", "growing_cache", "positions_of"]

_BLOCK = 64  # tokens of cache that are allocated at once
_LEAVE = 0.8  # rows are moved together once no more than this share is still live


@dataclass(frozen=True)
class Decoded:
    """Token ids of one answer, the stop token left out, and why it ended: ``"stop"`` or ``"length"``."""

    ids: list[int]
    finish: str


@torch.no_grad()
def decode(
    chat: ChatModel,
    prompts: Sequence[Sequence[int]],
    which: Sequence[int],
    seeds: Sequence[int],
    *,
    conversations: Sequence[int] | None = None,
    total: int | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Decoded]:
    """Answer one batch.

    Args:
        prompts: distinct prompts, as token ids.
        which: for each row of the batch, the index of its prompt.
        seeds: for each row of the batch, its own seed.
        conversations: for each row of the batch, whose answer it is, where an intervention has a value for each of
            ``total`` conversations; by default each prompt is one.

    Returns:
        one answer per row, in order.
    """
    model, device = chat.base, chat.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = bool((lengths != lengths[0]).any())
    ids = pad(prompts, 0, left=True).to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(device) if padded else None
    cache = growing_cache(chat)
    owners = list(which if conversations is None else conversations)
    total = len(prompts) if total is None else total
    owner = torch.tensor(owners)
    with announcing([owners[list(which).index(prompt)] for prompt in range(len(prompts))], total):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions_of(ids, lengths),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    rows = torch.tensor(list(which), device=device)
    if list(which) != list(range(len(prompts))):
        cache.batch_select_indices(rows)
    logits, positions = output.logits[:, -1][rows], lengths[rows]
    mask = mask[rows] if mask is not None else None

    stop = torch.tensor(chat.stop_ids, device=device)
    limit = _context(chat) - max(len(prompt) for prompt in prompts)
    answers: list[list[int]] = [[] for _ in which]
    finish = ["length"] * len(which)
    live = list(range(len(which)))  # batch row -> answer; -1 once that answer has ended
    for position in range(min(max_new_tokens, limit)):
        token = draw(
            logits,
            [seeds[row] if row >= 0 else 0 for row in live],
            position,
            temperature=temperature,
            top_p=top_p,
        )
        for at, (value, ends) in enumerate(zip(token.tolist(), torch.isin(token, stop).tolist(), strict=True)):
            if live[at] < 0:
                continue
            if ends:
                finish[live[at]] = "stop"
                live[at] = -1
            else:
                answers[live[at]].append(value)
        remaining = [at for at, row in enumerate(live) if row >= 0]
        if not remaining or position + 1 == min(max_new_tokens, limit):
            break
        if len(remaining) <= _LEAVE * len(live):
            kept = torch.tensor(remaining, device=device)
            cache.batch_select_indices(kept)
            token, positions, owner = token[kept], positions[kept], owner[remaining]
            mask = mask[kept] if mask is not None else None
            live = [live[at] for at in remaining]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        with announcing(owner, total):
            logits = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        positions = positions + 1
    return [Decoded(ids, end) for ids, end in zip(answers, finish, strict=True)]


def positions_of(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Position of every token in its own prompt, ``[batch, seq]``; padding counts as position 0."""
    columns = torch.arange(ids.shape[1], device=ids.device)[None]
    return (columns - (ids.shape[1] - lengths[:, None])).clamp(min=0)


def _context(chat: ChatModel) -> int:
    return int(getattr(chat.config, "max_position_embeddings", None) or 1 << 30)


def growing_cache(chat: ChatModel) -> Any:
    """The model's own dynamic cache, its full-attention layers replaced by ones that grow in blocks."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values are views into a buffer with room to spare."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys = key_states[:, :, :0]
                self.values = value_states[:, :, :0]
            start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
            store = getattr(self, "store", None)
            # indexing (rows leaving, prompts repeated) makes new tensors: the views then lie elsewhere
            if (
                store is None
                or store[0].shape[-2] < end
                or store[0].data_ptr() != self.keys.data_ptr()
                or store[0].shape[0] != self.keys.shape[0]
            ):
                store = tuple(
                    old.new_empty(*old.shape[:2], end + _BLOCK, old.shape[-1]) for old in (self.keys, self.values)
                )
                store[0][:, :, :start] = self.keys
                store[1][:, :, :start] = self.values
                self.store = store
            store[0][:, :, start:end] = key_states
            store[1][:, :, start:end] = value_states
            self.keys, self.values = store[0][:, :, :end], store[1][:, :, :end]
            return self.keys, self.values

    cache = DynamicCache(config=chat.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
