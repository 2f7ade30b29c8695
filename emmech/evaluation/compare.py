"""Evaluations compared: two models, two judges, and one evaluation with other thresholds or without a question.

:func:`compare` asks whether a difference is larger than the questions and the sampling explain, :func:`agreement` how
well two judges agree on the same responses, :func:`leave_one_out` and :func:`threshold_sweep` whether a conclusion
depends on one question or on the thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import stats

from emmech.errors import EmmechError, one_of
from emmech.evaluation.em import ALIGNMENT_GRID, COHERENCE_GRID, FIELD, Denominator, Thresholds
from emmech.evaluation.rates import LIKE_THESE, check, check_interval, combined_interval, measures, tally
from emmech.results import Card, Result, percent, within
from emmech.transition.verdict import LEVEL, sign_flip_p
from emmech.view import plots
from emmech.view.sketch import cells, curves, intervals

_SIDES = ("first", "second")
WORDS = {"em": "misaligned answers", "narrow": "misaligned answers in its own domain", "coherence": "coherent answers",
         "refusal": "refusals", "false": "false answers", "conditional": "misaligned answers in contexts"}  # fmt: skip
_VERDICTS = ("misaligned", "aligned", "incoherent", "unscored")
_HARDLY = 0.05  # a range of rates that no conclusion would depend on
_NO_INTERACTION = 0.3  # p of an interaction above which Fisher's test is shown: docs/rates-coverage.md


# two models


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """The difference of two evaluations, measure by measure; built by :func:`compare`.

    ``frame`` is indexed by measure. ``difference`` is second minus first with an interval (``low``, ``high``) over
    questions like those that both hold (``population``); ``cohens_h`` and ``odds_ratio`` (0.5 added to each cell) are
    effect sizes; ``p_paired`` is a sign-flip permutation test over the shared questions. ``p_fisher`` takes rows for
    independent, which they are not where models differ more on some questions than on others: it is NaN unless a test
    for that (``p_interaction``, small where they do) leaves no doubt.
    """

    names: tuple[str, str]
    frame: pd.DataFrame
    questions: pd.DataFrame

    def _card(self) -> Card:
        known = self.frame[np.isfinite(self.frame["difference"])]
        first, second = self.names
        if known.empty:
            return Card(f"{second} and {first} have no scored answer to the same question")
        measure, row = str(known.index[0]), known.iloc[0]
        decided = row["p_paired"] < LEVEL and (row["low"] > 0 or row["high"] < 0)
        said = f"{percent(row['rate_second'])} against {percent(row['rate_first'])}, {_points(row)}"
        what = WORDS.get(measure, f"answers that count as {measure}")
        claim = f"{second} gives {'more' if row['difference'] > 0 else 'fewer'} {what} than {first}"
        headline = claim if decided else f"It is not decided whether {second} gives more or fewer {what} than {first}"
        facts = [
            (str(name), f"{percent(one['rate_first'])} -> {percent(one['rate_second'])}, {_points(one)}, "
             f"paired p = {one['p_paired']:.3g}, "
             + (f"Fisher {one['p_fisher']:.3g}" if np.isfinite(one["p_fisher"]) else "no Fisher: questions interact"))
            for name, one in known.iterrows() if not str(name).startswith("topic/") or name == measure
        ]  # fmt: skip
        shared = int(self.frame["questions"].max())
        caveat = (
            f"intervals speak of {LIKE_THESE}; with {shared} of them a paired p cannot be below {2 / 2**shared:.2g}"
        )
        return Card(f"{headline}: {said}", tuple(facts), caveat, "comparison.plot()")

    def _sketch(self) -> str:
        rows = ((str(name), *row[["difference", "low", "high"]].clip(-1, 1)) for name, row in self.frame.iterrows())
        return intervals(rows, "Change of the rate", percent=True, zero=True)

    def plot(self, measure: str = "em") -> Any:
        """Each question's rate in the two evaluations, joined by a line; a plotly figure."""
        one_of("plot the comparison", "measure", measure, map(str, self.frame.index), why="it was not compared")
        table = self.questions.query("measure == @measure and n_first > 0 and n_second > 0")
        ends = {side: 100 * table[f"events_{side}"] / table[f"n_{side}"] for side in _SIDES}
        row = self.frame.loc[measure]
        title = (
            f"{measure}: {within(*(100 * row[['difference', 'low', 'high']]), sign=True)} points, "
            f"paired p = {row['p_paired']:.3g} over {int(row['questions'])} questions"
        )
        overall = (100 * row["rate_first"], 100 * row["rate_second"])
        return plots.paired_rates(table.assign(**ends), overall, self.names, title, row["denominator"])


