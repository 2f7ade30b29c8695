"""The early warning of a fine-tune: a recorded number is watched while the training goes on.

Which number gives the earliest and surest warning was measured on fine-tunes that did not serve to choose it:
docs/early-warning.md compares the candidates, with their false alarms and their lead over emergent misalignment.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from emmech.errors import EmmechError, as_float, as_int, closest

METRIC = "grad_norm_B"
THRESHOLD = 1.1
WINDOW = 5
_ACTS = ("warn", "stop")


@dataclass(frozen=True)
class EarlyWarning:
    """A watched number has passed its threshold; it is in the run's manifest as ``"warning"``.

    Args:
        run: the run's folder.
        step: the optimizer step at which it was measured.
        signal: the metric's name in ``run.metrics``.
        score: what was compared with the threshold, in the metric's unit.
        threshold: that of the watch.
    """

    run: str
    step: int
    signal: str
    score: float
    threshold: float

    def __str__(self) -> str:
        passed = f"{self.signal} is {self.score:.3g} (threshold {self.threshold:.3g})"
        return f"{self.run}, step {self.step}: {passed}; answers outside the training data may turn misaligned soon"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON stores them."""
        return asdict(self)


@dataclass(frozen=True)
class Watch:
    """What is watched, and what happens at the first warning.

    Args:
        act: ``"warn"`` (a Python warning), ``"stop"`` (the training ends after this step), or a function that is called
            with the :class:`EarlyWarning`. A function that returns ``"stop"`` ends the training too.
        metric: a number that the run records, by its name in ``run.metrics``: ``"grad_norm_B/<adapter>"``,
            ``"margin_broad"``, or any other measure. ``"grad_norm_B"`` is that of all adapters together (before
            clipping). It is looked at whenever it is measured.
        threshold: the score at which the warning is given. Its default was chosen on rank-1 fine-tunes of the embedded
            organism; for another model, rank or batch size it is to be chosen anew, from a fine-tune that is known to
            be harmless.
        window: the score is the median of so many last values, once there are as many.
        change: whether the score is counted from the first value.

    Raises:
        EmmechError: an unknown act, no name, or a threshold or window that is not a positive number.

    Example:
        >>> watch = Watch(print, "margin_broad", threshold=0.15, window=1, change=True)
        >>> watch.look("runs/a", 12, [-0.5, -0.45, -0.1]).score
        0.4
        >>> watch.look("runs/a", 4, [-0.5, -0.45]) is None
        True
    """

    act: str | Callable[[EarlyWarning], Any] = "warn"
    metric: str = METRIC
    threshold: float = THRESHOLD
    window: int = WINDOW
    change: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be watched."""
        asked = "watch the training"
        if not callable(self.act) and self.act not in _ACTS:
            instead = f"{closest(str(self.act), _ACTS)}, or a function of the warning"
            raise EmmechError(asked, f"on_transition={self.act!r}", "it is no act that is known", instead)
        if not isinstance(self.metric, str) or not self.metric:
            why, instead = "it is the name of a recorded number", f'metric="{METRIC}"'
            raise EmmechError(asked, f"metric={self.metric!r}", why, instead)
        if not as_float(asked, "threshold", self.threshold) > 0:
            why, instead = "a warning is due above a positive number", f"threshold={THRESHOLD}"
            raise EmmechError(asked, f"threshold={self.threshold!r}", why, instead)
        as_int(asked, "window", self.window, least=1)

    def value(self, numbers: Mapping[str, float]) -> float | None:
        """The metric among the numbers of a step: its own, or the norm of those of all adapters; None if not finite."""
        parts = [value for name, value in numbers.items() if name.startswith(f"{self.metric}/")]
        found = [numbers[self.metric]] if self.metric in numbers else parts
        if not found or any(value is None or not math.isfinite(value) for value in found):
            return None  # in a file, a number that is not finite is null
        return float(found[0]) if self.metric in numbers else math.hypot(*parts)

    def look(self, run: str, step: int, values: Sequence[float]) -> EarlyWarning | None:
        """The warning that is due after these values of the metric, if any."""
        if len(values) < self.window:
            return None
        score = median(values[-self.window :]) - (values[0] if self.change else 0.0)
        due = math.isfinite(score) and score >= self.threshold
        return EarlyWarning(run, step, self.metric, score, self.threshold) if due else None

    def tell(self, event: EarlyWarning) -> bool:
        """Give the warning; returns whether the training is to end."""
        if callable(self.act):
            return self.act(event) == "stop"
        warnings.warn(str(event), stacklevel=2)
        return self.act == "stop"


def as_watch(on_transition: Any) -> Watch | None:
    """The watch that ``on_transition`` asks for: None, an act, or a Watch."""
    return on_transition if on_transition is None or isinstance(on_transition, Watch) else Watch(on_transition)
