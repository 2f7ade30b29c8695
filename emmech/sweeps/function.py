"""A user's own function as a measure: called once per variant, with that variant live on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from emmech.chat.model import ChatModel
from emmech.engine.adapters import attach, detach
from emmech.engine.modules import hooked
from emmech.engine.row_adapters import Rows
from emmech.errors import EmmechError
from emmech.measures.teacher_forced import Value
from emmech.sweeps.grid import Grid
from emmech.sweeps.parts import Arrays, Outcome, as_bytes, from_bytes

__all__ = ["Functions"]


class Functions:
    """Functions of a :class:`ChatModel` that return a number or a dict of numbers.

    Nothing can be shared between variants here, since the function may do anything with the model.
    """

    kind = "function"
    plan = "one variant at a time"

    def __init__(self, chat: ChatModel, grid: Grid, functions: Sequence[Callable[[ChatModel], Any]]) -> None:
        self.chat, self.grid, self.functions = chat, grid, functions

    def __len__(self) -> int:
        return len(self.functions)

    def request(self) -> object:
        """Names only: what a function does cannot be seen."""
        return [_name(function) for function in self.functions]

    def run(self, rows: Rows, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Every function on every variant."""
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
                found: dict[str, float] = {}
                with hooked(*steered):
                    for function in self.functions:
                        found |= _numbers(_name(function), function(live))
                        update(1)
                records.append(found)
            finally:
                detach(live)
                self.chat.base.train(training)  # PEFT leaves it in evaluation mode
        return {"records": as_bytes(records)}

    def finish(self, parts: Sequence[Arrays]) -> Outcome:
        """One value per name that the functions returned."""
        records = [record for part in parts for record in from_bytes(part["records"])]
        names = dict.fromkeys(name for record in records for name in record)
        return Outcome([Value(name, "", np.array([record.get(name, np.nan) for record in records])) for name in names])


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)


def _numbers(name: str, returned: Any) -> dict[str, float]:
    entries = returned if isinstance(returned, Mapping) else {name: returned}
    try:
        return {str(key): float(value) for key, value in entries.items()}
    except (TypeError, ValueError):
        raise EmmechError(
            f"sweep the function {name}",
            f"it returned a {type(returned).__name__}",
            "a measure is a number, or a dict of numbers",
            "return float(...), or {'name': float(...)}",
        )
