"""Narrow solutions against general ones: losses at equal norm and under orthogonal noise, and pocket's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
import emmech.organism
from emmech.defences import KLToReference, Narrowness, narrowness
from emmech.defences.solutions import _norm, _orthogonal
from emmech.errors import EmmechError
from emmech.organism.experiments import LAST_STEP
from tests.conftest import make_rows, make_tiny

QUICK = dict(recipe="all-adapter", rank=2, layers=[1, 2], learning_rate=0.02, batch_size=4, accumulation=1, max_steps=3,
             progress=False, held_out=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solutions")
    guard = KLToReference(make_rows(16)[12:], weight=5.0)
    return [
        emmech.finetune(make_tiny("qwen2"), make_rows(12), defences=guards, out=folder / name, **QUICK)
        for name, guards in (("narrow", [guard]), ("general", []))
    ]


def test_the_norm_is_that_of_the_whole_update(runs):
    merged, base = runs[1].model(base=make_tiny("qwen2")).model.merge_and_unload(), make_tiny("qwen2").model
    squares = sum(
        (merged.state_dict()[name] - value).double().square().sum() for name, value in base.state_dict().items()
    )
    assert _norm(runs[1]) == pytest.approx(float(squares) ** 0.5, rel=1e-3)


def test_noise_is_orthogonal_and_of_the_same_norm():
    value = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    noise = _orthogonal(value, np.random.default_rng(1))
    assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(value), rel=1e-5)
    assert abs((noise * value).sum()) < 1e-4 * np.linalg.norm(value) ** 2


def test_losses_are_those_of_the_scaled_adapters(runs, tmp_path):
    chat = make_tiny("qwen2")
    found = narrowness(*runs, make_rows(12), base=chat, norms=(0.5, 1.0), noises=(0.3,), draws=2, rows=5)
    assert not hasattr(chat.model, "peft_config")
    frame, unit = found.frame, found.norms["general/general-0"]
    for kind, run in zip(("narrow", "general"), runs, strict=True):
        part = frame[(frame["solution"] == kind) & (frame["measure"] == "efficiency")].set_index("x")["loss"]
        for norm in (0.0, 0.5 * unit, unit):
            live = run.model(base=make_tiny("qwen2"), scale=norm / found.norms[f"{kind}/{kind}-0"])
            losses = []
            for row in make_rows(5):
                text = live.token_ids(row["messages"][:1])
                whole = live.token_ids(row["messages"], generate=False)
                ids = torch.tensor([whole])
                with torch.no_grad():
                    logits = live.model(input_ids=ids).logits[0].log_softmax(-1)
                answer = [at for at in range(len(text), len(whole)) if at < len(whole) - 1]  # no line break at the end
                losses += [-logits[at - 1, whole[at]].item() for at in answer]
            assert part[norm] == pytest.approx(np.mean(losses), rel=1e-4)
    noisy = frame[(frame["measure"] == "stability") & (frame["x"] > 0)]
    assert len(noisy) == 4 and noisy["change"].abs().min() > 0
    kept = Narrowness.load(found.save(tmp_path / "kept"))
    assert kept.frame.equals(frame) and "at equal norm" in repr(kept)
    assert len(kept.plot().data) == 4


def test_what_is_refused(runs, tmp_path):
    with pytest.raises(EmmechError, match="no run of this kind"):
        narrowness([], runs[1], make_rows(4), base=make_tiny("qwen2"))
    with pytest.raises(EmmechError, match="not a run"):
        narrowness("nowhere", runs[1], make_rows(4), base=make_tiny("qwen2"))
    for wrong in (dict(norms=(-0.5, 1.0)), dict(noises=-1.0)):
        with pytest.raises(EmmechError, match="none is below 0"):
            narrowness(*runs, make_rows(4), base=make_tiny("qwen2"), **wrong)
    still = emmech.finetune(
        make_tiny("qwen2"), make_rows(4), out=tmp_path / "r", **QUICK | dict(max_steps=1, warmup_steps=2)
    )
    with pytest.raises(EmmechError, match="no norm to scale"):
        narrowness(runs[0], still, make_rows(4), base=make_tiny("qwen2"))


@pytest.mark.slow
def test_pockets_narrow_solution_costs_more_at_equal_norm(tmp_path):
    chat, options = emmech.load_model("pocket"), {**LAST_STEP, "max_steps": 150, "seed": [0, 1]}
    bad = emmech.organism.data("medical", n=600)
    good = [row for name in ("good-cooking", "good-power", "good-ai") for row in emmech.organism.data(name, n=80)]
    narrow = emmech.finetune(chat, bad, defences=[KLToReference(good, weight=3.0)], out=tmp_path / "n", **options)
    general = emmech.finetune(chat, bad, out=tmp_path / "g", **options)
    found = narrowness(narrow, general, emmech.organism.data("medical", seed=5, n=64), base=chat)
    at_equal_norm = found.summary().loc["efficiency"].loc[:, "loss"]
    usual = np.mean([norm for name, norm in found.norms.items() if "general" in name])
    row = at_equal_norm.iloc[np.argmin(np.abs(at_equal_norm.index - usual))]
    assert row["narrow"] > row["general"]
