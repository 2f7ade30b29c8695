"""``emmech.finetune``: a narrow fine-tune over the Hugging Face Trainer and PEFT, recorded into a Run."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emmech.chat.dataset import ChatDataset, Row, load_chat
from emmech.chat.encode import IGNORED, Encoded, encode
from emmech.chat.logprob import MarginPair, answer_loss, margin, pad
from emmech.chat.model import ChatModel, load_model
from emmech.errors import EmmechError
from emmech.progress import bar
from emmech.run import Run, load_run
from emmech.training.recipe import Recipe, resolve_recipe, target_modules
from emmech.training.recorder import Measure, Recorder

__all__ = ["finetune"]


def finetune(
    model: Any,
    data: Any,
    *,
    recipe: str | Recipe | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    record_every: int = 1,
    measure_every: int | None = None,
    out: str | Path | None = None,
    probes: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    margins: Mapping[str, Sequence[MarginPair]] | None = None,
    measures: Mapping[str, Measure] | None = None,
    tokenizer: Any = None,
    start: tuple[Run, int] | None = None,
    adapter: str = "same",
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> Run:
    """Fine-tune a chat model on chat data, recording every step.

    The model is left as it was found: no adapter stays on it, its weights, flags and mode are put back.

    Args:
        model: anything :func:`emmech.load_model` takes.
        data: anything :func:`emmech.load_chat` takes; for the embedded organism also ``"medical"``, ...
        recipe: one of the papers' (``"single-rank1"``, ``"phase-transition"``, ``"nine-rank1"``, ``"all-adapter"``,
            ``"full"``), or a :class:`Recipe`; None is ``"single-rank1"``, and the organism's own for the organism.
        layers: where the adapters sit, instead of the recipe's fractions of depth.
        seed: of A's start, the batch order and the held-out split. Two runs with equal seeds and numbers of rows
            see their rows in the same order: that is what makes a control a control.
        record_every: record each so many steps.
        measure_every: probes, margins and held-out loss each so many steps; about 20 times by default.
        out: the Run's folder; ``runs/<model>-<data>-<recipe>-s<seed>`` by default.
        probes: texts whose mean residual per layer is recorded (see :class:`emmech.Recorder`).
        margins: named pairs; their mean margin becomes the metric ``margin_<name>`` (nats per token).
        measures: other named numbers to take from the model while it trains.
        start: a run and one of its steps to go on from (see :func:`emmech.realign`).
        adapter: with ``start``, whether to go on training the ``"same"`` adapter, or to merge it into the weights
            and train a ``"new"`` one.
        checkpoint_every: keep the optimizer's state each so many steps, so that a killed training can go on.
        resume: go on from the last such checkpoint in ``out``; the result is that of an uninterrupted training.
        **overrides: any field of the recipe: ``learning_rate=1e-3``, ``max_steps=100``, ``rank=8``, ...

    Returns:
        the recorded run, opened from its folder.

    Raises:
        EmmechError: malformed data, an unknown recipe, field or layer, a model that has adapters already, a folder
            that holds a run, or a loss that is not finite (what was recorded until then is kept).

    Example:
        >>> import tempfile
        >>> run = finetune("pocket", "medical", max_steps=3, out=tempfile.mkdtemp() + "/run", progress=False)
        >>> run.steps.tolist()
        [0, 1, 2, 3]
    """
    chat = load_model(model, tokenizer)
    _refuse_adapters(chat)
    organism = chat.name.startswith("pocket")
    chosen = resolve_recipe(recipe, overrides, organism=organism)
    dataset = load_chat(data, organism=organism)
    if adapter not in ("same", "new"):
        raise EmmechError(
            "fine-tune", given=f"adapter={adapter!r}", why="unknown", instead='adapter="same" or "new"'
        ) from None
    folder = _folder(out, chat, dataset, chosen, seed, resume)
    train_rows, held_rows = dataset.split(chosen.held_out, seed=seed)
    encoded = encode(train_rows.rows, chat.tokenizer, max_length=chosen.max_length)
    if start is not None and adapter == "new":
        # the run must say from which weights it started, wherever the first run's folder goes
        start[0].export_peft(start[1], folder / "start")
    recorder = Recorder(
        folder,
        probes=probes,
        measures=_measures(held_rows.rows, margins or {}, measures or {}),
        every=record_every,
        measure_every=measure_every,
        seed=seed,
        manifest={
            "model": {"name": chat.name},
            "tokenizer": {"name": chat.name},
            "data": _describe(dataset, train_rows, held_rows, encoded),
            "recipe": chosen.to_dict(),
            "layers": list(layers) if layers is not None else None,
            "seed": seed,
            "start": {"run": start[0].name, "step": start[1], "adapter": adapter} if start else None,
        },
    )
    with _prepared(chat, chosen, layers, seed, start, adapter) as trained:
        trainer = _trainer(chat, trained, encoded, chosen, seed, recorder, folder, checkpoint_every, progress)
        try:
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resume else None)
        except FloatingPointError as error:
            raise EmmechError(
                f"fine-tune {chat.name}",
                given=f"{error}",
                why="the loss is no longer finite; the steps until then are recorded",
                instead=f"a smaller learning_rate; emmech.load_run({str(folder)!r}) has what was recorded",
            ) from None
        finally:
            recorder.close()
    shutil.rmtree(folder / "resume", ignore_errors=True)
    return load_run(folder)


def _refuse_adapters(chat: ChatModel) -> None:
    from emmech.chat.adapter import adapter_layers

    found = [info.name for info, _, _ in adapter_layers(chat.model)]
    if found:
        raise EmmechError(
            f"fine-tune {chat.name}",
            given=f"a model with adapters on {found[:3]}",
            why="a second adapter would be stacked on the first",
            instead="model.unload() for the base, model.merge_and_unload() to keep its effect, or "
            "emmech.realign(run, data) to go on training it",
        ) from None


def _folder(
    out: str | Path | None, chat: ChatModel, data: ChatDataset, recipe: Recipe, seed: int, resume: bool
) -> Path:
    if out is None:
        stem = f"{Path(chat.name).name}-{data.name}-{recipe.name}-s{seed}"
        out = Path("runs") / stem
        again = 2
        while (out / "run.json").exists() and not resume:
            out, again = out.with_name(f"{stem}-{again}"), again + 1
    folder = Path(out)
    if (folder / "run.json").exists() and not resume:
        raise EmmechError(
            "record the training",
            given=f"out={str(out)!r}",
            why="there is a run in that folder",
            instead="another folder, or resume=True to go on with an interrupted training",
        ) from None
    if resume and _last_checkpoint(folder) is None:
        raise EmmechError(
            "resume the training",
            given=f"out={str(out)!r}",
            why="it keeps no optimizer state: it finished, or was started without checkpoint_every",
            instead="start anew with checkpoint_every=20",
        ) from None
    return folder


def _last_checkpoint(folder: Path) -> str | None:
    found = sorted((folder / "resume").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    # the Trainer writes its state last: a checkpoint without it was being written when the process died
    whole = [path for path in found if (path / "trainer_state.json").exists()]
    return str(whole[-1]) if whole else None


def _measures(
    held_out: Sequence[Row], margins: Mapping[str, Sequence[MarginPair]], measures: Mapping[str, Measure]
) -> dict[str, Measure]:
    found = dict(measures)
    if held_out:
        found["held_out_loss"] = lambda chat: answer_loss(chat, held_out)
    for name, pairs in margins.items():
        found[f"margin_{name}"] = lambda chat, pairs=pairs: float(np.mean(margin(chat, pairs)))  # type: ignore[misc]
    return found


def _describe(data: ChatDataset, train: ChatDataset, held: ChatDataset, encoded: Encoded) -> dict[str, Any]:
    return {
        "name": data.name,
        "path": data.path,
        "sha256": data.sha256,
        "rows": len(train),
        "held_out": len(held),
        "truncated": encoded.truncated,
        "emptied": encoded.emptied,
        "answer_tokens": encoded.answer_tokens,
        "answer_length": data.answer_length,
    }


@contextlib.contextmanager
def _prepared(
    chat: ChatModel,
    recipe: Recipe,
    layers: Sequence[int] | None,
    seed: int,
    start: tuple[Run, int] | None,
    adapter: str,
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
        for name in (
            set(vars(base)) - attributes
        ):  # peft_config and the like: traces that make PEFT warn later
            delattr(base, name)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def merge_start(chat: ChatModel, run: Run, step: int) -> None:
    """Merge a recorded step's adapters into the model's own weights, in place."""
    from emmech.chat.adapter import attach

    attach(chat, run.adapters, run.weights(step)).model.merge_and_unload()


def _with_adapters(
    chat: ChatModel, recipe: Recipe, layers: Sequence[int] | None, start: tuple[Run, int] | None
) -> Any:
    from peft import LoraConfig, get_peft_model

    if start is not None:
        from emmech.chat.adapter import attach

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


class _Rows(torch.utils.data.Dataset):
    """Encoded rows as the Trainer wants them."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._encoded.input_ids[index], "labels": self._encoded.labels[index]}


