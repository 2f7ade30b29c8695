"""Directions side by side: cosine matrices over runs and layers, and a direction against training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from emmech.directions.direction import Direction, checked_direction, checked_directions, unit_rows
from emmech.directions.sources import contrast_direction
from emmech.errors import EmmechError, as_int, as_ints, refusal
from emmech.results import Card, Result
from emmech.run.run import as_run, model_live
from emmech.view.plots import by_step, cosine_matrix, cosines_by_layer
from emmech.view.sketch import curves

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Cosines(Result):
    """Cosines between directions at every layer.

    Args:
        names: of the directions.
        values: ``[directions, directions, layers]``; NaN where one is unknown.
        floor: 1/sqrt(d_model), the standard deviation of the cosine of random vectors.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "directions directions layers"]
    floor: float

    def at(self, layer: int) -> pd.DataFrame:
        """The matrix at one layer.

        Raises:
            EmmechError: no such layer.
        """
        import pandas as pd

        asked, count = "compare directions at a layer", self.values.shape[-1]
        if not 0 <= as_int(asked, "layer", layer) < count:
            raise refusal(asked, "layer", layer, f"they have {count} layers", f"layer={count - 1} or lower")
        return pd.DataFrame(self.values[:, :, int(layer)], index=list(self.names), columns=list(self.names))

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, one column per layer."""
        import pandas as pd

        index = pd.MultiIndex.from_tuples(combinations(self.names, 2), names=["first", "second"])
        pairs = np.triu_indices(len(self.names), k=1)
        return pd.DataFrame(self.values[pairs], index=index).rename_axis(columns="layer")

    def plot(self, layer: int | None = None) -> Any:
        """The matrix at a layer; without one, every pair's cosine over the layers."""
        return cosines_by_layer(self.to_frame(), self.floor) if layer is None else cosine_matrix(self.at(layer), layer)

    def _card(self) -> Card:
        pairs, floor = self.to_frame(), f"random vectors have 0 ± {self.floor:.2f}"
        spans = {pair: (float(row.min()), float(row.max())) for pair, row in pairs.iterrows() if row.notna().any()}
        facts = [(f"{a} and {b}", f"{low:.2f} to {high:.2f} over layers") for (a, b), (low, high) in spans.items()]
        if not spans:
            return Card(f"No two of {len(self.names)} directions are known at the same layer")
        (first, second), (low, high) = max(spans.items(), key=lambda item: max(map(abs, item[1])))
        near = f"{first} and {second} are the most alike" if len(spans) > 1 else f"{first} and {second} are compared"
        headline = f"{near}: their cosine is {low:.2f} to {high:.2f} over layers, where {floor}"
        caveat = (
            "two directions of the same kind of answers share their words and length too: a cosine is not yet a cause"
        )
        return Card(headline, tuple(facts[:8]), caveat, f"cosines.plot(layer={self.values.shape[-1] // 2})")

    def _sketch(self) -> str:
        lines = [(f"{a}, {b}", row.index, row) for (a, b), row in self.to_frame().head(6).iterrows()]
        return curves(lines, "Cosine by layer", axis="layer", level=0.0)


def cosines(directions: Mapping[str, Direction]) -> Cosines:
    """Cosines between every two directions, layer by layer.

    Raises:
        EmmechError: fewer than two, or of different models.

    Example:
        >>> a, b = Direction(np.eye(2, 3)), Direction(np.ones((2, 3)))
        >>> cosines({"a": a, "b": b}).at(0).loc["a", "b"].round(2).item()
        0.58
    """
    directions = checked_directions("compare directions", "directions", directions)
    for one in directions.values():
        one.warn_where_noise()
    if len(directions) < 2:
        raise EmmechError("compare directions", f"{len(directions)} of them", "it takes at least two")
    several = list(directions.values())
    values = np.array([[a.cosine(b) for b in several] for a in several])
    return Cosines(tuple(directions), values, float(several[0].d_model ** -0.5))


