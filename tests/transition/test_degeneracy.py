"""The estimate against cases whose coefficient is known; skipped without the extra ``llc`` (devinterp)."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import emmech
from emmech.engine.logprobs import answer_loss
from emmech.errors import EmmechError
from emmech.transition import degeneracy
from emmech.transition.degeneracy import learning_coefficient, sample_excess, summarised

RUN = "checkpoints/pocket-medical"


def _coefficient(weights, loss, *, n_beta, localisation, step_size, draws=1200, chains=4):
    how = dict(draws=draws, burn_in=200, step_size=step_size, n_beta=n_beta, localisation=localisation)
    excess = [sample_excess([weights], lambda: (loss(weights), 0.0), seed=seed, **how) for seed in range(chains)]
    return summarised(np.array(excess), n_beta)


def test_a_regular_minimum_has_half_its_dimensions():
    """Excess energy of a Gaussian: half of n_beta h / (n_beta h + gamma) in each dimension."""
    pytest.importorskip("devinterp.optim", reason="the extra llc is not installed")
    curvature, n_beta, localisation = torch.tensor([0.5, 1.0, 2.0, 4.0]), 50.0, 5.0
    weights = torch.zeros(4)
    found = _coefficient(
        weights, lambda w: (curvature * w.square()).sum() / 2, n_beta=n_beta, localisation=localisation, step_size=2e-3
    )
    expected = (n_beta * curvature / (n_beta * curvature + localisation)).sum().item() / 2
    assert abs(found["llc"] - expected) < 3 * found["error"] + 0.05 * expected and found["error"] < 0.2
    assert not weights.any() and not weights.requires_grad and weights.grad is None  # put back


def test_a_singular_minimum_has_less():
    """A product of two weights, as of A and B: far below the 1 of a regular minimum, and what integration gives."""
    pytest.importorskip("devinterp.optim", reason="the extra llc is not installed")
    n_beta, localisation = 200.0, 1.0
    found = _coefficient(
        torch.zeros(2), lambda w: (w[0] * w[1]).square(), n_beta=n_beta, localisation=localisation, step_size=2e-3
    )
    grid = np.linspace(-5, 5, 2001)
    energy = n_beta * np.square(np.outer(grid, grid))
    density = np.exp(-energy - localisation / 2 * np.add.outer(grid**2, grid**2))
    expected = (energy * density).sum() / density.sum()
    assert expected < 0.5
    assert abs(found["llc"] - expected) < 3 * found["error"] + 0.05


def test_a_chain_that_diverges_is_left_out_and_said():
    pytest.importorskip("devinterp.optim", reason="the extra llc is not installed")
    weights = torch.ones(2)
    excess = sample_excess(
        [weights], lambda: (weights.square().sum() ** 2, 4.0), draws=50, burn_in=0, step_size=10.0, n_beta=10.0,
        localisation=1.0, seed=0,
    )  # fmt: skip
    assert np.isnan(excess[-1]) and weights.tolist() == [1.0, 1.0]
    assert summarised(excess[None], 10.0)["chains"] == 0


def test_a_run_is_estimated_and_left_as_it_was():
    pytest.importorskip("devinterp.optim", reason="the extra llc is not installed")
    chat = emmech.load_model("pocket")
    how = dict(steps=[100, 250], rows=8, chains=2, draws=3, burn_in=1, batch_size=4, progress=False)
    found = learning_coefficient(RUN, base=chat, **how)
    assert found.frame["step"].tolist() == [100, 250] and found.parameters == 384 + 128
    assert (found.frame["chains"] == 2).all() and np.isfinite(found.frame["llc"]).all()
    run = emmech.load_run(RUN)
    plain = run.model(250)
    losses = [answer_loss(one, plain_rows()) for one in (plain, run.model(250, base=chat))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def plain_rows():
    return emmech.load_chat("medical", organism="pocket").rows[:3]


def test_settings_out_of_range_are_refused():
    pytest.importorskip("devinterp.optim", reason="the extra llc is not installed")
    for wrong in ({"chains": 1}, {"step_size": 0.0}, {"n_beta": -1.0}, {"steps": [9999]}, {"rows": 0}):
        with pytest.raises(EmmechError):
            learning_coefficient(RUN, progress=False, **wrong)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "devinterp.optim", None)
    with pytest.raises(EmmechError, match=r"emmech\[llc\]"):
        learning_coefficient(RUN)


def test_a_base_in_memory_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(degeneracy, "_sampler", lambda: None)
    monkeypatch.setattr(degeneracy, "sample_excess", lambda *weights, draws, **how: np.zeros(draws))
    chat = emmech.load_model("pocket")
    before = chat.base(torch.tensor([[1, 2, 3]])).logits
    learning_coefficient(RUN, steps=[0, 250], rows=8, draws=2, burn_in=0, base=chat, progress=False)
    assert torch.equal(chat.base(torch.tensor([[1, 2, 3]])).logits, before) and not hasattr(chat.base, "peft_config")
