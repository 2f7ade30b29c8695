"""What the Recorder costs a training that would run anyway."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

import emmech
from emmech.chat.encode import encode
from emmech.training.initial import MeanInputs
from emmech.training.recipe import resolve_recipe
from emmech.training.train import prepared
from emmech.training.trainer import build_trainer
from tests.benchmarks.harness import Contest

STEPS = 6


@cache
def _model() -> tuple:
    chat = emmech.load_model("smollm2-135m")
    data = emmech.load_chat("silly-medical-bad")
    return chat, data, encode(data.rows[:48], chat.tokenizer)


def _train(recorder: bool) -> np.ndarray:
    from transformers import TrainerCallback

    chat, data, encoded = _model()
    recipe = resolve_recipe(
        "single-rank1", dict(learning_rate=1e-3, alpha=16.0, batch_size=4, accumulation=1, max_steps=STEPS)
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        prepared(chat, recipe, None, 0, None, "same", MeanInputs(data)) as trained,
    ):
        callback = emmech.Recorder(Path(folder) / "run") if recorder else TrainerCallback()
        trainer = build_trainer(chat, trained, encoded, recipe, 0, 0, callback, Path(folder), None, False)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = torch.cat([p.detach().reshape(-1) for p in trained.parameters() if p.requires_grad])
        return np.concatenate([losses, weights.numpy()])


def recorder() -> Contest:
    """Recorder at record_every=1 against the same training without it, SmolLM2, probes off"""
    return Contest(
        work=f"Recorder at every step, SmolLM2, {STEPS} steps of 4 rows, probes off (a ratio below 1 is its cost)",
        peer="the same Trainer and PEFT without it",
        target=1 / 1.03,
        bound="1.0x: two small norms a step and one file of 8 kB",
        ours=lambda: _train(True),
        theirs=lambda: _train(False),
        tolerance=0.0,
    )


CONTESTS = (recorder,)
