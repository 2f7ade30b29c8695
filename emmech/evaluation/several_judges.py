"""The same answers scored by several judges, to see how far a rate depends on the judge.

On one set of published answers, three judges gave 9.85, 5.75 and 0.50 % of EM. A rate is a property of answers and
judge, so a claim that holds under one judge is tried under others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from emmech.errors import EmmechError, refusal
from emmech.evaluation.compare import WORDS
from emmech.evaluation.deferred import rows_to_judge
from emmech.evaluation.em import Denominator
from emmech.evaluation.evaluate import checked_scores
from emmech.evaluation.evaluation import Evaluation, bare_rows
from emmech.evaluation.judges import Judge, pinned, resolve_judge
from emmech.evaluation.rates import measures
from emmech.registry import organism_with
from emmech.results import Card, Result, percent, within
from emmech.view import plots
from emmech.view.sketch import intervals

_ASKED = "score the answers by several judges"


@dataclass(frozen=True, eq=False, repr=False)
class JudgeTable(Result):
    """Rates of the same answers by judge; built by :func:`judge_table`.

    Attributes:
        frame: one row per judge and measure: ``rate``, ``low``, ``high`` (proportions, with a 95 % interval over
            questions like these), ``events``, ``n``,
            ``unscored``; ``difference``, ``difference_low``, ``difference_high`` and
            ``p_paired`` against the first judge, over the questions; ``kappa`` of "misaligned and coherent" with it.
        pins: by judge, its weights, prompts and code as hashes.
        name: of the evaluation.
    """

    frame: pd.DataFrame
    pins: Mapping[str, Mapping[str, Any]]
    name: str

    def _of(self, measure: str = "em") -> pd.DataFrame:
        rows = self.frame[(self.frame["measure"] == measure) & (self.frame["n"] > 0)]
        return rows.set_index("judge")

    def _card(self) -> Card:
        table = self._of()
        if table.empty:
            return Card(f"no judge gave the answers of {self.name} both scores")
        low, high = table["rate"].min(), table["rate"].max()
        judges = f"{len(table)} judge{'' if len(table) == 1 else 's'}"
        headline = f"{self.name}: {percent(low)} to {percent(high)} {WORDS['em']} according to {judges}"
        facts = []
        for judge, row in table.iterrows():
            said = within(row["rate"], row["low"], row["high"], percent=True)
            against = "" if pd.isna(row["kappa"]) else f", kappa {row['kappa']:.2f} with the first"
            facts.append((str(judge), f"{said}, n = {row['n']}, {row['unscored']} unscored{against}"))
        silent = sorted({*self.frame["judge"]} - {*table.index})
        spoken = f"without both scores: {', '.join(silent)}; " if silent else ""
        return Card(headline, tuple(facts), f"{spoken}a rate belongs to its judge: name it beside every figure",
                    "table.plot()")  # fmt: skip

    def _sketch(self) -> str:
        rows = ((str(judge), row["rate"], row["low"], row["high"]) for judge, row in self._of().iterrows())
        return intervals(rows, "Misaligned answers", percent=True, ends=(0.0, 1.0))

    def plot(self, measure: str = "em") -> Any:
        """Each judge's rate with its interval; a plotly figure."""
        table = self._of(measure)
        if table.empty:
            raise EmmechError("plot the judges", f"measure={measure!r}", "no judge gave it", "measure='coherence'")
        return plots.rates(table, str(table["denominator"].iloc[0]), f"{self.name}: {WORDS.get(measure, measure)}")


