"""The noise of a recorded path, estimated from the path itself.

Increments d_i = v[i+1] - v[i] are taken as drift plus noise. Everything is estimated from *differences of
increments*, in which a locally constant drift cancels, and by medians, which a turn (a small share of the pairs)
does not move:

- the energy of the noise at each increment, so that a falling step size or signal-to-noise ratio is followed, and an
  outlying increment is given its own energy;
- its autocorrelation, from the variogram: positive for optimisers with momentum (an ARMA(1, 1) form), negative
  where each record carries an error of its own (an MA(1) form);
- its effective number of dimensions, from the inner products of distant increments.

The memory is at most that of momentum (0.9 per optimiser step, and so less from record to record where not every step
is recorded): nothing in a single path distinguishes a direction that wanders more slowly from a path that bends, and
here it counts as bending. Noise with a longer memory is therefore **not covered** by the null models: walks whose
increments correlate at 0.97 per step are called turns. ``wanders`` is true
where the increments are correlated over longer times than momentum explains; a turn cannot then be told from slow
wandering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LONGEST_LAG = 20  # optimiser steps
# up to the momentum of AdamW (beta1 = 0.9), which is what gives an optimiser's noise its memory: a direction that
# changes more slowly counts as a bend of the path, not as noise
MEMORIES = np.array([0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9])
DOUBT = 0.1
OUTLIER = 2.5  # an increment keeps its own energy where that exceeds the energy around it by this factor
SHORTEST = 3  # increments on either side of a split
LEAST_SIDE = 0.01  # least length of a side, as a share of the path's extent, for its direction to mean anything


@dataclass(frozen=True, eq=False)
class Noise:
    """Noise of the increments of one path.

    Attributes:
        energy: ``[steps - 1]``, expected squared norm of each increment's noise.
        first: autocorrelation at lag 1 (upper estimate where negative).
        memory: factor by which the autocorrelation falls per further lag (0: no further correlation).
        dimensions: effective number of dimensions the noise fills.
        wanders: whether increments differ more and more with their distance, beyond what a memory of 0.9 explains.
    """

    energy: Array
    first: float
    memory: float
    dimensions: float
    wanders: bool = False

    def covariance(self) -> Array:
        """Covariance of the increments' noise, summed over dimensions: ``[steps - 1, steps - 1]``."""
        n = len(self.energy)
        lag = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        correlation = np.where(lag == 0, 1.0, self.first * self.memory ** np.maximum(lag - 1, 0))
        scale = np.sqrt(self.energy)
        return correlation * scale[:, None] * scale[None, :]

    @property
    def memory_time(self) -> float:
        """Correlation time of the noise in records: the variance of a long sum over that of white noise."""
        return max(1.0, 1 + 2 * self.first / (1 - self.memory))

    def floor(self, k: int) -> float:
        """Root-mean-square displacement over k recorded steps that the noise alone produces."""
        c = self.covariance()
        total = np.zeros((len(c) + 1, len(c) + 1))
        total[1:, 1:] = c.cumsum(0).cumsum(1)
        i = np.arange(len(c) + 1 - k)
        square = total[i + k, i + k] - 2 * total[i, i + k] + total[i, i]
        return float(np.sqrt(np.median(np.maximum(square, 0.0))))

    def sample(self, paths: int, dimensions: int, rng: np.random.Generator) -> Array:
        """Gaussian noise increments with this covariance, ``[paths, steps - 1, dimensions]``."""
        n = len(self.energy)
        z = rng.standard_normal((paths, n, dimensions)) / np.sqrt(dimensions)
        if self.first != 0.0:
            c = self.covariance()
            values, vectors = np.linalg.eigh(c)
            root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
            return np.matmul(root, z)
        return z * np.sqrt(self.energy)[:, None]


