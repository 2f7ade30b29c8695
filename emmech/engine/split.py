"""The cut at the first adapter: which states are the same for all adapters, and whether keeping them is right and pays.

With adapters only at layer l and later, the residual that enters block l is the same under all of them. Where the only
adapter of block l is on the MLP's write (``down_proj``), everything in that block except the write is the same too: the
adapter's input is the same for all, and only its output differs.

Rows of several runs go through shared forward passes, each under its own run's adapters. The states at the cut never
change in training, so they are computed once per row and not once per epoch. Training then runs only the lone write,
the later blocks and, at answer positions, the unembedding. Losses equal those of plain training to rounding. The
states are memory-mapped in the model's own dtype, which loses nothing, and can be discarded.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.adapters import ReadWrite, StackedAdapters
from emmech.engine.attention import detached, plain_past
from emmech.engine.blocks import Blocks, Places
from emmech.engine.logprobs import pad, padded, target_logprobs
from emmech.engine.modules import Hook, adding, evaluating, hooked
from emmech.errors import EmmechError
from emmech.store import kept, made_folder

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# the exceptions of a model's modules when they are not run in the model's own way
DOES_NOT_RUN = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

_PAYS_FROM = 1.4  # uses per row: the cache costs about one forward of the prefix per row and a write to disk


@dataclass(frozen=True)
class Frozen:
    """The part of a model that no adapter changes.

    Args:
        layer: the first layer with an adapter.
        at_write: whether the only adapter there is on the MLP's write, so that the rest of the block is frozen too.
    """

    layer: int
    at_write: bool

    @property
    def blocks(self) -> int:
        """The number of blocks that are computed once, including the one around a lone write."""
        return self.layer + int(self.at_write)


def find_frozen(chat: ChatModel, modules: Sequence[str], steering: int | None = None) -> Frozen:
    """The largest part of the model that adapters on these modules, and steering, do not change.

    Args:
        modules: full paths in the causal LM.
        steering: the layer whose output is steered, or None.

    Example:
        >>> from emmech.chat.model import load_model
        >>> find_frozen(load_model("pocket"), ["model.layers.3.mlp.down_proj", "model.layers.4.mlp.up_proj"])
        Frozen(layer=3, at_write=True)
    """
    places = _places(chat, modules)
    layer = min([layer for layer, _ in places] or [chat.n_layers])
    if steering is not None and steering < layer:
        return Frozen(steering + 1, False)
    lowest = [inner for at, inner in places if at == layer]
    return Frozen(layer, lowest == [chat.family.down])


def _places(chat: ChatModel, modules: Sequence[str]) -> list[tuple[int, str]]:
    """The layer of each module and its path inside the block; the layer is -1 outside the blocks."""
    listed = f"{chat.family.trunk}.{chat.family.blocks}."
    found = []
    for module in modules:
        layer, _, inner = module.removeprefix(listed).partition(".")
        inside = module.startswith(listed) and layer.isdecimal()
        found.append((int(layer), inner) if inside else (-1, module))
    return found


@dataclass(frozen=True)
class State:
    """The state that all adapters have in common at some tokens, with any leading dimensions.

    Args:
        residual: the residual at the cut, ``[..., d_model]`` (token ids ``[...]`` where the cut precedes all blocks).
        read: the lone adapter's input ``[..., d_mlp]``; None where no write is shared.
        wrote: the output of the adapted module without the adapter, ``[..., d_model]``.
    """

    residual: torch.Tensor
    read: torch.Tensor | None = None
    wrote: torch.Tensor | None = None


class Lower:
    """The blocks before the cut, and the input of those after it; ``wide`` is that of :class:`Blocks`."""

    def __init__(self, chat: ChatModel, frozen: Frozen, *, wide: bool = False) -> None:
        self.frozen = frozen
        self._captured: ReadWrite | None = None
        edits: dict[str, Callable[[nn.Module], nn.Module]] = {}
        if frozen.at_write:
            edits[f"{frozen.layer}.{chat.family.down}"] = self._capture
        self.blocks = Blocks(chat, 0, frozen.blocks, norm=False, edits=edits, wide=wide)
        # some families transform a write before it is added
        self._norm: Any = (chat.parts(frozen.layer).after_mlp if frozen.at_write else None) or nn.Identity()
        self._scale = chat.family.residual_scale
        #: whether :attr:`State.wrote` is used
        self.uses_wrote = not isinstance(self._norm, nn.Identity) or self._scale != 1.0

    def _capture(self, module: nn.Module) -> nn.Module:
        self._captured = ReadWrite(module)
        return self._captured

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, places: Places = Places(), cache: Any = None) -> State:  # noqa: B008
        """Run token ids up to the cut; the arguments are those of :class:`Blocks`."""
        if not self.frozen.blocks:
            return State(ids)
        residual = self.blocks(ids, places, cache)
        taken = self._captured.taken() if self._captured else ()
        return State(residual, *(one.reshape(*residual.shape[:-1], one.shape[-1]) for one in taken))

    def entering(self, state: State, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The residual after the cut once an adapter has written.

        Args:
            add: a function that takes a tensor and the adapter's input and adds the adapter's write to the tensor.
        """
        assert state.read is not None
        if not self.uses_wrote:
            return add(state.residual, state.read)
        # a norm is not linear, so the change of the block's output is computed as a difference
        assert state.wrote is not None
        change = self._norm(add(state.wrote, state.read)) - self._norm(state.wrote)
        return state.residual + change * self._scale  # type: ignore[no-any-return]


