"""The Sweep: one grid of numbers and its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from emmech.errors import EmmechError, one_of, refusal
from emmech.measures.measure import wrong_way
from emmech.results import Card, Result
from emmech.view.plots import phase_diagram
from emmech.view.sketch import cells, curves

AXES = ("run", "step", "scale", "coefficient")


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Result):
    """Measurements over checkpoints x scales x coefficients.

    Args:
        frame: tidy, one row per variant, measure and item: columns ``run``, ``step``, ``scale``, ``coefficient``,
            ``measure``, ``item``, ``value`` and ``weight`` (how many samples the value is a mean of; 1 otherwise).
        meta: runs, base model and its fingerprint, measures, seed, what was shared.
        arrays: what is too large for a frame, by measure: log-probabilities ``[variants, positions, vocab]`` of
            :class:`NextToken`, mean residuals ``[variants, texts, d_model]`` of :class:`ProbeActivation`; variants in
            the order of :attr:`variants`.
        responses: every sampled response with its verdict, for sampled measures.
    """

    frame: pd.DataFrame
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    responses: pd.DataFrame | None = None

    _stems: ClassVar[Mapping[str, str]] = {"frame": "sweep"}

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what was measured."""
        return tuple(dict.fromkeys(self.frame["measure"]))

    @property
    def variants(self) -> pd.DataFrame:
        """The grid, one row per variant in order."""
        return self.frame[list(AXES)].drop_duplicates().reset_index(drop=True)

    def to_frame(self, measure: str | None = None) -> pd.DataFrame:
        """One row per variant and measure: weighted mean over items, its standard error over items, and counts.

        Items are the clusters (questions, pairs), so the error is between items. Where coefficients were swept,
        ``wrong_way`` is the share of items that the steering moves against its mean change, from the same variant at
        coefficient 0 (:func:`emmech.measures.wrong_way`); NaN where that was not swept.
        """
        chosen = self.frame if measure is None else self._of(measure)
        values, weights = chosen["value"].astype(float), chosen["weight"].astype(float)
        values = values.where(np.isfinite(values) & (weights > 0))

        def by_variant(series: pd.Series) -> Any:
            return series.groupby([chosen[column] for column in (*AXES, "measure")], sort=False)

        known = weights.where(values.notna(), 0.0)
        shares = known / by_variant(known).transform("sum")
        count, mean = by_variant(values).count(), by_variant(shares * values).sum(min_count=1)
        squares = by_variant((shares * (values - by_variant(shares * values).transform("sum"))) ** 2).sum()
        samples = by_variant(weights).sum().where(count > 0, 0)
        columns = {"value": mean, "error": np.sqrt(squares * count / (count - 1)).where(count > 1)}
        found = pd.DataFrame({**columns, "items": count, "samples": samples.astype(int)}).reset_index()
        if found["coefficient"].nunique() > 1:
            found["wrong_way"] = self._wrong_way(found)
        return found

    def _wrong_way(self, rows: pd.DataFrame) -> list[float]:
        place = ["run", "step", "scale", "measure"]
        known = self.frame[self.frame["weight"] > 0]
        items = {key: part.set_index("item")["value"] for key, part in known.groupby([*place, "coefficient"])}
        shares = []
        for row in rows.to_dict(orient="records"):
            key, steered = tuple(row[name] for name in place), row["coefficient"]
            moved, plain = items.get((*key, steered)), items.get((*key, 0.0))
            if steered == 0 or moved is None or plain is None or moved.index.has_duplicates:
                shares.append(np.nan)
                continue
            changed, before = moved.align(plain, join="inner")
            shares.append(wrong_way(changed.to_numpy(float), before.to_numpy(float)))
        return shares

    def table(self, measure: str | None = None, *, columns: str = "scale") -> pd.DataFrame:
        """Mean over items, steps by scales (or by ``"coefficient"`` or ``"run"``).

        Raises:
            EmmechError: the measure was not swept, or another axis varies that the table would mix.
        """
        name = self._one(measure)
        summary = self.to_frame(name)
        rest = [axis for axis in AXES if axis not in ("step", columns) and summary[axis].nunique() > 1]
        asked = f"lay {name} out as a table"
        one_of(asked, "columns", columns, AXES)
        if rest:
            why = f"{', '.join(rest)} varies too, and a mean over it would mix variants"
            raise refusal(asked, "columns", columns, why, f"columns={rest[0]!r}, or filter sweep.frame")
        return summary.pivot(index="step", columns=columns, values="value")

    def _of(self, measure: str) -> pd.DataFrame:
        one_of(f"read the measure {measure!r}", "measure", measure, self.measures, why="it was not swept")
        return self.frame[self.frame["measure"] == measure]

    def _one(self, measure: str | None) -> str:
        if measure is not None:
            self._of(measure)
            return measure
        return next((first for first in ("em", "margin_broad") if first in self.measures), self.measures[0])

    def plot(self, measure: str | None = None) -> Any:
        """The phase diagram: a heat map of steps by scales, one panel per run and coefficient.

        Lines by scale are drawn where only one step or one scale was swept.
        """
        name = self._one(measure)
        return phase_diagram(self.to_frame(name), name)

    @classmethod
    def _upgrade(cls, head: dict[str, Any], folder: Path) -> dict[str, Any]:
        from safetensors import safe_open

        arrays: dict[str, Any] = {}
        if (folder / "arrays.safetensors").exists():
            with safe_open(folder / "arrays.safetensors", framework="np") as file:
                arrays = {key: {"~": "array", "name": key} for key in file.keys()}  # noqa: SIM118 (not a mapping)
        kept = (folder / "responses.parquet").exists()
        return {
            "frame": {"~": "frame", "name": "sweep"},
            "meta": head,
            "arrays": arrays,
            "responses": {"~": "frame", "name": "responses"} if kept else None,
        }

    def _card(self) -> Card:
        axes, name = self.variants, self._one(None)
        shape = " x ".join(f"{axes[axis].nunique()} {axis}{'s' if axes[axis].nunique() > 1 else ''}" for axis in AXES)
        facts = [("grid", shape)]
        headline = f"{name} was not measurable anywhere on the grid"
        for measure in self.measures:
            found = self.to_frame(measure).dropna(subset="value")
            if found.empty:
                continue
            low, high = (found.loc[at] for at in (found["value"].idxmin(), found["value"].idxmax()))
            same = len(found) > 1 and low["value"] == high["value"]
            said = f"{_measured(low)} at {self._where(low)}, to {_measured(high)} at {self._where(high)}"
            facts.append((measure, f"{low['value']:.3g} everywhere" if same else f"from {said}"))
            if "wrong_way" in found and found["wrong_way"].notna().any():
                at = found.loc[found["wrong_way"].idxmax()]
                share = (
                    f"up to {at['wrong_way']:.0%} of {at['items']} items move against the mean, at {self._where(at)}"
                )
                facts.append((f"{measure}, steered", share))
            if measure == name:
                headline = f"{name} is {low['value']:.3g} everywhere" if same else f"{name} ranges from {said}"
        caveat = ""
        if name.startswith("margin"):
            caveat = (
                "a margin is the log-probability of misaligned minus aligned answers, in nats per token: above zero "
            )
            caveat += "the model prefers the misaligned ones, which is not yet a rate of misaligned answers"
        then = "emmech.phase_transition(run, sweep=sweep)" if axes["step"].nunique() > 9 else "sweep.plot()"
        return Card(headline, tuple(facts), caveat, then)

    def _where(self, row: pd.Series) -> str:
        """The cell of one row, by the axes that vary."""
        varied = [axis for axis in AXES if self.variants[axis].nunique() > 1] or ["step"]
        return ", ".join(f"{axis} {row[axis] if axis == 'run' else format(row[axis], 'g')}" for axis in varied)

    def _sketch(self) -> str:
        try:
            table = self.table()
        except EmmechError:  # more than two axes vary
            return ""
        name = self._one(None)
        if min(table.shape) > 1:
            return cells(table, name, axes=("step", "scale"))
        across = table.shape[0] == 1
        line = table.iloc[0] if across else table.iloc[:, 0]
        return curves([("", line.index, line)], name, axis="scale" if across else "step")

    def _table(self) -> pd.DataFrame:
        try:
            return self.table()
        except EmmechError:  # more than two axes vary
            return self.to_frame()


def _measured(row: pd.Series) -> str:
    error = f" ± {1.96 * row['error']:.2g}" if np.isfinite(row["error"]) else ""
    return f"{row['value']:.3g}{error}"
