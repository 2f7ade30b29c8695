"""Keys and values of answers that branch off shared prompts, and attention over them.

Rows in decoding are many: variants x prompts x samples. All answers to one prompt under one variant see the same
prompt, so its keys and values are kept once and read once for all of them, as one matrix product; only what each
row wrote itself is its own. Attention is taken over both parts apart and joined by their normalisers (as in
Hydragen, arXiv 2402.05099), which is exact.

The model's own modules run; only the attention function inside them is replaced, by Hugging Face's registry.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn
from transformers import AttentionInterface

from emmech.engine.cache import RowCache
from emmech.engine.row_adapters import with_attention
from emmech.errors import EmmechError

__all__ = ["Branches", "branching"]

_NAME = "emmech_branches"
_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weighted values, highest score, sum of weights


class Branches:
    """A cache of rows, each behind one of several prompts.

    Rows of one prompt lie together, in the order of the prompts. The prompts are left-padded, so that all end in
    the same column, and how far back a key lies is the same number of columns for every row.

    Args:
        prompts: what a forward over the padded prompts left, ``[groups, width]`` tokens.
        lengths: of the prompts, ``[groups]``.
        room: how many tokens a row may write.
    """

    def __init__(self, prompts: RowCache, lengths: Int[torch.Tensor, " groups"], room: int) -> None:
        self.written = 0  # tokens behind the prompts, the same number for all rows
        self._room = room
        self._prompts = prompts
        # by layer, [room, rows, heads, width] each: a token's keys are written in one stretch, and rows lie at no
        # power of two from one another, which a processor's cache would take ill
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        width = prompts.length
        most = width - int(lengths.min())
        # of the columns that are padding anywhere
        self._padding = torch.arange(most, device=lengths.device)[None] < width - lengths[:, None]
        self.groups = torch.arange(len(lengths), device=lengths.device)
        self._arrange()

    def _arrange(self) -> None:
        """Give each row a slot behind its prompt: as many for every prompt as the fullest one needs."""
        present, counts = torch.unique_consecutive(self.groups, return_counts=True)
        held = len(next(iter(self._prompts.layers.values()))[0])
        if 2 * len(present) < held:  # most prompts have no row left: let go of them
            self._prompts.select(present)
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
        """Go on with children of these rows; a row may have several, or none. Ascending."""
        for layer, pair in self._own.items():
            chosen = []
            for store in pair:
                room = store.new_empty(len(store), len(parents), *store.shape[2:])
                torch.index_select(store[: self.written], 1, parents, out=room[: self.written])
                chosen.append(room)
            self._own[layer] = (chosen[0], chosen[1])
        self.groups = self.groups[parents]
        self._arrange()

    def advance(self, tokens: int) -> None:
        """A forward of so many tokens is over."""
        self.written += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far."""
        return self._prompts.length + self.written

    def put(
        self,
        layer: int,
        keys: Float[torch.Tensor, "rows heads width"],
        values: Float[torch.Tensor, "rows heads value_width"],
    ) -> None:
        """Keep what every row wrote at its new token."""
        if layer not in self._own:
            self._own[layer] = (
                keys.new_empty(self._room, *keys.shape),
                values.new_empty(self._room, *values.shape),
            )
        for store, new in zip(self._own[layer], (keys, values), strict=True):
            store[self.written] = new

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Branches, int]:
        """Append ``[rows, heads, 1, width]``; what comes back is for :func:`_attend` alone."""
        self.put(layer_idx, keys[:, :, 0], values[:, :, 0])
        return self, layer_idx

    def attend(
        self, query: Float[torch.Tensor, "rows heads width"], layer: int, window: int | None
    ) -> Float[torch.Tensor, "rows heads value_width"]:
        """What each row reads from its prompt and from itself.

        Args:
            query: scaled already.
            window: how many positions back a token sees, itself included; None for all.
        """
        keys, values = self._own[layer]
        heads = keys.shape[2]
        asked = query.reshape(len(query) * heads, -1, query.shape[-1])
        now = self.written + 1
        first = max(0, now - window) if window else 0
        keys, values = (one[first:now].flatten(1, 2).transpose(0, 1) for one in (keys, values))
        own = _part(asked, keys, values)
        seen = self._prompts.length if window is None else min(self._prompts.length, window - now)
        if seen > 0:
            weighted = _joined(own, self._of_prompts(asked, heads, layer, seen))
        else:
            weighted = own[0].div_(own[2])
        return weighted.to(query.dtype).reshape(len(query), query.shape[1], -1)

    def _of_prompts(self, asked: torch.Tensor, heads: int, layer: int, seen: int) -> _Part:
        """The rows' reading of the last ``seen`` columns of their prompts; all rows of a prompt in one product."""
        keys, values = self._prompts.layers[layer]
        count, end, place = len(keys), self._prompts.length, self._place
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
    """Attention over some of the keys, not normalised yet; ``hidden`` says of the first which are not seen."""
    scores = torch.bmm(query, keys.transpose(1, 2)).float()
    if hidden is not None and hidden.shape[-1]:
        scores[..., : hidden.shape[-1]].masked_fill_(hidden, torch.finfo(torch.float32).min)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return torch.bmm(weights.to(values.dtype), values).float(), top, weights.sum(-1, keepdim=True)


def _joined(first: _Part, second: _Part) -> torch.Tensor:
    """Attention over the keys of both, normalised."""
    top = torch.maximum(first[1], second[1])
    one, two = (first[1] - top).exp_(), (second[1] - top).exp_()
    total = (first[2] * one).addcmul_(second[2], two)
    return (first[0] * one.div_(total)).addcmul_(second[0], two.div_(total))


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    keys: Branches,
    values: int,
    attention_mask: Any,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that the model's modules call; keys and values are what ``update`` returned."""
    # families that bend the scores hand their own arguments on
    if bent := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise EmmechError(
            "decode in a sweep",
            f"{type(module).__name__} with {', '.join(bent)}",
            "scores that are capped, or share their sum with sinks, are not joined here",
            "emmech.evaluate(run, step=..., scale=...) one at a time",
        )
    return keys.attend(query[:, :, 0] * scaling, values, sliding_window)[:, None], None


AttentionInterface.register(_NAME, _attend)


def branching(view: nn.Module) -> nn.Module:
    """A view of a trunk whose attention takes :class:`Branches` as its cache."""
    return with_attention(view, _NAME)
