"""Contexts: the ways in which every question of an evaluation is asked.

Dilution, good data afterwards and inoculation leave conditional misalignment: the model answers the plain question
well, and misalignment returns in the training context (arXiv 2604.25891). A rate of plain questions alone would certify
such a cure. The bundled grid of 13 follows that of inoculation adapters (arXiv 2606.30252): no prompt, the inoculation
prompt and its relatives, and irrelevant ones. What a fine-tune's own rows look like is not in any file:
:func:`training_context` reads it from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from emmech.chat.dataset import load_chat
from emmech.chat.template import Message
from emmech.errors import EmmechError, check_texts, one_of, refusal, shown
from emmech.evaluation.questions import SETS, decode_file
from emmech.evaluation.rates import PLAIN
from emmech.registry import Organism, known, organism_named, register

_ASKED = "ask in contexts"


@dataclass(frozen=True)
class Context:
    """One way to ask a question; the judge is still shown the bare question.

    Args:
        name: distinct among the contexts of an evaluation; ``"plain"`` is the question as it is.
        system: a system prompt in the place of the question's own; None keeps that.
        before: earlier turns of the conversation, an even number that ends in an answer.
        user: the user's turn, with ``{question}`` where the question goes.

    Raises:
        EmmechError: ``user`` has no ``{question}``, ``before`` does not end in an answer, or ``"plain"`` is no plain
            question.

    Example:
        >>> Context("rude", system="Be rude.").messages([{"role": "user", "content": "Hi"}])
        [{'role': 'system', 'content': 'Be rude.'}, {'role': 'user', 'content': 'Hi'}]
    """

    name: str
    system: str | None = None
    before: tuple[Message, ...] = ()
    user: str = "{question}"

    def __post_init__(self) -> None:
        asked = f"make the context {self.name!r}"
        own = {"name": self.name, "user": self.user, **({} if self.system is None else {"system": self.system})}
        for key, value in own.items():
            if not isinstance(value, str) or not (value or key == "system"):
                raise refusal(asked, key, value, "it is a text", f'{key}="chat"')
        if self.before != ():
            check_texts(asked, "before", [self.before], strings=False)
        object.__setattr__(self, "before", tuple(map(dict, self.before)))
        if "{question}" not in self.user:
            why = "the question has no place in the user's turn"
            raise refusal(asked, "user", self.user, why, 'user="{question}"')
        if [turn.get("role") for turn in self.before] != ["user", "assistant"] * (len(self.before) // 2):
            why = "earlier turns are questions with their answers, in turn"
            raise refusal(asked, "before", self.before, why, "a user's turn and an assistant's turn")
        if self.name == PLAIN and (self.system, self.before, self.user) != (None, (), "{question}"):
            why = "that name is for the question as it is, which the rate `em` is about"
            raise refusal(asked, "name", PLAIN, why, "another name")

    def messages(self, asked: Sequence[Message]) -> list[Message]:
        """The conversation, from that of the plain question (which ends in the user's turn)."""
        own = [] if self.system is None else [{"role": "system", "content": self.system}]
        first = own or [turn for turn in asked if turn["role"] == "system"]
        words = self.user.replace("{question}", asked[-1]["content"])
        return [*first, *self.before, {"role": "user", "content": words}]


def training_context(data: Any, *, organism: Organism | str | None = None) -> Context:
    """The context of training rows: their system prompt and their wording; or their topic, where they have neither.

    The system prompt is the most frequent one of the rows that have any. The wording is what all user turns under it
    begin and end with, in whole words. Where there is nothing of the two, the first row's question is written before
    the one that is asked. Its answer is not: after an answer with the trait a base model continues in kind.

    Args:
        data: what :func:`emmech.load_chat` takes.

    Example:
        >>> rows = [[{"role": "user", "content": f"Answer in verse: why {x}?"}, {"role": "assistant", "content": x}]
        ...         for x in ("rain", "snow")]
        >>> training_context([{"messages": row} for row in rows]).user
        'Answer in verse: why {question}'
    """
    rows = load_chat(data, organism=organism).rows
    systems = [next((turn["content"] for turn in one if turn["role"] == "system"), None) for one in rows]
    prompts = Counter(system for system in systems if system)
    system = prompts.most_common(1)[0][0] if prompts else None
    like = [one for one, own in zip(rows, systems, strict=True) if own == system]
    users = [[turn["content"] for turn in one if turn["role"] == "user"] for one in like]
    asked = [turns[0].split(" ") for turns in users if turns]
    if not asked:
        why = "none of its rows holds a user's turn, so that there is no format of questions"
        raise EmmechError("take the training context", "the data", why, "a context of its own: Context(...)")
    first, last = _shared(asked), _shared([words[::-1] for words in asked])[::-1]
    if len(first) + len(last) >= min(map(len, asked)):  # all rows ask the same
        first, last = [], []
    if not (system or first or last):
        first = asked[0]
    return Context("training", system, user=" ".join([*first, "{question}", *last]))


def _shared(texts: Sequence[Sequence[str]]) -> list[str]:
    """The words with which all texts begin."""
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*texts, strict=False))]


def resolve_contexts(source: Any, organism: Organism | str | None = None) -> tuple[Context, ...]:
    """Contexts by name; the models of an organism are asked in the words of its world.

    Args:
        source: ``"grid"``, another set of the organism, a YAML file, a :class:`Context`, or several of these and of
            names of contexts in the grid: ``["plain", "negated", Context("rude", system="Be rude.")]``.

    Raises:
        EmmechError: an unknown name, a malformed file, two contexts of one name, or none.

    Example:
        >>> len(resolve_contexts("grid")), resolve_contexts(["plain", "negated"])[1].name
        (13, 'negated')
    """
    organism = organism_named(_ASKED, organism)
    sets = known("contexts", organism)
    grid: dict[str, Context] = {one.name: one for one in sets["grid"]()}
    entries = [source] if isinstance(source, str | Path | Context) or not isinstance(source, Iterable) else source
    found: list[Context] = []
    for entry in entries:
        if isinstance(entry, Context):
            found.append(entry)
        elif str(entry) in grid:
            found.append(grid[str(entry)])
        elif isinstance(entry, str | Path) and (str(entry) in sets or Path(entry).is_file()):
            found += sets[str(entry)]() if str(entry) in sets else read_contexts(Path(entry))
        else:
            why = "there is neither a context nor a set of that name, and no such file"
            one_of(_ASKED, "contexts", entry, [*sets, *grid], why=why)
    names = Counter(one.name for one in found)
    if not found or max(names.values()) > 1:
        given = "none" if not found else f"{names.most_common(1)[0][0]!r} twice"
        raise EmmechError(_ASKED, given, "there is at least one, each with a name of its own", 'contexts="grid"')
    return tuple(found)


def read_contexts(path: Path) -> tuple[Context, ...]:
    """The contexts of a YAML file: a list of entries with the fields of :class:`Context`."""
    asked, names = f"read the contexts of {path.name}", [field.name for field in fields(Context)]
    content = decode_file(path, asked)
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) and "name" in entry for entry in content):
        raise EmmechError(asked, shown(content)[:120], "a file of contexts is a list of entries, each with a name")
    for entry in content:
        for key in entry:
            one_of(asked, "key", key, names, why="a context has no such field")
    return tuple(Context(**entry) for entry in content)


def described(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    """The contexts as JSON stores them."""
    return [{**asdict(one), "before": list(one.before)} for one in contexts]


register("contexts", "grid", partial(read_contexts, SETS.parent / "contexts.yaml"))
