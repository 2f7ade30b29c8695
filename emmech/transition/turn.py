"""The turn of a path: whether there is one, at which record, how wide, and by what angle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emmech.transition.changepoint import find_kink, ramp
from emmech.transition.noise import Noise, noise_around_drift

Array = npt.NDArray[np.float64]


DIMENSIONS = 48  # at most, of the draws for the angle's interval
LONGEST = 300  # records that are tested at most: a longer path is tested at every second, third, ... record


@dataclass(frozen=True, eq=False)
class Turn:
    """The test for an abrupt turn and its location.

    Attributes:
        p_value: larger of the p-values against smooth paths, for the best of all kinks.
        nearest_null: the null that gives it.
        energy: largest kink energy, in units of noise.
        location: where and by how much, given that the path turns.
        noise: of the increments.
        speed: ``[steps - 1]``, drift of each increment.
    """

    p_value: float
    nearest_null: str
    energy: float
    location: Location
    noise: Noise
    speed: Array


def find_turn(path: npt.ArrayLike, clock: npt.ArrayLike, n_null: int, rng: np.random.Generator) -> Turn:
    """Test a path ``[steps, d]`` of at least 10 records for an abrupt turn, and locate it.

    Args:
        path: the recorded vectors; only their inner products matter.
        clock: ``[steps]``, ascending: the optimiser step of each record.
        n_null: null paths for each of the two nulls.
        rng: source of the null paths.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> increments = np.repeat(np.eye(64)[:2], 50, axis=0) + rng.standard_normal((100, 64)) / 8
        >>> path = np.vstack([np.zeros(64), np.cumsum(increments, axis=0)])
        >>> turn = find_turn(path, np.arange(101.0), 99, rng)
        >>> turn.p_value, turn.location.record
        (0.01, 50)
    """
    v, time = np.asarray(path, dtype=np.float64), np.asarray(clock, dtype=np.float64)
    noise, speed = noise_around_drift(v, time)
    every = -(-len(v) // LONGEST)
    tested, at = v[::every], time[::every]
    around = (noise, speed) if every == 1 else noise_around_drift(tested, at)
    kink = find_kink(np.diff(tested, axis=0), at, *around, n_null, rng)
    return Turn(kink.p_value, kink.nearest_null, kink.energy, locate(v, noise, speed, rng), noise, speed)


@dataclass(frozen=True, eq=False)
class Location:
    """Where a path turns, given that it does.

    Attributes:
        record: index of the recorded step at the middle of the turn.
        low, high: 95 % interval of the middle (indices), from the likelihood over middles and widths.
        width: records over which the direction changes (0: from one record to the next).
        angle: turn angle between the two directions in degrees, corrected for noise; NaN where one side is all noise.
        angle_low, angle_high: its 95 % interval.
    """

    record: int
    low: int
    high: int
    width: int
    angle: float
    angle_low: float
    angle_high: float


def locate(path: npt.ArrayLike, noise: Noise, speed: Array, rng: np.random.Generator) -> Location:
    """Fit two directions joined by a ramp of unknown middle and width, by weighted least squares.

    Independent errors of the records, which neighbouring increments share with opposite signs, enter the weights. A
    memory of the noise does not, because a slow bend would then pass for noise and a small kink for the turn; it
    flattens the likelihood instead, as does anything else that the fit leaves beyond the noise.
    """
    increments = np.diff(np.asarray(path, dtype=np.float64), axis=0)
    n = len(increments)
    # a record that hardly moved (a step size near zero) must not outweigh all others
    energy = np.maximum(noise.energy, 0.01 * np.median(noise.energy))
    weights = Noise(energy, min(noise.first, 0.0), 0.0, noise.dimensions)
    values, vectors = np.linalg.eigh(weights.covariance())
    values = np.maximum(values, 1e-9 * values[-1])
    precision = (vectors / values) @ vectors.T
    gram = precision @ (increments @ increments.T) @ precision
    weighted_precision = precision * speed[:, None] * speed[None, :]
    weighted_gram = gram * speed[:, None] * speed[None, :]
    middles = np.arange(1, n)
    widths = [0, *(w for w in (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512) if w <= n)]
    reduction = np.full((len(widths), len(middles)), -np.inf)
    for row, width in enumerate(widths):
        ahead = ramp(n, middles, width)
        fitted = _reduction(weighted_precision, weighted_gram, ahead)
        # a ramp that extends beyond the path would be a turn that is seen only in part
        inside = (middles >= width / 2) & (middles <= n - width / 2)
        reduction[row, inside] = fitted[inside]
    best_row, best_column = np.unravel_index(int(np.argmax(reduction)), reduction.shape)
    total = float(np.sum(precision * (increments @ increments.T)))
    excess = max((total - float(reduction.max())) / max(n - 2, 1), noise.memory_time)
    log_likelihood = 0.5 * noise.dimensions * (reduction - reduction.max()) / excess
    marginal = np.exp(log_likelihood).sum(axis=0)
    mass: Array = np.cumsum(marginal) / marginal.sum()
    record = int(middles[best_column])
    low, high = (int(middles[min(int(np.searchsorted(mass, q)), n - 2)]) for q in (0.025, 0.975))
    width = widths[best_row]
    ahead = ramp(n, np.array([record]), width)[:, 0]
    design = speed[:, None] * np.stack([1 - ahead, ahead], axis=1)
    angle, angle_low, angle_high = _angle(design, precision, increments, noise.dimensions, excess, rng)
    return Location(record, min(low, record), max(high, record), width, angle, angle_low, angle_high)


def _reduction(weighted_precision: Array, weighted_gram: Array, ahead: Array) -> Array:
    """Trace of (X'PX)^-1 X'PKPX for X = speed * [1 - ahead, ahead], for every column of ``ahead``."""

    def forms(matrix: Array) -> tuple[Array, Array, Array]:
        product = matrix @ ahead
        bb = np.einsum("im,im->m", ahead, product)
        ab = product.sum(axis=0) - bb
        aa = matrix.sum() - 2 * product.sum(axis=0) + bb
        return aa, ab, bb

    paa, pab, pbb = forms(weighted_precision)
    gaa, gab, gbb = forms(weighted_gram)
    determinant = np.maximum(paa * pbb - pab**2, 1e-12 * np.abs(paa * pbb) + 1e-300)
    return (pbb * gaa - 2 * pab * gab + paa * gbb) / determinant


def _angle(
    design: Array, precision: Array, increments: Array, dimensions: float, excess: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    normal = np.linalg.pinv(design.T @ precision @ design)
    coefficients = normal @ (design.T @ precision @ increments)
    normal = excess * normal
    angle = float(_between(coefficients @ coefficients.T - normal))
    m = int(np.clip(round(dimensions), 2, DIMENSIONS))
    plane = np.linalg.svd(coefficients, full_matrices=False)
    known = (plane[0] * plane[1])[:, : min(2, plane[0].shape[1])]
    root = np.linalg.cholesky(normal + 1e-12 * np.trace(normal) * np.eye(2))
    draws = np.zeros((400, 2, max(m, known.shape[1])))
    draws[:, :, : known.shape[1]] = known
    draws += np.matmul(root, rng.standard_normal(draws.shape)) / np.sqrt(draws.shape[-1])
    # the drawn coefficients contain the noise twice: once from the data and once from the draw
    grams = np.matmul(draws, np.swapaxes(draws, -1, -2)) - 2 * normal
    if np.isnan(angle):
        return angle, 0.0, 180.0
    # a draw without a direction on one side is as likely acute as obtuse, so it counts as a right angle
    low, high = np.quantile(np.nan_to_num(_between(grams), nan=90.0), [0.025, 0.975])
    return angle, float(min(low, angle)), float(max(high, angle))


def _between(gram: Array) -> Array:
    """Angle in degrees between two vectors from their Gram matrix ``[..., 2, 2]``.

    NaN where the length of a side is all noise, so that it has no direction.
    """
    first, second = gram[..., 0, 0], gram[..., 1, 1]
    known = (first > 0) & (second > 0)
    size = np.sqrt(np.where(known, first * second, 1.0))
    return np.degrees(np.arccos(np.clip(np.where(known, gram[..., 0, 1] / size, np.nan), -1.0, 1.0)))
