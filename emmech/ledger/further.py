"""Claims on the geometry of the loss around a run, and claims that cannot be measured on small models."""

from __future__ import annotations

from typing import Any

import pandas as pd

from emmech.ledger.bench import BAD, Bench, sparse
from emmech.ledger.claim import Claim, Finding, NotMeasurable, Rule, over_seeds
from emmech.ledger.emergence import bad_runs


def _learning_coefficient(bench: Bench) -> Finding:
    """The local learning coefficient of the adapter at the last step minus that early in training."""
    from emmech.transition.degeneracy import learning_coefficient

    gaps, rows = [], []
    how: dict[str, Any] = {"base": bench.chat, "chains": 2, "draws": 40, "burn_in": 40, "progress": False}
    for at, run in enumerate(bad_runs(bench, 3)):
        steps = sparse(run.steps.tolist()[1:], 3)
        frame = learning_coefficient(run, bench.rows(BAD)[:200], steps=steps, **how).frame
        first, last = frame.iloc[0], frame.iloc[-1]
        if len(below := frame[frame["llc"] < -2 * frame["error"]]):
            raise NotMeasurable(
                f"a coefficient is that of a minimum of the loss, and step {below.iloc[0]['step']:g} is "
                f"none: the estimate there is {below.iloc[0]['llc']:.3g}, below zero"
            )
        gaps.append(float(last["llc"] - first["llc"]))
        rows += [{"name": f"seed {at}", "x": one["step"], "value": one["llc"]} for _, one in frame.iterrows()]
    return over_seeds(gaps, "", len(rows), frame=pd.DataFrame(rows))


_TOPIC = "Other claims"
CLAIMS = (
    Claim("learning-coefficient", "The local learning coefficient of the adapter rises through the transition.",
          "developmental interpretability", "", "changes at transitions", _learning_coefficient, Rule("above"), _TOPIC,
          "at the last step minus early in training, as sampled by devinterp"),
    Claim("consistent-over-seeds", "Few open models are consistently misaligned over seeds.", "arXiv 2605.12199", "",
          "2 of 12 models", "twelve open models of billions of parameters are not here", Rule("below", 0.5), _TOPIC),
    Claim("monitor", "A monitor of seven trait directions finds misaligned fine-tunes.", "arXiv 2606.07631", "",
          "AUROC 0.990", "it needs many fine-tunes of several regimes; docs/early-warning.md has what was tried",
          Rule("at least", 0.9), _TOPIC),
    Claim("spectra", "Spectra of LoRA weights tell the objective within one method and not across.", "arXiv 2604.08844",
          "", "AUC 1.00 and 0.00", "it needs fine-tunes of several methods and objectives in number",
          Rule("at least", 0.9), _TOPIC),
)  # fmt: skip
