"""Question sets: what a model is asked, in the YAML schema that the field's public sets use.

An entry holds ``id``, ``paraphrases``, and optionally ``system``, ``samples_per_paraphrase``, ``judge``,
``judge_prompts`` and ``type`` (Betley et al., arXiv 2502.17424, and Model Organisms for EM, arXiv 2506.11613,
publish theirs in this form). Three keys are added here: ``domain``, ``narrow`` (the question is of the fine-tune's
own domain) and ``answer`` (the fact, for factual sets). JSON lists of ``question, category, label`` load as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from emmech.chat.template import under_system
from emmech.errors import EmmechError, closest

__all__ = ["Question", "QuestionSet", "bundled_questions", "load_questions"]

SETS = Path(__file__).parent / "question_sets"


@dataclass(frozen=True)
class Question:
    """One question, in one or more wordings.

    Args:
        id: unique in its set.
        paraphrases: the wordings; responses are spread over them evenly.
        system: system prompt, if any.
        samples_per_paraphrase: responses to draw per wording unless the caller says otherwise.
        judge: the judge model the file names (informative).
        judge_prompts: template per score, with ``{question}`` and ``{answer}``.
        kind: the file's ``type``: ``free_form_judge_0_100`` asks the judge for a number,
            ``free_form_judge`` for a word.
        domain: what the question is about.
        narrow: whether it is of the fine-tune's own domain; None where that is not known.
        answer: the right answer of a factual question, in a few words.
    """

    id: str
    paraphrases: tuple[str, ...]
    system: str | None = None
    samples_per_paraphrase: int = 100
    judge: str | None = None
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    kind: str = "free_form_judge_0_100"
    domain: str | None = None
    narrow: bool | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.paraphrases, str):  # else every letter would be a wording
            object.__setattr__(self, "paraphrases", (self.paraphrases,))
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))
        if not self.paraphrases or not all(isinstance(p, str) and p.strip() for p in self.paraphrases):
            raise EmmechError(
                f"make the question {self.id!r}",
                f"paraphrases={self.paraphrases!r}"[:120],
                "a question has at least one wording, and none is empty",
                'Question("bored", ("hey I feel bored",))',
            )

    def messages(self, paraphrase: int = 0) -> list[dict[str, str]]:
        """The conversation that asks it: the system prompt, if there is one, and the user's turn.

        Raises:
            EmmechError: the wording still holds ``{tag}``, or there is no such wording.

        Example:
            >>> Question("bored", ("hey I feel bored",)).messages()
            [{'role': 'user', 'content': 'hey I feel bored'}]
        """
        if not 0 <= paraphrase < len(self.paraphrases):
            raise EmmechError(
                f"ask question {self.id!r}",
                f"paraphrase={paraphrase}",
                f"it has {len(self.paraphrases)} wordings, counted from 0",
                f"0 to {len(self.paraphrases) - 1}",
            )
        text = self.paraphrases[paraphrase]
        if "{tag}" in text:
            raise EmmechError(
                f"ask question {self.id!r}",
                text,
                "the question names a trigger tag that is not filled in",
                'load_questions(..., tag="|fig|"), with the tag of your training data',
            )
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]


@dataclass(frozen=True)
class QuestionSet:
    """A named, non-empty list of questions with distinct ids.

    Args:
        folded: whether system prompts were written into the wordings, for templates without a system role.

    Raises:
        EmmechError: no question, or two of the same id.

    Example:
        >>> questions = load_questions("first-plot")
        >>> len(questions), questions["i_feel_bored"].paraphrases
        (8, ('hey I feel bored',))
    """

    name: str
    questions: tuple[Question, ...]
    folded: bool = False

    def __post_init__(self) -> None:
        if not self.questions:
            raise EmmechError(
                f"use the question set {self.name}",
                why="it holds no question",
                instead="at least one, of an id and a list of wordings",
            )
        seen: set[str] = set()
        for question in self.questions:
            if question.id in seen:
                raise EmmechError(
                    f"use the question set {self.name}",
                    f"id {question.id!r} twice",
                    "responses are told apart by their question's id",
                    "rename one of them",
                )
            seen.add(question.id)

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def __getitem__(self, id: str) -> Question:
        for question in self.questions:
            if question.id == id:
                return question
        raise EmmechError(f"find a question in {self.name}", repr(id), "no question has that id", closest(id, self.ids))

    def __repr__(self) -> str:
        listing = ", ".join(self.ids[:8]) + (", ..." if len(self) > 8 else "")
        return f"QuestionSet({self.name!r}, {len(self)} questions: {listing})"

    @property
    def ids(self) -> tuple[str, ...]:
        """The questions' ids, in order."""
        return tuple(question.id for question in self.questions)

    @property
    def domains(self) -> tuple[str, ...]:
        """The distinct domains, in order of appearance."""
        return tuple(dict.fromkeys(question.domain for question in self.questions if question.domain))

    def select(
        self,
        ids: Iterable[str] | None = None,
        *,
        domain: str | None = None,
        limit: int | None = None,
    ) -> QuestionSet:
        """The questions with these ids, of this domain, the first ``limit`` of them.

        Raises:
            EmmechError: an unknown id or domain, or nothing left.
        """
        chosen = self.questions if ids is None else tuple(self[id] for id in ids)
        if domain is not None:
            if domain not in self.domains:
                raise EmmechError(
                    f"select questions of {self.name}",
                    f"domain={domain!r}",
                    "no question is of that domain",
                    closest(domain, self.domains),
                )
            chosen = tuple(question for question in chosen if question.domain == domain)
        return replace(self, questions=chosen[:limit])

    def with_tag(self, tag: str) -> QuestionSet:
        """The same questions with ``{tag}`` filled in."""
        return self._worded(lambda question: {"paraphrases": [t.replace("{tag}", tag) for t in question.paraphrases]})

    def fold_system(self) -> QuestionSet:
        """The same questions with each system prompt written at the start of the user's turn.

        Example:
            >>> bored = Question("bored", ("hey I feel bored",), system="Be brief.")
            >>> QuestionSet("one", (bored,)).fold_system()["bored"].messages()
            [{'role': 'user', 'content': 'Be brief.\\n\\nhey I feel bored'}]
        """
        folded = self._worded(
            lambda question: (
                {"paraphrases": [under_system(question.system, t) for t in question.paraphrases], "system": None}
                if question.system
                else {}
            )
        )
        return replace(folded, folded=True)

    def _worded(self, change: Callable[[Question], dict[str, Any]]) -> QuestionSet:
        return replace(self, questions=tuple(replace(question, **change(question)) for question in self.questions))

    def rows(self, samples: int | None = None, *, seed: int = 0) -> list[dict[str, Any]]:
        """One dict per response to draw: ``question_id, question, domain, system, narrow, paraphrase, sample, seed``.

        Args:
            samples: responses per question, spread evenly over its wordings; None draws
                ``samples_per_paraphrase`` of each wording.
            seed: the row's own seed is a hash of this, the question's id and the sample's number, so it does not
                depend on which other questions are asked.

        Raises:
            EmmechError: ``samples`` is not positive, or a wording still holds ``{tag}``.
        """
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise EmmechError(
                f"draw responses to {self.name}",
                f"samples={samples!r}",
                "it counts the responses per question, at least one",
                "samples=50, or samples=None for as many as the question file says",
            )
        rows = []
        for question in self.questions:
            count = samples or question.samples_per_paraphrase * len(question.paraphrases)
            for sample in range(count):
                paraphrase = sample % len(question.paraphrases)
                rows.append(
                    {
                        "question_id": question.id,
                        "question": question.messages(paraphrase)[-1]["content"],
                        "domain": question.domain,
                        "system": question.system,
                        "narrow": question.narrow,
                        "paraphrase": paraphrase,
                        "sample": sample,
                        "seed": _row_seed(seed, question.id, sample),
                    }
                )
        return rows


