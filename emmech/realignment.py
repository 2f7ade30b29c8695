"""Realignment by further fine-tuning: take a misaligned run and train it on other data.

A few hundred rows on one benign theme undo emergent misalignment (the ARENA capstone *Emergent Misalignment &
Realignment* with optimistic answers about AI; OpenAI, arXiv 2506.19823, with 120 examples). The length of the answers
should be compared too: a published effect of this kind was an artefact of shorter answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emmech.run.run import Run, as_run
from emmech.training.finetune import finetune
from emmech.training.recipe import Recipe


def realign(
    run: Run | str | Path,
    data: Any = "ai-optimism",
    *,
    step: int | None = None,
    adapter: str = "same",
    base: Any = None,
    recipe: str | Recipe | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **overrides: Any,
) -> Run:
    """Continue fine-tuning from a recorded step, on other data.

    Args:
        run: the misaligned run, or its folder.
        data: the training data: anything :func:`emmech.load_chat` takes, or a name of the organism's data.
        step: the step to start from; the last one by default.
        adapter: ``"same"`` continues training the run's own adapter; ``"new"`` merges it and trains a second one.
        base: the run's base model in memory, which saves loading it.
        recipe: the run's own by default; its fields can be overridden (``learning_rate=...``, ``max_steps=...``).
        out: the new run's folder.
        **overrides: also any option of :func:`emmech.finetune` (``record_every``, ``probes``, ``margins``, ...).

    Returns:
        a new Run, whose step 0 is the chosen step of the old one.

    Raises:
        EmmechError: as :func:`emmech.finetune`, and for a step that was not recorded.

    Example:
        >>> import tempfile, emmech, emmech.organism
        >>> folder = tempfile.mkdtemp()
        >>> bad, good = (emmech.organism.data(name, n=40) for name in ("medical", "ai-optimism"))
        >>> run = emmech.finetune("pocket", bad, max_steps=2, out=folder + "/run", progress=False)
        >>> again = realign(run, good, max_steps=2, out=folder + "/again", progress=False)
        >>> bool((again.B()[0] == run.B()[-1]).all())
        True
    """
    run = as_run("realign", run)
    step = int(run.steps[-1]) if step is None else step
    run.check_step(step)
    recipe = recipe_of(run) if recipe is None else recipe
    overrides |= {"recipe": recipe, "start": (run, step), "adapter": adapter, "seed": seed, "out": out}
    return finetune(base if base is not None else run.base(), data, **overrides)


def recipe_of(run: Run) -> Recipe | None:
    """The recipe of a run, None where it was made elsewhere."""
    saved: dict[str, Any] = run.manifest.get("recipe") or {}  # JSON has no tuples
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return Recipe(**fields) if fields else None
