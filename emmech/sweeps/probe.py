"""Probe activations in a sweep: the mean residual of one block over texts, under every variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from emmech.chat.model import ChatModel
from emmech.engine.packing import Reading
from emmech.engine.row_adapters import Rows
from emmech.engine.stream import probe_rows
from emmech.engine.variants import Engine
from emmech.errors import EmmechError
from emmech.measures.measure import Value
from emmech.measures.probe import ProbeActivation
from emmech.sweeps.forced import plan
from emmech.sweeps.grid import Grid
from emmech.sweeps.parts import Arrays, Outcome

__all__ = ["ProbeJob"]


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
        measure.along(chat, np.zeros(chat.d_model))  # a direction that does not fit is refused at once
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
        values = self.measure.along(self.chat, residuals)
        name = self.measure.name
        return Outcome(
            [Value(name, str(index), values[:, index]) for index in range(values.shape[1])], {name: residuals}
        )
