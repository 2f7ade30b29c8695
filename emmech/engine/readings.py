"""Log-probabilities of readings under a chat model as it is: adapters, hooks and interventions take part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.edits import announcing
from emmech.chat.model import ChatModel
from emmech.engine.logprobs import pad, unembed
from emmech.engine.packing import Reading

__all__ = ["reading_logprobs"]

_TOKENS = 2048  # in a forward


@torch.no_grad()
def reading_logprobs(
    chat: ChatModel, readings: Sequence[Reading], *, batch_size: int | None = None
) -> list[Float[np.ndarray, "1 ..."]]:
    """The log-probabilities that each reading asks for, in nats, float64.

    Rows are batched by length and padded on the right, which causal attention makes exact; the unembedding runs at the
    read positions only.

    Args:
        batch_size: readings in a forward; by default about 2048 tokens.

    Returns:
        per reading ``[1, targets]``, or ``[1, positions, vocab]`` where the whole vocabulary is read.

    Example:
        >>> from emmech.chat.model import load_model
        >>> [found] = reading_logprobs(load_model("pocket"), [Reading((5, 6, 7), (1, 2), ((7,), (8, 9)))])
        >>> found.shape
        (1, 3)
    """
    rows = [reading.needed for reading in readings]
    batch_size = batch_size or max(1, _TOKENS // max(map(len, rows)))
    order = np.argsort([len(ids) for ids in rows], kind="stable")
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    was_training = chat.base.training
    chat.base.eval()
    try:
        for chosen in np.array_split(order, max(1, -(-len(order) // batch_size))):
            ids = pad([rows[i] for i in chosen], 0).to(chat.device)
            mask = pad([[1] * len(rows[i]) for i in chosen], 0).to(chat.device)
            with announcing(torch.from_numpy(chosen), len(order)):
                hidden = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for row, index in enumerate(chosen):
                found[index] = _read(chat, hidden[row], readings[index])[None].astype(np.float64)
    finally:
        chat.base.train(was_training)
    return found


def _read(chat: ChatModel, hidden: Float[torch.Tensor, "seq d_model"], reading: Reading) -> np.ndarray:
    logprobs = unembed(chat, hidden[list(reading.at)]).float().log_softmax(-1)
    if reading.targets is None:
        return logprobs.cpu().numpy()
    at = [place for place, tokens in enumerate(reading.targets) for _ in tokens]
    return logprobs[at, [token for tokens in reading.targets for token in tokens]].cpu().numpy()