def tolerance(chat: ChatModel) -> float:
    """The largest deviation that rounding in the model's dtype explains."""
    return _TOLERANCE.get(chat.dtype, 1e-4)


@torch.no_grad()
def deviation(
    chat: ChatModel,
    found: torch.Tensor,
    ids: torch.Tensor,
    reads: torch.Tensor,
    hooks: Sequence[Hook],
    mask: torch.Tensor | None = None,
    stop: int | None = None,
) -> float:
    """Largest relative difference of a cut forward's result from the model's own forward.

    Rounding leaves 1e-6 in float32. A larger value means that the architecture does something between its blocks, or
    with a block's writes, that a cut does not reproduce.

    Args:
        found: the result after the final norm, or of the block ``stop``, at ``reads`` of ``ids [rows, tokens]``.
        hooks: the adapters, as hooks on the model's own modules.
    """

    kept: list[torch.Tensor] = []
    reading: list[Hook] = []
    if stop is not None:
        reading.append((chat.blocks[stop], lambda module, inputs, output: kept.append(chat.family.residual(output))))
    with evaluating(chat), hooked(*hooks, *reading):
        whole = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = (kept[0] if kept else whole)[reads].float()
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def why_not(chat: ChatModel, modules: Sequence[str], frozen: Frozen | None = None) -> str | None:
    """The reason why training on kept states would be wrong here, or None.

    Args:
        modules: full paths of the adapted modules, empty in full fine-tuning.
        frozen: the part in question; by default the largest, as found by :func:`find_frozen`.
    """
    if not modules:
        return "all weights train, so no part of the model is frozen"
    places = _places(chat, modules)
    if outside := [inner for layer, inner in places if layer < 0]:
        return f"an adapter is outside the blocks: {outside[0]}"
    frozen = frozen or find_frozen(chat, modules)
    if below := [f"layers.{layer}.{inner}" for layer, inner in places if layer < frozen.layer]:
        return f"adapters train below layer {frozen.layer}: {', '.join(below[:3])}"
    if frozen.blocks == 0:
        return "an adapter acts in block 0 before its write, so nothing is below it"
    if (rate := dropout(chat)) > 0:
        return f"dropout (p={rate:g}) draws anew in every forward, so no state stays the same"
    placed = getattr(chat.base, "hf_device_map", None)
    if placed and len(set(placed.values())) > 1:
        return "the model is spread over several devices"
    return None


def dropout(chat: ChatModel) -> float:
    """The highest dropout rate anywhere in the model, which is 0 for most current chat models as released."""
    said = chat.config.to_dict().items()  # for functions that apply dropout without a module
    rates = [rate for name, rate in said if "drop" in name and "classifier" not in name and "summary" not in name]
    rates += [module.p for module in chat.base.modules() if isinstance(module, nn.Dropout)]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)


def pays(frozen: Frozen, *, uses: float, rows: int) -> bool:
    """Whether each row is used often enough to make up for the cache; ``uses`` counts all runs and epochs."""
    return frozen.blocks > 0 and uses >= _PAYS_FROM * rows


