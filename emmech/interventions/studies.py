"""Whole studies in one call, each with its controls: dose against response, the ablation table, the transfer matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emmech.chat.masks import tokens_name
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction, checked_direction, checked_directions
from emmech.engine.adapters import detach
from emmech.errors import EmmechError, as_floats, as_ints
from emmech.interventions.ablate import ablate
from emmech.interventions.adapter import scale_adapters
from emmech.interventions.controls import (
    Condition,
    adapter_off,
    check_randoms,
    degenerate,
    has_adapter,
    measure_conditions,
    table,
    untouched,
    with_coherence,
)
from emmech.interventions.handle import chat_of
from emmech.interventions.steer import steer
from emmech.measures.choose import as_measures
from emmech.results import Card, Result
from emmech.run.run import Run, opened
from emmech.view.studies import study

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Study", "ablation_table", "adapter_shares", "dose_response", "transfer_matrix"]


@dataclass(frozen=True, eq=False, repr=False)
class Study(Result):
    """The measured conditions of a study, one row each (:func:`emmech.interventions.controls.table` has the columns).

    Args:
        title: what was studied.
        frame: the rows.
        notes: degenerate controls and other things that a reader must know.
    """

    title: str
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()

    def summary(self, outcome: str | None = None) -> pd.DataFrame:
        """The rows of interventions (no random controls), with values and their change beyond the controls."""
        frame = self.frame[self.frame["kind"] != "random"]
        frame = frame if outcome is None else frame[frame["outcome"] == outcome]
        identity = [
            c for c in frame.columns if c in ("condition", "organism", "layer", "coefficient", "model", "outcome")
        ]
        shown = [c for c in _SHOWN if c in frame.columns and frame[c].notna().any()]
        return frame[[*identity, *shown]].reset_index(drop=True)

    def plot(self, outcome: str | None = None) -> Any:
        """The outcome with intervals: lines over the coefficient, a matrix of organisms, or bars; a plotly figure."""
        outcome = outcome or str(self.frame["outcome"].iloc[0])
        return study(self.frame[self.frame["outcome"] == outcome], outcome, self.title)

    def _card(self) -> Card:
        return Card(self.title, self.summary().to_string(float_format="%.3g"), "\n".join(self.notes))

    def _comments(self) -> Sequence[str]:
        return (self.title, *self.notes)


_SHOWN = ("value", "low", "high", "n", "change", "beyond_random", "beyond_random_low", "beyond_random_high",
          "beyond_base", "beyond_base_low", "beyond_base_high", "gap", "gap_low", "gap_high")  # fmt: skip


def dose_response(
    model: Any,
    direction: Direction,
    coefficients: Sequence[float],
    *,
    layers: Iterable[int] | int | None = None,
    measure: Any = "auto",
    randoms: int = 5,
    base: bool | None = None,
    positions: Any = "all",
    units: Literal["raw", "residual"] = "raw",
    positive: Direction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Steer at every coefficient and layer, beside norm-matched random directions and the base model.

    Where the model has an adapter, the table has the untouched model beside the steered base: what the fine-tune does.

    Args:
        coefficients: as :func:`emmech.steer` takes them; 0 is always measured, as "untouched".
        layers: one or several; the layers that the direction knows by default.
        measure: what :func:`emmech.sweep` takes; by default answers where a judge is at hand, margins elsewhere.
            Margins come with the loss of their aligned answers.
        randoms: random directions per coefficient and layer.
        base: also steer the model with its adapter off; by default when it has one.
        positive: a positive control: a direction that is known to move the outcome, a
            :func:`emmech.directions.trained_direction` say, steered at the same coefficients wherever it is known.

    Raises:
        EmmechError: as :func:`emmech.steer`.
    """
    chat, run, with_base = _prepare(model, measure, randoms, base)
    checked_direction("steer with the direction", direction)
    if positive is not None:
        checked_direction("steer with the positive control", positive, name="positive")
    coefficients = as_floats("steer with the direction", "coefficients", coefficients)
    chosen = list(direction.layers) if layers is None else _as_list(layers)
    controls = direction.random(randoms, seed=seed)
    conditions = [untouched()]
    for layer in chosen:
        for coefficient in coefficients:
            settings = {"layer": layer, "coefficient": float(coefficient)}
            steered = [("direction", direction), *(("random", control) for control in controls)]
            if positive is not None and layer in positive.layers:
                steered.append(("positive", positive))
            for kind, one in steered:
                make = partial(
                    steer, direction=one, coefficient=coefficient, layer=layer, positions=positions, units=units
                )
                label = one.name if kind == "positive" else direction.name
                conditions.append(Condition(label, kind, make, settings))
    measured = measure_conditions(chat, conditions, run, base=with_base, progress=progress)
    title = f"Steering {chat.name} with {direction.name} ({units} units, positions {_named(positions)})"
    return Study(title, table(measured), _few_controls(randoms))