def estimate_noise(path: npt.ArrayLike, spacing: npt.ArrayLike | None = None) -> Noise:
    """Estimate the noise of a path ``[steps, d]`` (at least 5 steps).

    Args:
        path: the recorded vectors.
        spacing: ``[steps - 1]``, optimiser steps between records; increments over more steps carry more noise.
    """
    v = np.asarray(path, dtype=np.float64)
    v = v - v[0]
    gap = np.ones(len(v) - 1) if spacing is None else np.asarray(spacing, dtype=np.float64)
    apart = max(1.0, float(np.mean(gap)))  # optimiser steps
    gap = gap / np.mean(gap)
    # a drift grows with the gap and noise with its root: pairs are compared as increments per unit of time, in which
    # the drift is constant, and then scaled back
    rate = np.diff(v, axis=0) / gap[:, None]
    n = len(rate)
    pair = rate[1:] - rate[:-1]
    pair_energy = np.einsum("id,id->i", pair, pair) / (1 / gap[1:] + 1 / gap[:-1])
    dimensions = _effective_dimensions(pair)
    # the median of a chi-square over its mean (Wilson-Hilferty)
    shrink = (1 - 2 / (9 * dimensions)) ** 3
    width = int(np.clip(n // 8, 7, 51)) | 1
    local = _running_median(pair_energy, width) / shrink
    rounding = 1e-13 * float(np.mean(np.einsum("id,id->i", v, v)))  # of a float32 record
    local = np.maximum(local, max(rounding, 1e-290))
    per_increment = np.interp(np.arange(n), np.arange(n - 1) + 0.5, local)

    lags = np.arange(1, max(2, min(round(LONGEST_LAG / apart), n // 4)) + 1)
    # scaled to one energy first, so that pairs of early and late increments are comparable under a decaying step size
    scaled = rate * np.sqrt(gap / per_increment)[:, None]
    gram = scaled @ scaled.T
    diagonal = np.diag(gram)
    variogram = np.empty(len(lags))
    for j, lag in enumerate(lags):
        difference = diagonal[lag:] + diagonal[:-lag] - 2 * np.diagonal(gram, lag)
        variogram[j] = np.median(difference) / (2 * shrink)
    sill, first, memory = _fit_variogram(lags, variogram, dimensions * n, apart)
    # one outlying increment (a heavy tail, a bad batch) raises both pairs that it is part of; a kink raises only one
    own = 2 * np.minimum(np.append(pair_energy, np.inf), np.append(np.inf, pair_energy)) - per_increment
    energy = np.where(own > OUTLIER * per_increment, own, per_increment) * gap * sill
    # at a memory of 0.9 the variogram rises 1.35 times from lag 10 to 20, at 0.97 and along an arc 1.7 times or more
    half = len(lags) // 2
    memories = MEMORIES**apart
    expected = (1 - memories[-1] ** lags[-1]) / (1 - memories[-1] ** lags[half - 1]) if half else np.inf
    wanders = memory == memories[-1] and half > 2 and variogram[-1] > 1.15 * expected * variogram[half - 1]
    return Noise(energy, first, memory, dimensions, bool(wanders))


def noise_around_drift(path: npt.ArrayLike, clock: Array) -> tuple[Noise, Array]:
    """Noise of a path and the speed of its drift, ``[steps - 1]``.

    A speed that changes along the path looks, in the variogram, like noise with a long memory. So the noise is
    estimated twice: first to find the split into two straight sides that explains most, then around the drift along
    either side.
    """
    v = np.asarray(path, dtype=np.float64)
    gap = np.diff(clock)
    split = _best_split(v, estimate_noise(v, gap).energy)
    increments = np.diff(v, axis=0)
    chords = [increments[:split].sum(axis=0), increments[split:].sum(axis=0)]
    units = [chord / max(float(np.linalg.norm(chord)), 1e-300) for chord in chords]
    along = np.concatenate([increments[:split] @ units[0], increments[split:] @ units[1]])
    speed = _smooth_speed(along, clock)
    increments -= speed[:, None] * np.where(np.arange(len(speed))[:, None] < split, *units)
    around = np.vstack([np.zeros(v.shape[1]), np.cumsum(increments, axis=0)])
    noise = estimate_noise(around, gap)
    rounding = 1e-13 * float(np.mean(np.einsum("td,td->t", v - v[0], v - v[0])))  # of a float32 record
    return replace(noise, energy=np.maximum(noise.energy, rounding)), speed


def _best_split(v: Array, energy: Array) -> int:
    """The record that best splits the path into two chords: where one direction for both would leave most to noise.

    Each chord is divided by the length that white noise alone would give it; the energy that the best single
    direction leaves unexplained is the smaller eigenvalue of their 2 x 2 Gram matrix. Where the chords point in
    opposite directions, one direction with forward speeds explains only the longer one.
    """
    v = v - v[0]
    inside = slice(SHORTEST, len(v) - SHORTEST)
    energy = np.maximum(energy, 1e-12 * energy.sum())
    before, after = np.cumsum(energy)[:-1], np.cumsum(energy[::-1])[::-1][1:]
    left, right = v[1:-1], v[-1] - v[1:-1]
    ll, rr, lr = (np.einsum("td,td->t", a, b) for a, b in ((left, left), (right, right), (left, right)))
    # a side that is short against the path has no meaningful direction
    short = np.minimum(ll, rr) < LEAST_SIDE**2 * ll.max()
    bend = unexplained(ll / before, rr / after, lr / np.sqrt(before * after))
    bend = np.where(lr > 0, bend, np.minimum(ll / before, rr / after))
    return SHORTEST + int(np.argmax(np.where(short, 0.0, bend)[inside.start - 1 : inside.stop - 1]))


def unexplained(first: Array, second: Array, cross: Array) -> Array:
    """Smaller eigenvalue of the Gram matrix of two vectors: what the best single direction leaves of them."""
    return 0.5 * (first + second - np.sqrt((first - second) ** 2 + 4 * cross**2))


def _smooth_speed(along: Array, clock: Array) -> Array:
    """Drift of each increment, a quadratic in time that is never negative, from its component along the drift.

    The quadratic covers constant, linear and cosine schedules well enough, and three numbers cannot follow the noise.
    """
    gap = np.diff(clock) / np.mean(np.diff(clock))
    middle = 0.5 * (clock[1:] + clock[:-1])
    middle = (middle - middle.mean()) / max(float(np.ptp(middle)), 1e-12)
    speed = np.polyval(np.polyfit(middle, along / gap, 2), middle)
    least = max(0.02 * float(np.mean(np.abs(along / gap))), 1e-300)
    return np.maximum(speed, least) * gap


def _effective_dimensions(pair: Array) -> float:
    length = np.linalg.norm(pair, axis=1)
    keep = length > 0
    if keep.sum() < 4:
        return 1.0
    unit = pair[keep] / length[keep, None]
    cosine = unit @ unit.T
    apart = np.subtract.outer(np.arange(len(unit)), np.arange(len(unit))) >= min(3, len(unit) - 1)
    return float(np.clip(1.0 / np.mean(cosine[apart] ** 2), 1.0, pair.shape[1]))


def _running_median(x: Array, width: int) -> Array:
    half = min(width, len(x)) // 2
    padded = np.pad(x, half, mode="reflect") if half and half < len(x) else x
    if len(padded) == len(x):
        return np.full_like(x, np.median(x))
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _fit_variogram(
    lags: npt.NDArray[np.int64], variogram: Array, size: float, apart: float
) -> tuple[float, float, float]:
    """Sill and autocorrelation (first, memory) with variogram(lag) = sill (1 - first memory^(lag - 1)).

    ``apart`` is the number of optimiser steps from record to record. A memory of r per step is one of r^apart per
    record, and sums over so many steps correlate with the next by at most what sums of an AR(1) do.
    """
    error = 1.8 / np.sqrt(size)  # of one lag's median, in units of the sill
    later = float(np.mean(variogram[1:])) if len(variogram) > 1 else float(variogram[0])
    if later <= 0:  # a path without noise
        return 1.0, 0.0, 0.0
    if variogram[0] >= later:  # no positive correlation: white, or independent errors of the records
        # take the upper end of what the data allow: an estimate that is too negative would make the
        # noise of long sums, and with it every p-value, too small
        first = min(0.0, 1.0 - variogram[0] / later + 3.0 * error)
        return later, float(max(first, -0.5)), 0.0
    fits = []
    sums = MEMORIES * (1 - MEMORIES**apart) ** 2
    sums /= apart * (1 - MEMORIES**2) - 2 * MEMORIES * (1 - MEMORIES**apart)
    for memory, most in zip(MEMORIES**apart, sums, strict=True):
        fall = memory ** (lags - 1.0)
        (sill, drop), *_ = np.linalg.lstsq(np.stack([np.ones(len(lags)), -fall], axis=1), variogram, rcond=None)
        if drop >= 0 and sill > 0:
            first = float(min(drop / sill, most))
            shape = 1 - first * fall
            sill = float(shape @ variogram / (shape @ shape))
            loss = float(np.mean((sill * shape - variogram) ** 2))
            fits.append((loss, sill, first, float(memory)))
    best = min((loss for loss, *_ in fits), default=np.inf)
    if np.mean((variogram - variogram.mean()) ** 2) - best < (4.0 * error * later) ** 2 / len(lags):
        return later, 0.0, 0.0  # no memory beyond what chance explains
    # among the memories that fit about equally well, take the one with the most noise in long sums: a path of n records
    # with a memory of m records holds n / m independent observations, and too short a memory would lead to false turns
    likely = [f for f in fits if f[0] <= best + (DOUBT * error * f[1]) ** 2 * (1 + f[3]) / (1 - f[3])]
    _, sill, first, memory = max(likely, key=lambda f: f[1] * (1 + 2 * f[2] / (1 - f[3])))
    return sill, first, memory
