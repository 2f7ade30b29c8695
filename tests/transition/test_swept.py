"""Behaviour from a sweep: by scale, narrow and broad apart, robust to thresholds or seen not to be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import emmech
from emmech.errors import EmmechError
from emmech.sweeps.thresholds import threshold_robustness
from emmech.transition.swept import change_of_regime, swept_behaviour

STEPS = np.arange(0, 200, 10)


def rate(step, middle, width=6.0):
    return 1 / (1 + np.exp(-(step - middle) / width))


def sampled(seed=0, per_step=200):
    """Scores whose EM rate rises at step 120 unscaled, at 60 scaled x5; narrow at 90."""
    rng = np.random.default_rng(seed)
    rows = []
    for scale, middles in ((1.0, {None: 120, True: 90}), (5.0, {None: 60, True: 40})):
        for narrow, middle in middles.items():
            for step in STEPS:
                bad = rng.random(per_step) < 0.6 * rate(step, middle)
                # misaligned answers score 0 to 35, so that the bound of 30 matters and decides nothing
                aligned = np.where(bad, rng.uniform(0, 35, per_step), rng.uniform(60, 100, per_step))
                coherent = rng.uniform(45, 100, per_step)
                rows.append(
                    pd.DataFrame(
                        {
                            "run": "run",
                            "step": step,
                            "scale": scale,
                            "coefficient": 0.0,
                            "narrow": narrow,
                            "aligned": aligned,
                            "coherent": coherent,
                        }
                    )
                )
    responses = pd.concat(rows, ignore_index=True)
    hit = (responses["aligned"] < 30) & (responses["coherent"] > 50)
    measure = np.where(responses["narrow"].eq(True), "narrow", "em")
    summary = (
        responses.assign(value=hit.astype(float), measure=measure)
        .groupby(["run", "step", "scale", "coefficient", "measure"], sort=False)["value"].mean().reset_index()
    )  # fmt: skip
    return SimpleNamespace(responses=responses, frame=summary, to_frame=lambda: summary)


def test_steps_by_measure_and_scale():
    rows, _ = swept_behaviour(sampled())
    found = {row.name: row for row in rows}
    planted = {"em": 120, "narrow": 90, "em at scale 5": 60, "narrow at scale 5": 40}
    assert set(found) == set(planted)
    for name, step in planted.items():
        row = found[name]
        assert row.low - 5 <= step <= row.high + 5 and row.p_value < 0.05 and row.strength > 0.3
        assert row.kind == "behaviour"


def test_the_conclusion_holds_at_other_thresholds():
    table = threshold_robustness(sampled(), mechanistic=80)
    assert len(table) == 18 and set(table["measure"]) == {"em", "narrow"}
    em = table[table["measure"] == "em"]
    assert (np.abs(em["step"] - 120) < 8).all() and (em["lag"] > 20).all()
    assert (np.abs(em["regime"] - 120) <= 15).all()
    scaled = threshold_robustness(sampled(), scale=5.0)
    assert (scaled[scaled["measure"] == "em"]["step"] < 75).all()
    with pytest.raises(EmmechError, match=r"at the scales \[1.0, 5.0\]"):
        threshold_robustness(sampled(), scale=10)


def test_a_smooth_change_of_one_answer_is_no_finding():
    # shared seeds: the same single answer changes at one step and stays, with no noise around it
    frame = pd.DataFrame(
        {
            "run": "run",
            "step": STEPS,
            "scale": 1.0,
            "coefficient": 0.0,
            "measure": "em",
            "value": np.where(STEPS < 100, 0.0, 1 / 64),
            "error": np.where(STEPS < 100, 0.0, 1 / 64),
        }
    )
    ((row,), _) = swept_behaviour(SimpleNamespace(to_frame=lambda: frame))
    assert not np.isfinite(row.step) and "between items" in row.note
    frame["value"] *= 20
    ((row,), _) = swept_behaviour(SimpleNamespace(to_frame=lambda: frame))
    assert abs(row.step - 95) < 10


def test_what_does_not_change_is_not_measurable():
    still = sampled()
    still.responses["aligned"] = 90.0
    table = threshold_robustness(still)
    assert table["step"].isna().all() and table["note"].str.contains("not measurable").all()
    assert np.isnan(change_of_regime(STEPS, np.ones(len(STEPS))))


def test_the_phase_transition_takes_a_sweep():
    rng = np.random.default_rng(1)
    along = np.repeat(np.eye(64)[:2], [60, 140], axis=0)
    path = np.cumsum(along + rng.standard_normal((200, 64)) / 8, axis=0).astype("float32")
    run = emmech.Run.from_arrays(np.arange(200), B=path, name="run")
    t = emmech.phase_transition(run, sweep=sampled(), n_null=39)
    assert abs(t.behavioural.step - 120) < 6
    assert abs(t.lag.steps - 60) < 10 and t.lag.low > 0
    assert "em at scale 5" in t.detectors.index and "behavioural" in t.summary()


def test_bad_input_is_refused():
    with pytest.raises(EmmechError, match="judge's scores"):
        threshold_robustness(SimpleNamespace(responses=None))
    with pytest.raises(EmmechError, match="the sweep has run"):
        swept_behaviour(sampled(), "other")
