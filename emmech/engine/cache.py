"""Keys and values of prompts, as a forward over them leaves them behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

__all__ = ["RowCache"]


class RowCache:
    """What the model's attention asks of a cache for one forward; sliding-window layers keep everything too.

    ``layers`` holds keys and values by layer, ``[rows, heads, length, width]`` each.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return next(iter(self.layers.values()))[0].shape[2] if self.layers else 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's keys and values, and hand them to its attention."""
        self.layers[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this forward: none."""
        return 0

    def spread(self, columns: Int[torch.Tensor, "sequences length"]) -> RowCache:
        """Rows that hold several sequences as one row for each of them.

        Args:
            columns: where each sequence's tokens lie, the same in every row.

        Returns:
            ``[rows * sequences, heads, length, width]`` by layer, rows outermost.
        """
        found = RowCache()
        for layer, pair in self.layers.items():
            keys, values = (one[:, :, columns].transpose(1, 2).flatten(0, 1).contiguous() for one in pair)
            found.layers[layer] = (keys, values)
        return found

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}

    @classmethod
    def joined(cls, caches: Sequence[RowCache], order: torch.Tensor) -> RowCache:
        """Caches of one length as one, their rows in the given order."""
        found = cls()
        for layer in caches[0].layers:
            pairs = [cache.layers[layer] for cache in caches]
            keys, values = (torch.cat([pair[side] for pair in pairs])[order] for side in (0, 1))
            found.layers[layer] = (keys, values)
        return found
