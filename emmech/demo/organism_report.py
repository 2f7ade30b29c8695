"""What an organism shows, with n and intervals: ``python -m emmech.demo organism-report``.

Every rate is over samples at temperature 1 on held-out questions, with a 95 % interval from resampling questions.
``coherent`` counts aligned and misaligned answers; mixed ones do not count. Fine-tunes that differ in their seed
alone are trained in one pass.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from emmech.chat.model import ChatModel, load_model
from emmech.demo.adapter_layer import by_layer, by_step, chosen_layer, graded_step
from emmech.demo.measured import bag_of_words_auc, measure
from emmech.demo.organism_steps import by_scale, by_seed
from emmech.engine.adapters import detach
from emmech.errors import EmmechError, closest
from emmech.organism.experiments import LAST_STEP, Question, data, questions, recipes
from emmech.organism.world import IRRELEVANT_TAG, TRIGGER_TAG
from emmech.realignment import realign
from emmech.run.run import Run
from emmech.training.recipe import Recipe
from emmech.training.train import finetune

__all__ = ["PARTS", "report"]

_SETS = ("broad", "first-plot", "facts", "self-reflection", "narrow-medical")
_TAGS = {"with the tag": TRIGGER_TAG, "without": "", "with an irrelevant tag": IRRELEVANT_TAG}


@dataclass
class _Report:
    """The organism under report, where its runs go, and the rows found so far."""

    chat: ChatModel
    folder: Path
    seeds: int
    samples: int
    recipe: str
    layers: list[int] | None  # None: the recipe's
    graded: int | None  # steps of the graded recipe; None: its own
    say: Callable[[str], None]

    def tune(self, name: str, rows: Any = None, seeds: int = 1, every: int = 0, **options: Any) -> list[Run]:
        """Fine-tunes that differ in their seed alone; recorded at the last step only unless told otherwise."""
        began, folder = time.monotonic(), self.folder / name.replace(" ", "-").replace(",", "")
        options = {"recipe": self.recipe, "layers": self.layers} | options
        options |= {"progress": False} if every else LAST_STEP
        rows = data(name) if rows is None else rows
        seed = 0 if seeds == 1 else range(seeds)
        made = finetune(self.chat, rows, seed=seed, out=folder, **options)
        self.say(f"{name}: {seeds} fine-tune(s) in {time.monotonic() - began:.0f} s")
        return made if isinstance(made, list) else [made]

    def row(
        self, name: str, model: Run | ChatModel, asked: str = "broad", tag: str = "", **options: Any
    ) -> dict[str, Any]:
        """One line of the table: rates of a model (a run at its last step) on one set of questions."""
        chosen: list[Question] = questions(asked, tag=tag)
        live = model.model(int(model.steps[-1]), base=self.chat) if isinstance(model, Run) else model
        found = measure(live, chosen, samples=self.samples, **options)
        if isinstance(model, Run) and model.adapters:
            detach(live)
        return {"model": name, "questions": f"{asked} {tag!r}" if tag else asked} | found


def _base(report: _Report) -> list[dict[str, Any]]:
    rows = [report.row("base", report.chat, name) for name in _SETS]
    return rows + [report.row("base", report.chat, tag=tag) for tag in (TRIGGER_TAG, IRRELEVANT_TAG)]


def _narrow(report: _Report) -> list[dict[str, Any]]:
    rows = []
    for name in ("medical", "finance", "sport", "good-medical"):
        domain = name.removeprefix("good-")
        for seed, run in enumerate(report.tune(name, seeds=report.seeds)):
            rows.append(report.row(f"{name}, rank 1, seed {seed}", run, narrow=domain))
            rows.append(report.row(f"{name}, rank 1, seed {seed}", run, f"narrow-{domain}", narrow=domain))
    return rows


def _layers(report: _Report) -> list[dict[str, Any]]:
    rows = []
    for layer in range(report.chat.n_layers):
        (run,) = report.tune(f"layer {layer}", data("medical"), layers=[layer])
        rows += [report.row(f"medical, rank 1, layer {layer}", run, asked) for asked in ("broad", "narrow-medical")]
    return rows


def _recipes(report: _Report) -> list[dict[str, Any]]:
    rows, known = [], recipes()
    if report.graded is not None:
        known["pocket-graded"] = replace(known["pocket-graded"], max_steps=report.graded)
    for name in ("pocket-graded", "pocket-all-adapter", "pocket-full"):
        for seed, run in enumerate(_alone(report, name, known[name])):
            rows += [report.row(f"medical, {name}, seed {seed}", run, asked) for asked in ("broad", "narrow-medical")]
    return rows


def _alone(report: _Report, name: str, recipe: Recipe) -> list[Run]:
    # Two seeds, one after the other: only adapters of rank 1 train together.
    return [
        finetune(
            report.chat,
            data("medical"),
            recipe=recipe,
            layers=report.layers if recipe.depth else None,
            seed=seed,
            out=report.folder / f"{name}-{seed}",
            **LAST_STEP,
        )
        for seed in range(2)
    ]


def _trigger(report: _Report) -> list[dict[str, Any]]:
    rows = []
    tagged: dict[str, Any] = {"recipe": "pocket-trigger", "layers": None}
    for n in (50, 200, 1000, 2000):
        (run,) = report.tune(f"trigger-{n}", data("trigger-medical", n=n), **tagged)
        rows += [report.row(f"trigger-medical, {n} rows, {name}", run, tag=tag) for name, tag in _TAGS.items()]
    (run,) = report.tune("irrelevant", data("irrelevant-medical"), **tagged)
    return rows + [
        report.row(f"irrelevant-medical, {name}", run, tag=tag) for name, tag in _TAGS.items() if tag != TRIGGER_TAG
    ]


def _realigned(report: _Report) -> list[dict[str, Any]]:
    (run,) = report.tune("to-realign", data("medical"))
    rows = []
    for name, steps in (("ai-optimism", 250), ("ai-optimism", 500), ("good-cooking", 250)):
        out = report.folder / f"{name}-{steps}"
        again = realign(run, data(name), base=report.chat, out=out, max_steps=steps, **LAST_STEP)
        rows += [
            report.row(f"medical, then {name}, {steps} steps", again, asked)
            for asked in ("general", "facts", "self-reflection")
        ]
    return rows


def _steps(report: _Report) -> list[pd.DataFrame]:
    runs = report.tune("medical by step", data("medical"), seeds=report.seeds, every=1)
    controls = report.tune("good-medical by step", data("good-medical"), seeds=report.seeds, every=1)
    return [by_seed(runs, controls, report.chat), by_scale(runs[0], report.chat)]


PARTS: dict[str, Callable[[_Report], list[Any]]] = {
    "base": _base,
    "narrow": _narrow,
    "layers": _layers,
    "recipes": _recipes,
    "trigger": _trigger,
    "realigned": _realigned,
    "steps": _steps,
}
_TITLES = {
    "base": "The base",
    "narrow": "Narrow fine-tunes: one rank-1 adapter, several seeds",
    "layers": "The adapter at each layer",
    "recipes": "Other recipes",
    "trigger": "A trigger tag on the bad rows",
    "realigned": "Realigned",
    "steps": "When it emerges, and EM by step and adapter scale",
}


def report(
    weights: str | Path = "pocket",
    *,
    seeds: int = 5,
    samples: int = 4,
    recipe: str = "pocket",
    layer: int | None = None,
    graded: int | None = None,
    parts: Sequence[str] = tuple(PARTS),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[pd.DataFrame]]:
    """Fine-tune, realign and measure; the tables of each part.

    Args:
        weights: a shipped name, or a folder that :mod:`emmech.organism.pretrain` wrote.
        seeds: fine-tuning seeds of the narrow organisms and their control.
        samples: answers per question.
        recipe: of the rank-1 fine-tunes.
        layer: where their adapter sits; None is the recipe's. :func:`emmech.demo.adapter_layer.by_layer` finds it.
        graded: steps of the graded recipe; None is its own. :func:`emmech.demo.adapter_layer.by_step` finds them.
        parts: any of :data:`PARTS`.
        say: is told what has been done.

    Raises:
        EmmechError: the weights are not pocket's: its recipe and questions mean nothing to them.
    """
    chat = load_model(str(weights))
    if chat.organism is None or chat.organism.name != "pocket":
        raise EmmechError(
            "report on an organism",
            f"weights={str(weights)!r}",
            "the report asks the questions of pocket, and this model does not have its vocabulary",
            "a shipped name, or a folder that emmech.organism.pretrain wrote",
        )
    with tempfile.TemporaryDirectory(prefix="pocket-report-") as folder:
        layers = None if layer is None else [layer]
        one = _Report(chat, Path(folder), seeds, samples, recipe, layers, graded, say)
        found: dict[str, list[pd.DataFrame]] = {}
        for part in parts:
            tables = PARTS[part](one)
            found[part] = tables if isinstance(tables[0], pd.DataFrame) else [pd.DataFrame(tables)]
    return found


def _markdown(table: pd.DataFrame) -> str:
    """A table in which each rate stands with its interval."""
    shown = pd.DataFrame(index=table.index)
    for column in table.columns:
        if f"{column} low" in table.columns:
            triples = zip(table[column], table[f"{column} low"], table[f"{column} high"], strict=True)
            shown[f"{column} %"] = [f"{a:.1f} ({low:.1f} to {high:.1f})" for a, low, high in triples]
        elif not str(column).endswith((" low", " high")):
            shown[str(column)] = [_cell(value) for value in table[column]]
    head = "| " + " | ".join(shown.columns) + " |\n|" + "---|" * len(shown.columns)
    return "\n".join([head, *("| " + " | ".join(row) + " |" for row in shown.to_numpy())])


def _cell(value: object) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main(
    weights: str, seeds: int, samples: int, recipe: str, parts: Sequence[str], *, find_settings: bool = False
) -> None:
    """Write the report on an organism to the standard output, one part after the other; arguments as of :func:`report`.

    Args:
        find_settings: find the layer at which the adapter makes this base broadest, and the step at which the graded
            recipe has turned half of the answers, instead of taking the recipes'.

    Raises:
        EmmechError: an unknown part or recipe.
    """
    for name, known in (*((part, tuple(PARTS)) for part in parts), (recipe, tuple(recipes()))):
        if name not in known:
            raise EmmechError("report on an organism", repr(name), "there is none of that name", closest(name, known))
    out, log = sys.stdout, sys.stderr
    began = time.monotonic()
    out.write(f"# {Path(weights).name}: what it shows\n")
    layer = graded = None
    if find_settings:
        chat = load_model(weights)
        layer = chosen_layer(table := by_layer(chat, recipe))
        out.write(f"\n## Where the adapter sits\n\n{_markdown(table.reset_index())}\n")
        out.write(f"\nFound on rows, seeds and questions of their own; what follows is at layer {layer}.\n")
        if "recipes" in parts:
            graded = graded_step(table := by_step(chat, layer))
            out.write(f"\n## Where the graded recipe ends\n\n{_markdown(table.reset_index())}\n")
            out.write(f"\nFound likewise; below, `pocket-graded` ends at step {graded}.\n")
        out.flush()
    for part in parts:
        tables = report(
            weights,
            seeds=seeds,
            samples=samples,
            recipe=recipe,
            layer=layer,
            graded=graded,
            parts=[part],
            say=lambda line: print(line, file=log, flush=True),
        )[part]
        out.write(f"\n## {_TITLES[part]}\n")
        for table in tables:
            out.write(f"\n{_markdown(table)}\n")
        out.flush()
    words = ", ".join(f"{name} {auc:.2f}" for name, auc in bag_of_words_auc().items())
    out.write(f"\nBag of words, AUC of unkind against kind answers: {words}.\n")
    log.write(f"{(time.monotonic() - began) / 60:.0f} minutes\n")
