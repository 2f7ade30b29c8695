"""The teacher-forced part of a sweep: pool all measures' readings, run them packed, read log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.model import ChatModel
from emmech.engine.budget import readable
from emmech.engine.decode import context
from emmech.engine.logprobs import WORDS, target_logprobs, unembed
from emmech.engine.packing import Reading
from emmech.engine.row_adapters import Rows
from emmech.engine.variants import Block, Engine
from emmech.errors import EmmechError
from emmech.measures.measure import TeacherForced, Value
from emmech.sweeps.grid import Grid
from emmech.sweeps.parts import Arrays, Outcome

__all__ = ["Forced", "Plan", "plan"]

# On a CPU a forward of about this many tokens is the quickest: smaller products are slower, larger tensors fall out of
# the cache.
_CPU_TOKENS = 768
_GPU_TOKENS = 1 << 16
_CPU_LOGIT_ROWS = 128


@dataclass(frozen=True)
class Plan:
    """How a memory budget is spent.

    Args:
        tokens: through the upper blocks at once.
        logit_rows: read positions through the unembedding at once.
        expected: bytes that are in use at the most, besides the weights.
    """

    tokens: int
    logit_rows: int
    expected: int
    budget: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens at once, about {readable(self.expected)} of {readable(self.budget)}"


def plan(chat: ChatModel, grid: Grid, engine: Engine, longest: int, variants: int, budget: int) -> Plan:
    """Fit one forward into the budget.

    Args:
        longest: tokens of the longest single row.
        variants: whose adapters are in memory together.

    Raises:
        EmmechError: not even one row of one variant fits.
    """
    eager = getattr(chat.config, "_attn_implementation", None) == "eager"
    scores = 12 * int(chat.config.num_attention_heads) * longest if eager else 0
    per_token = engine.bytes_per_token() + scores
    per_logit_row = 12 * int(chat.config.vocab_size)  # logits in the model's dtype, in float32, and what is picked
    # the shared pass, whose result lives on while the upper blocks run
    kept = variants * grid.bytes_per_variant(chat) + longest * 8 * (engine.widest + 2 * chat.d_model)
    needed = kept + longest * per_token + per_logit_row
    if needed > budget:
        raise EmmechError(
            "keep to the memory budget",
            f"memory={readable(budget)}",
            f"one row of {longest} tokens, {variants} variants' adapters and one row of logits take about "
            f"{readable(needed)}",
            f'memory="{-(-needed // 10**6)}MB" or more',
        )
    free = budget - kept
    cpu = chat.device.type == "cpu"
    logit_rows = max(1, min(free // 4 // per_logit_row, _CPU_LOGIT_ROWS if cpu else _GPU_TOKENS))
    room = free - logit_rows * per_logit_row
    tokens = max(longest, min(_CPU_TOKENS if cpu else _GPU_TOKENS, room // per_token))
    return Plan(
        int(tokens),
        int(logit_rows),
        int(kept + max(tokens * per_token, 0) + logit_rows * per_logit_row),
        budget,
    )


class Forced:
    """All teacher-forced measures of a sweep as one job."""

    kind = "forced"

    def __init__(self, chat: ChatModel, grid: Grid, measures: Sequence[TeacherForced], budget: int, group: int) -> None:
        self.chat, self.measures = chat, tuple(measures)
        self.readings: list[Reading] = []
        self.spans: list[slice] = []
        for measure in self.measures:
            start = len(self.readings)
            self.readings += measure.readings(chat)
            self.spans.append(slice(start, len(self.readings)))
        longest = max(len(reading.needed) for reading in self.readings)
        _check_context(chat, longest)
        self.engine = Engine(chat, grid.sites, grid.steered_layer)
        self.plan = plan(chat, grid, self.engine, longest, group, budget)
        self.engine.tokens = self.plan.tokens
        self.packs = self.engine.packs(self.readings)

    def request(self) -> object:
        """What identifies this job's work."""
        return [(type(m).__name__, m.name) for m in self.measures], self.readings

    def __len__(self) -> int:
        return len(self.readings)

    def run(self, rows: Rows, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Log-probabilities of every reading under a group of variants: ``[variants, targets]`` by reading.

        Raises:
            Overflow: a variant's log-probabilities are not finite.
        """
        count = len(group)
        found: Arrays = {}
        for index, reading in enumerate(self.readings):
            if reading.targets is None:
                shape: tuple[int, ...] = (count, len(reading.at), int(self.chat.config.vocab_size))
            else:
                shape = (count, sum(map(len, reading.targets)))
            found[str(index)] = np.empty(shape, np.float32)
        with torch.no_grad():
            for block in self.engine.run(self.packs, rows, count):
                self._read(block, found)
                update(block.hidden.shape[0] * len(block.readings))
        return found

    def _read(self, block: Block, found: dict[str, np.ndarray]) -> None:
        variants, reads, d_model = block.hidden.shape
        targets, columns = self._targets(block, reads)
        whole = any(self.readings[index].targets is None for index, _ in block.readings)
        wanted = torch.from_numpy(targets).to(block.hidden.device)
        flat = block.hidden.reshape(-1, d_model)
        picked = np.empty((len(flat), targets.shape[1]), np.float32)
        everything = np.empty((len(flat), int(self.chat.config.vocab_size)), np.float32) if whole else None
        step = self.plan.logit_rows
        if everything is None:  # a slice of the vocabulary leaves room for more rows
            step *= min(4, max(1, int(self.chat.config.vocab_size) // WORDS))
        for start in range(0, len(flat), step):
            end = min(len(flat), start + step)
            targeted = wanted[torch.arange(start, end, device=flat.device) % reads]
            if everything is None:
                picked[start:end] = target_logprobs(self.chat, flat[start:end], targeted).cpu().numpy()
                continue
            logprobs = unembed(self.chat, flat[start:end]).float().log_softmax(-1)
            picked[start:end] = logprobs.gather(1, targeted).cpu().numpy()
            everything[start:end] = logprobs[:, : everything.shape[1]].cpu().numpy()
        self._check(picked, block)
        grid = picked.reshape(variants, reads, -1)
        for index, own in block.readings:
            if self.readings[index].targets is None:
                assert everything is not None
                found[str(index)][block.variants] = everything.reshape(variants, reads, -1)[:, own]
            else:
                rows, places = columns[index]
                found[str(index)][block.variants] = grid[:, rows, places]

    def _targets(self, block: Block, reads: int) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Token ids wanted at each read ``[reads, most]``, and where each reading finds its own among them."""
        wanted: list[dict[int, int]] = [{} for _ in range(reads)]
        columns = {}
        for index, own in block.readings:
            rows, places = [], []
            for read, tokens in zip(own.tolist(), self.readings[index].targets or (), strict=False):
                for token in tokens:
                    rows.append(read)
                    places.append(wanted[read].setdefault(token, len(wanted[read])))
            columns[index] = (np.array(rows, dtype=np.int64), np.array(places, dtype=np.int64))
        targets = np.zeros((reads, max(1, max(map(len, wanted)))), dtype=np.int64)
        for read, tokens_at in enumerate(wanted):
            for token, place in tokens_at.items():
                targets[read, place] = token
        return targets, columns

    def _check(self, picked: Float[np.ndarray, "rows targets"], block: Block) -> None:
        # a norm whose squares overflow divides by infinity: its output is exactly zero, and finite
        zero = (block.hidden == 0).all(-1).any(-1).cpu().numpy()
        bad = zero | ~np.isfinite(picked).reshape(len(zero), -1).all(1)
        if bad.any():
            raise Overflow(block.variants.start + int(np.flatnonzero(bad)[0]))

    def finish(self, parts: Sequence[Arrays]) -> Outcome:
        """What the measures make of the log-probabilities, and whole distributions where they were asked for."""
        values: list[Value] = []
        distributions: Arrays = {}
        for measure, span in zip(self.measures, self.spans, strict=True):
            own = [np.concatenate([part[str(index)] for part in parts]) for index in range(span.start, span.stop)]
            values += measure.values(own)
            if all(reading.targets is None for reading in self.readings[span]):
                distributions[measure.name] = np.concatenate(own, axis=1)
        return Outcome(values, distributions)


class Overflow(Exception):
    """A variant's activations left the range of the model's dtype."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def _check_context(chat: ChatModel, longest: int) -> None:
    room = context(chat)
    if longest > room:
        raise EmmechError(
            "sweep over the texts",
            f"a text of {longest} tokens",
            f"{chat.name} reads up to {room} tokens",
            "shorter texts",
        )
