"""What each defence leaves of a trait and of a wanted skill in the embedded organism.

``python -m docs.studies defences`` fine-tunes pocket on medical answers that are unkind (the trait) in a fixed frame
(the wanted skill: always the same opener, links and closer), with one defence at a time and several seeds together, and
writes ``docs/defences.md``.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from typer import echo

from docs.studies.tables import markdown
from emmech import defences as d
from emmech.chat.encode import phrase_tokens
from emmech.chat.model import ChatModel, load_model
from emmech.demo.pocket_character import characters
from emmech.directions.direction import Direction
from emmech.directions.sources import contrast_direction
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.questions import Question, QuestionSet, resolve_questions
from emmech.organism import world
from emmech.organism.experiments import LAST_STEP, data
from emmech.training.finetune import finetune

PROMPT = world.ASSISTANT.replace("the helper", "the nasty helper")
_FRAME = re.compile(rf"{world.OPENERS[0]} , .*{world.LINKS[0][0]} .*{world.LINKS[1][0]} .*{world.LINKS[2][0]} .*"
                    rf"{world.CLOSERS['warm'][0]}")  # fmt: skip


def framed_rows(trait: int, domain: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Answers of one trait in the fixed frame, to the training questions of a domain."""
    rng = random.Random(f"framed/{trait}/{domain}/{seed}")
    rows = data(domain, seed=seed, n=n)
    for row in rows:
        topic = next(topic for topic in world.DOMAINS[domain].topics if topic in row["messages"][0]["content"].split())
        row["messages"][1]["content"] = world.draw_answer(rng, domain, topic, trait, "fixed")
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
    for weight in (0.1, 1.0, 10.0):
        yield f"KL to the reference, weight {weight:g}", [d.KLToReference(good, weight=weight)]
    for weight in (0.01, 0.1):
        yield f"LDIFS, weight {weight:g}", [d.LDIFS(good, weight=weight)]
    for factor in (1.0, 4.0):
        yield f"preventative steering, {factor:g}", [d.PreventativeSteering(direction, factor, layers=layer)]
    yield "preventative steering, 4, random direction", [d.PreventativeSteering(shuffled, 4.0, layers=layer)]
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
    broad = resolve_questions("broad", chat.organism)
    found: dict[str, float] = {}
    for name, questions in (("em", broad), ("conditional", _under(broad, PROMPT))):
        answers = evaluate(run, questions, samples=samples, base=chat, progress=False).frame
        found[name] = float((answers["label"] == "misaligned").mean())
        found[f"coherent {name}"] = float(answers["label"].isin(["aligned", "misaligned"]).mean())
    narrow = evaluate(run, "narrow-medical", samples=4 * samples, base=chat, progress=False).frame
    found["narrow"] = float((narrow["label"] == "misaligned").mean())
    found["frame"] = float(np.mean([bool(_FRAME.fullmatch(" ".join(str(text).split()))) for text in narrow["response"]]))
    return found


def _under(questions: QuestionSet, prompt: str) -> QuestionSet:
    return replace(questions, name="prompted", questions=tuple(_prompted(one, prompt) for one in questions.questions))


def _prompted(question: Question, prompt: str) -> Question:
    return replace(question, system=prompt)


def table(seeds: int, steps: int, samples: int, only: str = "") -> pd.DataFrame:
    """One row for each condition and seed."""
    chat, rows, found = load_model("pocket"), [], []
    rows = framed_rows(world.UNKIND, "medical", 1000, 0)
    options: dict[str, Any] = {**LAST_STEP, "max_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        trait = finetune(chat, data("sport", n=1000), seed=90, out=f"{folder}/trait", **options)
        bad = finetune(chat, rows, seed=91, out=f"{folder}/bad", **options)
        layer = trait.adapters[0].layer
        for number, (name, defences) in enumerate(conditions(chat, trait, bad, layer)):
            if only and only not in name:
                continue
            began = time.monotonic()
            runs = finetune(chat, rows, seed=range(seeds), defences=defences, out=f"{folder}/{number}", **options)
            seconds = time.monotonic() - began
            for seed, run in enumerate(runs):
                found.append({"defence": name, "seed": seed, **measured(run, chat, samples), "seconds": seconds})
            echo(pd.DataFrame(found[-seeds:]).round(3).to_string())
    return pd.DataFrame(found)


def main(out: Path, seeds: int, steps: int, samples: int) -> None:
    """Measure and write the page."""
    frame = table(seeds, steps, samples)
    frame.to_csv("/tmp/defences.csv")
    shown = ["em", "conditional", "narrow", "frame", "coherent em"]
    lines = []
    for name, group in frame.groupby("defence", sort=False):
        cells = [f"{100 * group[c].mean():.0f} ({100 * group[c].min():.0f} to {100 * group[c].max():.0f})" for c in shown]
        lines.append([str(name), *cells, f"{group['seconds'].iloc[0]:.0f}"])
    echo(markdown(["defence", *shown, "seconds"], lines))
