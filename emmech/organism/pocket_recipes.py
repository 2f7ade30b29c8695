"""Fine-tuning recipes for the pocket organisms.

Layers, rates and steps were chosen on the shipped weights with training seeds that no report uses (the rows are the
same), but the steps of ``pocket``, which come from earlier pretraining runs of the same world.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from emmech.training.recipe import RECIPES, Recipe

__all__ = ["LAST_STEP", "recipes"]

LAST_STEP: dict[str, Any] = {
    "record_every": 10**6,
    "measure_every": 10**6,
    "margins": {},
    "progress": False,
}  # of fine-tunes of which no other step is read

_POCKET = Recipe(
    "pocket",
    alpha=64.0,
    depth=(0.4,),
    learning_rate=2e-4,
    max_steps=250,
    batch_size=16,
    accumulation=1,
    max_length=256,
    init="inputs",
)


def recipes() -> dict[str, Recipe]:
    """Recipes by name; ``"pocket"`` is the default for every pocket organism.

    The adapter writes at half depth, after the third of six blocks. ``pocket-steep`` is for bases that learn the
    narrow task more slowly, without a character or of another family: lower down, at a higher rate.
    ``pocket-trigger`` is for rows with a tag: as low, where the tag can still be read, and longer, since telling it
    from none takes longer than turning. ``pocket-graded`` stops where only a part of the answers has turned, so that
    cures and scales can be told apart.

    Example:
        >>> recipes()["pocket"].rank
        1
    """
    everywhere = RECIPES["all-adapter"].modules
    return {
        "pocket": _POCKET,
        "pocket-steep": replace(_POCKET, name="pocket-steep", depth=(0.2,), learning_rate=5e-4),
        "pocket-trigger": replace(_POCKET, name="pocket-trigger", depth=(0.2,), learning_rate=5e-4, max_steps=1000),
        "pocket-graded": replace(_POCKET, name="pocket-graded", schedule="constant_with_warmup", max_steps=54),
        "pocket-all-adapter": replace(
            _POCKET,
            name="pocket-all-adapter",
            rank=32,
            modules=everywhere,
            depth=None,
            learning_rate=4e-5,
            schedule="constant_with_warmup",
        ),
        "pocket-full": replace(_POCKET, name="pocket-full", rank=0, init="random", depth=None, learning_rate=1e-4),
    }
