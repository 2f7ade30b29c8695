"""The geometric detectors of one trajectory: where each sees a turn, how strong, and how often chance does as well.

All detectors of a trajectory share one ensemble of null paths (:mod:`emmech.transition.changepoint`), and their
intervals come from one ensemble of paths simulated with the turn that was fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from emmech.geometry import local_cosine, norms, pca, peak_height
from emmech.transition.changepoint import Nulls
from emmech.transition.turn import Location, find_turn, locate

__all__ = [
    "KIND",
    "MEANS",
    "NULL",
    "Detector",
    "Trajectory",
    "analyse",
    "compact",
    "default_windows",
    "unmeasurable",
]

Array = npt.NDArray[np.float64]

FEWEST = 10  # records: below this no path has two sides to compare
NULL = "straight path and random walk with the run's own noise; the larger p-value"


@dataclass(frozen=True)
class Detector:
    """One row of the table: a detector's step with interval, strength, and p-value against its null model.

    ``step``, ``low`` and ``high`` are optimiser steps; NaN where nothing could be measured, and ``note`` says why.
    """

    name: str
    kind: str
    step: float
    low: float
    high: float
    strength: float
    p_value: float
    high_means: str
    null_model: str
    note: str = ""

    @classmethod
    def unmeasured(cls, name: str, kind: str, high_means: str, null_model: str, note: str) -> Detector:
        """A row without numbers that says why."""
        nan = float("nan")
        return cls(name, kind, nan, nan, nan, nan, nan, high_means, null_model, note)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was measured along one trajectory, for drawing and for comparing runs.

    Attributes:
        steps: ``[steps]``.
        cosines: local cosine by k, ``[steps]`` each.
        band: 95 % range of each k's local cosine on a straight path with this noise, ``(low, high)``.
        norm: ``[steps]``.
        scores: ``[steps, components]``, principal components.
        explained: ``[components]``.
        location: the fitted turn, or None where nothing could be fitted.
        width_share: share of the path over which the fitted turn is spread.
        opposite: of a control, the angle at the step and width of the run's own turn.
        detectors: the rows.
    """

    steps: npt.NDArray[np.int64]
    norm: Array
    scores: Array
    explained: Array
    cosines: dict[int, Array] = field(default_factory=dict)
    band: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    location: Location | None = None
    width_share: float = float("nan")
    opposite: Location | None = None
    detectors: tuple[Detector, ...] = ()


MEANS = {
    "turn": "turn angle in degrees: 0 straight on, 90 a right angle, 180 a reversal",
    "local-cosine": "local cosine at its sharpest peak: -1 straight, 0 a right angle, +1 a reversal",
    "pca-turn": "share of variance in the second component: high means a path bent in a plane",
    "norm-growth": "growth rate of the norm after the step over before: 1 no change, below 1 slower",
    "subspace": "mean signed cosine of the principal angles: -1 straight on, +1 a reversal",
    "comp": "rise of the comp score across the step: high means the adapters rearranged to their final form",
}
KIND = {
    "turn": "direction",
    "local-cosine": "direction",
    "pca-turn": "projection",
    "norm-growth": "norm",
    "subspace": "subspace",
    "comp": "adapters",
}


