"""The model ready to train: PEFT's adapters put on once for all runs, and everything put back afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from emmech.chat.encode import Encoded
from emmech.chat.model import ChatModel
from emmech.engine.adapters import adapter_layers, attach, put_on
from emmech.run.run import Run
from emmech.training.initial import mean_inputs
from emmech.training.recipe import Recipe, target_modules

__all__ = ["adapted"]

Starts = dict[int, dict[str, torch.Tensor]]


@contextlib.contextmanager
def adapted(
    chat: ChatModel,
    recipe: Recipe,
    layers: Sequence[int] | None,
    seeds: Sequence[int],
    start: tuple[Run, int] | None,
    adapter: str,
    rows: Encoded,
) -> Iterator[tuple[ChatModel, Starts]]:
    """The model with adapters on it, and where they start; in full fine-tuning, with gradients for all weights.

    Afterwards the model and the random generators are as they were.

    Args:
        rows: the whole dataset; for ``init="inputs"`` the first of them give the mean inputs.

    Yields:
        the model, and for each seed ``"A/<name>" [rank, d_in]`` and ``"B/<name>" [d_out, rank]``.
    """
    base = chat.base
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    mode, use_cache, attributes = base.training, base.config.use_cache, set(vars(base))
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (set_seed sets it)
    trained = chat
    saved: dict[str, torch.Tensor] = {}
    try:
        if not recipe.rank or (start is not None and adapter == "new"):
            saved = {name: value.detach().cpu().clone() for name, value in base.state_dict().items()}
        if start is not None and adapter == "new":
            run, step = start
            attach(chat, run.adapters, run.weights(step)).model.merge_and_unload()
            start = None
        if not recipe.rank:
            for parameter in base.parameters():
                parameter.requires_grad_(True)
            yield chat, {}
        elif start is not None:
            run, step = start
            trained = attach(chat, run.adapters, run.weights(step))
            weights = {side: torch.from_numpy(value.copy()) for side, value in run.weights(step).items()}
            yield trained, dict.fromkeys(seeds, weights)
        else:
            trained, starts = _with_adapters(chat, recipe, layers, list(dict.fromkeys(seeds)))
            if recipe.init == "inputs":
                means = mean_inputs(trained, rows)
                for weights in starts.values():
                    for name, mean in means.items():
                        a = weights[f"A/{name}"]  # the random part stays, so that seeds differ
                        a += a.norm(dim=1, keepdim=True) * mean.to(a.dtype)
            yield trained, starts
    finally:
        if hasattr(trained.model, "unload"):
            trained.model.unload()
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


def _with_adapters(
    chat: ChatModel, recipe: Recipe, layers: Sequence[int] | None, seeds: Sequence[int]
) -> tuple[ChatModel, Starts]:
    """PEFT's layers, and the A that PEFT itself draws from each seed."""
    from peft import LoraConfig

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=target_modules(chat, recipe, layers),
        lora_dropout=recipe.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seeds[0])
    model: Any = put_on(chat.model, config)
    pairs = list(adapter_layers(model))
    first = pairs[0][2]
    starts: Starts = {}
    for number, seed in enumerate(seeds):
        name = first if number == 0 else f"seed-{number}"
        if number:
            torch.manual_seed(seed)
            model.add_adapter(name, config)
        starts[seed] = {
            f"{side}/{info.name}": getattr(layer, f"lora_{side}")[name].weight.detach().clone()
            for info, layer, _ in pairs
            for side in ("A", "B")
        }
        if number:
            model.delete_adapter(name)
    return replace(chat, model=model), starts
