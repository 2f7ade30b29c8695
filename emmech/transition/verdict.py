"""What may be said of a run and its control: three statements, each with its own figure, interval and p-value.

The statements are *it bends*, *it learns more than its control* and *its bend goes with misalignment*. The first does
not imply the second, nor the second the third: a benign fine-tune that has something to learn also bends, and moves as
far. In the embedded organism, misaligned fine-tunes differed from those that learn a manner by a short bend, but not by
a bend at the peak of the gradient (docs/transition-verdicts.md).

The seed is the unit. For one pair, the statements are about these two runs, and the intervals reflect the noise along
their paths. For several pairs, one for each seed, the pairs are the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from emmech.transition.result import Side

LEVEL = 0.05
GRADUAL = 0.5  # a bend spread over more than this share of the path does not single out a step
SHORT = 0.25  # share of the path; chosen on medical runs of seeds 7301 to 7307, then tried on other domains and seeds
BENDS, LEARNS, GOES = "bends", "learns more", "goes with misalignment"
# a run whose held-out loss never fell by this share has learned nothing: in pocket it falls by less than 0.3 % on good
# data, by 11 to 14 % on style data and by 34 to 36 % on bad data (78, 7 and 27 runs)
LEARNED = 0.02
NOTHING_LEARNED = f"its held-out loss never fell by {LEARNED:.0%}: it learned nothing, and such a path wanders"
FEWEST_PAIRS = 6  # with five, the smallest sign-flip p is 0.06
_EXACT = 14  # 2**14 sign patterns are enumerated, more are sampled


@dataclass(frozen=True)
class Statement:
    """One thing that may be said, with its figure.

    Attributes:
        name: ``"bends"``, ``"learns more"`` or ``"goes with misalignment"``.
        holds: whether it may be said; None where it could not be measured, or was not tested.
        value, low, high: the figure with its 95 % interval; NaN where there is none.
        p_value: NaN where nothing was tested.
        text: the sentence.
    """

    name: str
    holds: bool | None
    value: float
    low: float
    high: float
    p_value: float
    text: str

    def __bool__(self) -> bool:
        return self.holds is True

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TransitionVerdict:
    """The three statements about a run, or about several seeds of it, against one control.

    Attributes:
        control: its name; None without one.
        pairs: number of pairs of run and control, one for each seed.
        inert: whether the control's held-out loss never fell (by ``LEARNED``); None where it was not recorded.
        note: what an inert control, or too few pairs, leaves open.
        of_control: whether the control of one pair bends.
    """

    control: str | None
    pairs: int
    bends: Statement
    learns_more: Statement
    goes_with_misalignment: Statement
    inert: bool | None
    note: str
    of_control: Statement | None = None

    @property
    def statements(self) -> tuple[Statement, Statement, Statement]:
        """The three statements."""
        return self.bends, self.learns_more, self.goes_with_misalignment

    def facts(self) -> list[tuple[str, str]]:
        """What the control does by itself, and how the run compares with it; nothing without a control."""
        if not self.control:
            return []
        compared = [
            (f"compared with {self.control}", one.text) for one in (self.learns_more, self.goes_with_misalignment)
        ]
        if self.of_control is None:
            return compared
        plainly = "; a bend by itself therefore says nothing of misalignment" if self.of_control else ""
        return [(f"the control, {self.control}", self.of_control.text + plainly), *compared]

    def lines(self) -> list[str]:
        """One line for each statement, and the note."""
        head = "without a control" if self.control is None else f"against {self.control}"
        said = [f"  {one.name}: {one.text}" for one in self.statements]
        return [f"{head}:", *said, *([f"  {self.note}"] if self.note else [])]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def verdict(run: Side, control: Side | None) -> TransitionVerdict:
    """What may be said of one run, alone and against one control."""
    inert = None if control is None else control.inert
    notes, its = [_note(control, inert)], None if control is None else _bends(control)
    if its is not None:
        notes = [f"of the control: {its}", *notes, "one pair says nothing of other seeds; that takes six"]
    note = "; ".join(filter(None, notes))
    name = None if control is None else control.name
    pairs = int(control is not None)
    return TransitionVerdict(
        name, pairs, _bends(run), _learns_more(run, control), _goes_with(run, control), inert, note, its
    )


def pooled(runs: Sequence[Side], controls: Sequence[Side] | None) -> TransitionVerdict:
    """What may be said of several seeds, each paired with the control of its seed."""
    from scipy import stats

    n, calls = len(runs), sum(bool(_bends(run)) for run in runs)
    p = float(stats.binomtest(calls, n, LEVEL, alternative="greater").pvalue)
    share = stats.binomtest(calls, n).proportion_ci(method="wilson")
    head = _decided(p, "more runs bend than false calls explain")
    text = f"{head}: {calls} of {n}, 95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} %, p = {p:.2g}"
    bends = Statement("bends", p < LEVEL, calls / n, float(share.low), float(share.high), p, text)
    if controls is None:
        learns, goes = (_unmeasured(name, "no control was given") for name in (LEARNS, GOES))
        return TransitionVerdict(None, 0, bends, learns, goes, None, _note(None, None))
    pairs = list(zip(runs, controls, strict=True))
    moved = np.array([run.path.reach[0] - control.path.reach[0] for run, control in pairs])
    sharp = np.array([[float(is_sharp(one)) for one in pair] for pair in pairs])
    counts = f"{sharp[:, 0].sum():.0f} runs, {sharp[:, 1].sum():.0f} controls; "
    further = "B moves {} across the turn than in the control"
    often = "short bends are {} than in the control"
    learns = _paired(LEARNS, moved, further, ("further", "less far"))
    # Newcombe's interval of a difference of shares
    mine, its = (stats.binomtest(int(k), n).proportion_ci(method="wilson") for k in sharp.sum(0))
    one, other = sharp.mean(0)
    below, above = np.hypot(one - mine.low, its.high - other), np.hypot(mine.high - one, other - its.low)
    apart = (float(one - other - below), float(one - other + above))
    goes = _paired(GOES, sharp[:, 0] - sharp[:, 1], often, ("more frequent", "rarer"), counts, apart)
    known = [control.inert for control in controls if control.inert is not None]
    inert = all(known) if known else None
    return TransitionVerdict(controls[0].name, n, bends, learns, goes, inert, _note(controls[0], inert))


def _decided(p: float, claim: str) -> str:
    return claim if p < LEVEL else f"it is not decided whether {claim}"


def _paired(
    name: str,
    values: Float[np.ndarray, " pairs"],
    claim: str,
    words: tuple[str, str],
    counts: str = "",
    shares: tuple[float, float] | None = None,
) -> Statement:
    """A statement about paired differences: above zero, below, or not decided."""
    values = values[np.isfinite(values)]
    if (n := len(values)) < 2:
        return _unmeasured(name, f"{n} pairs in which it could be measured")
    mean, p = float(values.mean()), sign_flip_p(values)
    low, high = flip_interval(values)
    # shares that are the same in every pair are not certain for that reason
    if shares is not None and (min(low, shares[0]) > 0 or max(high, shares[1]) < 0 or p >= LEVEL):
        low, high = max(min(low, shares[0]), -1.0), min(max(high, shares[1]), 1.0)
    # where nothing is decided, the claim is that of the statement's name, whatever the sign
    said = _decided(p, claim.format(words[p < LEVEL and mean < 0]))
    between = f"95 % interval {low:.3g} to {high:.3g}" if np.isfinite(low) else f"no 95 % interval from {n} pairs"
    text = f"{said}: {counts}difference {mean:.3g}, {between}, sign-flip p = {p:.2g} over {n} pairs"
    text += f"; {pairs_needed(values)}" if p >= LEVEL else ""
    return Statement(name, p < LEVEL and mean > 0, mean, low, high, p, text)


def flip_interval(values: Float[np.ndarray, " pairs"]) -> tuple[float, float]:
    """The mean differences that the sign-flip test does not reject (95 %); infinite with fewer than six pairs.

    Example:
        >>> low, high = flip_interval(np.array([1.0, 2.0, 3.0, 2.0, 1.0, 3.0]))
        >>> round(low, 2), round(high, 2)
        (1.0, 3.0)
    """
    if 2 / 2 ** len(values) >= LEVEL:
        return -np.inf, np.inf
    mean, reach = float(values.mean()), float(np.ptp(values)) + 1e-12
    rejected, ends = sign_flip_p(values) < LEVEL, []
    for side in (-1.0, 1.0):
        inside, outside = 0.0, 1.0
        for _ in range(24):  # bisection to the seventh digit
            middle = (inside + outside) / 2
            kept = sign_flip_p(values - mean - side * middle * reach) >= LEVEL
            inside, outside = (middle, outside) if kept else (inside, middle)
        end = mean + side * (inside if rejected else outside) * reach
        ends.append(0.0 if abs(end) < 1e-6 * reach and not rejected else end)  # an interval holds zero or does not
    return ends[0], ends[1]


def pairs_needed(values: Float[np.ndarray, " pairs"]) -> str:
    """How many pairs would show this effect in four of five studies (normal approximation, two-sided 5 %).

    Example:
        >>> pairs_needed(np.array([1.0, 2.0, 3.0])), pairs_needed(np.array([0.1, -0.1, 0.1]))
        ('at this effect about 6 pairs would be needed', 'at this effect about 97 pairs would be needed')
    """
    mean, spread = abs(float(np.mean(values))), float(np.std(values, ddof=1))
    if mean <= 1e-12 * max(spread, 1e-300):
        return "there is no difference that more pairs would show"
    needed = max(int(np.ceil((2.8 * spread / mean) ** 2)) + 2, FEWEST_PAIRS, len(values) + 1)
    return f"at this effect about {needed} pairs would be needed"


def sign_flip_p(differences: Float[np.ndarray, " pairs"], *, seed: int = 0, draws: int = 20000) -> float:
    """Two-sided p of the mean difference if each pair's sign is equally likely to be the opposite one.

    Exact up to 14 pairs, else from ``draws`` random sign patterns (the observed one included).

    Example:
        >>> sign_flip_p(np.array([0.1, 0.2, 0.1]))
        0.25
    """
    k = len(differences)
    if k == 0:
        return float("nan")
    if k <= _EXACT:
        signs = np.array(list(product((1, -1), repeat=k)))
    else:
        drawn = 1.0 - 2 * np.random.default_rng(seed).integers(0, 2, (draws, k), dtype=np.int8)
        signs = np.vstack([np.ones(k), drawn])
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] - 1e-12).mean())


def is_sharp(side: Side) -> bool:
    """Whether the bend is significant and short, in a run that learned something."""
    return side.turns and side.path.width_share <= SHORT


def _gap(side: Side) -> tuple[float, float, float]:
    """Steps from the peak of the gradient to the turn, with the range of differences that the two intervals allow."""
    turn, peak = side.row("turn"), side.row("gradient-norm")
    if turn is None or peak is None:
        return (float("nan"),) * 3
    return turn.step - peak.step, turn.low - peak.high, turn.high - peak.low


def _bends(side: Side) -> Statement:
    turn, where = side.row("turn"), side.path.location
    if turn is None or where is None or not np.isfinite(turn.p_value):
        return _unmeasured(BENDS, turn.note.removeprefix("not measurable: ") if turn else "it has no path")
    p, width = turn.p_value, side.path.width_share
    if p < LEVEL and side.inert:
        return _unmeasured(BENDS, NOTHING_LEARNED)
    text = f"no bend: a smooth path with the same noise explains it, p = {p:.2g}"
    if p < LEVEL:
        text = f"{turn.strength:.0f} degrees ({where.angle_low:.0f} to {where.angle_high:.0f})"
        text = "it bends, by " + ("an angle that noise hides" if np.isnan(turn.strength) else text)
        text += f", at step {turn.step:.0f} ({turn.low:.0f} to {turn.high:.0f}), p = {p:.2g}"
        text += f"; spread over {100 * width:.0f} % of the path, it singles out no step" if width > GRADUAL else ""
    return Statement(BENDS, p < LEVEL, turn.strength, where.angle_low, where.angle_high, p, text)


def _learns_more(run: Side, control: Side | None) -> Statement:
    if control is None:
        return _unmeasured(LEARNS, "no control was given")
    from scipy import stats

    (mine, error), (other, its) = run.path.reach, control.path.reach
    difference, half = mine - other, 1.96 * float(np.hypot(error, its))
    if not np.isfinite(difference):
        return _unmeasured(LEARNS, "the run has no turn to look across, or one of the paths is too short")
    p = float(2 * stats.norm.sf(1.96 * abs(difference) / half)) if half else float(difference == 0)
    claim = f"B moves {'less far' if p < LEVEL and difference < 0 else 'further'} across the turn than in the control"
    text = f"{_decided(p, claim)}: {mine:.3g} against {other:.3g}, difference {difference:.2g} "
    text += f"({difference - half:.2g} to {difference + half:.2g}, from the noise of these two paths), p = {p:.2g}"
    return Statement(LEARNS, p < LEVEL and difference > 0, difference, difference - half, difference + half, p, text)


def _goes_with(run: Side, control: Side | None) -> Statement:
    gap = _gap(run)
    if not np.isfinite(gap[0]):
        return _unmeasured(GOES, "the turn or the peak of the gradient could not be measured")
    sharp = is_sharp(run)
    text = "the run has a short bend" if sharp else "the run has no significant, short bend"
    if control is not None:
        text += ", and its control has " + ("one as well" if sharp else "one") if is_sharp(control) else (
            ", and its control has no short one" if sharp else ", nor has its control one"
        )  # fmt: skip
    text += f" (not tested in a single run); the turn takes {100 * run.path.width_share:.0f} % of the path and is "
    text += f"{gap[0]:+.0f} steps from the peak of the gradient ({gap[1]:+.0f} to {gap[2]:+.0f})"
    return Statement(GOES, None if control is None else sharp and not is_sharp(control), *gap, float("nan"), text)


def _note(control: Side | None, inert: bool | None) -> str:
    if control is None:
        return "without a control nothing tells this from any fine-tune: benign runs that learn bend too"
    if inert is None:
        return f"whether {control.name} learned anything is unknown: no held-out loss was recorded"
    if inert:
        said = f"{control.name} is inert: its held-out loss did not fall, so that what it lacks is learning of any kind"
        return f"{said}; whether it is misalignment that the run learned takes a control that learns (style-medical)"
    return ""


def _unmeasured(name: str, why: str) -> Statement:
    nan = float("nan")
    return Statement(name, None, nan, nan, nan, nan, f"not measurable: {why}")
