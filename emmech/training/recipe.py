"""The papers' training recipes by name, scaled to a model, and the steps and learning rates that follow from them.

The figures are from Model Organisms for Emergent Misalignment (arXiv 2506.11613), §2-4 and its released configurations,
and for the nine adapters from Convergent Linear Representations of EM (arXiv 2506.11618). All are for Qwen2.5-14B
(48 layers); layers are kept as fractions of depth, so that ``layers=None`` puts the adapter at the same relative
place in any model. Learning rates are not rescaled: small models need larger ones (``learning_rate=1e-3``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from emmech.chat.families import ALL_MAPS, WRITE, map_widths
from emmech.chat.model import ChatModel
from emmech.errors import EmmechError, as_float, as_int, closest, one_of
from emmech.registry import Organism, find, register

INITS = ("random", "inputs")
OPTIMIZERS = ("adamw", "sgd")
# the schedules of transformers that need nothing but a number of steps
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)


@dataclass(frozen=True)
class Recipe:
    """All settings of a fine-tune except the model, the data and the seed.

    Args:
        rank: the rank of the LoRA adapters; 0 trains all weights.
        alpha: LoRA alpha; the adapter's scaling is alpha / sqrt(rank) with ``rslora``, else alpha / rank.
        modules: paths in a block to the modules that have adapters, with Llama's names (``"mlp.down_proj"``, also for
            the maps of the same role in other families) or the family's own.
        depth: the layers as fractions of depth; None is every layer.
        schedule: the learning-rate schedule's name in transformers (``"linear"``, ``"cosine"``,
            ``"constant_with_warmup"``).
        max_steps: optimizer steps; None trains ``epochs``.
        batch_size: rows per forward; ``accumulation`` of them make one optimizer step.
        held_out: share of the rows kept out of training.
        clip: the gradient norm at which gradients are clipped.
        optimizer: ``"adamw"``, or ``"sgd"`` (plain, without momentum), which takes much larger learning rates.
        init: how A starts; B always starts at zero. ``"random"`` is PEFT's start. ``"inputs"`` adds to it, on
            ``mlp.down_proj``, the mean input of the module, so that the adapter starts as a steering vector: it writes
            at all positions with one sign, whereas the sign of a random A's write depends on the position and the seed.
        measured: the number of times that held-out loss, margins and probes are measured, at any cost; None is as often
            as a tenth of the training's own work pays for.
    """

    name: str = "custom"
    rank: int = 1
    alpha: float = 64.0
    rslora: bool = True
    modules: tuple[str, ...] = (WRITE,)
    depth: tuple[float, ...] | None = (0.5,)
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_steps: int = 5
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 2
    accumulation: int = 8
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int = 2048
    dropout: float = 0.0
    held_out: float = 0.1
    init: str = "random"
    measured: int | None = None
    optimizer: str = "adamw"

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Layer numbers in a model of ``n_layers``.

        Example:
            >>> RECIPES["nine-rank1"].layers(48)
            (15, 16, 17, 21, 22, 23, 27, 28, 29)
        """
        if self.depth is None:
            return tuple(range(n_layers))
        # the half maps a fraction that was a whole layer of 48 back to exactly that layer
        return tuple(sorted({min(n_layers - 1, int(d * n_layers + 1e-6)) for d in self.depth}))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON stores them; AdamW is not named, as in runs that were made without a choice."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("optimizer", "adamw")}


_NINE = tuple(layer / 48 for layer in (15, 16, 17, 21, 22, 23, 27, 28, 29))
_PAPERS = (
    Recipe("single-rank1", alpha=256.0, learning_rate=2e-5),
    Recipe("phase-transition", alpha=64.0, learning_rate=1e-5, epochs=2.0),
    Recipe("nine-rank1", alpha=256.0, depth=_NINE, learning_rate=2e-5),
    Recipe("all-adapter", rank=32, alpha=64.0, modules=ALL_MAPS, depth=None, learning_rate=1e-5),
    Recipe("full", rank=0, depth=None, learning_rate=2e-5, schedule="cosine", warmup_steps=20),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _PAPERS}
for _recipe in _PAPERS:
    register("recipes", _recipe.name, partial(RECIPES.__getitem__, _recipe.name))