def default_windows(n: int) -> tuple[int, ...]:
    """Half-widths for the local cosine: 5, 10, 20, 40 recorded steps as far as the path holds each five times."""
    windows = tuple(k for k in (5, 10, 20, 40) if 5 * k <= n)
    return windows or (max(1, n // 5),)


def analyse(
    path: Array,
    steps: npt.NDArray[np.int64],
    windows: Sequence[int] | None,
    n_null: int,
    rng: np.random.Generator,
    beside: Trajectory | None = None,
) -> Trajectory:
    """Run the detectors of a vector trajectory ``[steps, d]``.

    ``beside`` is the run that this one is the control of: the angle at that run's turn is measured here too.
    """
    n = len(path)
    coordinates = compact(path)
    components = pca(coordinates)
    scores, explained = components.scores, components.explained
    norm = norms(path)
    reason = unmeasurable(path)
    if reason:
        none = tuple(
            Detector.unmeasured(name, KIND[name], MEANS[name], NULL, reason)
            for name in ("turn", "local-cosine", "pca-turn", "norm-growth")
        )
        return Trajectory(steps, norm, scores, explained, detectors=none)
    clock = steps.astype(np.float64)
    turn = find_turn(coordinates, clock, n_null, rng)
    where, noise, nulls = turn.location, turn.noise, turn.nulls
    bent = turn.simulate(100, rng)
    width_share = where.width / (n - 1)
    opposite = None
    if beside is not None and beside.location is not None:
        target = int(np.abs(steps - beside.steps[beside.location.record]).argmin())
        opposite = locate(coordinates, noise, turn.speed, rng, at=(target, beside.location.width))
    note = f"bend energy {turn.energy:.3g} times the noise; nearest null: {turn.nearest_null}"
    if where.width:
        note += f"; spread over about {where.width} records"
    if noise.wanders:
        note += "; the direction wanders for longer than momentum explains, which the null models do not cover"
    rows = [
        Detector(
            "turn",
            KIND["turn"],
            float(steps[where.record]),
            float(steps[where.low]),
            float(steps[where.high]),
            where.angle,
            turn.p_value,
            MEANS["turn"],
            NULL,
            note,
        )
    ]
    ks = tuple(windows) if windows is not None else default_windows(n)
    cosines = {k: local_cosine(path, k, floor=noise.floor(k)) for k in ks}
    straight = {k: local_cosine(nulls.straight, k) for k in ks}
    with np.errstate(all="ignore"):
        band = {k: (_quantile(straight[k], 0.025), _quantile(straight[k], 0.975)) for k in ks}
    rows.append(_cosine_row(cosines, straight, nulls, bent, steps))
    rows.append(_pca_row(coordinates, explained, nulls, bent, steps))
    rows.append(_norm_row(norm, clock, nulls, bent, steps))
    return Trajectory(steps, norm, scores, explained, cosines, band, where, width_share, opposite, tuple(rows))


def unmeasurable(path: Array) -> str:
    """Why a path cannot have a turn measured, or an empty string."""
    if len(path) < FEWEST:
        return f"not measurable: {len(path)} recorded steps, at least {FEWEST} are needed"
    moved = norms(np.diff(path, axis=0)) > 0
    if not moved.any():
        return "not measurable: the adapter never moved"
    if moved.sum() < FEWEST - 1:
        return f"not measurable: the adapter moved between {int(moved.sum())} records only"
    return ""


def compact(path: Array) -> Array:
    """The same path in at most ``steps`` coordinates: every inner product is kept, origin at the first record."""
    v = np.asarray(path, dtype=np.float64) - path[0]
    if v.shape[1] <= v.shape[0]:
        return v
    values, vectors = np.linalg.eigh(v @ v.T)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def _interval(steps: npt.NDArray[np.int64], record: int, simulated: Array) -> tuple[float, float, float]:
    low, high = np.quantile(simulated, [0.025, 0.975], method="nearest").astype(int)
    return float(steps[record]), float(steps[min(low, record)]), float(steps[max(high, record)])


def _quantile(values: Array, q: float) -> Array:
    out = np.full(values.shape[1:], np.nan)
    inside = np.isfinite(values).all(axis=0)
    out[inside] = np.quantile(values[:, inside], q, axis=0)
    return out


# each statistic below takes paths [..., steps, d], so that a run and its null paths go through the same code


def _sharpest(heights: dict[int, Array], unit: dict[int, float]) -> tuple[Array, Array, Array]:
    """Largest standardised peak height over k and t: (value, index of k, record)."""
    stacked = np.stack([np.where(np.isfinite(h), h, -np.inf) / unit[k] for k, h in heights.items()], axis=-2)
    flat = stacked.reshape(*stacked.shape[:-2], -1)
    best = flat.argmax(axis=-1)
    value = np.take_along_axis(flat, best[..., None], axis=-1)[..., 0]
    return value, best // stacked.shape[-1], best % stacked.shape[-1]


def _cosine_row(
    cosines: dict[int, Array],
    straight: dict[int, Array],
    nulls: Nulls,
    bent: Array,
    steps: npt.NDArray[np.int64],
) -> Detector:
    name = "local-cosine"
    ks = [k for k in cosines if 4 * k < len(steps)]
    unit = {k: float(np.nanstd(peak_height(straight[k], k))) or 1.0 for k in ks}

    def statistic(values: dict[int, Array]) -> tuple[Array, Array, Array]:
        return _sharpest({k: peak_height(values[k], k) for k in ks}, unit)

    if not ks or not any(np.isfinite(peak_height(cosines[k], k)).any() for k in ks):
        why = "not measurable: no window k whose displacements rise above the noise floor"
        return Detector.unmeasured(name, KIND[name], MEANS[name], NULL, why)
    value, which, record = statistic(cosines)
    k = ks[int(which)]
    p, _ = nulls.p_value(float(value), lambda x: statistic({j: local_cosine(x, j) for j in ks})[0])
    simulated = statistic({j: local_cosine(bent, j) for j in ks})[2]
    step, low, high = _interval(steps, int(record), simulated)
    note = f"k = {k} records; corrected for the maximum over t and over k in {tuple(ks)}"
    return Detector(name, KIND[name], step, low, high, float(cosines[k][int(record)]), p, MEANS[name], NULL, note)


def _second_component(paths: Array) -> tuple[Array, Array]:
    """Variance along PC2 and the record at which PC2 is farthest from its own chord, for paths [n, steps, d]."""
    centred = paths - paths.mean(axis=-2, keepdims=True)
    values, vectors = np.linalg.eigh(np.swapaxes(centred, -1, -2) @ centred)
    if values.shape[-1] < 2:
        zero = np.zeros(paths.shape[0])
        return zero, zero.astype(int)
    y = (centred @ vectors[..., -2:-1])[..., 0]
    line = y[..., :1] + (y[..., -1:] - y[..., :1]) * np.linspace(0, 1, y.shape[-1])
    return values[..., -2], np.abs(y - line).argmax(axis=-1)


def _pca_row(path: Array, explained: Array, nulls: Nulls, bent: Array, steps: npt.NDArray[np.int64]) -> Detector:
    name = "pca-turn"
    if len(explained) < 2:
        return Detector.unmeasured(name, KIND[name], MEANS[name], NULL, "not measurable: the path has one dimension")
    value, record = _second_component(path[None])
    p, _ = nulls.p_value(float(value[0]), lambda x: _second_component(x)[0])
    step, low, high = _interval(steps, int(record[0]), _second_component(bent)[1])
    note = f"PC1 {100 * explained[0]:.0f} %, PC2 {100 * explained[1]:.0f} %"
    return Detector(name, KIND[name], step, low, high, float(explained[1]), p, MEANS[name], NULL, note)


def _norm_break(norm: Array, clock: Array) -> tuple[Array, Array]:
    """Improvement of the best broken line over a parabola, and the record of its break, for norms [n, steps]."""
    time = (clock - clock[0]) / (clock[-1] - clock[0])
    n = len(time)
    base = np.stack([np.ones(n), time], axis=1)
    energy = np.sum((norm - norm.mean(axis=-1, keepdims=True)) ** 2, axis=-1)

    def residual(extra: Array) -> Array:
        q, _ = np.linalg.qr(np.column_stack([base, extra]))
        return np.maximum(np.sum((norm - (norm @ q) @ q.T) ** 2, axis=-1), 1e-12 * energy + 1e-300)

    breaks = np.unique(np.linspace(max(2, n // 20), n - 1 - max(2, n // 20), min(n, 80)).astype(int))
    losses = np.stack([residual(np.maximum(time - time[b], 0.0)) for b in breaks])
    best = losses.argmin(axis=0)
    return residual(time**2) / losses.min(axis=0), breaks[best]


def _norm_row(norm: Array, clock: Array, nulls: Nulls, bent: Array, steps: npt.NDArray[np.int64]) -> Detector:
    name = "norm-growth"
    moved = norm - norm[0] if norm[0] > 0 else norm
    value, record = _norm_break(moved[None], clock)
    p, _ = nulls.p_value(float(value[0]), lambda x: _norm_break(norms(x), clock)[0])
    step, low, high = _interval(steps, int(record[0]), _norm_break(norms(bent), clock)[1])
    at = int(record[0])
    slope = [np.polyfit(clock[s], norm[s], 1)[0] for s in (slice(0, at + 1), slice(at, None))]
    ratio = float(slope[1] / slope[0]) if slope[0] != 0 else float("nan")
    return Detector(
        name,
        KIND[name],
        step,
        low,
        high,
        ratio,
        p,
        MEANS[name],
        NULL,
        "broken line against a smooth parabola",
    )