@dataclass(frozen=True, eq=False, repr=False)
class DirectionBySteps(Result):
    """A direction against training steps, which shows when it appears.

    Args:
        frame: indexed by step. ``cosine B/<adapter>``: of B with the direction at the adapter's layer;
            ``projection B/<adapter>``: scaling * B along the unit direction, in residual units;
            ``shift <probe>``: how far the probe's mean residual has moved along it since step 0, at ``layer``;
            ``cosine re-extracted`` and ``norm re-extracted``: of the direction re-extracted from the same texts at that
            step, with the final one.
        layer: where shifts and re-extraction are read.
        floor: 1/sqrt(d_model).
    """

    frame: pd.DataFrame
    layer: int
    floor: float
    name: str

    def plot(self) -> Any:
        """Cosines above, projections and shifts in residual units below."""
        return by_step(self.frame, self.floor, f"{self.name} against training steps (layer {self.layer})")

    def _card(self) -> Card:
        facts = []
        for column in self.frame:
            known = self.frame[column].dropna()
            if len(known):
                at, ends = known.abs().idxmax(), known.index[[0, -1]]
                said = f"{known.iloc[0]:.2f} at step {ends[0]}, {known.iloc[-1]:.2f} at step {ends[1]}"
                facts.append((str(column), said + (f"; largest at step {at}, {known[at]:.2f}" * (at not in ends))))
        headline = f"{self.name} against {len(self.frame)} steps"
        headline += f": {facts[0][0]} is {facts[0][1]}" if facts else " was not measurable"
        caveat = f"cosines of random vectors are 0 ± {self.floor:.3f}; shifts are read at layer {self.layer}"
        return Card(headline, tuple(facts), caveat, "by_steps.plot()")

    def _sketch(self) -> str:
        known = [str(column) for column in self.frame if self.frame[column].notna().sum() > 1]
        kind = min((column.split(" ")[0] for column in known), default="")  # cosines, where there are any
        mine = [column for column in known if column.startswith(kind)][:4]
        named = [column.removeprefix(f"{kind} ") if len(mine) > 1 else "" for column in mine]
        lines = [(name, self.frame.index, self.frame[column]) for name, column in zip(named, mine, strict=True)]
        return curves(lines, kind.capitalize() if len(mine) > 1 else mine[0].capitalize() if mine else "", level=0.0)

    def _table(self) -> pd.DataFrame:
        return self.frame.iloc[:: max(1, len(self.frame) // 20)]


def direction_by_steps(
    run: Any,
    direction: Direction,
    *,
    layer: int | None = None,
    texts: tuple[Any, Any] | None = None,
    steps: Sequence[int] | None = None,
    base: Any = None,
    batch_size: int = 8,
    progress: bool = True,
) -> DirectionBySteps:
    """Project every recorded step on a direction: B, the probes, and (with ``texts``) the re-extracted direction.

    Without ``texts`` no model is loaded.

    Args:
        layer: where the probes are read; by default where the direction's extraction found it strongest.
        texts: misaligned and aligned conversations, from which the direction is extracted again at ``steps``.
        steps: for the re-extraction; by default eight of the recorded ones.
        base: as in :meth:`Run.model`.

    Raises:
        EmmechError: the run has neither rank-1 adapters nor probes, or shapes differ; a direction of another base
            model; or ``steps`` without ``texts``.
    """
    import pandas as pd

    asked = "follow the direction over training"
    checked_direction(asked, direction)
    run = as_run(asked, run)
    made = (run.manifest.get("model") or {}).get("fingerprint")
    if made and direction.fingerprints and made not in direction.fingerprints:
        given = f"{run.name} of a model with fingerprint {made[:12]}; the direction is of "
        given += ", ".join(known[:12] for known in direction.fingerprints)
        why = "a direction has no meaning in the residual stream of another base model"
        raise EmmechError(asked, given, why, "a direction extracted from the run's own model")
    if texts is not None and not (isinstance(texts, tuple | list) and len(texts) == 2):
        raise refusal(asked, "texts", texts, "they are two lists", "texts=(misaligned, aligned)")
    if steps is not None:
        steps = as_ints(asked, "steps", steps)
        if texts is None:
            why = "they are those at which the direction is extracted again, and there is nothing to extract it from"
            raise refusal(asked, "steps", steps, why, "texts=(misaligned, aligned)")
    if layer is None:
        layer = int(direction.source.get("layer", np.argmax(direction.norms)))
    elif not 0 <= as_int(asked, "layer", layer) < direction.n_layers:
        why = f"the direction has {direction.n_layers} layers"
        raise refusal(asked, "layer", layer, why, f"layer={direction.n_layers - 1} or lower")
    direction.warn_where_noise([layer])
    unit = unit_rows(direction.vectors)
    columns: dict[str, pd.Series] = {}
    for adapter in run.adapters:
        if adapter.rank != 1 or adapter.d_out != direction.d_model or not 0 <= adapter.layer < direction.n_layers:
            continue
        b = run.B(adapter.name).astype(np.float64)
        along = b @ unit[adapter.layer]
        norms = np.linalg.norm(b, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            columns[f"cosine B/{adapter.name}"] = pd.Series(along / norms, index=run.steps)
        columns[f"projection B/{adapter.name}"] = pd.Series(adapter.scaling * along, index=run.steps)
    for name in run.probes:
        means = run.probes[name]
        if means.shape[1:] == direction.vectors.shape:
            shift = (means[:, layer] - means[0, layer]).astype(np.float64) @ unit[layer]
            columns[f"shift {name}"] = pd.Series(shift, index=run.probes.steps)
    if texts is not None:
        if steps is None:
            steps = run.steps[np.unique(np.linspace(0, len(run.steps) - 1, 8).round().astype(int))].tolist()
        found = []
        with model_live(run, int(steps[0]), 1.0, base) as live:  # a base that is given is left as it was
            for step in steps:
                chat = run.model(step, base=live)  # after the first, only the adapter's weights change
                found.append(contrast_direction(chat, *texts, splits=1, batch_size=batch_size, progress=progress))
        again = [one.cosine(direction)[layer] for one in found]
        columns["cosine re-extracted"] = pd.Series(again, index=list(steps))
        columns["norm re-extracted"] = pd.Series([one.norms[layer] for one in found], index=list(steps))
    if not columns:
        given = f"{run.name} with adapters {[a.name for a in run.adapters]} and probes {list(run.probes)}"
        instead = "texts=(misaligned, aligned), to extract it again at each step"
        raise EmmechError(asked, given, "nothing recorded is in the residual stream at rank 1", instead)
    frame = pd.DataFrame(columns).sort_index().rename_axis("step")
    return DirectionBySteps(frame, layer, float(direction.d_model**-0.5), direction.name)
