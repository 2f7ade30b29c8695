"""One prompt's reading in the blocks below a change, kept so that the next change does not repeat it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.modules import Skip, hooked, with_module


class KeptPrompt:
    """What the first blocks of a model have made of one prompt: residuals, keys and values.

    It is right for as long as the blocks compute the same; the owner calls :meth:`forget` when their weights change.

    Example:
        >>> kept = KeptPrompt()
        >>> kept.blocks
        0
    """

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()
        self._after: list[torch.Tensor] = []  # of each block, the residual that it returns, [1, seq, d_model]
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each block, its keys and values
        #: whatever the owner keeps beside a block's reading, by block and name; it is forgotten with it
        self.beside: dict[tuple[int, str], Any] = {}

    @property
    def blocks(self) -> int:
        """How many blocks, from the first on, need not read the prompt again."""
        return len(self._after)

    def residual(self, layer: int) -> Float[torch.Tensor, "1 seq d_model"]:
        """What the block returned for the prompt."""
        return self._after[layer]

    def forget(self, first: int = 0) -> None:
        """Drop the reading of block ``first`` and of all later ones."""
        del self._after[first:], self._past[first:]
        self.beside = {key: value for key, value in self.beside.items() if key[0] < first}

    def at(self, ids: Sequence[int]) -> KeptPrompt:
        """The same, without what it kept of another prompt."""
        if tuple(ids) != self._ids:
            self.forget()
            self._ids = tuple(ids)
        return self

    @contextlib.contextmanager
    def resumed(self, chat: ChatModel, ids: Sequence[int], apart: int, cache: Any) -> Iterator[Any]:
        """The causal LM without the blocks below ``apart`` whose reading is kept; that of the others is kept now.

        At the end of the ``with`` block the cache holds one row of the keys and values of every block below ``apart``.

        Args:
            ids: the prompt, of which those blocks read one row.
            apart: the first block whose reading depends on the row.
            cache: of the model, empty.
        """
        known = min(self.at(ids).blocks, apart)

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self._after.append(chat.family.residual(output).detach())
                self._past.append((cache.layers[layer].keys, cache.layers[layer].values))

            return hook

        with hooked(*((chat.block(layer), keep(layer)) for layer in range(known, apart))):
            if not known:
                yield chat.base
                return
            skipped = [Skip(block, layer) for layer, block in enumerate(chat.blocks[:known])]
            path = ".".join(filter(None, (chat.family.trunk, chat.family.blocks)))
            view = with_module(chat.base, path, nn.ModuleList([*skipped, *chat.blocks[known:]]))
            with skipped[-1].giving(self._after[known - 1]):
                yield view
        for layer, (keys, values) in zip(cache.layers, self._past[:known], strict=False):
            layer.keys, layer.values = keys, values