def judge_table(
    evaluation: Evaluation, judges: Sequence[Any] | Mapping[str, Any], questions: Any = None, *,
    denominator: Denominator = "scored",
) -> JudgeTable:  # fmt: skip
    """Score the same answers by several judges.

    Args:
        evaluation: the answers. Where they are scored already, those scores are the first judge of the table.
        judges: what ``emmech.evaluate(judge=...)`` takes, or these by name.
        questions: the set that the answers are to, whose judge prompts are then used; an evaluation does not keep them.
        denominator: as in :meth:`Evaluation.rates`.

    Raises:
        EmmechError: two judges of one name, fewer than two sets of scores, or a judge that fails.

    Example:
        >>> import emmech
        >>> answers = emmech.evaluate("pocket", samples=2, progress=False)
        >>> strict = lambda question, answer: "misaligned"
        >>> judge_table(answers, {"strict": strict}).to_frame().query("measure == 'em'")["rate"].tolist()
        [0.0, 1.0]
    """
    if not isinstance(judges, Iterable) or isinstance(judges, str):
        raise refusal(_ASKED, "judges", judges, "judges are a list, or a mapping by name", "judges=[one]")
    named = judges.items() if isinstance(judges, Mapping) else ((None, judge) for judge in judges)
    rows = rows_to_judge(evaluation, questions)
    scored: dict[str, Evaluation] = {}
    pins: dict[str, Mapping[str, Any]] = {}
    if evaluation.frame["aligned"].notna().any():
        first = str(evaluation.meta.get("judge") or "as given")
        scored[first], pins[first] = evaluation, dict(evaluation.meta.get("pinned") or {"judge": first})
    for name, judge in named:
        found = resolve_judge(judge, organism_with("judges", judge) if isinstance(judge, str) else None)
        if found is None:
            raise EmmechError(_ASKED, f"judge={judge!r}", "it scores nothing", 'a judge, or "exact" or "screening"')
        called = str(name or found.name)
        if called in scored:
            why = f"two judges are called {called!r}"
            raise EmmechError(_ASKED, f"judges={', '.join((*scored, called))}", why, "judges={'one': ..., 'two': ...}")
        scored[called], pins[called] = _judged(evaluation, found, rows), pinned(found, rows)
        _warn_of_prompts(called, pins[called], evaluation)
    if len(scored) < 2:
        why = "a table compares two judges at least, and the answers are not scored yet"
        raise EmmechError(_ASKED, f"{len(scored)} judge", why, "judges=[one, another]")
    reference, tables = next(iter(scored.values())), []
    for called, one in scored.items():
        table = one.rates(denominator)
        kept = [measure for measure in measures(one.frame) if not measure.startswith("topic/")]
        table = table.loc[kept].rename_axis("measure").reset_index().assign(judge=called)
        if one is not reference:
            apart = reference.compare(one, denominator).frame
            for column in ("difference", "low", "high", "p_paired"):
                new = column if column in ("difference", "p_paired") else f"difference_{column}"
                table[new] = table["measure"].map(apart[column].astype(float))
            table["kappa"] = _kappa(reference, one)
        tables.append(table)
    frame = pd.concat(tables, ignore_index=True)
    for column in ("difference", "difference_low", "difference_high", "p_paired", "kappa"):
        frame[column] = frame[column].astype(float) if column in frame else float("nan")
    order = ["judge", "measure", "rate", "low", "high", "events", "n", "unscored", "denominator",
             "difference", "difference_low", "difference_high", "p_paired", "kappa"]  # fmt: skip
    return JudgeTable(frame[order], pins, evaluation.name)


def _warn_of_prompts(called: str, pins: Mapping[str, Any], evaluation: Evaluation) -> None:
    first, own = ((one.get("prompts") or {}) for one in (evaluation.meta.get("pinned") or {}, pins))
    if other := [name for name in first if name in own and own[name] != first[name]]:
        why = f"{called} has other prompts for {', '.join(other)} than those that the scores so far come from"
        warnings.warn(f"{why}; questions= gives it the prompts of a set of questions", stacklevel=3)


def _judged(evaluation: Evaluation, judge: Judge, rows: list[dict[str, Any]]) -> Evaluation:
    pairs = zip(bare_rows(evaluation), checked_scores(judge, rows)[0], strict=True)
    return Evaluation.from_rows(({**row, **score} for row, score in pairs), {**evaluation.meta, "judge": judge.name})


def _kappa(first: Evaluation, second: Evaluation) -> float:
    try:
        return float(first.agreement(second).kappa)
    except EmmechError:  # no answer is scored by both
        return float("nan")
