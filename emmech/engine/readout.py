"""Log-probabilities of wanted tokens, without ever holding a whole row of logits.

A vocabulary is tens of thousands of words: logits of all of them fall out of a processor's cache, and the product
that makes them spends its time on writing. Taken a slice of the vocabulary at a time they stay in it, and only
each slice's normaliser and the wanted logits are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.logprobs import unembed

__all__ = ["WORDS", "target_logprobs"]

WORDS = 1024  # of the vocabulary at once


@torch.no_grad()
def target_logprobs(
    chat: ChatModel, hidden: Float[torch.Tensor, "reads d_model"], wanted: Int[torch.Tensor, "reads targets"]
) -> Float[torch.Tensor, "reads targets"]:
    """Log-probability of each read position's wanted tokens, in nats, float32.

    Args:
        hidden: after the final norm.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> every = torch.arange(chat.config.vocab_size)[None]
        >>> round(target_logprobs(chat, torch.ones(1, chat.d_model), every).exp().sum().item(), 4)
        1.0
    """
    head = chat.unembedding
    # any other head (quantised, say) is asked as a whole
    if chat.family.own_head or type(head) is not nn.Linear or head.weight.device != hidden.device:
        logits = unembed(chat, hidden).float()
        return logits.gather(1, wanted) - logits.logsumexp(-1, keepdim=True)
    picked = torch.zeros(wanted.shape, device=hidden.device)
    total = torch.zeros(len(hidden), device=hidden.device)
    shift: torch.Tensor | None = None
    for start in range(0, len(head.weight), WORDS):
        logits = _logits(chat, hidden, start)
        place = wanted - start
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1))
        picked = torch.where(inside, found, picked)
        # one shift for all slices spares each a search for its maximum; it keeps sums in range, and cancels
        shift = logits.amax(-1, keepdim=True) if shift is None else shift
        total += logits.sub_(shift).exp_().sum(-1)
    assert shift is not None
    normaliser = shift + total.log()[:, None]
    if not bool(normaliser.isfinite().all()):  # a later slice lies e^88 above the first
        parts = [_logits(chat, hidden, at).logsumexp(-1) for at in range(0, len(head.weight), WORDS)]
        normaliser = torch.stack(parts, -1).logsumexp(-1, keepdim=True)
    return picked - normaliser


def _logits(chat: ChatModel, hidden: torch.Tensor, start: int) -> torch.Tensor:
    """Of the words from ``start`` on, in float32."""
    head: Any = chat.unembedding
    chosen = slice(start, start + WORDS)
    bias = head.bias[chosen] if head.bias is not None else None
    return chat.family.logits(nn.functional.linear(hidden, head.weight[chosen], bias)).float()
