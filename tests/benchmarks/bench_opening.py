"""Opening a recorded run and reading its whole trajectory, against one PEFT folder per checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import emmech
from tests.benchmarks.bench_teacher_forced import random_run
from tests.benchmarks.harness import Contest

STEPS = 400


def opening() -> Contest:
    """Opening a 400-step run"""
    from safetensors.torch import load_file

    shape: Any = SimpleNamespace(d_model=896, d_mlp=4864)  # of Qwen2.5-0.5B
    made = random_run(shape, 12, STEPS)
    folder = Path(tempfile.mkdtemp())
    made.save(folder / "run")
    peft = [made.export_peft(step, folder / f"checkpoint-{step}") for step in made.steps.tolist()]
    key = f"base_model.model.{made.adapters[0].module}.lora_B.weight"

    def ours() -> np.ndarray:
        return emmech.load_run(folder / "run").B()

    def theirs() -> np.ndarray:
        return np.stack([load_file(one / "adapter_model.safetensors")[key][:, 0].numpy() for one in peft])

    return Contest(
        f"opening a run of {STEPS} recorded steps, 0.5B shape, and reading B of all of them",
        f"`safetensors.torch.load_file` on {STEPS} PEFT adapter folders, B stacked",
        20.0,
        "one file opened against 400; what is left is copying 1.4 MB",
        ours,
        theirs,
        tolerance=0.0,
    )


CONTESTS = (opening,)
