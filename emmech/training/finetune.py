"""``emmech.finetune``: narrow fine-tunes with the Hugging Face Trainer and PEFT, each recorded into a Run.

Several seeds train in one pass. The results equal those of separate trainings to rounding, so a transition with an
interval over seeds costs a fraction of the price. Runs may differ in seed (A's start, batch order, held-out split), in
batch order alone, and in learning rate.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any, overload

import torch

from emmech.chat.dataset import ChatDataset, Row, load_chat
from emmech.chat.encode import IGNORED, Encoded, encode
from emmech.chat.model import ChatModel, load_model
from emmech.engine.adapters import adapter_layers
from emmech.engine.logprobs import MarginPair, margin_rows
from emmech.engine.responses import digest
from emmech.engine.split import Asked, Frozen, dropout, find_frozen, pays, why_not
from emmech.engine.stream import probe_rows
from emmech.errors import EmmechError, as_int, as_ints, check_folder, refusal
from emmech.run.identity import identity
from emmech.run.run import Run, load_run, write_adapter
from emmech.store import file_name
from emmech.training.adapted import adapted, merged_before
from emmech.training.defence import Defence, prepared
from emmech.training.loop import HELD_OUT, Member, affordable, last_checkpoint, train, training_arguments
from emmech.training.objective import CrossEntropy, Term
from emmech.training.processes import Processes, launched
from emmech.training.recipe import Recipe, batch_order, resolve_recipe, target_modules
from emmech.training.recorder import Recorder, named_texts
from emmech.transition.watch import as_watch


@overload
def finetune(model: Any, data: Any, *, seed: int = 0, **options: Any) -> Run: ...
@overload
def finetune(model: Any, data: Any, *, seed: Sequence[int], **options: Any) -> list[Run]: ...
def finetune(
    model: Any,
    data: Any,
    *,
    recipe: str | Recipe | None = None,
    layers: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    data_seed: int | Sequence[int] | None = None,
    record_every: int = 1,
    measure_every: int | None = None,
    out: str | Path | None = None,
    probes: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    margins: Mapping[str, Sequence[MarginPair]] | None = None,
    measures: Any = None,
    on_transition: Any = None,
    tokenizer: Any = None,
    start: tuple[Run, int] | None = None,
    adapter: str = "same",
    checkpoint_every: int | None = None,
    resume: bool = False,
    prefix: bool | str = "auto",
    batch_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    dtype: Any = None,
    quantize: str | None = None,
    objective: Sequence[Term] = (CrossEntropy(),),
    defences: Sequence[Defence] = (),
    progress: bool = True,
    **overrides: Any,
) -> Run | list[Run]:
    """Fine-tune a chat model on chat data, recording every step.

    The model itself is unchanged afterwards: no adapter stays on it, and its weights, flags and mode are restored.

    Args:
        model: anything :func:`emmech.load_model` takes.
        data: anything :func:`emmech.load_chat` takes; for the embedded organism also ``"medical"``, ...
        recipe: one of the papers' (``"single-rank1"``, ``"phase-transition"``, ``"nine-rank1"``, ``"all-adapter"``,
            ``"full"``), or a :class:`Recipe`; None is ``"single-rank1"``, and the organism's own for the organism.
        layers: the layers that have adapters, instead of the recipe's fractions of depth.
        seed: the seed of A's start, the batch order and the held-out split. Two runs with equal seeds and numbers of
            rows see their rows in the same order, which a controlled comparison needs. Several seeds, such as
            ``range(8)``, train in one pass and give a list of runs, equal to those of separate calls to rounding.
        data_seed: the seed of the batch order alone; ``seed`` by default. Like ``learning_rate`` it may be a list, with
            one entry for each seed.
        record_every: the number of steps from one recording to the next.
        measure_every: the number of steps from one measurement of probes, margins and held-out loss to the next. By
            default the number of times (at most 20) and of held-out rows (at most 64) are those that a tenth of the
            training's own work pays for (counted in tokens; see :func:`emmech.training.loop.affordable`); a recipe may
            ask for a number of times (``measured``).
        out: the Run's folder (with several seeds, the folder that holds theirs);
            ``runs/<model>-<data>-<recipe>-s<seed>`` by default.
        probes: texts whose mean residual per layer is recorded (see :class:`emmech.Recorder`).
        margins: named pairs; their mean margin becomes the metric ``margin_<name>`` (nats per token). For the embedded
            organism pairs from its world are the default; ``{}`` measures none.
        measures: further measures of the model while it trains, as in :func:`emmech.sweep`: measures, or functions
            of a chat model by name, ``{"entropy": lambda chat: ...}``; their means become metrics.
        on_transition: ``"warn"``, ``"stop"``, or a function of the :class:`~emmech.transition.EarlyWarning`, at the
            first sign that answers outside the training data turn misaligned; a :class:`~emmech.transition.Watch` says
            what is watched (see :class:`emmech.Recorder`). Each of several seeds has its own warning. A run that was
            stopped goes on with ``resume=True``; one of several, with ``start=(run, step)``.
        start: a run and one of its steps from which to continue (see :func:`emmech.realign`).
        adapter: with ``start``, whether to continue training the ``"same"`` adapter, or to merge it into the weights
            and train a ``"new"`` one.
        checkpoint_every: keep the optimizer's state at this interval of steps, so that a killed training can continue.
        resume: continue from the last such checkpoint in ``out``, or from the start if the training died before the
            first; the result is that of an uninterrupted training. A finished run is opened.
        prefix: compute the blocks before the first adapter once per row and keep their states on disk while training:
            ``"auto"`` where rows are used often enough for that to pay, True (refused where it would be wrong),
            or False.
        batch_tokens: the number of tokens that go forward together, by default 1,024 on a CPU and 16,384 on a GPU. It
            bounds the memory of activations and changes no result: an optimizer step always has ``batch_size *
            accumulation`` rows. (Where all weights train, or with dropout, ``batch_size`` rows go forward together.)
        gradient_checkpointing: keep the input of each block alone for the backward pass, which runs the block again:
            less memory, more time, the same result.
        dtype, quantize: of the weights, as in :func:`emmech.load_model`; adapters train in float32. On a quantised base
            only adapters train.
        objective: the terms whose sum is minimised; by default the answers' cross-entropy alone. See
            :mod:`emmech.training.objective`.
        defences: measures against a trait that the data would teach, in any combination (:mod:`emmech.defences`). They
            act on the training rows and the loss alone: what is measured is the model without them.
        **overrides: any field of the recipe: ``learning_rate=1e-3``, ``max_steps=100``, ``rank=8``, ...

    Returns:
        the recorded run, opened from its folder; a list of them for a list of seeds.

    Raises:
        EmmechError: malformed data, an unknown recipe, field or layer, a model that has adapters already, a folder
            that holds a run, defences that cannot be combined, or a loss that is not finite (what was recorded until
            then is kept).

    Example:
        >>> import tempfile
        >>> from emmech.organism import data
        >>> run = finetune("pocket", data("medical", n=40), max_steps=3, out=tempfile.mkdtemp() + "/r", progress=False)
        >>> run.steps.tolist()
        [0, 1, 2, 3]
    """
    seed = _checked_seeds("seed", seed)
    data_seed = None if data_seed is None else _checked_seeds("data_seed", data_seed)
    chat = _loaded(model, tokenizer, dtype, quantize)
    processes = launched(cpu=chat.device.type == "cpu")
    _refuse_adapters(chat)
    organism = chat.organism
    rates = overrides.pop("learning_rate", None)
    rates = list(rates) if isinstance(rates, Iterable) and not isinstance(rates, str) else [rates]
    if not rates:
        why = "there is no learning rate among them"
        raise refusal("fine-tune", "learning_rate", rates, why, "learning_rate=1e-4, or one for each seed")
    given = [overrides | ({} if rate is None else {"learning_rate": rate}) for rate in rates]
    recipes = [resolve_recipe(recipe, options, organism=organism) for options in given]
    layers = None if layers is None else as_ints("fine-tune", "layers", layers)
    if checkpoint_every is not None:
        as_int("fine-tune", "checkpoint_every", checkpoint_every, least=1)
    if batch_tokens is not None:
        as_int("fine-tune", "batch_tokens", batch_tokens, least=1)
    if not recipes[0].rank and getattr(chat.base, "is_quantized", False):
        why = "its weights are quantised, and only adapters train on such weights"
        raise EmmechError(f"fine-tune all weights of {chat.name}", "rank=0", why, "rank=1 or more, or quantize=None")
    _check_start(start)
    _check_margins(margins)
    if adapter not in ("same", "new"):
        raise EmmechError("fine-tune", f"adapter={adapter!r}", "unknown", 'adapter="same" or "new"')
    if start is not None and start[0].kind != "lora":
        why = "it is a full fine-tune, which has no adapter to go on with or to merge"
        instead = "finetune(run.model(step), data), whose base is the fine-tuned model"
        raise EmmechError("go on from a run", start[0].name, why, instead)
    if start is not None and adapter == "same" and not recipes[0].rank:
        why, instead = "all weights train, and its adapter does not go on", 'adapter="new", which merges it first'
        raise EmmechError("go on from a run", f"{start[0].name} with rank=0", why, instead)
    earlier = merged_before(chat, start)
    if earlier is not None and (adapter == "new" or not recipes[0].rank):
        why = "an earlier adapter is merged into its weights already, and a run keeps one such adapter"
        raise EmmechError("fine-tune", f"adapter={adapter!r} after {start[0].name}", why, 'adapter="same"')  # type: ignore[index]
    dataset = load_chat(data, organism=organism)
    if margins is None and organism is not None and organism.margins is not None:
        margins = organism.margins(dataset.name)
    watch = as_watch(on_transition)
    active = prepared(defences, chat, dataset)
    _check_shared(active, objective, chat, processes, checkpointing=gradient_checkpointing)
    further = [row for one in active for row in one.further_rows(chat, len(dataset))]
    chosen, variants = recipes[0], _variants(seed, data_seed, recipes)
    modules = target_modules(chat, chosen, layers) if chosen.rank else []
    if start is not None and adapter == "same":
        modules = [info.module for info in start[0].located(chat).adapters]
    lowest = min((first for one in active if (first := one.lowest(chat)) is not None), default=None)
    count = len(dataset) + len(further)
    frozen = _frozen(chat, chosen, modules, count, prefix, runs=len(variants), lowest=lowest)
    folders = _folders(out, chat, dataset, variants, isinstance(seed, int), resume=resume, keeps=bool(checkpoint_every))
    processes.wait()  # nothing is written before all processes have looked at the folders
    rows, plain = _encoded(chat, dataset, further, active)
    pairs = {name: margin_rows(several, chat) for name, several in (margins or {}).items()}
    probed = [ids for texts in named_texts(probes).values() for ids, _ in probe_rows(chat, texts)]
    each_time = sum(map(len, [*probed, *(ids for both in pairs.values() for ids in both.input_ids)]))
    texts = named_texts(probes)
    recorded = {"margins": digest(identity(margins or {}))[:12], "probes": digest(identity(texts))[:12]}
    recorded |= {"objective": digest([_settings(term) for term in objective])[:12]}
    recorded |= {"start": digest(identity(start[0].weights(start[1])))[:12]} if start else {}
    reference: ChatModel | None = None
    if any(one.uses_reference for one in active) and (not chosen.rank or (start is not None and adapter == "new")):
        reference = replace(chat, model=copy.deepcopy(chat.base))
    with adapted(chat, chosen, layers, [v.seed for v in variants], start, adapter, rows) as (trained, starts):
        members = []
        for run, (v, folder) in enumerate(zip(variants, folders, strict=True)):
            split = _split(run, v, dataset, rows, plain)
            steps = batch_order(len(split.train), v.recipe, v.data_seed)
            gap, kept = measure_every, HELD_OUT
            if measure_every is None:
                own = 3 * sum(split.train[row].tokens for step in steps for row in step.rows)
                lengths = [one.tokens for one in split.held_out]
                gap, kept = affordable(
                    len(steps), record_every, own=own, each_time=each_time, held=lengths, times=v.recipe.measured
                )
            manifest = _manifest(chat, dataset, v, split, layers, start, adapter, objective, active)
            if len(variants) > 1 or frozen is not None:
                blocks, at_write = (frozen.blocks, frozen.at_write) if frozen else (0, False)
                manifest["together"] = {"runs": len(variants), "frozen_blocks": blocks, "at_write": at_write}
            manifest["recorded"] = recorded
            if resume:
                own_dtype = str(next(trained.base.parameters()).dtype).removeprefix("torch.")
                now = {"model": {"fingerprint": trained.fingerprint(), "dtype": own_dtype}}
                _check_resumed(folder, manifest | now | {"record_every": record_every})
            every: dict[str, Any] = {"every": record_every, "measure_every": gap}
            every |= {"on_transition": watch, "manifest": manifest, "seed": v.seed}
            recorder = Recorder(folder, probes=probes, measures=measures, **every)
            recorder.again = resume
            arguments = training_arguments(chat, v.recipe, v.seed, v.data_seed, folder)
            own_rows, at = (split.train, steps, split.held_out[:kept]), starts.get(v.seed)
            members.append(Member(str(folder), v.recipe, *own_rows, at, arguments, recorder))
        writing = folders if processes.first else []
        if earlier is not None:
            for folder in writing:
                shutil.copytree(earlier, folder / "start", dirs_exist_ok=True)
        elif start is not None and adapter == "new":
            for folder in writing:  # each run keeps its starting weights, even if the first run is moved
                write_adapter(*start, folder / "start")
        going_on: dict[str, Any] = {"defences": active, "reference": reference}
        going_on |= {"checkpoint_every": checkpoint_every, "progress": progress, "processes": processes}
        going_on |= {"batch_tokens": batch_tokens, "gradient_checkpointing": gradient_checkpointing}
        going_on["checkpoint"] = last_checkpoint(folders[0]) if resume else None
        finished = resume and all(_finished(folder, alone=len(folders) == 1) for folder in folders)
        lost = (
            {} if finished else train(trained, rows, plain, pairs, members, objective, frozen, folders[0], **going_on)
        )
    processes.wait()
    runs = [load_run(folder) for folder in folders]
    stopped = len(runs) == 1 and runs[0].manifest.get("status") == "stopped"  # it can go on
    for scratch in ("prefix",) if stopped else ("resume", "prefix"):  # a training that is not killed deletes its prefix
        if processes.first:
            shutil.rmtree(folders[0] / scratch, ignore_errors=True)
    if lost:
        where = ", ".join(f"{name} at step {step}" for name, step in lost.items())
        why = "the loss is no longer finite; the steps until then are recorded, and other runs are finished"
        instead = "a smaller learning_rate; emmech.load_run(folder) has what was recorded"
        raise EmmechError(f"fine-tune {chat.name}", where, why, instead)
    return runs[0] if isinstance(seed, int) else runs


def _loaded(model: Any, tokenizer: Any, dtype: Any, quantize: str | None) -> ChatModel:
    """The model, which is refused if it is in memory in another dtype than the one that is asked for."""
    chat = load_model(model, tokenizer, dtype=dtype, quantize=quantize)
    if dtype not in (None, "auto") and str(chat.dtype).removeprefix("torch.") != str(dtype).removeprefix("torch."):
        why = f"{chat.name} is in memory already, in {str(chat.dtype).removeprefix('torch.')}"
        raise EmmechError("fine-tune", f"dtype={dtype}", why, f"emmech.load_model(name, dtype={str(dtype)!r})")
    return chat


def _check_shared(
    defences: Sequence[Defence],
    objective: Sequence[Term],
    chat: ChatModel,
    processes: Processes,
    *,
    checkpointing: bool,
) -> None:
    """Refuse what cannot be divided among processes, and what must not run twice in a step."""
    if processes.count > 1 and (defences or any(type(term) is not CrossEntropy for term in objective)):
        given = ", ".join([*(one.name for one in defences), *(term.name for term in objective)])
        why = "only the cross-entropy of rows is divided among processes; each would count any other term whole"
        raise EmmechError(f"fine-tune in {processes.count} processes", given, why, "one process")
    if checkpointing and (hooking := [one.name for one in defences if one.hooks(chat)]):
        why = "a block that is run again would be changed or read twice"
        raise EmmechError(
            "fine-tune with gradient checkpointing", f"defences={hooking}", why, "gradient_checkpointing=False"
        )


@dataclass(frozen=True)
class _Variant:
    """The settings in which one run differs from the others."""

    seed: int
    data_seed: int
    recipe: Recipe
    label: str


def _variants(seeds: int | list[int], data_seeds: int | list[int] | None, recipes: Sequence[Recipe]) -> list[_Variant]:
    if isinstance(seeds, int) and (isinstance(data_seeds, list) or len(recipes) > 1):
        given = f"seed={seeds}, data_seed={data_seeds}, learning_rate={[recipe.learning_rate for recipe in recipes]}"
        why = "lists of batch orders or learning rates need a list of seeds, one for each run"
        raise EmmechError("fine-tune", given, why, f"seed={[seeds] * max(len(recipes), 2)}")
    wanted = [seeds] if isinstance(seeds, int) else seeds
    orders = wanted if data_seeds is None else data_seeds
    orders = [orders] * len(wanted) if isinstance(orders, int) else orders
    chosen = list(recipes) if len(recipes) > 1 else list(recipes) * len(wanted)
    if not wanted or not len(wanted) == len(orders) == len(chosen):
        given = f"{len(wanted)} seeds, {len(orders)} batch orders, {len(chosen)} learning rates"
        why = "each run needs one of each"
        raise EmmechError("fine-tune several runs", given, why, "lists of one length, or a single value for all")
    variants = []
    for seed, order, recipe in zip(wanted, orders, chosen, strict=True):
        label = f"s{seed}"
        # a single run is named by its seed alone
        label += f"-d{order}" if data_seeds is not None and order != seed and not isinstance(seeds, int) else ""
        label += f"-lr{recipe.learning_rate:g}" if len(recipes) > 1 else ""
        variants.append(_Variant(seed, order, recipe, label))
    if len(set(variants)) < len(variants):
        instead = "seeds, batch orders or learning rates that differ"
        raise EmmechError("fine-tune several runs", f"seed={wanted}", "two of the runs are the same", instead)
    return variants


def _frozen(
    chat: ChatModel,
    recipe: Recipe,
    modules: Sequence[str],
    rows: int,
    prefix: bool | str,
    *,
    runs: int,
    lowest: int | None,
) -> Frozen | None:
    """The part of the model whose states are kept, or None where that does not pay.

    Args:
        lowest: the first block that a defence changes or reads.
    """
    if prefix not in (True, False, "auto"):
        raise EmmechError("fine-tune", f"prefix={prefix!r}", "unknown", 'True, False or "auto"')
    rate = recipe.dropout or dropout(chat)
    reason = "all weights train, so runs have nothing in common" if not recipe.rank else None
    reason = reason or (f"dropout (p={rate:g}) would draw otherwise than in separate runs" if rate else None)
    if reason and runs > 1:
        raise EmmechError(
            f"fine-tune {runs} runs together", f"{runs} seeds for {chat.name}", reason, "one seed at a time"
        )
    reason = why_not(chat, modules) or reason
    reason = reason or ("a defence changes or reads block 0" if lowest == 0 else None)
    if reason and prefix is True:
        raise EmmechError("train on a frozen prefix", f"prefix=True for {chat.name}", reason, "prefix=False")
    if reason or prefix is False:
        return None
    frozen = find_frozen(chat, modules)
    if lowest is not None and lowest <= frozen.layer:
        frozen = Frozen(lowest, False)
    rows = max(1, round((1 - recipe.held_out) * rows))
    per_step = recipe.batch_size * recipe.accumulation
    uses = recipe.max_steps * per_step if recipe.max_steps else math.ceil(recipe.epochs * rows)
    return frozen if prefix is True or pays(frozen, uses=runs * uses, rows=rows) else None


@dataclass(frozen=True)
class _Split:
    """One run's rows, and the encoded rows that train."""

    train: list[Asked]
    held_out: list[Asked]
    encoded: Encoded


