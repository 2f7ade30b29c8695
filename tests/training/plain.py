"""A training as anyone would write it with the Trainer and PEFT: the reference for what the library's loop computes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.logprobs import pad
from emmech.training.recipe import Recipe, target_modules


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


@dataclass(frozen=True)
class Plain:
    """What came out: A and B by module after every step, the logs of every step, and all trained weights at the end."""

    A: dict[str, np.ndarray]
    B: dict[str, np.ndarray]
    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def plain_training(
    chat: ChatModel,
    encoded: Encoded,
    recipe: Recipe,
    seed: int,
    layers: Sequence[int] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Plain:
    """Train ``chat`` on the rows; adapters are taken off afterwards, full fine-tuning stays on it."""
    steps: list[dict[str, np.ndarray]] = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            steps.append({n: p.detach().numpy().copy() for n, p in model.named_parameters() if ".lora_" in n})

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.on_train_begin(args, state, control, model=model)

    torch.manual_seed(seed)
    model = chat.model
    if recipe.rank:
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            use_rslora=recipe.rslora,
            target_modules=target_modules(chat, recipe, layers),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(chat.model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
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
            save_strategy="no",
            report_to=[],
            seed=seed,
            data_seed=seed,
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Rows(encoded),
            data_collator=collate,
            processing_class=chat.tokenizer,
            callbacks=[Keep(), *callbacks],
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    sides: dict[str, dict[str, np.ndarray]] = {"A": {}, "B": {}}
    for name in steps[0]:
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        sides[rest[0]][module] = np.stack([step[name] for step in steps])
    if recipe.rank:
        model.unload()
    return Plain(sides["A"], sides["B"], logs, weights)
