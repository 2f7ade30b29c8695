"""Frozen-prefix training: what lies below the lowest adapter is computed once per row, not once per epoch.

With adapters only at layer l and above, the residual that enters block l never changes in training. Where the
only adapter of block l sits on the MLP's write (``down_proj``), neither does anything of that block but the
write itself, so the cache holds ``down_proj``'s input and the block's output without the adapter. Training then
runs the rank-1 write, the blocks above and the unembedding at answer positions only. Losses are those of plain
training to rounding.

The cache is memory-mapped, in the model's own dtype (which loses nothing), and disposable.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.fused import lean_blocks
from emmech.engine.logprobs import pad, unembed
from emmech.engine.prefix_plan import Frozen
from emmech.errors import EmmechError

__all__ = ["Trunk", "batches_by_length", "detached", "partial_trunk"]

_TOKENS = 2048  # per forward while the states are filled
_STEM_FROM = 4  # a shorter common start is not worth keys and values of its own
_PADDING = 1.15  # padded tokens per real one, at most, in a batch of rows


class _Skip(nn.Module):
    """Stands where a block stood, so that layer numbers, masks and rotary tables keep their places."""

    def __init__(self, block: nn.Module, layer: int) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self._layer = layer

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if past_key_values is not None:  # the model reads the past's length off any layer, also a skipped one
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self._layer)
        return hidden_states


def partial_trunk(chat: ChatModel, start: int, stop: int, *, norm: bool = True) -> nn.Module:
    """A view of the trunk that runs only blocks ``start`` to ``stop - 1``; weights are shared, not copied.

    Call it with ``input_ids`` or, for the residual that enters block ``start``, with ``inputs_embeds``. The
    model's own forward makes masks and rotary tables. Right-padded rows need no attention mask: under causal
    attention no token sees the padding behind it.

    Args:
        norm: pass the result through the final norm; False returns the residual itself.
    """
    blocks = list(chat.blocks)
    kept = [block if start <= i < stop else _Skip(block, i) for i, block in enumerate(blocks)]
    view = _replaced(chat.trunk, chat.family.blocks, nn.ModuleList(kept))
    bare = None if norm else chat.family.final_norm
    return view if bare is None else _replaced(view, bare, nn.Identity())


def _replaced(module: nn.Module, path: str, value: nn.Module) -> nn.Module:
    head, _, rest = path.partition(".")
    twin = copy.copy(module)
    inner = module.get_submodule(head)
    twin._modules = {**module._modules, head: _replaced(inner, rest, value) if rest else value}
    return twin


class Trunk:
    """The trunk on many rows at once, cut in two: states that training does not touch, and the blocks above.

    Rows that begin with the same tokens (the template's system prompt, as a rule) share them: that ``stem`` goes
    through the upper blocks once per adapter, and the rows attend to its keys and values.

    Args:
        chat: with the adapters on it.
        encoded: the rows.
        frozen: where to cut; None keeps no states, and everything runs each time.
        folder: scratch for the states; :meth:`close` deletes it.
    """

    def __init__(self, chat: ChatModel, encoded: Encoded, frozen: Frozen | None, folder: Path) -> None:
        self.frozen = frozen
        self._chat, self._folder = chat, folder
        self._ids, self._labels = encoded.input_ids, encoded.labels
        self.stem = _stem(encoded)
        # the stem comes first, then every row's own tokens
        lengths = [self.stem, *(len(ids) - self.stem for ids in encoded.input_ids)]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._after = _after_write(chat, frozen.layer) if frozen and frozen.at_write else None
        first = frozen.blocks if frozen else 0
        self._embed = partial_trunk(chat, 0, 0, norm=False)
        self._upper = partial_trunk(chat, first, chat.n_layers)
        self._lean = lean_blocks(chat, first)
        self._arrays: dict[str, torch.Tensor] = {}
        if frozen is not None:
            self._allocate()
            self._fill()

    @property
    def nbytes(self) -> int:
        """Size of the states on disk."""
        return sum(array.nbytes for array in self._arrays.values())

    def close(self) -> None:
        """Drop the states and delete their files."""
        self._arrays.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def hidden(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        read: torch.Tensor,
        past: Any = None,
        of_past: torch.Tensor | None = None,
        write: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states behind the final norm at the places that are read, row by row, ``[places, d_model]``.

        Args:
            rows: numbers of rows.
            lengths: how many tokens of each, the stem not counted.
            read: which of them, right-padded ``[rows, longest]``.
            past: what :meth:`read_stem` gave, when there is a stem.
            of_past: which of its sequences each row follows, ``[rows]``.
            write: for a cut at the write: from ``down_proj``'s input ``[tokens, d_mlp]``, all rows' tokens one row
                after another, to what the adapters add to its output ``[tokens, d_model]``.
        """
        spans = [(int(self._starts[i + 1]), n) for i, n in zip(rows, lengths, strict=True)]
        entering = _padded(self._entering(spans, rows, write), lengths)
        if self._lean is not None:
            return self._lean(entering, self.stem, read, past, of_past)
        if past is not None:
            past = _selected(past, of_past)
        return self._upper(inputs_embeds=entering, past_key_values=past, use_cache=past is not None).last_hidden_state[
            read
        ]  # type: ignore[no-any-return]

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-probability of answer tokens ``[tokens]`` behind ``hidden [tokens, d_model]``, in nats."""
        if self._lean is not None:
            return self._lean.nll(hidden, targets)
        logits = unembed(self._chat, hidden).float()
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    def read_stem(self, copies: int, write: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
        """Keys and values of the stem under ``copies`` adapters, or None where rows share nothing."""
        if not self.stem:
            return None
        entering = self._entering([(0, self.stem)] * copies, None, write).view(copies, self.stem, -1)
        if self._lean is not None:
            return self._lean.stem(entering)
        past = _new_past(self._chat)
        self._upper(inputs_embeds=entering, past_key_values=past, use_cache=True)
        return past

    def _entering(
        self,
        spans: Sequence[tuple[int, int]],
        rows: Sequence[int] | None,
        write: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """The residual that enters the upper blocks, ``[tokens, d_model]``; ``rows`` is None for the stem."""
        device = self._chat.device
        if self.frozen is None:
            ids = (
                [token for i, (_, n) in zip(rows, spans, strict=True) for token in self._ids[i][self.stem :][:n]]
                if rows is not None
                else list(self._ids[0][: self.stem]) * len(spans)
            )
            with torch.no_grad():
                return self._embed(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]
        state = {
            name: torch.cat([array[start : start + n] for start, n in spans]).to(device)
            for name, array in self._arrays.items()
        }
        if write is None:
            return state["residual"]
        added = write(state["into_write"])
        if self._after is None:
            return (state["residual"] + added).to(self._chat.dtype)
        # a norm behind the MLP is not linear: the change of the block's output is a difference
        written = (state["written"] + added).to(self._chat.dtype)
        return state["residual"] + (self._after(written) - self._after(state["written"]))  # type: ignore[no-any-return]

    @torch.no_grad()
    def deviation(self) -> float:
        """Largest relative difference from the model's own forward on the first rows, a write included.

        Rounding leaves 1e-6 in float32. More means that the architecture does something between its blocks that
        a cut cannot see.
        """
        chat, rows = self._chat, list(range(min(2, len(self._ids))))
        own = [len(self._ids[i]) - self.stem for i in rows]
        read = pad([labels[self.stem :] for labels in self._labels[:2]], IGNORED).to(chat.device) != IGNORED
        shift = self._shift if self.frozen is not None and self.frozen.at_write else None
        past = self.read_stem(1, shift)
        found = self.hidden(rows, own, read, past, torch.zeros(len(rows), dtype=torch.long), shift)
        handle = None
        if self.frozen is not None and shift is not None:
            handle = chat.down_proj(self.frozen.layer).register_forward_hook(
                lambda module, inputs, output: (output + self._shift(inputs[0])).to(output.dtype)
            )
        try:
            ids = pad([self._ids[i] for i in rows], 0).to(chat.device)
            mask = pad([[1] * len(self._ids[i]) for i in rows], 0).to(chat.device)
            plain = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            if handle is not None:
                handle.remove()
        wanted = plain[:, self.stem :][read].float()
        return float((found.float() - wanted).abs().max() / wanted.abs().max())

    def _shift(self, x: torch.Tensor) -> torch.Tensor:
        """A write of the size of ``down_proj``'s own, as an adapter might make it."""
        ramp = torch.linspace(-1, 1, self._chat.d_model, device=x.device)
        return x.float().mean(-1, keepdim=True) * ramp

    def _allocate(self) -> None:
        assert self.frozen is not None
        dtype, tokens = self._chat.dtype, int(self._starts[-1])
        widths = {"residual": self._chat.d_model}
        if self.frozen.at_write:
            widths["into_write"] = self._chat.d_mlp
            if self._after is not None:
                widths["written"] = self._chat.d_model
        self._folder.mkdir(parents=True, exist_ok=True)
        wanted = sum(widths.values()) * tokens * torch.finfo(dtype).bits // 8
        if shutil.disk_usage(self._folder).free < 1.1 * wanted:
            raise EmmechError(
                "cache the frozen prefix",
                f"{tokens} tokens, {wanted / 1e9:.1f} GB",
                f"the disk of {self._folder} has too little room",
                "prefix=False, or out= on another disk",
            )
        for name, width in widths.items():
            flat = torch.from_file(str(self._folder / name), shared=True, size=tokens * width, dtype=dtype)
            self._arrays[name] = flat.view(tokens, width)

    @torch.no_grad()
    def _fill(self) -> None:
        chat, frozen = self._chat, self.frozen
        assert frozen is not None
        lower = partial_trunk(chat, 0, frozen.blocks, norm=False)
        caught: dict[str, torch.Tensor] = {}

        def catch(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            caught["into_write"], caught["written"] = inputs[0], output

        def keep(ids: torch.Tensor, places: Sequence[tuple[int, int]], past: Any) -> None:
            run = lower(input_ids=ids.to(chat.device), past_key_values=past, use_cache=past is not None)
            caught["residual"] = run.last_hidden_state
            for name, array in self._arrays.items():
                for at, (start, n) in enumerate(places):
                    array[start : start + n] = caught[name][at, :n].cpu()

        handle = chat.down_proj(frozen.layer).register_forward_hook(catch) if frozen.at_write else None
        own = [list(ids[self.stem :]) for ids in self._ids]
        lengths = np.array([len(ids) for ids in own])
        past = _new_past(chat) if self.stem else None
        try:
            if self.stem:
                keep(torch.tensor([self._ids[0][: self.stem]]), [(0, self.stem)], past)
            for chosen in batches_by_length(lengths, _TOKENS):
                places = [(int(self._starts[i + 1]), int(lengths[i])) for i in chosen]
                behind = _selected(past, torch.zeros(len(chosen), dtype=torch.long)) if self.stem else None
                keep(pad([own[i] for i in chosen], 0), places, behind)
        finally:
            if handle is not None:
                handle.remove()


def _stem(encoded: Encoded) -> int:
    """How many tokens all rows share at their start, short of the token that predicts the first answer token."""
    first = encoded.input_ids[0]
    shared = min(next(p for p, label in enumerate(labels) if label != IGNORED) for labels in encoded.labels) - 1
    for ids in encoded.input_ids:
        same = zip(first[:shared], ids, strict=False)
        shared = next((place for place, (one, other) in enumerate(same) if one != other), min(shared, len(ids)))
    return shared if shared >= _STEM_FROM and len(encoded) > 1 else 0


def _new_past(chat: ChatModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=chat.config)


def _selected(past: Any, sequences: torch.Tensor | None) -> Any:
    """Keys and values of some sequences; the original keeps its own."""
    twin = copy.copy(past)
    twin.layers = [copy.copy(layer) for layer in past.layers]
    twin.batch_select_indices(sequences)
    return twin


def _after_write(chat: ChatModel, layer: int) -> nn.Module | None:
    """The norm that Gemma puts between the MLP and the residual; None where the write is added as it is."""
    return getattr(chat.block(layer), "post_feedforward_layernorm", None)


def _padded(flat: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Rows one after another ``[tokens, width]`` to ``[rows, longest, width]``."""
    longest = max(lengths)
    if min(lengths) == longest:
        return flat.view(len(lengths), longest, -1)
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(flat.device)
    empty = flat.new_zeros(len(lengths) * longest, flat.shape[-1])
    return empty.index_copy(0, places, flat).view(len(lengths), longest, -1)


def batches_by_length(lengths: Sequence[int] | np.ndarray, tokens: int) -> Iterator[list[int]]:
    """Batches of at most ``tokens`` padded tokens (one row at least), of which little is padding.

    Example:
        >>> list(batches_by_length([9, 30, 10, 31], 100))
        [[0, 2], [1, 3]]
    """
    batch: list[int] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        if batch:
            padded = (len(batch) + 1) * int(lengths[row])
            own = sum(int(lengths[i]) for i in batch) + int(lengths[row])
            if padded > tokens or padded > _PADDING * own:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def detached(past: Any) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values cut off from what made them, and pairs of such a cut: where gradients gather, where they go."""
    if past is None:
        return None, []
    twin, pairs = copy.copy(past), []
    twin.layers = [copy.copy(layer) for layer in past.layers]
    for layer in twin.layers:
        for name in ("keys", "values"):
            whole = getattr(layer, name)
            setattr(layer, name, leaf := whole.detach().requires_grad_(whole.requires_grad))
            if whole.requires_grad:
                pairs.append((leaf, whole))
    return twin, pairs
