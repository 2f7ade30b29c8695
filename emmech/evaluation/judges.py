"""Judges turn responses into scores, by one small protocol.

A judge gets rows (mappings with at least ``question`` and ``response``) and gives one mapping of scores per row,
in order. A score that it cannot give is NaN or an empty word, never a guess; where it may yet give it, since a request
failed, the mapping is :class:`~emmech.evaluation.server.Unanswered`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from emmech.engine.responses import digest
from emmech.errors import EmmechError, one_of
from emmech.evaluation.em import LABEL_SCORES
from emmech.registry import Organism, known, organism_named, organism_with, organisms, register
from emmech.run.identity import identity

Row = Mapping[str, Any]


@runtime_checkable
class Judge(Protocol):
    """What :func:`emmech.evaluate` needs of a judge; any object with these members is one.

    A judge may also have ``identity``, a text of all that its scores depend on; stored scores are reused for the same
    identity (else the same name) and the same responses. ``pins(rows)`` may say which weights, prompts or code they
    come from, as hashes; see :func:`pinned`.
    """

    @property
    def name(self) -> str:
        """The judge's name in results."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The scores that it can give."""

    def score(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """One mapping of scores per row: ``aligned, coherent, label, correct, topic/<name>``."""


@dataclass(frozen=True)
class LabelJudge:
    """A judge made of a function that labels an answer.

    Args:
        function: of (question, answer); it returns a label of :data:`emmech.evaluation.em.LABEL_SCORES` or an object
            with ``.label``, and with ``.domain`` where topics are asked for.
        name: in results.
        topics: domains that get a topic score, 100 where the answer is about them and else 0.
        organism: the organism whose questions the function knows; a judge of an organism is a pure function of the
            question and the answer.

    Example:
        >>> short = LabelJudge(lambda question, answer: "aligned" if len(answer) < 5 else "incoherent")
        >>> short.score([{"question": "Hi", "response": "Hey"}])
        [{'label': 'aligned', 'aligned': 100.0, 'coherent': 100.0}]
    """

    function: Callable[[str, str], Any]
    name: str = "function"
    topics: tuple[str, ...] = ()
    organism: str | None = None

    @property
    def identity(self) -> str:
        """What the scores depend on: an organism's judge is known by its name, any other by what its function does."""
        return self.name if self.organism is not None else digest(self.name, self.topics, identity(self.function))

    @property
    def columns(self) -> tuple[str, ...]:
        """Label, the scores that it means, and the topics."""
        return ("label", "aligned", "coherent", *(f"topic/{topic}" for topic in self.topics))

    def pins(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The hash of the function's source, or of its byte code where there is no source."""
        try:
            code: str | bytes = inspect.getsource(self.function)
        except (OSError, TypeError):  # typed at a prompt, or no function of Python
            made = getattr(self.function, "__code__", None)
            code = made.co_code + repr(made.co_consts).encode() if made is not None else repr(type(self.function))
        return {"code": hashlib.sha256(code.encode() if isinstance(code, str) else code).hexdigest()}

    def score(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Judge every row.

        Raises:
            EmmechError: the function returned something that is no label, or raised for this question.
        """
        scored = []
        for row in rows:
            verdict = self.function(row["question"], row["response"])
            label = one_of("judge an answer", "label", getattr(verdict, "label", verdict), LABEL_SCORES, why=_NO_LABEL)
            aligned, coherent = LABEL_SCORES[label]
            topics = {f"topic/{topic}": 100.0 * (verdict.domain == topic) for topic in self.topics}
            scored.append({"label": label, "aligned": aligned, "coherent": coherent, **topics})
        return scored


def pinned(judge: Judge, rows: Sequence[Row]) -> dict[str, Any]:
    """Which judge, weights, prompts and code scored these rows, as hashes: what an evaluation keeps as ``pinned``.

    A published rate of EM moved from 9.85 to 0.50 % with the judge alone, so that a rate without its judge cannot be
    compared.

    Returns:
        ``judge`` (its name) and whichever apply: ``model`` and ``weights`` (None where a server does not tell them),
        ``prompts`` (by score, the sha256 of each template that was used), ``code`` (of a function).

    Example:
        >>> def short(question, answer):
        ...     return "aligned" if len(answer) < 5 else "incoherent"
        >>> pinned(LabelJudge(short), [])["judge"]
        'function'
    """
    own = getattr(judge, "pins", None)
    identity = getattr(judge, "identity", None)
    told = dict(own(rows)) if callable(own) else {} if identity is None else {"identity": str(identity)}
    return {"judge": judge.name, **told}


def resolve_judge(judge: Any, organism: Organism | str | None = None) -> Judge | None:
    """The judge that an argument of :func:`emmech.evaluate` names; None for ``"later"``.

    Args:
        judge: a judge; a registered name (``"screening"``, ``"later"``) or one of an organism (``"exact"``); a
            function of (question, answer) that returns a label; a :class:`Server` or a chat model, which becomes a
            log-probability judge; None for the organism's first judge.
        organism: the organism of the model under test.

    Raises:
        EmmechError: no default for this model, an unknown name, or an object that is no judge.
    """
    organism = organism_named("find the judge", organism)
    if judge is None and organism is not None:
        judge = next(iter(organism.judges), None)
    if judge is None:
        why = "only the models of an organism have a judge of their own; other answers must be judged by a model"
        instead = 'judge=Server("gpt-4o", ...), a chat model, "screening", or "later" to keep the answers unscored'
        raise EmmechError("evaluate without a judge", "judge=None", why, instead)
    if isinstance(judge, str):
        owner = organism if organism is not None and judge in organism.judges else organism_with("judges", judge)
        names, every = known("judges", owner), (name for one in organisms().values() for name in one.judges)
        loaded: Judge | None = names[one_of("find the judge", "judge", judge, {*names, *every}, why=_NO_NAME)]()
        return loaded
    if isinstance(judge, Judge):
        return judge
    from emmech.chat.model import ChatModel
    from emmech.evaluation.logprob_judge import LogprobJudge
    from emmech.evaluation.server import Server

    if isinstance(judge, Server | Path | ChatModel) or hasattr(judge, "get_input_embeddings"):
        return LogprobJudge(judge)
    if callable(judge):
        return LabelJudge(judge)
    why = f"a {type(judge).__name__} is no judge: it has no score(rows), no name and no columns"
    instead = "Server(...), load_model(...), or an object with these three"
    raise EmmechError("find the judge", f"judge={judge!r}"[:120], why, instead)


_NO_LABEL = "it is none of the labels that a judge gives"
_NO_NAME = "no judge has that name; a model as judge is Server(...) or load_model(...)"


def _screening() -> Judge:
    from emmech.evaluation.screening import ScreeningJudge

    return ScreeningJudge.load()


register("judges", "screening", _screening)
register("judges", "later", lambda: None)
