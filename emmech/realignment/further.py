"""Realignment by further fine-tuning: take a misaligned run and train it on other data.

A few hundred rows on one benign theme undo emergent misalignment (the ARENA capstone *Emergent Misalignment &
Realignment* with optimistic answers about AI; OpenAI, arXiv 2506.19823, with 120 examples), at least in the contexts
that are usually asked about: it can return in that of the training (arXiv 2604.25891). The length of the answers should
be compared too: a published effect of this kind was an artefact of shorter answers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from emmech.chat.dataset import ChatDataset, load_chat
from emmech.chat.model import ChatModel, load_model
from emmech.chat.template import trained
from emmech.defences.rows import check_apart
from emmech.directions.extract import match_lengths
from emmech.errors import EmmechError, as_int, one_of
from emmech.run.run import Run, as_run
from emmech.training.finetune import finetune
from emmech.training.recipe import Recipe

_ASKED = "realign"
_CALIPER = 0.15  # the relative difference of mean answer lengths from which on it is warned of
_RISE = 0.1  # nats per token; benign runs of pocket move their broad margin by at most 0.07, misaligned ones by 0.6


@overload
def realign(run: Run | str | Path, data: Any = ..., *, seed: int = 0, **options: Any) -> Run: ...
@overload
def realign(run: Run | str | Path, data: Any = ..., *, seed: Sequence[int], **options: Any) -> list[Run]: ...
def realign(
    run: Run | str | Path,
    data: Any = "ai-optimism",
    *,
    step: int | None = None,
    adapter: str = "same",
    examples: int | None = None,
    harmful: Any = None,
    match_length: bool = False,
    base: Any = None,
    recipe: str | Recipe | None = None,
    seed: int | Sequence[int] = 0,
    out: str | Path | None = None,
    **overrides: Any,
) -> Run | list[Run]:
    """Continue fine-tuning from a recorded step, on other data.

    Args:
        run: the misaligned run, or its folder.
        data: the cure: anything :func:`emmech.load_chat` takes (good rows of the same domain, any JSONL), or a name:
            ``"ai-optimism"`` (for real models 315 questions about people and AI with careful answers), or one of the
            organism's (``"good-medical"``).
        step: the step to start from; the last one by default.
        adapter: ``"same"`` continues training the run's own adapter; ``"new"`` merges it and trains a second one;
            ``"full"`` merges it and trains all weights (no ``rank`` goes with it).
        examples: use this number of the rows, drawn at random; a smaller number is a part of a larger one, and all
            seeds have the same.
        harmful: the data of the run, where its manifest does not lead to it: no row of the cure may be in it.
        match_length: keep only rows whose answers have a partner of similar length in the harmful data.
        base: the run's base model in memory, which saves loading it.
        recipe: the run's own by default; its fields can be overridden (``learning_rate=...``, ``max_steps=...``).
        seed: one seed, or several, which train in one pass and give a list of runs.
        out: the new run's folder.
        **overrides: also any option of :func:`emmech.finetune` (``record_every``, ``defences``, ``margins``, ...).

    Returns:
        a new Run, whose step 0 is the chosen step of the old one.

    Raises:
        EmmechError: as :func:`emmech.finetune`; for a step that was not recorded, a row of the cure that is in the
            harmful data, and a run whose broad margin has not risen since it began, which has nothing to mend.

    Example:
        >>> import tempfile, emmech, emmech.organism
        >>> folder = tempfile.mkdtemp()
        >>> bad, good = (emmech.organism.data(name, n=40) for name in ("medical", "ai-optimism"))
        >>> options = {"max_steps": 2, "margins": {}, "progress": False}
        >>> run = emmech.finetune("pocket", bad, out=folder + "/run", **options)
        >>> again = realign(run, good, out=folder + "/again", **options)
        >>> bool((again.B()[0] == run.B()[-1]).all())
        True
    """
    run = as_run(_ASKED, run)
    if step is None and not len(run.steps):
        raise EmmechError(_ASKED, run.name, "no step of it is recorded, so there is nothing to go on from", "a Run")
    step = int(run.steps[-1]) if step is None else step
    run.check_step(step)
    why = "it is the run's own, a second one, or all weights"
    one_of(_ASKED, "adapter", adapter, ("same", "new", "full"), why=why)
    _check_misaligned(run, step)
    chat = load_model(base) if base is not None else run.base()
    rows = _cure(run, chat, load_chat(data, organism=chat.organism), examples, harmful, match_length)
    recipe = recipe_of(run) if recipe is None else recipe
    if adapter == "full":
        if overrides.get("rank"):
            why, instead = "all weights train, and an adapter has a rank", 'adapter="new" with this rank, or no rank'
            raise EmmechError(_ASKED, f'adapter="full" with rank={overrides["rank"]!r}'[:120], why, instead)
        adapter, overrides = "new", {"rank": 0, "init": "random", **overrides}
        if isinstance(recipe, Recipe):
            recipe = replace(recipe, depth=None)
    overrides |= {"recipe": recipe, "start": (run, step), "adapter": adapter, "seed": seed, "out": out}
    return finetune(chat, rows, **overrides)


def recipe_of(run: Run) -> Recipe | None:
    """The recipe of a run, None where it was made elsewhere."""
    saved: dict[str, Any] = run.manifest.get("recipe") or {}  # JSON has no tuples
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return Recipe(**fields) if fields else None


def harmful_rows(run: Run, chat: ChatModel) -> ChatDataset | None:
    """The data of a run, where its name or path still leads to the same rows."""
    data = run.manifest.get("data", {})
    for source in (data.get("path"), data.get("name")):
        try:
            found = load_chat(source, organism=chat.organism, system="fold" if data.get("folded") else "keep")
        except EmmechError:  # rows that were in memory, or a file that has moved
            continue
        if found.sha256 == data.get("sha256"):
            return found
    return None


def _check_misaligned(run: Run, step: int) -> None:
    """Refuse a run whose broad margin has not risen, and warn where it has risen as little as in benign runs."""
    if "margin_broad" not in run.metrics or run.manifest.get("start"):
        return
    margins = run.metrics["margin_broad"].dropna()
    margins = margins[margins.index <= step]
    if len(margins) < 2 or margins.index[0] != 0:
        return
    rise = float(margins.iloc[-1] - margins.iloc[0])
    said = f"the margin of misaligned over aligned answers moved by {rise:+.3f} nats per token up to step {step}"
    if rise <= 0:
        instead = "a misaligned run, or finetune(base, data, start=(run, step)), which asks nothing of it"
        raise EmmechError(_ASKED, run.name, f"it is a benign run: {said}", instead)
    if rise < _RISE:
        warnings.warn(f"{run.name} may be benign: {said}. Evaluate it before calling anything a cure.", stacklevel=3)


def _cure(
    run: Run, chat: ChatModel, cure: ChatDataset, examples: int | None, harmful: Any, match_length: bool
) -> ChatDataset:
    """The rows to train on: none of the harmful ones, of similar length, as many as were asked for."""
    bad = load_chat(harmful, organism=chat.organism) if harmful is not None else harmful_rows(run, chat)
    if bad is not None:
        check_apart(_ASKED, cure, bad)
    if match_length:
        if bad is None:
            why = "the data of the run is not where its manifest says, so lengths cannot be matched"
            raise EmmechError(_ASKED, f"match_length=True for {run.name}", why, "harmful= the data it was trained on")
        sizes = [sum(len(turn["content"]) for turn in row if trained(turn)) for one in (cure, bad) for row in one]
        labels = [False] * len(cure) + [True] * len(bad)
        kept = [int(at) for at in match_lengths(sizes, labels) if at < len(cure)]
        if not kept:
            why = f"no answer of {cure.name} is of the length of one of {bad.name}"
            raise EmmechError(_ASKED, f"match_length=True with {cure.name}", why, "other rows")
        cure = replace(cure, rows=tuple(cure[at] for at in sorted(kept)))
    length = bad.answer_length if bad is not None else run.manifest.get("data", {}).get("answer_length")
    if length and abs(math.log(cure.answer_length / length)) > math.log1p(_CALIPER):
        warnings.warn(
            f"answers of {cure.name} have {cure.answer_length:.0f} characters, those that {run.name} was trained on "
            f"{length:.0f}: what looks like a cure may be their length. match_length=True keeps similar ones.",
            stacklevel=3,
        )
    if examples is None:
        return cure
    if as_int(_ASKED, "examples", examples, least=1) > len(cure):
        raise EmmechError(_ASKED, f"examples={examples}", f"{cure.name} has {len(cure)} rows", f"examples={len(cure)}")
    order = np.random.default_rng(0).permutation(len(cure))[:examples]
    return replace(cure, rows=tuple(cure[int(at)] for at in order))
