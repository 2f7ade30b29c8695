"""Some of a decoder's blocks as one function of the residual stream that enters them.

A forward made for whole models turns heads and positions around, joins halves that it has just cut and runs every block
at every position. Here norms, rotations and gates are written in place, the last block's queries and MLP run at the
positions that are read, and a step of one token per row is the same few lines as whole rows. What is written out is how
some families put a block together; what a block is made of (linear maps, quantised or not, with an adapter on them or
not, activations) is called as it is. A block that is put together otherwise, or that has hooks, is left to the model's
own forward, on a view of the trunk in which the other blocks are skipped: by the same call and with equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.attention import NAME, RUN, Rowwise, queries_at
from emmech.engine.cache import Branches, KeysValues, new_past, selected
from emmech.engine.modules import Skip, has_hooks, with_attention, with_module
from emmech.engine.row_adapters import RowSteering

__all__ = ["Blocks", "Places"]

_MOST_READ = 0.8  # above this share of positions, leaving out the others costs more than it saves
_BLOCKS = frozenset({"Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "Gemma3DecoderLayer"})
_NORMS = frozenset({"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm"})  # that multiply by their weight
_Turn = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [..., 1, width]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward are, and what they see.

    Args:
        positions: of each token in its own text ``[rows, tokens]``, or ``[rows]`` in a step of one token per row; None
            counts from the end of the stem.
        mask: additive ``[rows or 1, 1, tokens, tokens]`` of packed trees, or a dict of them by kind of layer; None:
            causal, so that padding on the right changes nothing.
        reads: ascending flat indices into ``[rows * tokens]`` of the residuals that are wanted; None: all.
        stems: what :meth:`Blocks.stem` gave, which the rows follow.
        of_stem: which stem each row follows ``[rows]``.
    """

    positions: Int[torch.Tensor, "*places"] | None = None
    mask: Any = None
    reads: Int[torch.Tensor, " reads"] | None = None
    stems: Any = None
    of_stem: Int[torch.Tensor, " rows"] | None = None


class Blocks:
    """Blocks ``first`` to ``last - 1``, and the final norm where they reach the end; weights are shared, not copied.

    Args:
        norm: pass the result through the final norm; by default if the last block is among them.
        edits: by path from the list of blocks (``"3.mlp.down_proj"``, ``"3"``), what to put in a module's place.
            In the given order, so that parts of a block come before it.

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
    ) -> None:
        last = chat.n_layers if last is None else last
        listed, normed = chat.anatomy.blocks, chat.anatomy.final_norm
        kept = [block if first <= i < last else Skip(block, i) for i, block in enumerate(chat.blocks)]
        view = with_module(chat.trunk, listed, nn.ModuleList(kept))
        for path, edit in (edits or {}).items():
            path = f"{listed}.{path}"
            view = with_module(view, path, edit(view.get_submodule(path)))
        if not (last == chat.n_layers if norm is None else norm):
            view = with_module(view, normed, nn.Identity())
        self.chat, self.view = chat, view
        self.blocks: list[Any] = list(view.get_submodule(listed))[first:last]  # type: ignore[arg-type]
        self.final_norm: Any = view.get_submodule(normed)
        kinds = getattr(chat.config, "layer_types", None) or ["full_attention"] * chat.n_layers
        self.kinds = list(kinds)[first:last]
        self.embed: Any = chat.trunk.get_input_embeddings()
        self.rotary: Any = getattr(view, "rotary_emb", None)
        #: whether the blocks run as they are written out here
        self.written = self.rotary is not None and not has_hooks(view) and all(map(_known, self.blocks))

    def __call__(self, x: torch.Tensor, places: Places = Places(), cache: Any = None) -> torch.Tensor:  # noqa: B008
        """What the blocks make of tokens or of the residual that enters them.

        Args:
            x: token ids ``[rows, tokens]`` or residuals ``[rows, tokens, d_model]``; ``[rows]`` or ``[rows, d_model]``
                in a step of one token per row.
            cache: an empty :class:`KeysValues` to be filled, or the :class:`Branches` that a step of one token reads
                and grows.

        Returns:
            ``[rows, tokens, d_model]``, ``[reads, d_model]`` where reads are named, ``[rows, d_model]`` of a step.
        """
        if not self.written:
            return self._by_modules(x, places, cache)
        hidden = x if x.is_floating_point() else self.embed(x)
        if isinstance(cache, Branches):
            return self._run(hidden, self._turns(hidden, places.positions, 0), cache.step)
        stem = places.stems.length if places.stems is not None else 0
        attend = Rowwise(places.mask, places.stems, places.of_stem, cache)
        rows, tokens = hidden.shape[:2]
        turns = self._turns(hidden, places.positions, stem)
        if places.reads is None:
            return self._run(hidden, turns, attend)
        if not self.blocks or len(places.reads) >= _MOST_READ * rows * tokens:
            return self._run(hidden, turns, attend, valid=places.reads)
        return self._run(hidden, turns, attend, *queries_at(places.reads, rows, tokens))

    def new_cache(self) -> Any:
        """A cache to be filled by a call over stems, which rows can then follow."""
        return KeysValues() if self.written else new_past(self.chat)

    def stem(self, x: torch.Tensor) -> Any:
        """Keys and values of stems ``[stems, tokens, ...]``; ``x`` as in a call."""
        past = self.new_cache()
        # nothing reads the last block's own result
        self(x, Places(reads=torch.zeros(1, dtype=torch.long, device=x.device)), past)
        return past

    def _by_modules(self, x: torch.Tensor, places: Places, cache: Any) -> torch.Tensor:
        step = isinstance(cache, Branches)
        view, mask, positions = self.view, places.mask, places.positions
        if step:
            assert positions is not None
            x, positions, mask = x[:, None], positions[:, None], self._blank()
        if step or (mask is not None and self.by_runs):
            view = self._attending
        if places.stems is not None:
            cache = selected(places.stems, places.of_stem)
        entering = {"inputs_embeds" if x.is_floating_point() else "input_ids": x}
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
        """Whether attention over a tree leaves out what no token sees.

        On a GPU many small products cost more than the pairs that they leave out.
        """
        sdpa = getattr(self.chat.config, "_attn_implementation", None) == "sdpa"
        return self.chat.device.type == "cpu" and (self.written or sdpa)

    @cached_property
    def _attending(self) -> nn.Module:
        return with_attention(self.view, NAME)

    def _blank(self) -> Any:
        """A mask for a model whose attention does not look at it, so that it need not make one."""
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
            turn = self.rotary(hidden[:1].reshape(1, -1, hidden.shape[-1]), positions, *several)
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
        """All blocks; the last one's queries only where ``asking`` says, and of those only the ``valid`` ones."""
        reading = asking is not None or valid is not None
        for number, (block, kind) in enumerate(zip(self.blocks, self.kinds, strict=True), 1):
            hidden = _block(block, hidden, turns[kind], attend, asking if number == len(self.blocks) else None)
        if reading:
            hidden = hidden.flatten(0, 1)
            hidden = hidden if valid is None else hidden.index_select(0, valid)
        return _normed(self.final_norm, hidden)


