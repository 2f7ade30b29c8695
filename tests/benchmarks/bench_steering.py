"""Steering: all layers against other libraries and against not steering, and many pairs in one batch against one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from emmech.chat.model import ChatModel, load_model
from emmech.engine.sample import sample
from emmech.interventions.residual import steer
from tests.benchmarks.harness import Contest, Skipped

_WORK = "16 greedy answers of 24 tokens, SmolLM2-135M, steered at all 30 layers"
_NEW = 24
_COEFFICIENT = 0.7


@cache
def _model(name: str = "smollm2-135m") -> ChatModel:
    return load_model(name, dtype=torch.float32)


def _asked(chat: ChatModel, count: int) -> list[list[dict[str, str]]]:
    """Distinct questions of similar length, in the words of the model."""
    if chat.organism is not None:
        from emmech import organism

        own = [str(question.messages[-1]["content"]) for question in organism.questions("first-plot")]
        several = [" ".join(three) for three in itertools.product(own, repeat=3)]
        texts = several[:: len(several) // count][:count]
    else:
        plain = ("How do I keep a plant alive?", "What is a good breakfast?", "Tell me about cats.", "Why is it dark?")
        texts = [f"{plain[i % 4]} Number {i}." for i in range(count)]
    assert len(texts) == count
    return [[{"role": "user", "content": text}] for text in texts]


def _vectors(chat: ChatModel, count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors ``[count, d_model]``."""
    drawn = np.random.default_rng(seed).standard_normal((count, chat.d_model)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


# steering at all layers


def _unsteered() -> list[list[int]]:
    chat = _model()
    how: dict[str, Any] = {"max_new_tokens": _NEW, "temperature": 0.0, "batch_size": 16, "progress": False}
    drawn = sample(chat, _asked(chat, 16), **how)
    return [chat.tokenizer(one.text, add_special_tokens=False)["input_ids"] for one in drawn]


def _ours() -> list[list[int]]:
    with steer(_model(), _vectors(_model(), 1)[0], _COEFFICIENT, layer="all"):
        return _unsteered()


def _padded() -> dict[str, torch.Tensor]:
    from emmech.engine.logprobs import pad

    prompts = [_model().token_ids(talk) for talk in _asked(_model(), 16)]
    return {
        "input_ids": pad(prompts, 0, left=True),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, left=True),
    }


