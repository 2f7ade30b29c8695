"""``emmech.finetune``: a narrow fine-tune over the Hugging Face Trainer and PEFT, recorded into a Run."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from emmech.chat.dataset import ChatDataset, load_chat
from emmech.chat.encode import Encoded, encode
from emmech.chat.model import ChatModel, load_model
from emmech.engine.logprobs import MarginPair, answer_loss
from emmech.errors import EmmechError, as_int, as_ints
from emmech.measures.choose import as_measures
from emmech.measures.teacher_forced import Margin
from emmech.run.run import Run, load_run
from emmech.training.checks import check_margins, check_start, checked_seeds, refuse_adapters
from emmech.training.initial import MeanInputs
from emmech.training.recipe import Recipe, resolve_recipe, target_modules
from emmech.training.recorder import Recorder
from emmech.training.trainer import build_trainer

__all__ = ["finetune"]

HELD_OUT = 64  # rows at most: their loss is taken some twenty times while the model trains


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
    tokenizer: Any = None,
    start: tuple[Run, int] | None = None,
    adapter: str = "same",
    checkpoint_every: int | None = None,
    resume: bool = False,
    prefix: bool | str = "auto",
    progress: bool = True,
    **overrides: Any,
) -> Run | list[Run]:
    """Fine-tune a chat model on chat data, recording every step.

    The model is left as it was found: no adapter stays on it, its weights, flags and mode are put back.

    Args:
        model: anything :func:`emmech.load_model` takes.
        data: anything :func:`emmech.load_chat` takes; for the embedded organism also ``"medical"``, ...
        recipe: one of the papers' (``"single-rank1"``, ``"phase-transition"``, ``"nine-rank1"``, ``"all-adapter"``,
            ``"full"``), or a :class:`Recipe`; None is ``"single-rank1"``, and the organism's own for the organism.
        layers: where the adapters sit, instead of the recipe's fractions of depth.
        seed: of A's start, the batch order and the held-out split. Two runs with equal seeds and numbers of rows
            see their rows in the same order: that is what makes a control a control. Several seeds, such as
            ``range(8)``, train in one pass and give a list of runs, equal to those of separate calls to rounding.
        data_seed: of the batch order alone; ``seed`` by default. Like ``learning_rate`` it may be a list, one for
            each seed.
        record_every: record each so many steps.
        measure_every: probes, margins and held-out loss each so many steps; about 20 times by default.
        out: the Run's folder (with several seeds, the folder that holds theirs);
            ``runs/<model>-<data>-<recipe>-s<seed>`` by default.
        probes: texts whose mean residual per layer is recorded (see :class:`emmech.Recorder`).
        margins: named pairs; their mean margin becomes the metric ``margin_<name>`` (nats per token). For the embedded
            organism pairs of its world are the default; ``{}`` measures none.
        measures: what else to take of the model while it trains, as :func:`emmech.sweep` has it: measures, or functions
            of a chat model by name, ``{"entropy": lambda chat: ...}``; their means become metrics.
        start: a run and one of its steps to go on from (see :func:`emmech.realign`).
        adapter: with ``start``, whether to go on training the ``"same"`` adapter, or to merge it into the weights
            and train a ``"new"`` one.
        checkpoint_every: keep the optimizer's state each so many steps, so that a killed training can go on.
        resume: go on from the last such checkpoint in ``out``; the result is that of an uninterrupted training.
        prefix: compute what lies below the lowest adapter once per row and keep it on disk while training:
            ``"auto"`` where rows are used often enough for that to pay, True (refused where it would be wrong),
            or False.
        **overrides: any field of the recipe: ``learning_rate=1e-3``, ``max_steps=100``, ``rank=8``, ...

    Returns:
        the recorded run, opened from its folder; a list of them for a list of seeds.

    Raises:
        EmmechError: malformed data, an unknown recipe, field or layer, a model that has adapters already, a folder
            that holds a run, or a loss that is not finite (what was recorded until then is kept).

    Example:
        >>> import tempfile
        >>> from emmech.organism import data
        >>> run = finetune("pocket", data("medical", n=40), max_steps=3, out=tempfile.mkdtemp() + "/r", progress=False)
        >>> run.steps.tolist()
        [0, 1, 2, 3]
    """
    from emmech.training.many import finetune_many, keeps_prefix

    seed = checked_seeds("seed", seed)
    data_seed = None if data_seed is None else checked_seeds("data_seed", data_seed)
    chat = load_model(model, tokenizer)
    refuse_adapters(chat)
    organism = chat.organism
    rates = overrides.pop("learning_rate", None)
    rates = list(rates) if isinstance(rates, Iterable) and not isinstance(rates, str) else [rates]
    given = [overrides | ({} if rate is None else {"learning_rate": rate}) for rate in rates]
    recipes = [resolve_recipe(recipe, options, organism=organism) for options in given]
    layers = None if layers is None else as_ints("fine-tune", "layers", layers)
    if checkpoint_every is not None:
        as_int("fine-tune", "checkpoint_every", checkpoint_every, least=1)
    check_start(start)
    check_margins(margins)
    chosen = recipes[0]
    dataset = load_chat(data, organism=organism)
    if adapter not in ("same", "new"):
        raise EmmechError("fine-tune", f"adapter={adapter!r}", "unknown", 'adapter="same" or "new"')
    lasting = resume or checkpoint_every is not None
    from_same = start if adapter == "same" else None
    alone = isinstance(seed, int)
    if margins is None and organism is not None and organism.margins is not None:
        margins = organism.margins(dataset.name)
    if not alone or keeps_prefix(chat, chosen, layers, dataset, from_same, prefix, lasting=lasting):
        runs = finetune_many(
            chat,
            dataset,
            recipes,
            layers=layers,
            seeds=seed,
            data_seeds=data_seed,
            record_every=record_every,
            measure_every=measure_every,
            out=out,
            probes=probes,
            margins=margins,
            measures=measures,
            start=start,
            adapter=adapter,
            prefix=prefix,
            lasting=lasting,
            progress=progress,
        )
        return runs[0] if alone else runs
    assert isinstance(seed, int)
    data_seed = seed if data_seed is None else data_seed
    if not isinstance(data_seed, int) or len(rates) > 1:
        raise EmmechError(
            "fine-tune",
            f"seed={seed}, data_seed={data_seed}, learning_rate={rates if len(rates) > 1 else rates[0]}",
            "lists of batch orders or learning rates need a list of seeds, one for each run",
            f"seed={[seed] * max(len(rates), 2)}",
        )
    folder = run_folder(out, chat, dataset, chosen, f"s{seed}", resume=resume)
    train_rows, held_rows = dataset.split(chosen.held_out, seed=seed)
    encoded = encode(train_rows.rows, chat.tokenizer, max_length=chosen.max_length)
    if start is not None and adapter == "new":
        # the run must say from which weights it started, wherever the first run's folder goes
        start[0].export_peft(start[1], folder / "start")
    recorder = Recorder(
        folder,
        probes=probes,
        measures=_named_measures(chat, held_rows, margins or {}, measures or {}),
        every=record_every,
        measure_every=measure_every,
        seed=seed,
        manifest=manifest_entries(
            chat, dataset, train_rows, held_rows, encoded, chosen, layers, seed, data_seed, start, adapter
        ),
    )
    with prepared(chat, chosen, layers, seed, start, adapter, MeanInputs(dataset)) as trained:
        trainer = build_trainer(
            chat, trained, encoded, chosen, seed, data_seed, recorder, folder, checkpoint_every, progress
        )
        try:
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resume else None)
        except FloatingPointError as error:
            raise EmmechError(
                f"fine-tune {chat.name}",
                f"{error}",
                "the loss is no longer finite; the steps until then are recorded",
                f"a smaller learning_rate; emmech.load_run({str(folder)!r}) has what was recorded",
            )
        finally:
            recorder.close()
    shutil.rmtree(folder / "resume", ignore_errors=True)
    return load_run(folder)


def manifest_entries(
    chat: ChatModel,
    data: ChatDataset,
    train: ChatDataset,
    held: ChatDataset,
    encoded: Encoded,
    recipe: Recipe,
    layers: Sequence[int] | None,
    seed: int,
    data_seed: int,
    start: tuple[Run, int] | None,
    adapter: str,
) -> dict[str, Any]:
    """What only the caller of the Recorder knows."""
    return {
        "model": {"name": chat.name},
        "tokenizer": {"name": chat.name},
        "data": {
            "name": data.name,
            "path": data.path,
            "sha256": data.sha256,
            "rows": len(train),
            "held_out": len(held),
            "truncated": encoded.truncated,
            "emptied": encoded.emptied,
            "answer_tokens": encoded.answer_tokens,
            "answer_length": data.answer_length,
        },
        "recipe": recipe.to_dict(),
        "layers": list(layers) if layers is not None else None,
        "seed": seed,
        "data_seed": data_seed,
        "start": {"run": start[0].name, "step": start[1], "adapter": adapter} if start else None,
    }


def run_folder(
    out: str | Path | None,
    chat: ChatModel,
    data: ChatDataset,
    recipe: Recipe,
    label: str,
    *,
    resume: bool = False,
    taken: Sequence[Path] = (),
) -> Path:
    """Where a run goes: ``out``, or a name under ``runs`` that is not taken; ``label`` sets it apart."""
    if out is None:
        stem = f"{Path(chat.name).name}-{data.name}-{recipe.name}-{label}"
        out = Path("runs") / stem
        again = 2
        while ((out / "run.json").exists() and not resume) or out in taken:
            out, again = out.with_name(f"{stem}-{again}"), again + 1
    folder = Path(out)
    if in_the_way := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise EmmechError(
            "record the training",
            f"out={str(out)!r}",
            f"{in_the_way.name} is a file, and a run is a folder",
            "another folder",
        )
    if (folder / "run.json").exists() and not resume:
        raise EmmechError(
            "record the training",
            f"out={str(out)!r}",
            "there is a run in that folder",
            "another folder, or resume=True to go on with an interrupted training",
        )
    if resume and _last_checkpoint(folder) is None:
        raise EmmechError(
            "resume the training",
            f"out={str(out)!r}",
            "it keeps no optimizer state: it finished, or was started without checkpoint_every",
            "start anew with checkpoint_every=20",
        )
    return folder


def _last_checkpoint(folder: Path) -> str | None:
    found = sorted((folder / "resume").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    # the Trainer writes its state last: a checkpoint without it was being written when the process died
    whole = [path for path in found if (path / "trainer_state.json").exists()]
    return str(whole[-1]) if whole else None


def _named_measures(
    chat: ChatModel,
    held_out: ChatDataset,
    margins: Mapping[str, Sequence[MarginPair]],
    measures: Any,
) -> Any:
    """What is taken from the model while it trains; texts are tokenised once."""
    given = (
        measures if isinstance(measures, Mapping) or not measures else {one.name: one for one in as_measures(measures)}
    )
    found: dict[str, Any] = dict(given)
    if len(held_out):
        rows = encode(held_out.rows[:HELD_OUT], chat.tokenizer)
        found["held_out_loss"] = lambda chat: answer_loss(chat, rows)
    found |= {f"margin_{name}": Margin(pairs, f"margin_{name}") for name, pairs in margins.items()}
    return found


@contextlib.contextmanager
def prepared(
    chat: ChatModel,
    recipe: Recipe,
    layers: Sequence[int] | None,
    seed: int,
    start: tuple[Run, int] | None,
    adapter: str,
    inputs: MeanInputs,
) -> Iterator[Any]:
    """The model ready to train; afterwards the model and the random generators are as they were."""
    base = chat.base
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    mode, use_cache, attributes = base.training, base.config.use_cache, set(vars(base))
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (set_seed sets it)
    trained: Any = None
    saved: dict[str, torch.Tensor] = {}
    try:
        torch.manual_seed(seed)
        if not recipe.rank or (start is not None and adapter == "new"):
            saved = {name: value.detach().cpu().clone() for name, value in base.state_dict().items()}
        if start is not None and adapter == "new":
            merge_start(chat, *start)
            start = None
        if recipe.rank:
            trained = _with_adapters(chat, recipe, layers, start)
            if recipe.init == "inputs" and start is None:
                inputs.add_to(ChatModel(trained, chat.tokenizer, chat.name, chat.anatomy))
        else:
            trained = base
            for parameter in base.parameters():
                parameter.requires_grad_(True)
        yield trained
    finally:
        if hasattr(trained, "unload"):
            trained.unload()
        if saved:
            base.load_state_dict(saved)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        base.train(mode)
        base.config.use_cache = use_cache
        for name in set(vars(base)) - attributes:  # peft_config and the like: traces that make PEFT warn later
            delattr(base, name)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def merge_start(chat: ChatModel, run: Run, step: int) -> None:
    """Merge a recorded step's adapters into the model's own weights, in place."""
    from emmech.engine.adapters import attach

    attach(chat, run.adapters, run.weights(step)).model.merge_and_unload()


def _with_adapters(chat: ChatModel, recipe: Recipe, layers: Sequence[int] | None, start: tuple[Run, int] | None) -> Any:
    from peft import LoraConfig, get_peft_model

    if start is not None:
        from emmech.engine.adapters import attach

        run, step = start
        peft_model = attach(chat, run.adapters, run.weights(step)).model
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return peft_model
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=target_modules(chat, recipe, layers),
        lora_dropout=recipe.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(chat.model, config)
