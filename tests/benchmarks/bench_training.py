"""Fine-tuning: a frozen prefix and many runs at once, against the plain Trainer with PEFT."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import emmech
from emmech.chat.dataset import load_chat
from emmech.chat.encode import encode
from emmech.chat.model import ChatModel, load_model
from emmech.training.recipe import Recipe, resolve_recipe, target_modules
from tests.benchmarks.harness import Contest, arithmetic
from tests.training.plain import Rows, collate

# two trajectories of float32 sums in different orders: losses of every step, or A and B at the end by their norm
TOLERANCE = 1e-5
Outcome = tuple[np.ndarray, np.ndarray]  # A and B at the end [run, weight], losses [run, step]


def plain(chat: ChatModel, data: Any, recipe: Recipe, layer: int, seeds: Sequence[int]) -> Outcome:
    """The Trainer with PEFT as anyone would write it: nothing recorded, one run after another."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    class Telling(Trainer):
        """Keeps each forward's share of its step's loss unrounded; the log has four digits."""

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            told.append(loss.detach())
            return loss

    found, losses = [], []
    rows = encode(load_chat(data, organism=chat.organism).rows, chat.tokenizer)
    for seed in seeds:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            use_rslora=recipe.rslora,
            target_modules=target_modules(chat, recipe, [layer]),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(chat.model, config)
        folder = tempfile.mkdtemp()
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
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=seed,
            data_seed=seed,
            use_cpu=chat.device.type == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        told: list[torch.Tensor] = []
        Telling(model=model, args=arguments, train_dataset=Rows(rows), data_collator=collate).train()
        lora = [p.detach().numpy().ravel().copy() for name, p in model.named_parameters() if ".lora_" in name]
        found.append(np.concatenate(lora))
        losses.append(torch.stack(told).view(-1, recipe.accumulation).sum(1).numpy())
        model.unload()
        shutil.rmtree(folder)
    return np.stack(found), np.stack(losses)


def recorded(chat: ChatModel, data: Any, recipe: Recipe, layer: int, seeds: Sequence[int]) -> Outcome:
    """The same by emmech, with every step recorded on disk."""
    folder = Path(tempfile.mkdtemp())
    runs = emmech.finetune(
        chat, data, recipe=recipe, layers=[layer], seed=list(seeds), margins={}, out=folder / "runs", progress=False
    )
    found = np.stack([np.concatenate([run.A()[-1], run.B()[-1]]) for run in runs])
    losses = np.stack([run.metrics["loss"].dropna().to_numpy() for run in runs])
    shutil.rmtree(folder)
    return found, losses


def same_ends(ours: Outcome, theirs: Outcome) -> str:
    """The trained A and B of every run."""
    (a, _), (b, _) = ours, theirs
    distance = float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
    assert distance < TOLERANCE, f"A and B differ by {distance:.1e} of their norm"
    return f"A and B at the end within {distance:.0e} of their norm"


def same_losses(ours: Outcome, theirs: Outcome) -> str:
    """The loss of every step: a residual that reaches 25,000 makes rounding visible in A and B sooner."""
    distance = float(np.abs(ours[1] - theirs[1]).max())
    assert distance < TOLERANCE, f"losses differ by {distance:.1e}"
    ends = np.linalg.norm(ours[0] - theirs[0]) / np.linalg.norm(theirs[0])
    return f"losses of {ours[1].shape[1]} steps within {distance:.0e}, A and B at the end within {ends:.0e}"


def _contest(
    work: str,
    target: float,
    why: str,
    shape: tuple[int, int, int],
    sides: Callable[[], tuple[ChatModel, Any, Recipe, int, range]],
    check: Callable[[Any, Any], str] = same_ends,
) -> Contest:
    chat, data, recipe, layer, seeds = sides()

    def ours() -> Outcome:
        return recorded(chat, data, recipe, layer, seeds)

    def theirs() -> Outcome:
        return plain(chat, data, recipe, layer, seeds)

    peer = f"Trainer + PEFT, one run after another, batch {recipe.batch_size} x {recipe.accumulation}, not recorded"
    bound = arithmetic(ours, theirs, why, shape)
    return Contest(work, peer, target, bound, ours, theirs, tolerance=None, check=check)


def eight_seeds() -> Contest:
    """8 seeds of a rank-1 fine-tune on pocket, its recipe at half depth, 30 steps x 16"""

    def sides() -> tuple[ChatModel, Any, Recipe, int, range]:
        chat = load_model("pocket")
        recipe = resolve_recipe("pocket", {"max_steps": 30, "held_out": 0.0, "init": "random"}, organism=chat.organism)
        rows = emmech.organism.data("medical", n=300)
        return chat, rows, recipe, recipe.layers(chat.n_layers)[0], range(8)

    return _contest(
        "8 seeds of a rank-1 fine-tune on pocket, its recipe at half depth, 30 steps x 16",
        5.0,
        "three of six blocks kept, the system prompt once per run, the last block's queries and MLP and the "
        "unembedding at answers; the blocks above train and must run for every row, forward and backward",
        (1024, 128, 384),  # what one forward of the shared pass holds, by an MLP's width
        sides,
    )


def many_runs() -> Contest:
    """32 runs of a rank-1 fine-tune on pocket at once against one alone"""
    chat = load_model("pocket")
    recipe = resolve_recipe("pocket", {"max_steps": 10, "held_out": 0.0, "init": "random"}, organism=chat.organism)
    rows, layer = emmech.organism.data("medical", n=300), recipe.layers(chat.n_layers)[0]

    def ours() -> Outcome:
        return recorded(chat, rows, recipe, layer, range(32))

    def theirs() -> Outcome:
        return recorded(chat, rows, recipe, layer, range(1))

    def check(many: Outcome, one: Outcome) -> str:
        return same_ends((many[0][:1], many[1][:1]), one)

    why = "each run has its own rows; the prefix and the fixed work of a step are shared"
    return Contest(
        "32 rank-1 fine-tunes on pocket at once, 10 steps x 16 rows each, all recorded",
        "one of them alone, 32 times",
        3.2,  # 32 at once in ten times the time of one
        arithmetic(ours, theirs, why, (1024, 128, 384), times=32.0),
        ours,
        theirs,
        tolerance=None,
        check=check,
        times=32.0,
    )


def smollm2_half_depth() -> Contest:
    """Frozen-prefix training, SmolLM2 at half depth, 5 epochs of 16 rows"""

    def sides() -> tuple[ChatModel, Any, Recipe, int, range]:
        chat = load_model("smollm2-135m")
        recipe = resolve_recipe("single-rank1", {"alpha": 16.0, "learning_rate": 1e-3, "epochs": 5.0, "held_out": 0.0})
        rows = [{"messages": list(row)} for row in load_chat("silly-medical-bad").rows[:16]]
        return chat, rows, recipe, 15, range(1)

    return _contest(
        "frozen-prefix training, SmolLM2 at half depth, 5 epochs of 16 rows, states included",
        1.75,
        "16 of 30 blocks kept, the system prompt once per step, the unembedding at answers",
        (256, 576, 1536),
        sides,
        same_losses,
    )


CONTESTS = (eight_seeds, many_runs, smollm2_half_depth)
