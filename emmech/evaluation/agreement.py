"""How well two judges agree on the same responses: correlation of scores, kappa and confusion of verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from emmech.errors import EmmechError
from emmech.evaluation.em import Thresholds
from emmech.results import Card, Result
from emmech.view.plots import confusion

__all__ = ["Agreement", "agreement", "cohens_kappa"]

_VERDICTS = ("misaligned", "aligned", "incoherent", "unscored")


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
        return Card(
            f"Agreement of {self.names[0]} and {self.names[1]} on {self.both_scored} of {self.n} responses: "
            f"kappa {self.kappa:.2f}, Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}, "
            f"EM {self.rates[0]:.1%} against {self.rates[1]:.1%}, bias {self.bias:+.1f} points",
            self.confusion.to_string(),
        )

    def to_frame(self) -> pd.DataFrame:
        """The figures by question."""
        return self.by_question.copy()

    def plot(self) -> Any:
        """The confusion of verdicts; a plotly figure."""
        title = f"{self.both_scored} of {self.n} responses scored by both: kappa {self.kappa:.2f}"
        return confusion(self.confusion, self.names, f"{title}, Pearson {self.pearson:.2f}")


def agreement(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    names: tuple[str, str] = ("first", "second"),
    thresholds: Thresholds | None = None,
) -> Agreement:
    """Match rows by question and sample and compare the two judges' scores.

    Raises:
        EmmechError: no row in common, the matched responses differ in text, or none is scored by both.
    """
    limits = thresholds or Thresholds()
    keys = ["question_id", "sample"]
    columns = [*keys, "response", "aligned", "coherent"]
    both = first[columns].merge(second[columns], on=keys, suffixes=("_first", "_second"))
    if both.empty:
        raise EmmechError(
            f"compare the judges {names[0]} and {names[1]}",
            why="the two evaluations have no response in common (question_id and sample)",
            instead="judge the same responses twice",
        )
    different = both["response_first"] != both["response_second"]
    if different.any():
        row = both[different].iloc[0]
        raise EmmechError(
            f"compare the judges {names[0]} and {names[1]}",
            f"question {row['question_id']}, sample {row['sample']}",
            f"{int(different.sum())} matched rows hold different responses",
            "judge the same responses twice; to compare two models use Evaluation.compare",
        )
    verdicts = [_verdicts(both, side, limits) for side in ("first", "second")]
    scored = ((verdicts[0] != "unscored") & (verdicts[1] != "unscored")).to_numpy()
    if not scored.any():
        raise EmmechError(
            f"compare the judges {names[0]} and {names[1]}", f"{len(both)} rows", "no row has both scores"
        )
    bad = [(verdict == "misaligned").to_numpy() for verdict in verdicts]
    scores = [both[f"aligned_{side}"].to_numpy(float) for side in ("first", "second")]
    table = []
    for question in both["question_id"].unique():
        rows = scored & (both["question_id"] == question).to_numpy()
        table.append(
            {
                "question_id": question,
                "n": int(rows.sum()),
                "kappa": cohens_kappa(bad[0][rows], bad[1][rows]),
                "pearson": _correlation(scores[0][rows], scores[1][rows], "pearson"),
                "rate_first": bad[0][rows].mean() if rows.any() else np.nan,
                "rate_second": bad[1][rows].mean() if rows.any() else np.nan,
            }
        )
    confusion = pd.crosstab(verdicts[0], verdicts[1]).reindex(index=_VERDICTS, columns=_VERDICTS, fill_value=0)
    confusion.index.name, confusion.columns.name = names
    return Agreement(
        names=names,
        n=len(both),
        both_scored=int(scored.sum()),
        kappa=cohens_kappa(bad[0][scored], bad[1][scored]),
        kappa_all=cohens_kappa(verdicts[0].to_numpy(), verdicts[1].to_numpy()),
        pearson=_correlation(scores[0][scored], scores[1][scored], "pearson"),
        spearman=_correlation(scores[0][scored], scores[1][scored], "spearman"),
        bias=float(np.mean(scores[1][scored] - scores[0][scored])),
        rates=(float(bad[0][scored].mean()), float(bad[1][scored].mean())),
        confusion=confusion,
        by_question=pd.DataFrame(table).set_index("question_id"),
    )


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Agreement beyond chance of two verdicts per row; NaN where both always say the same one thing.

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


def _verdicts(both: pd.DataFrame, side: str, limits: Thresholds) -> pd.Series:
    aligned, coherent = both[f"aligned_{side}"], both[f"coherent_{side}"]
    verdict = pd.Series("aligned", index=both.index, name=side)
    verdict[limits.misaligned(aligned, coherent)] = "misaligned"
    verdict[~limits.coherent(coherent)] = "incoherent"
    verdict[aligned.isna() | coherent.isna()] = "unscored"
    return verdict


def _correlation(first: np.ndarray, second: np.ndarray, kind: str) -> float:
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    test = stats.pearsonr if kind == "pearson" else stats.spearmanr
    return float(test(first, second).statistic)
