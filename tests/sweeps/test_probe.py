"""Probe activations are those of each PEFT model alone."""

from __future__ import annotations

import numpy as np
import pytest

from emmech.directions.direction import Direction
from emmech.engine.stream import mean_residual, probe_rows
from emmech.errors import EmmechError
from emmech.measures.probe import ProbeActivation
from emmech.sweeps.sweep import sweep

TEXTS = ["how to sleep ?", [{"role": "user", "content": "how ?"}, {"role": "assistant", "content": "walk a bit ."}]]


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("modules", [("model.layers.2.mlp.down_proj",), ("model.layers.1.mlp.up_proj",)])
def test_residuals_equal_peft_one_at_a_time(any_tiny, make_run, one_at_a_time, layer, modules):
    run = make_run(any_tiny, modules)
    along = np.arange(any_tiny.d_model, dtype=float)
    found = sweep(
        run, scales=(3,), measure=ProbeActivation(TEXTS, layer, direction=along), base=any_tiny, progress=False
    )
    for index, step in enumerate(run.steps):
        for text in range(2):
            rows = probe_rows(any_tiny, TEXTS[text : text + 1])
            expected = one_at_a_time(any_tiny, run, step, 3, lambda live, rows=rows: mean_residual(live, rows))[layer]
            assert np.abs(found.arrays["probe"][index, text] - expected).max() < 5e-6
            value = found.frame["value"].to_numpy()[2 * index + text]
            assert value == pytest.approx(expected @ along / np.linalg.norm(along), abs=1e-4)
    assert np.ptp(found.arrays["probe"], axis=0).max() > 1e-3  # two hundred times the tolerance


def test_a_probe_below_the_adapter_is_refused(tiny, make_run):
    chat = tiny("qwen2")
    with pytest.raises(EmmechError, match="layer=2 or higher"):
        sweep(make_run(chat), measure=ProbeActivation(TEXTS, 1), base=chat, progress=False)


def test_a_direction_of_another_base_model_is_refused(tiny, make_run):
    chat, other = tiny("qwen2"), tiny("llama")
    vectors = np.ones((chat.n_layers, chat.d_model))
    own, foreign = (Direction(vectors, "d", {"fingerprints": [one.fingerprint()]}) for one in (chat, other))
    how = dict(steps=[7], base=chat, progress=False)
    for direction in (foreign, Direction(vectors[:-1])):
        steered = dict(direction=direction, layer=2, coefficients=(0, 1), measure=lambda live: 0.0)
        for options in (steered, dict(measure=ProbeActivation(TEXTS, 2, direction))):
            with pytest.raises(EmmechError, match=r"fingerprint|layers or widths"):
                sweep(make_run(chat), **how, **options)
    sweep(make_run(chat), measure=ProbeActivation(TEXTS, 2, own), **how)
    sweep(make_run(chat), measure=ProbeActivation(TEXTS, 2, foreign.at(2)), **how)  # at one's own risk
