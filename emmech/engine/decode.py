"""The decoding loop and the sources of its steps: the model as it is, or many variants of it together.

The model as it is runs its own forward pass, so LoRA adapters and forward hooks (steering, ablation) act as they do
anywhere else. Many variants share their common work. An answer is (variant, prompt, seed); a row is the common text so
far of answers to one prompt under one variant. Answers begin as one row and diverge when they draw different tokens. In
blocks before the first adapter nothing depends on the variant, so rows with the same tokens are one row there. Because
a seed draws the same noise under every variant, variants that behave alike write the same text and share most of their
work; this also makes differences between variants less noisy.

Tokens are drawn with counter-based random numbers: the noise for (row seed, position, token) is a hash, so a row's text
does not depend on its batch, whereas a generator with state would give it other numbers. The draw is
the Gumbel-max trick, ``argmax(logits / temperature + noise)``, which follows the softmax exactly and, unlike inverting
the cumulative distribution, changes its result only when the best two scores are within rounding of each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.edits import announcing
from emmech.chat.model import ChatModel
from emmech.engine.adapters import VariantWeights, inner, write
from emmech.engine.attention import Cache, growing_cache
from emmech.engine.blocks import Blocks, Places
from emmech.engine.kept import KeptPrompt
from emmech.engine.logprobs import pad, padded, unembed
from emmech.engine.modules import after_hooks, evaluating, has_hooks, hooked, unhooked
from emmech.engine.packing import Reading, stack
from emmech.engine.split import DOES_NOT_RUN, State, deviation, tolerance
from emmech.engine.variants import Engine, Shared
from emmech.errors import EmmechError

_LEAVE = 0.8  # rows are moved together once no more than this share is still live


@dataclass(frozen=True)
class Answer:
    """Token ids of one answer without the stop token, and its end: ``"stop"``, ``"length"`` or ``"cancelled"``."""

    ids: tuple[int, ...]
    finish: str


@torch.no_grad()
def decode_variants(
    engine: Engine,
    rows: VariantWeights,
    prompts: Sequence[Sequence[int]],
    which: Sequence[int],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    **options: Any,
) -> list[Answer]:
    """Answer every request under every variant: together where steps agree with whole forwards, else one by one.

    Args:
        prompts, which: as in :class:`VariantSteps`.
        seeds: the seed of each request, which is the same under all variants.
        options: the options of :func:`write_answers`.
    """
    chat, options = engine.chat, {"max_new_tokens": max_new_tokens, **options}
    if engine.steps_agree is None:
        engine.steps_agree = (engine.lower.blocks.written and engine.upper.written) or _steps_agree(engine)
    if engine.steps_agree:
        steps = VariantSteps(engine, rows, prompts, which, max_new_tokens)
        return write_answers(chat, steps, [*seeds] * len(rows), **options)
    answers = []
    for variant in range(len(rows)):
        with evaluating(chat), hooked(*engine.hooks(rows[variant])):
            answers += write_answers(chat, ModelSteps(chat, prompts, which), seeds, **options)
    return answers


def _steps_agree(engine: Engine) -> bool:
    """Whether a step of two made-up variants agrees with the model's own forward over the whole text."""
    chat, rows = engine.chat, engine.made_up()
    prompts, after = [list(range(1, 13)), [*range(1, 9), 13]], 5
    try:
        steps = VariantSteps(engine, rows, prompts, [0, 1], 2)
        places = steps.step(torch.full_like(steps.rows, after), steps.rows)
        found = steps.hidden[places].view(2, 2, -1)
    except (*DOES_NOT_RUN, EmmechError):
        return False
    for (variant, which), hidden in zip(np.ndindex(2, 2), found.flatten(0, 1), strict=True):
        ids = torch.tensor([[*prompts[which], after]], device=chat.device)
        reads = torch.zeros(ids.shape, dtype=torch.bool, device=chat.device)
        reads[0, -1] = True
        if not deviation(chat, hidden[None], ids, reads, engine.hooks(rows[variant])) <= tolerance(chat):
            return False
    return True


