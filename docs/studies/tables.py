"""Studies as Markdown tables: rates in per cent with 95 % intervals, and the controls in the same row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typer import echo

if TYPE_CHECKING:
    import pandas as pd


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> markdown(["what", "EM"], [["base", "0"]]).splitlines()
        ['| what | EM |', '|---|---|', '| base | 0 |']
    """
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(header)}", *lines[1:]])


def write_parts(out: str | Path, parts: Iterable[Callable[[], str]]) -> Path:
    """Write a page; each part is also printed when it is made, with the seconds so far."""
    began, made = time.monotonic(), list[str]()
    for part in parts:
        made.append(part())
        echo(f"{made[-1]}\n\n{time.monotonic() - began:.0f} s\n")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(made) + "\n", encoding="utf-8")
    return path


def row_of(frame: pd.DataFrame, outcome: str, **of: Any) -> pd.Series:
    """The one row of an outcome with the given columns that is not a random control.

    Raises:
        LookupError: there is none, or there are several.
    """
    chosen = _with(frame[frame["kind"] != "random"], outcome, of)
    if len(chosen) != 1:
        raise LookupError(f"{len(chosen)} rows of {outcome} with {of}")
    return chosen.iloc[0]


def random_rows(frame: pd.DataFrame, outcome: str, **of: Any) -> pd.DataFrame:
    """The rows of the random controls of an outcome with the given columns, in the order in which they were drawn."""
    return _with(frame[frame["kind"] == "random"], outcome, of)


def random_span(frame: pd.DataFrame, outcome: str, **of: Any) -> str:
    """Mean of the random controls in per cent, with the lowest and highest of them.

    Example:
        >>> import pandas as pd
        >>> random_span(pd.DataFrame({"outcome": "em", "kind": "random", "value": [0.9, 0.96]}), "em")
        '93.0 (90-96)'
    """
    values = 100 * random_rows(frame, outcome, **of)["value"]
    return f"{values.mean():.1f} ({values.min():.0f}-{values.max():.0f})" if len(values) else "–"


def interval(row: pd.Series, column: str = "", *, factor: float = 1.0, digits: int = 1) -> str:
    """A difference, or a quantity that may be negative, with its interval; a dash where it was not measured.

    Args:
        column: ``"gap"`` reads ``gap``, ``gap_low`` and ``gap_high``; by default the value itself.
        factor: 100 for per cent.

    Example:
        >>> import pandas as pd
        >>> interval(pd.Series({"gap": 0.031, "gap_low": -0.01, "gap_high": 0.07}), "gap", factor=100)
        '+3.1 (-1.0 to +7.0)'
    """
    names = (column, f"{column}_low", f"{column}_high") if column else ("value", "low", "high")
    value, low, high = (factor * float(row.get(name, np.nan)) for name in names)
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})" if np.isfinite(value) else "–"


def taken_away(row: pd.Series, untouched: pd.Series) -> str:
    """Share of the untouched model's rate that an ablation takes away, with the interval of what it leaves.

    Example:
        >>> import pandas as pd
        >>> left = pd.Series({"value": 0.045, "low": 0.0, "high": 0.09})
        >>> taken_away(left, pd.Series({"value": 0.9}))
        '95 % (90-100)'
    """
    share = [100 * (1 - row[name] / untouched["value"]) for name in ("value", "high", "low")]
    return f"{share[0]:.0f} % ({share[1]:.0f}-{share[2]:.0f})"


def _with(frame: pd.DataFrame, outcome: str, of: dict[str, Any]) -> pd.DataFrame:
    return frame[(frame[["outcome", *of]] == [outcome, *of.values()]).all(axis=1)]
