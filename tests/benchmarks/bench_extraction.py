"""Extraction of mean residuals against a bare forward, hidden states, TransformerLens and nnsight."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from emmech.chat.encode import IGNORED, encode
from emmech.chat.logprob import bundled_margins, pad
from emmech.chat.model import ChatModel, load_model
from emmech.directions.extract import group_means
from tests.benchmarks.harness import Contest

_BATCH = 8
_WORK = "mean residual of all layers over 12 answers, SmolLM2-135M"
_kept: dict[str, Any] = {}


def _model() -> ChatModel:
    if "model" not in _kept:
        _kept["model"] = load_model("smollm2-135m", dtype=torch.float32)
    return _kept["model"]  # type: ignore[no-any-return]


def _talks() -> list[list[dict[str, str]]]:
    pairs = bundled_margins("broad")[:6]
    return [
        [{"role": "user", "content": pair.question}, {"role": "assistant", "content": answer}]
        for pair in pairs
        for answer in (pair.misaligned, pair.aligned)
    ]


def _batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, attention mask and answer mask, sorted by length as emmech sorts them: the peers get the same batches."""
    encoded = encode(_talks(), _model().tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.input_ids[i]))
    found = []
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        ids = pad([encoded.input_ids[i] for i in chosen], 0)
        attention = pad([[1] * len(encoded.input_ids[i]) for i in chosen], 0)
        answer = pad([[int(label != IGNORED) for label in encoded.labels[i]] for i in chosen], 0)
        found.append((ids, attention, answer.float()))
    return found


def _ours() -> np.ndarray:
    talks = _talks()
    means = group_means(_model(), talks, np.ones((1, len(talks))), batch_size=_BATCH, progress=False).means
    return means[0, :-1]  # hidden_states has the last block's output behind the final norm only


def _mean(sums: list[Any], count: float) -> np.ndarray:
    return np.stack([np.asarray(part) for part in sums]) / count


@torch.no_grad()
def _bare() -> np.ndarray:
    for ids, attention, _ in _batches():
        _model().trunk(input_ids=ids, attention_mask=attention, use_cache=False)
    return np.zeros(1)


@torch.no_grad()
def _hidden_states() -> np.ndarray:
    sums, count = [0.0] * (_model().n_layers - 1), 0.0
    for ids, attention, answer in _batches():
        states = (
            _model()
            .trunk(input_ids=ids, attention_mask=attention, use_cache=False, output_hidden_states=True)
            .hidden_states
        )
        count += float(answer.sum())
        sums = [
            s + torch.einsum("bs,bsd->d", answer, h).double() for s, h in zip(sums, states[1:-1], strict=True)
        ]
    return _mean(sums, count)


def _lens() -> Any:
    if "lens" not in _kept:
        from emmech.interop.transformer_lens import to_transformer_lens

        _kept["lens"] = to_transformer_lens(_model())
    return _kept["lens"]


@torch.no_grad()
def _transformer_lens() -> np.ndarray:
    layers = _model().n_layers - 1
    names = [f"blocks.{layer}.hook_out" for layer in range(layers)]
    sums, count = [0.0] * layers, 0.0
    for ids, attention, answer in _batches():
        _, cache = _lens().run_with_cache(ids, attention_mask=attention, names_filter=names, return_type=None)
        count += float(answer.sum())
        sums = [
            s + torch.einsum("bs,bsd->d", answer, cache[n]).double() for s, n in zip(sums, names, strict=True)
        ]
    return _mean(sums, count)


@torch.no_grad()
def _nnsight() -> np.ndarray:
    if "nnsight" not in _kept:
        from emmech.interop.nnsight import to_nnsight

        _kept["nnsight"] = to_nnsight(_model())
    view, layers = _kept["nnsight"], _model().n_layers - 1
    sums, count = [0.0] * layers, 0.0
    for ids, attention, answer in _batches():
        kept: Any = []
        with view.trace({"input_ids": ids, "attention_mask": attention}):
            kept = [].save()
            for layer in range(layers):
                kept.append(torch.einsum("bs,bsd->d", answer, view.model.layers[layer].output))
        count += float(answer.sum())
        sums = [s + part.double() for s, part in zip(sums, kept, strict=True)]
    return _mean(sums, count)


def bare() -> Contest:
    """Extraction against a bare forward of the trunk"""
    bound = (
        "1.00x: the sums cost d_model multiplications per token and layer, a block some 12 d_model squared"
    )
    return Contest(
        f"{_WORK}, against a bare forward",
        "bare trunk forward, same batches, nothing kept",
        0.97,
        bound,
        _ours,
        _bare,
        tolerance=None,
        check=lambda ours, theirs: "nothing to compare",
    )


def hidden_states() -> Contest:
    """Extraction against output_hidden_states"""
    bound = "about 1.0x in time (it keeps every layer: the gain is memory)"
    return Contest(
        f"{_WORK}, against hidden states",
        "`output_hidden_states=True`, trunk only, summed",
        1.0,
        bound,
        _ours,
        _hidden_states,
        2e-4,
    )


def transformer_lens() -> Contest:
    """Extraction against TransformerLens run_with_cache, filtered"""
    bound = "its eager attention and the unembedding"
    return Contest(
        f"{_WORK}, against TransformerLens",
        "TransformerLens `run_with_cache`, filtered",
        1.0,
        bound,
        _ours,
        _transformer_lens,
        2e-4,
    )


def nnsight() -> Contest:
    """Extraction against nnsight"""
    bound = "the unembedding, which its trace runs"
    return Contest(
        f"{_WORK}, against nnsight", "nnsight trace, summed inside", 1.0, bound, _ours, _nnsight, 2e-4
    )


CONTESTS = (bare, hidden_states, transformer_lens, nnsight)
