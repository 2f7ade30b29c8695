"""Some of a decoder's blocks as one function of the residual stream that enters them.

A forward pass made for whole models transposes heads and positions, joins halves that it has just split and runs every
block at every position. Here norms, rotations and gates are computed in place, the last block's queries and MLP run
only at the positions that are read, and a step of one token per row uses the same few lines as whole rows. The code
here spells out how some families compose a block; the parts of a block (activations and linear maps, quantised or not,
with or without an adapter) are called as they are. A block that is composed differently, or that has hooks, is left to
the model's own forward, on a view of the trunk that skips the other blocks; the call and the results are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import nn
from torch.utils.checkpoint import checkpoint

from emmech.chat.families import Parts
from emmech.chat.model import ChatModel
from emmech.engine.adapters import RowSteering
from emmech.engine.attention import NAME, Cache, Rowwise, new_past, queries_at, selected
from emmech.engine.modules import Skip, after_hooks, has_hooks, hooked, only_results_hooked, with_attention, with_module

MOST_READ = 0.8  # where more than this share of positions is read, leaving out the others costs more than it saves
_Turn = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [..., 1, width]


@dataclass(frozen=True)
class Places:
    """The positions of the tokens of a forward pass, and what they see.

    Args:
        positions: the position of each token in its own text ``[rows, tokens]``, or ``[rows]`` in a step of one token
            per row; None counts from the end of the stem.
        mask: the additive mask ``[rows or 1, 1, tokens, tokens]`` of packed trees, or a dict of masks by kind of layer;
            None is causal, so that padding on the right changes nothing.
        reads: ascending flat indices into ``[rows * tokens]`` of the residuals that are wanted; None is all.
        stems: the result of :meth:`Blocks.stem`, which the rows follow.
        of_stem: the stem that each row follows, ``[rows]``.
    """

    positions: Int[torch.Tensor, "*places"] | None = None
    mask: Any = None
    reads: Int[torch.Tensor, " reads"] | None = None
    stems: Any = None
    of_stem: Int[torch.Tensor, " rows"] | None = None


class Blocks:
    """Blocks ``first`` to ``last - 1``, and the final norm where they reach the end; weights are shared, not copied.

    Args:
        norm: whether the result passes through the final norm; by default it does if the last block is included.
        edits: replacements for modules, by path from the list of blocks (``"3.mlp.down_proj"``, ``"3"``). They are
            made in the given order, so parts of a block come before the block.
        checkpointing: keep the input of each block alone for the backward pass, which runs the block again; this is for
            blocks that run as they are written out here.
        wide: keep the residual stream, and with it every norm, in float32 where the model is in bfloat16 and the
            blocks are written out here; the products stay in bfloat16. The result is then float32.
        steered: run blocks as they are written out here also where they have hooks of their results, and call these
            hooks. They then see the positions of one forward, padding on the right.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> lower, upper = Blocks(chat, 0, 2), Blocks(chat, 2)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> with torch.no_grad():
        ...     torch.allclose(upper(lower(ids)), chat.trunk(input_ids=ids).last_hidden_state, atol=1e-5)
        True
    """

    def __init__(
        self,
        chat: ChatModel,
        first: int = 0,
        last: int | None = None,
        *,
        norm: bool | None = None,
        edits: Mapping[str, Callable[[nn.Module], nn.Module]] | None = None,
        checkpointing: bool = False,
        wide: bool = False,
        steered: bool = False,
    ) -> None:
        last = chat.n_layers if last is None else last
        family, listed = chat.family, chat.family.blocks
        as_tuple = not family.written_out and _returns_tuples(chat)
        skipped = {i: Skip(block, i, as_tuple=as_tuple) for i, block in enumerate(chat.blocks) if not first <= i < last}
        kept = [skipped.get(i, block) for i, block in enumerate(chat.blocks)]
        self._enter = skipped.get(first - 1)
        view = with_module(chat.trunk, listed, nn.ModuleList(kept))
        for path, edit in (edits or {}).items():
            path = f"{listed}.{path}"
            view = with_module(view, path, edit(view.get_submodule(path)))
        bare = not (last == chat.n_layers if norm is None else norm)
        if bare and family.final_norm is not None:
            view = with_module(view, family.final_norm, nn.Identity())
        self.chat, self.view, self.checkpointing = chat, view, checkpointing
        listed_now: Any = view.get_submodule(listed)
        self.blocks: list[Any] = list(listed_now)[first:last]
        self.final_norm: Any = nn.Identity() if bare else chat.final_norm
        kinds = getattr(chat.config, "layer_types", None) or ["full_attention"] * chat.n_layers
        self.kinds = list(kinds)[first:last]
        self.embed: Any = chat.trunk.get_input_embeddings()
        self.rotary: Any = getattr(view, family.rotary or "", None)
        self.parts = [family.parts(_bare(block)) for block in self.blocks]
        #: whether the blocks run as they are written out here
        self.written = (
            family.written_out
            and self.rotary is not None
            and not has_hooks(view)
            and all(
                _as_written(_bare(block), parts, steered=steered)
                for block, parts in zip(self.blocks, self.parts, strict=True)
            )
        )
        self.wide = wide and self.written and chat.dtype == torch.bfloat16

    def __call__(self, x: torch.Tensor, places: Places = Places(), cache: Any = None) -> torch.Tensor:
        """The blocks' output for tokens or for the residual that enters them.

        Args:
            x: token ids ``[rows, tokens]`` or residuals ``[rows, tokens, d_model]``; ``[rows]`` or ``[rows, d_model]``
                in a step of one token per row.
            cache: an empty cache to fill, or the growing :class:`Cache` that a step of one token reads and extends.

        Returns:
            ``[rows, tokens, d_model]``, ``[reads, d_model]`` where reads are named, or ``[rows, d_model]`` for a step.
        """
        if not self.written:
            return self._by_modules(x, places, cache)
        hidden = x if x.is_floating_point() else self._embedded(x)
        hidden = hidden.float() if self.wide else hidden
        if isinstance(cache, Cache) and cache.growing:
            return self._run(hidden, self._turns(hidden, places.positions, 0), cache.step)
        stem = places.stems.length if places.stems is not None else 0
        attend = Rowwise(places.mask, places.stems, places.of_stem, cache)
        rows, tokens = hidden.shape[:2]
        turns = self._turns(hidden, places.positions, stem)
        if places.reads is None:
            return self._run(hidden, turns, attend)
        if not self.blocks or self.blocks[-1]._forward_hooks or len(places.reads) >= MOST_READ * rows * tokens:
            return self._run(hidden, turns, attend, valid=places.reads)
        return self._run(hidden, turns, attend, *queries_at(places.reads, rows, tokens))

    def new_cache(self) -> Any:
        """An empty cache for a call over stems, which rows can then follow."""
        return Cache() if self.written else new_past(self.chat)

    def stem(self, x: torch.Tensor) -> Any:
        """Keys and values of stems ``[stems, tokens, ...]``; ``x`` as in a call."""
        past = self.new_cache()
        # nothing reads the last block's own result
        self(x, Places(reads=torch.zeros(1, dtype=torch.long, device=x.device)), past)
        return past

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        scale = getattr(self.chat.config, "embedding_multiplier", None)  # in trunks that scale their embeddings
        embedded: torch.Tensor = self.embed(ids)
        return embedded if scale is None else embedded * scale

    def _by_modules(self, x: torch.Tensor, places: Places, cache: Any) -> torch.Tensor:
        step = isinstance(cache, Cache) and cache.growing
        view, mask, positions = self.view, places.mask, places.positions
        if step:
            assert positions is not None
            x, positions, mask = x[:, None], positions[:, None], self._blank()
        if step or (mask is not None and self.by_runs):
            view = self._attending
        if places.stems is not None and places.of_stem is not None:
            cache = selected(places.stems, places.of_stem)
        entering = {"inputs_embeds" if x.is_floating_point() else "input_ids": x}
        # the embeddings have already passed through everything that precedes the trunk's first block
        given = contextlib.nullcontext() if self._enter is None else self._enter.giving(x)
        with given:
            out: torch.Tensor = view(
                **entering,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        if step:
            return out[:, 0]
        return out if places.reads is None else out.flatten(0, 1).index_select(0, places.reads)

    @property
    def by_runs(self) -> bool:
        """Whether attention over a tree skips the pairs that no token sees.

        On a GPU many small products cost more than computing the pairs that they leave out.
        """
        sdpa = getattr(self.chat.config, "_attn_implementation", None) == "sdpa"
        return self.chat.device.type == "cpu" and (self.written or sdpa)

    @cached_property
    def _attending(self) -> nn.Module:
        return with_attention(self.view, NAME)

    def _blank(self) -> Any:
        """A mask that the attention ignores, so that the model does not make its own."""
        blank = torch.zeros(1, 1, 1, 1, dtype=self.chat.dtype, device=self.chat.device)
        kinds = set(getattr(self.chat.config, "layer_types", None) or ())
        return dict.fromkeys(kinds | {"full_attention"}, blank) if "sliding_attention" in kinds else blank

    def _turns(self, hidden: torch.Tensor, positions: torch.Tensor | None, stem: int) -> dict[str, _Turn]:
        """Cosines and sines by kind of layer, ``[..., 1, width]``."""
        if positions is None:
            positions = torch.arange(stem, stem + hidden.shape[1], device=hidden.device)[None]
        inverse = None
        if positions.ndim == 1:  # a step has few distinct positions
            positions, inverse = torch.unique(positions, return_inverse=True)
            positions = positions[None]
        found = {}
        for kind in set(self.kinds):
            several = (kind,) if hasattr(self.rotary, "layer_types") else ()
            like = hidden[:1].reshape(1, -1, hidden.shape[-1])  # the turns have its device and dtype
            turn = self.rotary(like.to(self.chat.dtype) if self.wide else like, positions, *several)
            if inverse is not None:
                turn = [one[0].index_select(0, inverse) for one in turn]
            cos, sin = (one[..., None, :] for one in turn)
            half = sin.shape[-1] // 2
            found[kind] = (cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1))
        return found

    def _run(
        self,
        hidden: torch.Tensor,
        turns: Mapping[str, _Turn],
        attend: Any,
        asking: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all blocks, the last one's queries only at ``asking``, and return only the ``valid`` ones of those."""
        reading = asking is not None or valid is not None
        last = len(self.blocks)
        for number, (block, parts, kind) in enumerate(zip(self.blocks, self.parts, self.kinds, strict=True), 1):
            entered, asked = hidden, asking if number == last else None
            given = parts, hidden, turns[kind], attend, asked
            if self.checkpointing and hidden.requires_grad and torch.is_grad_enabled():
                hidden = checkpoint(self._block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self._block(*given)
            if block._forward_hooks:
                hidden = after_hooks(block, entered, hidden)
            if isinstance(block, RowSteering):
                hidden = block.steered(hidden)
        if reading:
            hidden = hidden.flatten(0, 1)
            hidden = hidden if valid is None else hidden.index_select(0, valid)
        return self._normed(self.final_norm, hidden)

    def _block(
        self, parts: Parts, hidden: torch.Tensor, turn: _Turn, attend: Any, asking: torch.Tensor | None
    ) -> torch.Tensor:
        read = self._entering(parts.before_attention, hidden)
        attended = self._attention(parts, read, turn, attend, asking)
        hidden = self._added(parts.out, attended, parts.after_attention, _at(hidden, asking))
        read = self._entering(parts.before_mlp, hidden)
        gate, up = parts.mlp.act_fn(_linear(parts.gate, read)), _linear(parts.up, read)
        opened = gate * up if gate.requires_grad else gate.mul_(up)
        return self._added(parts.down, opened, parts.after_mlp, hidden)

    def _attention(
        self, parts: Parts, read: torch.Tensor, turn: _Turn, attend: Any, asking: torch.Tensor | None
    ) -> torch.Tensor:
        asked, turned = _at(read, asking), turn
        if asking is not None:
            cos, sin = (one.expand(len(asking), -1, -1, -1) for one in turn)
            turned = _at(cos, asking), _at(sin, asking)
        heads = (-1, parts.attention.head_dim)
        query = _linear(parts.query, asked).unflatten(-1, heads)
        keys, values = (_linear(one, read).unflatten(-1, heads) for one in (parts.key, parts.value))
        query, keys = self._normed(parts.query_norm, query), self._normed(parts.key_norm, keys)
        found = attend(parts.attention, _rotated(query, *turned), _rotated(keys, *turn), values, parts.window, asking)
        return found.flatten(-2)  # type: ignore[no-any-return]

    def _added(self, module: Any, x: torch.Tensor, norm: Any, onto: torch.Tensor) -> torch.Tensor:
        """``onto`` plus the write of one half of the block."""
        scale = self.chat.family.residual_scale
        if norm is None and not self.wide and _is_plain(module) and module.bias is None:
            flat = torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), module.weight.T, alpha=scale)
            return flat.view(onto.shape)
        wrote = self._normed(norm, _linear(module, x))
        return onto + (wrote if scale == 1.0 else wrote * scale)

    def _entering(self, norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What one half of a block reads of the residual stream, in the dtype of its maps."""
        read = self._normed(norm, hidden)
        return read.to(self.chat.dtype) if self.wide else read

    def _normed(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        eps = getattr(module, "variance_epsilon", None)
        if module is None or eps is None or self.chat.family.norm_offset or x.dtype != torch.float32:
            return x if module is None else module(x)
        if has_hooks(module):
            return module(x)  # type: ignore[no-any-return]
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(eps).rsqrt_()
        return (x * scale[..., None]).mul_(module.weight)


_tuples: dict[type, bool] = {}  # by class of block


def _returns_tuples(chat: ChatModel) -> bool:
    """Whether the blocks return a tuple whose first entry is the residual stream; tried once."""
    block = chat.blocks[0]
    if type(block) not in _tuples:
        seen: list[bool] = []
        ids = torch.ones(1, 1, dtype=torch.long, device=chat.device)
        with torch.no_grad(), hooked((block, lambda module, inputs, output: seen.append(isinstance(output, tuple)))):
            chat.trunk(input_ids=ids, use_cache=False)
        _tuples[type(block)] = seen[0]
    return _tuples[type(block)]


def _bare(block: nn.Module) -> nn.Module:
    return block.block if isinstance(block, RowSteering) else block


def _as_written(block: nn.Module, parts: Parts, *, steered: bool = False) -> bool:
    """Whether this block can be run part by part."""
    attention = parts.attention
    plain = only_results_hooked(block) if steered else not has_hooks(block)
    plain = plain and not any(map(has_hooks, (attention, parts.mlp)))
    return plain and parts.attention_cap is None and getattr(attention, "is_causal", True)


def _at(x: torch.Tensor, asking: torch.Tensor | None) -> torch.Tensor:
    """``x [rows, tokens, ...]`` at the tokens that have queries, ``[rows, queries, ...]``."""
    if asking is None:
        return x
    return x.flatten(0, 1).index_select(0, asking.flatten()).view(*asking.shape, *x.shape[2:])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, ``[..., heads, width]``; the first half of the sines is negative."""
    half = x.shape[-1] // 2
    if x.requires_grad:
        return torch.addcmul(x * cos, x.roll(half, dims=-1), sin)
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not has_hooks(module)


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, module.weight, module.bias) if _is_plain(module) else module(x)
