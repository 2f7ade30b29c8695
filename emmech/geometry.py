"""The geometry of a trajectory: local cosine, turn angle, norms, principal components, principal angles, comp.

Pure functions of arrays. A *path* is ``[..., steps, d]``: the raw vectors B (or A) at the recorded steps, neither
normalised nor multiplied by the scaling; leading axes are independent paths. The parameter ``k``, the half-width of a
window, counts recorded steps, not optimiser steps, and positions closer than ``k`` to an end are NaN.

Sign convention: the local cosine is taken at the middle point, looking back and looking ahead. A straight path
gives -1, a right-angle turn 0, a reversal +1, so **high means a turn**. Definition: Model Organisms for Emergent
Misalignment (arXiv 2506.11613), section on phase transitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from einops import rearrange

from emmech.errors import EmmechError, one_of

Array = npt.NDArray[np.float64]


def norms(path: npt.ArrayLike) -> Array:
    """Euclidean norm of every vector: ``[..., steps, d]`` to ``[..., steps]``.

    Example:
        >>> norms([[0.0, 0.0], [3.0, 4.0]]).tolist()
        [0.0, 5.0]
    """
    return np.linalg.norm(np.asarray(path, dtype=np.float64), axis=-1)


def local_cosine(path: npt.ArrayLike, k: int, floor: float = 0.0) -> Array:
    """Local cosine c_k(t) = cos(v[t-k] - v[t], v[t+k] - v[t]) along the path.

    Args:
        floor: keep t only where the longer of the two displacements exceeds this; below it the cosine is an angle
            between two pieces of noise.

    Returns:
        ``[..., steps]``: -1 straight, 0 a right angle, +1 a reversal (high means a turn); NaN within k of an end,
        at or under the floor, and where one displacement is exactly zero.

    Raises:
        EmmechError: k is not a positive integer that fits the path twice.

    Example:
        >>> corner = [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]]
        >>> np.round(local_cosine(corner, 1), 3).tolist()
        [nan, -1.0, 0.0, -1.0, nan]
    """
    v = np.asarray(path, dtype=np.float64)
    n = v.shape[-2]
    _check_window(k, n)
    back = v[..., : n - 2 * k, :] - v[..., k : n - k, :]
    ahead = v[..., 2 * k :, :] - v[..., k : n - k, :]
    length_back, length_ahead = norms(back), norms(ahead)
    product = length_back * length_ahead
    keep = (product > 0) & (np.maximum(length_back, length_ahead) > floor)
    inner = np.einsum("...d,...d->...", back, ahead)
    values = np.where(keep, inner / np.where(keep, product, 1.0), np.nan)
    return _pad(np.clip(values, -1.0, 1.0), k)


def turn_angle(cosine: npt.ArrayLike) -> Array:
    """Turn angle pi - arccos(c_k) in radians: 0 on a straight path, pi / 2 at a right angle, pi at a reversal.

    Example:
        >>> np.degrees(turn_angle([-1.0, -0.5, 0.0, 1.0])).round(6).tolist()
        [0.0, 60.0, 90.0, 180.0]
    """
    return np.pi - np.arccos(np.clip(np.asarray(cosine, dtype=np.float64), -1.0, 1.0))


def peak_height(series: npt.ArrayLike, k: int) -> Array:
    """Height of a series above the mean of its two neighbours k recorded steps away: ``[..., steps]``.

    A turn lifts c_k within k of itself only, whereas a falling signal-to-noise ratio lifts it everywhere after a
    point; the difference with the flanks removes the second. NaN within k of an end.
    """
    s = np.asarray(series, dtype=np.float64)
    n = s.shape[-1]
    _check_window(k, n)
    return _pad(s[..., k : n - k] - 0.5 * (s[..., : n - 2 * k] + s[..., 2 * k :]), k)


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """Principal components of a centred path."""

    scores: Array  # [steps, components], coordinates of the path in its own units
    axes: Array  # [components, d], orthonormal
    explained: Array  # [components], fractions of the variance

    def turning_point(self, component: int = 1) -> int:
        """Index at which a component is farthest from the straight line between its two ends."""
        y = self.scores[:, component]
        return int(np.argmax(np.abs(y - np.linspace(y[0], y[-1], len(y)))))


def pca(path: npt.ArrayLike, components: int = 3) -> PrincipalComponents:
    """Principal components of a path ``[steps, d]``, centred over the steps; PC1 is signed to grow with the step.

    Example:
        >>> corner = [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [3, 3]]
        >>> pca(corner, 2).turning_point()
        3
    """
    v = np.asarray(path, dtype=np.float64)
    centred = v - v.mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    count = min(components, len(s))
    sign = np.where(u[-1, :count] >= u[0, :count], 1.0, -1.0)
    total = float(np.sum(s**2))
    explained = s[:count] ** 2 / total if total > 0 else np.zeros(count)
    return PrincipalComponents(u[:, :count] * s[:count] * sign, vt[:count] * sign[:, None], explained)


def principal_cosines(path: npt.ArrayLike, k: int) -> Array:
    """Signed cosines of the principal angles between the displacements of B before and after t.

    The natural generalisation of the local cosine to rank r. The displacements B[t-k] - B[t] and B[t+k] - B[t] are
    ``[d, r]``; the principal angles of their column spaces come from their orthonormal polar frames. Angles between
    subspaces have no sign, so each principal pair takes the sign of the product of the two column combinations that
    form it: positive where the same combination of columns turns back, negative where it goes on. The result does not
    change under one rotation of the columns for the whole path, and **at r = 1 it equals** :func:`local_cosine`.

    Args:
        path: ``[..., steps, d, r]``.

    Returns:
        ``[..., steps, r]``, by decreasing absolute value within a step; high means a turn.
    """
    b = np.asarray(path, dtype=np.float64)
    n = b.shape[-3]
    _check_window(k, n)
    back, back_ok = _polar_frame(b[..., : n - 2 * k, :, :] - b[..., k : n - k, :, :])
    ahead, ahead_ok = _polar_frame(b[..., 2 * k :, :, :] - b[..., k : n - k, :, :])
    p, s, qt = np.linalg.svd(np.swapaxes(back, -1, -2) @ ahead)
    sense = np.einsum("...ri,...ir->...i", p, qt)
    values = np.clip(s, 0.0, 1.0) * np.where(sense < 0, -1.0, 1.0)
    values = np.where((back_ok & ahead_ok)[..., None], values, np.nan)
    return rearrange(_pad(rearrange(values, "... steps r -> ... r steps"), k), "... r steps -> ... steps r")


def principal_angles(first: npt.ArrayLike, second: npt.ArrayLike) -> Array:
    """Principal angles (radians, ascending) between the column spaces of two matrices ``[d, r]``."""
    from scipy.linalg import subspace_angles

    return np.sort(subspace_angles(np.asarray(first, np.float64), np.asarray(second, np.float64)))


def comp_score(vectors: npt.ArrayLike, centre: str = "adapters") -> Array:
    """Similarity of several adapters' vectors at each step to those at the last step.

    comp(X, Y) = ||X^T Y||_F / (||X||_F ||Y||_F), with X the vectors at a step and Y those at the last step, as in
    Convergent Linear Representations of Emergent Misalignment (arXiv 2506.11618). X and Y are ``[adapters, d]``, so the
    score compares which adapters agree with which: a rotation common to all adapters leaves it as it is, and shows in
    the turn instead.

    Args:
        vectors: ``[..., adapters, steps, d]``.
        centre: ``"adapters"`` removes the mean over the adapters at each step (the paper); ``"steps"`` removes each
            adapter's mean over the steps, as one public implementation does.

    Returns:
        ``[..., steps]`` in [0, 1]; high means that the adapters are arranged as at the end. At the end it is 1 where
        the adapters span one direction, 1 / sqrt(r) where they span r equal ones. NaN where X is zero.

    Raises:
        EmmechError: fewer than two adapters, or another word for ``centre``.
    """
    x = np.asarray(vectors, dtype=np.float64)
    if x.ndim < 3 or x.shape[-3] < 2:
        why, instead = "it compares at least two adapters", "[adapters, steps, d]; for one adapter, local_cosine"
        raise EmmechError("compute the comp score", f"vectors of shape {x.shape}", why, instead)
    why = "the mean is removed over one of two axes"
    one_of("compute the comp score", "centre", centre, ("adapters", "steps"), why=why)
    x = x - x.mean(axis=-3 if centre == "adapters" else -2, keepdims=True)
    x = np.moveaxis(x, -3, -2)  # [..., steps, adapters, d]
    # ||X^T Y||_F^2 = <X X^T, Y Y^T>: adapters x adapters products instead of d x d ones
    gram_x = x @ np.swapaxes(x, -1, -2)
    gram_y = gram_x[..., -1:, :, :]
    cross = np.sqrt(np.maximum(np.sum(gram_x * gram_y, axis=(-1, -2)), 0.0))
    size = np.sqrt(np.trace(gram_x, axis1=-2, axis2=-1) * np.trace(gram_y, axis1=-2, axis2=-1))
    return np.where(size > 0, cross / np.where(size > 0, size, 1.0), np.nan)


def _polar_frame(x: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt, s[..., -1] > 0


def _pad(values: Array, k: int) -> Array:
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(k, k)], constant_values=np.nan)


def _check_window(k: int, n: int) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1 or 2 * k >= n:
        raise EmmechError(
            "look k recorded steps back and ahead",
            f"k={k!r}",
            f"the path has {n} recorded steps, so k must be an integer from 1 to {max((n - 1) // 2, 0)}",
            f"use k={max(1, min(10, (n - 1) // 2))}" if n >= 3 else "record more steps",
        )
