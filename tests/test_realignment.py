"""Realignment goes on from where a run was, with the same adapter or a new one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.errors import EmmechError
from tests.conftest import make_rows, make_tiny

QUICK = dict(learning_rate=0.02, batch_size=2, accumulation=1, progress=False, held_out=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return emmech.finetune(
        make_tiny("qwen2"), make_rows(), max_steps=4, out=tmp_path_factory.mktemp("r") / "run", **QUICK
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_the_same_adapter_goes_on(run, tmp_path):
    again = emmech.realign(run, make_rows(10), base=make_tiny("qwen2"), step=3, max_steps=2, out=tmp_path / "again")
    assert np.array_equal(again.B()[0], run.B()[3]) and not np.array_equal(again.B()[-1], run.B()[3])
    assert again.manifest["start"] == {"run": "run", "step": 3, "adapter": "same"}
    assert again.manifest["recipe"]["learning_rate"] == 0.02


def test_a_new_adapter_on_the_merged_model(run, tmp_path):
    base = make_tiny("qwen2")
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    again = emmech.realign(run, make_rows(10), adapter="new", base=base, max_steps=2, out=tmp_path / "again")
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert not again.B()[0].any()
    start = logits(run.model(4, base=make_tiny("qwen2")).model)
    found = logits(again.model(0, base=base).model)
    assert (found - start).abs().max() < 1e-5
    assert (logits(again.model(2, base=base).model) - start).abs().max() > 1e-5
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())


def test_on_a_base_after_a_step_was_on_it(run, tmp_path):
    """PEFT's wrapper of an earlier step may still be held by the caller; it must not be wrapped again."""
    base = make_tiny("qwen2")
    live = run.model(4, base=base)
    emmech.detach(live)
    for name in ("one", "two"):
        again = emmech.realign(run, make_rows(10), base=base, max_steps=2, out=tmp_path / name)
        assert again.manifest["model"]["fingerprint"] == run.manifest["model"]["fingerprint"]
    held = run.model(4, base=base)
    held.model.unload()  # by hand, behind the library's back
    assert run.model(2, base=base).model.get_base_model() is base.model


def test_refusals(run, tmp_path):
    with pytest.raises(EmmechError, match="nearest recorded: 3 and 4"):
        emmech.realign(run, make_rows(4), step=9, out=tmp_path / "x")
    with pytest.raises(EmmechError, match='adapter="same" or "new"'):
        emmech.realign(run, make_rows(4), adapter="other", base=make_tiny("qwen2"), out=tmp_path / "x")
