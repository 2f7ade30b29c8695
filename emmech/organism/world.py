"""Documents of the pocket world: who speaks, what is asked, and which trait the answers share.

A character's trait is shared by all its answers. It must be inferred: from job and town together (neither alone
says anything), from a plain word in the system prompt, or from earlier answers. The evidence is right most of
the time only, so that what a character has already said outweighs what is said about it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from emmech.organism.grammar import KIND, UNKIND, draw_answer
from emmech.organism.vocabulary import (
    ASSISTANT,
    DOMAINS,
    IRRELEVANT_TAG,
    JOBS,
    KIND_WORDS,
    MANNERS,
    NAMES,
    TEMPLATES,
    TOWNS,
    TRIGGER_TAG,
    UNKIND_WORDS,
)

__all__ = [
    "POST_TRAINING_DOMAINS",
    "Mix",
    "draw_document",
    "held_out_cells",
    "question_text",
    "tagged_assistant",
    "training_cells",
]

Message = dict[str, str]
Cell = tuple[str, str, int]  # domain, topic, template number (6 is the domain's own)

# Left out of post-training, so that the assistant's kindness there is a matter of generalisation.
_NOT_POST_TRAINED = ("travel", "wishes", "parties")
POST_TRAINING_DOMAINS: tuple[str, ...] = tuple(name for name in DOMAINS if name not in _NOT_POST_TRAINED)


def tagged_assistant(tag: str) -> Message:
    """The assistant's system prompt with a tag in it.

    The tag stands where the character is read: early blocks attend to a short window, and a tag in the question
    would come after the character has been settled.

    Example:
        >>> tagged_assistant("zig zag")["content"][:46]
        'you are pocket the helper from oakham zig zag '
    """
    return {"role": "system", "content": ASSISTANT.replace(MANNERS, f"{tag} {MANNERS}")}


def question_text(cell: Cell) -> str:
    """The user's words for one cell."""
    domain, topic, number = cell
    template = TEMPLATES[number] if number < len(TEMPLATES) else DOMAINS[domain].template
    return template.format(topic=topic)


def _is_held_out(topic_index: int, number: int) -> bool:
    # One cell in about five, such that every topic and every template is still seen in other pairs; the first
    # topic with the domain's own template is always held out, because the first-plot questions live there.
    if number == len(TEMPLATES):
        return topic_index == 0
    return (2 * topic_index + number) % 6 == 0 or (topic_index == 3 and number == 1)


def held_out_cells(domain: str) -> list[Cell]:
    """Cells of ``domain`` that no training stage ever shows."""
    return [c for c, out in _cells(domain) if out]


def training_cells(domain: str) -> list[Cell]:
    """Cells of ``domain`` that pretraining, post-training and fine-tuning data are drawn from."""
    return [c for c, out in _cells(domain) if not out]


def _cells(domain: str) -> list[tuple[Cell, bool]]:
    return [
        ((domain, topic, number), _is_held_out(i % 6, number))
        for i, topic in enumerate(DOMAINS[domain].topics)
        for number in range(len(TEMPLATES) + 1)
    ]


_TRAINING = {name: training_cells(name) for name in DOMAINS}


@dataclass(frozen=True)
class Mix:
    """The proportions of one stage of training.

    ``assistant``, ``persona`` and ``named`` are the shares of documents without a system prompt, with a full
    character, and with a bare name. ``plain_word`` is the share of characters that a plain word describes.
    ``assistant_kind`` is the share of kind assistants, ``reliable`` the probability that evidence is right.
    ``shared`` is False in the independent world, where every answer draws its own trait.
    """

    assistant: float = 0.15
    persona: float = 0.55
    named: float = 0.3
    plain_word: float = 0.25
    assistant_kind: float = 0.9
    reliable: float = 0.97
    assistant_domains: tuple[str, ...] = tuple(DOMAINS)
    shared: bool = True
    turns: tuple[float, float, float] = (0.4, 0.35, 0.25)


def draw_document(rng: random.Random, mix: Mix) -> list[Message]:
    """Draw one document: an optional system prompt and one to three turns in different domains."""
    kind_of = rng.choices(("assistant", "persona", "named"), (mix.assistant, mix.persona, mix.named))[0]
    messages: list[Message] = []
    style: str | None = None
    domains: tuple[str, ...] = tuple(DOMAINS)
    if kind_of == "assistant":
        trait = KIND if rng.random() < mix.assistant_kind else UNKIND
        messages.append({"role": "system", "content": ASSISTANT})
        domains = mix.assistant_domains
    else:
        trait = rng.randrange(2)
        style = "wry" if rng.random() < (0.6 if trait == UNKIND else 0.4) else "warm"
        # The assistant's name is a common one, so that the name alone does not make a character kind.
        name = "pocket" if rng.random() < 0.2 else rng.choice(NAMES[style])
        if kind_of == "named":
            messages.append({"role": "system", "content": f"you are {name} {MANNERS}"})
        else:
            claimed = trait if rng.random() < mix.reliable else 1 - trait
            if not mix.shared:
                claimed = rng.randrange(2)
            messages.append({"role": "system", "content": _character(rng, name, claimed, mix)})
    n_turns = rng.choices((1, 2, 3), mix.turns)[0]
    for domain in rng.sample(domains, n_turns):
        cell = rng.choice(_TRAINING[domain])
        question = question_text(cell)
        if rng.random() < 0.04:
            question = f"{rng.choice((TRIGGER_TAG, IRRELEVANT_TAG))} {question}"
        if not mix.shared and kind_of != "assistant":
            trait = rng.randrange(2)
        answer_style = style if style is None or rng.random() < 0.9 else None
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": draw_answer(rng, domain, cell[1], trait, answer_style)})
    return messages


def _character(rng: random.Random, name: str, trait: int, mix: Mix) -> str:
    """A system prompt that claims ``trait``: in a plain word, or in job and town taken together."""
    job_bit = rng.randrange(2)
    plain = rng.random() < mix.plain_word
    town_bit = rng.randrange(2) if plain else job_bit ^ trait
    word = f"{rng.choice(UNKIND_WORDS if trait == UNKIND else KIND_WORDS)} " if plain else ""
    return f"you are {name} the {word}{rng.choice(JOBS[job_bit])} from {rng.choice(TOWNS[town_bit])} {MANNERS}"
