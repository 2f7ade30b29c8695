"""The grid of variants: runs x steps x scales x coefficients, and their weights stacked for one batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from emmech.chat.families import map_widths
from emmech.chat.model import ChatModel, load_model, load_outline
from emmech.engine.adapters import Site, VariantWeights
from emmech.errors import EmmechError, as_floats, as_ints
from emmech.measures.probe import raw_vector
from emmech.run.run import Run, as_run


@dataclass(frozen=True)
class Variant:
    """One cell of the grid: a run's adapter at a step, scaled, with a steering coefficient."""

    run: str
    step: int
    scale: float
    coefficient: float

    def __str__(self) -> str:
        steering = f", coefficient {self.coefficient:g}" if self.coefficient else ""
        return f"{self.run} at step {self.step}, scale {self.scale:g}{steering}"


@dataclass(frozen=True)
class Grid:
    """All variants of a sweep."""

    runs: Mapping[str, Run]
    variants: tuple[Variant, ...]  # in the order of runs, steps, scales, coefficients
    sites: Mapping[str, Site]  # modules with an adapter in any run, by full path
    steering: tuple[int, Float[np.ndarray, " d_model"]] | None  # layer and raw vector, when coefficients are swept

    def __len__(self) -> int:
        return len(self.variants)

    @property
    def steered_layer(self) -> int | None:
        """The layer whose output is steered, when coefficients are swept."""
        return None if self.steering is None else self.steering[0]

    def distinct(self) -> tuple[list[int], list[int]]:
        """Variants that differ, and for every variant which of those it is.

        Scale 0 is the base model at every step of every run, and step 0 is too while B is zero: one forward
        serves them all.
        """
        untrained = {
            name: all(not w.any() for key, w in run.weights(0).items() if key.startswith("B/"))
            for name, run in self.runs.items()
            if any(v.run == name and v.step == 0 for v in self.variants)
        }
        idle = [v.scale == 0 or (v.step == 0 and untrained[v.run]) for v in self.variants]
        keys = [("base", v.coefficient) if base else v for v, base in zip(self.variants, idle, strict=True)]
        first: dict[object, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        place = {key: rank for rank, key in enumerate(first)}
        return list(first.values()), [place[key] for key in keys]

    def load(self, chosen: Sequence[int], chat: ChatModel) -> VariantWeights:
        """The chosen variants' adapters, stacked; scale and scaling are multiplied into B.

        Raises:
            EmmechError: a write that the model's dtype cannot hold.
        """
        count = len(chosen)
        A, B = {}, {}
        for module, site in self.sites.items():
            d_in, d_out = map_widths(chat.base.get_submodule(module)) or (0, 0)
            # runs of smaller rank are padded with zeros, which write nothing
            A[module] = np.zeros((count, d_in, site.rank), np.float32)
            B[module] = np.zeros((count, site.rank, d_out), np.float32)
        largest = min(torch.finfo(chat.dtype).max, torch.finfo(torch.float32).max)
        read = cache(lambda name, step: self.runs[name].weights(step))
        for row, index in enumerate(chosen):
            variant = self.variants[index]
            weights = read(variant.run, variant.step)
            for info in self.runs[variant.run].adapters:
                b = weights[f"B/{info.name}"].astype(np.float64) * (variant.scale * info.scaling)
                if not (np.abs(b) <= largest).all():  # NaN is refused too
                    given = f"scale={variant.scale:g} at step {variant.step} of {variant.run}"
                    dtype = str(chat.dtype).removeprefix("torch.")
                    why = f"scale * scaling * B overflows {dtype} (largest {largest:.3g})"
                    instead = "scales of 1 to 20, as in the literature"
                    raise EmmechError("sweep the adapter's scale", given, why, instead)
                A[info.module][row, :, : info.rank] = weights[f"A/{info.name}"].T
                B[info.module][row, : info.rank] = b.T
        steering = {}
        if self.steering is not None:
            layer, vector = self.steering
            factors = np.array([self.variants[index].coefficient for index in chosen], np.float32)
            steering[layer] = torch.from_numpy(np.outer(factors, vector)).to(chat.device)
        # float32 on a half-precision base, as in PEFT
        place = chat.device, torch.promote_types(torch.float32, chat.dtype)
        read_in, written = ({name: torch.from_numpy(w).to(*place) for name, w in side.items()} for side in (A, B))
        return VariantWeights(read_in, written, steering)

    def bytes_per_variant(self, chat: ChatModel) -> int:
        """Bytes of one variant's stacked adapters (float32)."""
        widths = {module: chat.base.get_submodule(module).weight.shape for module in self.sites}
        return 4 * sum(site.rank * sum(widths[module]) for module, site in self.sites.items())


def as_runs(asked: str, run: Any) -> list[Run]:
    """One run or several, or their folders, as a list of runs; anything else is refused."""
    runs = list(run) if isinstance(run, Iterable) and not isinstance(run, str) else [run]
    if not runs:
        raise EmmechError(asked, f"run={run!r}", "it is not a run", "at least one")
    return [as_run(asked, one) for one in runs]


def data_name(runs: Sequence[Run]) -> str:
    """The name of the data that the first run was fine-tuned on, ``""`` where it is not known."""
    return str((runs[0].manifest.get("data") or {}).get("name") or "")


def base_model(runs: Sequence[Run], base: Any = None) -> ChatModel:
    """The one base model of all runs, without adapters.

    Raises:
        EmmechError: the runs were trained on different models, or adapters are live on the one given.
    """
    prints = _prints(runs)
    chat = load_model(base) if base is not None else _named(runs).base()
    if any(hasattr(module, "lora_A") for module in chat.base.modules()):
        why = "a sweep puts each variant's own adapter on, and the live one would be added to all"
        instead = "pass the model without adapters (peft_model.unload() gives it)"
        raise EmmechError("sweep over the model", f"{chat.name} with live adapters", why, instead)
    if prints and (found := chat.fingerprint()) != prints[0][2]:
        name, trained_on, wanted = prints[0]
        given = f"base model {chat.name} with fingerprint {found[:12]}"
        why = f"the run was trained on {trained_on} with fingerprint {wanted[:12]}"
        raise EmmechError(f"sweep the run {name}", given, why, "pass base= the very model the run was trained on")
    return chat


def outline(runs: Sequence[Run], base: Any = None) -> ChatModel:
    """The base model of all runs for what runs elsewhere: the one given, or its outline without weights.

    Raises:
        EmmechError: the runs were trained on different models.
    """
    _prints(runs)
    if base is not None:
        return load_outline(base) if isinstance(base, str | Path) else base_model(runs, base)
    return load_outline(_named(runs).base_name())


def recorded_print(runs: Sequence[Run]) -> str:
    """The fingerprint of the base model that the runs were trained on, ``""`` where none says it."""
    return next((found for _, _, found in _prints(runs)), "")


def _named(runs: Sequence[Run]) -> Run:
    return next((run for run in runs if run.manifest.get("model", {}).get("name")), runs[0])


def _prints(runs: Sequence[Run]) -> list[tuple[str, Any, str]]:
    """Name, base model and its fingerprint, of each run that says it; two runs may have the same name."""
    recorded = [(run.name, run.manifest.get("model", {})) for run in runs]
    prints = [(name, entry.get("name"), entry["fingerprint"]) for name, entry in recorded if entry.get("fingerprint")]
    if len({found for _, _, found in prints}) > 1:
        given = ", ".join(f"{run} on {model} ({found[:12]})" for run, model, found in prints)
        why = "they were trained on different base models, and a sweep shares one"
        raise EmmechError("sweep the runs together", given, why, "one sweep for each base model")
    return prints


def make_grid(
    runs: Sequence[Run],
    chat: ChatModel,
    *,
    steps: Iterable[int] | None,
    scales: Iterable[float],
    coefficients: Iterable[float],
    direction: Any = None,
    layer: int | None = None,
    most: int | None = None,
) -> Grid:
    """Check the axes and lay out the grid.

    Args:
        most: how many steps of a run are taken by default; all of them without it.

    Raises:
        EmmechError: steps that were not recorded (the nearest are named), scales that are not numbers, coefficients
            without a direction, runs without adapters, or adapters that do not fit the model.
    """
    named = {name: run.located(chat) for name, run in _names(runs).items()}
    wanted = None if steps is None else as_ints("sweep", "steps", steps)
    scale_list = as_floats("sweep", "scales", scales)
    coefficient_list = as_floats("sweep", "coefficients", coefficients)
    steering = _steering(chat, coefficient_list, direction, layer)
    variants = []
    for name, run in named.items():
        own = spread(run.steps, most).tolist() if wanted is None else wanted
        for step in own:
            run.check_step(step)
        variants += [Variant(name, *cell) for cell in itertools.product(own, scale_list, coefficient_list)]
    if not variants:
        raise EmmechError("sweep", f"steps={steps!r}", "there is no step in it", "steps=run.steps")
    return Grid(named, tuple(variants), _sites(named, chat), steering)


def spread(steps: Int[np.ndarray, " steps"], most: int | None) -> Int[np.ndarray, " chosen"]:
    """At most so many of the steps, evenly, the first and the last among them.

    Example:
        >>> spread(np.arange(251), 6).tolist()
        [0, 50, 100, 150, 200, 250]
    """
    if most is None or len(steps) <= most:
        return steps
    return steps[np.linspace(0, len(steps) - 1, most).round().astype(int)]


def _names(runs: Sequence[Run]) -> dict[str, Run]:
    named: dict[str, Run] = {}
    for run in runs:
        if run.kind != "lora" or not run.adapters:
            why = "a sweep changes adapters, and this run has none"
            instead = "evaluate run.model(step) at its kept steps"
            raise EmmechError(f"sweep the run {run.name}", f"kind={run.kind!r}", why, instead)
        name, again = run.name, 2
        while name in named:
            name, again = f"{run.name}-{again}", again + 1
        named[name] = run
    return named


def _steering(
    chat: ChatModel, coefficients: Sequence[float], direction: Any, layer: int | None
) -> tuple[int, np.ndarray] | None:
    if direction is None:
        if any(coefficients):
            why = "there is no direction to multiply them with"
            instead = "direction=emmech.misalignment_direction(run), layer=..."
            raise EmmechError("sweep steering coefficients", f"coefficients={coefficients}", why, instead)
        return None
    if layer is None:
        known: Sequence[int] = getattr(direction, "layers", ())
        if len(known) != 1:
            why = f"the direction is known at {len(known) or 'unsaid'} layers, and one of them is steered"
            raise EmmechError("sweep steering coefficients", "layer=None", why, f"layer={chat.n_layers // 2}")
        layer = int(known[0])
    return layer, raw_vector(chat, direction, layer)


def _sites(runs: Mapping[str, Run], chat: ChatModel) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    for name, run in runs.items():
        for info in run.adapters:
            inside = f"{chat.family.trunk}.{chat.family.blocks}.{info.layer}."
            if not info.module.startswith(inside):
                given, why = info.module, f"it is in no block of {chat.name}"
                instead = "emmech.evaluate(run, step=...) one step at a time"
                raise EmmechError(f"put the adapters of {name} on the model", given, why, instead)
            before = sites.get(info.module)
            rank = max(info.rank, before.rank if before else 0)
            sites[info.module] = Site(info.layer, info.module.removeprefix(inside), rank)
    return sites
