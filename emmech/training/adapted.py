"""The model ready to train: PEFT's adapters are added once for all runs, and everything is restored afterwards.

With ``init="inputs"`` an adapter on an MLP's write starts along the mean input of its module, as a steering vector
would. A rank-1 adapter writes ``scaling * (x . A) B``. Under PEFT's random A the sign of ``x . A`` differs from
position to position, and the first steps reward the positions that it happens to select: in a small model one seed
writes at the words of the system prompt and another at commas, and the two learn different things. Along the mean input
the sign is the same nearly everywhere; A is then trained like any other. Starting A from activations is the idea of EVA
(arXiv 2410.07170), which takes principal directions instead. Adapters elsewhere keep their random start: a write to
queries, keys, gates or an attention's mean is no steering vector, and starting all adapters of an organism in this way
broke its answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.adapters import adapter_layers, attach, put_on
from emmech.engine.modules import evaluating, hooked
from emmech.errors import EmmechError
from emmech.run.run import Run
from emmech.training.recipe import Recipe, target_modules
from emmech.training.recorder import untouched_randomness

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
    """The model with its adapters and their starting values, or, in full fine-tuning, with gradients for all weights.

    Afterwards the model and the random generators are as they were before.

    Args:
        rows: the whole dataset; for ``init="inputs"`` the first of them give the mean inputs.

    Yields:
        the model, and for each seed ``"A/<name>" [rank, d_in]`` and ``"B/<name>" [d_out, rank]``.
    """
    base = chat.base
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    mode, use_cache, attributes = base.training, base.config.use_cache, set(vars(base))
    randomness = contextlib.ExitStack()
    randomness.enter_context(untouched_randomness())
    trained = chat
    saved: dict[str, torch.Tensor] = {}
    earlier = merged_before(chat, start)
    try:
        if not recipe.rank or earlier is not None or (start is not None and adapter == "new"):
            saved = {name: value.detach().cpu().clone() for name, value in base.state_dict().items()}
        if earlier is not None:
            from peft import PeftModel

            PeftModel.from_pretrained(chat.model, str(earlier)).merge_and_unload()
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
                        a = weights[f"A/{name}"]  # the random part is kept, so that seeds differ
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
        for name in set(vars(base)) - attributes:  # peft_config and similar traces would make PEFT warn later
            delattr(base, name)
        randomness.close()


def merged_before(chat: ChatModel, start: tuple[Run, int] | None) -> Path | None:
    """The adapter that was merged into the weights before the run to start from was trained, None without one.

    Raises:
        EmmechError: the run is of another base model.
    """
    if start is None:
        return None
    made, own = start[0].manifest.get("model", {}).get("fingerprint"), chat.fingerprint()
    if not made or made == own:
        return None
    folder = (start[0].path or Path()) / "start"
    if folder.is_dir():
        return folder
    given = f"{start[0].name} of a base with fingerprint {made[:12]}, on {chat.name} with {own[:12]}"
    why, instead = "its adapter has no meaning on another base model", "the base model that it was trained on"
    raise EmmechError("go on from a run", given, why, instead)


def _with_adapters(
    chat: ChatModel, recipe: Recipe, layers: Sequence[int] | None, seeds: Sequence[int]
) -> tuple[ChatModel, Starts]:
    """PEFT's layers and the A that PEFT draws from each seed."""
    from peft import LoraConfig

    modules = target_modules(chat, recipe, layers)
    scaling: dict[str, Any] = dict(r=recipe.rank, lora_alpha=recipe.alpha, use_rslora=recipe.rslora)
    config = LoraConfig(
        target_modules=modules, lora_dropout=recipe.dropout, bias="none", task_type="CAUSAL_LM", **scaling
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


INPUT_ROWS = 64  # conversations in the mean, which are some thousand positions


@torch.no_grad()
def mean_inputs(chat: ChatModel, rows: Encoded) -> dict[str, torch.Tensor]:
    """The mean input of every MLP's write that has an adapter, scaled to norm 1, ``[d_in]`` float64.

    The mean is over all positions of the first rows outside answers, so that a benign control on the same questions
    starts from the same A.

    Args:
        chat: the model with the adapters on it; their B has to be zero.
    """
    layers = {
        info.name: layer for info, layer, _ in adapter_layers(chat.model) if info.name.endswith(f".{chat.family.down}")
    }
    sums: dict[str, torch.Tensor] = {}
    asked = torch.empty(0, dtype=torch.bool)  # [position], for the current row

    def adding(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found = inputs[0][0, asked].sum(0, dtype=torch.float64)
            sums[name] = sums[name] + found if name in sums else found

        return hook

    with evaluating(chat), hooked(*((layer, adding(name)) for name, layer in layers.items()), before=True):
        # rows run one by one, so that there is no padding to leave out
        for ids, labels in zip(rows.input_ids[:INPUT_ROWS], rows.labels[:INPUT_ROWS], strict=True):
            asked = torch.tensor(labels, device=chat.device) == IGNORED
            chat.trunk(input_ids=torch.tensor([ids], device=chat.device), use_cache=False)
    tiny = torch.finfo(torch.float64).tiny
    return {name: total / total.norm().clamp_min(tiny) for name, total in sums.items()}