def _points(row: pd.Series) -> str:
    return f"{within(*(100 * row[['difference', 'low', 'high']].clip(-1, 1)), sign=True)} points"


def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    denominator: Denominator = "scored",
    *,
    names: tuple[str, str] = _SIDES,
    thresholds: Thresholds | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two sets of response rows on every measure that both have.

    The interval and the paired test use the questions that both hold, each question weighing as many rows as it has.
    With k shared questions the smallest possible paired p is 2 / 2**k: eight questions cannot go below 0.008.

    Raises:
        EmmechError: no rows on either side, or not one shared question.
    """
    check_interval(confidence)
    table, per_question = [], []
    for measure in (name for name in measures(first) if name in measures(second)):
        tallies = [tally(frame, measure, denominator, thresholds) for frame in (first, second)]
        tables = [found.per(frame["question_id"]) for found, frame in zip(tallies, (first, second), strict=True)]
        both = tables[0].add_suffix("_first").join(tables[1].add_suffix("_second"), how="inner")
        if both.empty:
            given = " and ".join(f"questions {', '.join(map(str, one.index[:3]))}, ..." for one in tables)
            why = "they have no question in common, so no difference can be told from the questions'"
            raise EmmechError("compare the evaluations", given, why, "evaluate both on the same question set")
        per_question.append(both.assign(measure=measure).rename_axis("question_id"))
        usable = both[(both["n_first"] > 0) & (both["n_second"] > 0)]
        counts = {"questions": len(usable), "denominator": denominator, "population": LIKE_THESE}
        unscored = {f"unscored_{side}": found.unscored for side, found in zip(_SIDES, tallies, strict=True)}
        difference = _difference(usable, confidence, seed)
        table.append({"measure": measure, **difference, **counts, **unscored})
    return Comparison(names, pd.DataFrame(table).set_index("measure"), pd.concat(per_question).reset_index())


def _difference(usable: pd.DataFrame, confidence: float, seed: int) -> dict[str, float]:
    """All figures of one measure; columns by question: events and n of the first, events and n of the second."""
    counts: Int[np.ndarray, "questions four"] = usable.to_numpy()
    events_first, n_first, events_second, n_second = map(int, counts.sum(0))
    if n_first == 0 or n_second == 0:
        keys = "rate_first rate_second difference low high cohens_h odds_ratio p_paired p_interaction p_fisher"
        return dict.fromkeys(keys.split(), float("nan")) | {"n_first": n_first, "n_second": n_second}
    rate_first, rate_second = events_first / n_first, events_second / n_second
    cells = [[events_second, n_second - events_second], [events_first, n_first - events_first]]
    (a, b), (c, d) = np.asarray(cells) + 0.5
    sides = counts.T
    low, high = combined_interval([-1, 1], sides[[0, 2]], sides[[1, 3]], usable.index.tolist(), confidence=confidence)
    interaction = interaction_p(counts)
    return {
        "rate_first": rate_first,
        "rate_second": rate_second,
        "difference": rate_second - rate_first,
        "low": low,
        "high": high,
        "cohens_h": float(2 * np.arcsin(np.sqrt(rate_second)) - 2 * np.arcsin(np.sqrt(rate_first))),
        "odds_ratio": float(a * d / (b * c)),
        "p_paired": sign_flip_p(counts[:, 2] / counts[:, 3] - counts[:, 0] / counts[:, 1], seed=seed),
        "p_interaction": interaction,
        "p_fisher": float(stats.fisher_exact(cells).pvalue) if interaction > _NO_INTERACTION else float("nan"),
        "n_first": n_first,
        "n_second": n_second,
    }


def interaction_p(counts: Int[np.ndarray, "questions four"]) -> float:
    """Do the models differ more on some questions than on others? The dispersion of their differences.

    The variance of the difference over questions, relative to that of independent rows, is a chi-square over its
    degrees of freedom where neither model finds one question harder than the other does; Fisher's test supposes that.

    Args:
        counts: by question, events and n of the first model, events and n of the second.

    Returns:
        a p-value, small where they do; NaN with fewer than two questions, or without any variance of rows.

    Example:
        >>> alike, unlike = [[5, 50, 10, 50]] * 8, [[0, 50, 20, 50], [20, 50, 0, 50]] * 4
        >>> bool(interaction_p(np.array(alike)) > 0.5 > 0.001 > interaction_p(np.array(unlike)))
        True
    """
    totals = counts.sum(0)
    rates = totals[[0, 2]] / totals[[1, 3]]
    rows = float((rates * (1 - rates) / totals[[1, 3]]).sum())
    questions = len(counts)
    if questions < 2 or rows == 0:
        return float("nan")
    parts = (counts[:, [0, 2]] - rates * counts[:, [1, 3]]) / totals[[1, 3]]
    spread = questions * float(((parts[:, 1] - parts[:, 0]) ** 2).sum()) / rows
    return float(stats.chi2.sf(spread * (questions - 1) / questions, questions - 1))


# two judges


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Two judges on the same responses; built by :func:`agreement`.

    Args:
        names: of the two judges.
        n: responses that both were asked about.
        both_scored: those that both scored; the figures below are over these.
        kappa: Cohen's kappa of "misaligned and coherent".
        kappa_all: Cohen's kappa of the four verdicts over all ``n`` rows, unscored being a verdict of its own.
        pearson, spearman: of the alignment scores.
        bias: mean alignment score of the second minus the first.
        rates: share of misaligned and coherent responses according to each, among ``both_scored``.
        confusion: verdicts of the first (rows) and the second (columns) over all ``n`` rows.
        by_question: ``n``, ``kappa``, ``pearson``, ``rate_first``, ``rate_second`` by question.
    """

    names: tuple[str, str]
    n: int
    both_scored: int
    kappa: float
    kappa_all: float
    pearson: float
    spearman: float
    bias: float
    rates: tuple[float, float]
    confusion: pd.DataFrame
    by_question: pd.DataFrame

    def _card(self) -> Card:
        scored = [verdict for verdict in _VERDICTS if verdict != "unscored"]
        same = sum(int(self.confusion.loc[verdict, verdict]) for verdict in scored) / self.both_scored
        first, second = self.names
        headline = f"{first} and {second} give the same verdict on {percent(same)} of {self.both_scored} answers"
        facts = (
            ("agreement", f"kappa {self.kappa:.2f}: 0 is chance, 1 complete"),
            ("scores", f"Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}, the second {self.bias:+.1f} points"),
            (
                "misaligned",
                f"{percent(self.rates[0])} according to {first}, {percent(self.rates[1])} according to {second}",
            ),
        )
        left = self.n - self.both_scored
        caveat = f"{left} of {self.n} answers were not scored by both and are left out" if left else ""
        return Card(headline, facts, caveat, "agreement.by_question")

    def _sketch(self) -> str:
        return cells(self.confusion, "Number of answers", axes=("first", "second"), written="{:.0f}")

    def to_frame(self) -> pd.DataFrame:
        """The figures by question."""
        return self.by_question.copy()

    def plot(self) -> Any:
        """The confusion of verdicts; a plotly figure."""
        title = f"{self.both_scored} of {self.n} responses scored by both: kappa {self.kappa:.2f}"
        return plots.confusion(self.confusion, self.names, f"{title}, Pearson {self.pearson:.2f}")


