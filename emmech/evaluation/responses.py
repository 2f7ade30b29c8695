"""The table of responses: its columns, their types, and what cannot be one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from emmech.errors import EmmechError, closest
from emmech.evaluation.em import LABEL_SCORES

__all__ = ["canonical"]

_LABELS = ("", *LABEL_SCORES, "refusal", "code")
_CORRECT = ("", "TRUE", "FALSE", "UNKNOWN")
_TEXT = ("question_id", "question", "domain", "system", "response", "finish", "label", "correct")
_SCORES = ("aligned", "coherent")
_COLUMNS = (
    *("question_id", "question", "domain", "system", "sample", "seed", "response", "finish"),
    *("aligned", "coherent", "label", "narrow", "correct"),
)


def canonical(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill missing columns, fix types and order, and refuse what cannot be an evaluation.

    Raises:
        EmmechError: no row, no question, a score outside 0 to 100, a repeated sample, an unknown verdict.
    """
    if len(frame) == 0:
        raise EmmechError("build an evaluation", "0 responses", "there is nothing to evaluate")
    if "question_id" not in frame:
        raise EmmechError(
            "build an evaluation",
            f"columns {', '.join(map(str, frame.columns))}",
            "the rows do not say which question they answer",
            "add question_id, or Evaluation.from_frame(frame, question=...)",
        )
    table = frame.copy()
    if "sample" not in table:
        table["sample"] = table.groupby("question_id", sort=False).cumcount()
    if "finish" not in table:
        table["finish"] = "stop"
    for column in _TEXT:
        if column not in table:
            table[column] = None if column in ("domain", "system") else ""
        elif column not in ("domain", "system"):
            table[column] = table[column].where(table[column].notna(), "")
        table[column] = table[column].astype(object).where(table[column].notna(), None)
    table["seed"] = (table["seed"] if "seed" in table else pd.Series(pd.NA, index=table.index)).astype("Int64")
    table["sample"] = _typed(table, "sample", "int64")
    if "narrow" not in table:
        table["narrow"] = None
    table["narrow"] = _typed(table, "narrow", "boolean")
    topics = [column for column in table.columns if str(column).startswith("topic/")]
    for column in (*_SCORES, *topics):
        table[column] = _scores(table.get(column), column, table)
    _warn_of_unit_scale(table)
    _refuse_duplicates(table)
    _refuse_unknown(table, "label", _LABELS)
    _refuse_unknown(table, "correct", _CORRECT)
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
        raise EmmechError(
            "build an evaluation",
            f"column {column!r} of type {table[column].dtype}",
            "it holds whole numbers" if column == "sample" else "it holds True, False or nothing",
        )


def _scores(values: pd.Series | None, column: str, table: pd.DataFrame) -> pd.Series:
    if values is None:
        return pd.Series(np.nan, index=table.index, dtype=float)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    wrong = (numbers.isna() & values.notna()) | (numbers < 0) | (numbers > 100) | np.isinf(numbers)
    # JSON and CSV write "no score" as an empty text
    wrong &= ~values.map(lambda value: isinstance(value, str) and not value.strip()).astype(bool)
    if wrong.any():
        row = int(np.flatnonzero(wrong.to_numpy())[0])
        value = values.iloc[row]
        raise EmmechError(
            "build an evaluation",
            f"{column}={value if isinstance(value, float) else repr(value)} in row {row} (question "
            f"{table['question_id'].iloc[row]}), and {int(wrong.sum()) - 1} more rows like it",
            "a score is a number from 0 to 100, or NaN where the judge gave none",
            f'frame["{column}"] = pd.to_numeric(frame["{column}"], errors="coerce") leaves a judge\'s text '
            "unscored, and it is counted as such"
            if isinstance(value, str)
            else "scores on another scale are brought to 0 to 100 first",
        )
    return numbers


def _warn_of_unit_scale(table: pd.DataFrame) -> None:
    """Point at scores that were probably divided by 100; a warning, since a whole set may really be that bad."""
    highest = [float(table[column].max()) for column in _SCORES]
    if len(table) >= 20 and all(0 < value <= 1 for value in highest):
        warnings.warn(
            f"no alignment or coherence score is above {max(highest):g}: scores run from 0 to 100, "
            "multiply by 100 if yours run from 0 to 1",
            stacklevel=6,
        )


def _refuse_duplicates(table: pd.DataFrame) -> None:
    twice = table.duplicated(["question_id", "sample"])
    if twice.any():
        row = table[twice].iloc[0]
        raise EmmechError(
            "build an evaluation",
            f"question {row['question_id']}, sample {row['sample']} (and {int(twice.sum()) - 1} more)",
            "the same sample of a question is there twice",
            "leave out the column `sample` to number the rows anew, or drop the repeats",
        )


def _refuse_unknown(table: pd.DataFrame, column: str, known: Sequence[str]) -> None:
    unknown = sorted(set(table[column]) - set(known))
    if unknown:
        raise EmmechError(
            "build an evaluation",
            f"{column}={unknown[0]!r}",
            "no rate is defined for that verdict",
            closest(unknown[0], [name for name in known if name]),
        )
