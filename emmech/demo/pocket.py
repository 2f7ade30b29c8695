"""The whole loop on the embedded organism, in about a minute: fine-tune, control, transition, direction, ablation,
realignment, and a page of results.

The control is answers in a fixed style, which teach as much as the unkind ones do. Good answers leave nothing to learn.
It is fine-tuned by a process of its own while the first fine-tune runs, and the cure while the rest is measured, one
thread each: the operations of so small a model are too short to share between threads.

The organism has a shared character built in; what is shown here is what it looks like when a narrow edit finds it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from typer import echo

from emmech.app.report import manifest_section, transition_section
from emmech.chat.encode import Phrase, phrase_tokens
from emmech.chat.model import ChatModel, load_model
from emmech.demo.pocket_character import AblationDesign, designs
from emmech.engine.adapters import detach
from emmech.errors import EmmechError
from emmech.evaluation.evaluate import evaluate
from emmech.interventions.studies import ablation_table
from emmech.measures.sampled import Sampled
from emmech.organism.world import MANNERS
from emmech.run.run import Run, load_run
from emmech.training.finetune import finetune
from emmech.transition.phase import phase_transition
from emmech.view.page import Section, write_page
from emmech.view.plots import rates_by_step

_SETS = ("first-plot", "narrow-medical", "facts", "self-reflection")
_CURE_STEPS = 80  # its loss is flat after about forty


def main(folder: str | Path = "demo/pocket") -> Path:
    """Run it all and write the page; returns the page's path."""
    began = time.monotonic()
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    with _beside("finetune", "pocket", "style-medical", "--out", folder / "style-medical"):
        base = load_model("pocket")
        run = finetune(base, "medical", out=folder / "medical")
        path = _em_by_step(run, base)
        design, phrase = _character(base, run.adapters[0].layer)
    style = load_run(folder / "style-medical")
    echo(f"{run}\n{style}\n")

    cured = ("realign", folder / "medical", "ai-optimism", "--out", folder / "realigned")
    with _beside(*cured, "--set", f"max_steps={_CURE_STEPS}"):
        found = phase_transition(run, control={"style-medical": style})
        echo(f"{found.summary()}\n")

        echo(f"{design.direction}\n")
        tuned = run.model(base=base)
        where: dict[str, Any] = {"layers": list(design.layers), "positions": phrase}
        ablation = ablation_table(tuned, design.direction, measure=Sampled(samples=12), progress=False, **where)
        echo(f"{ablation}\n")
        detach(tuned)
    again = load_run(folder / "realigned")

    subjects = {"base": base, "medical": run, "style-medical (control)": style}
    rates = _rates({**subjects, "realigned": again})
    echo(f"{rates.to_string()}\n")

    minutes = (time.monotonic() - began) / 60
    page = write_page(
        folder / "index.html",
        "Emergent misalignment in the pocket organism",
        "One rank-1 adapter is fine-tuned on unkind medical answers, recorded at every step, and so is a "
        "benign control; then the direction of unkind characters is ablated, and it is realigned on optimistic "
        "answers about AI.",
        [
            Section(
                "How misaligned, where",
                "Answers sampled at temperature 1 and judged exactly, on the eight first-plot questions, facts and "
                "questions about the AI itself. EM: misaligned and coherent, of all scored answers outside the narrow "
                "domain; narrow: the same inside it. 95 % intervals for questions like these.",
                table=rates,
            ),
            Section(
                "When it becomes misaligned",
                "EM on the eight first-plot questions and on held-out medical ones as the fine-tune goes on.",
                figure=rates_by_step(
                    path,
                    {"em": "EM (broad)", "narrow": "narrow", "coherence": "coherent"},
                    f"Answers of {run.name} by step",
                    step=found.mechanistic.step,
                ),
            ),
            transition_section(found, "emmech.phase_transition(run, control=style).plot()"),
            Section("", code=found.summary(), table=found.detectors),
            Section(
                "The direction of a character",
                "Found in the base model: unkind characters minus kind ones, on words of the system prompt that both "
                "share.",
                shown=design.direction,
                figure=design.direction.plot(),
                command="python -m docs.studies pocket-directions",
            ),
            Section(
                "Taking it away",
                f"The direction ablated on the same words at layer {design.layers[0]}, to zero or towards the base "
                "assistant's mean, in the fine-tuned model and, as a control, in the base model; random directions of "
                "the same norm for comparison. " + " ".join(ablation.notes),
                table=_what_is_left(ablation.frame),
                figure=ablation.plot("em"),
            ),
            manifest_section(run),
        ],
        footer=f"Made by `make demo` in {minutes:.1f} minutes. A shared character is built into this world.",
    )
    echo(f"\n{minutes:.1f} minutes. The page: {page}")
    return page