def _known(block: nn.Module) -> bool:
    """Whether the block is put together as :func:`_block` does it."""
    block = block.block if isinstance(block, RowSteering) else block
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    return (
        type(block).__name__ in _BLOCKS
        and not any(map(has_hooks, (block, attention, mlp)))
        and getattr(attention, "attn_logit_softcapping", None) is None
        and getattr(attention, "is_causal", True)
    )


def _block(
    block: Any, hidden: torch.Tensor, turn: _Turn, attend: Any, asking: Int[torch.Tensor, "rows queries"] | None
) -> torch.Tensor:
    if isinstance(block, RowSteering):
        return block.steered(_block(block.block, hidden, turn, attend, asking))
    attended = _attention(block.self_attn, _normed(block.input_layernorm, hidden), turn, attend, asking)
    hidden = _at(hidden, asking)
    # Gemma norms what is written as well
    before, after = getattr(block, "pre_feedforward_layernorm", None), block.post_attention_layernorm
    mlp: Any = block.mlp
    if before is None:
        hidden = _linear(block.self_attn.o_proj, attended, hidden)
        return _linear(mlp.down_proj, _opened(mlp, _normed(after, hidden)), hidden)
    hidden = hidden + _normed(after, _linear(block.self_attn.o_proj, attended))
    wrote = _linear(mlp.down_proj, _opened(mlp, _normed(before, hidden)))
    return hidden + _normed(block.post_feedforward_layernorm, wrote)


def _opened(mlp: Any, read: torch.Tensor) -> torch.Tensor:
    """The input of ``down_proj``."""
    gate, up = mlp.act_fn(_linear(mlp.gate_proj, read)), _linear(mlp.up_proj, read)
    return gate * up if gate.requires_grad else gate.mul_(up)


def _attention(
    module: Any, read: torch.Tensor, turn: _Turn, attend: Any, asking: Int[torch.Tensor, "rows queries"] | None
) -> torch.Tensor:
    asked, turned = _at(read, asking), turn
    if asking is not None:
        cos, sin = (one.expand(len(asking), -1, -1, -1) for one in turn)
        turned = _at(cos, asking), _at(sin, asking)
    query = _linear(module.q_proj, asked).unflatten(-1, (-1, module.head_dim))
    keys = _linear(module.k_proj, read).unflatten(-1, (-1, module.head_dim))
    values = _linear(module.v_proj, read).unflatten(-1, (-1, module.head_dim))
    if hasattr(module, "q_norm"):
        query, keys = _normed(module.q_norm, query), _normed(module.k_norm, keys)
    window = getattr(module, "sliding_window", None)
    return attend(module, _rotated(query, *turned), _rotated(keys, *turn), values, window, asking).flatten(-2)  # type: ignore[no-any-return]


def _at(x: torch.Tensor, asking: torch.Tensor | None) -> torch.Tensor:
    """``x [rows, tokens, ...]`` at the tokens that ask, ``[rows, queries, ...]``."""
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


def _linear(module: nn.Module, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """The module's output, added ``onto`` something where that is given."""
    if type(module) is not nn.Linear or has_hooks(module):
        return module(x) if onto is None else onto + module(x)  # type: ignore[no-any-return]
    if onto is None or module.bias is not None:
        out = nn.functional.linear(x, module.weight, module.bias)
        return out if onto is None else onto + out
    return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), module.weight.T).view(onto.shape)


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    if type(module).__name__ not in _NORMS or x.dtype != torch.float32 or has_hooks(module):
        return module(x)  # type: ignore[no-any-return]
    scale = (torch.linalg.vecdot(x, x) / x.shape[-1]).add_(module.variance_epsilon).rsqrt_()
    return (x * scale[..., None]).mul_(module.weight)
