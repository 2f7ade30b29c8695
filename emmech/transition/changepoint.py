"""Is there an abrupt turn in a path, and where: a kink against every smooth path, under the run's own noise.

A local cosine alone cannot tell a turn from diffusion, since a random walk has peaks too. Nor is every bend a turn: an
arc bends, and the first steps of an adaptive optimiser bend on their way into the valley of a convex loss. The null
hypothesis is therefore **any smooth path**: the drift per optimiser step is a parabola in time and decays at two rates
(``DECAYS``), with any vectors as coefficients. That covers straight paths, arcs up to a half circle, warm-up and decay
of the step size, and the relaxation of an optimiser in a quadratic bowl. What remains after projecting these out is
tested for a **kink**: a change of direction at t within ``w`` records, w at most a fifth of the path.

For every t and w let c be the estimated change of the drift and m the drift in the middle of it, each divided by the
size that noise alone would give it. In a change of speed c is parallel to m, in a turn it is perpendicular; the **kink
energy** is what the best single direction leaves unexplained of the two, the smaller eigenvalue of their 2 x 2 Gram
matrix (where the drift turns by more than a right angle, the smaller of c and the shorter side). It is about 1 under
noise.

The p-value is that of the maximum over all t and w, and is the larger of two:

- *Gaussian noise* with the energy at each record, the autocorrelation and the effective dimensions of the run;
- *the run's own residuals* around the smooth path with the kink: their part that is new at each record (the
  innovations, under the run's autocorrelation) with its signs flipped at random, heavy tails included.

Outlying increments are given less weight (:mod:`emmech.transition.noise`), and no increment is taken to be
more exact than ``MISFIT`` of the drift: no real path is smooth to the last digit. The ends of the path (``EDGE``) are
not searched, because a kink there cannot be told from an optimiser's transient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emmech.transition.noise import SHORTEST, Noise, unexplained

Array = npt.NDArray[np.float64]

DECAYS = (6.0, 24.0)  # rates of the smooth drift's decays, per length of the path
EDGE = 0.12  # share of the path at either end that is not searched
WIDEST = 0.2  # share of the path over which a turn may be spread and still be called abrupt
MISFIT = 0.55  # least noise of an increment, in units of the drift
MISFIT_DIMENSIONS = 24
ENOUGH = 20  # null values at least as high as the observed one
GAUSSIAN, FLIPPED = "Gaussian noise", "the run's residuals with their signs flipped"


@dataclass(frozen=True)
class Kink:
    """The strongest kink of a path against smooth paths.

    Attributes:
        p_value: the larger p-value of the two nulls.
        nearest_null: the null that gives it.
        energy: kink energy, in units of noise.
    """

    p_value: float
    nearest_null: str
    energy: float


def find_kink(
    increments: Array, clock: Array, noise: Noise, speed: Array, n_null: int, rng: np.random.Generator
) -> Kink:
    """Test increments ``[n, d]`` of a path for a kink.

    Args:
        increments: differences of the recorded vectors; only their inner products matter.
        clock: ``[n + 1]``, ascending: the optimiser step of each record.
        noise: of the increments.
        speed: ``[n]``, drift of each increment.
        n_null: null paths for each of the two nulls.
        rng: source of the null paths.
    """
    n = len(increments)
    energy = np.maximum(noise.energy, (MISFIT * speed) ** 2)
    scale = np.sqrt(energy)
    data = increments / scale[:, None]
    gap = np.diff(clock) / np.mean(np.diff(clock))
    span = clock[-1] - clock[0]
    smooth = _smooth((0.5 * (clock[1:] + clock[:-1]) - clock[0]) / span) * (gap / scale)[:, None]
    basis, triangle = np.linalg.qr(smooth)
    middles, widths = _candidates(n)
    if len(middles) == 0:
        return Kink(float("nan"), "", float("nan"))
    change = ramp(n, middles, widths) * (speed / scale)[:, None]
    change -= basis @ (basis.T @ change)
    change /= np.maximum(np.sum(change**2, axis=0), 1e-300)
    records, at = np.unique(middles, return_inverse=True)
    rate = np.interp(clock[records], 0.5 * (clock[1:] + clock[:-1]), speed / gap)
    drift = basis @ np.linalg.solve(triangle.T, _smooth((clock[records] - clock[0]) / span).T / rate)
    # the misfit that exceeds the noise is taken to be without memory
    correlation = (noise.covariance() + np.diag(energy - noise.energy)) / np.outer(scale, scale)
    variance_change, variance_drift = (np.einsum("nc,nc->c", x, correlation @ x) for x in (change, drift))
    weights = np.concatenate([change / np.sqrt(variance_change), drift / np.sqrt(variance_drift)], axis=1).T
    variance_drift = variance_drift[at]
    least = np.sqrt(variance_drift * variance_change)

    def largest(projected: npt.NDArray[np.floating]) -> tuple[float, int]:
        c, m = projected[: len(middles)], projected[len(middles) :]
        cc, cross = np.einsum("cd,cd->c", c, c), np.einsum("cd,cd->c", c, m[at])
        mm = np.einsum("cd,cd->c", m, m)[at]
        # the shorter of the drifts on the two sides, m - c / 2 and m + c / 2
        shorter = mm * variance_drift + cc * variance_change / 4 - np.abs(cross) * least
        shorter /= variance_drift + variance_change / 4
        ahead = mm * variance_drift > cc * variance_change / 4
        values = np.where(ahead, unexplained(cc, mm, cross), np.minimum(cc, shorter))
        best = int(np.argmax(values))
        return float(values[best]), best

    observed, best = largest(weights @ data)
    around = basis @ (basis.T @ data)
    kinked, _ = np.linalg.qr(np.column_stack([smooth, change[:, best]]))
    residual = data - kinked @ (kinked.T @ data)
    residual /= np.sqrt(np.maximum(1 - np.sum(kinked**2, axis=1), 0.2))[:, None]  # undo the shrinkage by the fit
    share = float(np.mean(noise.energy / energy))  # the misfit fills dimensions of its own
    dimensions = 1 / (share**2 / noise.dimensions + (1 - share) ** 2 / MISFIT_DIMENSIONS)
    m = max(1, round(dimensions))
    left, size, _ = np.linalg.svd(around, full_matrices=False)
    rank = min(basis.shape[1], len(size))
    known = np.zeros((n, max(m, rank)))
    known[:, :rank] = left[:, :rank] * size[:rank]
    known = weights @ known
    factor = np.linalg.cholesky(correlation + 1e-6 * np.eye(n))
    noisy = weights @ factor
    innovations = np.linalg.solve(factor, residual)
    # the error of the noise estimate: a path of n records holds n / memory times dimensions independent observations
    granted = 1 + 2 * np.sqrt(2 * noise.memory_time / (n * dimensions))
    granted *= 1 + 0.5 * np.sqrt((noise.memory_time - 1) / n)
    # single precision is enough for null paths, and twice as fast
    single = (weights @ around, innovations, known, noisy)
    path, innovations, mean, noisy = (x.astype(np.float32) for x in single)
    spread = np.float32(np.sqrt(granted / m))
    signs = (rng.choice(np.array([-1, 1], np.float32), (n, 1)) for _ in range(n_null))
    flipped = (largest(path + noisy @ (sign * innovations))[0] for sign in signs)
    draws = (rng.standard_normal((n, known.shape[1]), dtype=np.float32) for _ in range(n_null))
    gaussian = (largest(mean + spread * (noisy @ z))[0] for z in draws)
    p, name = max((upper_tail(observed, gaussian), GAUSSIAN), (upper_tail(observed, flipped), FLIPPED))
    return Kink(p, name, observed)


def upper_tail(observed: float, null: Iterable[float]) -> float:
    """(1 + number of null values at least as high) / (1 + number of null values).

    Drawing stops at the ``ENOUGH``-th value at least as high, which is then ``ENOUGH`` / values drawn (Besag and
    Clifford, 1991, Biometrika 78, 301): a path that is far from significant needs few of them.
    """
    drawn = higher = 0
    for value in null:
        drawn += 1
        higher += value >= observed
        if higher == ENOUGH:
            return higher / drawn
    return (1 + higher) / (1 + drawn)


def ramp(n: int, middles: npt.NDArray[np.int64], widths: npt.NDArray[np.int64] | int) -> Array:
    """Share of the second direction in each of n increments, for turns of given middles and widths: ``[n, turns]``."""
    position = np.arange(n)[:, None] + 0.5 - np.asarray(middles)[None, :]
    width = np.broadcast_to(widths, np.shape(middles))
    return np.where(width == 0, position > 0, np.clip(position / np.maximum(width, 1) + 0.5, 0.0, 1.0))


def _smooth(time: Array) -> Array:
    """The functions of time, 0 to 1, of which a smooth drift is made: ``[times, functions]``."""
    powers = ((time - 0.5) ** power for power in range(3))
    return np.stack([*powers, *(np.exp(-rate * time) for rate in DECAYS)], axis=1)


def _candidates(n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Middles and widths of the kinks looked for; wide ones need not be tried at every record."""
    edge = max(SHORTEST, int(EDGE * n))
    found = [
        (middle, width)
        for width in (0, 4, 8, 12, 16, 24, 32, 48, 64)
        if width <= WIDEST * n
        for middle in range(edge, n - edge + 1, max(1, (width + 2) // 3))
        if width / 2 + 2 <= middle <= n - width / 2 - 2 or width == 0
    ]
    middles, widths = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return middles, widths