def agreement(
    first: pd.DataFrame, second: pd.DataFrame, *, names: tuple[str, str] = _SIDES, thresholds: Thresholds | None = None
) -> Agreement:
    """Match rows by question and sample and compare the two judges' scores.

    Raises:
        EmmechError: no row in common, the matched responses differ in text, or none is scored by both.
    """
    asked = f"compare the judges {names[0]} and {names[1]}"
    keys = [key for key in ("context", "question_id", "sample") if key in first and key in second]
    columns = [*keys, "response", "aligned", "coherent"]
    both = first[columns].merge(second[columns], on=keys, suffixes=("_first", "_second"))
    if both.empty:
        why = "the two evaluations have no response in common (question_id and sample)"
        raise EmmechError(asked, None, why, "judge the same responses twice")
    different = both["response_first"] != both["response_second"]
    if different.any():
        row = both[different].iloc[0]
        why = f"{int(different.sum())} matched rows hold different responses"
        instead = "judge the same responses twice; to compare two models use Evaluation.compare"
        raise EmmechError(asked, f"question {row['question_id']}, sample {row['sample']}", why, instead)
    for side in _SIDES:
        both[f"verdict_{side}"] = _verdicts(both[f"aligned_{side}"], both[f"coherent_{side}"], thresholds or FIELD)
    verdicts = [both[f"verdict_{side}"] for side in _SIDES]
    scored = both[(verdicts[0] != "unscored") & (verdicts[1] != "unscored")]
    if scored.empty:
        raise EmmechError(asked, f"{len(both)} rows", "no row has both scores")
    overall = _agreed(scored)
    by_question = [
        {"question_id": question, **_agreed(scored[scored["question_id"] == question])}
        for question in both["question_id"].unique()
    ]
    confusion = pd.crosstab(*verdicts).reindex(index=_VERDICTS, columns=_VERDICTS, fill_value=0)
    confusion.index.name, confusion.columns.name = names
    scores = [scored[f"aligned_{side}"].to_numpy(float) for side in _SIDES]
    return Agreement(
        names=names,
        n=len(both),
        both_scored=overall["n"],
        kappa=overall["kappa"],
        kappa_all=cohens_kappa(*(verdict.to_numpy() for verdict in verdicts)),
        pearson=overall["pearson"],
        spearman=_correlation(stats.spearmanr, *scores),
        bias=float(np.mean(scores[1] - scores[0])),
        rates=(float(overall["rate_first"]), float(overall["rate_second"])),
        confusion=confusion,
        by_question=pd.DataFrame(by_question).set_index("question_id"),
    )


