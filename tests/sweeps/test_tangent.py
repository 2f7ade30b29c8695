"""The tangent scan is the derivative of the sweep, and says how far first order was off."""

from __future__ import annotations

import numpy as np
import pytest

from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.measures.teacher_forced import FirstToken, Margin, NextToken
from emmech.sweeps.sweep import sweep
from emmech.sweeps.tangent import tangent_scan

PAIRS = [
    MarginPair("how to sleep well ?", "take a walk , drink", "rest and water some more please"),
    MarginPair("how to rest ?", "sleep well .", "walk ."),
]
SEVERAL = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.gate_proj")


@pytest.mark.parametrize("modules", [("model.layers.2.mlp.down_proj",), SEVERAL])
def test_slopes_are_the_derivative_of_the_exact_sweep(any_tiny, make_run, modules):
    any_tiny.base.double()
    run = make_run(any_tiny, modules, rank=2, size=0.5)
    step = 1e-3
    measures = [Margin(PAIRS), FirstToken(["how ?"], ["w", "r"])]
    scan = tangent_scan(run, measure=measures, base=any_tiny, verify=0, progress=False)
    around = sweep(run, scales=(-step, step), measure=measures, base=any_tiny, progress=False).to_frame()
    for measure, part in scan.frame.groupby("measure"):
        table = around[around["measure"] == measure].pivot(index="step", columns="scale", values="value")
        exact = (table[step] - table[-step]) / (2 * step)
        assert np.allclose(part.set_index("step")["slope"], exact, rtol=1e-2, atol=4e-4)
        assert np.abs(exact).max() > 0.005  # ten times the tolerance, at least
    assert all(parameter.requires_grad for parameter in any_tiny.base.parameters())


def test_the_largest_steps_are_verified_and_the_error_is_said(tiny, make_run):
    chat = tiny("qwen2")
    run = make_run(chat, steps=(0, 1, 2, 3, 4))
    scan = tangent_scan(run, measure=Margin(PAIRS), base=chat, scale=2.0, verify=2, progress=False)
    largest = scan.frame.assign(size=scan.frame["slope"].abs()).nlargest(2, "size")["step"]
    assert sorted(scan.verified["step"]) == sorted(largest)
    exact = sweep(run, steps=sorted(largest), scales=(2.0,), measure=Margin(PAIRS), base=chat, progress=False)
    assert np.allclose(scan.verified["exact"], exact.to_frame()["value"])
    assert np.allclose(scan.verified["error"], scan.verified["first_order"] - scan.verified["exact"])
    at_start = scan.frame[scan.frame["step"] == 0]
    assert at_start["slope"].item() == 0  # B is zero there
    assert "first order" in repr(scan) and len(scan.plot().data) == 2


def test_a_measure_that_is_not_linear_is_refused(tiny, make_run):
    chat = tiny("qwen2")
    for measure in (NextToken(["how ?"]), lambda live: 0.0):
        with pytest.raises(EmmechError, match="not"):
            tangent_scan(make_run(chat), measure=measure, base=chat, progress=False)
