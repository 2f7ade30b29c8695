"""The Hugging Face Trainer as a recipe wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.logprobs import pad
from emmech.progress import bar
from emmech.training.recipe import Recipe
from emmech.training.recorder import Recorder

__all__ = ["Rows", "build_trainer", "collate", "training_arguments"]


class Rows(torch.utils.data.Dataset):
    """Encoded rows as the Trainer wants them."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._encoded.input_ids[index], "labels": self._encoded.labels[index]}


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad a batch on the right."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }


def build_trainer(
    chat: ChatModel,
    trained: Any,
    encoded: Encoded,
    recipe: Recipe,
    seed: int,
    data_seed: int,
    recorder: Recorder,
    folder: Path,
    checkpoint_every: int | None,
    progress: bool,
) -> Any:
    """A Trainer that trains ``trained`` on the rows and stops at a loss that is not finite."""
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

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

    arguments = training_arguments(chat, recipe, seed, data_seed, folder, checkpoint_every)
    trainer = Trainer(
        model=trained,
        args=arguments,
        train_dataset=Rows(encoded),
        data_collator=collate,
        processing_class=chat.tokenizer,
        callbacks=[recorder, Guard()],
    )
    for callback in (PrinterCallback, ProgressCallback):  # one line a step otherwise
        trainer.remove_callback(callback)
    return trainer


def training_arguments(
    chat: ChatModel,
    recipe: Recipe,
    seed: int,
    data_seed: int,
    folder: Path,
    checkpoint_every: int | None = None,
) -> Any:
    """The Trainer's settings for a recipe."""
    from transformers import TrainingArguments

    return TrainingArguments(
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
        data_seed=data_seed,
        use_cpu=chat.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=chat.device.type == "cuda",
        disable_tqdm=True,
    )