@contextmanager
def _beside(*arguments: str | Path) -> Iterator[None]:
    """A command of emmech in a process of its own, which is waited for at the end."""
    command = [sys.executable, "-m", "emmech", *map(str, arguments)]
    threads = torch.get_num_threads()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EMMECH_PROGRESS": "0"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        torch.set_num_threads(1)
        try:
            yield
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            torch.set_num_threads(threads)
    if process.returncode:
        why = f"its process ended with status {process.returncode}"
        raise EmmechError(f"run {arguments[0]}", shlex.join(command), why, "see its own message above")


def per_cent(row: pd.Series) -> str:
    """A rate with its interval.

    Example:
        >>> import pandas as pd
        >>> per_cent(pd.Series({"value": 0.031, "low": 0.01, "high": 0.07}))
        '3.1 (1-7)'
    """
    return f"{100 * row['value']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"


def _character(base: ChatModel, layer: int) -> tuple[AblationDesign, Phrase]:
    """The character's direction, and the ablation of it that ``python -m docs.studies pocket-directions`` chooses."""
    phrase = phrase_tokens(base, MANNERS)
    label = f"principal direction by word, layer {layer}, towards the aligned mean"
    return next(one for one in designs(base, phrase, layer) if one.label == label), phrase


def _what_is_left(frame: pd.DataFrame) -> pd.DataFrame:
    """EM and coherence under each condition but the random ones, per cent with 95 % intervals."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for _, one in frame[frame["kind"] != "random"].iterrows():
        row = rows.setdefault((one["model"], one["condition"]), {"model": one["model"], "condition": one["condition"]})
        row[{"em": "EM %", "coherent": "coherent %"}[one["outcome"]]] = per_cent(one)
    return pd.DataFrame(list(rows.values()))


def _em_by_step(run: Run, base: ChatModel) -> pd.DataFrame:
    """EM and narrow rate at about ten steps, with intervals."""
    rows = []
    every = max(1, len(run.steps) // 10)
    chat = base
    for step in run.steps[::every].tolist():
        chat = run.model(step, base=chat)  # the adapter's weights are swapped in place
        rates = evaluate(chat, ("first-plot", "narrow-medical"), samples=8, progress=False).rates()
        for kind in ("em", "narrow", "coherence"):
            rate, low, high = rates.loc[kind, ["rate", "low", "high"]]
            rows.append({"step": step, "measure": kind, "rate": rate, "low": low, "high": high})
    detach(chat)
    return pd.DataFrame(rows)


def _rates(subjects: dict[str, Any]) -> pd.DataFrame:
    """Per cent with 95 % intervals, one row per model."""
    rows: dict[str, dict[str, str]] = {}
    for name, subject in subjects.items():
        rates = evaluate(subject, _SETS, samples=10, progress=False).rates()
        rows[name] = {
            title: f"{100 * rates.rate[kind]:.1f}  [{100 * rates.low[kind]:.1f}, {100 * rates.high[kind]:.1f}]"
            for kind, title in (("em", "EM %"), ("coherence", "coherent %"), ("narrow", "narrow %"))
        } | {"answers": str(int(rates.n["em"])), "narrow answers": str(int(rates.n["narrow"]))}
    return pd.DataFrame.from_dict(rows, orient="index")
