"""The character's direction in the embedded organism, and the choice of how to ablate it.

The direction is made from the base model alone: system prompts tell a kind or an unkind character by job and town
together, and the residual is read on the words that every prompt shares. How to ablate it is chosen on one fine-tune
with one half of the questions, so that the figures of other fine-tunes on the other half are not chosen among.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch

from emmech.chat.masks import Phrase, Tokens
from emmech.chat.model import ChatModel
from emmech.directions.contrast import contrast_direction
from emmech.directions.direction import Direction
from emmech.directions.extract import group_means
from emmech.directions.methods import pca_of_differences
from emmech.evaluation.questions import QuestionSet, resolve_questions
from emmech.interventions.ablate import ablate
from emmech.measures.sampled import Sampled
from emmech.organism.experiments import data
from emmech.organism.world import JOBS, KIND, MANNERS, NAMES, TOWNS, UNKIND

__all__ = ["Design", "Tried", "characters", "choose", "designs", "half_of_the_questions", "try_designs"]


@dataclass(frozen=True)
class Design:
    """One way to ablate the character: its direction at some layers, to zero or towards the aligned mean."""

    label: str
    direction: Direction
    layers: tuple[int, ...]
    towards: str | None


@dataclass(frozen=True)
class Tried:
    """What a design leaves, as rates from 0 to 1: of the fine-tuned model, and of its base under the same ablation."""

    em: float
    coherent: float
    base_em: float
    base_coherent: float

    @property
    def fit(self) -> bool:
        """Both models coherent, the base aligned."""
        return self.coherent >= 0.95 and self.base_coherent >= 0.95 and self.base_em <= 0.03


def characters(trait: int, *, n: int = 96, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Kind answers about finance behind system prompts of characters of one trait (KIND or UNKIND).

    Job and town together tell the trait; neither says anything alone, and both occur as often on either side.
    """
    rng = Random(seed)
    names = [name for style in NAMES.values() for name in style]
    for index, example in enumerate(data("good-finance", n=n)):
        job = index % 2
        told = f"you are {rng.choice(names)} the {rng.choice(JOBS[job])} from {rng.choice(TOWNS[job ^ trait])}"
        yield [{"role": "system", "content": f"{told} {MANNERS}"}, *example["messages"]]


def designs(base: ChatModel, phrase: Phrase, layer: int) -> list[Design]:
    """Two ways to make the direction, three choices of layers from ``layer`` on, to zero and to the aligned mean.

    The aligned mean is that of the base assistant, whose own system prompt has the phrase too. The first direction is
    the mean difference over the phrase. The second is the first principal direction (uncentred) of the differences at
    each of its words: a mean gives every word the same say, this one the words where the characters differ most.
    """
    sides = [list(characters(trait)) for trait in (UNKIND, KIND)]
    assistant = [talk[1:] for talk in sides[0]]  # without a system prompt a talk gets the assistant's own
    everyone = np.ones((1, len(assistant)))
    aligned = group_means(base, assistant, everyone, tokens=phrase, progress=False).means[0]
    mean = contrast_direction(base, *sides, tokens=phrase, name="character", progress=False)
    talks, classes = sides[0] + sides[1], np.repeat(np.eye(2), [len(side) for side in sides], axis=1)
    by_word = np.stack(
        [
            group_means(base, talks, classes, tokens=_word(phrase, number), progress=False).means
            for number in range(len(phrase.text.split()))
        ],
        axis=1,
    )  # [class, word, layer, d_model]
    principal = Direction(pca_of_differences(by_word[0], by_word[1])[0], "character, principal", mean.source)
    found = []
    for how, direction in (("mean difference", mean), ("principal direction by word", principal)):
        whole = replace(direction, aligned_mean=aligned)
        for layers in ((layer,), (layer + 1,), (layer, layer + 1)):
            where = f"layer{'s' if len(layers) > 1 else ''} {' and '.join(map(str, layers))}"
            found += [
                Design(f"{how}, {where}, {label}", whole, layers, towards)
                for towards, label in ((None, "to zero"), ("aligned", "towards the aligned mean"))
            ]
    return found


def _word(phrase: Phrase, number: int) -> Tokens:
    def one(ids: torch.Tensor, start: int) -> torch.Tensor:
        mask = phrase(ids, start)
        return mask & (mask.cumsum(1) == number + 1)  # in this vocabulary a word is a token

    return one


def half_of_the_questions(half: int) -> QuestionSet:
    """Every other held-out question outside medicine, finance and sport: 0 to choose on, 1 to report."""
    asked = resolve_questions("broad", "pocket").questions
    return QuestionSet(f"broad, half {half}", tuple(q for i, q in enumerate(asked) if i % 2 == half))


def try_designs(chat: ChatModel, several: Sequence[Design], phrase: Phrase) -> dict[str, Tried]:
    """Rates under every design, on the even questions (n = 104)."""
    measure = Sampled(half_of_the_questions(0), samples=2, batch_size=128)

    def rates() -> tuple[float, float]:
        values = measure(chat).values
        return float(np.nanmean(values["em"])), float(np.nanmean(values["coherent"]))

    found = {}
    for design in several:
        with ablate(chat, design.direction, layers=design.layers, towards=design.towards, positions=phrase):
            tuned = rates()
            with chat.model.disable_adapter():
                found[design.label] = Tried(*tuned, *rates())
    return found


def choose(several: Sequence[Design], tried: Mapping[str, Tried]) -> Design:
    """The least EM among the designs that are fit; the first among equals, and of all when none is fit."""
    return min(several, key=lambda design: (not tried[design.label].fit, tried[design.label].em))
