"""Mean residuals of groups of answers, at all layers, in one streaming pass.

Only running sums are kept: a hook on each block reduces its output to one masked sum per answer on the spot, and
the sums go in float64 into as many groups as are asked for. Nothing else survives a block, the unembedding never
runs, and so the pass costs what a bare forward of the trunk costs, in time and in memory.

The masked tokens are exactly the answers (content and end-of-turn token, never the header), as in "Convergent Linear
Representations of Emergent Misalignment" (arXiv 2506.11618).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from emmech.chat.encode import IGNORED, encode
from emmech.chat.masks import Tokens, token_mask, tokens_name
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.engine.modules import hooked
from emmech.engine.stream import stream
from emmech.errors import EmmechError
from emmech.progress import bar

__all__ = ["GroupMeans", "answer_means", "group_means", "match_lengths", "mixed_adapter", "token_projections"]

Conversation = Sequence[Message]


@dataclass(frozen=True)
class GroupMeans:
    """Mean residuals by group.

    Args:
        means: ``[groups, layers, d_model]`` float64.
        totals: ``[groups]`` the summed weights: answer tokens, or answers.
        answer_tokens: ``[conversations]`` answer tokens of each conversation.
    """

    means: Float[np.ndarray, "groups layers d_model"]
    totals: Float[np.ndarray, " groups"]
    answer_tokens: Int[np.ndarray, " conversations"]


def group_means(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    weights: Float[np.ndarray, "groups conversations"],
    *,
    average: Literal["token", "answer"] = "token",
    tokens: Tokens = "answer",
    adapter_scales: Float[np.ndarray, " conversations"] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> GroupMeans:
    """Weighted mean residual of every block's output over answer tokens, for any number of groups at once.

    Args:
        conversations: each with at least one assistant turn; all assistant turns count.
        weights: ``[groups, conversations]``, 0 or 1 for plain groups; random halves, shuffled labels and bootstrap
            resamples are more groups of the same pass.
        average: ``"token"`` weighs every answer token alike (long answers count more), ``"answer"`` every answer.
        tokens: those of the answers, of the prompt (everything else: system and user turns, headers), all, or a
            function of the token ids (:mod:`emmech.chat.masks`).
        adapter_scales: a factor on the live adapter for each conversation, so that rows of the base model (0) and of
            the fine-tuned one (1) share batches; by default all 1.
        max_length: tokens kept of each conversation.

    Raises:
        EmmechError: weights of the wrong shape, an empty group, or a conversation without answer tokens.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
        >>> group_means(chat, [talk], np.ones((1, 1))).means.shape == (1, chat.n_layers, chat.d_model)
        True
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(conversations):
        raise EmmechError(
            "average over groups of answers",
            f"weights {list(weights.shape)} for {len(conversations)} conversations",
            "there is one row per group and one column per conversation",
            f"weights [groups, {len(conversations)}]",
        )
    rows = _rows(chat, conversations, tokens, max_length)
    counts = np.array([sum(mask) for _, mask in rows], dtype=np.int64)
    per_row = weights if average == "token" else weights / counts
    totals = (per_row * counts).sum(1)
    if (totals == 0).any():
        raise EmmechError(
            "average over groups of answers",
            f"group {int(np.flatnonzero(totals == 0)[0])} of {len(weights)}",
            "no answer belongs to it, and a mean over nothing is not a number",
            "more samples, or another split",
        )
    # one float64 matrix per layer, on that layer's device (a sharded model has several)
    sums: list[Any] = [0.0] * chat.n_layers

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        share = torch.from_numpy(per_row[:, chosen]).to(output.device)
        sums[layer] = sums[layer] + share @ _masked_sum(output, mask).double()

    _stream(chat, rows, reduce, adapter_scales, batch_size, progress)
    stacked = torch.stack([torch.as_tensor(part).cpu() for part in sums], dim=1).numpy()
    return GroupMeans(stacked / totals[:, None, None], totals, counts)


