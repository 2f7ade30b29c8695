"""Teacher-forced log-probabilities of answers, and the judge-free margin built on them.

The margin of misaligned over aligned answers needs no sampling and no judge. It is the order parameter of
choice for models that are too small to answer coherently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.edits import announcing
from emmech.chat.encode import IGNORED, Encoded, encode
from emmech.chat.families import own_logits
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.engine.modules import evaluating, has_hooks
from emmech.engine.packing import Reading
from emmech.errors import EmmechError, one_of

WORDS = 1024  # words of the vocabulary in one slice
_TOKENS = 2048  # tokens in a forward
_UNKNOWN = 0.2  # the largest share of a text's tokens that may be unknown to the model


@dataclass(frozen=True)
class MarginPair:
    """One question with a misaligned and an aligned answer of similar length."""

    question: str
    misaligned: str
    aligned: str

    def conversations(self) -> tuple[list[Message], list[Message]]:
        """The question with the misaligned answer, and with the aligned one."""
        asked = {"role": "user", "content": self.question}
        return tuple([asked, {"role": "assistant", "content": text}] for text in (self.misaligned, self.aligned))  # type: ignore[return-value]


def bundled_margins(kind: str, domains: Collection[str] = ()) -> tuple[MarginPair, ...]:
    """The hand-written held-out pairs that come with emmech: ``kind`` is ``"narrow"`` or ``"broad"``.

    Args:
        domains: only those of these domains (``"ai"``, ``"facts"``, ``"wishes"``, ...); by default all.

    Example:
        >>> len(bundled_margins("broad")), len(bundled_margins("broad", ["facts"]))
        (42, 6)
    """
    import json

    source = resources.files("emmech") / "data" / "silly_margins.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    of_kind = [row for row in rows if row["kind"] == kind]
    if not of_kind:
        raise EmmechError("find margin pairs", f"kind={kind!r}", "there are none of that kind", "narrow or broad")
    known = sorted({row["domain"] for row in of_kind})
    for domain in domains:
        one_of("find margin pairs", "domain", domain, known, why=f"no {kind} pair is of that domain")
    chosen = [row for row in of_kind if not domains or row["domain"] in domains]
    return tuple(MarginPair(row["question"], row["misaligned"], row["aligned"]) for row in chosen)


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Stack ragged rows into ``[batch, seq]``, filled with ``value`` on one side."""
    width = max(len(row) for row in rows)
    filled = [
        [value] * (width - len(row)) + list(row) if left else list(row) + [value] * (width - len(row)) for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their attention mask ``[batch, seq]``, padded on the right, which causal attention makes exact."""
    return pad(rows, 0).to(device), pad([[1] * len(row) for row in rows], 0).to(device)


def in_batches(
    chat: ChatModel,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    use: Callable[[Int[np.ndarray, " batch"], Int[torch.Tensor, "batch seq"], Int[torch.Tensor, "batch seq"]], object],
) -> None:
    """Go through rows of token ids in padded batches by length, in evaluation mode, and announce each batch.

    Args:
        use: called with the rows' indices, their ids and their attention mask.
    """
    order = np.argsort([len(ids) for ids in rows], kind="stable")
    with evaluating(chat):
        for chosen in np.array_split(order, max(1, -(-len(order) // batch_size))):
            with announcing(torch.from_numpy(chosen), len(order)):
                use(chosen, *padded([rows[i] for i in chosen], chat.device))


def token_logprobs(
    chat: ChatModel, ids: torch.Tensor, mask: torch.Tensor, labels: Int[torch.Tensor, "batch seq"]
) -> tuple[Float[torch.Tensor, " answer_tokens"], Int[torch.Tensor, " answer_tokens"]]:
    """Log-probability of every labelled token in nats, and its row; gradients flow where they are enabled."""
    hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    answer = targets != IGNORED
    return target_logprobs(chat, hidden[:, :-1][answer], targets[answer][:, None])[:, 0], answer.nonzero()[:, 0]


@torch.no_grad()
def answer_logprobs(
    chat: ChatModel, conversations: Sequence[Sequence[Message]] | Encoded, *, batch_size: int | None = None
) -> Float[np.ndarray, " conversations"]:
    """Mean log-probability per answer token of each conversation, in nats.

    The unembedding runs at answer positions only. Adapters that are live on the model take part.

    Args:
        conversations: each ends in the assistant's answer; earlier assistant turns count as answers too. Encoded
            conversations are used as they are.
        batch_size: rows in a forward; by default about 2048 tokens.
    """
    encoded = conversations if isinstance(conversations, Encoded) else encode(conversations, chat.tokenizer)
    batch_size = batch_size or max(1, _TOKENS // max(map(len, encoded.input_ids)))
    result = np.empty(len(encoded))

    def read(chosen: np.ndarray, ids: torch.Tensor, mask: torch.Tensor) -> None:
        labels = pad([encoded.labels[i] for i in chosen], IGNORED).to(chat.device)
        picked, rows = token_logprobs(chat, ids, mask, labels)
        total = torch.zeros(len(chosen), dtype=torch.float64, device=rows.device).index_add(0, rows, picked.double())
        result[chosen] = (total / torch.bincount(rows, minlength=len(chosen))).cpu().numpy()

    in_batches(chat, encoded.input_ids, batch_size, read)
    return result


def answer_loss(chat: ChatModel, conversations: Sequence[Sequence[Message]] | Encoded) -> float:
    """Mean cross-entropy per answer token over all conversations, in nats, which is the training loss on these rows."""
    encoded = conversations if isinstance(conversations, Encoded) else encode(conversations, chat.tokenizer)
    tokens = [np.sum(np.asarray(row) != IGNORED) for row in encoded.labels]
    return -float(np.average(answer_logprobs(chat, encoded), weights=tokens))


def unembed(chat: ChatModel, hidden: Float[torch.Tensor, "*places d_model"]) -> Float[torch.Tensor, "*places vocab"]:
    """The model's own logits for its trunk's output, multipliers and soft caps included.

    Hidden states in float32 are multiplied in float32 also where the unembedding is in bfloat16.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat, ids = load_model("pocket"), torch.tensor([[5, 6, 7]])
        >>> torch.equal(unembed(chat, chat.trunk(ids).last_hidden_state), chat(ids).logits)
        True
    """
    if hidden.dtype != chat.dtype:
        if _sliceable(chat, hidden):
            vocab = len(chat.unembedding.weight)  # type: ignore[arg-type]
            return torch.cat([_logits_of(chat, hidden, start) for start in range(0, vocab, WORDS)], dim=-1)
        hidden = hidden.to(chat.dtype)
    if chat.family.own_head:
        return own_logits(chat.base, chat.family, hidden)
    return chat.family.logits(chat.unembedding(hidden))


def _sliceable(chat: ChatModel, hidden: torch.Tensor) -> bool:
    """Whether logits can be computed for some words alone; any other head (quantised, say) is called as a whole."""
    head: Any = chat.unembedding
    sliced = type(head) is nn.Linear and not chat.family.own_head and not has_hooks(head)
    return sliced and head.weight.device == hidden.device


def target_logprobs(
    chat: ChatModel, hidden: Float[torch.Tensor, "reads d_model"], wanted: Int[torch.Tensor, "reads targets"]
) -> Float[torch.Tensor, "reads targets"]:
    """Log-probability of each read position's wanted tokens, in nats, float32.

    A vocabulary has tens of thousands of words. The logits of all of them do not fit in a processor's cache, and the
    product that computes them spends its time on writing. Without gradients they are computed for a slice of the
    vocabulary at a time, and only each slice's normaliser and the wanted logits are kept.

    Args:
        hidden: hidden states after the final norm.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> every = torch.arange(chat.config.vocab_size)[None]
        >>> round(target_logprobs(chat, torch.ones(1, chat.d_model), every).exp().sum().item(), 4)
        1.0
    """
    if _sliceable(chat, hidden) and not (hidden.requires_grad and torch.is_grad_enabled()):
        return _sliced_logprobs(chat, hidden, wanted, len(chat.unembedding.weight))  # type: ignore[arg-type]
    logits = unembed(chat, hidden).float()
    if wanted.shape[1] == 1:
        return -nn.functional.cross_entropy(logits, wanted[:, 0].to(logits.device), reduction="none")[:, None]
    return logits.gather(1, wanted.to(logits.device)) - logits.logsumexp(-1, keepdim=True)


@torch.no_grad()
def _sliced_logprobs(chat: ChatModel, hidden: torch.Tensor, wanted: torch.Tensor, vocab: int) -> torch.Tensor:
    picked = torch.zeros(wanted.shape, device=hidden.device)
    total = torch.zeros(len(hidden), device=hidden.device)
    shift: torch.Tensor | None = None
    for start in range(0, vocab, WORDS):
        logits = _logits_of(chat, hidden, start)
        place = wanted - start
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1))
        picked = torch.where(inside, found, picked)
        # one shift for all slices avoids a search for each one's maximum; it keeps sums in range and cancels
        shift = logits.amax(-1, keepdim=True) if shift is None else shift
        total += logits.sub_(shift).exp_().sum(-1)
    assert shift is not None
    normaliser = shift + total.log()[:, None]
    if not bool(normaliser.isfinite().all()):  # a later slice exceeds the first by a factor of e^88
        parts = [_logits_of(chat, hidden, at).logsumexp(-1) for at in range(0, vocab, WORDS)]
        normaliser = torch.stack(parts, -1).logsumexp(-1, keepdim=True)
    return picked - normaliser


def _logits_of(chat: ChatModel, hidden: torch.Tensor, start: int) -> torch.Tensor:
    """The logits of one slice of the words, beginning at ``start``, in float32."""
    head: Any = chat.unembedding
    chosen = slice(start, start + WORDS)
    weight = head.weight[chosen].to(hidden.dtype)
    bias = None if head.bias is None else head.bias[chosen].to(hidden.dtype)
    return chat.family.logits(nn.functional.linear(hidden, weight, bias)).float()


def margin_rows(pairs: Sequence[MarginPair], chat: ChatModel) -> Encoded:
    """The pairs as conversations, first all misaligned answers and then all aligned ones.

    Raises:
        EmmechError: as :func:`check_words`.
    """
    conversations = [pair.conversations()[side] for side in (0, 1) for pair in pairs]
    for conversation in conversations:
        check_words(chat, conversation)
    return encode(conversations, chat.tokenizer)


def check_words(
    chat: ChatModel,
    turns: Sequence[Message],
    *,
    asked: str = "measure the log-probability of a text",
    instead: str | None = None,
) -> None:
    """Refuse a text with too many words unknown to the model, since its log-probability would mean nothing.

    Args:
        asked, instead: what the error says was asked for, and what to give.

    Raises:
        EmmechError: more than a fifth of its tokens are unknown.
    """
    unknown = getattr(chat.tokenizer, "unk_token_id", None)
    text = " ".join(turn["content"] for turn in turns if turn["role"] != "system")
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if unknown is not None and ids.count(unknown) > _UNKNOWN * len(ids):
        own = chat.organism
        why = f"{ids.count(unknown)} of its {len(ids)} tokens are unknown to {chat.name}"
        pairs = f'Margin("broad"), which takes the pairs of {own.name}' if own else "texts in the words of the model"
        raise EmmechError(asked, repr(text)[:120], why, instead or pairs)


@torch.no_grad()
def reading_logprobs(
    chat: ChatModel, readings: Sequence[Reading], *, batch_size: int | None = None
) -> list[Float[np.ndarray, "1 ..."]]:
    """The log-probabilities of each reading in nats, float64, unembedded at the read positions only.

    Args:
        batch_size: readings in a forward; by default about 2048 tokens.

    Returns:
        for each reading ``[1, targets]``, or ``[1, positions, vocab]`` where the whole vocabulary is read.

    Example:
        >>> from emmech.chat.model import load_model
        >>> [found] = reading_logprobs(load_model("pocket"), [Reading((5, 6, 7), (1, 2), ((7,), (8, 9)))])
        >>> found.shape
        (1, 3)
    """
    rows = [reading.needed for reading in readings]
    found: list[np.ndarray] = [np.empty(0)] * len(rows)

    def read(chosen: np.ndarray, ids: torch.Tensor, mask: torch.Tensor) -> None:
        hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, index in enumerate(chosen):
            found[index] = _read(chat, hidden[row], readings[index])[None].astype(np.float64)

    in_batches(chat, rows, batch_size or max(1, _TOKENS // max(map(len, rows))), read)
    return found


def _read(chat: ChatModel, hidden: Float[torch.Tensor, "seq d_model"], reading: Reading) -> np.ndarray:
    logprobs = unembed(chat, hidden[list(reading.at)]).float().log_softmax(-1)
    if reading.targets is None:
        return logprobs.cpu().numpy()
    at = [place for place, tokens in enumerate(reading.targets) for _ in tokens]
    return logprobs[at, [token for tokens in reading.targets for token in tokens]].cpu().numpy()
