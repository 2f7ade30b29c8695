"""Runs with random adapters on a tiny model, and the one-at-a-time reference they are measured against."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.engine.adapters import attach, detach
from emmech.run.run import Run
from emmech.store import MemorySeries

MIDDLE = ("model.layers.2.mlp.down_proj",)
SEVERAL = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.gate_proj")


def random_run(chat, modules=MIDDLE, *, rank=1, steps=(0, 3, 7), seed=0, alpha=8.0, name="run", size=0.05) -> Run:
    """A run whose B is zero at its first step and random later."""
    rng = np.random.default_rng(seed)
    adapters, arrays = [], {}
    for module in modules:
        d_out, d_in = chat.base.get_submodule(module).weight.shape
        short = module.removeprefix("model.")
        adapters.append(
            {
                "name": short,
                "layer": int(short.split(".")[1]),
                "module": module,
                "rank": rank,
                "alpha": alpha,
                "scaling": alpha / rank**0.5,
                "d_in": d_in,
                "d_out": d_out,
                "rslora": True,
            }
        )
        a = rng.normal(size=(len(steps), rank, d_in)).astype(np.float32) / d_in**0.5
        b = size * rng.normal(size=(len(steps), d_out, rank)).astype(np.float32)
        b[0] = 0
        arrays[f"A/{short}"] = a[:, 0] if rank == 1 else a
        arrays[f"B/{short}"] = b[:, :, 0] if rank == 1 else b
    manifest = {"format": 1, "kind": "lora", "name": name, "status": "complete", "adapters": adapters}
    empty = MemorySeries(np.empty(0, np.int64), {})
    return Run(manifest, MemorySeries(np.array(steps), arrays), empty, [])


@pytest.fixture(scope="session")
def make_run():
    """``make_run(chat, modules, rank=..., ...)`` makes a run in memory."""
    return random_run


@pytest.fixture(scope="session")
def one_at_a_time():
    """``one_at_a_time(chat, run, step, scale, function)`` calls a function with PEFT's adapter live."""

    def call(chat, run, step, scale, function):
        live = attach(chat, run.adapters, run.weights(step), scale=scale)
        try:
            with torch.no_grad():
                return function(live)
        finally:
            detach(live)

    return call
