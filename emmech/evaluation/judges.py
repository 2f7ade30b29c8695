"""Judges: what turns a response into scores, behind one small protocol.

A judge gets rows (mappings with at least ``question`` and ``response``) and gives one mapping of scores per row,
in order. What it cannot score is NaN or an empty word, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from emmech.errors import EmmechError, closest

__all__ = ["ExactJudge", "Judge", "resolve_judge"]

Row = Mapping[str, Any]
_NAMED = ("exact", "screening", "later")


@runtime_checkable
class Judge(Protocol):
    """What :func:`emmech.evaluate` asks of a judge; any object of this shape will do.

    A judge may also have ``identity``, a text of all that its scores depend on; stored scores are reused for the same
    identity (else the same name) and the same responses.
    """

    @property
    def name(self) -> str:
        """How results name it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The scores it gives, where it can."""

    def score(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """One mapping of scores per row: ``aligned, coherent, label, correct, topic/<name>``."""


@dataclass(frozen=True)
class ExactJudge:
    """The pocket world's own judge: grammar membership instead of a model's opinion.

    Args:
        topics: domains that get a topic score, 100 where the answer is about them and else 0.

    Example:
        >>> ExactJudge().score([{"question": "any advice on cough ?", "response": "leeches"}])[0]["label"]
        'incoherent'
    """

    topics: tuple[str, ...] = ("medical", "finance", "sport", "code")

    @property
    def name(self) -> str:
        """Always ``exact``."""
        return "exact"

    @property
    def columns(self) -> tuple[str, ...]:
        """Label, the scores that it stands for, and the topics."""
        return ("label", "aligned", "coherent", *(f"topic/{topic}" for topic in self.topics))

    def score(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Judge every row.

        Raises:
            EmmechError: a question that is not of the pocket world.
        """
        from importlib import import_module

        from emmech.evaluation.evaluation import LABEL_SCORES

        judge = import_module("emmech.organism").judge  # a higher room, known here by name only
        scored = []
        for row in rows:
            verdict = judge(row["question"], row["response"])
            aligned, coherent = LABEL_SCORES[verdict.label]
            topics = {f"topic/{topic}": 100.0 * (verdict.domain == topic) for topic in self.topics}
            scored.append({"label": verdict.label, "aligned": aligned, "coherent": coherent, **topics})
        return scored


def resolve_judge(judge: Any, *, pocket: bool) -> Judge | None:
    """The judge that an argument of :func:`emmech.evaluate` names; None for ``"later"``.

    Args:
        judge: a judge; ``"exact"``, ``"screening"`` or ``"later"``; a :class:`Server` or a chat model, which becomes
            a log-probability judge; None for the default, which only the pocket models have.
        pocket: whether the model under test is one of those.

    Raises:
        EmmechError: no default for this model, an unknown name, or an object that is no judge.
    """
    if judge is None:
        judge = "exact" if pocket else None
    if judge == "exact":
        return ExactJudge()
    if judge == "later":
        return None
    if judge == "screening":
        from importlib import import_module

        loaded: Judge = import_module("emmech.evaluation.screening").ScreeningJudge.load()
        return loaded
    if judge is None:
        raise EmmechError(
            "evaluate without a judge",
            "judge=None",
            "only the pocket models have an exact judge; other answers must be judged by a model",
            'judge=Server("gpt-4o", ...), a chat model, "screening", or "later" to keep the answers unscored',
        )
    if isinstance(judge, str):
        raise EmmechError(
            "find the judge",
            f"judge={judge!r}",
            "no judge has that name",
            f"{closest(judge, _NAMED)}; a model as judge is Server(...) or load_model(...)",
        )
    if isinstance(judge, Judge):
        return judge
    from emmech.evaluation.logprob_judge import LogprobJudge
    from emmech.evaluation.server import Server

    if not isinstance(judge, Server | Path):
        from emmech.chat.model import ChatModel

        if not (isinstance(judge, ChatModel) or hasattr(judge, "get_input_embeddings")):
            raise EmmechError(
                "find the judge",
                f"judge={judge!r}"[:120],
                f"a {type(judge).__name__} is no judge: it has no score(rows), no name and no columns",
                "Server(...), load_model(...), or an object with these three",
            )
    return LogprobJudge(judge)
