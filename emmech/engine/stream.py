"""Mean residual of every block over texts, in one pass, keeping no activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.engine.logprobs import pad

__all__ = ["mean_residual", "probe_rows"]


def probe_rows(chat: ChatModel, texts: Sequence[Any]) -> list[tuple[list[int], list[bool]]]:
    """Tokens and the mask of those that count: a conversation's answers, or all of a plain text's question.

    Args:
        texts: conversations (lists of messages), or strings, which are asked as user turns.
    """
    rows = []
    for text in texts:
        if isinstance(text, str):
            ids = chat.token_ids([{"role": "user", "content": text}])
            rows.append((ids, [True] * len(ids)))
        else:
            messages: Sequence[Message] = text["messages"] if isinstance(text, dict) else text
            encoded = encode([messages], chat.tokenizer)
            rows.append((encoded.input_ids[0], [label != IGNORED for label in encoded.labels[0]]))
    return rows


@torch.no_grad()
def mean_residual(
    chat: ChatModel, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, batch_size: int = 8
) -> Float[np.ndarray, "layers d_model"]:
    """Token-weighted mean of each block's output over the masked tokens, ``[layers, d_model]`` float32."""
    totals = torch.zeros(chat.n_layers, chat.d_model, dtype=torch.float64)
    weight: torch.Tensor = torch.empty(0)

    def add(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            # a block's output is the tensor itself; the masked sum is one matrix product, nothing is kept
            summed = weight.to(output) @ output.reshape(-1, output.shape[-1])
            totals[layer] += summed.double().cpu()

        return hook

    handles = [block.register_forward_hook(add(layer)) for layer, block in enumerate(chat.blocks)]
    was_training = chat.base.training
    chat.base.eval()
    count = 0
    try:
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        for start in range(0, len(order), batch_size):
            batch = [rows[index] for index in order[start : start + batch_size]]
            ids = pad([row[0] for row in batch], 0).to(chat.device)
            attention = pad([[1] * len(row[0]) for row in batch], 0).to(chat.device)
            weight = pad([[int(m) for m in row[1]] for row in batch], 0).reshape(-1).to(chat.device)
            count += int(weight.sum())
            chat.trunk(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        chat.base.train(was_training)
    return (totals / max(count, 1)).float().numpy()
