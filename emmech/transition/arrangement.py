"""The arrangement of several adapters along a run: the comp score and where it rises most."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emmech.geometry import comp_score
from emmech.transition.detectors import KIND, MEANS, PICTURE, Detector, unmeasurable

Array = npt.NDArray[np.float64]


def comp_detector(vectors: Array, steps: npt.NDArray[np.int64], centre: str) -> tuple[Detector, Array]:
    """The comp score of several adapters ``[adapters, steps, d]`` and the step across which it rises most."""
    name = "comp"
    score = comp_score(vectors, centre)
    n = vectors.shape[1]
    k = max(2, n // 10)
    rise = score[2 * k :] - score[: -2 * k]
    reason = unmeasurable(np.moveaxis(vectors, 0, 1).reshape(n, -1))
    if not reason and not np.isfinite(rise).any():
        reason = "not measurable: the adapters have no arrangement to compare"
    if reason:
        return Detector.unmeasured(name, KIND[name], MEANS[name], PICTURE, reason), score
    at = int(np.nanargmax(rise)) + k
    step, low, high = (float(steps[i]) for i in (at, at - k, at + k))
    note = f"de-meaned over {centre}; rise from {low:.0f} to {high:.0f}, the window and no confidence interval"
    return Detector(name, KIND[name], step, low, high, float(rise[at - k]), np.nan, MEANS[name], PICTURE, note), score
