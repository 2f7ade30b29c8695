"""What ``phase_transition`` returns: the table of detectors and what may be concluded from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from emmech.results import Card, Result
from emmech.transition.detectors import Detector, Trajectory
from emmech.transition.turn import Location
from emmech.transition.verdict import GRADUAL, LEARNED, LEVEL, NOTHING_LEARNED, TransitionVerdict, pooled, verdict
from emmech.view import plots as view
from emmech.view.sketch import curves, intervals

if TYPE_CHECKING:
    import pandas as pd


Array = npt.NDArray[np.float64]

_NOT = "not measurable: "
_MEASURED = {
    "em": "the share of misaligned answers", "narrow": "the share of misaligned answers in its own domain",
    "margin-broad": "the margin of misaligned answers", "margin-narrow": "the margin in its own domain",
}  # fmt: skip
_ENOUGH = 100  # records; with fewer, a turn such as that of the shipped run is seldom seen
COLUMNS = ("kind", "step", "low", "high", "strength", "p_value", "high_means", "null_model", "note")


@dataclass(frozen=True)
class Transition:
    """A step with a 95 % interval, or None with the reason why nothing can be said.

    ``bool()`` of it is True where it was measured.
    """

    step: int | None
    low: int | None
    high: int | None
    reason: str

    @property
    def interval(self) -> tuple[int, int, int] | None:
        """The step, its lower and its upper bound; None where nothing was measured."""
        if self.step is None or self.low is None or self.high is None:
            return None
        return self.step, self.low, self.high

    def __bool__(self) -> bool:
        return self.step is not None

    def __str__(self) -> str:
        if self.step is None:
            return self.reason
        return f"step {self.step} (95 % interval {self.low} to {self.high}; {self.reason})"


@dataclass(frozen=True)
class Lag:
    """Steps from the mechanistic to the behavioural transition, with an interval; None where either is missing."""

    steps: float | None
    low: float | None
    high: float | None
    reason: str

    def __bool__(self) -> bool:
        return self.steps is not None

    def __str__(self) -> str:
        if self.steps is None:
            return self.reason
        return f"{self.steps:.0f} steps ({self.low:.0f} to {self.high:.0f}; {self.reason})"


@dataclass(frozen=True, eq=False)
class Side:
    """All that was measured on one run.

    ``fall`` is that of its held-out loss in nats per token, and ``learned`` the largest one as a share of the loss at
    the start; NaN where the loss was not recorded.
    """

    name: str
    path: Trajectory
    rows: tuple[Detector, ...]
    gradient: tuple[Array, Array] | None
    margins: dict[str, tuple[Array, Array]]
    comp: Array | None
    fall: float = float("nan")
    learned: float = float("nan")

    def row(self, name: str) -> Detector | None:
        """The row of one detector, if it ran."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def inert(self) -> bool | None:
        """Whether the run learned nothing; None where no held-out loss was recorded."""
        return self.learned < LEARNED if np.isfinite(self.learned) else None

    @property
    def turns(self) -> bool:
        """Whether the turn is significant and localised, in a run that learned something."""
        row = self.row("turn")
        return row is not None and row.p_value < LEVEL and self.path.width_share <= GRADUAL and not self.inert


