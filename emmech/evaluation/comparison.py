"""Two evaluations of the same questions: is the difference larger than the questions and the sampling explain?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from emmech.errors import EmmechError, closest
from emmech.evaluation.em import Denominator, Thresholds
from emmech.evaluation.intervals import check_confidence, check_resamples, cluster_resamples, expanded_quantiles
from emmech.evaluation.rates import measures, outcome
from emmech.results import Card, Result
from emmech.view.plots import paired_rates

__all__ = ["Comparison", "compare"]

_EXACT_QUESTIONS = 14  # 2**14 sign patterns are enumerated, more are sampled


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """The difference of two evaluations, measure by measure; built by :func:`compare`.

    ``frame`` is indexed by measure. ``difference`` is second minus first with a paired cluster-bootstrap interval
    (``low``, ``high``) over the questions that both hold; ``cohens_h`` and ``odds_ratio`` (0.5 added to each cell)
    are effect sizes; ``p_paired`` is a sign-flip permutation test over the shared questions; ``p_fisher`` treats rows
    as independent, so where questions differ it is too optimistic: prefer ``p_paired``.
    """

    names: tuple[str, str]
    frame: pd.DataFrame
    questions: pd.DataFrame

    def _card(self) -> Card:
        lines = [
            f"  {measure!s:<12} {row['rate_first']:7.1%} -> {row['rate_second']:7.1%}   "
            f"{row['difference']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]   "
            f"p paired {row['p_paired']:.3g}, Fisher {row['p_fisher']:.3g}"
            for measure, row in self.frame.iterrows()
            if np.isfinite(row["difference"])
        ]
        denominator = self.frame["denominator"].iloc[0]
        shared = int(self.frame["questions"].max())
        caveat = f"  with {shared} shared questions a paired p cannot be below {2 / 2**shared:.2g}"
        head = f"Comparison of {self.names[1]} with {self.names[0]} ({denominator} rows)"
        return Card(head, "\n".join(lines), caveat)

    def plot(self, measure: str = "em") -> Any:
        """Each question's rate in the two evaluations, joined by a line; a plotly figure."""
        if measure not in self.frame.index:
            nearest = closest(measure, map(str, self.frame.index))
            raise EmmechError("plot the comparison", f"measure={measure!r}", "it was not compared", nearest)
        table = self.questions.query("measure == @measure and n_first > 0 and n_second > 0")
        ends = {side: 100 * table[f"events_{side}"] / table[f"n_{side}"] for side in ("first", "second")}
        row = self.frame.loc[measure]
        title = (
            f"{measure}: {row['difference']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}], "
            f"paired p = {row['p_paired']:.3g} over {int(row['questions'])} questions"
        )
        overall = (100 * row["rate_first"], 100 * row["rate_second"])
        return paired_rates(table.assign(**ends), overall, self.names, title, row["denominator"])


def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    denominator: Denominator = "scored",
    *,
    names: tuple[str, str] = ("first", "second"),
    thresholds: Thresholds | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Comparison:
    """Compare two sets of response rows on every measure that both have.

    The interval and the paired test use the questions that both hold, each question weighing as many rows as it has.
    With k shared questions the smallest possible paired p is 2 / 2**k: eight questions cannot go below 0.008.

    Raises:
        EmmechError: no rows on either side, or not one shared question.
    """
    check_confidence(confidence)
    check_resamples(resamples)
    shared_measures = [name for name in measures(first) if name in measures(second)]
    table, per_question = [], []
    for measure in shared_measures:
        outcomes = [outcome(frame, measure, denominator, thresholds) for frame in (first, second)]
        tables = [found.per(frame["question_id"]) for found, frame in zip(outcomes, (first, second), strict=True)]
        both = tables[0].add_suffix("_first").join(tables[1].add_suffix("_second"), how="inner")
        if both.empty:
            raise EmmechError(
                "compare the evaluations",
                f"questions {_some(tables[0].index)} and {_some(tables[1].index)}",
                "they have no question in common, so no difference can be told from the questions'",
                "evaluate both on the same question set",
            )
        per_question.append(both.assign(measure=measure).rename_axis("question_id"))
        usable = both[(both["n_first"] > 0) & (both["n_second"] > 0)]
        table.append(
            {
                "measure": measure,
                **_difference(usable.to_numpy(), confidence, resamples, seed),
                "questions": len(usable),
                "denominator": denominator,
                "unscored_first": outcomes[0].unscored,
                "unscored_second": outcomes[1].unscored,
            }
        )
    return Comparison(names, pd.DataFrame(table).set_index("measure"), pd.concat(per_question).reset_index())


