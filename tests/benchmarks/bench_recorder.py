"""What the Recorder costs a training that would run anyway."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

import emmech
from emmech.chat.encode import encode
from emmech.training.recipe import resolve_recipe
from emmech.training.recorder import GradientNorms
from tests.benchmarks.harness import Contest
from tests.training.plain import plain_training

STEPS = 12


@cache
def _model() -> tuple:
    chat = emmech.load_model("smollm2-135m")
    data = emmech.load_chat("silly-medical-bad")
    return chat, encode(data.rows[:48], chat.tokenizer)


def _train(*callbacks: Any) -> np.ndarray:
    """Losses and weights of a short training with the Trainer and PEFT."""
    chat, encoded = _model()
    recipe = resolve_recipe(
        "single-rank1", dict(learning_rate=1e-3, alpha=16.0, batch_size=4, accumulation=1, max_steps=STEPS)
    )
    with tempfile.TemporaryDirectory() as folder:
        made = [callback(Path(folder) / "run") for callback in callbacks]
        done = plain_training(chat, encoded, recipe, 0, callbacks=made)
    return np.concatenate([[entry["loss"] for entry in done.logs], *(p.reshape(-1) for p in done.weights.values())])


def _pairs() -> list[tuple[float, float]]:
    """Seconds of each step, and the same less those spent in the Recorder's own code."""
    inside, passed = 0.0, []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                inside += time.thread_time() - began

        return call

    class Norms(GradientNorms):
        """What hooks cost, in the backward pass."""

        def _keep(self, name: str) -> Callable[[torch.Tensor], None]:
            return timed(super()._keep(name))

    class Recorder(emmech.Recorder):
        """Counts its own seconds."""

        on_step_end, on_log = timed(emmech.Recorder.on_step_end), timed(emmech.Recorder.on_log)
        watch = Norms

    class Clock(TrainerCallback):
        """Added last, so that it looks when everybody else has done with a step."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            passed.append((time.thread_time(), inside))

        on_step_end = on_train_begin

    _train(Recorder, lambda path: Clock())
    steps = np.diff(np.array(passed), axis=0)
    return [(total, total - own) for total, own in steps.tolist()]


def recorder() -> Contest:
    """Recorder at record_every=1 against the same training without it, SmolLM2, probes off"""
    return Contest(
        work="Recorder at every step, SmolLM2, steps of 4 rows, probes off (a ratio below 1 is its cost)",
        peer="the same Trainer and PEFT: each step's seconds less those spent in the Recorder's callbacks and hooks, "
        "since whole trainings differ by more than its cost from one run of the same code to the next",
        target=1 / 1.03,
        bound="1.0x: two small norms a step and one file of 8 kB",
        ours=lambda: _train(emmech.Recorder),
        theirs=lambda: _train(lambda path: TrainerCallback()),
        tolerance=0.0,
        pairs=_pairs,
    )


CONTESTS = (recorder,)
