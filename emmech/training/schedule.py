"""Which rows each optimizer step sees, and at which learning rate: the Hugging Face Trainer's own choices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from emmech.training.recipe import Recipe

__all__ = ["Step", "batch_order", "rate_factor"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: the numbers of its training rows, and the epoch reached after it."""

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


def rate_factor(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """From the number of steps taken to the factor on the learning rate, as the recipe's schedule has it.

    Example:
        >>> [rate_factor(Recipe(warmup_steps=2), 4)(step) for step in range(4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    made = get_scheduler(recipe.schedule, optimizer, num_warmup_steps=recipe.warmup_steps, num_training_steps=steps)
    return made.lr_lambdas[0]  # type: ignore[no-any-return,union-attr]
