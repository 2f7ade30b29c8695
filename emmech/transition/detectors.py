"""What is seen on one trajectory: the turn, which is tested, and the papers' pictures of it, which are not.

A picture (the local cosine, the gradient norm's peak, the comp score) has a step and a strength but no p-value: its
peak is high on smooth bends and on an optimiser's transients as well, and no null model for it kept the rate of false
calls there under 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from emmech.geometry import local_cosine, norms, pca, peak_height
from emmech.transition.noise import Noise
from emmech.transition.turn import DIMENSIONS, Location, find_turn

Array = npt.NDArray[np.float64]

FEWEST = 10  # records: a shorter path does not have two sides to compare
NULL = "smooth path with the run's own noise, Gaussian or with flipped signs; the larger p-value"
PICTURE = "none: a picture, without a test"


@dataclass(frozen=True)
class Detector:
    """One row of the table: a detector's step with interval, strength, and p-value against its null model.

    ``step``, ``low`` and ``high`` are optimiser steps; NaN where nothing could be measured, and ``note`` says why.
    ``p_value`` is NaN for a picture, which is not tested.
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
        """A row without numbers, with a note that says why."""
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
        reach: length of the path across the turn, corrected for noise, and its standard error; for a control, across
            the turn of the run. NaN without a turn.
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
    reach: tuple[float, float] = (float("nan"), float("nan"))
    detectors: tuple[Detector, ...] = ()


MEANS = {
    "turn": "turn angle in degrees: 0 straight on, 90 a right angle, 180 a reversal",
    "local-cosine": "local cosine at its sharpest peak: -1 straight, 0 a right angle, +1 a reversal",
    "comp": "rise of the comp score across the step: high means the adapters rearranged to their final form",
}
KIND = {"turn": "direction", "local-cosine": "direction", "comp": "adapters"}


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

    ``beside`` is the run whose control this one is: what is measured across the turn is then measured across the turn
    of that run.
    """
    n = len(path)
    coordinates = compact(path)
    components = pca(coordinates)
    scores, explained = components.scores, components.explained
    norm = norms(path)
    reason = unmeasurable(path)
    if reason:
        none = tuple(
            Detector.unmeasured(name, KIND[name], MEANS[name], NULL, reason) for name in ("turn", "local-cosine")
        )
        return Trajectory(steps, norm, scores, explained, detectors=none)
    clock = steps.astype(np.float64)
    turn = find_turn(coordinates, clock, n_null, rng)
    where = turn.location
    width_share = where.width / (n - 1)
    across = (steps, where) if beside is None else (beside.steps, beside.location)
    note = f"kink energy {turn.energy:.3g} times the noise; nearest null: {turn.nearest_null}"
    if where.width:
        note += f"; spread over about {where.width} records"
    if turn.noise.wanders:
        note += "; the direction wanders for longer than momentum explains, which the null models do not cover"
    row = Detector(
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
    ks = tuple(windows) if windows is not None else default_windows(n)
    cosines = {k: local_cosine(path, k, floor=turn.noise.floor(k)) for k in ks}
    lines = _straight(turn.noise, turn.speed, rng)
    straight = {k: local_cosine(lines, k) for k in ks}
    with np.errstate(all="ignore"):
        band = {k: (_quantile(straight[k], 0.025), _quantile(straight[k], 0.975)) for k in ks}
    rows = (row, _cosine_row(cosines, straight, steps))
    return Trajectory(
        steps,
        norm,
        scores,
        explained,
        cosines,
        band,
        where,
        width_share,
        _reach(coordinates, steps, turn.noise, *across),
        rows,
    )


def _reach(
    path: Array, steps: npt.NDArray[np.int64], noise: Noise, of: npt.NDArray[np.int64], where: Location | None
) -> tuple[float, float]:
    """Displacement over the width of a turn, but at least over a tenth of the path, and its standard error."""
    if where is None:
        return float("nan"), float("nan")
    half = max(where.width, len(of) // 10) / 2
    ends = np.clip([int(np.floor(where.record - half)), int(np.ceil(where.record + half))], 0, len(of) - 1)
    start, stop = (int(np.abs(steps - of[end]).argmin()) for end in ends)
    if stop <= start:
        return float("nan"), float("nan")
    energy = float(noise.covariance()[start:stop, start:stop].sum())
    length = float(np.sum((path[stop] - path[start]) ** 2)) - energy
    return max(length, 0.0) ** 0.5, (energy / noise.dimensions) ** 0.5


def _straight(noise: Noise, speed: Array, rng: np.random.Generator, count: int = 200) -> Array:
    """Straight paths with the run's speed and noise, ``[count, steps, dimensions]``, for the local cosine's band."""
    increments = noise.sample(count, int(np.clip(round(noise.dimensions), 1, DIMENSIONS)), rng)
    increments[..., 0] += speed
    return np.concatenate([np.zeros_like(increments[:, :1]), np.cumsum(increments, axis=1)], axis=1)


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
    """The same path from its first record, in at most ``steps`` coordinates that keep every inner product."""
    v = np.asarray(path, dtype=np.float64) - path[0]
    if v.shape[1] <= v.shape[0]:
        return v
    values, vectors = np.linalg.eigh(v @ v.T)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def _quantile(values: Array, q: float) -> Array:
    out = np.full(values.shape[1:], np.nan)
    inside = np.isfinite(values).all(axis=0)
    out[inside] = np.quantile(values[:, inside], q, axis=0)
    return out


def _cosine_row(cosines: dict[int, Array], straight: dict[int, Array], steps: npt.NDArray[np.int64]) -> Detector:
    """The sharpest peak over k and t, each k in units of the effect of noise on the peaks of a straight path."""
    name = "local-cosine"
    n = len(steps)
    ks = [k for k in cosines if 4 * k < n]
    heights = np.full((len(ks), n), -np.inf)
    for row, k in enumerate(ks):
        height = peak_height(cosines[k], k) / (float(np.nanstd(peak_height(straight[k], k))) or 1.0)
        heights[row] = np.where(np.isfinite(height), height, -np.inf)
    if not np.isfinite(heights).any():
        why = "not measurable: no window k whose displacements rise above the noise floor"
        return Detector.unmeasured(name, KIND[name], MEANS[name], PICTURE, why)
    which, at = np.unravel_index(int(np.argmax(heights)), heights.shape)
    k = ks[int(which)]
    step, low, high = (float(steps[i]) for i in (at, at - k, at + k))
    note = f"k = {k} records of {tuple(ks)}; from {low:.0f} to {high:.0f} is the window, no confidence interval"
    return Detector(name, KIND[name], step, low, high, float(cosines[k][at]), np.nan, MEANS[name], PICTURE, note)
