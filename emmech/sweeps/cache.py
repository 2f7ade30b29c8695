"""Keys and values of a batch whose rows may be repeated, chosen and dropped; it grows in blocks.

The attention mask is always given in full by the caller, so that sliding-window layers keep all of their past too
and every family decodes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["RowCache", "attention_mask"]

_BLOCK = 32  # tokens of room that are allocated at once


class RowCache:
    """What the model's attention asks of a cache: ``update`` by layer; one length for all layers.

    ``advance`` must be called once after each forward.
    """

    def __init__(self) -> None:
        self.length = 0
        self._store: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [rows, heads, room, width] each

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Append ``[rows, heads, new, width]`` and return all so far."""
        end = self.length + keys.shape[-2]
        store = self._store.get(layer_idx)
        if store is None or store[0].shape[-2] < end:
            grown = tuple(
                new.new_empty(*new.shape[:2], end + _BLOCK, new.shape[-1]) for new in (keys, values)
            )
            if store is not None:
                for larger, old in zip(grown, store, strict=True):
                    larger[:, :, : self.length] = old[:, :, : self.length]
            store = self._store[layer_idx] = (grown[0], grown[1])
        store[0][:, :, self.length : end] = keys
        store[1][:, :, self.length : end] = values
        return store[0][:, :, :end], store[1][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.length

    def advance(self, tokens: int) -> None:
        """A forward of so many tokens is over."""
        self.length += tokens

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        self._each(lambda old: old[rows])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._store = {layer: (change(keys), change(values)) for layer, (keys, values) in self._store.items()}

    @classmethod
    def joined(cls, caches: Sequence[RowCache]) -> RowCache:
        """Caches of the same length as one, their rows in order."""
        if len(caches) == 1:
            return caches[0]
        found = cls()
        found.length = caches[0].length
        for layer in caches[0]._store:
            pairs = [cache._store[layer] for cache in caches]
            found._store[layer] = (torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))
        return found


def attention_mask(
    queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype, kinds: set[str], window: int | None
) -> Any:
    """Additive mask ``[rows, 1, queries, keys]`` from positions; by layer kind where the model has several.

    Args:
        queries: ``[rows, queries]`` positions.
        keys: ``[rows, keys]`` positions, -1 where there is only padding.
    """
    back = queries[:, :, None] - keys[:, None, :]
    seen = (back >= 0) & (keys >= 0)[:, None, :]

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        blocked = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return blocked.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    if "sliding_attention" not in kinds or window is None:
        return additive(seen)
    return {"full_attention": additive(seen), "sliding_attention": additive(seen & (back < window))}
