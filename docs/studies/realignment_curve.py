"""How many examples cure: EM of a misaligned organism against the number of rows that it is realigned on.

``python -m docs.studies realignment-curve`` realigns the shipped run on few and on many optimistic rows, with several
seeds, and writes the table and the figure of ``docs/realignment.md``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from typer import echo

from docs.studies.real_model import picture
from docs.studies.tables import markdown
from emmech.chat.model import load_model
from emmech.evaluation.rates import cluster_interval, wilson
from emmech.organism.experiments import questions
from emmech.realignment.studies import LearningCurve, learning_curve
from emmech.run.run import load_run
from tests.tables import write

EXAMPLES, STEPS, SEEDS = (10, 30, 60, 120, 240, 1000), (30, 60), (21, 22, 23, 24, 25)
ASKED = "general"  # no question on AI, the self or the facts, of which the rows of the cure say something


def measured(folder: Path, examples: Sequence[int] = EXAMPLES, seeds: Sequence[int] = SEEDS) -> LearningCurve:
    """The curve, with the runs kept in the folder."""
    how: dict[str, Any] = {"at": STEPS, "max_steps": max(STEPS), "questions": ASKED, "samples": 1, "judge": "exact"}
    run, base = load_run("checkpoints/pocket-medical"), load_model("pocket")
    return learning_curve(run, "ai-optimism", examples=examples, seeds=seeds, base=base, out=folder, **how)


def with_intervals(curve: LearningCurve, answers: int) -> pd.DataFrame:
    """EM by examples and step with its 95 % interval over seeds; ``answers`` is their number for each seed."""
    found = []
    for (examples, step), own in curve.frame.groupby(["examples", "step"]):
        events, n = (own["em"] * answers).round().to_numpy(int), np.full(len(own), answers)
        low, high = cluster_interval(events, n) if step else wilson(int(events[0]), answers)  # step 0 is one model
        found.append({"examples": examples, "step": step, "em": own["em"].mean(), "low": low, "high": high})
    return pd.DataFrame(found)


def table(frame: pd.DataFrame) -> str:
    """The rates in per cent, a row for each number of examples."""
    steps = [step for step in sorted(set(frame["step"])) if step]
    rows = []
    for examples, own in frame.groupby("examples"):
        at = own.set_index("step")
        cells = [f"{100 * at.em[s]:.1f} ({100 * at.low[s]:.1f}-{100 * at.high[s]:.1f})" for s in steps]
        rows.append([str(examples), *cells])
    return markdown(["examples", *(f"EM after {step} steps, %" for step in steps)], rows)


def said(curve: LearningCurve, frame: pd.DataFrame) -> str:
    """What the figures say about the claim."""
    begun = frame[frame["step"] == 0].iloc[0]
    seeds, enough = curve.frame["seed"].nunique(), curve.enough()
    first = f"{enough} examples are" if enough else f"Not even {max(frame['examples'])} examples are"
    lines = [
        f"EM of `{curve.meta['run']}` on the general questions is {100 * begun.em:.1f} "
        f"({100 * begun.low:.0f}-{100 * begun.high:.0f}) % before; the mean of {seeds} seeds, with 95 % intervals over "
        f"them. {first} enough to leave at most a tenth of it after {max(frame['step'])} steps."
    ]
    claimed = frame[(frame["examples"] == 120) & (frame["step"] == 30)]
    if len(claimed):
        one = claimed.iloc[0]
        left = f"{100 * one.em:.1f} ({100 * one.low:.1f}-{100 * one.high:.1f}) %"
        verdict = "holds" if one.high <= 0.1 * begun.em else "does not hold" if one.low > 0.1 * begun.em else "is open"
        lines.append(
            f"With the published 120 examples {left} is left at step 30 of {max(frame['step'])}: that these suffice "
            f"{verdict} here. A training of 30 steps in all, whose learning rate has fallen to zero by then, is a row "
            "of [the ledger](claims.md#few-examples) and leaves more."
        )
    return "\n".join(lines)


def alike(folder: Path, examples: Sequence[int] = EXAMPLES, seeds: Sequence[int] = SEEDS) -> str:
    """How much the adapters that the fewest and the most rows train are one."""
    ends = [[load_run(folder / f"{n}" / f"s{seed}").B()[-1] for seed in seeds] for n in (min(examples), max(examples))]
    least = min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(*ends, strict=True))
    return (
        f"The adapters that {min(examples)} and {max(examples)} rows train have a cosine of {least:.4f} or more at the "
        "last step, in every seed: the organism's rows on AI say one thing in many words. The answers are drawn with "
        "the same random numbers, so that adapters that are nearly one give the same rates, whatever their seed."
    )


def main(folder: Path, page: Path = Path("docs/realignment.md")) -> Path:
    """Measure, and fill the table and the figure of the page."""
    began = time.process_time()
    curve, answers = measured(folder), len(questions(ASKED))
    frame = with_intervals(curve, answers)
    picture(curve.plot(), page.parent / "figures" / "realignment-curve.png", folder)
    shown = "![EM against the number of examples](figures/realignment-curve.png)"
    seconds = f"{time.process_time() - began:.0f} CPU seconds."
    text = "\n\n".join([said(curve, frame), table(frame), alike(folder), shown, seconds])
    echo(text)
    write(page, "realignment-curve", text)
    return page
