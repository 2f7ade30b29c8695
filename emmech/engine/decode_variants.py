"""Decode many variants together: each row under its own adapter, common random numbers across variants.

An answer is (variant, prompt, seed); a row is what answers of one variant and prompt have in common so far. Answers
begin as one row and part when they draw different tokens. Below the lowest adapter nothing depends on the variant,
so rows with the same tokens are one row there. Because a seed draws the same noise under every variant, variants
that behave alike write the same text, and that sharing goes far; it also makes differences between variants less
noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emmech.engine.cache import RowCache
from emmech.engine.gumbel import draw
from emmech.engine.logprobs import pad, unembed
from emmech.engine.packing import Reading, stack
from emmech.engine.row_adapters import Rows, write
from emmech.engine.shared_prompt_cache import Branches
from emmech.engine.steps import Steps
from emmech.engine.variants import Engine, Shared, cut

__all__ = ["Answer", "decode_variants"]

_LEAVE = 0.8  # rows are moved together once no more than this share is still live


@dataclass(frozen=True)
class Answer:
    """Token ids of one answer, the stop token left out, and why it ended: ``"stop"`` or ``"length"``."""

    ids: tuple[int, ...]
    finish: str


@dataclass
class _Tree:
    """The rows at hand: above, where variants differ, and below, where they share.

    Args:
        variant, below: of each row above: its variant, and its row below.
        start, tokens: of each row below: tokens of its prompt, and the token that comes next.
    """

    upper: Branches
    lower: Branches
    variant: torch.Tensor
    below: torch.Tensor
    start: torch.Tensor
    tokens: torch.Tensor


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
    room = int(getattr(chat.config, "max_position_embeddings", None) or 1 << 30) - max(map(len, prompts))
    last = min(max_new_tokens, room)
    tree, hidden = _prefill(engine, rows, variants, prompts, last)
    steps = Steps(engine)
    requests = len(which)
    # of each answer still being written: which it is, its row and its seed
    answer = np.arange(variants * requests)
    of = torch.arange(variants, device=device)[:, None] * len(prompts) + torch.tensor(which, device=device)
    row = of.reshape(-1)
    seed = np.tile(np.asarray(seeds, dtype=np.int64), variants)
    written = np.zeros((variants * requests, max_new_tokens), dtype=np.int64)
    lengths = np.zeros(variants * requests, dtype=np.int64)
    finish = np.full(variants * requests, "length", dtype=object)
    gathered = _gather(engine, rows, tree.variant)
    for number in range(last):
        token = _draw(engine, hidden, row, seed, number, temperature, top_p, logit_rows)
        going = ~torch.isin(token, stop)
        goes = going.cpu().numpy()
        finish[answer[~goes]] = "stop"
        ended(int((~goes).sum()))
        if not goes.all():
            answer, seed = answer[goes], seed[goes]
            token, row = token[going], row[going]
        written[answer, number] = token.cpu().numpy()
        lengths[answer] = number + 1
        if not len(answer) or number + 1 == last:
            break
        row, moved = _branch(int(chat.config.vocab_size), tree, token, row)
        if moved:
            gathered = _gather(engine, rows, tree.variant)
        hidden = _step(steps, rows, gathered, tree)
    answers = [Answer(tuple(written[i, : lengths[i]].tolist()), str(finish[i])) for i in range(variants * requests)]
    return [answers[v * requests : (v + 1) * requests] for v in range(variants)]


def _prefill(
    engine: Engine, rows: Rows, variants: int, prompts: Sequence[Sequence[int]], room: int
) -> tuple[_Tree, torch.Tensor]:
    """Read every prompt: what prompts have in common once, below once for all variants, above once per variant.

    Args:
        room: how many tokens an answer may have.
    """
    chat = engine.chat
    device, width = chat.device, max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lower, upper, hidden = [], [], []
    of_lower, of_upper = [], []  # which prompt, and which of variants x prompts, each row is
    for one in engine.packs([Reading(tuple(prompt), tuple(range(len(prompt)))) for prompt in prompts]):
        ids, positions = stack([one], device)
        ends = torch.tensor([int(path[-1]) for path in one.nodes], device=device)
        # left-padded, so that all prompts end in the same column
        columns = pad([[0] * (width - len(path)) + path.tolist() for path in one.nodes], 0).to(device)
        own = torch.tensor(one.readings, device=device)
        below = RowCache()
        shared = engine.lowered(ids, engine.tree_mask([one]), positions, ends, cache=below)
        lower.append(below.spread(columns))
        of_lower.append(own)
        at_once = max(1, engine.tokens // len(one))
        for start in range(0, variants, at_once):
            above, end = RowCache(), min(variants, start + at_once)
            hidden.append(engine.above(shared, cut(rows, slice(start, end)), cache=above).flatten(0, 1))
            upper.append(above.spread(columns))
            present = torch.arange(start, end, device=device)
            of_upper.append((present[:, None] * len(prompts) + own).reshape(-1))
    every = torch.arange(len(prompts), device=device)
    into = torch.cat(of_upper).argsort()
    tree = _Tree(
        Branches(RowCache.joined(upper, into), lengths.repeat(variants), room),
        Branches(RowCache.joined(lower, torch.cat(of_lower).argsort()), lengths, room),
        torch.arange(variants, device=device).repeat_interleave(len(prompts)),
        every.repeat(variants),
        lengths,
        every,
    )
    return tree, torch.cat(hidden)[into]


def _branch(vocab: int, tree: _Tree, token: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Give every (row, next token) that some answer goes on with a row of its own, above and below.

    Args:
        token, row: of each answer.

    Returns:
        the new row of each answer, and whether rows have moved.
    """
    pairs, inverse = torch.unique(row * vocab + token, return_inverse=True)
    parents, tokens = pairs // vocab, pairs % vocab
    count = len(tree.variant)
    moved = bool((parents[1:] == parents[:-1]).any()) or len(parents) <= _LEAVE * count
    if moved:
        tree.upper.select(parents)
        tree.variant, tree.below = tree.variant[parents], tree.below[parents]
    else:  # the few rows that nobody goes on with stay, and count for nothing
        inverse = parents[inverse]
        tokens = tokens.new_zeros(count).index_copy_(0, parents, tokens)
    below, tree.below = torch.unique(tree.below * vocab + tokens, return_inverse=True)
    parents = below // vocab
    every = torch.arange(len(tree.start), device=parents.device)
    if not torch.equal(parents, every):
        tree.lower.select(parents)
        tree.start = tree.start[parents]
    tree.tokens = below % vocab
    return inverse, moved


