"""Sweeps of a model in bfloat16: products in bfloat16, the residual stream and the unembedding in float32."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from emmech.chat.model import load_model
from emmech.engine.blocks import Blocks
from emmech.engine.logprobs import bundled_margins, unembed
from emmech.measures.teacher_forced import Margin
from emmech.sweeps.sweep import sweep


def narrowed(chat):
    """The model with its weights in bfloat16, and one with the same rounded weights in float32."""
    twins = []
    for dtypes in ((torch.bfloat16,), (torch.bfloat16, torch.float32)):
        model = copy.deepcopy(chat.model)
        for dtype in dtypes:
            model = model.to(dtype)
        twins.append(replace(chat, model=model))
    return twins


def margins(chat, run, measure):
    found = sweep(run, scales=(0.5, 2.0), measure=measure, base=chat, progress=False)
    return found.frame["value"].to_numpy()


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket")


def test_margins_in_bfloat16_are_those_in_float32(pocket, make_run):
    narrow, rounded = narrowed(pocket)
    run = make_run(pocket, ["model.layers.3.mlp.down_proj"], rank=1)
    measure = Margin("broad")
    exact, found = margins(pocket, run, measure), margins(narrow, run, measure)
    assert np.abs(found - exact).max() < 0.01
    # the rest is the rounding of the weights, which no arithmetic can undo
    assert np.abs(found - margins(rounded, run, measure)).max() < 0.01


def test_a_wide_residual_is_closer_to_float32_than_the_models_own_forward(pocket):
    narrow, rounded = narrowed(pocket)
    ids = torch.randint(5, 200, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = rounded.trunk(input_ids=ids).last_hidden_state
        wide, own = Blocks(narrow, wide=True)(ids), narrow.trunk(input_ids=ids).last_hidden_state
        logits = unembed(narrow, wide)
    assert wide.dtype == logits.dtype == torch.float32
    assert torch.allclose(logits, unembed(rounded, wide), atol=1e-4)
    assert (wide - wanted).abs().mean() < 0.7 * (own.float() - wanted).abs().mean()


@pytest.mark.slow
def test_margins_of_smollm2_in_bfloat16_are_those_of_the_same_weights_in_float32(make_run):
    chat = load_model("smollm2-135m", dtype=torch.float32)
    measure = Margin(bundled_margins("broad")[:2])
    run = make_run(chat, ["model.layers.15.mlp.down_proj"], rank=1)
    narrow, rounded = narrowed(chat)
    # rounding the weights alone moves these margins by as much as 0.02 nats; published models are in bfloat16 already
    assert np.abs(margins(narrow, run, measure) - margins(rounded, run, measure)).max() < 0.01
