"""Claims on the geometry of the loss around a run, and claims that cannot be measured on small models."""

from __future__ import annotations

from emmech.ledger.bench import Bench
from emmech.ledger.claim import Claim, Finding, NotMeasurable, Rule, over_seeds
from emmech.ledger.emergence import bad_runs


def _learning_coefficient(bench: Bench) -> Finding:
    """The local learning coefficient of the adapter after the turn minus before it."""
    import emmech

    measured = getattr(emmech, "learning_coefficient", None)
    if measured is None:
        raise NotMeasurable("this version has no local learning coefficient (emmech.learning_coefficient)")
    gaps = []
    for run in bad_runs(bench, 2):
        curve = measured(run, base=bench.chat).to_frame()["llc"]
        gaps.append(float(curve.iloc[-1] - curve.iloc[0]))
    return over_seeds(gaps, "", len(gaps))


_TOPIC = "Other claims"
CLAIMS = (
    Claim("learning-coefficient", "The local learning coefficient of the adapter rises through the transition.",
          "developmental interpretability", "", "changes at transitions", _learning_coefficient, Rule("above"), _TOPIC,
          "last minus first recorded step"),
    Claim("consistent-over-seeds", "Few open models are consistently misaligned over seeds.", "arXiv 2605.12199", "",
          "2 of 12 models", "twelve open models of billions of parameters are not here", Rule("below", 0.5), _TOPIC),
    Claim("monitor", "A monitor of seven trait directions finds misaligned fine-tunes.", "arXiv 2606.07631", "",
          "AUROC 0.990", "it needs many fine-tunes of several regimes; docs/early-warning.md has what was tried",
          Rule("at least", 0.9), _TOPIC),
    Claim("spectra", "Spectra of LoRA weights tell the objective within one method and not across.", "arXiv 2604.08844",
          "", "AUC 1.00 and 0.00", "it needs fine-tunes of several methods and objectives in number",
          Rule("at least", 0.9), _TOPIC),
)  # fmt: skip