def _some(ids: Sequence[object]) -> str:
    return ", ".join(map(str, list(ids)[:3])) + (", ..." if len(ids) > 3 else "")


def _difference(
    counts: Int[np.ndarray, "questions four"], confidence: float, resamples: int, seed: int
) -> dict[str, float]:
    """All figures of one measure; columns of ``counts``: events and n of the first, events and n of the second."""
    events_first, n_first, events_second, n_second = (int(value) for value in counts.sum(0))
    if n_first == 0 or n_second == 0:
        keys = "rate_first rate_second difference low high cohens_h odds_ratio p_paired p_fisher n_first n_second"
        return dict.fromkeys(keys.split(), float("nan")) | {"n_first": n_first, "n_second": n_second}
    rate_first, rate_second = events_first / n_first, events_second / n_second
    cells = [[events_second, n_second - events_second], [events_first, n_first - events_first]]
    (a, b), (c, d) = np.asarray(cells) + 0.5
    low, high = _bootstrap(counts, confidence, resamples, seed)
    return {
        "rate_first": rate_first,
        "rate_second": rate_second,
        "difference": rate_second - rate_first,
        "low": low,
        "high": high,
        "cohens_h": float(2 * np.arcsin(np.sqrt(rate_second)) - 2 * np.arcsin(np.sqrt(rate_first))),
        "odds_ratio": float(a * d / (b * c)),
        "p_paired": sign_flip_p(counts[:, 2] / counts[:, 3] - counts[:, 0] / counts[:, 1], seed=seed),
        "p_fisher": float(stats.fisher_exact(cells).pvalue),
        "n_first": n_first,
        "n_second": n_second,
    }


def _bootstrap(counts: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Paired over questions; never narrower than the rows alone imply (Newcombe's hybrid of two Wilson intervals)."""
    from emmech.evaluation.intervals import wilson

    events_first, n_first, events_second, n_second = counts.sum(0)
    first, second = events_first / n_first, events_second / n_second
    low_first, high_first = wilson(events_first, n_first, confidence)
    low_second, high_second = wilson(events_second, n_second, confidence)
    low = second - first - np.hypot(second - low_second, high_first - first)
    high = second - first + np.hypot(high_second - second, first - low_first)
    clusters = len(counts)
    if clusters >= 2:
        drawn = cluster_resamples(clusters, resamples, np.random.default_rng(seed)) @ counts
        differences = drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1]
        bounds = np.quantile(differences, expanded_quantiles(clusters, confidence))
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return float(low), float(high)


def sign_flip_p(differences: Float[np.ndarray, " questions"], *, seed: int = 0, draws: int = 20000) -> float:
    """Two-sided p of the mean difference when each question's sign is as likely to be the other.

    Exact up to 14 questions, else from ``draws`` random sign patterns (the observed one included).

    Example:
        >>> sign_flip_p(np.array([0.1, 0.2, 0.1]))
        0.25
    """
    k = len(differences)
    if k == 0:
        return float("nan")
    if k <= _EXACT_QUESTIONS:
        signs = np.array(list(product((1, -1), repeat=k)))
    else:
        generator = np.random.default_rng(seed)
        signs = np.vstack([np.ones(k), generator.choice([1, -1], size=(draws, k))])
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] - 1e-12).mean())
