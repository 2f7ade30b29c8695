"""Attention of the three patterns that forwards here have: within rows, over packed trees, over branches of prompts.

Within a row attention is causal, perhaps after a stem that several rows share. A packed tree holds many texts after a
common beginning, and nearly all pairs of its tokens belong to different texts: the queries are taken in runs of
neighbours, and each run looks only at the columns that some token of it may see. The columns left out have no weight in
the softmax, so this is exact. Branches are in :mod:`emmech.engine.cache`, which holds what they read.

Written-out blocks call these functions; the model's own modules reach them through Hugging Face's registry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emmech.engine.cache import Branches, KeysValues
from emmech.errors import EmmechError

__all__ = ["NAME", "RUN", "Rowwise", "queries_at", "runs"]

NAME = "emmech"  # of the attention function here, in Hugging Face's registry
SHORT = 128  # keys of a row that training attends to without a fused kernel
RUN = 96  # queries in a run: fewer waste fewer pairs, more make fewer and larger products
_Run = tuple[slice, Int[torch.Tensor, " columns"], Float[torch.Tensor, "packs 1 queries columns"]]
_known: Any = WeakIdKeyDictionary()  # a mask's runs, for all layers and variants that it serves


def runs(mask: Float[torch.Tensor, "packs 1 queries tokens"]) -> list[_Run]:
    """Runs of queries, the columns that each looks at, and its part of the additive mask.

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
    """Attention ``[rows, queries, heads, width]``; a tree's mask by runs."""
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
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that the model's own modules call."""
    if not isinstance(key, Branches):
        return _by_runs(module, query, key, value, attention_mask, **kwargs), None
    # families that bend the scores hand their own arguments on
    if bent := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise EmmechError(
            "decode in a sweep",
            f"{type(module).__name__} with {', '.join(bent)}",
            "scores that are capped, or share their sum with sinks, are not joined here",
            "emmech.evaluate(run, step=..., scale=...) one at a time",
        )
    return key.attend(query[:, :, 0] * kwargs["scaling"], value, kwargs.get("sliding_window"))[:, None], None


AttentionInterface.register(NAME, _attend)


def queries_at(
    reads: Int[torch.Tensor, " reads"], rows: int, tokens: int
) -> tuple[Int[torch.Tensor, "rows queries"], Int[torch.Tensor, " reads"] | None]:
    """Places that ask in the last block, as many in each row, and which of them are read (None: all, in order).

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
    """Attention ``[rows, queries, heads, width]`` as two products of all query heads that share a key's head.

    Backward through it costs less than through a fused kernel where rows are short.
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
    """Attention of whole rows ``[rows, tokens]``: causal, perhaps after a stem, or as a tree's mask says.

    Args:
        mask: additive ``[rows or 1, 1, tokens, tokens]`` of a tree, or a dict of them by kind of layer; None: causal.
        stems: keys and values of stems, ``[stems, heads, stem, width]`` by layer.
        of_stem: which stem each row follows ``[rows]``.
        kept: where every layer's keys and values go.
    """

    mask: Any = None
    stems: KeysValues | None = None
    of_stem: Int[torch.Tensor, " rows"] | None = None
    kept: KeysValues | None = None
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
        """What the queries read.

        Args:
            window: how many positions back a token sees, itself included; None for all.
            asking: flat indices of the tokens that ask; None: all.
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
    """Each row's stem. A product with ones and zeros where gradients flow: those of an index go entry by entry."""
    if not stems.requires_grad:
        return stems.index_select(0, of_stem)
    follows = nn.functional.one_hot(of_stem, len(stems)).to(stems)
    return (follows @ stems.flatten(1)).view(-1, *stems.shape[1:])


def _causal(
    tokens: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Float[torch.Tensor, "tokens keys"]:
    """0 where a token sees a key and the dtype's least elsewhere; ``before`` are the stem's last keys."""
    distance = torch.arange(before, before + tokens)[:, None] - torch.arange(before + tokens)
    seen = (distance >= 0) & (distance < (window or before + tokens))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).to(device)
