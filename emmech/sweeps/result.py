"""The Sweep: one grid of numbers, with where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emmech.errors import EmmechError, closest

__all__ = ["Sweep"]

AXES = ("run", "step", "scale", "coefficient")


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Checkpoints x scales x coefficients, measured.

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

        Items are the clusters (questions, pairs), so the error is between items.
        """
        chosen = self.frame if measure is None else self._of(measure)

        def summary(part: pd.DataFrame) -> pd.Series:
            values, weights = part["value"].to_numpy(float), part["weight"].to_numpy(float)
            known = np.isfinite(values) & (weights > 0)
            if not known.any():
                return pd.Series({"value": np.nan, "error": np.nan, "items": 0, "samples": 0})
            values, weights = values[known], weights[known] / weights[known].sum()
            mean = float(weights @ values)
            count = len(values)
            spread = float(np.sqrt((weights**2 @ (values - mean) ** 2) * count / max(count - 1, 1)))
            return pd.Series(
                {
                    "value": mean,
                    "error": spread if count > 1 else np.nan,
                    "items": count,
                    "samples": int(part["weight"].sum()),
                }
            )

        columns = [*AXES, "measure"]
        return (
            chosen.groupby(columns, sort=False)[["value", "weight"]]
            .apply(summary)
            .reset_index()
            .astype({"items": int, "samples": int})
        )

    def table(self, measure: str | None = None, *, columns: str = "scale") -> pd.DataFrame:
        """Mean over items, steps by scales (or by ``"coefficient"`` or ``"run"``).

        Raises:
            EmmechError: the measure was not swept, or another axis varies that the table would mix.
        """
        name = self._one(measure)
        summary = self.to_frame(name)
        rest = [axis for axis in AXES if axis not in ("step", columns) and summary[axis].nunique() > 1]
        if columns not in AXES or rest:
            raise EmmechError(
                f"lay {name} out as a table",
                f"columns={columns!r}",
                f"{', '.join(rest) or columns} varies too, and a mean over it would mix variants"
                if rest
                else f"it is not one of {', '.join(AXES)}",
                f"columns={rest[0]!r}, or filter sweep.frame" if rest else closest(columns, AXES),
            )
        return summary.pivot(index="step", columns=columns, values="value")

    def _of(self, measure: str) -> pd.DataFrame:
        if measure not in self.measures:
            raise EmmechError(
                f"read the measure {measure!r}", repr(measure), "it was not swept", closest(measure, self.measures)
            )
        return self.frame[self.frame["measure"] == measure]

    def _one(self, measure: str | None) -> str:
        if measure is not None:
            self._of(measure)
            return measure
        if len(self.measures) == 1:
            return self.measures[0]
        for first in ("em", "margin_broad"):
            if first in self.measures:
                return first
        return self.measures[0]

    def plot(self, measure: str | None = None) -> Any:
        """The phase diagram: a heat map of steps by scales, one panel per run and coefficient.

        Lines by scale are drawn where only one step or one scale was swept.
        """
        from emmech.sweeps.plots import phase_diagram

        return phase_diagram(self, self._one(measure))

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.parquet``, ``sweep.json`` and, where there are any, responses and arrays."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_parquet(folder / "sweep.parquet", index=False)
        (folder / "sweep.json").write_text(json.dumps(dict(self.meta), indent=1, default=str), encoding="utf-8")
        if self.responses is not None:
            self.responses.to_parquet(folder / "responses.parquet", index=False)
        if self.arrays:
            from safetensors.numpy import save_file

            save_file(dict(self.arrays), folder / "arrays.safetensors")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """Read what :meth:`save` wrote.

        Raises:
            EmmechError: there is no sweep in the folder.
        """
        folder = Path(folder)
        if not (folder / "sweep.parquet").is_file():
            raise EmmechError("open the sweep", folder, "there is no sweep.parquet in it", "Sweep.save(folder)")
        arrays: Mapping[str, np.ndarray] = {}
        if (folder / "arrays.safetensors").exists():
            from safetensors.numpy import load_file

            arrays = load_file(folder / "arrays.safetensors")
        answers = folder / "responses.parquet"
        return cls(
            pd.read_parquet(folder / "sweep.parquet"),
            json.loads((folder / "sweep.json").read_text(encoding="utf-8")),
            arrays,
            pd.read_parquet(answers) if answers.exists() else None,
        )

    def __repr__(self) -> str:
        axes = self.variants
        shape = " x ".join(f"{axes[axis].nunique()} {axis}{'s' if axes[axis].nunique() > 1 else ''}" for axis in AXES)
        return f"Sweep({shape}: {', '.join(self.measures)})"

    def _repr_html_(self) -> str:
        try:
            table = self.table().to_html(float_format="%.3g")
        except EmmechError:
            table = self.to_frame().head(20).to_html(float_format="%.3g", index=False)
        return f"<p><b>{self!r}</b></p>{table}"