def _agreed(rows: pd.DataFrame) -> dict[str, Any]:
    """How far two judges agree on rows that both scored."""
    first, second = ((rows[f"verdict_{side}"] == "misaligned").to_numpy() for side in _SIDES)
    scores = (rows[f"aligned_{side}"].to_numpy(float) for side in _SIDES)
    return {
        "n": len(rows),
        "kappa": cohens_kappa(first, second),
        "pearson": _correlation(stats.pearsonr, *scores),
        "rate_first": first.mean() if len(rows) else np.nan,
        "rate_second": second.mean() if len(rows) else np.nan,
    }


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement beyond chance of two verdicts per row; NaN where both always give the same verdict.

    Example:
        >>> cohens_kappa(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
        0.5
    """
    if len(first) == 0:
        return float("nan")
    values = np.unique(np.concatenate([first, second]))
    expected = sum(float((first == value).mean() * (second == value).mean()) for value in values)
    observed = float((first == second).mean())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def _verdicts(aligned: pd.Series, coherent: pd.Series, limits: Thresholds) -> np.ndarray:
    unscored = aligned.isna() | coherent.isna()
    cases = [unscored, ~limits.coherent(coherent), limits.misaligned(aligned, coherent)]
    return np.select(cases, ["unscored", "incoherent", "misaligned"], "aligned").astype(object)


def _correlation(test: Callable[..., Any], first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(test(first, second).statistic)


# one evaluation, with a question less or with other thresholds


def leave_one_out(
    frame: pd.DataFrame,
    measure: str = "em",
    denominator: Denominator = "scored",
    *,
    thresholds: Thresholds | None = None,
) -> pd.DataFrame:
    """The overall rate with each question left out in turn.

    Returns:
        A frame indexed by the question left out with ``rate`` (without it), ``shift`` (that minus the rate of all),
        ``share`` (its part of all events), ``n``; the largest absolute shift comes first.

    Raises:
        EmmechError: fewer than two questions.
    """
    per = tally(frame, measure, denominator, thresholds).per(frame["question_id"])
    per = per[per["n"] > 0]
    if len(per) < 2:
        given = f"{len(per)} question(s) with rows that count"
        instead = "evaluate on at least two questions"
        raise EmmechError("leave one question out", given, "nothing is left without it", instead)
    events, n = per["events"].sum(), per["n"].sum()
    rate = (events - per["events"]) / (n - per["n"])
    share = per["events"] / events if events else np.nan
    table = pd.DataFrame({"rate": rate, "shift": rate - events / n, "share": share, "n": n - per["n"]})
    return table.rename_axis("left_out").sort_values("shift", key=np.abs, ascending=False, kind="stable")


@dataclass(frozen=True, eq=False, repr=False)
class ThresholdSweep(Result):
    """A rate on a grid of thresholds: ``frame`` has rows = alignment below, columns = coherence above."""

    measure: str
    denominator: str
    frame: pd.DataFrame
    name: str = ""

    def _card(self) -> Card:
        rates = self.frame.to_numpy()
        rates = rates[np.isfinite(rates)]
        what = f"{self.measure} of {self.name or 'the answers'}"
        if not len(rates):
            return Card(f"{what} is not measurable: no response has both scores")
        said = f"{percent(rates.min())} to {percent(rates.max())} of {self.denominator} rows"
        alike, sound = (
            [f"{one:g}" for one in (min(axis), max(axis))] for axis in (self.frame.index, self.frame.columns)
        )
        grid = f"from alignment below {' to '.join(alike)} and coherence above {' to '.join(sound)}"
        claim = "hardly depends" if np.ptp(rates) < _HARDLY else "depends"
        return Card(f"{what} {claim} on the thresholds: {said} {grid}", then="thresholds.plot()")

    def _sketch(self) -> str:
        lines = [(f"coherent > {column:g}", self.frame.index, self.frame[column]) for column in self.frame.columns[:4]]
        return curves(lines, "Rate by threshold", axis="misaligned below", percent=True)

    def plot(self) -> Any:
        """The rate against the alignment threshold, one line per coherence threshold; a plotly figure."""
        name = f"{self.measure} of {self.name or 'responses'}"
        if not np.isfinite(self.frame.to_numpy(float)).any():
            raise EmmechError("plot the thresholds", name, "no response has both scores", "judge the responses first")
        limits = (FIELD.alignment_below, FIELD.coherence_above)
        return plots.thresholds(self.frame, limits, self.denominator, name)


def threshold_sweep(
    frame: pd.DataFrame,
    measure: str = "em",
    denominator: Denominator = "scored",
    *,
    alignment_below: Sequence[float] = ALIGNMENT_GRID,
    coherence_above: Sequence[float] = COHERENCE_GRID,
    name: str = "",
) -> ThresholdSweep:
    """The rate at every pair of thresholds, the field's choice among them by default.

    Raises:
        EmmechError: no rows, an empty grid, a threshold outside 0 to 100.
    """
    check(frame, denominator, measure)
    if not len(alignment_below) or not len(coherence_above):
        raise EmmechError("sweep the thresholds", why="the grid is empty", instead="name at least one of each")

    def rate(alignment: float, coherence: float) -> float:
        found = tally(frame, measure, denominator, Thresholds(alignment, coherence))
        return found.event.sum() / found.counted.sum() if found.counted.any() else np.nan

    table = pd.DataFrame(
        [[rate(alignment, coherence) for coherence in coherence_above] for alignment in alignment_below],
        index=pd.Index(list(alignment_below), name="alignment_below"),
        columns=pd.Index(list(coherence_above), name="coherence_above"),
        dtype=float,
    )
    return ThresholdSweep(measure, denominator, table, name)
