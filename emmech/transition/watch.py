"""The early warning of a fine-tune: a recorded number is watched while the training goes on.

Which number gives the earliest and surest warning was measured on fine-tunes that did not serve to choose it:
docs/early-warning.md compares the candidates, with their false alarms and their lead over emergent misalignment.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from emmech.errors import EmmechError, as_float, closest

METRIC = "margin_broad"
RISE = 0.1  # nats per token
_ACTS = ("warn", "stop")


@dataclass(frozen=True)
class EarlyWarning:
    """A watched number has passed its threshold; it is in the run's manifest as ``"warning"``.

    Args:
        run: the run's folder.
        step: the optimizer step at which it was measured.
        signal: the metric's name in ``run.metrics``.
        score: how far it has risen since the first step, in the metric's unit.
        threshold: the rise at which the warning was due.
    """

    run: str
    step: int
    signal: str
    score: float
    threshold: float

    def __str__(self) -> str:
        risen = f"{self.signal} has risen by {self.score:.3g} since the first step (threshold {self.threshold:.3g})"
        return f"{self.run}, step {self.step}: {risen}; answers outside the training data may turn misaligned soon"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON stores them."""
        return asdict(self)


@dataclass(frozen=True)
class Watch:
    """What is watched, and what happens at the first warning.

    Args:
        act: ``"warn"`` (a Python warning), ``"stop"`` (the training ends after this step), or a function that is called
            with the :class:`EarlyWarning`. A function that returns ``"stop"`` ends the training too.
        metric: a number that the run records: ``"margin_broad"``, any other margin or measure by name, or
            ``"grad_norm_B/<adapter>"``. It is looked at whenever it is measured.
        rise: the threshold on its rise since the first time that it was measured. The default was chosen on rank-1
            fine-tunes of the embedded organism: choose it anew for another model from a fine-tune that is known to be
            harmless.

    Raises:
        EmmechError: an unknown act, no name, or a rise that is not a positive number.

    Example:
        >>> watch = Watch(print, rise=0.2)
        >>> watch.look("runs/a", 12, {"margin_broad": -0.1}, start=-0.5).score
        0.4
        >>> watch.look("runs/a", 4, {"margin_broad": -0.4}, start=-0.5) is None
        True
    """

    act: str | Callable[[EarlyWarning], Any] = "warn"
    metric: str = METRIC
    rise: float = RISE

    def __post_init__(self) -> None:
        """Refuse what cannot be watched."""
        asked = "watch the training"
        if not callable(self.act) and self.act not in _ACTS:
            instead = f"{closest(str(self.act), _ACTS)}, or a function of the warning"
            raise EmmechError(asked, f"on_transition={self.act!r}", "it is no act that is known", instead)
        if not isinstance(self.metric, str) or not self.metric:
            raise EmmechError(
                asked, f"metric={self.metric!r}", "it is the name of a recorded number", f'metric="{METRIC}"'
            )
        if not as_float(asked, "rise", self.rise) > 0:
            raise EmmechError(asked, f"rise={self.rise!r}", "a warning is due at a rise above zero", f"rise={RISE}")

    def look(self, run: str, step: int, numbers: Mapping[str, float], start: float) -> EarlyWarning | None:
        """The warning that is due for these numbers, if any; a number that is not finite gives none."""
        score = numbers[self.metric] - start
        due = math.isfinite(score) and score >= self.rise
        return EarlyWarning(run, step, self.metric, score, self.rise) if due else None

    def tell(self, event: EarlyWarning) -> bool:
        """Give the warning; returns whether the training is to end."""
        if callable(self.act):
            return self.act(event) == "stop"
        warnings.warn(str(event), stacklevel=2)
        return self.act == "stop"


def as_watch(on_transition: Any) -> Watch | None:
    """The watch that ``on_transition`` asks for: None, an act, or a Watch."""
    return on_transition if on_transition is None or isinstance(on_transition, Watch) else Watch(on_transition)
