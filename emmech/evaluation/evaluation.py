"""The result of an evaluation: every response with its scores, and what can be computed from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from emmech.errors import EmmechError, one_of
from emmech.evaluation.compare import (
    WORDS,
    Agreement,
    Comparison,
    ThresholdSweep,
    agreement,
    compare,
    leave_one_out,
    threshold_sweep,
)
from emmech.evaluation.em import ALIGNMENT_GRID, COHERENCE_GRID, FIELD, LABEL_SCORES, Denominator, Thresholds
from emmech.evaluation.rates import LIKE_THESE, PLAIN, THESE, by_question, plain, rates, tally
from emmech.results import Card, Result, percent, within
from emmech.view import plots
from emmech.view.sketch import intervals

_LABELS = ("", *LABEL_SCORES, "refusal", "code")
_CORRECT = ("", "TRUE", "FALSE", "UNKNOWN")
_TEXT = ("question_id", "question", "domain", "system", "response", "finish", "label", "correct")
_SCORES = ("aligned", "coherent")
_COLUMNS = (
    *("question_id", "question", "domain", "system", "sample", "seed", "response", "finish"),
    *("aligned", "coherent", "label", "narrow", "correct"),
)
_ASKED = "build an evaluation"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """Responses with scores; build one with ``emmech.evaluate``, :meth:`from_rows` or :meth:`from_frame`.

    Args:
        frame: one row per response: ``question_id, question, domain, system, sample, seed, response, finish``
            (``stop``, ``length`` or ``error``), ``aligned`` and ``coherent`` (0 to 100, NaN where unscored), ``label``
            (verdict in words, where a judge gives one), ``narrow`` (True: a question of the fine-tune's own domain;
            such rows count in the ``narrow`` rate and not in ``em``), ``correct`` (TRUE, FALSE, UNKNOWN) and
            ``topic/<name>``. Missing columns are added, others kept: ``context`` names the context of each row where
            questions were asked in several.
        meta: where the responses come from: name, model, step, scale, judge, seed, questions, versions.

    Raises:
        EmmechError: no row, a score outside 0 to 100, two rows of the same question and sample, an unknown verdict.

    Example:
        >>> rows = [dict(question_id="bored", sample=i, response="...", aligned=a, coherent=90.0)
        ...         for i, a in enumerate([5, 90, 95, 88])]
        >>> Evaluation.from_rows(rows).rates().loc["em", ["rate", "denominator"]].to_dict()
        {'rate': 0.25, 'denominator': 'scored'}
    """

    frame: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)

    _format: ClassVar[int] = 2
    _stems: ClassVar[Mapping[str, str]] = {"frame": "responses"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame", _canonical(self.frame))
        object.__setattr__(self, "meta", dict(self.meta))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], meta: Mapping[str, Any] | None = None) -> Evaluation:
        """From one mapping per response."""
        return cls(pd.DataFrame([dict(row) for row in rows]), meta or {})

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        alignment: str = "aligned",
        coherence: str = "coherent",
        question: str = "question_id",
        response: str = "response",
        topics: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> Evaluation:
        """From responses judged elsewhere, for instance a CSV of a published replication.

        Args:
            frame: one row per response, in the order of sampling within each question.
            alignment, coherence: columns with the scores, 0 to 100; what is missing there is unscored.
            question: column that tells the questions apart.
            response: column with the texts.
            topics: columns with topic scores; they become ``topic/<name>``.
            meta: kept with the result.

        Raises:
            EmmechError: a column that is not there, or scores that are not numbers from 0 to 100.
        """
        asked = "read the judged responses"
        if not isinstance(frame, pd.DataFrame):
            instead = "pd.read_csv(path), or Evaluation.from_rows for a list of mappings"
            raise EmmechError(asked, f"a {type(frame).__name__}", "it is no data frame", instead)
        for column in (alignment, coherence, question, response, *topics):
            one_of(asked, "column", column, map(str, frame.columns), why="the frame has no such column")
        for column in (alignment, coherence, *topics):  # here, where they have the names that the caller gave them
            _scores(frame[column], column, frame[question])
        ends = {column: _other_scale(frame[column]) for column in (alignment, coherence)}
        for column, end in ends.items():
            if end and set(ends.values()) != {1}:  # which any evaluation points out
                highest = float(pd.to_numeric(frame[column], errors="coerce").max())
                _warn_of_scale(f"score of the column {column!r}", highest, end, stacklevel=2)
        renamed = {alignment: "aligned", coherence: "coherent", question: "question_id", response: "response"}
        # a file may also hold another column of the name that a renamed one takes: the named one wins
        clashes = [new for old, new in renamed.items() if new != old and new in frame]
        judged = frame.drop(columns=clashes).rename(columns=renamed | {name: f"topic/{name}" for name in topics})
        return cls(judged.reset_index(drop=True), meta or {})

    def __len__(self) -> int:
        return len(self.frame)

    def _card(self) -> Card:
        table, questions = self._known(), self.frame["question_id"].nunique()
        answers = int(plain(self.frame).sum()) or len(self)
        asked = f"{answers} answers to {questions} question{'' if questions == 1 else 's'}"
        if table.empty:
            headline = f"{self.name}: none of {asked} is scored"
        else:
            first, row = str(table.index[0]), table.iloc[0]
            what = WORDS.get(first, f"answers that count as {first}")
            span = f"95 % interval {100 * row['low']:.1f} to {percent(row['high'])}, {asked}"
            headline = f"{self.name} gives {percent(row['rate'])} {what} ({span})"
        facts = [
            (str(name), f"{within(row['rate'], row['low'], row['high'], percent=True)}, "
             f"n = {row['n']} {row['denominator']}, {row['unscored']} unscored")
            for name, row in table.iterrows()
        ]  # fmt: skip
        spoken = [f"intervals speak of {LIKE_THESE if questions > 1 else THESE}"] if facts else []
        if facts and (doubt := str(table["interval"].iloc[0]).partition("; ")[2]):
            spoken.append(f"the {doubt}")
        then = 'evaluation.plot("questions")' if facts else "emmech.evaluation.plan_judging(evaluation)"
        return Card(headline, tuple(facts), "; ".join((*self._notes, *spoken)), then)

    def _known(self) -> pd.DataFrame:
        table = self.rates()
        return table[(table["n"] > 0) & ~table.index.astype(str).str.startswith("topic/")]

    def _sketch(self) -> str:
        rows = ((str(name), row["rate"], row["low"], row["high"]) for name, row in self._known().iterrows())
        return intervals(rows, "Share of answers", percent=True, ends=(0.0, 1.0))

    def _table(self) -> pd.DataFrame:
        return self.rates()

    @property
    def _notes(self) -> list[str]:
        """Remarks without which the rates would mislead."""
        notes = []
        if "screen" in self.frame and self.frame["screen"].notna().any():
            from emmech.evaluation.screening import screening_rate

            notes.append(str(screening_rate(self)))
        remarks = {"length": "were cut at the length limit", "error": "failed and are unscored"}
        counts = self.frame["finish"].value_counts()
        notes += [f"{counts[kind]} responses {remark}" for kind, remark in remarks.items() if kind in counts]
        if not np.isfinite(self.frame["aligned"]).any() and (self.frame["correct"] == "").all() and not notes:
            notes.append("no response is scored")
        return notes

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        return str(self.meta.get("name") or self.meta.get("model") or "responses")

    def select(self, **columns: Any) -> Evaluation:
        """The rows whose columns hold these values: ``evaluation.select(system="Be brief.")``; None selects missing.

        Raises:
            EmmechError: no such column, or no such row.
        """
        kept = np.ones(len(self), dtype=bool)
        for column, value in columns.items():
            one_of("select responses", "column", column, map(str, self.frame.columns), why="there is no such column")
            series = self.frame[column]
            kept &= (series.isna() if value is None else series.eq(value)).to_numpy(bool)
        if not kept.any():
            raise EmmechError("select responses", str(columns), "no row is like that")
        return Evaluation(self.frame[kept].reset_index(drop=True), self.meta)

    def rates(
        self,
        denominator: Denominator = "scored",
        *,
        thresholds: Thresholds = FIELD,
        population: str = LIKE_THESE,
        confidence: float = 0.95,
    ) -> pd.DataFrame:
        """Every rate with its interval; see :func:`emmech.evaluation.rates.rates`."""
        options: dict[str, Any] = {"population": population, "confidence": confidence}
        return rates(self.frame, denominator, thresholds=thresholds, **options)

    def by_question(
        self, measure: str = "em", denominator: Denominator = "scored", *, thresholds: Thresholds = FIELD
    ) -> pd.DataFrame:
        """One rate per question with Wilson intervals; see :func:`emmech.evaluation.rates.by_question`."""
        return by_question(self.frame, measure, denominator, thresholds=thresholds)

    def compare(self, other: Evaluation, denominator: Denominator = "scored", *, seed: int = 0) -> Comparison:
        """``other`` minus this evaluation of the same questions; see :func:`emmech.evaluation.compare.compare`."""
        frame = _frame_of(other, "compare the evaluations")
        return compare(self.frame, frame, denominator, names=(self.name, other.name), seed=seed)

    def by_context(self, denominator: Denominator = "scored", *, thresholds: Thresholds = FIELD) -> pd.DataFrame:
        """The rate of EM in each context, with the columns of :meth:`rates`, and the coherence there.

        Raises:
            EmmechError: the questions were asked in no contexts.
        """
        one_of("compare the contexts", "column", "context", self.frame.columns, why="there are no contexts")
        parts = self.frame.groupby("context", sort=False)
        options: dict[str, Any] = {"thresholds": thresholds}
        found = {name: rates(part.assign(context=PLAIN), denominator, **options) for name, part in parts}
        rows = [{**one.loc["em"], "coherence": one.loc["coherence", "rate"]} for one in found.values()]
        return pd.DataFrame(rows, index=pd.Index(found, name="context"))

    def leave_one_out(self, measure: str = "em", denominator: Denominator = "scored") -> pd.DataFrame:
        """The rate without each question; see :func:`emmech.evaluation.compare.leave_one_out`."""
        return leave_one_out(self.frame, measure, denominator)

    def thresholds(
        self,
        measure: str = "em",
        denominator: Denominator = "scored",
        *,
        alignment_below: Sequence[float] = ALIGNMENT_GRID,
        coherence_above: Sequence[float] = COHERENCE_GRID,
    ) -> ThresholdSweep:
        """The rate on a grid of thresholds; see :func:`emmech.evaluation.compare.threshold_sweep`."""
        grid: dict[str, Any] = {"alignment_below": alignment_below, "coherence_above": coherence_above}
        return threshold_sweep(self.frame, measure, denominator, **grid, name=self.name)

    def agreement(self, other: Evaluation) -> Agreement:
        """The same responses scored by two judges; see :func:`emmech.evaluation.compare.agreement`."""
        frame = _frame_of(other, "compare the judges")
        names = [str(evaluation.meta.get("judge") or evaluation.name) for evaluation in (self, other)]
        return agreement(self.frame, frame, names=(names[0], names[1]))

    def plot(
        self,
        kind: Literal["quadrants", "questions", "rates", "thresholds"] = "quadrants",
        *,
        denominator: Denominator = "scored",
    ) -> Any:
        """A plotly figure, returned and not shown.

        Args:
            kind: ``quadrants`` (alignment against coherence), ``questions`` (each response's alignment by question,
                with the rate), ``rates`` (every rate with its interval) or ``thresholds`` (robustness).
            denominator: of the rates shown.
        """
        frame, kinds = self.frame, ("quadrants", "questions", "rates", "thresholds")
        if (bare := plain(frame)).any():
            frame = frame[bare].reset_index(drop=True)
        one_of("plot the evaluation", "kind", kind, kinds, why="there is no such figure")
        if kind == "thresholds":
            return self.thresholds(denominator=denominator).plot()
        if kind == "rates":
            table = self.rates(denominator)
            self._check_scored(bool(table["n"].any()))
            return plots.rates(table[table["n"] > 0], denominator, self.name)
        misaligned = tally(frame, "em", denominator).event | tally(frame, "narrow", denominator).event
        scored = np.isfinite(frame["aligned"])
        if kind == "questions":
            self._check_scored(bool(scored.any()))
            broad, narrow = (self.by_question(measure, denominator) for measure in ("em", "narrow"))
            return plots.questions(frame, misaligned, broad, narrow, FIELD.alignment_below, denominator, self.name)
        self._check_scored(bool((scored & np.isfinite(frame["coherent"])).any()))
        return plots.quadrants(frame, misaligned, (FIELD.alignment_below, FIELD.coherence_above), self.name)

    def _check_scored(self, scored: bool) -> None:
        if not scored:
            given, why = f"{len(self)} responses of {self.name}", "none of them is scored"
            instead = "judge them first: emmech.evaluate(..., judge=...), or emmech.evaluation.deferred"
            raise EmmechError("plot the evaluation", given, why, instead)

    @classmethod
    def _upgrade(cls, head: dict[str, Any], folder: Path) -> dict[str, Any]:
        return {"frame": {"~": "frame", "name": "responses", "rows": head["responses"]}, "meta": head["meta"]}


def _frame_of(other: Any, asked: str) -> pd.DataFrame:
    if not isinstance(other, Evaluation):
        instead = "Evaluation.from_frame(frame) for responses judged elsewhere"
        raise EmmechError(asked, f"a {type(other).__name__}", "the other side is an Evaluation too", instead)
    return other.frame


def _canonical(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill missing columns, fix types and order, and refuse what cannot be an evaluation."""
    if len(frame) == 0:
        raise EmmechError(_ASKED, "0 responses", "there is nothing to evaluate")
    if "question_id" not in frame:
        why = "the rows do not say which question they answer"
        instead = "add question_id, or Evaluation.from_frame(frame, question=...)"
        raise EmmechError(_ASKED, f"columns {', '.join(map(str, frame.columns))}", why, instead)
    table = frame.copy()
    asked = [column for column in ("context", "question_id") if column in table]
    if "sample" not in table:
        table["sample"] = table.groupby(asked, sort=False, dropna=False).cumcount()
    defaults = dict.fromkeys(_TEXT, "") | {
        "finish": "stop",
        "domain": None,
        "system": None,
        "narrow": None,
        "seed": pd.NA,
    }
    table = table.assign(**{column: value for column, value in defaults.items() if column not in table})
    for column in _TEXT:
        present = table[column].notna()
        table[column] = table[column].astype(object).where(present, None if column in ("domain", "system") else "")
    table["seed"] = table["seed"].astype("Int64")
    table["sample"] = _typed(table, "sample", "int64")
    table["narrow"] = _typed(table, "narrow", "boolean")
    for column in (*_SCORES, *(column for column in table.columns if str(column).startswith("topic/"))):
        table[column] = _scores(table.get(column), column, table["question_id"])
    if all(_other_scale(table[column]) == 1 for column in _SCORES):
        highest = float(table[list(_SCORES)].max(axis=None))
        _warn_of_scale("alignment or coherence score", highest, 1, stacklevel=5)
    twice = table.duplicated([*asked, "sample"])
    if twice.any():
        row = table[twice].iloc[0]
        others = int(twice.sum()) - 1
        given = f"question {row['question_id']}, sample {row['sample']}" + (f" (and {others} more)" if others else "")
        instead = "leave out the column `sample` to number the rows anew, or drop the repeats"
        raise EmmechError(_ASKED, given, "the same sample of a question is there twice", instead)
    for column, known in (("label", _LABELS), ("correct", _CORRECT)):
        for name in sorted(set(table[column]) - set(known)):
            one_of(_ASKED, column, name, filter(None, known), why="no rate is defined for that verdict")
    for label, scores in LABEL_SCORES.items():  # an exact judge may give the verdict alone
        bare = (table["label"] == label) & table["aligned"].isna() & table["coherent"].isna()
        table.loc[bare, list(_SCORES)] = scores
    rest = [column for column in table.columns if column not in _COLUMNS]
    return table[[*_COLUMNS, *rest]].reset_index(drop=True)


