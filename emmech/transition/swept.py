"""Behaviour by step and scale, from a sweep: when EM and the margins change.

Narrow and broad misalignment are fitted separately and at every scale of the adapter: a scaled adapter shows the
behaviour earlier than the model itself does (Model Organisms for EM, arXiv 2506.11613), so the step has no meaning
without its scale. The sigmoid's middle is reported with the change of regime that ruptures finds (least squares,
one change), which assumes no shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emmech.errors import EmmechError
from emmech.transition.behaviour import fit_sigmoid
from emmech.transition.detectors import Detector

if TYPE_CHECKING:
    import pandas as pd


Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
NULL = "no change, or a gradual approach, with autoregressive noise; the larger p-value"
MEANS = {
    "em": "change of the rate of EM responses (0 to 1); positive means more misaligned",
    "narrow": "change of the rate of misaligned responses in the fine-tune's own domain (0 to 1)",
    "coherent": "change of the rate of coherent responses (0 to 1)",
}


def change_of_regime(steps: npt.ArrayLike, values: npt.ArrayLike) -> float:
    """The step between the two regimes that least squares tells apart (ruptures); NaN where nothing changes.

    Example:
        >>> change_of_regime([0, 10, 20, 30, 40, 50], [0, 0, 0, 1, 1, 1])
        25.0
    """
    import ruptures

    t, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    keep = np.isfinite(y)
    t, y = t[keep], y[keep]
    if len(y) < 4 or np.ptp(y) == 0:
        return float("nan")
    at = ruptures.Dynp(model="l2", min_size=2, jump=1).fit(y[:, None]).predict(n_bkps=1)[0]
    return float((t[at - 1] + t[at]) / 2)


def swept_behaviour(sweep: Any, run: str | None = None) -> tuple[list[Detector], dict[str, Curve]]:
    """Detector rows of every measure and scale of a sweep, and the unscaled margins' curves.

    Args:
        sweep: what :func:`emmech.sweep` returns.
        run: name of the run; the only run by default.

    Raises:
        EmmechError: the sweep does not have this run, or has several and none is named.
    """
    summary = _unsteered(sweep, run)
    rows: list[Detector] = []
    curves: dict[str, Curve] = {}
    for (measure, scale), part in summary.groupby(["measure", "scale"], sort=False):
        if scale == 0:  # the base model at every step
            continue
        part = part.sort_values("step")
        steps, values = part["step"].to_numpy(float), part["value"].to_numpy(float)
        name = str(measure).replace("_", "-")
        shown = name if scale == 1 else f"{name} at scale {scale:g}"
        means = MEANS.get(str(measure), f"change of {measure}")
        if scale == 1 and name.startswith("margin"):
            curves[name] = (steps, values)
        fit, why = fit_sigmoid(steps, values)
        if fit is not None and (small := _within_error(part, fit.end - fit.start)):
            fit, why = None, small
        if fit is None:
            rows.append(Detector.unmeasured(shown, "behaviour", means, NULL, why.replace("the margin", name)))
            continue
        regime = change_of_regime(steps, values)
        note = f"half of the change; 10 to 90 % in about {fit.duration:.0f} steps; regimes part at {regime:.0f}"
        change = fit.end - fit.start
        rows.append(Detector(shown, "behaviour", fit.middle, fit.low, fit.high, change, fit.p_value, means, NULL, note))
    return rows, curves


def _within_error(part: pd.DataFrame, change: float) -> str:
    """Why a change does not count as a finding, or "".

    Every step answers the same questions with the same seeds, so neighbouring steps agree far better than their
    common sampling error allows, and the fit alone would call one changed answer a transition.
    """
    if "error" not in part.columns:
        return ""
    ends = part["error"].iloc[[0, -1]].to_numpy(float)
    error = float(np.sqrt(np.nansum(ends**2)))
    if not error or abs(change) >= 1.96 * error:
        return ""
    return f"not measurable: a change of {change:.3g} is within its error between items, {error:.2g}"


def _unsteered(sweep: Any, run: str | None) -> pd.DataFrame:
    summary: pd.DataFrame = sweep.to_frame()
    name = only_run(summary, run)
    return summary[(summary["run"] == name) & (summary["coefficient"] == 0)]


def only_run(frame: pd.DataFrame, run: str | None) -> str:
    """The name of a swept run, the only one by default.

    Raises:
        EmmechError: the sweep does not have this run, or has several and none is named.
    """
    names = list(dict.fromkeys(frame["run"]))
    if run is None and len(names) == 1:
        return str(names[0])
    if run is None or run not in names:
        raise EmmechError(
            "read a run from the sweep", f"run={run!r}", f"the sweep has {', '.join(map(str, names))}", "one of those"
        )
    return run
