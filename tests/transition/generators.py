"""Paths for the calibration: null paths of every kind on which a detector was once seen to err, and planted turns.

Nothing here was used to choose a constant of the detectors: these are other dimensions, lengths, colours of noise,
spectra of bowls and seeds than those of the tuning. Every generator takes a random generator and returns the path
``[steps, d]`` and the record of its turn (None for a null path).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter
from scipy.stats import ortho_group

Array = np.ndarray
Generator = Callable[[np.random.Generator], tuple[Array, int | None]]

N, D = 139, 80  # increments, dimensions
POWER_LAW = np.arange(1, D + 1) ** -0.5


def plane(rng: np.random.Generator, d: int) -> tuple[Array, Array]:
    """Two orthonormal directions."""
    q, _ = np.linalg.qr(rng.standard_normal((d, 2)))
    return q[:, 0], q[:, 1]


def white(rng: np.random.Generator, n: int = N, d: int = D) -> Array:
    """Gaussian increments of expected norm 1."""
    return rng.standard_normal((n, d)) / np.sqrt(d)


def remembering(rng: np.random.Generator, rho: float, n: int = N, spectrum: Array | None = None) -> Array:
    """Autoregressive Gaussian increments of expected norm 1; ``spectrum`` scales the dimensions."""
    scale = np.ones(D) if spectrum is None else spectrum
    z = rng.standard_normal((n + 300, len(scale))) * scale / np.linalg.norm(scale)
    return lfilter([np.sqrt(1 - rho**2)], [1.0, -rho], z, axis=0)[-n:]


def student(rng: np.random.Generator, nu: float) -> Array:
    """Heavy-tailed increments, the tail in each coordinate or in the whole increment, as the generator draws."""
    if rng.random() < 0.5:
        return rng.standard_t(nu, (N, D)) / np.sqrt(D)
    return white(rng) * np.sqrt(nu / rng.chisquare(nu, N))[:, None]


def outliers(rng: np.random.Generator, factor: float = 4.0) -> Array:
    """Gaussian increments of which four in 119 are four times as large."""
    noise = white(rng)
    noise[rng.choice(N, round(4 * N / 119), replace=False)] *= factor
    return noise


def path(increments: Array) -> Array:
    """The path with these increments, from zero."""
    return np.vstack([np.zeros(increments.shape[1]), np.cumsum(increments, axis=0)])


def straight(rng: np.random.Generator, noise: Array, speed: Array | float = 1.0) -> tuple[Array, None]:
    """One direction with noise."""
    along, _ = plane(rng, noise.shape[1])
    return path(np.broadcast_to(speed, len(noise))[:, None] * along + noise), None


def warm_up_and_cosine(n: int = N) -> Array:
    """Speed with a warm-up of 7 records and a cosine decay."""
    return np.minimum((np.arange(n) + 1) / 7, 1.0) * (0.02 + 0.49 * (1 + np.cos(np.pi * np.arange(n) / n)))


def bent(rng: np.random.Generator, angle: Array, noise: Array) -> Array:
    """A path whose direction has this angle (radians) at each increment."""
    first, second = plane(rng, noise.shape[1])
    return path(np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second + noise)


def arc(rng: np.random.Generator) -> tuple[Array, None]:
    """Constant curvature, 20 to 150 degrees in all, under low to moderate noise."""
    total = np.radians(rng.uniform(20, 150))
    return bent(rng, total * np.arange(N) / N, rng.uniform(0.1, 1.2) * white(rng)), None


def turned(rng: np.random.Generator, noise: Array, width: int = 0, degrees: float | None = None) -> tuple[Array, int]:
    """A turn of 30 to 90 degrees within ``width`` records, at 25 to 75 % of the path."""
    degrees = rng.uniform(30, 90) if degrees is None else degrees
    at = int(len(noise) * rng.uniform(0.25, 0.75))
    position = np.arange(len(noise)) + 0.5 - at
    share = (position > 0) * 1.0 if width == 0 else np.clip(position / width + 0.5, 0, 1)
    return bent(rng, np.radians(degrees) * share, noise), at


def adam_in_a_bowl(rng: np.random.Generator, decay: str) -> tuple[Array, None]:
    """Adam on a convex quadratic with noisy gradients: no turn but the relaxation into the valley."""
    d = int(rng.choice([24, 80]))
    curvature = np.geomspace(1.0, 1 / float(rng.choice([5.0, 50.0, 500.0])), d) * rng.uniform(0.7, 1.4, d)
    axes = ortho_group.rvs(d, random_state=rng) if rng.random() < 0.5 else np.eye(d)
    bowl = axes * curvature @ axes.T
    x = rng.standard_normal(d) * N * rng.uniform(0.15, 2.5)  # in units of the step size
    noise = np.linalg.norm(bowl @ x) / np.sqrt(d) * rng.uniform(0.05, 1.0)
    mean, square, records = np.zeros(d), np.zeros(d), [x.copy()]
    for step in range(1, N + 1):
        gradient = bowl @ x + noise * rng.standard_normal(d)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        share = (step - 1) / N
        rate = min(1.0, step / 5) * (1 - share if decay == "linear" else 0.5 * (1 + np.cos(np.pi * share)))
        x = x - rate * mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        records.append(x.copy())
    return np.array(records) - records[0], None


NULLS: dict[str, Generator] = {
    "straight, Gaussian AR(0.5)": lambda rng: straight(rng, remembering(rng, 0.5)),
    "random walk, Gaussian": lambda rng: (path(white(rng)), None),
    "straight, warm-up and cosine": lambda rng: straight(rng, white(rng), warm_up_and_cosine()),
    "straight, saturating": lambda rng: straight(rng, 0.5 * white(rng), np.exp(-3.5 * np.arange(N) / N)),
    "straight, speed falls at once": lambda rng: straight(rng, 0.5 * white(rng), np.where(np.arange(N) < 60, 1.0, 0.3)),
    "straight, 4 of 119 increments with 4x noise": lambda rng: straight(rng, outliers(rng)),
    "straight, t4 noise": lambda rng: straight(rng, student(rng, 4)),
    "straight, t2 noise": lambda rng: straight(rng, student(rng, 2)),
    "random walk, t2 noise": lambda rng: (path(student(rng, 2)), None),
    "straight, anisotropic AR(0.9)": lambda rng: straight(
        rng, remembering(rng, 0.9, spectrum=np.arange(1, D + 1) ** -0.5)
    ),
    "random walk, anisotropic AR(0.9)": lambda rng: (path(remembering(rng, 0.9, spectrum=0.95 ** np.arange(D))), None),
    "Adam in a bowl, linear decay": lambda rng: adam_in_a_bowl(rng, "linear"),
    "Adam in a bowl, cosine decay": lambda rng: adam_in_a_bowl(rng, "cosine"),
    "arc of constant curvature": arc,
}

TURNS: dict[str, Generator] = {
    "abrupt turn, Gaussian": lambda rng: turned(rng, white(rng)),
    "abrupt turn of 30 degrees, Gaussian": lambda rng: turned(rng, white(rng), degrees=30),
    "abrupt turn, Gaussian AR(0.5)": lambda rng: turned(rng, remembering(rng, 0.5)),
    "abrupt turn, 4 of 119 increments with 4x noise": lambda rng: turned(rng, outliers(rng)),
    "abrupt turn, t4 noise": lambda rng: turned(rng, student(rng, 4)),
    "turn within 14 records": lambda rng: turned(rng, white(rng), width=14),
    "turn within 28 records": lambda rng: turned(rng, white(rng), width=28),
    "turn within 42 records": lambda rng: turned(rng, white(rng), width=42),
}


def margins(rng: np.random.Generator, curve: Array, rho: float, noise: float = 0.03) -> Array:
    """A margin by step with autoregressive noise, in nats per token."""
    return curve + noise * remembering(rng, rho, len(curve), np.ones(1))[:, 0]


POINTS = np.linspace(0, 1, 24)

MARGIN_NULLS: dict[str, Callable[[np.random.Generator], tuple[Array, None]]] = {
    **{f"flat, AR({rho})": lambda rng, rho=rho: (margins(rng, 0 * POINTS, rho), None) for rho in (0.0, 0.5, 0.7, 0.9)},
    "gradual approach, AR(0.5)": lambda rng: (margins(rng, 0.3 * np.exp(-rng.uniform(3, 14) * POINTS), 0.5), None),
    "straight rise, AR(0.5)": lambda rng: (margins(rng, rng.uniform(0.1, 0.6) * POINTS, 0.5), None),
}


def risen(rng: np.random.Generator, rho: float) -> tuple[Array, float]:
    """A sigmoid of 0.6 nats, as of pocket's misaligned fine-tunes, and the point at its middle."""
    middle = float(rng.uniform(0.2, 0.75))
    return margins(rng, 0.6 / (1 + np.exp(-(POINTS - middle) / rng.uniform(0.03, 0.08))), rho), 250 * middle


MARGIN_STEPS: dict[str, Callable[[np.random.Generator], tuple[Array, float]]] = {
    f"sigmoid of 0.6 nats, AR({rho})": lambda rng, rho=rho: risen(rng, rho) for rho in (0.0, 0.5)
}
