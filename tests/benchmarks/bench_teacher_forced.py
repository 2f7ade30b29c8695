"""Teacher-forced sweeps against PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emmech.chat.families import find_family
from emmech.chat.model import ChatModel
from emmech.engine.modules import with_module
from emmech.engine.packing import Reading
from emmech.measures.measure import Value
from emmech.run.run import Run
from emmech.store import MemorySeries
from emmech.sweeps.jobs import _CPU_TOKENS
from emmech.sweeps.sweep import sweep
from tests.benchmarks.harness import Contest, arithmetic, equal, speed

VOCAB = 151_936
_kept: dict[str, ChatModel] = {}


def half_billion() -> ChatModel:
    """Random weights in the shape of Qwen2.5-0.5B, float32."""
    if "0.5B" not in _kept:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        made = Qwen2ForCausalLM(config).eval()
        _kept["0.5B"] = ChatModel(made, None, "0.5B shape", find_family(made))
    return _kept["0.5B"]


def random_run(chat: ChatModel, layer: int, steps: int, seed: int = 0) -> Run:
    """Rank-1 adapters on ``down_proj``, of the size that trained ones have."""
    rng = np.random.default_rng(seed)
    name = f"layers.{layer}.mlp.down_proj"
    info = {
        "name": name,
        "layer": layer,
        "module": f"model.{name}",
        "rank": 1,
        "alpha": 64.0,
        "scaling": 64.0,
        "d_in": chat.d_mlp,
        "d_out": chat.d_model,
        "rslora": True,
    }
    a = rng.normal(size=(steps, chat.d_mlp)).astype(np.float32) / chat.d_mlp**0.5
    b = rng.normal(size=(steps, chat.d_model)).astype(np.float32) * (0.1 / chat.d_model**0.5)
    manifest = {"format": 1, "kind": "lora", "name": "random", "status": "complete", "adapters": [info]}
    arrays = {f"A/{name}": a, f"B/{name}": b}
    empty = MemorySeries(np.empty(0, np.int64), {})
    return Run(manifest, MemorySeries(np.arange(1, steps + 1), arrays), empty, [])


@dataclass(frozen=True)
class LastToken:
    """Log-probabilities of two tokens after one row of token ids."""

    ids: tuple[int, ...]
    name: str = "last"

    def readings(self, chat: ChatModel) -> list[Reading]:
        return [Reading(self.ids, (len(self.ids) - 1,), ((11, 12),))]

    def values(self, logprobs: list[np.ndarray]) -> list[Value]:
        return [Value("first", "", logprobs[0][:, 0]), Value("second", "", logprobs[0][:, 1])]


def _prompt(tokens: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(1).integers(100, 100_000, tokens).tolist())


_WHY = (
    "blocks 0 to 11 and attention of block 12 once for all variants, the last MLP and the unembedding at the "
    "read position"
)


def _by_scale(tokens: int, target: float) -> Contest:
    from emmech.engine.adapters import adapter_layers, attach, detach

    chat, layer = half_billion(), 12
    run = random_run(chat, layer, 1)
    scales = np.linspace(0.5, 12, 24)
    part = slice(None, None, 4)
    ids = _prompt(tokens)
    measure = LastToken(ids)
    row = torch.tensor([ids])

    def ours() -> np.ndarray:
        frame = sweep(run, scales=scales, measure=measure, base=chat, progress=False).frame
        return frame["value"].to_numpy().reshape(24, 2)

    def theirs() -> np.ndarray:
        live = attach(chat, run.adapters, run.weights(1))
        ((_, module, name),) = adapter_layers(live.model)
        found = []
        with torch.no_grad():
            for scale in scales[part]:
                module.set_scale(name, scale)
                logits = live.model(input_ids=row, logits_to_keep=1, use_cache=False).logits[0, -1]
                found.append(logits.log_softmax(-1)[[11, 12]].numpy())
        detach(live)
        return np.array(found)

    return Contest(
        f"teacher-forced sweep, 0.5B shape, adapter at layer 12 of 24, 24 variants, {tokens} tokens",
        "PEFT, scale set in place, `logits_to_keep=1`, no cache",
        target,
        arithmetic(ours, theirs, _WHY, (min(24 * tokens, _CPU_TOKENS), 896, 4864), times=4.0),
        ours,
        theirs,
        check=lambda a, b: equal(a[part], b),
        times=4.0,
        repeats=9,
    )


def short() -> Contest:
    """Teacher-forced sweep, 24 tokens"""
    return _by_scale(24, 5.0)


def long() -> Contest:
    """Teacher-forced sweep, 128 tokens"""
    return _by_scale(128, 2.3)


def mixed_batch() -> Contest:
    """Teacher-forced sweep against PEFT's mixed batch, 16 tokens"""
    from peft import LoraConfig, get_peft_model

    chat, layer, count = half_billion(), 12, 24
    run = random_run(chat, layer, count)
    ids = _prompt(16)
    measure = LastToken(ids)
    rows = torch.tensor([ids]).repeat(count, 1)
    module = run.adapters[0].module
    names = [f"k{step}" for step in run.steps]

    def loaded() -> Any:
        config = LoraConfig(r=1, lora_alpha=64, use_rslora=True, target_modules=[module], bias="none")
        model = get_peft_model(chat.model, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        layer_module = chat.base.get_submodule(module)
        with torch.no_grad():
            for name, step in zip(names, run.steps, strict=True):
                weights = run.weights(int(step))
                layer_module.lora_A[name].weight.copy_(torch.from_numpy(weights[f"A/{run.adapters[0].name}"]))
                layer_module.lora_B[name].weight.copy_(torch.from_numpy(weights[f"B/{run.adapters[0].name}"]))
        return model.eval()

    peer = loaded()
    _kept.clear()  # this model has adapters now; another row makes its own
    # the sweep refuses a model with live adapters: it gets a view of the same weights without them
    bare = with_module(chat.base, module, chat.base.get_submodule(module).base_layer)
    chat_bare = ChatModel(bare, None, chat.name, chat.family)

    def ours() -> np.ndarray:
        frame = sweep(run, steps=run.steps, measure=measure, base=chat_bare, progress=False).frame
        return frame["value"].to_numpy().reshape(count, 2)

    def theirs() -> np.ndarray:
        # loading the adapters is not counted against the peer
        with torch.no_grad():
            logits = peer(input_ids=rows, adapter_names=names, logits_to_keep=1, use_cache=False).logits[:, -1]
            return logits.log_softmax(-1)[:, [11, 12]].numpy()

    return Contest(
        "teacher-forced sweep, 0.5B shape, adapter at layer 12 of 24, 24 checkpoints, 16 tokens",
        "PEFT's mixed batch (`adapter_names`), one forward of 24 rows, `logits_to_keep=1`; loading not counted",
        2.3,
        arithmetic(ours, theirs, _WHY, (24 * 16, 896, 4864)),
        ours,
        theirs,
        repeats=9,
    )


def bfloat16() -> Contest:
    """Teacher-forced sweep in bfloat16 against float32, 24 tokens"""
    import copy

    exact, layer = half_billion(), 12
    narrow = ChatModel(copy.deepcopy(exact.model).to(torch.bfloat16), None, exact.name, exact.family)
    run, scales, measure = random_run(exact, layer, 1), np.linspace(0.5, 12, 24), LastToken(_prompt(24))

    def swept(chat: ChatModel) -> np.ndarray:
        return sweep(run, scales=scales, measure=measure, base=chat, progress=False).frame["value"].to_numpy()

    def bound(seconds: float) -> str:
        rows = min(24 * 24, _CPU_TOKENS)
        rates = [speed(rows, 896, 4864, dtype) for dtype in (torch.bfloat16, torch.float32)]
        known = "has" if "amx" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "does not have"
        return (
            f"{rates[0] / rates[1]:.2f}x: products of {rows} rows by 896 x 4864 run at {rates[0]:.0f} GFLOP/s in "
            f"bfloat16 and at {rates[1]:.0f} in float32 on this processor, which {known} AMX"
        )

    def margins(ours: np.ndarray, theirs: np.ndarray) -> str:
        both = [(one.reshape(24, 2) @ np.array([1.0, -1.0])) for one in (ours, theirs)]
        return "margins " + equal(*both, 0.01)

    return Contest(
        "teacher-forced sweep in bfloat16, 0.5B shape, adapter at layer 12 of 24, 24 variants, 24 tokens",
        "the same in float32",
        4.0,
        bound,
        lambda: swept(narrow),
        lambda: swept(exact),
        tolerance=None,
        check=margins,
        repeats=3,
    )


CONTESTS = (short, long, mixed_batch, bfloat16)