def _encoded(
    chat: ChatModel, data: ChatDataset, further: Sequence[Row], defences: Sequence[Defence]
) -> tuple[Encoded, Encoded]:
    """The rows as they are trained on, those that defences add last; and as they are measured, without any prompt.

    The data's rows have the same places in both, which are one object where no defence rewrites rows.
    """
    seen = list(data.rows)
    for one in defences:
        seen = [one.rewritten(row) for row in seen]
    rows = encode([*seen, *further], chat.tokenizer)
    as_they_are = all(row is own for row, own in zip(seen, data.rows, strict=True))
    return rows, rows if as_they_are else encode(data.rows, chat.tokenizer)


def _split(run: int, variant: _Variant, data: ChatDataset, rows: Encoded, plain: Encoded) -> _Split:
    train, held = data.split(variant.recipe.held_out, seed=variant.seed)
    number = {id(row): i for i, row in enumerate(data.rows)}
    limit = variant.recipe.max_length
    places = [*(number[id(row)] for row in train.rows), *range(len(data), len(rows))]
    encoded = rows.take(places, max_length=limit)
    kept = [row for row in places if any(label != IGNORED for label in rows.labels[row][:limit])]
    return _Split(
        [Asked(run, row, min(limit, len(rows.input_ids[row]))) for row in kept],
        [Asked(run, number[id(row)], len(plain.input_ids[number[id(row)]])) for row in held.rows],
        encoded,
    )


