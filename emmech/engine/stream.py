"""Residuals of every block over texts in one pass, reduced at once so that no activation is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel
from emmech.chat.shards import in_shards
from emmech.chat.template import Message
from emmech.engine.logprobs import in_batches, pad
from emmech.engine.modules import hooked

Row = tuple[Sequence[int], Sequence[bool]]  # token ids, and which of them count


def probe_rows(chat: ChatModel, texts: Sequence[Any]) -> list[tuple[list[int], list[bool]]]:
    """Tokens and the mask of those that count, which are a conversation's answers or all of a plain text's question.

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
def stream(
    chat: ChatModel,
    rows: Sequence[Row],
    reduce: Callable[[int, torch.Tensor, torch.Tensor, np.ndarray], object],
    *,
    batch_size: int = 8,
    each: Callable[[np.ndarray, Callable[[], object]], object] = lambda chosen, run: run(),
) -> None:
    """Run the trunk once over all rows and reduce every block's output as it is computed.

    Args:
        reduce: called with the layer, its residual ``[batch, seq, d_model]``, the mask of tokens that count
            ``[batch, seq]`` (0 at padding) and the rows' indices.
        each: called for each batch with the rows' indices and the function that runs it.
    """
    # FSDP gathers the weights of what runs; after part of a model it would keep some of them, and they would age
    forward = chat.model if in_shards(chat.model) else chat.trunk
    mask: torch.Tensor = torch.empty(0)
    now: np.ndarray = np.empty(0)

    def watch(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: (reduce(layer, chat.family.residual(output), mask, now), None)[1]

    def run(chosen: np.ndarray, ids: torch.Tensor, attention: torch.Tensor) -> None:
        nonlocal mask, now
        mask, now = pad([[int(m) for m in rows[i][1]] for i in chosen], 0).to(chat.device), chosen
        each(chosen, lambda: forward(input_ids=ids, attention_mask=attention, use_cache=False))

    with hooked(*((block, watch(layer)) for layer, block in enumerate(chat.blocks))):
        in_batches(chat, [ids for ids, _ in rows], batch_size, run)


def mean_residual(chat: ChatModel, rows: Sequence[Row], *, batch_size: int = 8) -> Float[np.ndarray, "layers d_model"]:
    """Token-weighted mean of each block's output over the tokens that count, ``[layers, d_model]`` float32."""
    totals = torch.zeros(chat.n_layers, chat.d_model, dtype=torch.float64)

    def add(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        # the masked sum is one matrix product
        totals[layer] += (mask.to(output).reshape(-1) @ output.reshape(-1, output.shape[-1])).double().cpu()

    stream(chat, rows, add, batch_size=batch_size)
    return (totals / max(sum(sum(mask) for _, mask in rows), 1)).float().numpy()
