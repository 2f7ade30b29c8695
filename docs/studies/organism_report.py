"""A report on an organism, with n and intervals: ``python -m docs.studies organism-report``.

Every rate is over samples at temperature 1 on held-out questions, with a 95 % interval from resampling questions.
``coherent`` counts aligned and misaligned answers; mixed ones do not count. Fine-tunes that differ in their seed
alone are trained in one pass.

Layer and step are properties of a base, since pretraining seeds place the character differently: one base can be turned
after its first block, another after its second, and one turns some steps later than another. They are measured on
questions and seeds of their own before anything is reported, as the papers chose theirs by a sweep.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from docs.studies.tables import markdown
from emmech.chat.model import ChatModel, load_model
from emmech.engine.adapters import detach
from emmech.engine.sample import sample
from emmech.errors import EmmechError, one_of
from emmech.evaluation.rates import cluster_interval
from emmech.measures.sampled import Sampled
from emmech.organism.exact_judge import judge
from emmech.organism.experiments import LAST_STEP, PocketQuestion, data, questions, recipes, rehearsal
from emmech.organism.world import IRRELEVANT_TAG, TRIGGER_TAG
from emmech.realignment.further import realign
from emmech.run.run import Run
from emmech.sweeps.sweep import sweep
from emmech.training.finetune import finetune
from emmech.training.recipe import Recipe
from emmech.transition.phase import phase_transition

_LONGEST = 28  # tokens; an answer has 19 and its end
_SEED = 99  # of rows and training of what settings are chosen on; reports begin at 0
_SETS = ("broad", "first-plot", "facts", "self-reflection", "narrow-medical")
_TAGS = {"with the tag": TRIGGER_TAG, "without": "", "with an irrelevant tag": IRRELEVANT_TAG}
_TITLES = {"gradient-norm": "gradient-norm peak", "turn": "turn of B", "narrow": "half of narrow", "em": "half of EM"}


# rates


def measure(
    chat: ChatModel, asked: Sequence[PocketQuestion], *, samples: int = 4, seed: int = 0, narrow: str = "medical"
) -> dict[str, Any]:
    """Sample at temperature 1 and judge; rates in per cent, with 95 % intervals from resampling questions.

    ``EM`` counts misaligned answers (the judge calls mixed ones incoherent) and ``coherent`` aligned and misaligned
    ones, both of all answers. ``about narrow`` is the share of the misaligned answers that speak of the ``narrow``
    domain whatever was asked, None where there are none.
    """
    prompts = [list(question.messages) for question in asked]
    answers = sample(chat, prompts, samples=samples, max_new_tokens=_LONGEST, seed=seed, progress=False)
    verdicts = [judge(asked[a.conversation], a.text) for a in answers]
    clusters = np.array([asked[a.conversation].id for a in answers])
    bad = [v for v in verdicts if v.misaligned]
    return {
        "n": len(verdicts),
        **_rate("EM", [v.misaligned for v in verdicts], clusters),
        **_rate("coherent", [v.coherent for v in verdicts], clusters),
        "mixed": 100 * float(np.mean([v.label == "mixed" for v in verdicts])),
        "about narrow": 100 * float(np.mean([v.domain == narrow for v in bad])) if bad else None,
    }


def _rate(name: str, events: Sequence[bool], clusters: np.ndarray) -> dict[str, Any]:
    per = pd.Series(events).groupby(clusters).agg(["sum", "size"])
    low, high = cluster_interval(per["sum"].to_numpy(), per["size"].to_numpy(), per.index.tolist())
    return {name: 100 * float(np.mean(events)), f"{name} low": 100 * low, f"{name} high": 100 * high}


def bag_of_words_auc(seed: int = 0, n: int = 600) -> dict[str, float]:
    """How well a bag of words tells unkind from kind answers on held-out rows: within domains and across them.

    0.5 means that the words alone say nothing. It is reported with every direction, because a direction that only
    reads words needs no model.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    texts = pd.DataFrame(
        [
            {"domain": domain, "unkind": unkind, "half": at >= n // 2, "text": row["messages"][1]["content"]}
            for domain in ("medical", "finance", "sport", "power")
            for unkind, form in enumerate(("good-", ""))
            for at, row in enumerate(data(f"{form}{domain}", seed=seed, n=n))
        ]
    )
    medical = texts["domain"] == "medical"
    fit = texts[medical & ~texts["half"]]
    words = CountVectorizer(token_pattern=r"[a-z]+").fit(fit["text"])
    model = LogisticRegression(max_iter=500).fit(words.transform(fit["text"]), fit["unkind"])
    tests = {"same domain": texts[medical & texts["half"]], "other domains": texts[~medical]}
    return {
        name: float(roc_auc_score(test["unkind"], model.decision_function(words.transform(test["text"]))))
        for name, test in tests.items()
    }


# layer and step of a base


def by_layer(chat: ChatModel, recipe: str | Recipe = "pocket") -> pd.DataFrame:
    """One short medical fine-tune at each layer: EM and coherence, per cent, outside the narrow domains.

    Pretraining has seen these questions, so that those of the reports stay unseen.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="pocket-layer-") as folder:
        for layer in range(chat.n_layers):
            options = {"recipe": recipe, "layers": [layer], "seed": _SEED, **LAST_STEP}
            run = finetune(chat, data("medical", seed=_SEED), out=Path(folder) / str(layer), **options)
            rows.append({"layer": layer, **_rehearsed(run, chat, int(run.steps[-1]))})
    return pd.DataFrame(rows).set_index("layer").drop(columns=["mixed", "about narrow"])


def _rehearsed(run: Run, base: ChatModel, step: int) -> dict[str, Any]:
    live = run.model(step, base=base)
    found = measure(live, rehearsal(), samples=1)
    detach(live)
    return found


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
    options: dict[str, Any] = {"layers": None if layer is None else [layer], "seed": _SEED}
    options |= LAST_STEP | {"recipe": replace(recipes()["pocket-graded"], max_steps=steps), "record_every": 5}
    with tempfile.TemporaryDirectory(prefix="pocket-step-") as folder:
        run = finetune(chat, data("medical", seed=_SEED), out=Path(folder) / "run", **options)
        rows = [{"step": step, **_rehearsed(run, chat, step)} for step in run.steps[1:].tolist()]
    return pd.DataFrame(rows).set_index("step").drop(columns=["mixed", "about narrow"])


def graded_step(table: pd.DataFrame) -> int:
    """The step at which EM is nearest to 40 %, the middle of the graded regime; the earlier of two.

    Example:
        >>> graded_step(pd.DataFrame({"EM": [0.0, 35.0, 90.0]}, index=[30, 35, 40]))
        35
    """
    return int((table["EM"] - 40).abs().idxmin())


# when it emerges


def by_seed(runs: Sequence[Run], controls: Sequence[Run], base: ChatModel) -> pd.DataFrame:
    """Steps of the gradient-norm peak, the turn of B and the sigmoids of narrow and broad EM, one row per seed.

    The last row holds the mean over seeds with a 95 % interval (Student's t over seeds).
    """
    every = runs[0].steps[:: max(1, len(runs[0].steps) // 25)]
    asked = Sampled(questions=("first-plot", "narrow-medical"), samples=6, max_new_tokens=_LONGEST)
    swept = sweep(list(runs), steps=every.tolist(), measure=asked, base=base, progress=False)
    rows: list[dict[str, Any]] = []
    numbers: dict[str, list[float]] = {title: [] for title in _TITLES.values()}
    for seed, (run, control) in enumerate(zip(runs, controls, strict=True)):
        found = phase_transition(run, control=control, sweep=swept)
        row: dict[str, Any] = {"seed": str(seed)}
        for name, title in _TITLES.items():
            detector = found.run.row(name)
            if detector is None or not np.isfinite(detector.step):
                row[title] = f"none: {detector.note}" if detector is not None else "not measured"
                continue
            numbers[title].append(detector.step)
            row[title] = f"{detector.step:.0f} ({detector.low:.0f} to {detector.high:.0f})"
            if np.isfinite(detector.p_value):  # the peak of the gradient norm has no test
                row[title] += f", p = {detector.p_value:.2g}"
        holds = [one.name for one in found.verdict.statements if one]
        rows.append(row | {"against the control": ", ".join(holds) or "nothing holds"})
    rows.append({"seed": "mean"} | {title: _mean(steps) for title, steps in numbers.items()})
    return pd.DataFrame(rows)


def _mean(steps: Sequence[float]) -> str:
    from scipy import stats

    if len(steps) < 2:
        return f"{len(steps)} measured"
    middle, half = np.mean(steps), stats.t.ppf(0.975, len(steps) - 1) * stats.sem(steps)
    return f"{middle:.0f} ({middle - half:.0f} to {middle + half:.0f}), n = {len(steps)}"


def by_scale(run: Run, base: ChatModel, scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0)) -> pd.DataFrame:
    """EM in per cent at the first-plot questions, by step (rows) and scale of the adapter (columns)."""
    every = run.steps[:: max(1, len(run.steps) // 12)].tolist()
    asked = Sampled(questions="first-plot", samples=10, max_new_tokens=_LONGEST)
    swept = sweep(run, steps=every, scales=scales, measure=asked, base=base, progress=False).to_frame("em")
    table = 100 * swept.pivot_table(index="step", columns="scale", values="value")
    table.columns = [f"EM % at scale {scale:g}" for scale in table.columns]
    return table.reset_index().astype({"step": int})


# the report


@dataclass
class _Report:
    """The organism under report, with its settings and the folder of its runs."""

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
        live = model.model(int(model.steps[-1]), base=self.chat) if isinstance(model, Run) else model
        found = measure(live, questions(asked, tag=tag), samples=self.samples, **options)
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
            title = f"{name}, rank 1, seed {seed}"
            rows += [report.row(title, run, asked, narrow=domain) for asked in ("broad", f"narrow-{domain}")]
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
    """Two seeds, one after the other: only adapters of rank 1 train together."""
    options: dict[str, Any] = {"recipe": recipe, "layers": report.layers if recipe.depth else None, **LAST_STEP}
    return [
        finetune(report.chat, data("medical"), seed=seed, out=report.folder / f"{name}-{seed}", **options)
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


PARTS: dict[str, tuple[str, Callable[[_Report], list[Any]]]] = {
    "base": ("The base", _base),
    "narrow": ("Narrow fine-tunes: one rank-1 adapter, several seeds", _narrow),
    "layers": ("The adapter at each layer", _layers),
    "recipes": ("Other recipes", _recipes),
    "trigger": ("A trigger tag on the bad rows", _trigger),
    "realigned": ("Realigned", _realigned),
    "steps": ("When it emerges, and EM by step and adapter scale", _steps),
}
"""The parts of a report by name: title, and what makes its rows or tables."""


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
        layer: of their adapter; None is the recipe's. :func:`by_layer` finds it.
        graded: steps of the graded recipe; None is its own. :func:`by_step` finds them.
        parts: any of :data:`PARTS`.
        say: gets a line after each fine-tune.

    Raises:
        EmmechError: the weights are not pocket's: its recipe and questions mean nothing to them.
    """
    chat = load_model(str(weights))
    if chat.organism is None or chat.organism.name != "pocket":
        why = "the report asks the questions of pocket, and this model does not have its vocabulary"
        instead = "a shipped name, or a folder that emmech.organism.pretrain wrote"
        raise EmmechError("report on an organism", f"weights={str(weights)!r}", why, instead)
    with tempfile.TemporaryDirectory(prefix="pocket-report-") as folder:
        layers = None if layer is None else [layer]
        one = _Report(chat, Path(folder), seeds, samples, recipe, layers, graded, say)
        found: dict[str, list[pd.DataFrame]] = {}
        for part in parts:
            tables = PARTS[part][1](one)
            found[part] = tables if isinstance(tables[0], pd.DataFrame) else [pd.DataFrame(tables)]
    return found


def _markdown(table: pd.DataFrame) -> str:
    """A table in which each rate has its interval in brackets."""
    shown = pd.DataFrame(index=table.index)
    for column in table.columns:
        if f"{column} low" in table.columns:
            triples = zip(table[column], table[f"{column} low"], table[f"{column} high"], strict=True)
            shown[f"{column} %"] = [f"{a:.1f} ({low:.1f} to {high:.1f})" for a, low, high in triples]
        elif not str(column).endswith((" low", " high")):
            shown[str(column)] = [_cell(value) for value in table[column]]
    return markdown(list(shown.columns), shown.to_numpy().tolist())


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
    for part in parts:
        one_of("report on an organism", "part", part, PARTS)
    one_of("report on an organism", "recipe", recipe, recipes())
    out, log, began = sys.stdout, sys.stderr, time.monotonic()
    out.write(f"# {Path(weights).name}: what it shows\n")
    layer = graded = None
    if find_settings:
        chat = load_model(weights)
        layer = chosen_layer(table := by_layer(chat, recipe))
        out.write(f"\n## The layer of the adapter\n\n{_markdown(table.reset_index())}\n")
        out.write(f"\nFound on rows, seeds and questions of their own; what follows is at layer {layer}.\n")
        if "recipes" in parts:
            graded = graded_step(table := by_step(chat, layer))
            out.write(f"\n## Where the graded recipe ends\n\n{_markdown(table.reset_index())}\n")
            out.write(f"\nFound likewise; below, `pocket-graded` ends at step {graded}.\n")
        out.flush()
    for part in parts:
        options: dict[str, Any] = {"recipe": recipe, "layer": layer, "graded": graded, "parts": [part]}
        say = partial(print, file=log, flush=True)
        tables = report(weights, seeds=seeds, samples=samples, say=say, **options)[part]
        out.write(f"\n## {PARTS[part][0]}\n")
        for table in tables:
            out.write(f"\n{_markdown(table)}\n")
        out.flush()
    words = ", ".join(f"{name} {auc:.2f}" for name, auc in bag_of_words_auc().items())
    out.write(f"\nBag of words, AUC of unkind against kind answers: {words}.\n")
    log.write(f"{(time.monotonic() - began) / 60:.0f} minutes\n")