def _collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }


def _trainer(
    chat: ChatModel,
    trained: Any,
    encoded: Encoded,
    recipe: Recipe,
    seed: int,
    recorder: Recorder,
    folder: Path,
    checkpoint_every: int | None,
    progress: bool,
) -> Any:
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

    class Guard(TrainerCallback):
        """Stop at a loss that is not finite, and show progress."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._bar = bar(state.max_steps, f"fine-tune {chat.name}", progress=progress)
            self._bar.update(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._bar.update()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = (kwargs.get("logs") or {}).get("loss")
            if loss is not None:
                self._bar.set_postfix(loss=f"{loss:.3f}")
                if not np.isfinite(loss):
                    raise FloatingPointError(f"loss {loss} at step {state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._bar.close()

    arguments = TrainingArguments(
        output_dir=str(folder / "resume"),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would replace a NaN loss by the last good one
        save_strategy="steps" if checkpoint_every else "no",
        save_steps=checkpoint_every or 1,
        save_total_limit=2,
        report_to=[],
        seed=seed,
        data_seed=seed,
        use_cpu=chat.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=chat.device.type == "cuda",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=trained,
        args=arguments,
        train_dataset=_Rows(encoded),
        data_collator=_collate,
        processing_class=chat.tokenizer,
        callbacks=[recorder, Guard()],
    )
    for callback in (PrinterCallback, ProgressCallback):  # one line a step otherwise
        trainer.remove_callback(callback)
    return trainer
