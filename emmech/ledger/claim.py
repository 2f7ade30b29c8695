"""A claim of the literature, what was found of it here, and the rule that makes a verdict of the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emmech.results import Card, Result
from emmech.view import ledger_plots
from emmech.view.sketch import curves, intervals

if TYPE_CHECKING:
    import pandas as pd

    from emmech.ledger.bench import Bench

LEVEL = 0.05
HOLDS, FAILS, UNMEASURED = VERDICTS = ("holds", "does not hold", "not measurable here")
Side = Literal["above", "below", "at least", "at most"]
_SHARES = ("%", "points")  # stored as shares from 0 to 1, shown times a hundred


class NotMeasurable(Exception):
    """Raised by a measurement where the model, the machine or the package lacks what it needs; the text says what."""


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Result):
    """What was measured of one claim; made by :func:`over_seeds` and its neighbours.

    Attributes:
        value, low, high: the figure with its 95 % interval, which covers seeds and, for rates, questions; shares are
            from 0 to 1. NaN ends where there is no interval.
        unit: ``"%"`` (a share), ``"points"`` (a difference of shares), or what the number counts.
        n: how many answers, pairs or records the figure is made of.
        seeds: how many fine-tuning seeds.
        p_value: of the finding's own test, where it has one; NaN where the rule's t test over seeds applies.
        frame: what the figure draws: ``name`` and ``value`` with ``low`` and ``high``, or with ``x`` for curves.
        runs: the folders of the runs that were used.
        note: what a reader must know of this figure.
    """

    value: float
    low: float
    high: float
    unit: str
    n: int
    seeds: int
    frame: pd.DataFrame
    p_value: float = float("nan")
    runs: tuple[str, ...] = ()
    note: str = ""
    name: str = ""

    def shown(self) -> str:
        """The figure with its interval in words; nothing where it is not a number."""
        if math.isnan(self.value):
            return ""
        factor = 100.0 if self.unit in _SHARES else 1.0
        value, low, high = (factor * one for one in (self.value, self.low, self.high))
        digits = ".1f" if self.unit in (*_SHARES, "steps", "degrees") else ".3g"
        sign = "+" if self.unit in ("points", "nats") else ""
        spread = f" ({low:{sign}{digits}} to {high:{sign}{digits}})" if math.isfinite(low + high) else ""
        return f"{value:{sign}{digits}}{spread} {self.unit}".rstrip()

    def tested(self, bound: float) -> float:
        """The two-sided p-value of the figure against a bound.

        The finding's own where it has one; else that of a t statistic with one degree of freedom fewer than seeds,
        whose standard error is that of the interval: p is below 0.05 where the interval leaves the bound out.
        """
        from scipy import stats

        if math.isfinite(self.p_value):
            return self.p_value
        end = self.low if self.value > bound else self.high
        half, degrees = abs(self.value - end), max(self.seeds - 1, 1)
        if not math.isfinite(half):
            return float("nan")
        if half <= 1e-9 * max(1.0, abs(self.value)):  # every seed gave the same number, which says nothing of a spread
            return 1.0 if math.isclose(self.value, bound, abs_tol=1e-9) else float("nan")
        return float(2 * stats.t.sf(abs(self.value - bound) / half * stats.t.ppf(0.975, degrees), degrees))

    def _curves(self) -> bool:
        return "x" in self.frame

    def plot(self) -> Any:
        """The parts of the figure as a plotly figure."""
        return ledger_plots.finding(self.frame, self.name, self.unit)

    def _card(self) -> Card:
        facts = (("n", f"{self.n}, {self.seeds} seed{'' if self.seeds == 1 else 's'}"),)
        return Card(f"{self.name or 'finding'}: {self.shown()}", facts, self.note, "finding.plot()")

    def _sketch(self) -> str:
        share = self.unit in _SHARES
        if self._curves():
            lines = [(str(n), one["x"], one["value"]) for n, one in self.frame.groupby("name", sort=False)]
            axis = str(self.frame["axis"].iloc[0]) if "axis" in self.frame else "step"
            return curves(lines[:6], self.name or self.unit, percent=share, axis=axis)
        rows = self.frame[["name", "value", "low", "high"]].head(14).itertuples(index=False)
        title = f"{self.name}" if share else f"{self.name} ({self.unit})"
        return intervals([tuple(row) for row in rows], title, percent=share, zero=self.unit in ("points", "nats"))


@dataclass(frozen=True)
class Rule:
    """When a claim holds.

    Args:
        side: ``"above"`` and ``"below"`` are tested: the figure is on that side of the bound and the test, corrected
            over the ledger, is below 0.05. ``"at least"`` and ``"at most"`` are for claims that something is there in
            full or is absent: the whole interval is on that side of a bound that the source states, so that few
            answers cannot make them hold.
        bound: in the unit of the finding; shares from 0 to 1.
    """

    side: Side
    bound: float = 0.0

    @property
    def tested(self) -> bool:
        """Whether the rule has a test, which takes part in the correction."""
        return self.side in ("above", "below")

    def says(self, unit: str) -> str:
        """The rule in words."""
        bound = f"{100 * self.bound:g}" if unit in _SHARES else f"{self.bound:g}"
        words = {"above": "interval above", "below": "interval below"}.get(self.side, f"whole interval {self.side}")
        return f"{words} {bound} {unit}".rstrip()

    def verdict(self, finding: Finding, p: float) -> tuple[str, str]:
        """The verdict and why.

        Args:
            p: the corrected p-value of the finding's test; NaN for rules without one.

        Example:
            >>> import pandas as pd
            >>> found = Finding(0.4, 0.3, 0.5, "%", 400, 5, pd.DataFrame())
            >>> Rule("above").verdict(found, 0.001)[0], Rule("at most", 0.03).verdict(found, float("nan"))[0]
            ('holds', 'does not hold')
            >>> Rule("at most", 0.45).verdict(found, float("nan"))
            ('does not hold', 'not decided: the interval reaches beyond the bound')
        """
        value, bound = finding.value, self.bound
        if not math.isfinite(value):
            return UNMEASURED, finding.note or "the figure is not a number"
        right = value >= bound if self.side in ("above", "at least") else value <= bound
        if not self.tested:
            if not right:
                return FAILS, "the figure misses the bound"
            far = finding.low if self.side == "at least" else finding.high
            if not math.isfinite(far):
                return FAILS, "not decided: the figure has no interval"
            within = far >= bound if self.side == "at least" else far <= bound
            if within:
                return HOLDS, "the whole interval reaches the bound"
            return FAILS, "not decided: the interval reaches beyond the bound"
        if math.isfinite(p) and p < LEVEL:
            return (HOLDS, f"p = {p:.2g}") if right else (FAILS, f"the opposite, p = {p:.2g}")
        return FAILS, f"not decided, p = {p:.2g}" if math.isfinite(p) else "not decided: no test was possible"


@dataclass(frozen=True, eq=False)
class Claim:
    """One row of the ledger, as it is declared.

    Args:
        name: distinct, in lower case with hyphens: the row's anchor and folder.
        says: the claim, one sentence.
        source: where it was made, such as ``"arXiv 2506.11613"``.
        section: the section, table or figure there.
        published: the figure there.
        measure: a function of a :class:`~emmech.ledger.Bench` that calls public functions and returns a
            :class:`Finding`; it raises :class:`NotMeasurable` where something is missing. A text instead says why the
            claim cannot be measured anywhere here.
        rule: when it holds.
        topic: the part of the page.
        how: how it is measured, one sentence.
        quick: whether ``--quick`` has it.
        headline: whether it is measured with all seeds, and again on another pretraining seed.

    Example:
        >>> from emmech.ledger import Claim, Rule
        >>> Claim("em", "It spreads.", "arXiv 2506.11613", "4", "40 %", "no such model is here", Rule("above")).topic
        'Other claims'
    """

    name: str
    says: str
    source: str
    section: str
    published: str
    measure: Callable[[Bench], Finding] | str
    rule: Rule = field(default_factory=lambda: Rule("above"))
    topic: str = "Other claims"
    how: str = ""
    quick: bool = False
    headline: bool = False


def over_seeds(
    values: Sequence[float], unit: str, n: int, *, drawn: float = 0.0, names: Sequence[str] = (), note: str = "",
    **more: Any,
) -> Finding:  # fmt: skip
    """The mean of one number a seed, with a t interval over the seeds; a seed without the number (NaN) is left out.

    Args:
        drawn: the variance that the mean has because each seed's number was counted in a sample of answers; the
            interval is never narrower than that.

    Example:
        >>> over_seeds([0.5, 0.7, 0.6], "cosine", 3).shown()
        '0.6 (0.352 to 0.848) cosine'
    """
    import pandas as pd
    from scipy import stats

    given = np.asarray(values, float)
    known = given[np.isfinite(given)]
    value = float(known.mean()) if len(known) else float("nan")
    half = float("nan")
    if len(known) > 1:
        spread = max(known.var(ddof=1) / len(known), drawn)
        half = float(stats.t.ppf(0.975, len(known) - 1) * spread**0.5)
    named = list(names) or [f"seed {at}" for at in range(len(given))]
    frame = pd.DataFrame({"name": named, "value": given, "low": np.nan, "high": np.nan})
    frame = more.pop("frame", frame)
    if len(known) < len(given):
        note = "; ".join(filter(None, (note, f"measured in {len(known)} of {len(given)} seeds")))
    return Finding(value, value - half, value + half, unit, n, len(known), frame, note=note, **more)


def of_counts(
    events: Sequence[int], n: Sequence[int], *, over: tuple[float, float] | None = None,
    minus: Sequence[tuple[int, int]] = (), names: Sequence[str] = (), note: str = "",
    extra: Mapping[str, tuple[int, int]] | None = None,
) -> Finding:  # fmt: skip
    """A rate over seeds, or its difference from another, with an interval over seeds and questions.

    The interval is the wider, on each side, of a t interval over the seeds, one of as many independent answers, and the
    one over questions. A difference from as many seeds is taken seed by seed (a paired t interval), one from another
    number of them has Welch's interval, and a single count is a fixed rate, whose own error ``over`` contains.

    Args:
        events, n: the count of each seed.
        over: the interval over questions, of the rate or of the difference.
        minus: events and n of each seed of what is taken away; the unit is then points.
        extra: further counts that the figure shows, by name.
    """
    import pandas as pd

    from emmech.evaluation.rates import wilson

    hits, total = np.asarray(events, float), np.asarray(n, float)
    less, of = (np.asarray(one, float) for one in zip(*minus, strict=True)) if minus else (np.zeros(1), np.ones(1))
    # a seed without answers says nothing of how seeds differ; where seeds are paired, its partner goes too
    known, beside = total > 0, of > 0
    if len(of) == len(total) and len(of) > 1:
        known = beside = known & beside
    hits, total, less, of = hits[known], total[known], less[beside], of[beside]
    value = low = high = float("nan")
    if len(hits) and len(of):
        value = float(hits.sum() / total.sum() - less.sum() / of.sum())
        low, high = (value + side * _half(hits, total, less, of) for side in (-1, 1))
    if math.isfinite(value) and over is not None and all(map(math.isfinite, over)):
        low, high = min(low, over[0]), max(high, over[1])
    low, high = max(low, -1.0 if minus else 0.0), min(high, 1.0)  # NaN stays NaN
    if (absent := len(known) - len(hits)) and len(hits):
        note = "; ".join(filter(None, (note, f"{absent} of {len(known)} seeds have no answers that count")))
    named = list(names) or [f"seed {at}" for at in range(len(events))]
    counts = dict(zip(named, zip(events, n, strict=True), strict=True)) | dict(extra or {})
    rows = [(name, hit / of if of else np.nan, *wilson(int(hit), int(of))) for name, (hit, of) in counts.items()]
    frame = pd.DataFrame(rows, columns=["name", "value", "low", "high"])
    return Finding(value, low, high, "points" if minus else "%", int(total.sum()), len(hits), frame, note=note)


def _half(hits: np.ndarray, total: np.ndarray, less: np.ndarray, of: np.ndarray) -> float:
    """Half the width of the t interval over seeds, of a rate or of its difference from that of other seeds."""
    from scipy import stats

    several = [(hits, total)] if len(of) == 1 else [(hits, total), (less, of)]
    pooled = [((one.sum() + 0.5) / (each.sum() + 1), each.sum() + 1) for one, each in several]
    drawn = sum(rate * (1 - rate) / count for rate, count in pooled)  # the variance of as many independent answers
    rates = [one / each for one, each in several]
    if len(rates) == 2 and len(rates[0]) == len(rates[1]):
        rates = [rates[0] - rates[1]]
    spreads = [float(one.var(ddof=1)) for one in rates if len(one) > 1]
    # a single seed is taken to vary as the others do
    parts = [float(one.var(ddof=1)) / len(one) if len(one) > 1 else max(spreads, default=0.0) for one in rates]
    degrees = float(max(len(rates[0]) - 1, 1))
    if len(parts) == 2 and sum(parts) > 0:
        degrees = sum(parts) ** 2 / sum(v**2 / max(len(one) - 1, 1) for v, one in zip(parts, rates, strict=True))
    return float(stats.t.ppf(0.975, degrees)) * max(drawn, sum(parts)) ** 0.5


def adjusted(p_values: Sequence[float]) -> list[float]:
    """p-values corrected as by Benjamini and Hochberg: at 0.05, a twentieth of what is called is expected to be false.

    The rate of false calls is what a ledger promises, and it does not get stricter for old claims when one is added, as
    Holm's or Bonferroni's corrections do. NaN stays NaN and counts for nothing.

    Example:
        >>> adjusted([0.01, 0.04, 0.03, float("nan")])
        [0.03, 0.04, 0.04, nan]
    """
    from scipy import stats

    found = np.asarray(p_values, float).copy()
    known = np.isfinite(found)
    if known.any():
        found[known] = stats.false_discovery_control(found[known], method="bh")
    return [float(one) for one in found]