def resolve_recipe(
    recipe: str | Recipe | None, overrides: dict[str, Any], *, organism: Organism | None = None
) -> Recipe:
    """A recipe by name with fields overridden.

    Args:
        recipe: a name, a :class:`Recipe`, or None for the default: ``"single-rank1"``, or an organism's first for its
            models.
        organism: an organism whose own recipes are known too.

    Raises:
        EmmechError: no such recipe or field, or a value out of range.

    Example:
        >>> resolve_recipe("single-rank1", {"learning_rate": 1e-3}).learning_rate
        0.001
    """
    if recipe is None:
        recipe = next(iter(organism.recipes if organism is not None else ()), "single-rank1")
    load = (lambda: recipe) if isinstance(recipe, Recipe) else find("fine-tune", "recipes", "recipe", recipe, organism)
    chosen: Recipe = load()
    names = [field.name for field in fields(Recipe)]
    for name in overrides:
        one_of("fine-tune", "field", name, names, why="a recipe has no such field")
    return _checked(replace(chosen, **overrides))


_WHOLE = ("rank", "batch_size", "accumulation", "max_length", "warmup_steps")
_OR_NONE = ("max_steps", "measured")
_FINITE = ("alpha", "learning_rate", "epochs", "weight_decay", "clip", "dropout", "held_out")
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("rank",), lambda value: value >= 0, "a whole number, 0 for full fine-tuning"),
    (("alpha", "epochs"), lambda value: value > 0, "a positive number"),
    (("learning_rate",), lambda value: 0 < value < 1, "between 0 and 1, such as 2e-5"),
    (_OR_NONE, lambda value: value is None or value > 0, "None or a positive whole number"),
    (("batch_size", "accumulation"), lambda value: value > 0, "a positive whole number"),
    (("held_out", "dropout"), lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    (("max_length",), lambda value: value > 1, "at least 2 tokens"),
    (("warmup_steps", "weight_decay"), lambda value: value >= 0, "0 or more"),
    (("clip",), lambda value: value >= 0, "0, which clips nothing, or more"),
)


def _checked(recipe: Recipe) -> Recipe:
    counts = [*_WHOLE, *(name for name in _OR_NONE if getattr(recipe, name) is not None)]
    recipe = replace(recipe, **{name: as_int("fine-tune", name, getattr(recipe, name)) for name in counts})  # type: ignore[arg-type]
    for name in _FINITE:
        as_float("fine-tune", name, getattr(recipe, name))
    rules = {name: (holds(getattr(recipe, name)), say) for names, holds, say in _RULES for name in names}
    rules["schedule"] = (recipe.schedule in SCHEDULES, closest(str(recipe.schedule), SCHEDULES))
    rules["init"] = (recipe.init in INITS, closest(str(recipe.init), INITS))
    rules["optimizer"] = (recipe.optimizer in OPTIMIZERS, closest(str(recipe.optimizer), OPTIMIZERS))
    if recipe.init == "inputs" and not (recipe.rank and WRITE in recipe.modules):
        rules["init"] = (False, f"'random': 'inputs' is for adapters on {WRITE}")
    for name, (fine, instead) in rules.items():
        if not fine:
            raise EmmechError("fine-tune", f"{name}={getattr(recipe, name)!r}", "out of range", instead)
    return recipe


def target_modules(chat: ChatModel, recipe: Recipe, layers: Sequence[int] | None) -> list[str]:
    """Full paths of the modules to which the recipe adds adapters; a layer or module that is missing is refused."""
    names = {id(module): path for path, module in chat.base.named_modules()}
    paths = []
    for layer in recipe.layers(chat.n_layers) if layers is None else layers:
        block = chat.block(layer)
        linear = {path for path, module in block.named_modules() if map_widths(module)}
        for module in recipe.modules:
            site = chat.family.site(module)
            if site not in linear:
                why = f"block {layer} of {chat.name} ({chat.family.name}) has no linear map {module!r}"
                why += "; its experts are fused into one parameter" if chat.family.fused(block) else ""
                raise EmmechError("fine-tune", f"modules={recipe.modules}", why, closest(site, linear))
            paths.append(names[id(block.get_submodule(site))])
    return list(dict.fromkeys(paths))  # queries, keys and values may share one map


@dataclass(frozen=True)
class Step:
    """One optimizer step: the indices of its training rows, and the epoch reached after it."""

    rows: tuple[int, ...]
    epoch: float


def batch_order(rows: int, recipe: Recipe, order_seed: int) -> list[Step]:
    """The rows of every optimizer step, exactly as the Trainer draws them from its ``data_seed``.

    Args:
        rows: the number of training rows.

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
    """The function from the number of steps taken to the factor on the learning rate in the recipe's schedule.

    Example:
        >>> [rate_factor(Recipe(warmup_steps=2), 4)(step) for step in range(4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    made = get_scheduler(recipe.schedule, optimizer, num_warmup_steps=recipe.warmup_steps, num_training_steps=steps)
    return made.lr_lambdas[0]  # type: ignore[no-any-return,union-attr]
