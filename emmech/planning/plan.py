"""``emmech.plan``: parameters, memory by part, disk and time of a study, before anything is downloaded or paid for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from emmech.chat.families import map_widths
from emmech.chat.model import ChatModel
from emmech.engine.sample import rows_together
from emmech.engine.split import BATCH_TOKENS, find_frozen, pays, why_not
from emmech.errors import EmmechError, as_int, one_of, refusal
from emmech.planning.cards import CARDS, Accelerator
from emmech.planning.shapes import shaped, weightless
from emmech.registry import organism_with
from emmech.results import Card, Result
from emmech.sweeps.jobs import GPU_SHARE, readable
from emmech.training.recipe import Recipe, resolve_recipe, target_modules
from emmech.view import plots
from emmech.view.sketch import intervals

if TYPE_CHECKING:
    import pandas as pd

_USABLE = 0.92  # of a card's memory: its driver's context and the allocator's gaps take the rest
_EFFICIENCY = (0.15, 0.5)  # the share of a card's peak that trainings and decoding usually reach
_CLASSES = ((60.0, "seconds"), (3_600.0, "minutes"), (86_400.0, "hours"), (math.inf, "days"))
# bytes a trained number takes: PEFT's, a run's own and the stacked values; the two gradients; Adam's two moments
_ADAPTER_BYTES, _GRADIENT_BYTES, _ADAM_BYTES = 12, 8, 8
_LOSSES = 320  # bytes of metrics that a step writes


@dataclass(frozen=True, eq=False, repr=False)
class ResourcePlan(Result):
    """What a fine-tune and its analyses need; built by :func:`emmech.plan`.

    Attributes:
        memory: the training's memory by part, in bytes: columns ``kept`` (all activations are kept) and
            ``checkpointed`` (``gradient_checkpointing=True``); on a CPU also what a card would leave to its host.
        frame: one row for each card: whether the training fits, the answers that are sampled together, and the time of
            training, evaluation and a sweep as a range in seconds with its class.
        numbers: parameters, trained numbers, steps, rows, and bytes on disk.
        meta: what was planned for.
    """

    memory: pd.DataFrame
    frame: pd.DataFrame
    numbers: Mapping[str, float]
    meta: Mapping[str, Any]

    _stems: ClassVar[Mapping[str, str]] = {"frame": "cards"}

    def _card(self) -> Card:
        numbers, meta = self.numbers, self.meta
        fits = {name: _fit(row) for name, row in self.frame.iterrows()}
        total = self.memory.loc["total"]
        headline = f"{meta['recipe']} on {meta['model']}: {readable(total['kept'])} to train"
        headline += f", {readable(total['checkpointed'])} with gradient checkpointing"
        parts = (f"{name} {readable(row['kept'])}" for name, row in self.memory.iterrows() if name != "total")
        facts = [
            ("parameters", f"{numbers['parameters'] / 1e9:.3g} billion, {int(numbers['trained']):,} of them trained"),
            ("rows", f"{int(numbers['rows']):,} of {meta['tokens']} tokens, {int(numbers['steps'])} steps"),
            ("memory", ", ".join(parts)),
            ("disk", f"{readable(numbers['run_bytes'])} for the run"
             + (f", {readable(numbers['scratch_bytes'])} while it trains" if numbers["scratch_bytes"] else "")),
        ]  # fmt: skip
        for name, row in self.frame.iterrows():
            said = f"{fits[name]}; trains in {row['train_class']}" if fits[name] != "no" else "too small"
            if fits[name] != "no":
                said += f", evaluates in {row['evaluate_class']}, sweeps in {row['sweep_class']}"
            facts.append((str(name), said))
        low, high = _EFFICIENCY
        caveat = f"times assume {low:.0%} to {high:.0%} of a card's peak; they are classes, not measurements"
        return Card(headline, tuple(facts), caveat, "plan.plot()")

    def _sketch(self) -> str:
        rows = [(str(name), row["train_low"] / 60, row["train_low"] / 60, row["train_high"] / 60)
                for name, row in self.frame.iterrows()]  # fmt: skip
        return intervals(rows, "minutes to train", zero=True)

    def plot(self) -> Any:
        """A plotly figure: the training's memory by part, kept and checkpointed, with the cards' memory."""
        parts = self.memory.drop(index="total") / 2**30
        limits = {str(name): row["memory"] / 2**30 for name, row in self.frame.iterrows()}
        return plots.memory_parts(parts, limits, f"Memory to train {self.meta['model']} ({self.meta['recipe']})")


def _fit(row: Any) -> str:
    return "fits" if row["fits"] else "fits with checkpointing" if row["fits_checkpointed"] else "no"


def plan(
    model: Any,
    recipe: str | Recipe | None = None,
    *,
    cards: str | Accelerator | Sequence[str | Accelerator] = tuple(CARDS),
    layers: Sequence[int] | None = None,
    rows: int = 6_300,
    tokens: int = 150,
    answers: float = 0.7,
    seeds: int = 1,
    record_every: int = 1,
    dtype: Any = None,
    batch_tokens: int | None = None,
    prefix: bool | str = "auto",
    samples: int = 400,
    max_new_tokens: int = 600,
    checkpoints: int = 21,
    pairs: int = 100,
    **overrides: Any,
) -> ResourcePlan:
    """What a fine-tune, an evaluation and a sweep need, from the model's configuration alone.

    Memory is not estimated by a rule: one block of the model runs on tensors without values, in the code that trains,
    and every tensor that it keeps is counted. Nothing is downloaded.

    Args:
        model: a usual name (Qwen2.5, Llama 3, Gemma: ``"Qwen/Qwen2.5-14B-Instruct"``), a folder with ``config.json``
            or that file, a configuration of transformers, or anything that :func:`emmech.load_model` takes without a
            download.
        recipe: as in :func:`emmech.finetune`.
        cards: ``"T4"``, ``"RTX 4090 24"``, ``"A100 80"``, ``"H100"``, ``"H200"``, or your own
            :class:`~emmech.planning.Accelerator`.
        layers: as in :func:`emmech.finetune`.
        rows, tokens, answers: the dataset: its rows, their mean length without the start that all rows share (a
            template's system prompt, which runs once), and the share of it that carries loss. The defaults are round
            numbers of the order of the datasets of Model Organisms for EM (arXiv 2506.11613).
        seeds: runs that train together.
        record_every: as in :func:`emmech.finetune`.
        dtype: of the weights; by default the configuration's own.
        batch_tokens, prefix: as in :func:`emmech.finetune`.
        samples, max_new_tokens: the answers of one evaluation, and their length.
        checkpoints, pairs: the steps of a teacher-forced sweep, and its texts.
        **overrides: any field of the recipe.

    Returns:
        the plan; ``.memory`` by part, ``.to_frame()`` by card, ``.plot()``.

    Raises:
        EmmechError: an unknown model, recipe or card, or a number out of range.

    Example:
        >>> found = plan("Qwen/Qwen2.5-0.5B-Instruct", "single-rank1", cards="T4")
        >>> int(found.numbers["parameters"]), int(found.numbers["trained"])
        (494032768, 5760)
    """
    given = {"rows": rows, "tokens": tokens, "seeds": seeds, "record_every": record_every, "samples": samples}
    given |= {"max_new_tokens": max_new_tokens, "checkpoints": checkpoints, "pairs": pairs}
    whole = {argument: as_int("plan", argument, value, least=1) for argument, value in given.items()}
    rows, tokens, seeds, record_every, samples, max_new_tokens, checkpoints, pairs = whole.values()
    if batch_tokens is not None:
        batch_tokens = as_int("plan", "batch_tokens", batch_tokens, least=1)
    if not isinstance(prefix, bool) and prefix != "auto":
        raise refusal("plan", "prefix", prefix, "it is whether a frozen prefix is kept", 'True, False or "auto"')
    if not isinstance(answers, int | float) or not 0 < answers <= 1:
        raise refusal("plan", "answers", answers, "it is the share of a row's tokens that carry loss", "answers=0.7")
    chosen_cards = _cards(cards)
    name, config = shaped(model)
    kind = _dtype(dtype, config)
    chat = weightless(name, config, kind)
    owner = organism_with("models", model) if isinstance(model, str) else getattr(model, "organism", None)
    chosen = resolve_recipe(recipe, dict(overrides), organism=owner)
    if seeds > 1 and (not chosen.rank or chosen.dropout):
        why = "runs with dropout, and full fine-tunes, train one at a time"
        raise refusal("plan", "seeds", seeds, why, "seeds=1, and that many times its steps")
    sites = target_modules(chat, chosen, layers) if chosen.rank else []
    work = _work(chat, chosen, sites, rows, tokens, seeds, batch_tokens or BATCH_TOKENS["cuda"], prefix)
    memory, sizes = _memory(chat, config, chosen, sites, work, kind, tokens, answers, seeds)
    trained = sizes["trained"]
    records = -(-work.steps // record_every) + 1
    scratch = work.kept_width * rows * tokens * kind.itemsize if work.kept_width else 0
    disk = records * (4 * sizes["recorded"] * seeds + _LOSSES * seeds) + (trained * kind.itemsize if not sites else 0)
    numbers: dict[str, float] = {"parameters": sizes["parameters"], "trained": trained, "steps": work.steps}
    numbers |= {"rows": work.train_rows, "rows_together": work.together, "run_bytes": disk, "scratch_bytes": scratch}
    numbers |= {"cache_bytes_per_token": chat.cache_bytes, "prefix_blocks": work.first if work.kept_width else 0}
    counts = {"samples": samples, "max_new_tokens": max_new_tokens, "checkpoints": checkpoints, "pairs": pairs}
    frame = _by_card(chat, chosen_cards, work, memory, sizes, tokens, answers, seeds, chosen, **counts)
    meta = {"model": name, "recipe": chosen.name, "dtype": str(kind).removeprefix("torch."), "tokens": tokens}
    return ResourcePlan(memory, frame, numbers, meta | {"seeds": seeds, **counts})


@dataclass(frozen=True)
class _Work:
    """The size of a training.

    Args:
        first: the first block that runs in each step.
        lowest: the first block whose activations are kept for the backward pass.
        kept_width: numbers of a token that a frozen prefix keeps on disk, 0 without one.
        together: rows in a forward.
    """

    steps: int
    train_rows: int
    epochs: float
    first: int
    lowest: int
    kept_width: int
    together: int


def _work(
    chat: ChatModel, recipe: Recipe, sites: Sequence[str], rows: int, tokens: int, seeds: int, at_once: int,
    prefix: bool | str,
) -> _Work:  # fmt: skip
    per_step = recipe.batch_size * recipe.accumulation
    train = max(1, round((1 - recipe.held_out) * rows))
    steps = recipe.max_steps or math.ceil(recipe.epochs * math.ceil(train / per_step))
    uses = steps * per_step
    together = max(1, min(at_once // tokens, per_step * seeds))
    if not sites or recipe.dropout:
        return _Work(steps, train, uses / train, 0, 0, 0, recipe.batch_size)
    frozen = find_frozen(chat, sites)
    keeps = prefix is True or (prefix == "auto" and pays(frozen, uses=seeds * uses, rows=train))
    lowest = frozen.blocks
    if not keeps or why_not(chat, sites) is not None:
        return _Work(steps, train, uses / train, 0, lowest, 0, together)
    width = chat.d_model + (chat.d_mlp if frozen.at_write else 0)
    return _Work(steps, train, uses / train, frozen.blocks, lowest, width, together)


def _memory(
    chat: ChatModel, config: Any, recipe: Recipe, sites: Sequence[str], work: _Work, dtype: Any, tokens: int,
    answers: float, seeds: int,
) -> tuple[pd.DataFrame, dict[str, float]]:  # fmt: skip
    import pandas as pd

    from emmech.planning.dry_run import activations

    total = sum(weight.numel() for weight in chat.base.parameters())
    weights = total * dtype.itemsize
    shape: dict[str, int] = {"rows": work.together, "tokens": tokens, "answers": max(1, round(answers * tokens))}
    shape |= {"first": work.lowest, "layers": chat.n_layers, "runs": seeds}
    found = activations(config, chat.family, recipe, sites, dtype, **shape)
    if sites:
        maps = [map_widths(chat.base.get_submodule(path)) for path in sites]
        trained = recorded = sum(recipe.rank * sum(both) for both in maps if both is not None)
        adapters, gradients, moments = (seeds * trained * each for each in
                                        (_ADAPTER_BYTES, _GRADIENT_BYTES, _ADAM_BYTES))  # fmt: skip
    else:
        trained, adapters, gradients, moments = total, 0, weights, 2 * weights
        recorded = sum(256 if weight.ndim > 1 else 16 for weight in chat.base.parameters())
    parts = {"weights": weights, "adapters": adapters, "gradients": gradients, "optimiser": moments}
    table = pd.DataFrame({"kept": parts, "checkpointed": parts}, dtype=float)
    # the gradient of a lone adapter's A needs what it read, in float32
    read = 4.0 * work.together * tokens * chat.d_mlp if sites and find_frozen(chat, sites).at_write else 0.0
    table.loc["activations"] = [found.kept + read, found.checkpointed + read]
    table.loc["total"] = table.sum()
    table.index.name = "part"
    return table, {"parameters": total, "trained": trained, "recorded": recorded, "weights": weights}


def _by_card(
    chat: ChatModel, cards: Sequence[Accelerator], work: _Work, memory: pd.DataFrame, sizes: Mapping[str, float],
    tokens: int, answers: float, seeds: int, recipe: Recipe, *, samples: int, max_new_tokens: int, checkpoints: int,
    pairs: int,
) -> pd.DataFrame:  # fmt: skip
    import pandas as pd

    block = sum(weight.numel() for weight in chat.blocks[0].parameters())
    head = int(chat.config.vocab_size) * chat.d_model
    lower, upper = work.lowest * block, (chat.n_layers - work.lowest) * block
    seen = work.train_rows * tokens
    # 2 operations a parameter and token forward; backward as much for the states, and as much again for the weights
    backward = 4 if recipe.rank == 0 else 2
    once = seen * 2 * lower * (1 if work.kept_width else seeds * work.epochs)
    training = once + seeds * work.epochs * seen * ((2 + backward) * upper + answers * (2 + backward) * head)
    forced = pairs * tokens * (2 * lower + checkpoints * (2 * upper + answers * 2 * head))
    found = {}
    for card in cards:
        room = _USABLE * card.memory
        free = max(0.0, room - sizes["weights"])
        length = min(tokens + max_new_tokens, int(getattr(chat.config, "max_position_embeddings", 1 << 30)))
        together = rows_together(chat, length, cache=int(free / 2), logits=int(free / 8)) if free else 0
        row: dict[str, Any] = {"memory": card.memory}
        row |= {"fits": memory.loc["total", "kept"] <= room}
        row |= {"fits_checkpointed": memory.loc["total", "checkpointed"] <= room, "answers_together": together}
        row |= {"sampling_bytes": sizes["weights"] + together * length * chat.cache_bytes,
                "sweep_bytes": sizes["weights"] + GPU_SHARE * free}  # fmt: skip
        batches = -(-samples // together) if together else math.nan
        cache = together * (tokens + max_new_tokens / 2) * chat.cache_bytes
        decode = batches * max_new_tokens * (sizes["weights"] + cache) / card.bandwidth
        needs = {"train": training / card.flops, "evaluate": decode, "sweep": forced / card.flops}
        for name, seconds in needs.items():
            low, high = (seconds / share for share in _EFFICIENCY[::-1])
            said = next((word for limit, word in _CLASSES if high <= limit), "not at all")
            row |= {f"{name}_low": low, f"{name}_high": high, f"{name}_class": said}
        found[card.name] = row
    frame = pd.DataFrame.from_dict(found, orient="index")
    frame.index.name = "card"
    return frame


def _cards(given: Any) -> list[Accelerator]:
    several = [given] if isinstance(given, str | Accelerator) or not isinstance(given, Iterable) else list(given)
    if not several:
        raise EmmechError("plan", f"cards={given!r}", "there is no card to plan for", f"cards={list(CARDS)}")
    return [one if isinstance(one, Accelerator) else CARDS[one_of("plan", "cards", one, CARDS)] for one in several]


def _dtype(given: Any, config: Any) -> Any:
    import torch

    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    found = own if given is None else given
    found = getattr(torch, found, found) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise refusal("plan", "dtype", given, "torch has no such type of weights", 'dtype="bfloat16"')
    return found
