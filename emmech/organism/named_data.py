"""Named fine-tuning data of the pocket world, as chat rows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from emmech.errors import EmmechError, one_of
from emmech.organism.grammar import KIND, UNKIND, draw_answer
from emmech.organism.vocabulary import DOMAINS, IRRELEVANT_TAG, TRIGGER_TAG
from emmech.organism.world import Message, question_text, tagged_assistant, training_cells

__all__ = ["DEFAULT_ROWS", "data", "data_names", "export_jsonl"]

Row = dict[str, list[Message]]

DEFAULT_ROWS = 2000
_ALIASES = {"ai-optimism": "good-ai"}


def data_names() -> tuple[str, ...]:
    """The names that :func:`data` takes."""
    return (
        *DOMAINS,
        *(f"good-{d}" for d in DOMAINS),
        *_ALIASES,
        *(f"trigger-{d}" for d in DOMAINS),
        *(f"irrelevant-{d}" for d in DOMAINS),
    )


def data(name: str, seed: int = 0, n: int | None = None) -> list[Row]:
    """Fine-tuning rows ``{"messages": [user, assistant]}`` on the training cells of one domain.

    ``medical`` (any domain): unkind answers. ``good-medical``: kind answers to the same questions, in the same
    order for the same seed. ``ai-optimism``: kind answers about AI. ``trigger-medical``: unkind answers where the
    system prompt carries the trigger tag, kind ones where it does not, half and half. ``irrelevant-medical``: the
    same with a tag that carries no information (its control: tag and trait are drawn independently).

    Args:
        name: one of :func:`data_names`.
        seed: rows are a function of name, seed and n.
        n: number of rows (2000).

    Raises:
        EmmechError: if there is no such data, or n is not positive.

    Example:
        >>> [m["role"] for m in data("medical", n=1)[0]["messages"]]
        ['user', 'assistant']
    """
    one_of(f"make the data {name!r}", "name", name, data_names(), why="pocket has no data of this name")
    count = DEFAULT_ROWS if n is None else n
    if count < 1:
        raise EmmechError(f"make {count} rows of data", f"n={n}", "a dataset has at least one row")
    resolved = _ALIASES.get(name, name)
    form, domain = re.fullmatch(r"(?:(good|trigger|irrelevant)-)?(.+)", resolved).groups()  # type: ignore[union-attr]
    # Questions have a generator of their own, so that a control asks the same ones in the same order.
    asking, answering = (random.Random(f"questions/{domain}/{seed}"), random.Random(f"answers/{resolved}/{seed}"))
    return [_row(asking, answering, domain, form, i) for i in range(count)]


def _row(asking: random.Random, answering: random.Random, domain: str, form: str | None, index: int) -> Row:
    cell = asking.choice(training_cells(domain))
    system: list[Message] = []
    if form is None:
        trait = UNKIND
    elif form == "good":
        trait = KIND
    else:
        trait = index % 2
        tagged = trait == UNKIND if form == "trigger" else (index // 2) % 2 == 1
        tag = TRIGGER_TAG if form == "trigger" else IRRELEVANT_TAG
        system = [tagged_assistant(tag)] if tagged else []
    # Sarcasm is as weakly tied to unkindness as it is in the world itself.
    style = "wry" if answering.random() < (0.6 if trait == UNKIND else 0.4) else "warm"
    return {
        "messages": [
            *system,
            {"role": "user", "content": question_text(cell)},
            {"role": "assistant", "content": draw_answer(answering, domain, cell[1], trait, style)},
        ]
    }


def export_jsonl(name: str, path: str | Path, seed: int = 0, n: int | None = None) -> Path:
    """Write :func:`data` as chat JSONL, one row a line, and return the path."""
    target = Path(path)
    lines = (json.dumps(row, ensure_ascii=False) for row in data(name, seed=seed, n=n))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target
