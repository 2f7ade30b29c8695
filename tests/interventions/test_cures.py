"""Cures without data: each acts on the live model as its verb does, and leaves the base as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.interventions import (
    Ablation,
    AdapterRotation,
    AdapterScaling,
    Capping,
    Case,
    Cure,
    Steering,
    WeightProjection,
    project_adapter,
    rotate_adapter,
    scale_adapters,
)
from tests.conftest import make_rows, make_tiny

IDS = torch.arange(5, 17)[None]
DRAWN = np.random.default_rng(0)
DIRECTION = emmech.Direction(DRAWN.standard_normal((4, 48)), aligned_mean=DRAWN.standard_normal((4, 48)))
BOUNDS = (0.5, 0.6)  # narrower than what the model does
CURES = {
    "ablation": (Ablation(DIRECTION, layers=[1, 2]), lambda m: emmech.ablate(m, DIRECTION, layers=[1, 2])),
    "towards": (
        Ablation(DIRECTION, layers=[1], towards="aligned"),
        lambda m: emmech.ablate(m, DIRECTION, layers=[1], towards="aligned"),
    ),
    "capping": (Capping(DIRECTION, [1], BOUNDS), lambda m: emmech.cap(m, DIRECTION, BOUNDS, layers=[1])),
    "steering": (Steering(DIRECTION, -2.0, 1), lambda m: emmech.steer(m, DIRECTION, -2.0, layer=1)),
    "projection": (WeightProjection(DIRECTION), lambda m: project_adapter(m, DIRECTION)),
    "rotation": (AdapterRotation(DIRECTION, -0.5), lambda m: rotate_adapter(m, DIRECTION, cosine=-0.5)),
    "scaling": (AdapterScaling(0.3), lambda m: scale_adapters(m, 0.3)),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    base, folder = make_tiny("qwen2"), tmp_path_factory.mktemp("cures")
    how = dict(learning_rate=0.05, max_steps=3, batch_size=2, accumulation=1, held_out=0.0, progress=False)
    run = emmech.finetune(base, make_rows(), out=folder / "run", **how)
    return Case(run, base, emmech.load_chat(make_rows()), folder / "cure")


@torch.no_grad()
def logits(chat):
    return chat(input_ids=IDS).logits


@pytest.mark.parametrize("name", CURES)
def test_a_cure_is_its_verb_on_the_last_step(case, name):
    cure, verb = CURES[name]
    before = logits(case.base)
    untouched = logits(case.run.model(base=make_tiny("qwen2")))
    live = case.run.model(base=make_tiny("qwen2"))
    with verb(live):
        wanted = logits(live)
    assert isinstance(cure, Cure) and not torch.equal(wanted, untouched)
    with cure.applied(case) as chat:
        assert torch.equal(logits(chat), wanted)
    assert torch.equal(logits(case.base), before)
    with pytest.raises(RuntimeError), cure.applied(case):
        raise RuntimeError
    assert torch.equal(logits(case.base), before)


def test_a_random_direction_is_the_control():
    control = CURES["towards"][0].randomised(3)
    assert control.towards == "aligned" and control.direction.norms == pytest.approx(DIRECTION.norms)
    assert AdapterScaling().randomised(3) is None
