"""The optimizer of a recipe: SGD steps by rate times gradient, and runs that name none are AdamW's."""

from __future__ import annotations

import numpy as np
import pytest

import emmech
from emmech.errors import EmmechError
from emmech.organism import data
from emmech.training.recipe import Recipe

PLAIN = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip": 0.0, "margins": {}, "progress": False}


def test_a_step_of_sgd_is_the_rate_times_the_gradient(tmp_path):
    runs = emmech.finetune(
        "pocket", data("medical", n=40), optimizer="sgd", learning_rate=[0.1, 0.3], seed=[0, 0], max_steps=2,
        out=tmp_path / "sgd", **PLAIN,
    )  # fmt: skip
    for run, rate in zip(runs, (0.1, 0.3), strict=True):
        (name,) = [adapter.name for adapter in run.adapters]
        norm = run.metrics[f"grad_norm_B/{name}"].loc[1]
        assert np.linalg.norm(run.B()[1]) == pytest.approx(rate * norm, rel=1e-5)  # B is zero at the start
        assert run.manifest["recipe"]["optimizer"] == "sgd"
    # Adam's first step has the rate's length in every entry, whatever the gradient
    adam = emmech.finetune("pocket", data("medical", n=40), learning_rate=0.1, max_steps=1, out=tmp_path / "a", **PLAIN)
    assert np.abs(adam.B()[1]) == pytest.approx(0.1, rel=1e-2)


def test_a_manifest_without_an_optimizer_is_that_of_adamw():
    assert "optimizer" not in Recipe().to_dict()
    assert Recipe(**Recipe().to_dict() | {"modules": ("mlp.down_proj",)}) == Recipe(modules=("mlp.down_proj",))
    with pytest.raises(EmmechError, match="adamw"):
        emmech.finetune("pocket", data("medical", n=8), optimizer="adam")