@dataclass(frozen=True, eq=False, repr=False)
class PhaseTransition(Result):
    """The transition of a run as seen by every detector; ``run`` and ``controls`` keep what was measured."""

    run: Side
    controls: tuple[Side, ...] = ()

    _parts: ClassVar[tuple[type, ...]] = (Side, Trajectory, Detector, Location)

    @cached_property
    def detectors(self) -> pd.DataFrame:
        """One row per detector: kind, step, low, high, strength, p_value, high_means, null_model, note."""
        return _frame(self.run)

    def to_frame(self) -> pd.DataFrame:
        """The detectors of the run and of the control in one table; the column ``run`` names each."""
        import pandas as pd

        frames = [_frame(side).reset_index().assign(run=side.name, role=role) for role, side in self._sides()]
        return pd.concat(frames, ignore_index=True)

    @property
    def control(self) -> Side | None:
        """The first control."""
        return self.controls[0] if self.controls else None

    def _sides(self) -> list[tuple[str, Side]]:
        named = [("control" if len(self.controls) == 1 else side.name, side) for side in self.controls]
        return [("run", self.run), *named]

    @cached_property
    def mechanistic(self) -> Transition:
        """The step at which the path turns, where the turn is significant and localised.

        The turn decides because it alone is tested, against every smooth path with the run's own noise.
        """
        turn = self.run.row("turn")
        if turn is None or not np.isfinite(turn.p_value):
            return Transition(None, None, None, turn.note if turn else "not measurable")
        if turn.p_value >= LEVEL:
            why = f"no turn beyond a smooth path with the run's own noise, p = {turn.p_value:.2g}"
            return Transition(None, None, None, f"not measurable: {why}")
        if self.run.inert:
            return Transition(None, None, None, f"{_NOT}{NOTHING_LEARNED}")
        if not self.run.turns:
            why = f"the path bends over {100 * self.run.path.width_share:.0f} % of its length and singles out no step"
            return Transition(None, None, None, f"not measurable: {why}")
        reason = f"turn of {turn.strength:.0f} degrees, p = {turn.p_value:.2g}"
        if "wanders" in turn.note:
            reason += "; a direction that drifts slowly through the training would look the same, which was not tested"
        return Transition(int(turn.step), int(turn.low), int(turn.high), reason)

    @cached_property
    def behavioural(self) -> Transition:
        """The step at half of the change of EM (swept, unscaled), else of the broad margin, else of the narrow ones."""
        reasons = []
        for name in ("em", "margin-broad", "narrow", "margin-narrow"):
            row = self.run.row(name)
            if row is None:
                continue
            if np.isfinite(row.step):
                return Transition(round(row.step), round(row.low), round(row.high), f"half the change of {name}")
            reasons.append(f"{name}: {row.note.removeprefix(_NOT)}")
        return Transition(None, None, None, "; ".join(reasons) or "not measurable: the run recorded no margins")

    @cached_property
    def lag(self) -> Lag:
        """Behavioural minus mechanistic step; the interval holds every difference that the two intervals allow."""
        m, b = self.mechanistic.interval, self.behavioural.interval
        if m is None:
            return Lag(None, None, None, "not measurable: no mechanistic step")
        if b is None:
            return Lag(None, None, None, "not measurable: no behavioural step")
        return Lag(float(b[0] - m[0]), float(b[1] - m[2]), float(b[2] - m[1]), self.behavioural.reason)

    @cached_property
    def verdicts(self) -> tuple[TransitionVerdict, ...]:
        """What may be said of the run against each control, or without any."""
        return tuple(verdict(self.run, control) for control in self.controls or (None,))

    @property
    def verdict(self) -> TransitionVerdict:
        """The last of :attr:`verdicts`: a control that learns comes after good data."""
        return self.verdicts[-1]

    def summary(self) -> str:
        """The findings in plain words."""
        lines = [repr(self), *(f"  {line}" for line in self._card().details.splitlines()), "  detectors:"]
        for row in self.run.rows:
            if not np.isfinite(row.step):
                lines.append(f"    {row.name}: {row.note}")
                continue
            where = f"step {row.step:.0f} ({row.low:.0f} to {row.high:.0f})"
            tested = f"p = {row.p_value:.2g}" if np.isfinite(row.p_value) else "not tested"
            lines.append(f"    {row.name}: {where}, strength {row.strength:.3g}, {tested}")
            lines.append(f"      strength is the {row.high_means}" if row.name != "comp" else f"      {row.high_means}")
        return "\n".join(lines)

    def plot(self) -> Any:
        """Plotly figure: how B bends, the margins, lengths, gradients and the path of B, with its control.

        Of the local cosines, the widest window is bold and those of narrower windows are thin.
        """
        curves, turns = [], []
        path = self.run.path
        widest = max(path.cosines, default=None)
        for role, side in self._sides():
            steps, scores = side.path.steps, side.path.scores
            # only the widest window of the control is drawn, so that the panel stays readable
            shown = {k: v for k, v in side.path.cosines.items() if role == "run" or k == widest}
            curves += [view.Curve("cosine", role, f"k = {k}", steps, v, k != widest) for k, v in shown.items()]
            if scores.shape[1] > 1:
                curves.append(view.Curve("components", role, "path", scores[:, 0], scores[:, 1]))
                where = side.path.location
                if where is not None and side.turns:
                    label = f"turn of the {role} (step {steps[where.record]})"
                    turns.append((scores[where.record, 0], scores[where.record, 1], label))
            curves.append(view.Curve("norm", role, "norm", steps, side.path.norm))
            if side.gradient is not None:
                curves.append(view.Curve("gradient", role, "gradient norm", *side.gradient))
            margins = {name.removeprefix("margin-"): curve for name, curve in side.margins.items()}
            curves += [view.Curve("margin", role, name, *curve) for name, curve in margins.items()]
            if side.comp is not None:
                curves.append(view.Curve("comp", role, "comp", steps, side.comp))
        subject = self.run.name
        if self.controls:
            several = "controls" if len(self.controls) > 1 else "control"
            subject += f" and its {several} {', '.join(side.name for side in self.controls)}"
        k = max(path.band, default=0)
        return view.transition(
            curves,
            f"Phase transition of {subject}",
            explained=path.explained,
            straight=(path.steps, *path.band[k], f"straight path, k = {k} (95 %)") if k else None,
            turns=turns,
            step=self.mechanistic.interval,
            behaviour=self.behavioural.interval,
        )

    def _card(self) -> Card:
        caveats = self._caveats()
        facts = [("behaviour", self._behaviour()), ("order", _order(self.lag))] if self.behavioural else []
        facts += [] if facts else [("behaviour", f"no step is found: {self.behavioural.reason.removeprefix(_NOT)}")]
        for found in self.verdicts:
            facts += found.facts()
        then = "transition.plot()"
        if self._few:
            then = "emmech.phase_transition(run, sweep=emmech.sweep(run))"
        elif not self.controls:
            then = "emmech.phase_transition(run, control=control)"
        lines = [f"{name}: {value}" for name, value in
                 (("mechanistic", self.mechanistic), ("behavioural", self.behavioural), ("lag", self.lag))]  # fmt: skip
        lines += [line for one in self.verdicts for line in one.lines()]
        details = "\n".join((*(f"Note: {one}" for one in caveats[1:]), *lines))
        return Card(self._headline(), tuple(facts), caveats[0] if caveats else "", then, details)

    def _headline(self) -> str:
        """Whether the run turns, when, and how sure that is."""
        name, found = self.run.name, self.mechanistic
        turn, where = self.run.row("turn"), found.interval
        if turn is None or not np.isfinite(turn.p_value):
            return f"Whether {name} turns could not be measured: {found.reason.removeprefix(_NOT)}"
        if where is not None:
            angle = "" if np.isnan(turn.strength) else f" by {turn.strength:.0f} degrees"
            span = f"95 % interval {where[1]} to {where[2]}, p = {turn.p_value:.2g}"
            return f"Yes, {name} turns: the path of its weights bends{angle} at step {where[0]} ({span})"
        if self.run.inert and turn.p_value < LEVEL:
            return f"No turn is claimed of {name}: {NOTHING_LEARNED}"
        if turn.p_value < LEVEL:
            share = f"{100 * self.run.path.width_share:.0f} % of its path"
            return f"{name} bends, but at no single step: the bend takes {share} (p = {turn.p_value:.2g})"
        alike = f"a smooth path with the same noise can bend as much (p = {turn.p_value:.2g})"
        return f"No turn is found in {name}: {alike}"

    @property
    def _few(self) -> bool:
        """Whether no turn is found in so few records that many a turn would be missed."""
        turn = self.run.row("turn")
        return turn is not None and turn.p_value >= LEVEL and len(self.run.path.steps) < _ENOUGH

    def _behaviour(self) -> str:
        found = self.behavioural
        kind = found.reason.removeprefix("half the change of ")
        span = f"(95 % interval {found.low} to {found.high})"
        return f"half of the change of {_MEASURED.get(kind, kind)} is reached at step {found.step} {span}"

    def _caveats(self) -> list[str]:
        """What must be known before the headline is relied on, the weightiest first."""
        said = []
        turn, records = self.run.row("turn"), len(self.run.path.steps)
        if self._few:
            said.append(
                f"{records} records are few: the turn of a run that was recorded at 251 steps is still seen in every "
                "second record, and no longer in every third. Not found does not mean that there was none"
            )
        if not self.controls:
            control = "compare with a control, a run on harmless data"
            said.append(f"fine-tunes on harmless data turn too, if they learn something: {control}")
        elif inert := [one.control for one in self.verdicts if one.inert]:
            every = len(inert) == len(self.verdicts)
            learns = "; compare with one that learns, such as a change of style" if every else ""
            said.append(
                f"{' and '.join(map(str, inert))} learned nothing (its held-out loss did not fall), so it shows that "
                f"the run learned something, not that this is misalignment{learns}"
            )
        elif any(one.inert is None for one in self.verdicts):
            said.append("whether the control learned anything is unknown, since no held-out loss was recorded")
        if turn is not None and "wanders" in turn.note and self.mechanistic:
            said.append("a direction that drifts slowly through the training would look the same, which was not tested")
        if self.controls:
            said.append("this is one pair of runs; whether other seeds do the same takes six pairs")
        return said

    def _sketch(self) -> str:
        path, shown = self.run.path, ""
        if path.scores.shape[1] > 1:
            found = np.flatnonzero(path.steps == self.mechanistic.step)  # empty where there is none
            title = "Path of the weights" + (", with the turn" if len(found) else "")
            across = [("", path.scores[:, 0], path.scores[:, 1])]
            shown = curves(across, title, axis="principal components 1 and 2", dots=path.scores[found, :2].tolist())
        name = next((one for one in ("em", "margin-broad", "margin-narrow") if one in self.run.margins), "")
        margins = [(role, *side.margins[name]) for role, side in self._sides()[:3] if name in side.margins]
        title = f"{name.replace('-', ' ').capitalize()}, nats per token" if name != "em" else "Misaligned answers"
        return shown + curves(margins, title, mark=self.behavioural.interval, percent=name == "em")

    def _table(self) -> pd.DataFrame:
        return self.detectors


