"""Run token packs under many variants: the blocks before the first adapter once, the later ones for all rows at once.

The shared part is the one that :mod:`emmech.engine.split` finds. In addition, the last block's queries and MLP and the
unembedding run at read positions only.

The model itself is never changed. An architecture that is not written out in :mod:`emmech.engine.blocks` is first
compared with the model's own forward, and the parts that do not agree are not shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int

from emmech.chat.families import map_widths
from emmech.chat.model import ChatModel
from emmech.engine import packing
from emmech.engine.adapters import RowAdapter, RowSteering, Site, VariantWeights, inner, write
from emmech.engine.attention import RUN
from emmech.engine.blocks import Blocks, Places
from emmech.engine.modules import Hook, adding, evaluating
from emmech.engine.packing import Pack, Reading, pack, stack
from emmech.engine.split import DOES_NOT_RUN, Frozen, Lower, State, deviation, find_frozen, tolerance
from emmech.errors import EmmechError


@dataclass(frozen=True)
class Shared:
    """The part of the work on some packs that all variants share.

    Args:
        state: the state ``[packs, seq, ...]`` at the cut.
        places: the places of the packs.
        reads: flat indices into ``[packs * seq]`` of the positions that are read.
    """

    state: State
    places: Places
    reads: torch.Tensor


@dataclass(frozen=True)
class Block:
    """One piece of the result.

    Args:
        variants: indices into the list of chosen variants.
        readings: for each reading in it, its index and which of ``hidden``'s reads are its own.
        hidden: ``[variants, reads, d_model]`` after the final norm (or a block's output, see ``Engine.stop``).
    """

    variants: slice
    readings: tuple[tuple[int, np.ndarray], ...]
    hidden: Float[torch.Tensor, "variants reads d_model"]


class Engine:
    """Runs packs under many variants.

    Args:
        chat: the base model, without adapters.
        sites: modules with an adapter in any variant, by full path.
        steering: the layer whose output is steered, or None.
        stop: read this block's output instead of the final norm's.
        tokens: the most tokens that go through the later blocks at once (at least one pack of one variant).
        wide: keep the residual stream of a model in bfloat16 in float32, as :class:`Blocks` does.

    Raises:
        EmmechError: the architecture gives other results in parts than as a whole.
    """

    def __init__(
        self,
        chat: ChatModel,
        sites: Mapping[str, Site],
        steering: int | None = None,
        *,
        stop: int | None = None,
        tokens: int = 1024,
        wide: bool = False,
    ) -> None:
        self.wide = wide
        self.chat, self.sites, self.steering, self.stop, self.tokens = chat, sites, steering, stop, tokens
        self.rows = VariantWeights()  # the weights that the modules of the later blocks use
        self.branching = True  # whether several readings share a row
        self.steps_agree: bool | None = None  # whether decoding agrees with whole forwards; None if not yet tried
        self._cut_at(find_frozen(chat, list(sites), steering))
        if not (self.lower.blocks.written and self.upper.written):
            self._settle()

    def _cut_at(self, frozen: Frozen) -> None:
        chat, self.frozen = self.chat, frozen
        self.lower = Lower(chat, frozen, wide=self.wide)
        lowest = (name for name, site in self.sites.items() if site.layer == frozen.layer)
        self.shared_name = next(lowest, None) if frozen.at_write else None
        last = chat.n_layers if self.stop is None else self.stop + 1
        edits: dict[str, Any] = {
            f"{site.layer}.{site.path}": partial(RowAdapter, rows=self.rows, name=name)
            for name, site in self.sites.items()
            if frozen.blocks <= site.layer < last
        }
        if self.steering is not None and frozen.blocks <= self.steering < last:
            edits[str(self.steering)] = partial(RowSteering, rows=self.rows, layer=self.steering, family=chat.family)
        self.upper = Blocks(chat, frozen.blocks, last, norm=self.stop is None, edits=edits, wide=self.wide)

    def _settle(self) -> None:
        """Share as much as agrees with the model's own forward, and branch only where branching agrees."""
        found, off = self.frozen, float("inf")
        for frozen in dict.fromkeys((found, Frozen(found.layer, False), Frozen(0, False))):
            self._cut_at(frozen)
            for self.branching in (True, False):
                try:
                    off = self.deviation()
                except DOES_NOT_RUN:
                    continue  # the parts do not even run
                if off <= tolerance(self.chat):
                    return
        given = f"{self.chat.name} ({type(self.chat.base).__name__})"
        why = f"its blocks give other results in parts than as a whole (off by {off:.1e})"
        instead = "emmech.evaluate(run, step=..., scale=...) one at a time, or a function of the model as measure"
        raise EmmechError("run many variants of the model at once", given, why, instead)

    @torch.no_grad()
    def deviation(self) -> float:
        """Largest relative difference of two made-up variants from the model's own forward, on two short texts."""
        chat, rows = self.chat, self.made_up()
        texts = [tuple(range(1, 13)), (*range(1, 9), *range(13, 17))]
        readings = [Reading(ids, tuple(range(4, 12))) for ids in texts]
        worst = 0.0
        for block in self.run(self.packs(readings), rows, 2):
            for index, own in block.readings:
                ids = torch.tensor([texts[index]], device=chat.device)
                reads = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
                reads[:, 4:12] = True
                for variant in range(2):
                    found, hooks = block.hidden[variant, own][None], self.hooks(rows[variant])
                    worst = max(worst, deviation(chat, found, ids, reads, hooks, stop=self.stop))
        return worst

    def hooks(self, one: VariantWeights) -> list[Hook]:
        """One variant's adapters (its part of the stacked rows) and steering, as hooks on the model's own modules."""
        modules = dict(self.chat.base.named_modules())
        found = [
            (modules[name], adding(lambda x, a=a, b=one.B[name]: (x.to(a.dtype) @ a) @ b))  # type: ignore[misc]
            for name, a in one.A.items()
        ]
        steered = self.chat.family.steered
        for layer, vector in one.steering.items():
            found.append((self.chat.blocks[layer], lambda _m, _i, out, v=vector: steered(out, v)))  # type: ignore[misc]
        return found

    def made_up(self) -> VariantWeights:
        """Adapters of two variants that write about a tenth of the residual."""
        made, chat = torch.Generator().manual_seed(0), self.chat
        dtype = torch.promote_types(torch.float32, chat.dtype)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=made) / shape[-2] ** 0.5).to(chat.device, dtype)

        A, B = {}, {}
        for name, site in self.sites.items():
            d_in, d_out = map_widths(chat.base.get_submodule(name)) or (0, 0)
            A[name], B[name] = random(2, d_in, site.rank), 0.1 * random(2, site.rank, d_out)
        steering = {} if self.steering is None else {self.steering: 0.1 * random(2, chat.d_model)}
        return VariantWeights(A, B, steering)

    # passes

    def packs(self, readings: Sequence[Reading]) -> list[Pack]:
        """The readings, grouped into rows with shared prefixes."""
        if not self.branching:
            return [packing.tree(readings, [index]) for index in range(len(readings))]
        block = self.chat.blocks[-1]
        weights = sum(parameter.numel() for parameter in block.parameters())
        return pack(
            readings,
            linear_cost=2.0 * weights,
            pair_cost=4.0 * self.chat.attention_width,
            longest=max(self.tokens, 256),
            reach=RUN + max(len(one.needed) for one in readings) if self.upper.by_runs else None,
        )

    def batches(self, packs: Sequence[Pack], variants: int) -> Iterator[list[Pack]]:
        """Batches of packs of similar length, when the variants alone do not fill a forward."""
        order = sorted(packs, key=len)
        batch: list[Pack] = []
        for one in order:
            if batch and ((len(batch) + 1) * len(one) * variants > self.tokens or len(one) > 1.15 * len(batch[0]) + 2):
                yield batch
                batch = []
            batch.append(one)
        yield batch

    def run(self, packs: Sequence[Pack], rows: VariantWeights, variants: int) -> Iterator[Block]:
        """Run every pack under every variant, in pieces."""
        for batch in self.batches(packs, variants):
            shared = self.share(batch)
            readings = _own_reads(batch)
            at_once = max(1, self.tokens // shared.state.residual.shape[:2].numel())
            # the pieces are even: with at most 17 at once, 24 variants are split into 12 and 12
            pieces = -(-variants // at_once)
            edges = np.linspace(0, variants, pieces + 1).round().astype(int).tolist()
            for start, end in itertools.pairwise(edges):
                chosen = slice(start, end)
                yield Block(chosen, readings, self.above(shared, rows[chosen]))

    def share(self, packs: Sequence[Pack]) -> Shared:
        """Run the blocks that all variants have in common."""
        ids, places = self.places(packs)
        width = ids.shape[1]
        flat = [row * width + np.unique(np.concatenate(one.nodes)) for row, one in enumerate(packs)]
        with evaluating(self.chat):
            state = self.lower(ids, places)
        return Shared(state, places, torch.from_numpy(np.concatenate(flat)).to(ids.device))

    def places(self, packs: Sequence[Pack]) -> tuple[torch.Tensor, Places]:
        """Token ids ``[packs, seq]`` and their places."""
        ids, positions = stack(packs, self.chat.device)
        if all(one.ancestors is None for one in packs):
            return ids, Places()  # plain chains need no mask: later tokens never change a token
        return ids, Places(positions, self.tree_mask(packs))

    def tree_mask(self, packs: Sequence[Pack]) -> Any:
        """The attention mask of packs that branch, by kind of layer where the model has several kinds."""
        config, device, dtype = self.chat.config, self.chat.device, self.chat.dtype
        kinds = set(getattr(config, "layer_types", None) or ())
        # where layers are of one kind, its window (or None) applies to all
        full = packing.tree_mask(packs, dtype, device, window=None if kinds else self.chat.parts(0).window)
        if "sliding_attention" not in kinds:
            return full
        window = packing.tree_mask(packs, dtype, device, window=int(config.sliding_window))
        return {"full_attention": full, "sliding_attention": window}

    def above(
        self, shared: Shared, rows: VariantWeights, cache: Any = None
    ) -> Float[torch.Tensor, "variants reads d_model"]:
        """Run the blocks that differ; gradients flow where the caller has enabled them."""
        packs, width = shared.state.residual.shape[:2]
        hidden = self.parted(shared.state, rows)
        variants = len(hidden)
        offsets = torch.arange(variants, device=hidden.device)[:, None] * (packs * width)
        places = Places(
            _each(shared.places.positions, variants, packs),
            _each(shared.places.mask, variants, packs),
            (offsets + shared.reads[None]).reshape(-1),
        )
        out = self.raised(hidden.flatten(0, 1), places, rows, cache)
        return rearrange(out, "(variants reads) d -> variants reads d", variants=variants)

    def raised(self, x: torch.Tensor, places: Places, rows: VariantWeights, cache: Any = None) -> torch.Tensor:
        """Run rows, each group of them under its own variant, through the blocks after the cut."""
        self.rows.A, self.rows.B, self.rows.steering = rows.A, rows.B, rows.steering
        with evaluating(self.chat):
            return self.upper(x, places, cache)

    def parted(self, state: State, rows: VariantWeights) -> Float[torch.Tensor, "..."] | Int[torch.Tensor, "..."]:
        """``[variants, packs, seq, ...]`` at the cut: the residual with each variant's own write, or token ids."""
        shape = state.residual.shape
        if self.shared_name is None:
            hidden = state.residual.expand(len(rows), *shape)
        else:
            a, b = rows.A[self.shared_name], rows.B[self.shared_name]

            def add(onto: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
                z = rearrange(inner(read.flatten(0, 1), a), "tokens variants rank -> variants tokens rank")
                return write(onto.flatten(0, 1).expand(len(rows), -1, -1), z, b).view(len(rows), *shape)

            hidden = self.lower.entering(state, add)
        if self.steering == self.frozen.blocks - 1:
            hidden = hidden + rows.steering[self.frozen.blocks - 1][:, None, None].to(hidden.dtype)
        return hidden

    def bytes_per_token(self) -> int:
        """Bytes that one token of one variant needs in the later blocks, from the number of arrays in use at once."""
        chat = self.chat
        size = chat.dtype.itemsize
        residual = 4 if self.upper.wide else size
        return residual * 4 * chat.d_model + size * max(6 * chat.attention_width, 4 * self.widest)

    @property
    def widest(self) -> int:
        """The largest width of any linear map in a block, which is the MLP's where it has one."""
        return max(max(map_widths(module) or (0,)) for module in self.chat.blocks[-1].modules())


def _own_reads(packs: Sequence[Pack]) -> tuple[tuple[int, np.ndarray], ...]:
    found, offset = [], 0
    for one in packs:
        nodes = np.unique(np.concatenate(one.nodes))
        for reading, own in zip(one.readings, one.nodes, strict=True):
            found.append((reading, offset + np.searchsorted(nodes, own)))
        offset += len(nodes)
    return tuple(found)


def _each(value: Any, variants: int, packs: int) -> Any:
    """Repeat a tensor of the packs for all rows; a single pack broadcasts without that."""
    if value is None or packs == 1:
        return value
    if isinstance(value, dict):
        return {kind: _each(one, variants, packs) for kind, one in value.items()}
    return repeat(value, "packs ... -> (variants packs) ...", variants=variants)
