"""Run interventions with their controls: random directions, the base model, and a positive control.

An intervention's effect is the change beyond what the same intervention does with norm-matched random directions, and
beyond what it does to the base model; coherence is reported with every rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.chat.model import ChatModel
from emmech.directions.arrays import unit_rows
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.interventions.contrasts import combination
from emmech.measures.measure import Items, Measure, measure_all
from emmech.measures.teacher_forced import AlignedLoss, Margin
from emmech.progress import bar

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Condition", "Measured", "degenerate", "measure_conditions", "table", "with_coherence"]

Make = Callable[[ChatModel], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Condition:
    """One intervention to measure.

    Args:
        label: for tables; the random controls of a condition carry its own label.
        kind: ``"untouched"``, ``"direction"``, ``"random"`` or ``"positive"``.
        make: puts it on a model, as a context manager.
        settings: what else identifies it (layer, coefficient); a control shares its condition's label and settings.
    """

    label: str
    kind: str
    make: Make
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a condition and its controls share."""
        return (self.label, *self.settings.values())


@dataclass(frozen=True)
class Measured:
    """The items of a condition on one model, ``"tuned"`` or ``"base"``."""

    condition: Condition
    model: str
    items: Items


def untouched() -> Condition:
    """Nothing is done."""
    return Condition("untouched", "untouched", lambda chat: nullcontext())


def adapter_off() -> Condition:
    """The positive control: without its adapter the model is its base."""
    from emmech.interventions.adapter import scale_adapters

    return Condition("adapter off", "positive", lambda chat: scale_adapters(chat, 0.0))


def measure_conditions(
    chat: ChatModel, conditions: Sequence[Condition], measures: Sequence[Measure], *, base: bool, progress: bool = True
) -> tuple[Measured, ...]:
    """Take the measures of every condition on the model, and (``base``) on the same model without its adapter."""
    # a model without an adapter is called base: there is nothing tuned about it
    models = ["tuned", "base"] if base else ["tuned" if has_adapter(chat) else "base"]
    found = []
    with bar(len(models) * len(conditions), "measuring", progress=progress) as done:
        for model in models:
            for condition in conditions:
                if base and model == "base" and condition.kind == "positive":
                    done.update()
                    continue
                with _model(chat, model if base else "tuned"), condition.make(chat):
                    found.append(Measured(condition, model, measure_all(chat, measures)))
                done.update()
    return tuple(found)


def with_coherence(measures: Sequence[Measure]) -> list[Measure]:
    """The measures, and beside margins the loss of their aligned answers: what breaks a model moves margins too."""
    margins = [one for one in measures if isinstance(one, Margin)]
    if not margins or any(isinstance(one, AlignedLoss) for one in margins):
        return list(measures)
    return [*measures, AlignedLoss([pair for one in margins for pair in one.pairs])]  # type: ignore[misc]


@contextmanager
def _model(chat: ChatModel, model: str) -> Iterator[None]:
    if model == "tuned":
        yield
    else:
        with chat.model.disable_adapter():
            yield


def has_adapter(chat: ChatModel) -> bool:
    """Whether the model's base can be had by taking an adapter off."""
    from emmech.engine.adapters import adapter_layers

    return hasattr(chat.model, "disable_adapter") and bool(list(adapter_layers(chat.model)))


def table(measured: Sequence[Measured]) -> pd.DataFrame:
    """One row per condition, model and outcome.

    Columns: what identifies the condition; ``value`` with ``low``, ``high`` and ``n``; ``change`` against the untouched
    model; ``beyond_random``, the change beyond the mean of its random controls; ``beyond_base``, the change beyond the
    same intervention's on the base; ``gap``, tuned minus base under the same intervention; each of these with
    ``_low`` and ``_high``. NaN where a control was not run.
    """
    import pandas as pd

    plain = {one.model: one.items for one in measured if one.condition.kind == "untouched"}
    other = {(one.condition.key, one.condition.kind): one.items for one in measured if one.model == "base"}
    rows = []
    for one in measured:
        condition, items = one.condition, one.items
        controls = [
            m.items
            for m in measured
            if m.condition.kind == "random" and m.model == one.model and m.condition.key == condition.key
        ]
        for outcome in items.values:
            row: dict[str, Any] = {
                "condition": condition.label,
                "kind": condition.kind,
                **condition.settings,
                "model": one.model,
                "outcome": outcome,
            }
            contrasts: dict[str, tuple[list[tuple[float, Items]], float]] = {"": ([(1.0, items)], 0.0)}
            before = plain.get(one.model)
            if before is not None and condition.kind != "untouched":
                contrasts["change"] = ([(1.0, items), (-1.0, before)], 0.0)
            if controls and condition.kind == "direction":
                means = np.array([np.nanmean(c.values[outcome]) for c in controls])
                share = -1 / len(controls)
                spread = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
                contrasts["beyond_random"] = ([(1.0, items), *((share, c) for c in controls)], spread)
            twin = other.get((condition.key, condition.kind))
            if one.model == "tuned" and twin is not None and condition.kind in ("direction", "untouched"):
                contrasts["gap"] = ([(1.0, items), (-1.0, twin)], 0.0)
                if condition.kind == "direction" and before is not None and "base" in plain:
                    beyond = [(1.0, items), (-1.0, before), (-1.0, twin), (1.0, plain["base"])]
                    contrasts["beyond_base"] = (beyond, 0.0)
            for name, (terms, spread) in contrasts.items():
                estimate = combination(terms, outcome, spread=spread)
                row[name or "value"] = estimate.value
                row[f"{name}_low" if name else "low"] = estimate.low
                row[f"{name}_high" if name else "high"] = estimate.high
                if not name:
                    row["n"] = estimate.n
                    if np.isin(items.values[outcome][np.isfinite(items.values[outcome])], (0.0, 1.0)).all():
                        row["low"], row["high"] = max(row["low"], 0.0), min(row["high"], 1.0)
            rows.append(row)
    return pd.DataFrame(rows)


def degenerate(chat: ChatModel, direction: Direction, vectors: Mapping[int, Any], *, threshold: float = 0.9) -> str:
    """Say when an ablation only takes the adapter off: one of its vectors is the adapter's own B.

    At rank 1 the adapter writes along B alone, and the residual stream carries the write on: projecting B out of the
    output of the adapter's block cancels the adapter identically, whatever it has to do with misalignment, and at a
    later block it cancels what the rest of the model reads. Such a row shows that the adapter matters, nothing else.

    Returns:
        a note that names the layer, or ``""``.
    """
    from emmech.engine.adapters import adapter_layers

    for info, layer, name in adapter_layers(chat.model):
        if info.rank != 1 or info.d_out != chat.d_model:
            continue
        b = unit_rows(layer.lora_B[name].weight.detach().float().cpu().numpy()[:, 0])
        later = {at: abs(float(unit_rows(np.asarray(v)) @ b)) for at, v in vectors.items() if at >= info.layer}
        if not later:
            continue
        at = max(later, key=lambda one: later[one])
        if later[at] > threshold:
            return (
                f"degenerate: {direction.name} has cosine {later[at]:.2f} at layer {at} with B of {info.name}, so "
                f"that ablating it there mostly takes the adapter off"
            )
    return ""


def check_randoms(randoms: int) -> None:
    """Refuse a negative number of control directions."""
    if not isinstance(randoms, int) or randoms < 0:
        raise EmmechError("run the controls", f"randoms={randoms!r}", "it counts random directions", "5 or more")