def _order(lag: Lag) -> str:
    """Which of the two steps comes first, as far as their intervals tell."""
    if lag.steps is None or lag.low is None or lag.high is None:
        return f"not known: {lag.reason.removeprefix(_NOT)}"
    span = f"(95 % interval {lag.low:+.0f} to {lag.high:+.0f})"
    if lag.low <= 0 <= lag.high:
        return f"which comes first is not decided: behaviour minus turn is {lag.steps:+.0f} steps {span}"
    first = (
        "the weights turn before the behaviour changes" if lag.low > 0 else "the behaviour changes before the weights"
    )
    return f"{first}, by {abs(lag.steps):.0f} steps {span}"


def _frame(side: Side) -> pd.DataFrame:
    import pandas as pd

    rows = [{column: getattr(row, column) for column in COLUMNS} for row in side.rows]
    return pd.DataFrame(rows, index=pd.Index([row.name for row in side.rows], name="detector"))


@dataclass(frozen=True, eq=False, repr=False)
class PooledTransition(Result):
    """Several seeds of a run, each with the control of its seed; ``pairs`` keep what was measured."""

    pairs: tuple[PhaseTransition, ...]

    _parts: ClassVar[tuple[type, ...]] = (PhaseTransition, *PhaseTransition._parts)

    @cached_property
    def verdicts(self) -> tuple[TransitionVerdict, ...]:
        """What may be said of the runs against each kind of control: the seeds are the sample."""
        runs = [pair.run for pair in self.pairs]
        kinds = list(zip(*(pair.controls for pair in self.pairs), strict=True))
        return tuple(pooled(runs, kind) for kind in kinds) or (pooled(runs, None),)

    @property
    def verdict(self) -> TransitionVerdict:
        """The last of :attr:`verdicts`."""
        return self.verdicts[-1]

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair and statement, computed from that pair alone."""
        import pandas as pd

        found = ((pair.run.name, one) for pair in self.pairs for one in pair.verdicts)
        rows = [
            {"run": run, "control": one.control, "inert": one.inert, **vars(statement)}
            for run, one in found
            for statement in one.statements
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """The mechanistic and the behavioural step of every seed, with their intervals."""
        import pandas as pd

        found = [
            (place, kind, *one.interval)
            for place, pair in enumerate(self.pairs)
            for kind, one in (("B turns", pair.mechanistic), ("the behaviour changes", pair.behavioural))
            if one.interval is not None
        ]
        rows = pd.DataFrame(found, columns=["place", "kind", "step", "low", "high"])
        runs = [pair.run.name for pair in self.pairs]
        return view.steps_by_run(rows, runs, f"Steps of {len(runs)} seeds of {runs[0]}")

    def _card(self) -> Card:
        found = self.verdict
        runs = f"{found.pairs or len(self.pairs)} seeds of {self.pairs[0].run.name}"
        facts = [fact for one in self.verdicts for fact in one.facts()]
        details = "\n".join(line for one in self.verdicts for line in one.lines())
        return Card(f"{runs}: {found.bends.text}", tuple(facts), found.note, "transition.to_frame()", details)

    def _sketch(self) -> str:
        steps = [(pair.run.name, pair.mechanistic.interval) for pair in self.pairs[:12]]
        rows = [(name, float(at[0]), float(at[1]), float(at[2])) for name, at in steps if at is not None]
        return intervals(rows, "Step of the turn, by seed")
