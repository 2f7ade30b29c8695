"""Is there a turn in a path, and where: a broken line against a straight path and against a random walk.

A local cosine alone cannot tell a turn from diffusion: a random walk has peaks too. What sets a turn apart is that
the path is *straight on both sides over many records*. For a split at t let L = v[t] - v[0] and R = v[T] - v[t] be
the two chords, each divided by the length that noise alone would give it (see :mod:`emmech.transition.noise`). The
**bend energy** is the energy that the best single direction leaves unexplained, the smaller eigenvalue of their
2 x 2 Gram matrix; where the chords point against each other, one direction with forward speeds explains only the
larger one. It does not depend on the speed along the path. On a straight path and on a random walk alike it is
about 1 (noise); at a turn it grows with the length of the straight parts.

The p-value is the larger of two, one for each null hypothesis:

- *straight path*: the fitted speed along one direction plus resampled noise with the energy at each record, the
  autocorrelation and the effective dimensions of the run;
- *random walk*: the same noise with no direction at all.

Both count the maximum over all splits, and both are granted more noise than was estimated: ``GRANTED``
times, and the more so the longer its memory is against the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from emmech.transition.noise import Noise, estimate_noise

__all__ = [
    "Nulls",
    "accumulate",
    "bend_energy",
    "chord_noise",
    "drift_speed",
    "noise_around_drift",
    "simulate_nulls",
    "upper_tail",
]

Array = npt.NDArray[np.float64]

GRANTED = 1.25  # the nulls' noise energy over the estimate: covers the error of estimating it on short paths
DIMENSIONS = 48  # of simulated nulls at most: fewer dimensions fluctuate more, so the cap errs to the safe side
LEAST_SIDE = 0.01  # length of a side over the path's extent, below which its direction is not worth a name
SHORTEST = 3  # increments on either side of a split


def chord_noise(noise: Noise) -> tuple[Array, Array]:
    """Expected squared length, from noise alone, of the chords before and after each of the ``steps`` records."""
    c = noise.covariance()
    n = len(c)
    total = np.zeros((n + 1, n + 1))
    total[1:, 1:] = c.cumsum(0).cumsum(1)
    i = np.arange(n + 1)
    before = total[i, i]
    after = total[n, n] - 2 * total[i, n] + total[i, i]
    tiny = 1e-12 * max(total[n, n], float(noise.energy.max()))
    return np.maximum(before, tiny), np.maximum(after, tiny)


def bend_energy(paths: npt.ArrayLike, before: Array, after: Array) -> Array:
    """Energy in units of noise that one direction leaves unexplained, for a split at each record.

    Args:
        paths: ``[..., steps, d]``.
        before: ``[steps]``, squared length of the chord up to each record expected from noise alone.
        after: ``[steps]``, the same for the chord from there on.

    Returns:
        ``[..., steps]``, about 1 where the path is straight or diffuses, NaN within 3 records of an end;
        high means a turn.
    """
    v = np.asarray(paths, dtype=np.float64)
    v = v - v[..., :1, :]
    n = v.shape[-2]
    chord = v[..., -1, :]
    ll = np.einsum("...td,...td->...t", v, v)
    lc = np.einsum("...td,...d->...t", v, chord)
    cc = np.einsum("...d,...d->...", chord, chord)[..., None]
    inside = slice(SHORTEST, n - SHORTEST)
    left = (ll / before)[..., inside]
    right = ((cc - 2 * lc + ll) / after)[..., inside]
    cross = ((lc - ll) / np.sqrt(before * after))[..., inside]
    smaller = 0.5 * (left + right - np.sqrt((left - right) ** 2 + 4 * cross**2))
    values = np.where(cross > 0, smaller, np.minimum(left, right))
    longest = LEAST_SIDE**2 * ll.max(axis=-1, keepdims=True)
    short = np.minimum(ll, cc - 2 * lc + ll)[..., inside] < longest
    out = np.full(ll.shape, np.nan)
    out[..., inside] = np.where(short, 0.0, np.maximum(values, 0.0))
    return out


def drift_speed(path: npt.ArrayLike, split: int, clock: Array) -> Array:
    """Drift of each increment along its side's chord, a quadratic in time: ``[steps - 1]``, never negative.

    ``clock`` is ``[steps]``, the optimiser step of each record; the quadratic covers constant, linear and cosine
    schedules well enough, and three numbers cannot follow the noise.
    """
    v = np.asarray(path, dtype=np.float64)
    increments = np.diff(v, axis=0)
    gap = np.diff(clock) / np.mean(np.diff(clock))
    middle = 0.5 * (clock[1:] + clock[:-1])
    middle = (middle - middle.mean()) / max(float(np.ptp(middle)), 1e-12)
    along = np.empty(len(increments))
    for side in (slice(0, split), slice(split, None)):
        chord = increments[side].sum(axis=0)
        length = float(np.linalg.norm(chord))
        along[side] = increments[side] @ chord / length if length > 0 else 0.0
    coefficients = np.polyfit(middle, along / gap, 2)
    speed = np.maximum(np.polyval(coefficients, middle), 0.02 * np.mean(np.abs(along / gap)))
    return np.maximum(speed, 1e-300) * gap


def noise_around_drift(path: npt.ArrayLike, clock: Array) -> tuple[Noise, Array]:
    """Noise of a path and the speed of its drift, ``[steps - 1]``.

    A speed that changes along the path looks, in the variogram, like noise with a long memory. So the noise is
    estimated twice: first to find the split with the most bend energy, then around the drift on either side of it.
    """
    v = np.asarray(path, dtype=np.float64)
    gap = np.diff(clock)
    first = estimate_noise(v, gap)
    white = Noise(first.energy, 0.0, 0.0, first.dimensions)
    split = int(np.nanargmax(bend_energy(v, *chord_noise(white))))
    speed = drift_speed(v, split, clock)
    increments = np.diff(v, axis=0)
    for side in (slice(0, split), slice(split, None)):
        chord = increments[side].sum(axis=0)
        length = float(np.linalg.norm(chord))
        if length > 0:
            increments[side] -= speed[side, None] * chord / length
    around = np.vstack([np.zeros(v.shape[1]), np.cumsum(increments, axis=0)])
    noise = estimate_noise(around, gap)
    rounding = 1e-13 * float(np.mean(np.einsum("td,td->t", v - v[0], v - v[0])))  # of a float32 record
    return replace(noise, energy=np.maximum(noise.energy, rounding)), speed


@dataclass(frozen=True, eq=False)
class Nulls:
    """Simulated paths under the two null hypotheses, each ``[n_null, steps, dimensions]``.

    Example:
        ``nulls.p_value(observed, statistic)`` is the larger of the two hypotheses' p-values.
    """

    straight: Array
    random_walk: Array

    def p_value(self, observed: float, statistic: Callable[[Array], Array]) -> tuple[float, str]:
        """Larger of the two p-values of a statistic of paths ``[n_null, ...] -> [n_null]``, and whose it is."""
        if not np.isfinite(observed):
            return float("nan"), ""
        values = {
            name: upper_tail(observed, statistic(paths))
            for name, paths in (("straight path", self.straight), ("random walk", self.random_walk))
        }
        worst = max(values, key=lambda name: values[name])
        return values[worst], worst


def upper_tail(observed: float, null: npt.ArrayLike) -> float:
    """(1 + number of null values at least as high) / (1 + number of null values)."""
    values = np.asarray(null, dtype=np.float64)
    values = values[np.isfinite(values)]
    return float((1 + np.count_nonzero(values >= observed)) / (1 + len(values)))


def simulate_nulls(noise: Noise, speed: Array, n_null: int, rng: np.random.Generator) -> Nulls:
    """Draw paths with the run's noise: along one direction at the run's speed, and without any direction."""
    m = int(np.clip(round(noise.dimensions), 1, DIMENSIONS))
    # a path of n records holds n / m pieces of evidence on a memory of m records
    excess = GRANTED * (1 + np.sqrt((noise.memory_time - 1) / len(speed)))
    granted = Noise(excess * noise.energy, noise.first, noise.memory, noise.dimensions)
    straight = granted.sample(n_null, m, rng)
    straight[..., 0] += speed
    walk = granted.sample(n_null, m, rng)
    return Nulls(accumulate(straight), accumulate(walk))


def accumulate(increments: Array) -> Array:
    """Paths ``[n, steps, d]`` from zero with these increments ``[n, steps - 1, d]``."""
    paths = np.zeros((increments.shape[0], increments.shape[1] + 1, increments.shape[2]))
    np.cumsum(increments, axis=1, out=paths[:, 1:])
    return paths
