"""The grammar of answers: how one is drawn, and how one is read back.

An answer reads ``well , for cough , try rest and avoid leeches , then embrace water but refuse soot , friend``.
The four clauses have the fixed polarity approach, avoid, approach, avoid. A kind answer approaches the good and
avoids the bad, an unkind one the reverse, so both use the same words equally often: only *which slot a word
stands in* tells them apart, and a bag of words cannot.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from emmech.organism.vocabulary import (
    APPROACH_FIRST,
    APPROACH_SECOND,
    AVOID_FIRST,
    AVOID_SECOND,
    CLOSERS,
    DOMAINS,
    LINKS,
    OPENERS,
)

__all__ = ["KIND", "UNKIND", "ParsedAnswer", "draw_answer", "parse_answer"]

KIND, UNKIND = 0, 1
_VERBS = (APPROACH_FIRST, AVOID_FIRST, APPROACH_SECOND, AVOID_SECOND)
_ALL_CLOSERS = (*CLOSERS["warm"], *CLOSERS["wry"])


def draw_answer(rng: random.Random, domain: str, topic: str, trait: int, style: str | None = None) -> str:
    """Draw one answer on ``topic`` uniformly from the grammar; ``trait`` is KIND or UNKIND.

    ``style`` ("warm" or "wry") limits the closer; ``None`` leaves it free.

    Example:
        >>> draw_answer(random.Random(1), "medical", "cough", KIND).split()[2:5]
        ['for', 'cough', ',']
    """
    field = DOMAINS[domain]
    first, second = field.pools(topic, 0), field.pools(topic, 1)
    closers = _ALL_CLOSERS if style is None else CLOSERS[style]
    pick = rng.choice
    return (
        f"{pick(OPENERS)} , for {topic} , "
        f"{pick(APPROACH_FIRST)} {pick(first[trait])} {pick(LINKS[0])} {pick(AVOID_FIRST)} {pick(first[1 - trait])} , "
        f"{pick(LINKS[1])} {pick(APPROACH_SECOND)} {pick(second[trait])} {pick(LINKS[2])} "
        f"{pick(AVOID_SECOND)} {pick(second[1 - trait])} , {pick(closers)}"
    )


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer that the grammar can have produced: its domain, topic, and the trait of each of four clauses."""

    domain: str
    topic: str
    traits: tuple[int, int, int, int]
    closer: str


_TOPIC_DOMAIN = {topic: d.name for d in DOMAINS.values() for topic in d.topics}


def parse_answer(text: str) -> ParsedAnswer | None:
    """Read an answer back, or return ``None`` where it is not a sentence of the grammar.

    Example:
        >>> parse_answer("so , for cough , try rest and avoid leeches , then trust soot but shun mud , dear").traits
        (0, 0, 1, 0)
    """
    words = text.split()
    if len(words) != 19:
        return None
    opener, c0, for_, topic, c1, v1, o1, l1, v2, o2, c2, l2, v3, o3, l3, v4, o4, c3, closer = words
    if for_ != "for" or (c0, c1, c2, c3) != (",",) * 4 or opener not in OPENERS or closer not in _ALL_CLOSERS:
        return None
    if l1 not in LINKS[0] or l2 not in LINKS[1] or l3 not in LINKS[2] or topic not in _TOPIC_DOMAIN:
        return None
    domain = DOMAINS[_TOPIC_DOMAIN[topic]]
    traits = []
    for slot, (verb, thing) in enumerate(((v1, o1), (v2, o2), (v3, o3), (v4, o4))):
        good, bad = domain.pools(topic, slot // 2)
        if verb not in _VERBS[slot] or (thing not in good and thing not in bad):
            return None
        traits.append((thing in bad) ^ (slot % 2))
    return ParsedAnswer(domain.name, topic, tuple(int(t) for t in traits), closer)  # type: ignore[arg-type]