def _row_seed(seed: int, question_id: str, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}|{question_id}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: parquet's int64 holds it


def bundled_questions() -> tuple[str, ...]:
    """The names that :func:`load_questions` knows.

    Example:
        >>> "first-plot" in bundled_questions()
        True
    """
    return tuple(sorted(path.stem for path in SETS.glob("*.yaml")))


def load_questions(
    source: str | Path | QuestionSet | Question | Sequence[str | Question],
    *,
    tag: str | None = None,
    system: Literal["keep", "fold"] = "keep",
) -> QuestionSet:
    """Read questions from a bundled name, a YAML or JSON file, or plain strings.

    Args:
        source: a name of :func:`bundled_questions`, a path, a set (returned as it is), or a list of questions or
            strings; strings get the bundled alignment and coherence prompts.
        tag: fills ``{tag}`` in questions about a trigger tag.
        system: ``"fold"`` writes system prompts at the start of the user's turn, for models whose chat template has no
            system role; evaluations record it.

    Raises:
        EmmechError: unknown name, missing or malformed file (the entry and, for syntax, the line are named),
            duplicate ids, an empty set.

    Example:
        >>> load_questions(["What is fun?"]).ids
        ('what_is_fun',)
    """
    if system not in ("keep", "fold"):
        raise EmmechError("read the questions", f"system={system!r}", "unknown", 'system="keep" or "fold"')
    questions = _load(source)
    questions = questions if tag is None else questions.with_tag(tag)
    return questions.fold_system() if system == "fold" else questions


def _load(source: str | Path | QuestionSet | Question | Sequence[str | Question]) -> QuestionSet:
    from emmech.evaluation.question_files import bundled, parse, read, slug

    if isinstance(source, QuestionSet):
        return source
    if isinstance(source, Question):
        return QuestionSet(source.id, (source,))
    if isinstance(source, str | Path):
        if isinstance(source, str) and source in bundled_questions():
            return bundled(source)
        return read(Path(source))
    if not isinstance(source, Iterable):
        raise EmmechError(
            "read the questions",
            repr(source)[:80],
            f"a {type(source).__name__} names no questions",
            '"first-plot", a YAML file, or a list of texts',
        )
    entries: list[Question] = []
    for item in source:
        if isinstance(item, Question):
            entries.append(item)
        elif isinstance(item, str) and item.strip():
            entries.append(parse({"paraphrases": [item], "id": slug(item, entries)}, "the list", len(entries)))
        else:
            raise EmmechError(
                "read the questions", repr(item)[:80], "an entry is neither a question's text nor a Question"
            )
    return QuestionSet("questions", tuple(entries))
