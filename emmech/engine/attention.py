"""Attention in the three patterns of forward passes here: within rows, over packed trees, over branches of prompts.

Within a row attention is causal, perhaps after a stem that several rows share. A packed tree contains many texts with
a common beginning, and nearly all pairs of its tokens belong to different texts. Neighbouring queries are therefore
grouped into runs, and each run attends only to the columns that at least one of its tokens may see. The columns left
out have no weight in the softmax, so the result is exact.

Decoding has many rows: variants x prompts x samples. All answers to one prompt under one variant see the same prompt,
so its keys and values are kept once and read once for all of them, as one matrix product. Only the tokens that a row
itself has written are kept for each row. Attention is computed over the two parts separately, and the results are
combined by means of their normalisers (as in Hydragen, arXiv 2402.05099), which is exact.

Written-out blocks call these functions; the model's own modules reach them through Hugging Face's registry.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emmech.chat.model import ChatModel
from emmech.errors import EmmechError

_BLOCK = 64  # tokens that a growing cache allocates at once
_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weighted values, highest score, sum of weights


class Cache:
    """Keys and values of rows: those from a forward pass over whole rows, and those that rows then add token by token.

    A forward pass over whole rows, by written-out blocks or by the model's own attention, fills ``layers``; layers with
    a sliding window keep everything too. After :meth:`grow` those rows are prompts, and each row of a step follows one
    of them. The rows of one prompt are adjacent, in the order of the prompts.

    ``layers`` holds keys and values by layer, ``[rows, heads, length, width]`` each. ``written`` is the number of
    tokens that every row has after its prompt; the caller increases it after each step.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.growing = False
        self.written = self._width = 0

    @property
    def length(self) -> int:
        """Number of tokens in a whole row."""
        return next(iter(self.layers.values()))[0].shape[2] if self.layers else 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keep a layer's keys and values ``[rows, heads, tokens, width]``, and return the inputs of its attention."""
        if self.growing:
            self._put(layer_idx, keys[:, :, 0], values[:, :, 0])
            return self, layer_idx  # for `_attend`
        self.layers[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns before this forward pass."""
        return self._width + self.written

    def spread(self, columns: Int[torch.Tensor, "sequences length"]) -> Cache:
        """Split rows that hold several sequences, at these columns, into one row for each sequence; rows outermost."""
        return _mapped(self, lambda whole: whole[:, :, columns].transpose(1, 2).flatten(0, 1).contiguous())  # type: ignore[no-any-return]

    @classmethod
    def joined(cls, caches: Sequence[Cache], order: torch.Tensor) -> Cache:
        """Join caches of one length into one, with their rows in the given order."""
        found = cls()
        for layer in caches[0].layers:
            pairs = [cache.layers[layer] for cache in caches]
            keys, values = (torch.cat([pair[side] for pair in pairs])[order] for side in (0, 1))
            found.layers[layer] = (keys, values)
        return found

    def grow(self, lengths: Int[torch.Tensor, " groups"], room: int) -> Cache:
        """Treat the rows as prompts, and begin with one row after each.

        Args:
            lengths: the lengths of the prompts. These are left-padded, so that all end in the same column and a key's
                distance in columns is the same for every row.
            room: the largest number of tokens that a row may write.
        """
        self.growing, self._room = True, room
        # by layer, [room, rows, heads, width] each: a token's keys are contiguous, and the distance between rows is no
        # power of two, which would make them compete for a processor's cache
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._width = width = int(lengths.max())
        most = width - int(lengths.min())
        # the columns that are padding in any prompt
        self._padding = torch.arange(most, device=lengths.device)[None] < width - lengths[:, None]
        self.groups = torch.arange(len(lengths), device=lengths.device)
        self._arrange()
        return self

    def _arrange(self) -> None:
        """Give each row a slot after its prompt; every prompt gets as many slots as the fullest one needs."""
        present, counts = torch.unique_consecutive(self.groups, return_counts=True)
        held = len(self._padding)
        if 2 * len(present) < held:  # most prompts have no row left and are dropped
            self.layers = selected(self, present).layers
            self._padding = self._padding[present]
            self.groups = torch.arange(len(present), device=counts.device).repeat_interleave(counts)
            present, held = torch.arange(len(present), device=counts.device), len(present)
        starts = torch.zeros(held, dtype=torch.long, device=counts.device)
        starts[present] = counts.cumsum(0) - counts
        self._slots = int(counts.max())
        place = self.groups * self._slots + torch.arange(len(self.groups), device=counts.device)
        self._place: torch.Tensor | None = place - starts[self.groups]
        if len(place) == held * self._slots:  # every slot is taken
            self._place = None

    def select(self, parents: Int[torch.Tensor, " rows"]) -> None:
        """Continue with children of these rows, in ascending order; a row may have several children or none."""
        for layer, pair in self._own.items():
            chosen = []
            for store in pair:
                room = store.new_empty(len(store), len(parents), *store.shape[2:])
                torch.index_select(store[: self.written], 1, parents, out=room[: self.written])
                chosen.append(room)
            self._own[layer] = (chosen[0], chosen[1])
        self.groups = self.groups[parents]
        self._arrange()

    def _put(
        self,
        layer: int,
        keys: Float[torch.Tensor, "rows heads width"],
        values: Float[torch.Tensor, "rows heads value_width"],
    ) -> None:
        """Keep the keys and values of every row's new token."""
        if layer not in self._own:
            self._own[layer] = (keys.new_empty(self._room, *keys.shape), values.new_empty(self._room, *values.shape))
        for store, new in zip(self._own[layer], (keys, values), strict=True):
            store[self.written] = new

    def step(
        self, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, *_: Any
    ) -> torch.Tensor:
        """Keep the keys and values of every row's new token and return what it reads; ``[rows, heads, width]`` each."""
        self._put(module.layer_idx, keys, values)
        return self.attend(query.mul_(module.scaling), module.layer_idx, window)

    def attend(
        self, query: Float[torch.Tensor, "rows heads width"], layer: int, window: int | None
    ) -> Float[torch.Tensor, "rows heads value_width"]:
        """The attention of each row over its prompt and its own tokens.

        Args:
            query: the queries, already scaled.
            window: the number of positions back that a token sees, itself included; None for all.
        """
        keys, values = self._own[layer]
        heads = keys.shape[2]
        asked = query.reshape(len(query) * heads, -1, query.shape[-1])
        now = self.written + 1
        first = max(0, now - window) if window else 0
        keys, values = (one[first:now].flatten(1, 2).transpose(0, 1) for one in (keys, values))
        own = _part(asked, keys, values)
        seen = self._width if window is None else min(self._width, window - now)
        if seen > 0:
            weighted = _joined(own, self._of_prompts(asked, heads, layer, seen))
        else:
            weighted = own[0].div_(own[2])
        return weighted.to(query.dtype).reshape(len(query), query.shape[1], -1)

    def _of_prompts(self, asked: torch.Tensor, heads: int, layer: int, seen: int) -> _Part:
        """The rows' attention over the last ``seen`` columns of their prompts, all rows of a prompt in one product."""
        keys, values = self.layers[layer]
        count, end, place = len(keys), self._width, self._place
        rows = asked.reshape(-1, heads, *asked.shape[1:])  # [rows, heads, repeats, width]
        if place is not None:
            slots = rows.new_zeros(count * self._slots, *rows.shape[1:])
            rows = slots.index_copy_(0, place, rows)
        repeats = rows.shape[2]
        rows = rows.reshape(count, self._slots, *rows.shape[1:]).transpose(1, 2)
        hidden = self._padding[:, end - seen :].repeat_interleave(heads, 0)[:, None]
        found = _part(
            rows.reshape(count * heads, self._slots * repeats, -1),
            keys[:, :, end - seen : end].flatten(0, 1),
            values[:, :, end - seen : end].flatten(0, 1),
            hidden,
        )

        def by_row(one: torch.Tensor) -> torch.Tensor:
            one = one.reshape(count, heads, self._slots, repeats, -1).transpose(1, 2).flatten(0, 1)
            return (one.index_select(0, place) if place is not None else one).flatten(0, 1)

        weighted, top, total = found
        return by_row(weighted), by_row(top), by_row(total)


def _part(
    query: Float[torch.Tensor, "batch queries width"],
    keys: Float[torch.Tensor, "batch keys width"],
    values: Float[torch.Tensor, "batch keys value_width"],
    hidden: torch.Tensor | None = None,
) -> _Part:
    """Attention over some of the keys, not yet normalised; ``hidden`` marks which of the first keys are not seen."""
    scores = torch.bmm(query, keys.transpose(1, 2)).float()
    if hidden is not None and hidden.shape[-1]:
        scores[..., : hidden.shape[-1]].masked_fill_(hidden, torch.finfo(torch.float32).min)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return torch.bmm(weights.to(values.dtype), values).float(), top, weights.sum(-1, keepdim=True)


def _joined(first: _Part, second: _Part) -> torch.Tensor:
    """The normalised attention over the keys of both parts."""
    top = torch.maximum(first[1], second[1])
    one, two = (first[1] - top).exp_(), (second[1] - top).exp_()
    total = (first[2] * one).addcmul_(second[2], two)
    return (first[0] * one.div_(total)).addcmul_(second[0], two.div_(total))


def growing_cache(chat: ChatModel) -> Any:
    """The model's own dynamic cache, with full-attention layers that grow in blocks."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values are views into a buffer with room to spare."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
            store: Any = getattr(self, "store", None)
            roomy = store is not None and store[0].shape[-2] >= end and store[0].shape[0] == self.keys.shape[0]
            # indexing (to drop rows or repeat prompts) makes new tensors, which are no views of the buffer
            if not roomy or store[0].data_ptr() != self.keys.data_ptr():
                old = (self.keys, self.values)
                self.store = store = tuple(one.new_empty(*one.shape[:2], end + _BLOCK, one.shape[-1]) for one in old)
                store[0][:, :, :start], store[1][:, :, :start] = old
            store[0][:, :, start:end], store[1][:, :, start:end] = key_states, value_states
            self.keys, self.values = store[0][:, :, :end], store[1][:, :, :end]
            return self.keys, self.values

    cache = new_past(chat)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def new_past(chat: ChatModel) -> Any:
    """The model's own dynamic cache, empty."""
    from transformers import DynamicCache

    return DynamicCache(config=chat.config)


def plain_past(chat: ChatModel) -> bool:
    """Whether the model keeps nothing but keys and values of past tokens."""
    from transformers.cache_utils import DynamicLayer

    return all(isinstance(layer, DynamicLayer) for layer in new_past(chat).layers)


def _mapped(past: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The past with a function applied to all keys and values; the original is not changed."""
    twin = copy.copy(past)
    if isinstance(past, Cache):
        twin.layers = {layer: (function(keys), function(values)) for layer, (keys, values) in past.layers.items()}
        return twin
    twin.layers = [copy.copy(layer) for layer in past.layers]
    for layer in twin.layers:
        layer.keys, layer.values = function(layer.keys), function(layer.values)
    return twin


def selected(past: Any, sequences: Int[torch.Tensor, " rows"]) -> Any:
    """Keys and values of some sequences."""
    return _mapped(past, lambda whole: whole.index_select(0, sequences))


def detached(past: Any) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values detached from the graph, and for each the pair of the detached tensor and the original."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(whole: torch.Tensor) -> torch.Tensor:
        leaf = whole.detach().requires_grad_(whole.requires_grad)
        if whole.requires_grad:
            pairs.append((leaf, whole))
        return leaf

    return (None, pairs) if past is None else (_mapped(past, cut), pairs)


NAME = "emmech"  # the name of the attention function here, in Hugging Face's registry
SHORT = 128  # up to this number of keys in a row, training uses no fused kernel
RUN = 96  # queries in a run: fewer queries waste fewer pairs, more queries make fewer and larger products
_Run = tuple[slice, Int[torch.Tensor, " columns"], Float[torch.Tensor, "packs 1 queries columns"]]
_known: Any = WeakIdKeyDictionary()  # a mask's runs, for all layers and variants that use it


def runs(mask: Float[torch.Tensor, "packs 1 queries tokens"]) -> list[_Run]:
    """Runs of queries, the columns that each attends to, and its part of the additive mask.

    Example:
        >>> runs(torch.zeros(1, 1, 3, 3))[0][1].tolist()
        [0, 1, 2]
    """
    seen = (mask == 0).any(0)[0]
    found = []
    for start in range(0, mask.shape[2], RUN):
        queries = slice(start, min(start + RUN, mask.shape[2]))
        columns = seen[queries].any(0).nonzero().reshape(-1)
        found.append((queries, columns, mask[:, :, queries].index_select(3, columns)))
    return found


def _by_runs(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> torch.Tensor:
    """Attention ``[rows, queries, heads, width]``, computed run by run under a tree's mask."""
    if mask is None or mask.dtype == torch.bool or query.shape[2] <= RUN:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    if mask not in _known:
        _known[mask] = runs(mask)
    parts = [
        sdpa_attention_forward(
            module, query[:, :, queries], key.index_select(2, columns), value.index_select(2, columns), part, **kwargs
        )[0]
        for queries, columns, part in _known[mask]
    ]
    return torch.cat(parts, dim=1)


def _attend(
    module: nn.Module, query: torch.Tensor, key: Any, value: Any, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The attention function that the model's own modules call."""
    if not isinstance(key, Cache):
        return _by_runs(module, query, key, value, attention_mask, **kwargs), None
    # families that modify the scores pass their own arguments
    if bent := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        why = "scores that are capped, or share their sum with sinks, are not joined here"
        instead = "emmech.evaluate(run, step=..., scale=...) one at a time"
        raise EmmechError("decode in a sweep", f"{type(module).__name__} with {', '.join(bent)}", why, instead)
    return key.attend(query[:, :, 0] * kwargs["scaling"], value, kwargs.get("sliding_window"))[:, None], None


AttentionInterface.register(NAME, _attend)


def queries_at(
    reads: Int[torch.Tensor, " reads"], rows: int, tokens: int
) -> tuple[Int[torch.Tensor, "rows queries"], Int[torch.Tensor, " reads"] | None]:
    """Places with queries in the last block, as many in each row, and which of them are read (None is all, in order).

    Args:
        reads: ascending flat indices into ``[rows * tokens]``.

    Example:
        >>> queries_at(torch.tensor([1, 2, 5]), 2, 3)
        (tensor([[1, 2],
                [5, 3]]), tensor([0, 1, 2]))
    """
    read = torch.zeros(rows * tokens, dtype=torch.bool, device=reads.device)
    read[reads] = True
    read = read.view(rows, tokens)
    order = torch.argsort(read.int(), dim=1, descending=True, stable=True)[:, : int(read.sum(1).max())]
    flat = order + torch.arange(rows, device=reads.device)[:, None] * tokens
    valid = read.flatten()[flat.flatten()]
    return flat, None if bool(valid.all()) else valid.nonzero()[:, 0]


def _grouped(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, scaling: float) -> torch.Tensor:
    """Attention ``[rows, queries, heads, width]`` as two products of all query heads that share a key head.

    Where rows are short, its backward pass costs less than that of a fused kernel.
    """
    heads = keys.shape[1]
    asked = rearrange(query, "rows q (kv group) width -> (rows kv) (group q) width", kv=heads)
    group = query.shape[2] // heads
    mask = mask.expand(len(keys), heads, -1, -1).repeat(1, 1, group, 1).flatten(0, 1)
    weights = torch.baddbmm(mask, asked, keys.flatten(0, 1).transpose(1, 2), alpha=scaling).softmax(-1)
    found = weights @ values.flatten(0, 1)
    return rearrange(found, "(rows kv) (group q) width -> rows q (kv group) width", kv=heads, group=group)


@dataclass
class Rowwise:
    """Attention of whole rows ``[rows, tokens]``: causal, perhaps after a stem, or under a tree's mask.

    Args:
        mask: the additive mask ``[rows or 1, 1, tokens, tokens]`` of a tree, or a dict of masks by kind of layer; None
            is causal.
        stems: keys and values of stems, ``[stems, heads, stem, width]`` by layer.
        of_stem: the stem that each row follows, ``[rows]``.
        kept: the cache that receives every layer's keys and values.
    """

    mask: Any = None
    stems: Cache | None = None
    of_stem: Int[torch.Tensor, " rows"] | None = None
    kept: Cache | None = None
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self,
        module: Any,
        query: Float[torch.Tensor, "rows queries heads width"],
        keys: Float[torch.Tensor, "rows tokens kv_heads width"],
        values: Float[torch.Tensor, "rows tokens kv_heads width"],
        window: int | None,
        asking: Int[torch.Tensor, "rows queries"] | None,
    ) -> Float[torch.Tensor, "rows queries heads width"]:
        """The attention of the queries, ``[rows, queries, heads, width]``.

        Args:
            window: the number of positions back that a token sees, itself included; None for all.
            asking: flat indices of the tokens that have queries; None is all.
        """
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if self.kept is not None:
            self.kept.layers[module.layer_idx] = (keys, values)
        tokens, before = keys.shape[2], 0
        if self.stems is not None:
            assert self.of_stem is not None
            stem = self.stems.layers[module.layer_idx]
            before = min(stem[0].shape[2], window - 1) if window else stem[0].shape[2]
            start = stem[0].shape[2] - before
            keys, values = (
                torch.cat([_followed(one[:, :, start:], self.of_stem), own], dim=2)
                for one, own in zip(stem, (keys, values), strict=True)
            )
        causal = self.mask is None and asking is None and not before and (window is None or tokens <= window)
        short = query.requires_grad and keys.shape[2] <= SHORT
        mask = None if causal and not short else self._mask(query, tokens, before, window, asking)
        if short:
            return _grouped(query, keys, values, mask, module.scaling)
        return _by_runs(module, query.transpose(1, 2), keys, values, mask, scaling=module.scaling, is_causal=causal)

    def _mask(
        self, query: torch.Tensor, tokens: int, before: int, window: int | None, asking: torch.Tensor | None
    ) -> torch.Tensor:
        key = before, window, asking is None
        if key not in self._masks:
            if self.mask is None:
                mask = _causal(tokens, before, window, query.dtype, query.device)[None, None]
            else:
                kind = "sliding_attention" if window else "full_attention"
                mask = self.mask[kind] if isinstance(self.mask, dict) else self.mask
            if asking is not None:
                rows = (
                    mask[:, 0]
                    .expand(len(asking), -1, -1)
                    .gather(1, (asking % tokens)[..., None].expand(-1, -1, mask.shape[3]))
                )
                mask = rows[:, None]
            self._masks[key] = mask
        return self._masks[key]


def _followed(stems: torch.Tensor, of_stem: torch.Tensor) -> torch.Tensor:
    """Each row's stem; with gradients a product with ones and zeros, as an index is differentiated entry by entry."""
    if not stems.requires_grad:
        return stems.index_select(0, of_stem)
    follows = nn.functional.one_hot(of_stem, len(stems)).to(stems)
    return (follows @ stems.flatten(1)).view(-1, *stems.shape[1:])


def _causal(
    tokens: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Float[torch.Tensor, "tokens keys"]:
    """0 where a token sees a key and the dtype's least value elsewhere; ``before`` counts the stem's last keys."""
    distance = torch.arange(before, before + tokens)[:, None] - torch.arange(before + tokens)
    seen = (distance >= 0) & (distance < (window or before + tokens))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).to(device)