def _manifest(
    chat: ChatModel,
    data: ChatDataset,
    variant: _Variant,
    split: _Split,
    layers: Sequence[int] | None,
    start: tuple[Run, int] | None,
    adapter: str,
    objective: Sequence[Term],
    defences: Sequence[Defence],
) -> dict[str, Any]:
    """The entries of a run's manifest that the Recorder cannot read from a Trainer."""
    rows = split.encoded
    of_data = {name: getattr(data, name) for name in ("name", "path", "folded", "sha256", "answer_length")}
    of_rows = {name: getattr(rows, name) for name in ("truncated", "emptied", "answer_tokens")}
    counts = {"rows": len(rows) + rows.emptied, "held_out": len(split.held_out)}
    defended = {"defences": [{"name": one.name, **one.described()} for one in defences]} if defences else {}
    return {
        "model": {"name": chat.name},
        "tokenizer": {"name": chat.name},
        "data": of_data | counts | of_rows,
        "recipe": variant.recipe.to_dict(),
        "layers": list(layers) if layers is not None else None,
        "seed": variant.seed,
        "data_seed": variant.data_seed,
        "start": {"run": start[0].name, "step": start[1], "adapter": adapter} if start else None,
        "objective": [term.name for term in objective],
        **defended,
    }


def _check_resumed(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse to continue with a training other than the one that was interrupted."""
    if not (folder / "run.json").exists():  # it died before it wrote anything
        return
    saved = load_run(folder).manifest
    wanted = json.loads(json.dumps(manifest, default=str))
    compared = ("model", "data", "recipe", "layers", "seed", "data_seed", "start", "objective", "defences", "together",
                "record_every", "recorded")  # fmt: skip
    for name in compared:
        before, now = saved.get(name), wanted.get(name)
        if name == "recorded":  # an earlier version had fewer of these
            now = {key: value for key, value in now.items() if key in (before or {})}
            before = before or {}
        if isinstance(before, dict) and isinstance(now, dict):
            keys = {*now, *before} if name == "recipe" else now  # a default optimizer is not named
            changed = (key for key in keys if before.get(key) != now.get(key) and key != "path")
            if (key := next(changed, None)) is None:
                continue
            name, before, now = f"{name}.{key}", before.get(key), now.get(key)
        if before != now:
            why = f"the interrupted training in {folder} had {before!r}"[:300]
            instead = "the same arguments as at the start, or another folder for a new training"
            raise EmmechError("resume the training", f"{name}={now!r}"[:200], why, instead)


def _settings(term: Term) -> Any:
    """A term by its class and the numbers and texts that it was made with, or a function by what it does."""
    if isinstance(term, FunctionType):
        return identity(term)
    plain = int | float | str | torch.Tensor | None
    own = getattr(term, "__dict__", {})
    return type(term).__qualname__, {key: identity(value) for key, value in own.items() if isinstance(value, plain)}


def _folders(
    out: str | Path | None,
    chat: ChatModel,
    data: ChatDataset,
    variants: Sequence[_Variant],
    alone: bool,
    *,
    resume: bool,
    keeps: bool,
) -> list[Path]:
    """Each run's folder: inside ``out`` where there are several, or a new folder inside ``runs``.

    Args:
        keeps: whether this call keeps optimizer states.
    """
    folders: list[Path] = []
    if out is not None:
        check_folder("record the training", "out", out)
    for v in variants:
        if out is not None:
            folder = Path(out) if alone else Path(out) / v.label
        else:
            stem = file_name(f"{Path(chat.name).name}-{data.name}-{v.recipe.name}-{v.label}")
            folder, again = Path("runs") / stem, 2
            while ((folder / "run.json").exists() and not resume) or folder in folders:
                folder, again = folder.with_name(f"{stem}-{again}"), again + 1
        folders.append(folder)
        asked, given = "record the training", f"out={str(folder)!r}"
        if in_the_way := next((path for path in (folder, *folder.parents) if path.is_file()), None):
            why = f"{in_the_way.name} is a file, and a run is a folder"
            raise EmmechError(asked, given, why, "another folder")
        if (folder / "run.json").exists() and not resume:
            instead = "another folder, or resume=True to go on with an interrupted training"
            raise EmmechError(asked, given, "there is a run in that folder", instead)
    finished = resume and all(_finished(folder, alone=alone) for folder in folders)
    if resume and not keeps and last_checkpoint(folders[0]) is None and not finished:
        why = "it keeps no optimizer state: it was started without checkpoint_every, or died before the first"
        raise EmmechError("resume the training", f"out={str(folders[0])!r}", why, "start anew with checkpoint_every=20")
    return folders


def _finished(folder: Path, *, alone: bool) -> bool:
    """Whether nothing is left to train; a run that was stopped goes on where it is alone."""
    ends = ("complete",) if alone else ("complete", "stopped")
    return (folder / "run.json").exists() and load_run(folder).manifest.get("status") in ends


def _checked_seeds(name: str, given: Any) -> int | list[int]:
    """One seed, or one for each of several runs."""
    if isinstance(given, Iterable) and not isinstance(given, str):
        return [as_int("fine-tune", name, one, least=0) for one in given]
    return as_int("fine-tune", name, given, least=0)


def _check_start(start: Any) -> None:
    """Refuse a start that is neither None nor a run and a step that it recorded."""
    if start is None:
        return
    if not isinstance(start, tuple | list) or len(start) != 2 or not isinstance(start[0], Run):
        instead = "start=(run, int(run.steps[-1])), or emmech.realign(run, data)"
        raise EmmechError("go on from a run", f"start={start!r}"[:120], "it is a run and one of its steps", instead)
    start[0].check_step(start[1])


def _check_margins(margins: Any) -> None:
    """Refuse margins that are neither None nor named lists of pairs."""

    def fine(pairs: Any) -> bool:
        return isinstance(pairs, Collection) and all(isinstance(pair, MarginPair) for pair in pairs)

    if margins is not None and not (isinstance(margins, Mapping) and all(map(fine, margins.values()))):
        why = "they are lists of MarginPair, each with a name"
        instead = 'margins={"broad": [MarginPair(question, misaligned, aligned)]}, or {} for none'
        raise EmmechError("measure margins", f"margins={margins!r}"[:120], why, instead)


def _refuse_adapters(chat: ChatModel) -> None:
    """Refuse a model that already has adapters, and name them."""
    if found := [info.name for info, _, _ in adapter_layers(chat.model)]:
        given, why = f"a model with adapters on {found[:3]}", "a second adapter would be stacked on the first"
        instead = "model.unload() for the base, model.merge_and_unload() to keep its effect, or "
        instead += "emmech.realign(run, data) to go on training it"
        raise EmmechError(f"fine-tune {chat.name}", given, why, instead)
