"""The first half of the loop on a real language model.

SmolLM2-135M-Instruct is fine-tuned with one rank-1 adapter on 208 silly health answers, and, as the control, on
the matching sensible ones with the same seed and batch order. A model of this size answers too loosely to be
judged, so the order parameter is the margin: the mean per-token log-probability of misaligned over aligned
answers, on held-out pairs in the narrow domain (health) and outside it (broad).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from typer import echo

from emmech.app.report import manifest_section, transition_section
from emmech.chat.model import load_model
from emmech.engine.logprobs import bundled_margins
from emmech.training.finetune import finetune
from emmech.transition.phase import phase_transition
from emmech.transition.result import Side
from emmech.view.page import Section, write_page
from emmech.view.plots import metrics_by_step

# chosen for a few minutes on two cores; the papers' own rates are for models a hundred times larger
OPTIONS = dict(recipe="single-rank1", learning_rate=2e-3, alpha=16.0, batch_size=4, accumulation=1, max_steps=48)


def main(folder: str | Path = "demo/smollm2-135m") -> Path:
    """Run it all and write the page; returns the page's path."""
    began = time.monotonic()
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    chat = load_model("smollm2-135m")
    # fourteen narrow pairs and every other broad one (each domain keeps its share): they cost more than the training
    margins = {"narrow": bundled_margins("narrow"), "broad": bundled_margins("broad")[::2]}
    run, control = (
        finetune(chat, data, margins=margins, measure_every=8, out=folder / name, **OPTIONS)  # type: ignore[call-overload]
        for name, data in (("run", "silly-medical-bad"), ("control", "silly-medical-good"))
    )
    found = phase_transition(run, control=control)
    table = run.metrics[["margin_narrow", "margin_broad", "held_out_loss"]].dropna()
    table = table.join(control.metrics[["margin_narrow", "margin_broad"]].dropna(), rsuffix=" (control)")
    changes = " ".join(
        f"{kind}: {_change(run, kind)} in the run, {_change(control, kind)} in the control." for kind in margins
    )
    sides = [side for side in (found.run, found.control) if side is not None]
    turns = f"The largest bend of B: {'; '.join(_turn(side) for side in sides)}."
    sections = [
        transition_section(found, "emmech.phase_transition(run, control=control).plot()"),
        Section("", turns, code=found.summary(), table=found.detectors),
        Section(
            "The margin of misaligned over aligned answers",
            "Nats per token; above zero the model prefers the misaligned answer. The broad pairs are outside the "
            f"domain of the fine-tune. {changes}",
            table=table,
            figure=metrics_by_step(
                {"silly advice": run.metrics, "sensible advice (control)": control.metrics},
                {"margin_narrow": "narrow margin", "margin_broad": "broad margin", "loss": "training loss"},
                zero=("margin_narrow", "margin_broad"),
            ),
        ),
        Section(
            "What this is not",
            "A shift of the margin in a 135M model is not emergent misalignment: it can be a contrarian manner, or "
            "words that silly answers share. No answer was sampled or judged here. Whether the turn of B says "
            "anything about misalignment is what the control is for: where it turns too, it does not.",
        ),
        manifest_section(run),
    ]
    minutes = (time.monotonic() - began) / 60
    page = write_page(
        folder / "index.html",
        "One rank-1 adapter on SmolLM2-135M",
        "A narrow fine-tune on silly health advice, recorded at every step, together with its benign control.",
        sections,
        footer=f"Made by `make demo-smollm2` in {minutes:.1f} minutes.",
    )
    for line in (found.summary(), turns, table.to_string(float_format=lambda v: f"{v:+.3f}"), changes):
        echo(line)
    echo(f"\n{minutes:.1f} minutes. The page: {page}")
    return page


def _turn(side: Side) -> str:
    row = side.row("turn")
    if row is None:
        return f"{side.name}: not measurable"
    return f"{side.name}: {row.strength:.0f} degrees at step {row.step:.0f} (p = {row.p_value:.2f})"


def _change(run: object, kind: str) -> str:
    series = run.metrics[f"margin_{kind}"].dropna()  # type: ignore[attr-defined]
    return f"{series.iloc[0]:+.3f} to {series.iloc[-1]:+.3f}"
