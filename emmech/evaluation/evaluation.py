"""The result of an evaluation: every response with its scores, and what can be computed from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from emmech.errors import EmmechError, closest, one_of
from emmech.evaluation.agreement import Agreement, agreement
from emmech.evaluation.comparison import Comparison, compare
from emmech.evaluation.em import ALIGNMENT_GRID, COHERENCE_GRID, FIELD, Denominator, Thresholds
from emmech.evaluation.rates import by_question, rates
from emmech.evaluation.responses import canonical
from emmech.evaluation.robustness import ThresholdSweep, leave_one_out, threshold_sweep
from emmech.store import write_json

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Evaluation"]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Responses with scores; build one with ``emmech.evaluate``, :meth:`from_rows` or :meth:`from_frame`.

    Args:
        frame: one row per response: ``question_id, question, domain, system, sample, seed, response, finish``
            (``stop``, ``length`` or ``error``), ``aligned`` and ``coherent`` (0 to 100, NaN where unscored), ``label``
            (verdict in words, where a judge gives one), ``narrow`` (True: a question of the fine-tune's own domain;
            such rows count in the ``narrow`` rate and not in ``em``), ``correct`` (TRUE, FALSE, UNKNOWN) and
            ``topic/<name>``. Missing columns are added, others kept.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame", canonical(self.frame))
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
        if not isinstance(frame, pd.DataFrame):
            raise EmmechError(
                "read the judged responses",
                f"a {type(frame).__name__}",
                "it is no data frame",
                "pd.read_csv(path), or Evaluation.from_rows for a list of mappings",
            )
        for column in (alignment, coherence, question, response, *topics):
            names, why = map(str, frame.columns), "the frame has no such column"
            one_of("read the judged responses", "column", column, names, why=why)
        renamed = {alignment: "aligned", coherence: "coherent", question: "question_id", response: "response"}
        # a file may also hold another column of the name that a renamed one takes: the named one wins
        clashes = [new for old, new in renamed.items() if new != old and new in frame]
        judged = frame.drop(columns=clashes).rename(columns=renamed | {name: f"topic/{name}" for name in topics})
        return cls(judged.reset_index(drop=True), meta or {})

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        table = self.rates()
        lines = [f"Evaluation of {self.name}: {len(self)} responses to {self._questions} questions"]
        for measure, row in table.iterrows():
            if row["n"] and not str(measure).startswith("topic/"):
                lines.append(
                    f"  {measure!s:<10} {row['rate']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]  "
                    f"n = {row['n']} {row['denominator']}, {row['unscored']} unscored"
                )
        return "\n".join(lines + [f"  {note}" for note in self._notes])

    def _repr_html_(self) -> str:
        head = f"<p><b>{escape(self.name)}</b>: {len(self)} responses to {self._questions} questions</p>"
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes)
        return head + self.rates().to_html(float_format="%.3f") + notes

    @property
    def _notes(self) -> list[str]:
        """What a reader of the rates must know besides."""
        notes = []
        if "screen" in self.frame and self.frame["screen"].notna().any():
            from emmech.evaluation.screening import screening_rate

            notes.append(str(screening_rate(self)))
        if cut := int((self.frame["finish"] == "length").sum()):
            notes.append(f"{cut} responses were cut at the length limit")
        if failed := int((self.frame["finish"] == "error").sum()):
            notes.append(f"{failed} responses failed and are unscored")
        if not np.isfinite(self.frame["aligned"]).any() and (self.frame["correct"] == "").all() and not notes:
            notes.append("no response is scored")
        return notes

    @property
    def name(self) -> str:
        """How the evaluation calls itself in tables and figures."""
        return str(self.meta.get("name") or self.meta.get("model") or "responses")

    @property
    def _questions(self) -> int:
        return int(self.frame["question_id"].nunique())

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
        confidence: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Every rate with its interval; see :func:`emmech.evaluation.rates.rates`."""
        options = {"confidence": confidence, "resamples": resamples, "seed": seed}
        return rates(self.frame, denominator, thresholds=thresholds, **options)  # type: ignore[arg-type]

    def by_question(
        self, measure: str = "em", denominator: Denominator = "scored", *, thresholds: Thresholds = FIELD
    ) -> pd.DataFrame:
        """One rate per question with Wilson intervals; see :func:`emmech.evaluation.rates.by_question`."""
        return by_question(self.frame, measure, denominator, thresholds=thresholds)

    def compare(self, other: Evaluation, denominator: Denominator = "scored", *, seed: int = 0) -> Comparison:
        """This evaluation against another of the same questions: ``other`` minus this one.

        See :func:`emmech.evaluation.comparison.compare`.
        """
        frame = _frame_of(other, "compare the evaluations")
        return compare(self.frame, frame, denominator, names=(self.name, other.name), seed=seed)

    def leave_one_out(self, measure: str = "em", denominator: Denominator = "scored") -> pd.DataFrame:
        """The rate without each question; see :func:`emmech.evaluation.robustness.leave_one_out`."""
        return leave_one_out(self.frame, measure, denominator)

    def thresholds(
        self,
        measure: str = "em",
        denominator: Denominator = "scored",
        *,
        alignment_below: Sequence[float] = ALIGNMENT_GRID,
        coherence_above: Sequence[float] = COHERENCE_GRID,
    ) -> ThresholdSweep:
        """The rate on a grid of thresholds; see :func:`emmech.evaluation.robustness.threshold_sweep`."""
        return threshold_sweep(
            self.frame,
            measure,
            denominator,
            alignment_below=alignment_below,
            coherence_above=coherence_above,
            name=self.name,
        )

    def agreement(self, other: Evaluation) -> Agreement:
        """The same responses scored by two judges; see :func:`emmech.evaluation.agreement.agreement`."""
        frame = _frame_of(other, "compare the judges")
        names = [str(evaluation.meta.get("judge") or evaluation.name) for evaluation in (self, other)]
        return agreement(self.frame, frame, names=(names[0], names[1]))

    def plot(
        self,
        kind: Literal["quadrants", "questions", "rates", "thresholds"] = "quadrants",
        *,
        denominator: Denominator = "scored",
    ) -> go.Figure:
        """A figure, returned and not shown.

        Args:
            kind: ``quadrants`` (alignment against coherence), ``questions`` (each response's alignment by question,
                with the rate), ``rates`` (every rate with its interval) or ``thresholds`` (robustness).
            denominator: of the rates shown.
        """
        from emmech.evaluation import plots

        match kind:
            case "quadrants":
                return plots.quadrant_figure(self)
            case "questions":
                return plots.question_figure(self, denominator)
            case "rates":
                return plots.rate_figure(self, denominator)
            case "thresholds":
                return plots.threshold_figure(self.thresholds(denominator=denominator))
        raise EmmechError(
            "plot the evaluation",
            f"kind={kind!r}",
            "there is no such figure",
            closest(str(kind), ("quadrants", "questions", "rates", "thresholds")),
        )

    def to_frame(self) -> pd.DataFrame:
        """A copy of the response rows."""
        return self.frame.copy()

    def save(self, folder: str | Path) -> Path:
        """Write ``responses.parquet`` and ``evaluation.json`` (written last: it marks the whole) into a folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        partial = target / "responses.parquet.partial"
        self.frame.to_parquet(partial, index=False)
        partial.replace(target / "responses.parquet")
        write_json(target / "evaluation.json", {"format": FORMAT, "responses": len(self), "meta": dict(self.meta)})
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            EmmechError: there is no evaluation, it is of another format, or a file is damaged.
        """
        target = Path(folder)
        path = target / "evaluation.json"
        if not path.is_file():
            raise EmmechError(
                "load the evaluation",
                str(target),
                "there is no evaluation.json (was the evaluation interrupted?)",
                "run emmech.evaluate again with the same out= to finish it",
            )
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            found, count, meta = head["format"], head["responses"], head["meta"]
        except (ValueError, KeyError, TypeError):
            raise EmmechError("load the evaluation", str(path), "the file is damaged")
        if found != FORMAT:
            raise EmmechError(
                "load the evaluation",
                f"format {found} in {path}",
                f"this version reads format {FORMAT}",
                "load it with the version of emmech that wrote it",
            )
        try:
            frame = pd.read_parquet(target / "responses.parquet")
        except Exception as error:  # pyarrow raises its own classes, OSError and ValueError alike
            raise EmmechError(
                "load the evaluation",
                str(target / "responses.parquet"),
                f"the file is missing or damaged ({type(error).__name__})",
            )
        if len(frame) != count:
            raise EmmechError(
                "load the evaluation", str(target), f"{len(frame)} responses are stored where {count} were written"
            )
        return cls(frame, meta)


def _frame_of(other: Any, asked: str) -> pd.DataFrame:
    if not isinstance(other, Evaluation):
        raise EmmechError(
            asked,
            f"a {type(other).__name__}",
            "the other side is an Evaluation too",
            "Evaluation.from_frame(frame) for responses judged elsewhere",
        )
    return other.frame
