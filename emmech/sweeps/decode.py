"""Decode many variants together: each row under its own adapter, common random numbers across variants.

A row is (variant, prompt, seed). Below the lowest adapter nothing depends on the variant, so rows with the same
tokens so far are one row there. Because a seed draws the same noise under every variant, variants that behave
alike write the same text, and that sharing goes far; it also makes differences between variants less noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emmech.chat.draw import draw
from emmech.chat.logprob import pad, unembed
from emmech.sweeps.cache import RowCache, attention_mask
from emmech.sweeps.engine import Engine, Shared, cut
from emmech.sweeps.rows import Rows, write

__all__ = ["Answer", "decode_variants"]

_LEAVE = 0.8  # rows are moved together once no more than this share is still live


@dataclass(frozen=True)
class Answer:
    """Token ids of one answer, the stop token left out, and why it ended: ``"stop"`` or ``"length"``."""

    ids: tuple[int, ...]
    finish: str


@dataclass
class _Live:
    """The rows that are still being written."""

    answer: np.ndarray  # which answer each is; -1 once it has ended
    variant: torch.Tensor
    seed: np.ndarray
    below: torch.Tensor  # its row in the shared blocks
    position: torch.Tensor  # of its next token
    start: torch.Tensor  # columns of padding before its prompt


@torch.no_grad()
def decode_variants(
    engine: Engine,
    rows: Rows,
    variants: int,
    prompts: Sequence[Sequence[int]],
    which: Sequence[int],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    logit_rows: int = 1 << 30,
    ended: Callable[[int], object] = lambda count: None,
) -> list[list[Answer]]:
    """Answer every request under every variant.

    Args:
        prompts: distinct prompts, as token ids.
        which: per request the index of its prompt.
        seeds: per request its seed; the same under all variants.
        logit_rows: rows through the unembedding at once.
        ended: told how many answers ended at each step.

    Returns:
        per variant, one answer per request.
    """
    chat = engine.chat
    device = chat.device
    stop = torch.tensor(chat.stop_ids, device=device)
    caches, hidden, width = _prefill(engine, rows, variants, prompts)
    lower, upper = caches
    requests = len(which)
    prompt_of = torch.tensor(list(which), device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    variant = torch.arange(variants, device=device).repeat_interleave(requests)
    source = variant * len(prompts) + prompt_of.repeat(variants)
    upper.select(source)
    lower.select(prompt_of)
    hidden = hidden[source]
    live = _Live(
        np.arange(variants * requests),
        variant,
        np.tile(np.asarray(seeds, dtype=np.int64), variants),
        torch.arange(requests, device=device).repeat(variants),
        lengths[prompt_of].repeat(variants),
        (width - lengths[prompt_of]).repeat(variants),
    )
    below_start = (width - lengths[prompt_of]).clone()
    written: list[list[int]] = [[] for _ in range(variants * requests)]
    finish = np.full(variants * requests, "length", dtype=object)
    room = int(getattr(chat.config, "max_position_embeddings", None) or 1 << 30) - int(lengths.max())
    gathered = _gather(rows, live.variant)
    for number in range(min(max_new_tokens, room)):
        token = _draw(engine, hidden, live.seed, number, temperature, top_p, logit_rows)
        ends = torch.isin(token, stop).cpu().numpy() & (live.answer >= 0)
        drawn = token.tolist()
        for at in np.flatnonzero((live.answer >= 0) & ~ends):
            written[live.answer[at]].append(drawn[at])
        finish[live.answer[ends]] = "stop"
        ended(int(ends.sum()))
        live.answer[ends] = -1
        count = int((live.answer >= 0).sum())
        if count == 0 or number + 1 == min(max_new_tokens, room):
            break
        if count <= _LEAVE * len(live.answer):
            kept = np.flatnonzero(live.answer >= 0)
            chosen = torch.from_numpy(kept).to(device)
            upper.select(chosen)
            token = token[chosen]
            live = _Live(
                live.answer[kept],
                live.variant[chosen],
                live.seed[kept],
                live.below[chosen],
                live.position[chosen],
                live.start[chosen],
            )
            gathered = _gather(rows, live.variant)
        hidden, below_start = _step(engine, rows, gathered, lower, upper, live, below_start, token)
        live.position = live.position + 1
    answers = [Answer(tuple(ids), str(end)) for ids, end in zip(written, finish, strict=True)]
    return [answers[v * requests : (v + 1) * requests] for v in range(variants)]


def _prefill(
    engine: Engine, rows: Rows, variants: int, prompts: Sequence[Sequence[int]]
) -> tuple[tuple[RowCache, RowCache], torch.Tensor, int]:
    """Read every prompt: once below, once per variant above. Left-padded, so that all end in the same column."""
    chat = engine.chat
    ids = pad(prompts, 0, left=True).to(chat.device)
    width = ids.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=chat.device)
    positions = torch.arange(width, device=chat.device)[None] - (width - lengths[:, None])
    mask = _mask(engine, positions.clamp(min=0), positions)
    below = RowCache()
    last = torch.arange(len(prompts), device=chat.device) * width + width - 1
    shared = engine.lowered(ids, mask, positions.clamp(min=0), last, cache=below)
    below.advance(width)
    pieces, hidden = [], []
    at_once = max(1, engine.tokens // ids.numel())
    for start in range(0, variants, at_once):
        piece = RowCache()
        chosen = slice(start, min(variants, start + at_once))
        hidden.append(engine.above(shared, cut(rows, chosen), cache=piece).reshape(-1, chat.d_model))
        piece.advance(width)
        pieces.append(piece)
    return (below, RowCache.joined(pieces)), torch.cat(hidden), width


def _step(
    engine: Engine,
    rows: Rows,
    gathered: Rows,
    lower: RowCache,
    upper: RowCache,
    live: _Live,
    below_start: torch.Tensor,
    token: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of every live row; its hidden state ``[rows, d_model]``."""
    vocab = int(engine.chat.config.vocab_size)
    pairs, inverse = torch.unique(live.below * vocab + token, return_inverse=True)
    parents = pairs // vocab
    if len(parents) != len(below_start) or not torch.equal(
        parents, torch.arange(len(parents), device=parents.device)
    ):
        lower.select(parents)
    below_start = below_start[parents]
    columns = torch.arange(lower.length + 1, device=token.device)[None]
    keys = columns - below_start[:, None]
    position = keys[:, -1:]
    shared = engine.lowered(
        (pairs % vocab)[:, None], _mask(engine, position, keys), position, torch.empty(0), cache=lower
    )
    lower.advance(1)
    live.below = inverse
    hidden = _parted(engine, shared, rows, gathered, live, inverse)
    keys = columns - live.start[:, None]
    position = live.position[:, None]
    out = engine.raised(hidden[:, None], _mask(engine, position, keys), position, gathered, cache=upper)
    upper.advance(1)
    return out[:, 0], below_start


