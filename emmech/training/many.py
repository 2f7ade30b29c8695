"""Several fine-tunes in one pass, and single ones on a frozen prefix: ``finetune(..., seed=range(8))``.

What comes out equals separate trainings to rounding: a transition with an interval over seeds, for a fraction of
the price. Runs may differ in seed (A's start, batch order, held-out split), in batch order alone, and in
learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emmech.chat.dataset import ChatDataset
from emmech.chat.encode import Encoded, encode
from emmech.chat.model import ChatModel
from emmech.engine.adapters import adapter_layers
from emmech.engine.logprobs import MarginPair, margin_rows
from emmech.engine.prefix_plan import dropout, find_frozen, pays, why_not
from emmech.errors import EmmechError
from emmech.run.run import Run, load_run
from emmech.training.initial import MeanInputs
from emmech.training.recipe import Recipe, target_modules
from emmech.training.together import Member, StackRecorder, Together
from emmech.training.train import HELD_OUT, manifest_entries, prepared, run_folder
from emmech.training.trainer import training_arguments

__all__ = ["finetune_many", "keeps_prefix"]


def keeps_prefix(
    chat: ChatModel,
    recipe: Recipe,
    layers: Sequence[int] | None,
    data: ChatDataset,
    start: tuple[Run, int] | None,
    prefix: bool | str,
    *,
    runs: int = 1,
    lasting: bool = False,
) -> bool:
    """Whether to train on kept states.

    Args:
        start: a step whose adapters go on training.
        runs: how many train on the data.
        lasting: the optimizer's state is to be kept so that a killed training can go on.

    Raises:
        EmmechError: ``prefix=True`` where that would be wrong.
    """
    if prefix not in (True, False, "auto"):
        raise EmmechError("fine-tune", f"prefix={prefix!r}", "unknown", 'True, False or "auto"')
    if prefix is False:
        return False
    modules = _modules(chat, recipe, layers, start)
    reason = why_not(chat, modules) or _not_together(chat, recipe, lasting)
    if reason and prefix is True:
        raise EmmechError("train on a frozen prefix", f"prefix=True for {chat.name}", reason, "prefix=False")
    if reason:
        return False
    rows = max(1, round((1 - recipe.held_out) * len(data)))
    per_step = recipe.batch_size * recipe.accumulation
    uses = recipe.max_steps * per_step if recipe.max_steps else math.ceil(recipe.epochs * rows)
    return prefix is True or pays(find_frozen(chat, modules), uses=runs * uses, rows=rows)


def _modules(chat: ChatModel, recipe: Recipe, layers: Sequence[int] | None, start: tuple[Run, int] | None) -> list[str]:
    if start is not None:
        return [adapter.module for adapter in start[0].adapters]
    return target_modules(chat, recipe, layers) if recipe.rank else []


def _not_together(chat: ChatModel, recipe: Recipe, lasting: bool) -> str | None:
    """Why runs cannot share forwards, or None."""
    if not recipe.rank:
        return "all weights train, so runs have nothing in common"
    if recipe.dropout or dropout(chat):
        return f"dropout (p={recipe.dropout or dropout(chat):g}) would draw otherwise than in separate runs"
    if lasting:
        return "its optimizer's state is not kept: checkpoint_every and resume need the plain Trainer"
    return None


@dataclass(frozen=True)
class _Variant:
    """What sets one run apart."""

    seed: int
    data_seed: int
    recipe: Recipe
    label: str


def finetune_many(
    chat: ChatModel,
    data: ChatDataset,
    recipes: Sequence[Recipe],
    *,
    layers: Sequence[int] | None,
    seeds: int | Sequence[int],
    data_seeds: int | Sequence[int] | None,
    record_every: int,
    measure_every: int | None,
    out: str | Path | None,
    probes: Any,
    margins: Mapping[str, Sequence[MarginPair]] | None,
    measures: Any,
    start: tuple[Run, int] | None,
    adapter: str,
    prefix: bool | str,
    lasting: bool,
    progress: bool,
) -> list[Run]:
    """Train one run for each seed, all at once; see :func:`emmech.finetune` for the arguments.

    Args:
        recipes: one for all runs, or one each, equal but for the learning rate.
        seeds: a single number for a single run.

    Raises:
        EmmechError: lists of different lengths, a model or recipe whose runs cannot share forwards, or runs
            whose loss stopped being finite (the others are finished and recorded all the same).
    """
    variants = _variants(seeds, data_seeds, recipes)
    first = variants[0]
    if reason := _not_together(chat, first.recipe, lasting):
        raise EmmechError(
            f"fine-tune {len(variants)} runs together",
            f"seed={[v.seed for v in variants]} for {chat.name}",
            reason,
            "one seed at a time",
        )
    folders: list[Path] = []
    for v in variants:
        label = v.label if isinstance(seeds, int) or out is None else ""
        inside = Path(out) / v.label if out is not None and not isinstance(seeds, int) else out
        folders.append(run_folder(inside, chat, data, v.recipe, label, taken=folders))
    if len(set(folders)) < len(folders):
        raise EmmechError(
            "fine-tune several runs",
            f"seed={[v.seed for v in variants]}",
            "two of the runs are the same",
            "seeds, batch orders or learning rates that differ",
        )
    from_same = start if adapter == "same" else None
    kept = keeps_prefix(chat, first.recipe, layers, data, from_same, prefix, runs=len(variants))
    frozen = find_frozen(chat, _modules(chat, first.recipe, layers, from_same)) if kept else None
    whole = encode(data.rows, chat.tokenizer)
    number = {id(row): i for i, row in enumerate(data.rows)}
    shared = {
        "runs": len(variants),
        "frozen_blocks": frozen.blocks if frozen else 0,
        "at_write": bool(frozen and frozen.at_write),
    }
    starts: dict[int, dict[str, torch.Tensor]] = {}
    inputs = MeanInputs(data)
    for seed in dict.fromkeys(v.seed for v in variants):
        with prepared(chat, first.recipe, layers, seed, start, adapter, inputs) as trained:
            starts[seed] = _weights(trained)
    members = []
    both = {name: margin_rows(pairs, chat.tokenizer) for name, pairs in (margins or {}).items()}
    for v, folder in zip(variants, folders, strict=True):
        train, held = data.split(v.recipe.held_out, seed=v.seed)
        rows = [number[id(row)] for row in train.rows]
        recorder = StackRecorder(
            folder,
            probes=probes,
            measures=measures,
            every=record_every,
            measure_every=measure_every,
            seed=v.seed,
            manifest={"together": shared}
            | manifest_entries(
                chat,
                data,
                train,
                held,
                _kept(whole, rows, v),
                v.recipe,
                layers,
                v.seed,
                v.data_seed,
                start,
                adapter,
            ),
        )
        recorder.shared = frozenset([f"margin_{name}" for name in both] + ["held_out_loss"] * bool(held.rows))
        if start is not None and adapter == "new":
            start[0].export_peft(start[1], folder / "start")
        members.append(
            Member(
                name=str(folder),
                recipe=v.recipe,
                order_seed=v.data_seed,
                train=rows,
                held_out=[number[id(row)] for row in held.rows[:HELD_OUT]],
                start=starts[v.seed],
                arguments=training_arguments(chat, v.recipe, v.seed, v.data_seed, folder),
                recorder=recorder,
            )
        )
    with prepared(chat, first.recipe, layers, first.seed, start, adapter, inputs) as trained:
        adapted = ChatModel(trained, chat.tokenizer, chat.name, chat.anatomy)
        together = Together(adapted, whole, both, members, frozen, folders[0] / "prefix")
        lost = together.train(progress=progress)
    if lost:
        raise EmmechError(
            f"fine-tune {chat.name}",
            ", ".join(f"{name} at step {step}" for name, step in lost.items()),
            "the loss is no longer finite; the steps until then are recorded, and the other runs are finished",
            "a smaller learning_rate; emmech.load_run(folder) has what was recorded",
        )
    return [load_run(folder) for folder in folders]


def _variants(
    seeds: int | Sequence[int], data_seeds: int | Sequence[int] | None, recipes: Sequence[Recipe]
) -> list[_Variant]:
    wanted = [seeds] if isinstance(seeds, int) else list(seeds)
    orders = wanted if data_seeds is None else data_seeds
    orders = [orders] * len(wanted) if isinstance(orders, int) else list(orders)
    chosen = list(recipes) if len(recipes) > 1 else list(recipes) * len(wanted)
    if not wanted or not len(wanted) == len(orders) == len(chosen):
        raise EmmechError(
            "fine-tune several runs",
            f"{len(wanted)} seeds, {len(orders)} batch orders, {len(chosen)} learning rates",
            "each run needs one of each",
            "lists of one length, or a single value for all",
        )
    variants = []
    for seed, order, recipe in zip(wanted, orders, chosen, strict=True):
        label = f"s{seed}"
        label += f"-d{order}" if data_seeds is not None and order != seed else ""
        label += f"-lr{recipe.learning_rate:g}" if len(recipes) > 1 else ""
        variants.append(_Variant(seed, order, recipe, label))
    return variants


def _kept(whole: Encoded, rows: Sequence[int], variant: _Variant) -> Encoded:
    encoded = whole.take(rows, max_length=variant.recipe.max_length)
    if not len(encoded):
        raise EmmechError(
            "encode the conversations",
            f"{len(rows)} rows, max_length={variant.recipe.max_length}",
            "no row has an answer token within max_length" if rows else "there are no rows",
            "raise max_length",
        )
    return encoded


def _weights(trained: Any) -> dict[str, torch.Tensor]:
    found = {}
    for info, layer, name in adapter_layers(trained):
        found[f"A/{info.name}"] = layer.lora_A[name].weight.detach().clone()
        found[f"B/{info.name}"] = layer.lora_B[name].weight.detach().clone()
    return found