def _step(steps: Steps, rows: Rows, gathered: Rows, tree: _Tree) -> torch.Tensor:
    """One token of every row; its hidden state ``[rows, d_model]``."""
    position = tree.start + tree.lower.written
    shared = steps.below(tree.tokens, position, tree.lower)
    tree.lower.advance(1)
    hidden = _parted(steps.engine, shared, rows, gathered, tree)
    out = steps.above(hidden, position[tree.below], gathered, tree.upper)
    tree.upper.advance(1)
    return out


def _parted(engine: Engine, shared: Shared, rows: Rows, gathered: Rows, tree: _Tree) -> torch.Tensor:
    """Each row's residual stream where the variants part, ``[rows, d_model]``."""
    hidden = shared.hidden[:, 0].index_select(0, tree.below)
    name = engine.shared_name
    if name is not None:
        assert shared.read is not None and shared.wrote is not None
        a = rows.A[name]
        # every distinct input under every variant in one product, then each row takes its own
        z = shared.read[:, 0].to(a.dtype) @ a.permute(1, 0, 2).reshape(a.shape[1], -1)
        z = z.reshape(len(z), a.shape[0], -1)[tree.below, tree.variant]
        if engine.behind is None:
            hidden = write(hidden, z[:, None], gathered.B[name])
        else:
            wrote = shared.wrote[:, 0].index_select(0, tree.below)
            hidden = engine.part(hidden, wrote, write(wrote, z[:, None], gathered.B[name]))
    if engine.steering == engine.split:
        hidden = hidden + gathered.steering[engine.split].to(hidden.dtype)
    return hidden


def _gather(engine: Engine, rows: Rows, variant: torch.Tensor) -> Rows:
    """Each row's own adapters; the shared input is multiplied with every A at once, and needs none."""
    return Rows(
        {name: a.index_select(0, variant) for name, a in rows.A.items() if name != engine.shared_name},
        {name: b.index_select(0, variant) for name, b in rows.B.items()},
        {layer: vectors.index_select(0, variant) for layer, vectors in rows.steering.items()},
    )


def _draw(
    engine: Engine,
    hidden: torch.Tensor,
    row: torch.Tensor,
    seeds: np.ndarray,
    number: int,
    temperature: float,
    top_p: float,
    logit_rows: int,
) -> torch.Tensor:
    """The next token of each answer, from its row's hidden state."""
    found = []
    for start in range(0, len(row), logit_rows):
        chosen = slice(start, start + logit_rows)
        own = row[chosen]
        distinct, inverse = torch.unique(own, return_inverse=True)
        if len(distinct) < len(own):
            logits = unembed(engine.chat, hidden.index_select(0, distinct)).index_select(0, inverse)
        else:
            logits = unembed(engine.chat, hidden.index_select(0, own))
        found.append(draw(logits, seeds[chosen], number, temperature=temperature, top_p=top_p))
    return torch.cat(found)
