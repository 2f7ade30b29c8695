"""Any other measure in a sweep: taken once per variant, with that variant live on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from emmech.chat.model import ChatModel
from emmech.engine.adapters import attach, detach
from emmech.engine.modules import hooked
from emmech.engine.row_adapters import Rows
from emmech.measures.measure import Measure, Value, measure_all
from emmech.sweeps.grid import Grid
from emmech.sweeps.parts import Arrays, Outcome, as_bytes, from_bytes

__all__ = ["Functions"]


class Functions:
    """Measures that are no more than functions of a :class:`ChatModel`.

    Nothing can be shared between variants here, since such a measure may do anything with the model.
    """

    kind = "function"
    plan = "one variant at a time"

    def __init__(self, chat: ChatModel, grid: Grid, measures: Sequence[Measure]) -> None:
        self.chat, self.grid, self.measures = chat, grid, measures

    def __len__(self) -> int:
        return len(self.measures)

    def request(self) -> object:
        """Names only: what a function does cannot be seen."""
        return [one.name for one in self.measures]

    def run(self, rows: Rows, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Every measure on every variant."""
        records = []
        training = self.chat.base.training
        for index in group:
            variant = self.grid.variants[index]
            run = self.grid.runs[variant.run]
            live = attach(self.chat, run.adapters, run.weights(variant.step), scale=variant.scale)
            steered: list[tuple[Any, Any]] = []
            if self.grid.steering is not None and variant.coefficient:
                layer, vector = self.grid.steering
                push = torch.from_numpy(variant.coefficient * vector)
                steered = [(live.block(layer), lambda _m, _i, out, push=push: self.chat.family.steered(out, push))]
            try:
                with hooked(*steered):
                    items = measure_all(live, self.measures)
                update(len(self.measures))
                records.append(
                    [
                        (name, question, value)
                        for name, values in items.values.items()
                        for question, value in zip(items.questions, values.tolist(), strict=True)
                        if not np.isnan(value)
                    ]
                )
            finally:
                detach(live)
                self.chat.base.train(training)  # PEFT leaves it in evaluation mode
        return {"records": as_bytes(records)}

    def finish(self, parts: Sequence[Arrays]) -> Outcome:
        """One value per outcome and question: the mean over its items."""
        records = [record for part in parts for record in from_bytes(part["records"])]
        found: dict[tuple[str, str], list[list[float]]] = {}
        for variant, record in enumerate(records):
            for name, question, value in record:
                cells = found.setdefault((name, question), [[] for _ in records])
                cells[variant].append(value)
        return Outcome(
            [
                Value(
                    name,
                    question,
                    np.array([np.mean(own) if own else np.nan for own in cells]),
                    np.array([len(own) for own in cells]),
                )
                for (name, question), cells in found.items()
            ]
        )
