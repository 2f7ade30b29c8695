"""Probe activations in a sweep: the mean residual of one block over texts, under every variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from emmech.chat.model import ChatModel
from emmech.engine.packing import Reading
from emmech.engine.row_adapters import Rows
from emmech.engine.stream import probe_rows
from emmech.engine.variants import Engine
from emmech.errors import EmmechError, check_texts
from emmech.measures.teacher_forced import Value
from emmech.sweeps.forced import plan
from emmech.sweeps.grid import Grid, raw_vector
from emmech.sweeps.parts import Arrays, Outcome

__all__ = ["ProbeActivation"]


@dataclass(frozen=True)
class ProbeActivation:
    """Mean output of block ``layer`` over each text, projected onto a direction.

    The frame has the component along the unit vector of the direction, in the residual stream's units (the
    norm of the mean residual where no direction is given); :attr:`Sweep.arrays` has the mean residuals themselves.

    Args:
        texts: user's words (all tokens count) or conversations (the answers' tokens count).
        layer: whose block output is read; at or above the lowest adapter.
        direction: a :class:`Direction` or a vector ``[d_model]``.
    """

    texts: Sequence[Any]
    layer: int
    direction: Any = None
    name: str = "probe"

    def __post_init__(self) -> None:
        """Refuse what is not a list of texts."""
        check_texts("sweep a probe", "texts", self.texts)

    def job(self, chat: ChatModel, grid: Grid, budget: int, size: int) -> ProbeJob:
        """This measure as part of a sweep."""
        return ProbeJob(self, chat, grid, budget, size)


class ProbeJob:
    """Reads the residuals of one group of variants after another."""

    def __init__(self, measure: ProbeActivation, chat: ChatModel, grid: Grid, budget: int, size: int) -> None:
        chat.check_layer(measure.layer)
        lowest = min({site.layer for site in grid.sites.values()} | ({grid.steering[0]} if grid.steering else set()))
        if measure.layer < lowest:
            raise EmmechError(
                "sweep a probe",
                f"layer={measure.layer}",
                f"nothing that is swept acts below layer {lowest}, so every variant is the same there",
                f"layer={lowest} or higher",
            )
        self.measure, self.chat = measure, chat
        self.unit: np.ndarray | None = None
        if measure.direction is not None:
            vector = raw_vector(chat, measure.direction, measure.layer).astype(np.float64)
            if not vector.any():
                raise EmmechError(
                    "sweep a probe",
                    "a direction of zeros",
                    "it points nowhere",
                    "another direction, or direction=None for the residual's norm",
                )
            self.unit = vector / np.linalg.norm(vector)
        self.kind = f"probe-{measure.name}"
        self.readings = []
        for index, (ids, counted) in enumerate(probe_rows(chat, measure.texts)):
            at = tuple(int(p) for p in np.flatnonzero(counted))
            if not at:
                raise EmmechError("sweep a probe", f"text {index}", "no token of it counts", "an answer, or a string")
            self.readings.append(Reading(tuple(ids), at))
        self.engine = Engine(chat, grid.sites, grid.steered_layer, stop=measure.layer)
        longest = max(len(reading.needed) for reading in self.readings)
        self.plan = plan(chat, grid, self.engine, longest, size, budget)
        self.engine.tokens = self.plan.tokens
        self.packs = self.engine.packs(self.readings)

    def __len__(self) -> int:
        return len(self.readings)

    def request(self) -> object:
        """What identifies this job's work."""
        return self.measure.name, self.measure.layer, self.readings

    def run(self, rows: Rows, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Mean residuals ``[variants, texts, d_model]``."""
        found = np.empty((len(group), len(self.readings), self.chat.d_model), np.float32)
        with torch.no_grad():
            for block in self.engine.run(self.packs, rows, len(group)):
                for index, own in block.readings:
                    read = block.hidden[:, torch.from_numpy(own).to(block.hidden.device)]
                    found[block.variants, index] = read.double().mean(1).float().cpu().numpy()
                update(block.hidden.shape[0] * len(block.readings))
        return {"residuals": found}

    def finish(self, parts: Sequence[Arrays]) -> Outcome:
        """One value per text."""
        residuals = np.concatenate([part["residuals"] for part in parts])
        values = np.linalg.norm(residuals.astype(np.float64), axis=-1) if self.unit is None else residuals @ self.unit
        name = self.measure.name
        return Outcome(
            [Value(name, str(index), values[:, index]) for index in range(values.shape[1])], {name: residuals}
        )
