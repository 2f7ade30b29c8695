"""Made paths with a known answer: straight, turned and diffusing, under several kinds of noise.

The noise of one increment has the norm of one step (the "moderate" of these tests), spread over d dimensions.
"""

from __future__ import annotations

import numpy as np


def increments_noise(n: int, d: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Noise increments [n, d] of expected norm 1: white, ar0.5, ar0.9 (momentum), or record (an error per record)."""
    z = rng.standard_normal((n + 200, d)) / np.sqrt(d)
    if kind == "white":
        return z[-n:]
    if kind == "record":
        return np.diff(z[-n - 1 :], axis=0) / np.sqrt(2)
    rho = float(kind.removeprefix("ar"))
    for i in range(1, len(z)):
        z[i] = rho * z[i - 1] + np.sqrt(1 - rho**2) * z[i]
    return z[-n:]


def make_path(
    kind: str,
    seed: int,
    *,
    steps: int = 120,
    d: int = 64,
    at: float = 0.45,
    angle: float = 60.0,
    noise: str = "white",
    sigma: float = 1.0,
    decay: bool = False,
    noise_decays: bool = False,
) -> tuple[np.ndarray, int]:
    """A path [steps, d] and the record of its turn; ``kind`` is turn, straight or walk.

    ``decay`` is a linear schedule: the step length falls to 2 %. The noise stays, so that the signal-to-noise ratio
    falls, unless ``noise_decays``. A walk has no step length of its own: with ``decay`` its noise falls.
    """
    rng = np.random.default_rng(seed)
    n = steps - 1
    schedule = np.linspace(1.0, 0.02, n) if decay else np.ones(n)
    e = sigma * increments_noise(n, d, noise, rng)
    turn = int(at * steps)
    u = np.zeros((n, d))
    if kind != "walk":
        u[:, 0] = 1.0
    if kind == "turn":
        u[turn:, 0], u[turn:, 1] = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    if noise_decays or (decay and kind == "walk"):
        e *= schedule[:, None]
    path = np.vstack([np.zeros(d), np.cumsum(schedule[:, None] * u + e, axis=0)])
    return path.astype(np.float32), turn
