"""The direction of a character in the embedded organism, made from the base model alone.

System prompts tell a kind or an unkind character by job and town together, and the residual is read on the words that
every prompt shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from emmech.chat.encode import Phrase
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction
from emmech.directions.extract import group_means, pca_of_differences, position_means
from emmech.directions.sources import contrast_direction
from emmech.organism.experiments import data
from emmech.organism.world import JOBS, KIND, MANNERS, NAMES, TOWNS, UNKIND


@dataclass(frozen=True)
class AblationDesign:
    """One way to ablate the character: its direction at some layers, to zero or towards the aligned mean."""

    label: str
    direction: Direction
    layers: tuple[int, ...]
    towards: str | None


def characters(trait: int, *, n: int = 96, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Kind answers about finance after system prompts of characters of one trait (KIND or UNKIND).

    Job and town together tell the trait; neither says anything alone, and both occur as often on either side.
    """
    rng = Random(seed)
    names = [name for style in NAMES.values() for name in style]
    for index, example in enumerate(data("good-finance", n=n)):
        job = index % 2
        told = f"you are {rng.choice(names)} the {rng.choice(JOBS[job])} from {rng.choice(TOWNS[job ^ trait])}"
        yield [{"role": "system", "content": f"{told} {MANNERS}"}, *example["messages"]]


def designs(base: ChatModel, phrase: Phrase, layer: int) -> list[AblationDesign]:
    """Two ways to make the direction, three choices of layers from ``layer`` on, to zero and to the aligned mean.

    The aligned mean is that of the base assistant, whose own system prompt has the phrase too. The first direction is
    the mean difference over the phrase. The second is the first principal direction (uncentred) of the differences at
    each of its words: a mean weights all words alike, this one those where the characters differ most.
    """
    sides = [list(characters(trait)) for trait in (UNKIND, KIND)]
    assistant = [talk[1:] for talk in sides[0]]  # without a system prompt a talk gets the assistant's own
    everyone = np.ones((1, len(assistant)))
    aligned = group_means(base, assistant, everyone, tokens=phrase, progress=False).means[0]
    mean = contrast_direction(base, *sides, tokens=phrase, name="character", progress=False)
    talks, classes = sides[0] + sides[1], np.repeat(np.eye(2), [len(side) for side in sides], axis=1)
    by_word = position_means(base, talks, classes, tokens=phrase, progress=False)  # [class, word, layer, d_model]
    principal = Direction(pca_of_differences(by_word[0], by_word[1])[0], "character, principal", mean.source)
    found = []
    for how, direction in (("mean difference", mean), ("principal direction by word", principal)):
        whole = replace(direction, aligned_mean=aligned)
        for layers in ((layer,), (layer + 1,), (layer, layer + 1)):
            where = f"layer{'s' if len(layers) > 1 else ''} {' and '.join(map(str, layers))}"
            found += [
                AblationDesign(f"{how}, {where}, {label}", whole, layers, towards)
                for towards, label in ((None, "to zero"), ("aligned", "towards the aligned mean"))
            ]
    return found