class Steps(Protocol):
    """Rows of text that grow one token at a time.

    Args:
        rows: the row as which each answer begins.
        room: the number of tokens that the context leaves for an answer.
    """

    rows: Int[torch.Tensor, " answers"]
    room: int

    def logits(self, rows: Int[torch.Tensor, " answers"]) -> Float[torch.Tensor, "answers vocab"]:
        """The logits of each answer's next token."""
        ...

    def step(
        self, tokens: Int[torch.Tensor, " answers"], rows: Int[torch.Tensor, " answers"]
    ) -> Int[torch.Tensor, " answers"]:
        """Append a token to each unfinished answer and return the row that each is now."""
        ...


@torch.no_grad()
def write_answers(
    chat: ChatModel,
    steps: Steps,
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    at_once: int = 1 << 30,
    ended: Callable[[int], object] = lambda count: None,
    drawn: Callable[[np.ndarray, int, torch.Tensor, torch.Tensor], object] | None = None,
) -> list[Answer]:
    """Draw answers token by token.

    Args:
        seeds: the seed of each answer.
        at_once: the number of answers whose logits are in memory together.
        ended: called with the number of answers that ended at each step.
        drawn: called with every token as it is drawn: the answers, its position in them, the tokens ``[answers]`` and
            their logits ``[answers, vocab]``. Once it returns False, all unfinished answers are cancelled.
    """
    stop = torch.tensor(chat.stop_ids, device=chat.device)
    last = min(max_new_tokens, steps.room)
    # the index, the row and the seed of each unfinished answer
    answer, row, seed = np.arange(len(seeds)), steps.rows, np.asarray(seeds, dtype=np.int64)
    written = np.zeros((len(seeds), last), dtype=np.int64)
    lengths = np.zeros(len(seeds), dtype=np.int64)
    stopped = np.zeros(len(seeds), dtype=bool)
    cancelled = False
    for number in range(last):
        parts = []
        for start in range(0, len(row), at_once):
            chosen = slice(start, start + at_once)
            logits = steps.logits(row[chosen])
            parts.append(draw(logits, seed[chosen], number, temperature=temperature, top_p=top_p))
            if drawn is not None and drawn(answer[chosen], number, parts[-1], logits) is False:
                cancelled = True
        token = torch.cat(parts)
        going = ~torch.isin(token, stop)
        goes = going.cpu().numpy()
        stopped[answer[~goes]] = True
        ended(int((~goes).sum()))
        if not goes.all():
            answer, seed = answer[goes], seed[goes]
            token, row = token[going], row[going]
        written[answer, number] = token.cpu().numpy()
        lengths[answer] = number + 1
        if cancelled or not len(answer) or number + 1 == last:
            break
        row = steps.step(token, row)
    unfinished = "cancelled" if cancelled else "length"
    return [
        Answer(tuple(ids[:length].tolist()), "stop" if end else unfinished)
        for ids, length, end in zip(written, lengths, stopped, strict=True)
    ]


def context(chat: ChatModel) -> int:
    """The largest number of tokens that the model reads."""
    return int(getattr(chat.config, "max_position_embeddings", None) or 1 << 30)