def ablation_table(
    model: Any,
    direction: Direction,
    *,
    others: Mapping[str, Direction] | None = None,
    layers: Any = "all",
    from_layer: int | None = None,
    measure: Any = "auto",
    randoms: int = 5,
    base: bool | None = None,
    positions: Any = "all",
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Ablate a direction in every way, beside random directions, the base model and the adapter taken off.

    The rows: each layer's own direction; one direction at all layers (``from_layer``); towards the aligned mean, if the
    direction keeps one; and the ``others``, directions of other organisms (transfer). Random controls are ablated in
    the way of the first row. Convergent Linear Representations of EM (arXiv 2506.11618) has the published table.

    Args:
        others: directions by name.
        layers: where to ablate.
        from_layer: the layer of the single direction; by default the one its extraction found strongest, or the only
            one of ``layers``.
        measure, randoms, base: as in :func:`dose_response`.

    Raises:
        EmmechError: as :func:`emmech.ablate`.
    """
    chat, run, with_base = _prepare(model, measure, randoms, base)
    checked_direction("ablate the direction", direction)
    others = checked_directions("ablate other directions", "others", others or {})
    only = _as_list(layers) if layers != "all" else []
    if from_layer is None:
        best = direction.source.get("layer", int(np.argmax(direction.norms)))
        from_layer = only[0] if len(only) == 1 else int(best)
    conditions = [untouched(), *([adapter_off()] if with_base else [])]
    ways: list[tuple[str, Direction, dict[str, Any]]] = [("own direction by layer", direction, {})]
    if only != [from_layer]:  # at one layer its own direction is the one direction
        ways.append((f"one direction (layer {from_layer})", direction, {"from_layer": from_layer}))
    if direction.aligned_mean is not None:
        ways.append(("own, towards aligned mean", direction, {"towards": "aligned"}))
    ways += [(f"transfer: {name}", other, {}) for name, other in others.items()]
    controls = direction.random(randoms, seed=seed)
    notes = list(_few_controls(randoms))
    for label, one, how in ways:
        added, note = _ablated(chat, label, one, controls, layers=layers, positions=positions, **how)
        conditions += added
        notes += [f"{label} is {note}"] if note else []
    measured = measure_conditions(chat, conditions, run, base=with_base, progress=progress)
    return Study(f"Ablation on {chat.name}: {direction.name}", table(measured), tuple(notes))


def transfer_matrix(
    organisms: Mapping[str, Any],
    directions: Mapping[str, Direction],
    *,
    layers: Any = "all",
    from_layer: int | None = None,
    towards: Any = None,
    positions: Any = "all",
    measure: Any = "auto",
    randoms: int = 5,
    base_model: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Ablate every direction in every organism: does what one fine-tune learned carry another's misalignment?

    Args:
        organisms: Runs (their last step) or chat models by name.
        directions: by name; the same names as the organisms make the diagonal their own.
        layers, from_layer, towards, positions: as :func:`emmech.ablate`.
        base_model: the base model in memory, shared by runs whose adapters sit on the same modules.

    Raises:
        EmmechError: nothing to cross, or as :func:`emmech.ablate`.
    """
    import pandas as pd

    check_randoms(randoms)
    directions = checked_directions("make a transfer matrix", "directions", directions)
    if not isinstance(organisms, Mapping):
        raise EmmechError(
            "make a transfer matrix",
            f"organisms={organisms!r}"[:120],
            "it is not a mapping from names to runs or chat models",
            'organisms={"medical": run}',
        )
    if not organisms or not directions:
        raise EmmechError(
            "make a transfer matrix",
            f"{len(organisms)} organisms, {len(directions)} directions",
            "it crosses at least one with at least one",
        )
    frames, notes = [], list(_few_controls(randoms))
    shared: ChatModel | None = None
    for organism, source in organisms.items():
        source = opened(source)
        if isinstance(source, Run):
            ready = detach(shared) if shared is not None else base_model
            chat = shared = source.model(base=ready)
        else:
            chat = chat_of(source)
        run = with_coherence(as_measures(measure, chat))
        conditions = [untouched(), *([adapter_off()] if has_adapter(chat) else [])]
        for name, direction in directions.items():
            controls = direction.random(randoms, seed=seed)
            how = dict(layers=layers, from_layer=from_layer, towards=towards, positions=positions)
            added, note = _ablated(chat, name, direction, controls, **how)
            conditions += added
            notes += [f"{name} in {organism} is {note}"] if note else []
        frame = table(measure_conditions(chat, conditions, run, base=has_adapter(chat), progress=progress))
        frame.insert(0, "organism", organism)
        frames.append(frame)
    return Study("Ablation of every direction in every organism", pd.concat(frames, ignore_index=True), tuple(notes))


def adapter_shares(model: Any, *, measure: Any = "auto", progress: bool = True) -> Study:
    """Each adapter's share in the behaviour: every one taken off, every one left alone, none and all.

    With one adapter this is the model against its base. Shares need not add up: adapters act through each other.

    Args:
        measure: as in :func:`dose_response`. Margins are narrow and broad; answers are when both kinds are asked for,
            ``Sampled(("first-plot", "narrow-medical"))`` in pocket.

    Raises:
        EmmechError: no adapter is live.
    """
    from emmech.engine.adapters import adapter_layers

    chat, run, _ = _prepare(model, measure, 5, True)
    names = [info.name for info, _, _ in adapter_layers(chat.model)]
    conditions = [untouched(), adapter_off()]
    for name in names if len(names) > 1 else ():
        for label, factors in (("without", {name: 0.0}), ("only", {other: 0.0 for other in names if other != name})):
            make = partial(scale_adapters, scale=factors)
            conditions.append(Condition(f"{label} {name}", "direction", make))
    measured = measure_conditions(chat, conditions, run, base=False, progress=progress)
    return Study(f"Shares of the {len(names)} adapters of {chat.name}", table(measured))


def _prepare(model: Any, measure: Any, randoms: int, base: bool | None) -> tuple[ChatModel, Any, bool]:
    check_randoms(randoms)
    chat = chat_of(model)
    with_base = has_adapter(chat) if base is None else base
    if with_base and not has_adapter(chat):
        raise EmmechError(
            "measure the base model beside the fine-tuned one", chat.name, "it has no adapter to take off", "base=False"
        )
    return chat, with_coherence(as_measures(measure, chat)), with_base


def _ablated(
    chat: ChatModel, label: str, direction: Direction, controls: Sequence[Direction], *, layers: Any, **how: Any
) -> tuple[list[Condition], str]:
    """An ablation and its random controls, ablated in the same way; and why it is degenerate, where it is."""
    kinds = [("direction", direction), *(("random", control) for control in controls)]
    conditions = [Condition(label, kind, partial(ablate, direction=one, layers=layers, **how)) for kind, one in kinds]
    single = how.get("from_layer")
    touched = range(chat.n_layers) if layers == "all" else _as_list(layers)
    own = {layer: direction.vectors[layer if single is None else single] for layer in touched}
    return conditions, degenerate(chat, direction, own)


def _few_controls(randoms: int) -> tuple[str, ...]:
    return (f"only {randoms} random directions: five at least are needed to judge by",) if randoms < 5 else ()


def _named(positions: Any) -> str:
    return "given by a mask" if hasattr(positions, "ndim") else tokens_name(positions)


def _as_list(layers: Any) -> list[int]:
    return as_ints("name the layers", "layers", layers)
