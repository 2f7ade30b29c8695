"""Attention over a packed tree of texts, without the pairs of tokens that never see each other.

In a row that holds many texts behind a common beginning nearly all pairs of tokens belong to different texts. The
queries are taken in runs of neighbours, and each run looks only at the columns that some token of it may see: its
texts' common beginning and the run itself. The columns left out have no weight in the softmax, so this is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emmech.engine.row_adapters import with_attention

__all__ = ["RUN", "over_trees", "runs"]

RUN = 96  # queries in a run: fewer waste fewer pairs, more make fewer and larger products
_NAME = "emmech_trees"
_Run = tuple[slice, Int[torch.Tensor, " columns"], Float[torch.Tensor, "packs 1 queries columns"]]
_known: Any = WeakIdKeyDictionary()  # a mask's runs, for all layers and variants that it serves


def runs(mask: Float[torch.Tensor, "packs 1 tokens tokens"]) -> list[_Run]:
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


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that the model's modules call."""
    if attention_mask is None or attention_mask.dtype == torch.bool or query.shape[2] <= RUN:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if attention_mask not in _known:
        _known[attention_mask] = runs(attention_mask)
    parts = [
        sdpa_attention_forward(
            module,
            query[:, :, queries],
            key.index_select(2, columns),
            value.index_select(2, columns),
            part,
            **kwargs,
        )[0]
        for queries, columns, part in _known[attention_mask]
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(_NAME, _attend)


def over_trees(view: nn.Module) -> nn.Module:
    """A view of a trunk whose attention passes over what the mask of a tree rules out."""
    return with_attention(view, _NAME)