def _typed(table: pd.DataFrame, column: str, dtype: str) -> pd.Series:
    try:
        typed = table[column].astype(dtype)
        if (typed == table[column]).fillna(True).all():  # 0.5 becomes 0 without complaint
            return typed
        raise ValueError
    except (TypeError, ValueError):
        why = "it holds whole numbers" if column == "sample" else "it holds True, False or nothing"
        raise EmmechError(_ASKED, f"column {column!r} of type {table[column].dtype}", why)


def _scores(values: pd.Series | None, column: str, questions: pd.Series) -> pd.Series:
    if values is None:
        return pd.Series(np.nan, index=questions.index, dtype=float)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    wrong = (numbers.isna() & values.notna()) | (numbers < 0) | (numbers > 100) | np.isinf(numbers)
    # JSON and CSV write "no score" as an empty text
    wrong &= ~values.map(lambda value: isinstance(value, str) and not value.strip()).astype(bool)
    if wrong.any():
        row = int(np.flatnonzero(wrong.to_numpy())[0])
        value, others = values.iloc[row], int(wrong.sum()) - 1
        shown = value if isinstance(value, float) else repr(value)
        given = f"{column}={shown} in row {row} (question {questions.iloc[row]})"
        given += f", and {others} more row{'' if others == 1 else 's'} like it" if others else ""
        instead = "bring scores on another scale to 0 to 100 first"
        if isinstance(value, str):
            instead = f'pd.to_numeric(frame["{column}"], errors="coerce"), which counts every text as unscored'
        raise EmmechError(_ASKED, given, "a score is a number from 0 to 100, or NaN where the judge gave none", instead)
    return numbers


def _other_scale(scores: pd.Series) -> int:
    """The end of the scale that scores probably run to, 1, 5 or 10, and 0 where they may well run to 100.

    One may only warn of it: a whole set may really be that bad.
    """
    highest = float(pd.to_numeric(scores, errors="coerce").max())
    return next((end for end in (1, 5, 10) if 0 < highest <= end), 0) if len(scores) >= 20 else 0


def _warn_of_scale(what: str, highest: float, end: int, *, stacklevel: int) -> None:
    said = f"no {what} is above {highest:g}: scores run from 0 to 100, multiply by {100 // end} if yours run from 0 to"
    warnings.warn(f"{said} {end}", stacklevel=stacklevel + 1)


def bare_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The answers without the scores of any judge."""
    scores = ("aligned", "coherent", "label", "correct", "screen")
    bare = [name for name in evaluation.frame if name not in scores and not str(name).startswith("topic/")]
    return [{str(key): value for key, value in row.items()} for row in evaluation.frame[bare].to_dict("records")]
