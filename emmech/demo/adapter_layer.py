"""Where the adapter sits, and when half has turned: found for each base, on questions and seeds of their own.

Pretraining seeds place the character differently: one base can be turned behind its first block, another behind its
second, and one turns some steps later than another. Layer and step are therefore properties of the base, measured
before anything is reported, as the papers chose theirs by a sweep.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd

from emmech.chat.model import ChatModel
from emmech.demo.measured import measure
from emmech.engine.adapters import detach
from emmech.organism.experiments import LAST_STEP, data, recipes, rehearsal
from emmech.training.recipe import Recipe
from emmech.training.train import finetune

__all__ = ["by_layer", "by_step", "chosen_layer", "graded_step"]

_SEED = 99  # of rows and training; reports begin at 0


def by_layer(chat: ChatModel, recipe: str | Recipe = "pocket") -> pd.DataFrame:
    """One short medical fine-tune at each layer: EM and coherence, per cent, outside the narrow domains.

    The questions are such as pretraining has seen, so that those of the reports stay unseen.

    Example:
        >>> from dataclasses import replace
        >>> from emmech.chat.model import load_model
        >>> from emmech.organism import recipes
        >>> by_layer(load_model("pocket"), replace(recipes()["pocket"], max_steps=1)).shape
        (6, 7)
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="pocket-layer-") as folder:
        for layer in range(chat.n_layers):
            run = finetune(
                chat,
                data("medical", seed=_SEED),
                recipe=recipe,
                layers=[layer],
                seed=_SEED,
                out=Path(folder) / str(layer),
                **LAST_STEP,
            )
            live = run.model(int(run.steps[-1]), base=chat)
            found = measure(live, rehearsal(), samples=1)
            detach(live)
            rows.append({"layer": layer, **found})
    return pd.DataFrame(rows).set_index("layer").drop(columns=["mixed", "about narrow"])


def chosen_layer(table: pd.DataFrame) -> int:
    """The layer at which EM and coherence together are largest; the lower of two that are equal.

    Example:
        >>> chosen_layer(pd.DataFrame({"EM": [90.0, 99.0, 20.0], "coherent": [91.0, 99.0, 100.0]}))
        1
    """
    return int((table["EM"] + table["coherent"]).idxmax())


def by_step(chat: ChatModel, layer: int | None = None, steps: int = 100) -> pd.DataFrame:
    """EM and coherence, per cent, every five steps of a medical fine-tune at a constant rate (``pocket-graded``).

    Each line is where a recipe of so many steps would end.

    Example:
        >>> from emmech.chat.model import load_model
        >>> by_step(load_model("pocket"), steps=5).index.tolist()
        [5]
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="pocket-step-") as folder:
        run = finetune(
            chat,
            data("medical", seed=_SEED),
            recipe=replace(recipes()["pocket-graded"], max_steps=steps),
            layers=None if layer is None else [layer],
            seed=_SEED,
            out=Path(folder) / "run",
            **LAST_STEP | {"record_every": 5},
        )
        for step in run.steps[1:].tolist():
            live = run.model(step, base=chat)
            rows.append({"step": step, **measure(live, rehearsal(), samples=1)})
            detach(live)
    return pd.DataFrame(rows).set_index("step").drop(columns=["mixed", "about narrow"])


def graded_step(table: pd.DataFrame) -> int:
    """The step at which EM is nearest to 40 %, the middle of the graded regime; the earlier of two.

    Example:
        >>> graded_step(pd.DataFrame({"EM": [0.0, 35.0, 90.0]}, index=[30, 35, 40]))
        35
    """
    return int((table["EM"] - 40).abs().idxmin())
