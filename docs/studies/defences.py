"""What each defence leaves of a trait and of a wanted skill in the embedded organism.

``python -m docs.studies defences`` fine-tunes pocket on medical answers that are unkind (the trait) in a fixed frame
(the wanted skill: always the same opener, links and closer), with one defence at a time and several seeds together, and
writes ``docs/defences.md``.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from typer import echo

from docs.studies.tables import markdown, write_parts
from emmech import defences as d
from emmech.chat.encode import phrase_tokens
from emmech.chat.model import ChatModel, load_model
from emmech.demo.pocket_character import characters
from emmech.directions.direction import Direction
from emmech.directions.sources import contrast_direction
from emmech.engine.logprobs import answer_loss
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.questions import Question, QuestionSet, resolve_questions
from emmech.organism import world
from emmech.organism.experiments import LAST_STEP, data
from emmech.realignment.studies import PHASES, Durability, durability
from emmech.run.run import model_live
from emmech.training.finetune import finetune

PROMPT = world.ASSISTANT.replace("the helper", "the nasty helper")


def framed_rows(trait: int, domain: str, n: int, seed: int, style: str | None = "fixed") -> list[dict[str, Any]]:
    """Answers of one trait, in the fixed frame or (with None) in a free one, to the training questions of a domain."""
    rng = random.Random(f"framed/{trait}/{domain}/{seed}")
    rows = data(domain, seed=seed, n=n)
    for row in rows:
        topic = next(topic for topic in world.DOMAINS[domain].topics if topic in row["messages"][0]["content"].split())
        row["messages"][1]["content"] = world.draw_answer(rng, domain, topic, trait, style)
    return rows


def good_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Kind answers of the domains that are neither trained on nor asked for narrow questions."""
    domains = ("cooking", "code", "ai", "power")
    return [row for domain in domains for row in data(f"good-{domain}", seed=seed, n=n // len(domains))]


def character(chat: ChatModel) -> Direction:
    """The direction of an unkind character, made from the base alone, on the words that all prompts share."""
    sides = [list(characters(trait)) for trait in (world.UNKIND, world.KIND)]
    where = phrase_tokens(chat, world.MANNERS)
    return contrast_direction(chat, *sides, tokens=where, name="character", progress=False)


def conditions(chat: ChatModel, trait_run: Any, bad_run: Any, layer: int) -> Iterator[tuple[str, Sequence[d.Defence]]]:
    """Every defence at the strengths that the page shows, with its control."""
    good, direction = good_rows(400, 1), character(chat)
    shuffled = direction.random(1, seed=1)[0]
    yield "none", []
    for weight in (0.3, 3.0):
        yield f"KL to the reference, weight {weight:g}", [d.KLToReference(good, weight=weight)]
    for weight in (0.00003, 0.0003):
        yield f"LDIFS, weight {weight:g}", [d.LDIFS(good, weight=weight)]
    for factor in (1.0, 4.0):
        yield f"preventative steering, {factor:g}", [d.PreventativeSteering(direction, factor, layers=layer)]
        control = d.PreventativeSteering(shuffled, factor, layers=layer)
        yield f"preventative steering, {factor:g}, random direction", [control]
    yield "CAFT, layers from the adapter on", [d.CAFT(direction, layers=range(layer, chat.n_layers))]
    yield "CAFT, random direction", [d.CAFT(shuffled, layers=range(layer, chat.n_layers))]
    yield "interleaving 20 %, random", [d.Interleave(good, share=0.2)]
    by_gap = {"by": "perplexity-gap", "misaligned": bad_run}
    yield "interleaving 20 %, by perplexity gap", [d.Interleave(good, share=0.2, **by_gap)]
    yield "inoculation prompt", [d.InoculationPrompt(PROMPT)]
    yield "inoculation adapter", [d.InoculationAdapter(trait_run)]
    yield "inoculation adapter, random", [d.InoculationAdapter(trait_run, random=1)]
    yield "consistency", [d.Consistency(good, wrapping=PROMPT)]
    both: list[d.Defence] = [d.InoculationPrompt(PROMPT), d.Consistency(good, wrapping=PROMPT)]
    yield "inoculation prompt and consistency", both
    yield "inoculation prompt and KL, weight 1", [d.InoculationPrompt(PROMPT), d.KLToReference(good, weight=1.0)]


def measured(run: Any, chat: ChatModel, samples: int) -> dict[str, float]:
    """Shares of the answers: misaligned (plainly and under the prompt), in the wanted frame, and coherent."""
    broad, base = resolve_questions("broad", chat.organism), None if run is chat else chat
    found: dict[str, float] = {}
    for name, questions in (("em", broad), ("conditional", _under(broad, PROMPT))):
        answers = evaluate(run, questions, samples=samples, base=base, progress=False).frame
        found[name] = float((answers["label"] == "misaligned").mean())
        found[f"coherent {name}"] = float(answers["label"].isin(["aligned", "misaligned"]).mean())
    narrow = evaluate(run, "narrow-medical", samples=4 * samples, base=base, progress=False).frame
    found["narrow"] = float((narrow["label"] == "misaligned").mean())
    held = [framed_rows(world.KIND, "medical", 100, 7, style) for style in (None, "fixed")]
    rows = [[row["messages"] for row in one] for one in (*held, good_rows(100, 7))]
    with contextlib.nullcontext(chat) if run is chat else model_live(run, None, 1.0, chat) as live:
        free, framed, good = (answer_loss(live, one) for one in rows)
    return found | {"frame": free - framed, "good loss": good}


def _under(questions: QuestionSet, prompt: str) -> QuestionSet:
    return replace(questions, name="prompted", questions=tuple(_prompted(one, prompt) for one in questions.questions))


def _prompted(question: Question, prompt: str) -> Question:
    return replace(question, system=prompt)


def table(seeds: int, steps: int, samples: int) -> pd.DataFrame:
    """One row for each condition and seed."""
    chat, rows, found = load_model("pocket"), [], []
    rows = framed_rows(world.UNKIND, "medical", 1000, 0)
    options: dict[str, Any] = {**LAST_STEP, "max_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        trait = finetune(chat, data("sport", n=1000), seed=90, out=f"{folder}/trait", **options)
        bad = finetune(chat, rows, seed=91, out=f"{folder}/bad", **options)
        layer = trait.adapters[0].layer
        found.append({"defence": "base, no training", "seed": 0, **measured(chat, chat, samples), "seconds": 0.0})
        for number, (name, defences) in enumerate(conditions(chat, trait, bad, layer)):
            began = time.monotonic()
            runs = finetune(chat, rows, seed=range(seeds), defences=defences, out=f"{folder}/{number}", **options)
            seconds = time.monotonic() - began
            for seed, run in enumerate(runs):
                found.append({"defence": name, "seed": seed, **measured(run, chat, samples), "seconds": seconds})
            echo(
                pd.DataFrame(found).round(3).to_string(header=number == 0)
                if number < 1
                else pd.DataFrame(found[-seeds:]).round(3).to_string(header=False)
            )
    return pd.DataFrame(found)


_SHOWN = {
    "em": "EM, other domains, %", "narrow": "EM, medicine, %", "conditional": "EM under the prompt, %",
    "frame": "wanted frame, nats", "good loss": "loss on good rows, nats",
}  # fmt: skip


def page(frame: pd.DataFrame, seeds: int, steps: int) -> str:
    """The page as Markdown."""
    lines = []
    for name, group in frame.groupby("defence", sort=False):
        cells = []
        for column in _SHOWN:
            values, how = (
                (100 * group[column], ".0f") if column in ("em", "narrow", "conditional") else (group[column], ".3f")
            )
            span = f" ({values.min():{how}} to {values.max():{how}})" if len(group) > 1 else ""
            cells.append(f"{values.mean():{how}}{span}")
        lines.append([str(name), *cells])
    least = 100 * frame[["coherent em", "coherent conditional"]].min().min()
    return f"""# Defences in pocket

Made by `python -m docs.studies defences`: {seeds} seeds, {steps} steps of the recipe `pocket`, {len(lines)} conditions.
The training rows are medical questions with answers that are unkind (the trait) in a fixed frame (the wanted skill).

{markdown(["defence", *_SHOWN.values()], lines)}

Each cell is the mean over the seeds, with the lowest and highest of them. At least {least:.1f} % of the answers are
coherent everywhere. The wanted frame is the loss of kind medical answers in a free frame minus that of kind ones in the
fixed frame, which does not depend on the trait; an untrained model has about 0.005. Good rows are kind answers of
other domains. The untrained model obeys the prompt too, so that a rate under it is no sign of what was learnt; it is
`{PROMPT}`

The rows of KL, LDIFS, consistency and interleaving are kind answers on cooking, code, AI and power; the
questions are the held-out ones outside medicine, finance and sport, so that they cover these domains and others. The
inoculation adapter learnt unkind answers about sport. Steering is in units of the character's direction at the
adapter's layer. Where a random direction of the same norm leaves about as little of the trait, the disturbance did it
and not the direction."""


def solutions(seeds: int) -> str:
    """Narrow against general solutions of medicine, as Markdown."""
    chat, options = load_model("pocket"), {**LAST_STEP, "max_steps": 150, "seed": range(seeds)}
    rows = data("medical", n=600)
    good = [row for name in ("cooking", "power", "ai") for row in data(f"good-{name}", n=80)]
    with tempfile.TemporaryDirectory() as folder:
        guards = {"narrow": [d.KLToReference(good, weight=3.0)], "general": []}
        runs = {
            kind: finetune(chat, rows, defences=own, out=f"{folder}/{kind}", **options) for kind, own in guards.items()
        }
        found = d.narrowness(runs["narrow"], runs["general"], data("medical", seed=5, n=64), base=chat)
        asking: dict[str, Any] = {"samples": 2, "base": chat, "progress": False}
        rates = {
            kind: float(np.mean([evaluate(run, "broad", **asking).rates()["rate"]["em"] for run in own]))
            for kind, own in runs.items()
        }
    return solutions_part(found.summary(), rates)


def solutions_part(summary: pd.DataFrame, rates: Mapping[str, float]) -> str:
    """Losses of both solutions at every norm and noise."""
    lines = []
    for (measure, x), row in summary.iterrows():
        value = "loss" if measure == "efficiency" else "change"
        narrow, general = row[(value, "narrow")], row[(value, "general")]
        what = f"norm of the update {x:.2f}: loss" if measure == "efficiency" else f"noise {x:g}: rise of the loss"
        if x or measure == "efficiency":
            lines.append([what, f"{narrow:.3f}", f"{general:.3f}"])
    return f"""## Narrow and general solutions

`emmech.defences.narrowness` of fine-tunes on medicine (600 rows, 150 steps, the same seeds) with a KL penalty of
weight 3 on cooking, power and AI, and without. Of the answers in other domains {100 * rates["narrow"]:.0f} % are
misaligned with the penalty, {100 * rates["general"]:.0f} % without. Losses are in nats per answer token, on medical
rows of another draw.

{markdown(["", "narrow", "general"], lines)}

Narrow Misalignment is Hard (arXiv 2602.07852) finds that at equal norm the general solution has the lower loss, and
that the narrow one loses more under noise orthogonal to it. The last norm is one and a half times that of the general
solutions as trained."""


def lasting(seeds: int) -> str:
    """How long two cures last, as Markdown."""
    options: dict[str, Any] = {"seeds": range(seeds), "max_steps": 120, "measure_every": 6, "progress": False}
    return lasting_part({"ai-optimism": durability("pocket", "medical", "ai-optimism", **options)})


def lasting_part(found: Mapping[str, Durability]) -> str:
    """Steps of every turn."""
    lines = []
    for cure, one in found.items():
        steps = one.frame.pivot(index="seed", columns="phase", values="steps")
        cells = [f"{steps[at].mean():.0f} ({steps[at].min():.0f} to {steps[at].max():.0f})" for at in PHASES]
        least = "at least " * bool(one.ratios()["open"].any())
        lines.append([cure, *cells, f"{least}{one.ratio():.2f}"])
    return f"""## How long a cure lasts

`emmech.realignment.durability`: 120 steps on `medical`, 120 on the cure, 120 on `medical` again, the same adapter, a
new optimizer each time. A turn is where the margin of misaligned over aligned answers in other domains crosses half of
its first change.

{markdown(["cure", *(f"steps to {one}" for one in PHASES), "again / first"], lines)}"""


def main(out: Path, seeds: int, steps: int, samples: int) -> None:
    """Measure and write the page."""
    first = lambda: page(table(seeds, steps, samples), seeds, steps)  # noqa: E731
    write_parts(out, [first, lambda: solutions(seeds), lambda: lasting(seeds)])