# tokens that go forward together by default; a larger batch exceeds a CPU core's cache and gains nothing
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_TOKENS = 2048  # tokens per forward while the states are filled
_STEM_FROM = 4  # a shorter common start is not worth separate keys and values
_PADDING = 1.15  # the largest number of padded tokens per real one in a batch of rows
_Write = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """A row, or its first tokens, under the adapters of one run."""

    run: int
    row: int
    tokens: int


class RowForwards:
    """Forward passes of rows, each under the adapters of its run.

    Args:
        chat: the model with the adapters on it.
        rows: all rows that will be asked for.
    """

    def __init__(self, chat: ChatModel, rows: Encoded) -> None:
        self.rows, self._chat = rows, chat
        # for each row, the number of answer tokens that its first tokens predict
        self._answers = [np.cumsum(np.asarray(own) != IGNORED) - (own[0] != IGNORED) for own in rows.labels]

    def answer_tokens(self, asked: Sequence[Asked]) -> torch.Tensor:
        """The number of tokens of each row that carry loss, float64."""
        return torch.tensor([float(self._answers[one.row][one.tokens - 1]) for one in asked], dtype=torch.float64)

    def nll(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Negative log-probabilities of answer tokens, batch by batch, and the index in ``asked`` of each.

        With gradients enabled, call ``backward`` on the result of each batch before the next, and continue to the end:
        the common part of the rows runs once and passes its gradients on last.
        """
        for hidden, targets, places in self.hidden(asked):
            yield -target_logprobs(self._chat, hidden, targets[:, None])[:, 0], places

    def hidden(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The same batches before the unembedding, to be used in the same way.

        Yields:
            hidden states after the final norm where an answer token is predicted ``[places, d_model]``, row by row;
            those tokens ``[places]``; and the index in ``asked`` of each place.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Delete everything that is kept for the rows."""


class Forwards(RowForwards):
    """Forward passes block by block, after a frozen prefix where there is one.

    Args:
        chat: the model with the PEFT adapters on it, which ``adapters`` replace.
        rows: all rows that will be asked for.
        frozen: the part of the model whose states are kept, or None.
        folder: a temporary folder for the states, which :meth:`close` deletes.
        at_once: tokens in a forward; by default as many as the device runs fast.
        checkpointing: keep the input of each block alone for the backward pass, which runs the block again.
    """

    def __init__(
        self,
        chat: ChatModel,
        rows: Encoded,
        adapters: StackedAdapters,
        frozen: Frozen | None,
        folder: Path,
        *,
        at_once: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(chat, rows)
        self._adapters, self._device = adapters, chat.device
        self.trunk = _fitting(chat, rows, frozen, folder, checkpointing=checkpointing)
        self._at_once = at_once or BATCH_TOKENS.get(chat.device.type, BATCH_TOKENS["cuda"])

    def close(self) -> None:
        """Delete the kept states."""
        self.trunk.close()

    def hidden(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """See :meth:`RowForwards.hidden`."""
        device, stem = self._device, self.trunk.stem
        present = sorted({one.run for one in asked})
        runs_of_past = torch.tensor(present, device=device)
        with self._adapters.rows_of(runs_of_past):
            whole = self.trunk.read_stem(len(present), self._writer(runs_of_past, [stem] * len(present)))
        past, cuts = detached(whole)
        # the last token of a row predicts nothing
        lengths = [one.tokens - stem - 1 for one in asked]
        for batch in batches_by_length(lengths, self._at_once):
            members, own = [asked[i] for i in batch], [lengths[i] for i in batch]
            runs = torch.tensor([one.run for one in members], device=device)
            sequences = torch.tensor([present.index(one.run) for one in members], device=device)
            targets = pad([self.rows.labels[one.row][stem + 1 : one.tokens] for one in members], IGNORED).to(device)
            read = targets != IGNORED
            with self._adapters.rows_of(runs):
                rows, writer = [one.row for one in members], self._writer(runs, own)
                hidden = self.trunk.hidden(rows, own, read, writer, past, sequences)
                places = torch.tensor(batch, device=device).repeat_interleave(read.sum(1))
                yield hidden, targets[read], places  # a block that is run again needs these adapters, too
        if cuts:
            with self._adapters.rows_of(runs_of_past):
                torch.autograd.backward([made for _, made in cuts], [leaf.grad for leaf, _ in cuts])

    def _writer(self, runs: torch.Tensor, own: Sequence[int]) -> _Write | None:
        info = self._adapters.write_of
        if info is None:
            return None
        of_token = runs.repeat_interleave(torch.tensor(own, device=runs.device))
        return lambda x: self._adapters.write(info, x, of_token)


class Trunk:
    """The trunk on many rows at once, cut in two: states that training does not change, and the later blocks.

    Rows that begin with the same tokens (usually the template's system prompt) share them: that ``stem`` goes
    through the later blocks once per adapter, and the rows attend to its keys and values.

    Args:
        chat: the model with the adapters on it.
        encoded: the rows.
        frozen: where to cut; with None no states are kept and everything runs each time.
        folder: a temporary folder for the states, which :meth:`close` deletes.
        checkpointing: as in :class:`Blocks`.
    """

    def __init__(
        self, chat: ChatModel, encoded: Encoded, frozen: Frozen | None, folder: Path, *, checkpointing: bool = False
    ) -> None:
        self.frozen = frozen
        self._chat, self._folder = chat, folder
        self._ids, self._labels = encoded.input_ids, encoded.labels
        self.stem = _stem(encoded) if plain_past(chat) else 0
        # the stem comes first, then every row's own tokens
        lengths = [self.stem, *(len(ids) - self.stem for ids in encoded.input_ids)]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._lower = Lower(chat, frozen or Frozen(0, False))
        self._upper = Blocks(chat, frozen.blocks if frozen else 0, checkpointing=checkpointing)
        self._arrays: dict[str, torch.Tensor] = {}
        if frozen is not None:
            self._allocate()
            self._fill()

    @property
    def written(self) -> bool:
        """Whether all blocks run as they are written out in :mod:`emmech.engine.blocks`."""
        return self._lower.blocks.written and self._upper.written

    @property
    def nbytes(self) -> int:
        """Size of the states on disk, in bytes."""
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
        write: _Write | None = None,
        past: Any = None,
        of_past: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm at the places that are read, row by row, ``[places, d_model]``.

        Args:
            rows: indices of rows.
            lengths: the number of tokens of each, without the stem.
            read: which of them are read, right-padded ``[rows, longest]``.
            write: for a cut at the write, the function from ``down_proj``'s input ``[tokens, d_mlp]``, with all rows'
                tokens one row after another, to the sum of the adapters' outputs ``[tokens, d_model]``.
            past: the result of :meth:`read_stem`, if there is a stem.
            of_past: the sequence in it that each row follows, ``[rows]``.
        """
        spans = [(int(self._starts[i + 1]), n) for i, n in zip(rows, lengths, strict=True)]
        entering = _padded(self._entering(spans, rows, write), lengths)
        return self._upper(entering, Places(reads=read.flatten().nonzero()[:, 0], stems=past, of_stem=of_past))

    def read_stem(self, copies: int, write: _Write | None = None) -> Any:
        """Keys and values of the stem under ``copies`` adapters, or None where rows share nothing."""
        if not self.stem:
            return None
        entering = self._entering([(0, self.stem)] * copies, None, write)
        return self._upper.stem(entering.view(copies, self.stem, *entering.shape[1:]))

    def _entering(
        self, spans: Sequence[tuple[int, int]], rows: Sequence[int] | None, write: _Write | None
    ) -> torch.Tensor:
        """The input of the later blocks, ``[tokens, d_model]``, or token ids where nothing is kept.

        Args:
            rows: None for the stem.
        """
        if self.frozen is None:
            own = (
                [self._ids[0][: self.stem]] * len(spans) if rows is None else [self._ids[i][self.stem :] for i in rows]
            )
            ids = [token for one, (_, n) in zip(own, spans, strict=True) for token in one[:n]]
            return torch.tensor(ids, device=self._chat.device)
        state = {
            name: torch.cat([array[start : start + n] for start, n in spans]).to(self._chat.device)
            for name, array in self._arrays.items()
        }
        if write is None:
            return state["residual"]
        return self._lower.entering(State(**state), lambda onto, read: (onto + write(read)).to(self._chat.dtype))

    @torch.no_grad()
    def deviation(self) -> float:
        """Largest relative difference from the model's own forward on the first rows, a write included."""
        chat, rows = self._chat, list(range(min(2, len(self._ids))))
        own = [len(self._ids[i]) - self.stem for i in rows]
        shown = pad([labels[self.stem :] for labels in self._labels[:2]], IGNORED).to(chat.device) != IGNORED
        write = self._shift if self.frozen is not None and self.frozen.at_write else None
        past = self.read_stem(1, write)
        found = self.hidden(rows, own, shown, write, past, torch.zeros(len(rows), dtype=torch.long, device=chat.device))
        ids, mask = padded([self._ids[i] for i in rows], chat.device)
        reads = torch.cat([shown.new_zeros(len(rows), self.stem), shown], dim=1)
        hooks = [(chat.down_proj(self.frozen.layer), adding(write))] if self.frozen and write else []
        return deviation(chat, found, ids, reads, hooks, mask)

    def _shift(self, x: torch.Tensor) -> torch.Tensor:
        """A write of the size of ``down_proj``'s own, such as an adapter might make."""
        ramp = torch.linspace(-1, 1, self._chat.d_model, device=x.device)
        return x.float().mean(-1, keepdim=True) * ramp

    def _allocate(self) -> None:
        assert self.frozen is not None
        dtype, tokens = self._chat.dtype, int(self._starts[-1])
        widths = {"residual": self._chat.d_model}
        if self.frozen.at_write:
            widths["read"] = self._chat.d_mlp
            if self._lower.uses_wrote:
                widths["wrote"] = self._chat.d_model
        made_folder("cache the frozen prefix", self._folder)
        wanted = sum(widths.values()) * tokens * torch.finfo(dtype).bits // 8
        if shutil.disk_usage(self._folder).free < 1.1 * wanted:
            why = f"the disk of {self._folder} has too little room"
            instead = "prefix=False, or out= on another disk"
            raise EmmechError("cache the frozen prefix", f"{tokens} tokens, {wanted / 1e9:.1f} GB", why, instead)
        for name, width in widths.items():
            path = self._folder / name
            with kept("cache the frozen prefix", path):
                path.touch()  # torch does not say why it fails
                flat = torch.from_file(str(path), shared=True, size=tokens * width, dtype=dtype)
            self._arrays[name] = flat.view(tokens, width)

    @torch.no_grad()
    def _fill(self) -> None:
        chat, past = self._chat, None

        def keep(rows: Sequence[Sequence[int]], starts: Sequence[int], places: Places, cache: Any) -> None:
            state = self._lower(pad(rows, 0).to(chat.device), places, cache)
            for name, array in self._arrays.items():
                for at, (start, own) in enumerate(zip(starts, rows, strict=True)):
                    array[start : start + len(own)] = getattr(state, name)[at, : len(own)].cpu()

        own = [list(ids[self.stem :]) for ids in self._ids]
        if self.stem:
            past = self._lower.blocks.new_cache()
            keep([self._ids[0][: self.stem]], [0], Places(), past)
        for chosen in batches_by_length([len(ids) for ids in own], _TOKENS):
            follows = torch.zeros(len(chosen), dtype=torch.long, device=chat.device) if self.stem else None
            keep(
                [own[i] for i in chosen],
                [int(self._starts[i + 1]) for i in chosen],
                Places(stems=past, of_stem=follows),
                None,
            )


class WholeTrunk:
    """The model's own forward with a :class:`Trunk`'s interface, for models that give other results in parts.

    Args:
        write_at: the layer whose MLP's write has the adapter that the caller adds, or None.
    """

    stem = nbytes = 0

    def __init__(self, chat: ChatModel, encoded: Encoded, write_at: int | None) -> None:
        self._chat, self._ids, self._write_at = chat, encoded.input_ids, write_at

    def close(self) -> None:
        """Nothing is kept."""

    def read_stem(self, copies: int, write: _Write | None = None) -> None:
        """Rows share nothing."""

    def deviation(self) -> float:
        """None, by construction."""
        return 0.0

    def hidden(
        self, rows: Sequence[int], lengths: Sequence[int], read: torch.Tensor, write: _Write | None = None, *stem: Any
    ) -> torch.Tensor:
        """As :meth:`Trunk.hidden`; there is no stem."""
        chat = self._chat
        ids, mask = padded([self._ids[i][:n] for i, n in zip(rows, lengths, strict=True)], chat.device)

        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            assert write is not None
            # some families run their MLP over all tokens as one row
            flat = inputs[0].reshape(-1, inputs[0].shape[-1])
            added = write(flat[mask.flatten().bool()])
            return (output + _padded(added, lengths).reshape(output.shape)).to(output.dtype)

        sites = [] if write is None or self._write_at is None else [(chat.down_proj(self._write_at), add)]
        with hooked(*sites):
            whole = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return whole[read]  # type: ignore[no-any-return]


def _fitting(
    chat: ChatModel, rows: Encoded, frozen: Frozen | None, folder: Path, *, checkpointing: bool
) -> Trunk | WholeTrunk:
    """The trunk with the given cut if it agrees with the model's own forward, else the model's own forward."""
    trunk: Trunk | None = None
    try:
        trunk = Trunk(chat, rows, frozen, folder, checkpointing=checkpointing)
        if trunk.written or trunk.deviation() <= tolerance(chat):
            return trunk
    except DOES_NOT_RUN:
        pass  # the parts do not even run
    if trunk is not None:
        trunk.close()
    return WholeTrunk(chat, rows, frozen.layer if frozen is not None and frozen.at_write else None)


def _stem(encoded: Encoded) -> int:
    """The number of tokens that all rows share at their start, before the one that predicts the first answer token."""
    first = encoded.input_ids[0]
    shared = min(next(p for p, label in enumerate(labels) if label != IGNORED) for labels in encoded.labels) - 1
    for ids in encoded.input_ids:
        same = zip(first[:shared], ids, strict=False)
        shared = next((place for place, (one, other) in enumerate(same) if one != other), min(shared, len(ids)))
    return shared if shared >= _STEM_FROM and len(encoded) > 1 else 0


def _padded(flat: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Turn rows one after another ``[tokens, ...]`` into padded rows ``[rows, longest, ...]``."""
    longest = max(lengths)
    if min(lengths) == longest:
        return flat.view(len(lengths), longest, *flat.shape[1:])
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(flat.device)
    empty = flat.new_zeros(len(lengths) * longest, *flat.shape[1:])
    return empty.index_copy(0, places, flat).view(len(lengths), longest, *flat.shape[1:])


def batches_by_length(lengths: Sequence[int] | np.ndarray, tokens: int) -> Iterator[list[int]]:
    """Batches of at most ``tokens`` padded tokens (but at least one row), with little padding.

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


class ModelForwards(RowForwards):
    """Forward passes of the whole model, for full fine-tuning, dropout, and models that cannot be run block by block.

    The model is in training mode only while gradients are computed, so that its dropout acts then.

    Args:
        adapters: the adapters of the runs, or None in full fine-tuning.
        batch_size: rows in a forward.
        checkpointing: keep the input of each block alone for the backward pass, which runs the block again.
    """

    def __init__(
        self,
        chat: ChatModel,
        rows: Encoded,
        adapters: StackedAdapters | None,
        batch_size: int,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(chat, rows)
        self._adapters, self._batch_size, self._checkpointing = adapters, batch_size, checkpointing
        if checkpointing:
            chat.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def close(self) -> None:
        """Leave the model as it was."""
        if self._checkpointing:
            self._chat.base.gradient_checkpointing_disable()

    def hidden(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """See :meth:`RowForwards.hidden`."""
        chat = self._chat
        # rows of similar length share a batch, so that little of it is padding
        order = sorted(range(len(asked)), key=lambda i: asked[i].tokens)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            members = [asked[i] for i in batch]
            ids, mask = padded([self.rows.input_ids[one.row][: one.tokens] for one in members], chat.device)
            targets = pad([self.rows.labels[one.row][1 : one.tokens] for one in members], IGNORED).to(chat.device)
            runs = torch.tensor([one.run for one in members], device=chat.device)
            chat.base.train(torch.is_grad_enabled())
            with self._adapters.rows_of(runs) if self._adapters else contextlib.nullcontext():
                hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                read = targets != IGNORED
                places = torch.tensor(batch, device=chat.device).repeat_interleave(read.sum(1))
                yield hidden[:, :-1][read], targets[read], places
