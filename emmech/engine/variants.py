"""Run token packs under many variants: the blocks below the lowest adapter once, those above for all rows at once.

What is shared: below the lowest adapter no variant differs, so those blocks run once per pack. Where that
adapter is the only one of its block and sits on ``down_proj``, the whole block is shared too, since the adapter
reads what is the same for all and only its write differs. What is saved besides: the last block's MLP and the
unembedding run at read positions only.

Everything goes through the model's own modules and its own forward, on a view of the trunk in which some
submodules are replaced; the model itself is never touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine import packing
from emmech.engine.packing import Pack, Reading, pack, stack
from emmech.engine.row_adapters import AtReads, Capture, RowAdapter, Rows, RowSteering, Site, Skip, with_module, write
from emmech.engine.tree_attention import RUN, over_trees

__all__ = ["Block", "Engine", "Mode", "Shared", "cut"]

# architectures whose block adds down_proj's write as ``part`` says; any other is tried before it is believed
_KNOWN = frozenset({"qwen2", "qwen3", "llama", "gemma3_text"})


@dataclass(frozen=True)
class Shared:
    """What all variants have in common for some packs.

    Args:
        hidden: residual stream where the variants part, ``[packs, seq, d_model]``.
        read: the shared adapter's input ``[packs, seq, d_in]``; None where no write is shared.
        wrote: what the module under it wrote, ``[packs, seq, d_model]``.
        mask: what the trunk takes as ``attention_mask``.
        positions: ``[packs, seq]``, or None for plain counting.
        reads: flat indices into ``[packs * seq]`` of the positions that are read.
    """

    hidden: torch.Tensor
    read: torch.Tensor | None
    wrote: torch.Tensor | None
    mask: Any
    positions: torch.Tensor | None
    reads: torch.Tensor


@dataclass(frozen=True)
class Block:
    """One piece of the result.

    Args:
        variants: positions in the list of chosen variants.
        readings: per reading in it: its index, and which of ``hidden``'s reads are its own.
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
        tokens: tokens that go through the upper blocks at once, at most (at least one pack of one variant).
    """

    def __init__(
        self,
        chat: ChatModel,
        sites: Mapping[str, Site],
        steering: int | None = None,
        *,
        stop: int | None = None,
        tokens: int = 1024,
    ) -> None:
        self.chat, self.sites, self.steering = chat, sites, steering
        self.stop, self.tokens = stop, tokens
        sdpa = getattr(chat.config, "_attn_implementation", None) == "sdpa"
        # on a GPU many small products cost more than the pairs that they leave out
        self.trees = sdpa and chat.device.type == "cpu"
        self.rows = Rows()  # what the modules of the upper view look at
        layers = {site.layer for site in sites.values()}
        lowest = min(layers | (set() if steering is None else {steering}))
        inside = [name for name, site in sites.items() if site.layer == lowest]
        self.capture: Capture | None = None
        self.shared_name: str | None = None
        self.split = lowest - 1
        if not inside:
            self.split = lowest  # only steering there, and it acts behind the block
        elif len(inside) == 1 and sites[inside[0]].path == chat.family.down:
            self.split, self.shared_name = lowest, inside[0]
            self.capture = Capture(chat.down_proj(lowest))
        self.behind = getattr(chat.blocks[lowest], "post_feedforward_layernorm", None)
        self.lower = self._lower()
        known = chat.config.model_type in _KNOWN
        if self.shared_name and not known and not self._write_is_added():
            self.capture = self.shared_name = None
            self.split = lowest - 1
            self.lower = self._lower()
        self.at_reads: AtReads | None = None
        self.upper = self._upper()

    # views of the trunk

    def _lower(self) -> nn.Module:
        blocks = list(self.chat.blocks)[: self.split + 1]
        if self.capture is not None:
            blocks[-1] = with_module(blocks[-1], str(self.chat.family.down), self.capture)
        return self._view(blocks, bare=True)

    def _upper(self) -> nn.Module:
        chat, end = self.chat, self.chat.n_layers if self.stop is None else self.stop + 1
        blocks: list[nn.Module] = [Skip() for _ in range(min(self.split + 1, end))]
        for layer in range(self.split + 1, end):
            block = chat.blocks[layer]
            inside = {name: site for name, site in self.sites.items() if site.layer == layer}
            mlp = chat.family.mlp
            if layer == end - 1 and mlp and not any(site.path.startswith(mlp) for site in inside.values()):
                self.at_reads = AtReads(block.get_submodule(mlp))
                block = with_module(block, mlp, self.at_reads)
            for name, site in inside.items():
                adapted = RowAdapter(block.get_submodule(site.path), self.rows, name)
                block = with_module(block, site.path, adapted)
            if self.steering == layer:
                block = RowSteering(block, self.rows, layer)
            blocks.append(block)
        return self._view(blocks, bare=self.stop is not None)

    def _view(self, blocks: Sequence[nn.Module], *, bare: bool) -> nn.Module:
        view = with_module(self.chat.trunk, self.chat.family.blocks, nn.ModuleList(blocks))
        if self.trees:
            view = over_trees(view)
        norm = self.chat.family.final_norm
        return with_module(view, norm, nn.Identity()) if bare and norm else view

    @torch.no_grad()
    def _write_is_added(self) -> bool:
        """Whether the block adds its ``down_proj`` to the residual as :meth:`part` assumes: tried, not believed."""
        capture = self.capture
        assert capture is not None
        ids = torch.tensor([[1, 2, 3]], device=self.chat.device)
        with Mode(self.chat):
            before = self.lower(input_ids=ids, use_cache=False).last_hidden_state
            wrote = capture.wrote
            change = wrote.roll(1, dims=-1)
            truth = capture.base
            try:
                capture.base = _Plus(truth, change)
                after = self.lower(input_ids=ids, use_cache=False).last_hidden_state
            finally:
                capture.base = truth
            return torch.allclose(self.part(before, wrote, wrote + change), after, rtol=1e-2, atol=1e-3)

    def part(self, hidden: torch.Tensor, wrote: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """The block's output had its ``down_proj`` written ``now`` instead of ``wrote``."""
        if self.behind is None:
            return hidden + (now - wrote)
        return hidden + (self.behind(now) - self.behind(wrote))  # Gemma norms what the MLP wrote

    # passes

    def packs(self, readings: Sequence[Reading]) -> list[Pack]:
        """The readings grouped into rows with shared prefixes."""
        block = self.chat.blocks[-1]
        weights = sum(parameter.numel() for parameter in block.parameters())
        width = self.chat.config.num_attention_heads * int(
            getattr(self.chat.config, "head_dim", None) or self.chat.d_model // self.chat.config.num_attention_heads
        )
        return pack(
            readings,
            linear_cost=2.0 * weights,
            pair_cost=4.0 * width,
            longest=max(self.tokens, 256),
            reach=RUN + max(len(one.needed) for one in readings) if self.trees else None,
        )

    def batches(self, packs: Sequence[Pack], variants: int) -> Iterator[list[Pack]]:
        """Packs of like length together, when the variants alone do not fill a forward."""
        order = sorted(packs, key=len)
        batch: list[Pack] = []
        for one in order:
            if batch and ((len(batch) + 1) * len(one) * variants > self.tokens or len(one) > 1.15 * len(batch[0]) + 2):
                yield batch
                batch = []
            batch.append(one)
        yield batch

    def run(self, packs: Sequence[Pack], rows: Rows, variants: int) -> Iterator[Block]:
        """Every pack under every variant, in pieces."""
        for batch in self.batches(packs, variants):
            shared = self.share(batch)
            readings = _own_reads(batch)
            at_once = max(1, self.tokens // (shared.hidden.shape[0] * shared.hidden.shape[1]))
            # even pieces: 24 variants at 17 at once are 12 and 12
            pieces = -(-variants // at_once)
            edges = np.linspace(0, variants, pieces + 1).round().astype(int).tolist()
            for start, end in itertools.pairwise(edges):
                chosen = slice(start, end)
                yield Block(chosen, readings, self.above(shared, cut(rows, chosen)))

    def share(self, packs: Sequence[Pack]) -> Shared:
        """Run the blocks that all variants have in common."""
        device = self.chat.device
        ids, positions = stack(packs, device)
        width = ids.shape[1]
        branches = any(one.ancestors is not None for one in packs)
        flat = [row * width + np.unique(np.concatenate(one.nodes)) for row, one in enumerate(packs)]
        reads = torch.from_numpy(np.concatenate(flat)).to(device)
        # plain chains need no mask of ours: what follows a token never changes it
        return self.lowered(ids, self.tree_mask(packs) if branches else None, positions if branches else None, reads)

    def lowered(
        self,
        ids: torch.Tensor,
        mask: Any,
        positions: torch.Tensor | None,
        reads: torch.Tensor,
        cache: Any = None,
    ) -> Shared:
        """Run tokens ``[packs, seq]`` up to where the variants part."""
        with torch.no_grad(), Mode(self.chat):
            hidden = self.lower(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        read = wrote = None
        if self.capture is not None:
            read, wrote = self.capture.taken()
        return Shared(hidden, read, wrote, mask, positions, reads)

    def tree_mask(self, packs: Sequence[Pack]) -> Any:
        """The attention mask of packs that branch; by kind of layer where the model has several."""
        config, device, dtype = self.chat.config, self.chat.device, self.chat.dtype
        full = packing.tree_mask(packs, dtype, device)
        kinds = set(getattr(config, "layer_types", None) or ())
        if "sliding_attention" not in kinds:
            return full
        window = packing.tree_mask(packs, dtype, device, window=int(config.sliding_window))
        return {"full_attention": full, "sliding_attention": window}

    def above(self, shared: Shared, rows: Rows, cache: Any = None) -> Float[torch.Tensor, "variants reads d_model"]:
        """Run the blocks that differ; gradients flow where the caller has them enabled."""
        packs, width, d_model = shared.hidden.shape
        hidden = self.parted(shared, rows)
        variants = hidden.shape[0]
        offsets = torch.arange(variants, device=hidden.device)[:, None] * (packs * width)
        flat = (offsets + shared.reads[None]).reshape(-1)
        out = self.raised(
            hidden.reshape(variants * packs, width, d_model),
            _repeat(shared.mask, variants, packs),
            _repeat(shared.positions, variants, packs),
            rows,
            flat=flat if len(shared.reads) < 0.8 * packs * width else None,
            cache=cache,
        )
        return out.reshape(-1, d_model)[flat].reshape(variants, -1, d_model)

    def raised(
        self,
        hidden: Float[torch.Tensor, "rows seq d_model"],
        mask: Any,
        positions: torch.Tensor | None,
        rows: Rows,
        *,
        flat: torch.Tensor | None = None,
        cache: Any = None,
    ) -> Float[torch.Tensor, "rows seq d_model"]:
        """Run rows through the blocks above where the variants part.

        Args:
            flat: indices into ``[rows * seq]`` of what will be read; elsewhere the result is not to be used.
        """
        if self.at_reads is not None:
            self.at_reads.flat = flat
        self.rows.A, self.rows.B, self.rows.steering = rows.A, rows.B, rows.steering
        with Mode(self.chat):
            out: torch.Tensor = self.upper(
                inputs_embeds=hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return out

    def parted(self, shared: Shared, rows: Rows) -> Float[torch.Tensor, "variants packs seq d_model"]:
        """The residual stream where the variants part, each with its own write."""
        variants = _count(rows)
        hidden = shared.hidden[None].expand(variants, *shared.hidden.shape)
        if self.shared_name is not None:
            assert shared.read is not None and shared.wrote is not None
            a, b = rows.A[self.shared_name], rows.B[self.shared_name]
            read = shared.read.reshape(-1, shared.read.shape[-1]).to(a.dtype)
            # one product for all variants: [tokens, d_in] x [d_in, variants * rank]
            z = read @ a.permute(1, 0, 2).reshape(a.shape[1], -1)
            z = z.reshape(len(read), variants, -1).transpose(0, 1)
            if self.behind is None:
                hidden = write(hidden.reshape(variants, len(read), -1), z, b).reshape(hidden.shape)
            else:
                wrote = shared.wrote.reshape(1, len(read), -1).expand(variants, -1, -1)
                hidden = self.part(hidden, shared.wrote[None], write(wrote, z, b).reshape(hidden.shape))
        if self.steering == self.split:
            hidden = hidden + rows.steering[self.split][:, None, None].to(hidden.dtype)
        return hidden

    def bytes_per_token(self) -> int:
        """Bytes that one token of one variant takes on its way up, by a count of the arrays that live at once."""
        config, size = self.chat.config, self.chat.dtype.itemsize
        heads = int(config.num_attention_heads)
        width = heads * int(getattr(config, "head_dim", None) or self.chat.d_model // heads)
        attention = 6 * width + 4 * self.chat.d_model
        mlp = 4 * self.chat.d_mlp + 4 * self.chat.d_model
        return size * max(attention, mlp)


class _Plus(nn.Module):
    """A module with a constant added to its output."""

    def __init__(self, base: nn.Module, change: torch.Tensor) -> None:
        super().__init__()
        self.base, self.change = base, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.change


class Mode:
    """Evaluation mode for the time of a pass: the model may have been left in training mode."""

    def __init__(self, chat: ChatModel) -> None:
        self.chat = chat

    def __enter__(self) -> None:
        self.training = self.chat.base.training
        if self.training:
            self.chat.base.eval()

    def __exit__(self, *exc: object) -> None:
        if self.training:
            self.chat.base.train()


def cut(rows: Rows, chosen: slice) -> Rows:
    """Some variants of stacked rows."""
    return replace(
        rows,
        A={name: a[chosen] for name, a in rows.A.items()},
        B={name: b[chosen] for name, b in rows.B.items()},
        steering={layer: vectors[chosen] for layer, vectors in rows.steering.items()},
    )


def _count(rows: Rows) -> int:
    stacked = next(iter(rows.A.values()), None)
    return len(stacked if stacked is not None else next(iter(rows.steering.values())))


def _own_reads(packs: Sequence[Pack]) -> tuple[tuple[int, np.ndarray], ...]:
    found, offset = [], 0
    for one in packs:
        nodes = np.unique(np.concatenate(one.nodes))
        for reading, own in zip(one.readings, one.nodes, strict=True):
            found.append((reading, offset + np.searchsorted(nodes, own)))
        offset += len(nodes)
    return tuple(found)


def _repeat(value: Any, variants: int, packs: int) -> Any:
    """A pack-wise tensor for all rows; one pack broadcasts by itself."""
    if value is None or packs == 1:
        return value
    if isinstance(value, dict):
        return {kind: _repeat(one, variants, packs) for kind, one in value.items()}
    return value.repeat(variants, *([1] * (value.ndim - 1)))
