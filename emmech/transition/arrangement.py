"""Detectors of more than one vector: the column space of a rank-r B, and the arrangement of several adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emmech.geometry import comp_score, norms, peak_height, principal_cosines
from emmech.transition.changepoint import DIMENSIONS, Nulls, accumulate, noise_around_drift
from emmech.transition.detectors import KIND, MEANS, NULL, Detector, compact, default_windows, unmeasurable

__all__ = ["comp_detector", "subspace_detector"]

Array = npt.NDArray[np.float64]


def subspace_detector(
    matrices: Array,
    steps: npt.NDArray[np.int64],
    windows: Sequence[int] | None,
    n_null: int,
    rng: np.random.Generator,
) -> Detector:
    """Principal angles of B ``[steps, d, r]`` at the largest window that leaves a peak its flanks."""
    name = "subspace"
    n, d, r = matrices.shape
    reason = unmeasurable(matrices.reshape(n, d * r))
    if reason or d < r:
        return Detector.unmeasured(name, KIND[name], MEANS[name], NULL, reason or "more columns than rows")
    k = [w for w in (windows or default_windows(n)) if 4 * w < n][-1:] or [max(1, n // 5)]
    clock = steps.astype(np.float64)
    models = [noise_around_drift(compact(matrices[:, :, j]), clock) for j in range(r)]
    m = max(r + 1, min(DIMENSIONS, round(min(model[0].dimensions for model in models))))
    # columns keep their mutual angles, so that a subspace that is nearly flat stays so under the null
    drift = matrices[-1] - matrices[0]
    unit = drift / np.maximum(norms(drift.T), 1e-300)
    values, vectors = np.linalg.eigh(unit.T @ unit)
    axes = np.zeros((m, r))
    axes[:r] = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T

    def paths(straight: bool) -> Array:
        columns = []
        for j, (noise, speed) in enumerate(models):
            increments = noise.sample(n_null, m, rng)
            if straight:
                increments += speed[:, None] * axes[:, j]
            columns.append(accumulate(increments))
        return np.stack(columns, axis=-1)

    def statistic(b: Array) -> tuple[Array, Array, Array]:
        mean = principal_cosines(b, k[0]).mean(axis=-1)
        height = np.where(np.isfinite(h := peak_height(mean, k[0])), h, -np.inf)
        return height.max(axis=-1), height.argmax(axis=-1), mean

    value, record, mean = statistic(matrices)
    if not np.isfinite(value):
        why = "not measurable: no displacement of full rank away from the ends"
        return Detector.unmeasured(name, KIND[name], MEANS[name], NULL, why)
    p, _ = Nulls(paths(True), paths(False)).p_value(float(value), lambda x: statistic(x)[0])
    at = int(record)
    height = peak_height(mean, k[0])
    # half of the peak's height: a peak of width k has no sharper location than that
    above = np.flatnonzero(np.nan_to_num(height, nan=-np.inf) >= 0.5 * float(value))
    run = above[(above >= at - k[0]) & (above <= at + k[0])]
    low, high = float(steps[run.min()]), float(steps[run.max()])
    note = f"rank {r}, k = {k[0]} records; interval: half height of the peak"
    return Detector(name, KIND[name], float(steps[at]), low, high, float(mean[at]), p, MEANS[name], NULL, note)


def comp_detector(
    vectors: Array,
    steps: npt.NDArray[np.int64],
    centre: str,
    n_null: int,
    rng: np.random.Generator,
) -> tuple[Detector, Array]:
    """The comp score of several adapters ``[adapters, steps, d]`` and the step across which it rises most."""
    name = "comp"
    score = comp_score(vectors, centre)
    n = vectors.shape[1]
    reason = unmeasurable(np.moveaxis(vectors, 0, 1).reshape(n, -1))
    if reason:
        return Detector.unmeasured(name, KIND[name], MEANS[name], NULL, reason), score
    clock = steps.astype(np.float64)
    models = [noise_around_drift(compact(v), clock) for v in vectors]
    count = len(models)
    m = max(count + 1, min(DIMENSIONS // 2, round(min(model[0].dimensions for model in models))))
    drift = vectors[:, -1] - vectors[:, 0]
    unit = drift / np.maximum(norms(drift), 1e-300)[:, None]
    values, basis = np.linalg.eigh(unit @ unit.T)
    axes = np.zeros((count, m))
    axes[:, :count] = basis * np.sqrt(np.maximum(values, 0.0)) @ basis.T
    k = max(2, n // 10)

    def paths(straight: bool) -> Array:
        found = []
        for axis, (noise, speed) in zip(axes, models, strict=True):
            increments = noise.sample(n_null, m, rng)
            if straight:
                increments += speed[:, None] * axis
            found.append(accumulate(increments))
        return np.stack(found, axis=1)

    def statistic(values: Array) -> tuple[Array, Array]:
        rise = values[..., 2 * k :] - values[..., : -2 * k]
        rise = np.where(np.isfinite(rise), rise, -np.inf)
        return rise.max(axis=-1), rise.argmax(axis=-1) + k

    value, record = statistic(score)
    if not np.isfinite(value):
        why = "not measurable: the adapters have no arrangement to compare"
        return Detector.unmeasured(name, KIND[name], MEANS[name], NULL, why), score
    p, _ = Nulls(paths(True), paths(False)).p_value(float(value), lambda x: statistic(comp_score(x, centre))[0])
    at = int(record)
    low, high = float(steps[at - k]), float(steps[at + k])
    note = f"de-meaned over {centre}; rise over {2 * k} records, which is the interval"
    return Detector(name, KIND[name], float(steps[at]), low, high, float(value), p, MEANS[name], NULL, note), score