class ModelSteps:
    """The model as it is, adapters and hooks included.

    A prompt that is answered many times is read once and its cache is copied; rows of finished answers are dropped. A
    family whose cache gives other logits than its own forward over the whole text (because a recurrent state treats
    padding as text, say) reads every text anew each time.

    Args:
        prompts: distinct prompts, as token ids.
        which: for each answer, the index of its prompt.
        owners: for each prompt, the index of its conversation where an intervention has a value for each of ``total``
            conversations; by default each prompt is one.
        apart: the first block that may treat two equal prompts differently; earlier blocks read equal prompts once.
        kept: where these blocks' reading is taken from and kept, if there is one distinct prompt.
    """

    def __init__(
        self,
        chat: ChatModel,
        prompts: Sequence[Sequence[int]],
        which: Sequence[int],
        *,
        owners: Sequence[int] | None = None,
        total: int | None = None,
        apart: int = 0,
        kept: KeptPrompt | None = None,
    ) -> None:
        self._chat, self._model, device = chat, chat.base, chat.device
        self.room = context(chat) - max(map(len, prompts))
        self.rows = torch.tensor(list(which), device=device)
        self._owner = torch.tensor(list(range(len(prompts)) if owners is None else owners))
        self._total = len(prompts) if total is None else total
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._mask: torch.Tensor | None = None
        if bool((lengths != lengths[0]).any()):
            self._mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(device)
        self._texts: list[list[int]] | None = None if keeps_past(chat) else [list(prompt) for prompt in prompts]
        self._positions, self._copied = lengths, False
        if self._texts is not None:
            self._logits = self._reread()
            return
        ids = pad(prompts, 0, left=True).to(device)
        columns = torch.arange(ids.shape[1], device=device)[None]
        self._cache = growing_cache(chat)
        places = (columns - (ids.shape[1] - lengths[:, None])).clamp(min=0)  # padding counts as position 0
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        copies = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
        kept = kept if len(distinct) == 1 and apart else None
        if kept is None:
            with announcing(self._owner, self._total):
                read = _read_written_out(chat, list(distinct), copies, self._cache, apart)
            if read is not None:
                self._logits = read
                return
        if not apart or (len(distinct) == len(prompts) and kept is None):
            self._logits = self._run(ids, places)
            return
        first = torch.tensor([list(map(tuple, prompts)).index(one) for one in distinct], device=device)
        resumed = (
            contextlib.nullcontext(self._model)
            if kept is None
            else kept.resumed(chat, next(iter(distinct)), apart, self._cache)
        )
        with _read_once(chat, apart, first, copies), resumed as model:
            self._logits = self._run(ids, places, model)
        for layer in self._cache.layers[:apart]:
            getattr(layer, "batch_select_indices", layer.reorder_cache)(copies)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits of each answer's next token."""
        return self._logits.index_select(0, rows)

    def step(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Append a token to each unfinished answer and return the row that each is now."""
        if not self._copied or len(rows) <= _LEAVE * len(self._positions):
            self.select(rows)
            rows = torch.arange(len(rows), device=rows.device)
        else:  # the few rows without an unfinished answer stay and are ignored
            tokens = tokens.new_zeros(len(self._positions)).index_copy(0, rows, tokens)
        self.feed(tokens)
        return rows

    def select(self, rows: torch.Tensor) -> None:
        """Continue with these rows; a row may occur more than once."""
        self._copied = True
        if self._texts is not None:
            self._texts = [list(self._texts[row]) for row in rows.tolist()]
        else:
            for layer in self._cache.layers:
                # the state of a recurrence or a convolution can be reordered, which may also repeat and drop rows
                getattr(layer, "batch_select_indices", layer.reorder_cache)(rows)
        self._positions, self._owner = self._positions[rows], self._owner[rows.cpu()]
        self._mask = self._mask[rows] if self._mask is not None else None

    def feed(self, tokens: Int[torch.Tensor, " rows"]) -> torch.Tensor:
        """Logits after one more token of every row, ``[rows, vocab]``."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        if self._texts is None:
            self._logits = self._run(tokens[:, None], self._positions[:, None])
        else:
            self._texts = [[*text, token] for text, token in zip(self._texts, tokens.tolist(), strict=True)]
            self._logits = self._reread()
        self._positions = self._positions + 1
        return self._logits

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, model: Any = None) -> torch.Tensor:
        run = self._model if model is None else model
        places = {"attention_mask": self._mask, "position_ids": positions}
        with announcing(self._owner, self._total):
            output = run(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **places)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _reread(self) -> torch.Tensor:
        assert self._texts is not None
        with announcing(self._owner, self._total):
            return _anew(self._chat, self._texts)


@contextlib.contextmanager
def _read_once(
    chat: ChatModel, apart: int, first: Int[torch.Tensor, " distinct"], copies: Int[torch.Tensor, " rows"]
) -> Iterator[None]:
    """Blocks before ``apart`` run only rows ``first``, and ``apart`` receives a copy of its first row for each row."""
    rows = len(copies)

    def narrow(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(narrow, value))
        batched = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == rows
        return value.index_select(0, first) if batched else value

    def below(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return narrow(args), {name: narrow(value) for name, value in kwargs.items()}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0].index_select(0, copies), *args[1:]), kwargs

    lower, entered = chat.blocks[:apart], chat.blocks[apart]
    hooks = [*((block, below) for block in lower), (entered, widen)]
    with hooked(*hooks, before=True, keywords=True):
        yield


