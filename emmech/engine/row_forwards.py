"""Rows of several runs in shared forwards, each under its own run's adapters; what no adapter touches computed once.

The states at the cut (:mod:`emmech.engine.prefix_plan`) never change in training, so they are computed once per row and
not once per epoch. Training then runs the rank-1 write, the blocks above and the unembedding at answer positions only.
Losses are those of plain training to rounding. The states are memory-mapped, in the model's own dtype (which loses
nothing), and disposable.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.blocks import Blocks, Places
from emmech.engine.cache import detached, plain_past
from emmech.engine.logprobs import pad, target_logprobs
from emmech.engine.modules import adding, hooked
from emmech.engine.prefix_plan import DOES_NOT_RUN, TOLERANCE, Frozen, Lower, State, deviation
from emmech.engine.stacked_adapters import StackedAdapters
from emmech.errors import EmmechError

__all__ = ["Asked", "Forwards", "Trunk", "WholeTrunk", "batches_by_length"]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # a larger batch leaves a core's cache and gains nothing there
_TOKENS = 2048  # per forward while the states are filled
_STEM_FROM = 4  # a shorter common start is not worth keys and values of its own
_PADDING = 1.15  # padded tokens per real one, at most, in a batch of rows
_Write = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """A row, or its first tokens, under the adapters of one run."""

    run: int
    row: int
    tokens: int


class Forwards:
    """Negative log-probabilities of the rows' answers.

    Args:
        chat: with the PEFT adapters on it, which ``adapters`` stand in for.
        rows: all that will be asked for.
        frozen: the part of the model whose states are kept, or None.
        folder: scratch for them; :meth:`close` deletes it.
    """

    def __init__(
        self, chat: ChatModel, rows: Encoded, adapters: StackedAdapters, frozen: Frozen | None, folder: Path
    ) -> None:
        self.rows, self._adapters, self._device = rows, adapters, chat.device
        # of each row: answer tokens that its first tokens predict
        self._answers = [np.cumsum(np.asarray(own) != IGNORED) - (own[0] != IGNORED) for own in rows.labels]
        self.trunk = _fitting(chat, rows, frozen, folder)
        self._chat = chat
        self._at_once = _BATCH_TOKENS.get(chat.device.type, _BATCH_TOKENS["cuda"])

    def close(self) -> None:
        """Let go of the kept states."""
        self.trunk.close()

    def answer_tokens(self, asked: Sequence[Asked]) -> torch.Tensor:
        """How many tokens of each carry loss, float64."""
        return torch.tensor([float(self._answers[one.row][one.tokens - 1]) for one in asked], dtype=torch.float64)

    def nll(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Negative log-probabilities of answer tokens, batch by batch, and which of ``asked`` each belongs to.

        With gradients on, call ``backward`` on what each batch gives before the next, and go on to the end: what the
        rows have in common runs once, and passes its gradients on last.
        """
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
                hidden = self.trunk.hidden(
                    [one.row for one in members], own, read, past, sequences, self._writer(runs, own)
                )
            places = torch.tensor(batch, device=device).repeat_interleave(read.sum(1))
            yield -target_logprobs(self._chat, hidden, targets[read][:, None])[:, 0], places
        if cuts:
            torch.autograd.backward([made for _, made in cuts], [leaf.grad for leaf, _ in cuts])

    def _writer(self, runs: torch.Tensor, own: Sequence[int]) -> _Write | None:
        info = self._adapters.write_of
        if info is None:
            return None
        of_token = runs.repeat_interleave(torch.tensor(own, device=runs.device))
        return lambda x: self._adapters.write(info, x, of_token)


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
        self.stem = _stem(encoded) if plain_past(chat) else 0
        # the stem comes first, then every row's own tokens
        lengths = [self.stem, *(len(ids) - self.stem for ids in encoded.input_ids)]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._lower = Lower(chat, frozen or Frozen(0, False))
        self._upper = Blocks(chat, frozen.blocks if frozen else 0)
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
        write: _Write | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm at the places that are read, row by row, ``[places, d_model]``.

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
        """What enters the upper blocks, ``[tokens, d_model]``, or token ids where nothing is kept.

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
        found = self.hidden(rows, own, shown, past, torch.zeros(len(rows), dtype=torch.long, device=chat.device), write)
        ids = pad([self._ids[i] for i in rows], 0).to(chat.device)
        mask = pad([[1] * len(self._ids[i]) for i in rows], 0).to(chat.device)
        reads = torch.cat([shown.new_zeros(len(rows), self.stem), shown], dim=1)
        hooks = [(chat.down_proj(self.frozen.layer), adding(write))] if self.frozen and write else []
        return deviation(chat, found, ids, reads, hooks, mask)

    def _shift(self, x: torch.Tensor) -> torch.Tensor:
        """A write of the size of ``down_proj``'s own, as an adapter might make it."""
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
    """The model's own forward with a :class:`Trunk`'s interface, where running it in parts gives something else.

    Args:
        write_at: the layer whose MLP's write has the adapter that a caller adds itself, or None.
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
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        read: torch.Tensor,
        past: Any = None,
        of_past: torch.Tensor | None = None,
        write: _Write | None = None,
    ) -> torch.Tensor:
        """As :meth:`Trunk.hidden`."""
        chat = self._chat
        ids = pad([self._ids[i][:n] for i, n in zip(rows, lengths, strict=True)], 0).to(chat.device)
        mask = pad([[1] * n for n in lengths], 0).to(chat.device)

        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            assert write is not None
            # some families run their MLP over all tokens in one row
            flat = inputs[0].reshape(-1, inputs[0].shape[-1])
            added = write(flat[mask.flatten().bool()])
            return (output + _padded(added, lengths).reshape(output.shape)).to(output.dtype)

        sites = [] if write is None or self._write_at is None else [(chat.down_proj(self._write_at), add)]
        with hooked(*sites):
            whole = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return whole[read]  # type: ignore[no-any-return]


def _fitting(chat: ChatModel, rows: Encoded, frozen: Frozen | None, folder: Path) -> Trunk | WholeTrunk:
    """The trunk cut as asked if it then gives what the model's own forward does, else the model's own forward."""
    trunk: Trunk | None = None
    try:
        trunk = Trunk(chat, rows, frozen, folder)
        if trunk.written or trunk.deviation() <= TOLERANCE.get(chat.dtype, 1e-4):
            return trunk
    except DOES_NOT_RUN:
        pass  # the parts do not even run
    if trunk is not None:
        trunk.close()
    return WholeTrunk(chat, rows, frozen.layer if frozen is not None and frozen.at_write else None)


def _stem(encoded: Encoded) -> int:
    """How many tokens all rows share at their start, short of the token that predicts the first answer token."""
    first = encoded.input_ids[0]
    shared = min(next(p for p, label in enumerate(labels) if label != IGNORED) for labels in encoded.labels) - 1
    for ids in encoded.input_ids:
        same = zip(first[:shared], ids, strict=False)
        shared = next((place for place, (one, other) in enumerate(same) if one != other), min(shared, len(ids)))
    return shared if shared >= _STEM_FROM and len(encoded) > 1 else 0


def _padded(flat: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Rows one after another ``[tokens, ...]`` to ``[rows, longest, ...]``."""
    longest = max(lengths)
    if min(lengths) == longest:
        return flat.view(len(lengths), longest, *flat.shape[1:])
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(flat.device)
    empty = flat.new_zeros(len(lengths) * longest, *flat.shape[1:])
    return empty.index_copy(0, places, flat).view(len(lengths), longest, *flat.shape[1:])


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
