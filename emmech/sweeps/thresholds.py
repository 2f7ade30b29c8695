"""How much the behavioural step of a sampled sweep depends on the thresholds of an EM response."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.errors import EmmechError, as_float, refusal
from emmech.evaluation.em import FIELD, Thresholds
from emmech.transition.behaviour import fit_sigmoid
from emmech.transition.swept import change_of_regime, only_run

if TYPE_CHECKING:
    import pandas as pd


_AROUND = (-10.0, 0.0, 10.0)
_ALIGNMENT, _COHERENCE = (tuple(at + by for by in _AROUND) for at in (FIELD.alignment_below, FIELD.coherence_above))


def threshold_robustness(
    sweep: Any,
    run: str | None = None,
    *,
    scale: float = 1.0,
    alignment_below: Sequence[float] = _ALIGNMENT,
    coherence_above: Sequence[float] = _COHERENCE,
    mechanistic: float | None = None,
) -> pd.DataFrame:
    """The behavioural step under every pair of thresholds, to show whether a conclusion depends on them.

    Args:
        sweep: of a sampled measure; its responses keep the judge's scores.
        scale: of the adapter.
        alignment_below: bounds of the alignment of an EM response; by default the field's and 10 to either side.
        coherence_above: likewise of its coherence.
        mechanistic: step of the turn, to add the lag.

    Returns:
        one row per measure and pair of thresholds: ``step``, ``low``, ``high`` of the sigmoid's middle, ``regime``, the
        change that ruptures finds, ``lag`` and ``note`` (why not measurable).

    Raises:
        EmmechError: the sweep kept no judged responses, or none at this scale.
    """
    import pandas as pd

    responses = getattr(sweep, "responses", None)
    if responses is None or not {"aligned", "coherent"} <= set(responses.columns):
        given, why = "a sweep without judged responses", "a rate can be taken again only from the judge's scores"
        raise EmmechError("vary the thresholds", given, why, "emmech.sweep(run, measure=Sampled(...))")
    name = only_run(responses, run)
    plain = responses[(responses["run"] == name) & (responses["coefficient"] == 0)]
    scales = sorted(set(plain["scale"]))
    if as_float("vary the thresholds", "scale", scale) not in scales:
        why = f"without steering, answers were sampled at the scales {scales}"
        raise refusal("vary the thresholds", "scale", scale, why, f"scale={scales[0]:g}" if scales else None)
    own = plain[plain["scale"] == scale]
    narrow = own["narrow"].eq(True)
    rows = []
    for measure, chosen in (("em", own[~narrow]), ("narrow", own[narrow])):
        scored = chosen.dropna(subset=["aligned", "coherent"])
        if scored.empty:
            continue
        for below, above in itertools.product(alignment_below, coherence_above):
            hit = Thresholds(below, above).misaligned(scored["aligned"], scored["coherent"])
            rate = pd.Series(hit).groupby(scored["step"].to_numpy()).mean().sort_index()
            series = rate.index.to_numpy(), rate.to_numpy()
            fit, why = fit_sigmoid(*series)
            step, low, high = (fit.middle, fit.low, fit.high) if fit else (np.nan, np.nan, np.nan)
            row = {"measure": measure, "alignment_below": below, "coherence_above": above, "step": step}
            row |= {"low": low, "high": high, "regime": change_of_regime(*series)}
            row["lag"] = step - mechanistic if mechanistic is not None else np.nan
            rows.append({**row, "note": why.replace("the margin", measure)})
    return pd.DataFrame(rows)
