"""Extraction of mean residuals against a bare forward, hidden states, TransformerLens and nnsight."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel, load_model
from emmech.directions.extract import group_means
from emmech.engine.logprobs import bundled_margins, pad
from tests.benchmarks.harness import Contest, Skipped

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
    return means[0, :-1]  # hidden_states has the last block's output after the final norm only


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
        sums = [s + torch.einsum("bs,bsd->d", answer, h).double() for s, h in zip(sums, states[1:-1], strict=True)]
    return _mean(sums, count)


def _lens() -> Any:
    if "lens" not in _kept:
        from emmech.interop.bridges import to_transformer_lens

        _kept["lens"] = to_transformer_lens(_model())
    return _kept["lens"]


@torch.no_grad()
def _transformer_lens(everything: bool = False) -> np.ndarray:
    layers = _model().n_layers - 1
    names = [f"blocks.{layer}.hook_out" for layer in range(layers)]
    wanted = None if everything else names
    sums, count = [0.0] * layers, 0.0
    for ids, attention, answer in _batches():
        _, cache = _lens().run_with_cache(ids, attention_mask=attention, names_filter=wanted, return_type=None)
        count += float(answer.sum())
        sums = [s + torch.einsum("bs,bsd->d", answer, cache[n]).double() for s, n in zip(sums, names, strict=True)]
    return _mean(sums, count)


def _transformer_lens_full() -> np.ndarray:
    return _transformer_lens(everything=True)


@torch.no_grad()
def _nnsight() -> np.ndarray:
    if "nnsight" not in _kept:
        from emmech.interop.bridges import to_nnsight

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


def _texts() -> list[str]:
    return [_model().tokenizer.apply_chat_template(talk, tokenize=False) for talk in _talks()]


def _ours_at_end() -> np.ndarray:
    """Mean difference at the last token, the position that steering-vectors reads."""
    talks = _talks()
    weights = np.stack([np.arange(len(talks)) % 2 == group for group in (0, 1)]).astype(float)
    means = group_means(_model(), talks, weights, tokens=_last, batch_size=_BATCH, progress=False).means
    return means[0] - means[1]


def _last(ids: torch.Tensor, start: int) -> torch.Tensor:
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -1] = True
    return mask


def _steering_vectors() -> np.ndarray:
    from steering_vectors import train_steering_vector

    texts = _texts()
    found = train_steering_vector(
        _model().model, _model().tokenizer, list(zip(texts[::2], texts[1::2], strict=True)), batch_size=_BATCH
    ).layer_activations
    return np.stack([found[layer].numpy() for layer in range(_model().n_layers)])


def _same_in_layers(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Rounding of either side is that of float32 states, which are ten and more times as long as their difference."""
    off = float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())
    assert off < 3e-5, f"differ by {off:.1e} of a layer's norm"
    return f"within {off:.0e} of each layer's norm"


def _loaded() -> None:
    """The model with all weights in memory: a mapped file is read only where it is touched."""
    for weight in _model().base.parameters():
        weight.sum()


def _alone(peer: Callable[[], np.ndarray], ours: Callable[[], np.ndarray] = _ours) -> tuple[str, str, str]:
    return f"{__name__}:_loaded", f"{__name__}:{ours.__name__}", f"{__name__}:{peer.__name__}"


def bare() -> Contest:
    """Extraction against a bare forward of the trunk"""
    bound = "1.00x: the sums cost d_model multiplications per token and layer, a block some 12 d_model squared"
    return Contest(
        f"{_WORK}, against a bare forward",
        "bare trunk forward, same batches, nothing kept",
        0.97,
        bound,
        _ours,
        _bare,
        tolerance=None,
        check=lambda ours, theirs: "nothing to compare",
        alone=_alone(_bare),
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
        alone=_alone(_hidden_states),
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
        alone=_alone(_transformer_lens),
    )


def transformer_lens_full() -> Contest:
    """Extraction against TransformerLens run_with_cache, full"""
    return Contest(
        f"{_WORK}, against TransformerLens' full cache",
        "TransformerLens `run_with_cache`, everything kept",
        1.0,
        "as filtered, and the memory traffic of every activation",
        _ours,
        _transformer_lens_full,
        2e-4,
        alone=_alone(_transformer_lens_full),
    )


def nnsight() -> Contest:
    """Extraction against nnsight"""
    bound = "the unembedding, which its trace runs"
    return Contest(
        f"{_WORK}, against nnsight",
        "nnsight trace, summed inside",
        1.0,
        bound,
        _ours,
        _nnsight,
        2e-4,
        alone=_alone(_nnsight),
    )


def steering_vectors() -> Contest:
    """Extraction against steering-vectors"""
    if not find_spec("steering_vectors"):
        raise Skipped("pip install --no-deps steering-vectors, elsewhere: it is no part of the project")
    return Contest(
        "mean difference of all layers at the last token of 12 answers, SmolLM2-135M, against steering-vectors",
        "`train_steering_vector`, batches of 8, which runs the unembedding and keeps all positions of all layers",
        1.0,
        "the unembedding, as much as 20 % of the arithmetic, and padding: its pairs are not sorted by length",
        _ours_at_end,
        _steering_vectors,
        tolerance=None,
        check=_same_in_layers,
        alone=_alone(_steering_vectors, _ours_at_end),
    )


CONTESTS = (bare, hidden_states, transformer_lens, transformer_lens_full, nnsight, steering_vectors)
