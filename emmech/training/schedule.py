"""Which rows each optimizer step sees, and at which learning rate: the Hugging Face Trainer's own choices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emmech.training.recipe import Recipe

__all__ = ["Step", "batch_order", "learning_rates"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: the numbers of its training rows, and the epoch reached behind it."""

    rows: tuple[int, ...]
    epoch: float


def batch_order(rows: int, recipe: Recipe, order_seed: int) -> list[Step]:
    """The rows of every optimizer step, exactly as the Trainer draws them from its ``data_seed``.

    Args:
        rows: how many training rows there are.

    Example:
        >>> steps = batch_order(5, Recipe(batch_size=2, accumulation=2, epochs=1.0), 0)
        >>> [(len(step.rows), round(step.epoch, 2)) for step in steps]
        [(4, 0.67), (1, 1.0)]
    """
    import torch
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=order_seed)
    batches = math.ceil(rows / recipe.batch_size)
    per_epoch = math.ceil(batches / recipe.accumulation)
    total = recipe.max_steps or math.ceil(recipe.epochs * per_epoch)
    size = recipe.batch_size * recipe.accumulation
    steps: list[Step] = []
    for epoch in range(math.ceil(total / per_epoch)):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        for at in range(per_epoch):
            done = min((at + 1) * recipe.accumulation, batches)
            steps.append(Step(tuple(drawn[at * size : (at + 1) * size]), epoch + done / batches))
    return steps[:total]


def learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """The schedule's learning rate at every optimizer step.

    Example:
        >>> learning_rates(Recipe(learning_rate=0.4, warmup_steps=2), 4)
        [0.0, 0.2, 0.4, 0.2]
    """
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = get_scheduler(recipe.schedule, optimizer, num_warmup_steps=recipe.warmup_steps, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()  # torch warns when a schedule moves before its optimizer
        schedule.step()
    return rates
