"""Teacher-forced log-probabilities of answers, and the judge-free margin built on them.

The margin of misaligned over aligned answers needs no sampling and no judge: it is the order parameter of
choice for models that are too small to answer coherently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.edits import announcing
from emmech.chat.encode import IGNORED, Encoded, encode
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.errors import EmmechError

__all__ = ["MarginPair", "answer_logprobs", "answer_loss", "bundled_margins", "margin_rows", "pad"]


@dataclass(frozen=True)
class MarginPair:
    """One question with a misaligned and an aligned answer of like length."""

    question: str
    misaligned: str
    aligned: str


def bundled_margins(kind: str) -> tuple[MarginPair, ...]:
    """The hand-written held-out pairs that come with emmech: ``kind`` is ``"narrow"`` or ``"broad"``."""
    import json

    source = resources.files("emmech") / "data" / "silly_margins.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = tuple(MarginPair(r["question"], r["misaligned"], r["aligned"]) for r in rows if r["kind"] == kind)
    if not pairs:
        raise EmmechError("find margin pairs", f"kind={kind!r}", "there are none of that kind", "narrow or broad")
    return pairs


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Stack ragged rows into ``[batch, seq]``, filled with ``value`` on one side."""
    width = max(len(row) for row in rows)
    filled = [
        [value] * (width - len(row)) + list(row) if left else list(row) + [value] * (width - len(row)) for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


@torch.no_grad()
def answer_logprobs(
    chat: ChatModel, conversations: Sequence[Sequence[Message]] | Encoded, *, batch_size: int | None = None
) -> Float[np.ndarray, " conversations"]:
    """Mean log-probability per answer token of each conversation, in nats.

    The unembedding runs at answer positions only; rows are batched by length and right-padded, which causal
    attention makes exact. Whatever adapter is live on the model takes part.

    Args:
        conversations: each ends in the assistant's answer; earlier assistant turns count as answers too. Encoded
            ones are used as they are.
        batch_size: rows in a forward; by default about 2048 tokens.
    """
    encoded = conversations if isinstance(conversations, Encoded) else encode(conversations, chat.tokenizer)
    batch_size = batch_size or max(1, 2048 // max(len(ids) for ids in encoded.input_ids))
    order = np.argsort([len(ids) for ids in encoded.input_ids], kind="stable")
    result = np.empty(len(order))
    was_training = chat.base.training
    chat.base.eval()
    try:
        for chosen in np.array_split(order, max(1, -(-len(order) // batch_size))):
            ids = pad([encoded.input_ids[i] for i in chosen], 0).to(chat.device)
            labels = pad([encoded.labels[i] for i in chosen], IGNORED).to(chat.device)
            mask = pad([[1] * len(encoded.input_ids[i]) for i in chosen], 0).to(chat.device)
            with announcing(torch.from_numpy(chosen), len(order)):
                hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            targets = labels[:, 1:]
            answer = targets != IGNORED
            logits = unembed(chat, hidden[:, :-1][answer])
            picked = logits.float().log_softmax(-1).gather(-1, targets[answer][:, None])[:, 0]
            rows = answer.nonzero()[:, 0]
            total = torch.zeros(len(chosen), dtype=torch.float64, device=rows.device)
            total = total.index_add(0, rows, picked.double())
            result[chosen] = (total / answer.sum(1)).cpu().numpy()
    finally:
        chat.base.train(was_training)
    return result


def answer_loss(chat: ChatModel, conversations: Sequence[Sequence[Message]] | Encoded) -> float:
    """Mean cross-entropy per answer token over all conversations, in nats: the training loss, on other rows."""
    encoded = conversations if isinstance(conversations, Encoded) else encode(conversations, chat.tokenizer)
    tokens = [np.sum(np.asarray(row) != IGNORED) for row in encoded.labels]
    return -float(np.average(answer_logprobs(chat, encoded), weights=tokens))


def unembed(chat: ChatModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[..., vocab]`` of residuals that already passed the final norm, soft-capped where the model is."""
    return cap(chat, chat.unembedding(hidden))


def cap(chat: ChatModel, logits: torch.Tensor) -> torch.Tensor:
    """Logits soft-capped where the model soft-caps them."""
    most = getattr(chat.config, "final_logit_softcapping", None)
    return torch.tanh(logits / most) * most if most else logits


def margin_rows(pairs: Sequence[MarginPair], tokenizer: Any) -> Encoded:
    """The pairs as conversations: all misaligned answers, then all aligned ones."""
    answers = [(p.question, p.misaligned) for p in pairs] + [(p.question, p.aligned) for p in pairs]
    return encode(
        [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in answers
        ],
        tokenizer,
    )