def _read_written_out(
    chat: ChatModel, prompts: Sequence[Sequence[int]], copies: Int[torch.Tensor, " rows"], cache: Any, apart: int
) -> Float[torch.Tensor, "rows vocab"] | None:
    """Read prompts with the blocks as the engine writes them out, keep keys and values, and return the last logits.

    Rows with equal prompts are read once up to block ``apart``, whose output an intervention may change row by row. The
    last block runs at the last tokens only.

    Args:
        prompts: distinct ones.
        copies: the prompt of each row.
        cache: the model's own cache, which is filled.

    Returns:
        None where the model has hooks that only its own forward can call.
    """
    cut = 0
    if apart and len(prompts) < len(copies):
        inside = any(has_hooks(module) for module in [*chat.blocks[apart].modules()][1:])
        cut = apart if inside else apart + 1
    if has_hooks(chat.base) or not chat.family.written_out:
        return None
    upper = Blocks(chat, cut, steered=True)
    ids, mask = padded(prompts, copies.device)
    hidden, below, above = ids, Cache(), Cache()
    if cut:
        with unhooked(chat.blocks[cut - 1]) if cut == apart + 1 else contextlib.nullcontext():
            lower = Blocks(chat, 0, cut, norm=False)
            if not (lower.written and upper.written):
                return None
            hidden = lower(ids, cache=below)
    elif not upper.written:
        return None
    lengths, width = mask.sum(1)[copies], ids.shape[1]
    hidden = hidden.index_select(0, copies)
    if cut == apart + 1:
        hidden = after_hooks(chat.blocks[apart], hidden, hidden)
    ends = torch.arange(len(copies), device=copies.device) * width + lengths - 1
    logits = unembed(chat, upper(hidden, Places(reads=ends), above))
    # the cache is padded on the left
    columns = (torch.arange(width, device=copies.device)[None] - width + lengths[:, None]).clamp_(min=0)
    ragged = bool((lengths != width).any())
    for layer in range(chat.n_layers):
        pair = above.layers[layer] if layer >= cut else tuple(one[copies] for one in below.layers[layer])
        if ragged:
            pair = tuple(one.take_along_dim(columns[:, None, :, None], 2) for one in pair)  # type: ignore[assignment]
        cache.update(*pair, layer)
    return logits