def answer_means(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    *,
    layers: Sequence[int] | None = None,
    tokens: Tokens = "answer",
    adapter_scales: Float[np.ndarray, " conversations"] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Float[np.ndarray, "conversations layers d_model"]:
    """Each conversation's own mean residual over its answer tokens, float32, for methods that need samples.

    This keeps ``conversations * layers * d_model`` numbers: choose ``layers`` on a large model.
    """
    rows = _rows(chat, conversations, tokens, max_length)
    counts = np.array([sum(mask) for _, mask in rows], dtype=np.int64)
    kept = tuple(range(chat.n_layers)) if layers is None else tuple(layers)
    for layer in kept:
        chat.check_layer(layer)
    result = np.empty((len(rows), len(kept), chat.d_model), dtype=np.float32)
    place = {layer: index for index, layer in enumerate(kept)}

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        if layer in place:
            summed = _masked_sum(output, mask).cpu().numpy()
            result[chosen, place[layer]] = summed / counts[chosen, None]

    _stream(chat, rows, reduce, adapter_scales, batch_size, progress)
    return result


def token_projections(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    vectors: Float[np.ndarray, "layers d_model"],
    *,
    tokens: Tokens = "answer",
    adapter_scales: Float[np.ndarray, " conversations"] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[tuple[Int[np.ndarray, " tokens"], Float[np.ndarray, "tokens layers"]], ...]:
    """Inner product of every chosen token's residual with one vector per layer.

    Returns:
        for each conversation its chosen tokens' ids ``[tokens]`` and the projections ``[tokens, layers]``.
    """
    rows = _rows(chat, conversations, tokens, max_length)
    ids = [np.array([t for t, m in zip(*row, strict=True) if m], dtype=np.int64) for row in rows]
    values = [np.empty((len(own), chat.n_layers), dtype=np.float32) for own in ids]
    axes = torch.from_numpy(np.asarray(vectors, dtype=np.float32).copy())

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        projected = (output @ axes[layer].to(output)).float()
        for row, inside, index in zip(projected, mask.bool(), chosen, strict=True):
            values[index][:, layer] = row[inside].cpu().numpy()

    _stream(chat, rows, reduce, adapter_scales, batch_size, progress)
    return tuple(zip(ids, values, strict=True))


def match_lengths(
    lengths: Sequence[int] | Int[np.ndarray, " answers"],
    labels: Sequence[bool] | Shaped[np.ndarray, " answers"],
    *,
    caliper: float = 0.15,
    seed: int = 0,
) -> Int[np.ndarray, " kept"]:
    """Indices of a subset in which every answer has a partner of like length in the other class.

    The smaller class is gone through at random; each answer takes the nearest free one of the other, if that is within
    ``caliper`` of its length. Aligned and misaligned answers differ in length in the public data, and a mean difference
    picks that up.

    Args:
        lengths: ``[answers]``, in characters or tokens.
        labels: ``[answers]``, the class.
        caliper: the largest relative difference between partners.

    Example:
        >>> kept = match_lengths([5, 5, 5, 50], [True, False, False, True])
        >>> np.asarray([5, 5, 5, 50])[kept].tolist()
        [5, 5]
    """
    size, label = np.log(np.maximum(np.asarray(lengths, dtype=np.float64), 1)), np.asarray(labels, dtype=bool)
    few, many = sorted((np.flatnonzero(label), np.flatnonzero(~label)), key=len)
    free = np.ones(len(many), dtype=bool)
    kept: list[int] = []
    for answer in np.random.default_rng(seed).permutation(few).tolist():
        gap = np.where(free, np.abs(size[many] - size[answer]), np.inf)
        partner = int(np.argmin(gap))
        if gap[partner] <= np.log1p(caliper):
            free[partner] = False
            kept += [answer, int(many[partner])]
    return np.sort(np.array(kept, dtype=np.int64))


@contextmanager
def mixed_adapter(chat: ChatModel, scales: torch.Tensor) -> Iterator[None]:
    """Give every batch row its own factor ``[batch]`` on the live adapters: 0 is the base model, exactly.

    PEFT adds ``scaling * lora_B(lora_A(x))`` to the layer's output, so a factor on lora_B's output is a factor
    on the adapter. The rows of one batch then come from different models at the price of one.
    """
    from emmech.engine.adapters import adapter_layers

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * scales.to(output).reshape(-1, *[1] * (output.ndim - 1))

    with hooked(*((layer.lora_B[name], hook) for _, layer, name in adapter_layers(chat.model))):
        yield


def _rows(
    chat: ChatModel, conversations: Sequence[Conversation], tokens: Tokens, max_length: int | None
) -> list[tuple[list[int], list[bool]]]:
    encoded = encode(conversations, chat.tokenizer, max_length=max_length)
    if len(encoded) != len(conversations):
        raise EmmechError(
            "extract from the answers",
            f"{len(conversations)} conversations, max_length={max_length}",
            f"{encoded.emptied} of them have no answer token within max_length",
            "raise max_length, or leave those conversations out",
        )
    rows = [
        (ids, token_mask(tokens, ids, [label != IGNORED for label in labels]))
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    without = [index for index, (_, mask) in enumerate(rows) if not any(mask)]
    if without:
        raise EmmechError(
            "choose the tokens to average over",
            f"tokens={tokens_name(tokens)}: none in conversation {without[0]} of {len(rows)}",
            "a mean over nothing is not a number",
            "tokens that every conversation has",
        )
    return rows


def _stream(
    chat: ChatModel,
    rows: Sequence[tuple[list[int], list[bool]]],
    reduce: Callable[[int, torch.Tensor, torch.Tensor, np.ndarray], None],
    adapter_scales: Any,
    batch_size: int,
    progress: bool,
) -> None:
    """Run the trunk once over all rows, handing each block's output, the answer mask and the rows to ``reduce``."""
    with bar(len(rows), "extracting", progress=progress) as done:

        def each(chosen: np.ndarray, run: Callable[[], object]) -> None:
            if adapter_scales is None:
                run()
            else:
                with mixed_adapter(chat, torch.as_tensor(np.asarray(adapter_scales)[chosen])):
                    run()
            done.update(len(chosen))

        stream(chat, rows, reduce, batch_size=batch_size, each=each)


def _masked_sum(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum ``[batch, seq, d_model]`` over the masked positions into float32 ``[batch, d_model]``."""
    weight = mask.to(output)
    if output.dtype == torch.float32:
        return torch.bmm(weight[:, None], output)[:, 0]  # one pass over memory, no copy
    # a matrix product would round its result to the model's 8 bits; a sum can accumulate in float32
    return torch.sum(output * weight[..., None], dim=1, dtype=torch.float32)