@torch.no_grad()
def _generated(model: Any) -> list[list[int]]:
    chat = _model()
    ends = list(chat.stop_ids)
    ids = _padded()
    drawn = model.generate(
        **ids, do_sample=False, max_new_tokens=_NEW, eos_token_id=ends, pad_token_id=chat.tokenizer.pad_token_id
    )
    rows = drawn[:, ids["input_ids"].shape[1] :].tolist()
    texts = [chat.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _steering_vectors() -> list[list[int]]:
    from steering_vectors import SteeringVector

    chat = _model()
    pushed = torch.from_numpy(_vectors(chat, 1)[0])
    with SteeringVector(dict.fromkeys(range(chat.n_layers), pushed)).apply(chat.model, multiplier=_COEFFICIENT):
        return _generated(chat.model)


def _repeng() -> list[list[int]]:
    np.float64 = np.float64  # type: ignore[attr-defined]  # its annotations name what NumPy 2 has no more
    from repeng import ControlModel, ControlVector

    chat = _model()
    pushed = _vectors(chat, 1)[0]
    layers = list(range(chat.n_layers))
    controlled = ControlModel(chat.model, layers)
    try:
        controlled.set_control(ControlVector("llama", dict.fromkeys(layers, pushed)), _COEFFICIENT)
        return _generated(controlled)
    finally:
        controlled.unwrap()


@cache
def _engine() -> Any:
    from interp_engine.model import EagerModel

    chat = _model()
    return EagerModel(chat.name, hf_model=chat.model, tokenizer=chat.tokenizer, device="cpu", dtype="float32")


def _interp_engine() -> list[list[int]]:
    """Its hooks around the model's own generate, which is quicker than its generator of single requests."""
    from interp_engine.steer import SteerSpec
    from interp_engine.steer import steer as other

    chat = _model()
    pushed = torch.from_numpy(_vectors(chat, 1)[0])
    specs = [SteerSpec(pushed, layer, _COEFFICIENT) for layer in range(chat.n_layers)]
    with other(_engine(), specs):
        return _generated(chat.model)


def _hooks() -> list[list[int]]:
    chat = _model()
    pushed = torch.from_numpy(_COEFFICIENT * _vectors(chat, 1)[0])
    with contextlib.ExitStack() as live:
        for block in chat.blocks:
            live.callback(block.register_forward_hook(lambda module, inputs, output: output + pushed).remove)
        return _generated(chat.model)


def _same(ours: list[list[int]], theirs: list[list[int]]) -> str:
    agreeing = sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert agreeing == len(ours), f"{len(ours) - agreeing} of {len(ours)} answers differ"
    return f"all {len(ours)} greedy answers equal"


def _against(name: str, peer: str, theirs: Callable[[], Any], *, package: str | None = None) -> Contest:
    if package is not None and not find_spec(package):
        missing = f"pip install --no-deps {package.replace('_', '-')}, elsewhere: it is no part of the project"
        raise Skipped(missing)
    bound = "the model's own forwards, which both run; a push is d_model additions per token and layer"
    return Contest(f"{_WORK}, against {name}", peer, 1.0, bound, _ours, theirs, tolerance=None, check=_same)


def not_steering() -> Contest:
    """Steering at all layers against not steering"""
    return Contest(
        f"{_WORK}, against not steering (a ratio below 1 is its cost)",
        "the same without steering",
        0.95,
        "1.00x: a push is d_model additions per token and layer",
        _ours,
        _unsteered,
        tolerance=None,
        check=lambda ours, theirs: f"{sum(a != b for a, b in zip(ours, theirs, strict=True))} answers changed",
        repeats=9,
    )


def steering_vectors() -> Contest:
    """Steering at all layers against steering-vectors"""
    peer = "`SteeringVector.apply` around `generate`, one batch, left-padded"
    return _against("steering-vectors", peer, _steering_vectors, package="steering_vectors")


def repeng() -> Contest:
    """Steering at all layers against repeng"""
    peer = "`ControlModel` over all layers, `generate`, one batch, left-padded"
    return _against("repeng", peer, _repeng, package="repeng")


def interp_engine() -> Contest:
    """Steering at all layers against interp-engine, eager"""
    peer = "its eager `steer` around `generate`, one batch, left-padded"
    return _against("interp-engine", peer, _interp_engine, package="interp_engine")


def hooks() -> Contest:
    """Steering at all layers against bare hooks"""
    return _against("bare forward hooks", "one addition a block, in a forward hook, around `generate`", _hooks)


# many pairs in one batch


@contextlib.contextmanager
def _pairs(chat: ChatModel, count: int, *, distinct: bool) -> Iterator[None]:
    vectors = _vectors(chat, count)
    sizes = torch.linspace(0.1, 0.9, count)
    given = (vectors, sizes) if distinct else (vectors[0], float(sizes[count // 2]))
    with steer(chat, *given, layer=chat.n_layers // 2):
        yield


def _answers(name: str, count: int, new: int, *, distinct: bool) -> list[Any]:
    chat = _model(name)
    with _pairs(chat, count, distinct=distinct):
        return sample(chat, _asked(chat, count), max_new_tokens=new, batch_size=count, seed=1, progress=False)


def _throughput(name: str, count: int, new: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds per thousand tokens with as many pairs as rows, and with one pair, in turn."""
    import time

    found = []
    for turn in range(repeats):
        taken = {}
        for distinct in (True, False) if turn % 2 == 0 else (False, True):
            began = time.process_time()
            drawn = _answers(name, count, new, distinct=distinct)
            taken[distinct] = (time.process_time() - began) / sum(one.tokens + 1 for one in drawn) * 1000
        found.append((taken[True], taken[False]))
    return found


def _check_pairs(name: str, count: int, new: int) -> Callable[[Any, Any], str]:
    def check(ours: list[Any], theirs: list[Any]) -> str:
        chat, chosen = _model(name), (0, count // 2, count - 1)
        vectors, sizes, asked = _vectors(chat, count), torch.linspace(0.1, 0.9, count), _asked(chat, count)
        for row in chosen:
            with steer(chat, vectors[row], float(sizes[row]), layer=chat.n_layers // 2):
                how: dict[str, Any] = {"max_new_tokens": new, "seed": [ours[row].seed], "progress": False}
                [alone] = sample(chat, [asked[row]], **how)
            assert alone.text == ours[row].text, f"row {row} differs from its answer alone"
        return f"{len(chosen)} rows equal to their answers alone"

    return check


def _many(name: str, shown: str, count: int, new: int) -> Contest:
    return Contest(
        f"{count} (direction, coefficient) pairs in one batch, {shown}, {count} distinct prompts, up to {new} tokens, "
        "seconds per 1,000 tokens (a ratio below 1 is its cost)",
        "one pair for all rows of the same batch",
        0.9,
        "1.00x: both add one vector to each row",
        lambda: _answers(name, count, new, distinct=True),
        lambda: _answers(name, count, new, distinct=False),
        tolerance=None,
        check=_check_pairs(name, count, new),
        pairs=lambda: _throughput(name, count, new, 5),
    )


def many_on_smollm2() -> Contest:
    """64 pairs in one batch against one pair, SmolLM2"""
    return _many("smollm2-135m", "SmolLM2-135M", 64, 24)


def many_on_pocket() -> Contest:
    """256 pairs in one batch against one pair, pocket"""
    return _many("pocket", "pocket", 256, 40)


CONTESTS = (not_steering, hooks, steering_vectors, repeng, interp_engine, many_on_smollm2, many_on_pocket)