def _anew(chat: ChatModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of each text's next token ``[texts, vocab]``, computed without earlier forwards."""
    ids, mask = padded(texts, chat.device)
    hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return unembed(chat, hidden[torch.arange(len(texts)), mask.sum(1) - 1])


_KEEPS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by model, once it has been tried


@torch.no_grad()
def keeps_past(chat: ChatModel) -> bool:
    """Whether a token after a cache of left-padded prompts gives the same logits as the whole text; tried once a model.

    This is known for families that are written out in :mod:`emmech.engine.blocks`.
    """
    if chat.family.written_out:
        return True
    if chat.base not in _KEEPS:
        _KEEPS[chat.base] = True
        texts, then = [[1, 2, 3, 4, 5, 6, 7], [3, 2, 4]], [8, 9]
        off = float("inf")
        with evaluating(chat), unhooked(chat.base), contextlib.suppress(*DOES_NOT_RUN):
            found = ModelSteps(chat, texts, [0, 1]).feed(torch.tensor(then, device=chat.device)).float()
            wanted = _anew(chat, [[*text, token] for text, token in zip(texts, then, strict=True)]).float()
            off = float((found - wanted).abs().max() / wanted.abs().max())
        _KEEPS[chat.base] = off <= tolerance(chat)
    return _KEEPS[chat.base]


class VariantSteps:
    """Many variants of a model, every request under each of them.

    Args:
        prompts: distinct prompts, as token ids.
        which: for each request, the index of its prompt; the answers are in the order of variants, then requests.
        most: the largest number of tokens in an answer.
    """

    def __init__(
        self, engine: Engine, rows: VariantWeights, prompts: Sequence[Sequence[int]], which: Sequence[int], most: int
    ) -> None:
        chat, variants = engine.chat, len(rows)
        device = chat.device
        self.room = context(chat) - max(map(len, prompts))
        self._engine, self._rows = engine, rows
        each = torch.arange(variants, device=device)
        self.rows = (each[:, None] * len(prompts) + torch.tensor(which, device=device)).reshape(-1)
        # for each row after the cut its variant and its row before the cut; for the latter the tokens of its prompt
        self._variant = each.repeat_interleave(len(prompts))
        self._below = torch.arange(len(prompts), device=device).repeat(variants)
        self._start = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._vocab = int(chat.config.vocab_size)
        with evaluating(chat):
            self._prefill(prompts, min(most, self.room))
        self._gather()

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits of each answer's next token."""
        distinct, inverse = torch.unique(rows, return_inverse=True)
        if len(distinct) < len(rows):
            return unembed(self._engine.chat, self.hidden.index_select(0, distinct)).index_select(0, inverse)
        return unembed(self._engine.chat, self.hidden.index_select(0, rows))

    def step(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Append a token to each unfinished answer and return the row that each is now.

        Every distinct (row, next token) of the unfinished answers becomes a row of its own, before and after the cut.
        """
        pairs, inverse = torch.unique(rows * self._vocab + tokens, return_inverse=True)
        parents, tokens = pairs // self._vocab, pairs % self._vocab
        count = len(self._variant)
        if bool((parents[1:] == parents[:-1]).any()) or len(parents) <= _LEAVE * count:
            self._upper.select(parents)
            self._variant, self._below = self._variant[parents], self._below[parents]
            self._gather()
        else:  # the few rows without an unfinished answer stay and are ignored
            inverse = parents[inverse]
            tokens = tokens.new_zeros(count).index_copy_(0, parents, tokens)
        below, self._below = torch.unique(self._below * self._vocab + tokens, return_inverse=True)
        parents = below // self._vocab
        if not torch.equal(parents, torch.arange(len(self._start), device=parents.device)):
            self._lower.select(parents)
            self._start = self._start[parents]
        self._advance(below % self._vocab)
        return inverse

    def _advance(self, tokens: torch.Tensor) -> None:
        """Run one token of every row through the blocks before the cut."""
        engine = self._engine
        position = self._start + self._lower.written
        with evaluating(engine.chat):
            state = engine.lower(tokens, Places(position), self._lower)
            self._lower.written += 1
            hidden = self._parted(state)
            self.hidden = engine.raised(hidden, Places(position[self._below]), self._gathered, self._upper)
        self._upper.written += 1

    def _parted(self, state: State) -> torch.Tensor:
        """Each row's residual stream at the cut, where the variants diverge, ``[rows, d_model]``."""
        engine, name = self._engine, self._engine.shared_name
        hidden = state.residual.index_select(0, self._below)
        if name is not None:
            assert state.read is not None and state.wrote is not None
            # one product gives every distinct input under every variant, from which each row takes its own
            z = inner(state.read, self._rows.A[name])[self._below, self._variant][:, None]
            own = State(hidden, state.read, state.wrote.index_select(0, self._below))
            hidden = engine.lower.entering(own, lambda onto, read: write(onto, z, self._gathered.B[name]))
        if engine.steering is not None and engine.steering == engine.frozen.blocks - 1:
            hidden = hidden + self._gathered.steering[engine.steering].to(hidden.dtype)
        return hidden

    def _gather(self) -> None:
        """Select each row's own adapters, except for the shared input, which is multiplied with every A at once."""
        shared = self._engine.shared_name
        own = VariantWeights({n: a for n, a in self._rows.A.items() if n != shared}, self._rows.B, self._rows.steering)
        self._gathered = own.each(lambda one: one.index_select(0, self._variant))

    def _prefill(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Read every prompt, common beginnings once: before the cut for all variants together, after it for each."""
        engine, rows, variants = self._engine, self._rows, len(self._rows)
        device, width = engine.chat.device, max(map(len, prompts))
        lower, upper, hidden = [], [], []
        of_lower, of_upper = [], []  # for each row, its index among the prompts and among variants x prompts
        for one in engine.packs([Reading(tuple(prompt), tuple(range(len(prompt)))) for prompt in prompts]):
            ids, positions = stack([one], device)
            places = Places(positions, engine.tree_mask([one]))
            ends = torch.tensor([int(path[-1]) for path in one.nodes], device=device)
            # left-padded, so that all prompts end in the same column
            columns = pad([[0] * (width - len(path)) + path.tolist() for path in one.nodes], 0).to(device)
            own = torch.tensor(one.readings, device=device)
            below = Cache()
            shared = Shared(engine.lower(ids, places, below), places, ends)
            lower.append(below.spread(columns))
            of_lower.append(own)
            at_once = max(1, engine.tokens // len(one))
            for start in range(0, variants, at_once):
                above, end = Cache(), min(variants, start + at_once)
                hidden.append(engine.above(shared, rows[start:end], cache=above).flatten(0, 1))
                upper.append(above.spread(columns))
                present = torch.arange(start, end, device=device)
                of_upper.append(rearrange(present[:, None] * len(prompts) + own, "variants own -> (variants own)"))
        into = torch.cat(of_upper).argsort()
        self._upper = Cache.joined(upper, into).grow(self._start.repeat(variants), room)
        self._lower = Cache.joined(lower, torch.cat(of_lower).argsort()).grow(self._start, room)
        self.hidden = torch.cat(hidden)[into]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seeds: Sequence[int] | np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Two int32 keys per row, ``[rows]`` each."""
    words = np.asarray(seeds, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mix64(_mix64(words + _GOLDEN) + np.uint64(position + 1) * _GOLDEN)
    halves = mixed.view(np.uint32).reshape(-1, 2).view(np.int32)
    return halves[:, 0], halves[:, 1]


def gumbel(
    seeds: Sequence[int] | np.ndarray, position: int, vocab: int, device: torch.device | str = "cpu"
) -> Float[torch.Tensor, "rows vocab"]:
    """Standard Gumbel noise in float32, as a function of (seed, position, token) only.

    The integers are equal on every device; the two logarithms may differ in the last bit.

    Example:
        >>> together, alone = gumbel([1, 2], 0, 5), gumbel([2], 0, 5)
        >>> torch.equal(together[1], alone[0])
        True
    """
    first, second = (torch.from_numpy(key.copy()).to(device)[:, None] for key in _keys(seeds, position))
    # lowbias32, a full-avalanche 32-bit mix; int32 wraps like uint32, and shifts are masked to be logical
    x = torch.arange(vocab, dtype=torch.int32, device=device).mul_(-1640531535)[None] ^ first
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x += second
    x ^= (x >> 15) & 0x1FFFF
    x *= -2073254261  # 0x846CA68B
    x ^= (x >> 16) & 0xFFFF
    x &= 0x7FFFFFFF
    # small v keeps full relative precision, and small v gives large noise
    v = x.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def draw(
    logits: Float[torch.Tensor, "rows vocab"],
    seeds: Sequence[int] | np.ndarray,
    position: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[torch.Tensor, " rows"]:
    """Draw one token per row.

    Args:
        seeds: one per row.
        position: index of the token in its answer, from 0.
        temperature: 0 takes the most likely token.
        top_p: keep the smallest set of most likely tokens whose probability reaches this (nucleus sampling,
            arXiv 1904.09751).

    Example:
        >>> draw(torch.tensor([[0.0, 9.0]]), [7], 0, temperature=0).tolist()
        [1]
    """
    scores = logits.float()
    if temperature == 0:
        return _best(scores)
    if temperature != 1:
        scores = scores / temperature
    if top_p < 1.0:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        probability = ranked.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # what precedes the token already reaches top_p
        scores = scores.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    # rows that share a seed (one question under many checkpoints) share their noise, which is made once
    distinct, where = np.unique(np.asarray(seeds, dtype=np.uint64), return_inverse=True)
    noise = gumbel(distinct, position, scores.shape[-1], scores.device)
    noise = noise.index_select(0, torch.from_numpy(where).to(scores.device))
    return _best(noise.add_(scores))


def _best(scores: Float[torch.Tensor, "rows vocab"]) -> Int[torch.Tensor, " rows"]:
    """The index of each row's highest score, or the first of equal ones."""
    if scores.device.type == "cpu":  # numpy compares several numbers of a row at a time, torch one by one
        return torch.from_numpy(scores.detach().numpy().argmax(-1))
    return scores.argmax(-1)