def _parted(
    engine: Engine, shared: Shared, rows: Rows, gathered: Rows, live: _Live, inverse: torch.Tensor
) -> torch.Tensor:
    """Each row's residual stream where the variants part, ``[rows, d_model]``."""
    hidden = shared.hidden[inverse, 0]
    name = engine.shared_name
    if name is not None:
        assert shared.read is not None and shared.wrote is not None
        a = rows.A[name]
        # every distinct input under every variant in one product, then each row takes its own
        z = shared.read[:, 0].to(a.dtype) @ a.permute(1, 0, 2).reshape(a.shape[1], -1)
        z = z.reshape(len(z), a.shape[0], -1)[inverse, live.variant]
        if engine.behind is None:
            hidden = write(hidden, z[:, None], gathered.B[name])
        else:
            wrote = shared.wrote[inverse, 0]
            hidden = engine.part(hidden, wrote, write(wrote, z[:, None], gathered.B[name]))
    if engine.grid.steering is not None and engine.grid.steering[0] == engine.split:
        hidden = hidden + gathered.steering[engine.split].to(hidden.dtype)
    return hidden


def _mask(engine: Engine, queries: torch.Tensor, keys: torch.Tensor) -> object:
    config = engine.chat.config
    kinds = set(getattr(config, "layer_types", None) or ())
    return attention_mask(queries, keys, engine.chat.dtype, kinds, getattr(config, "sliding_window", None))


def _gather(rows: Rows, variant: torch.Tensor) -> Rows:
    return Rows(
        {name: a[variant] for name, a in rows.A.items()},
        {name: b[variant] for name, b in rows.B.items()},
        {layer: vectors[variant] for layer, vectors in rows.steering.items()},
    )


def _draw(
    engine: Engine,
    hidden: torch.Tensor,
    seeds: np.ndarray,
    number: int,
    temperature: float,
    top_p: float,
    logit_rows: int,
) -> torch.Tensor:
    found = [
        draw(
            unembed(engine.chat, hidden[start : start + logit_rows]),
            seeds[start : start + logit_rows],
            number,
            temperature=temperature,
            top_p=top_p,
        )
        for start in range(0, len(hidden), logit_rows)
    ]
    return torch.cat(found)
