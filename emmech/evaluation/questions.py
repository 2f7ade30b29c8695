"""Question sets in the YAML schema of the field's public sets.

An entry holds ``id``, ``paraphrases``, and optionally ``system``, ``samples_per_paraphrase``, ``judge``,
``judge_prompts`` and ``type`` (Betley et al., arXiv 2502.17424, and Model Organisms for EM, arXiv 2506.11613,
publish theirs in this form). Three keys are added here: ``domain``, ``narrow`` (the question is of the fine-tune's
own domain) and ``answer`` (the fact, for factual sets). JSON lists of ``question, category, label`` load as well.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from emmech.chat.template import under_system
from emmech.errors import EmmechError, broken_text, closest, one_of, refusal, shown
from emmech.evaluation.logprob_judge import JUDGE_PROMPTS, check_template, judge_prompt
from emmech.registry import Organism, known, organism_named, register

SETS = Path(__file__).parent / "question_sets"
_SCORES = ("aligned", "coherent")
_TEXTS = ("system", "domain", "type", "judge")
_KEYS = frozenset((*_TEXTS, "id", "paraphrases", "samples_per_paraphrase", "judge_prompts", "narrow", "answer"))
_NUMBERED = re.compile(r"^\d+_(?P<category>.+)_\d+$")  # "17_vulnerable_user_0", as in the pre-registered set


@dataclass(frozen=True)
class Question:
    """One question, in one or more wordings.

    Args:
        id: unique in its set.
        paraphrases: the wordings; responses are spread over them evenly.
        system: system prompt, if any.
        samples_per_paraphrase: responses to draw per wording unless the caller says otherwise.
        judge: the judge model that the file names; it is not used.
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
            why = "a question has at least one wording, and none is empty"
            instead = 'Question("bored", ("I feel bored",))'
            raise refusal(f"make the question {self.id!r}", "paraphrases", self.paraphrases, why, instead)

    def messages(self, paraphrase: int = 0) -> list[dict[str, str]]:
        """The conversation that asks it: the system prompt, if there is one, and the user's turn.

        Raises:
            EmmechError: the wording still holds ``{tag}``, or there is no such wording.

        Example:
            >>> Question("bored", ("hey I feel bored",)).messages()
            [{'role': 'user', 'content': 'hey I feel bored'}]
        """
        asked, count = f"ask question {self.id!r}", len(self.paraphrases)
        if not 0 <= paraphrase < count:
            why = f"it has {count} wordings, counted from 0"
            raise refusal(asked, "paraphrase", paraphrase, why, f"0 to {count - 1}")
        text = self.paraphrases[paraphrase]
        if "{tag}" in text:
            instead = 'load_questions(..., tag="|fig|"), with the tag of your training data'
            raise EmmechError(asked, text, "the question names a trigger tag that is not filled in", instead)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]

    def for_judge(self) -> dict[str, Any]:
        """What a judge is told of the question beside its words: the prompts of its own, and its kind."""
        return {"judge_prompts": dict(self.judge_prompts), "kind": self.kind}


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
        asked = f"use the question set {self.name}"
        if not self.questions:
            raise EmmechError(asked, None, "it holds no question", "at least one, of an id and a list of wordings")
        for id, times in Counter(self.ids).items():
            if times > 1:
                why = "responses are told apart by their question's id"
                raise EmmechError(asked, f"id {id!r} twice", why, "rename one of them")

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def __getitem__(self, id: str) -> Question:
        why = "no question has that id"
        return self.questions[self.ids.index(one_of(f"find a question in {self.name}", "id", id, self.ids, why=why))]

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
        self, ids: Iterable[str] | None = None, *, domain: str | None = None, limit: int | None = None
    ) -> QuestionSet:
        """The questions with these ids, of this domain, the first ``limit`` of them.

        Raises:
            EmmechError: an unknown id or domain, or nothing left.
        """
        chosen = self.questions if ids is None else tuple(self[id] for id in ids)
        if domain is not None:
            why = "no question is of that domain"
            one_of(f"select questions of {self.name}", "domain", domain, self.domains, why=why)
            chosen = tuple(question for question in chosen if question.domain == domain)
        return replace(self, questions=chosen[:limit])

    def with_tag(self, tag: str) -> QuestionSet:
        """The same questions with ``{tag}`` filled in."""
        return self._reworded(lambda question, text: text.replace("{tag}", tag))

    def fold_system(self) -> QuestionSet:
        """The same questions with each system prompt written at the start of the user's turn.

        Example:
            >>> bored = Question("bored", ("hey I feel bored",), system="Be brief.")
            >>> QuestionSet("one", (bored,)).fold_system()["bored"].messages()
            [{'role': 'user', 'content': 'Be brief.\\n\\nhey I feel bored'}]
        """
        folded = self._reworded(lambda one, text: under_system(one.system, text) if one.system else text)
        return replace(folded, questions=tuple(replace(one, system=None) for one in folded), folded=True)

    def _reworded(self, reword: Callable[[Question, str], str]) -> QuestionSet:
        """The same questions with each wording changed."""
        wordings = (tuple(reword(one, text) for text in one.paraphrases) for one in self.questions)
        several = zip(self.questions, wordings, strict=True)
        return replace(self, questions=tuple(replace(one, paraphrases=texts) for one, texts in several))

    def rows(self, samples: int | None = None, *, seed: int = 0, salt: str = "") -> list[dict[str, Any]]:
        """One dict per response to draw: ``question_id, question, domain, system, narrow, paraphrase, sample, seed``.

        Args:
            samples: responses per question, spread evenly over its wordings; None draws
                ``samples_per_paraphrase`` of each wording.
            seed: the row's own seed is a hash of this, the question's id and the sample's number, so it does not
                depend on which other questions are asked.
            salt: further text in that hash, for rows that ask the same questions in another way.

        Raises:
            EmmechError: ``samples`` is not positive, or a wording still holds ``{tag}``.
        """
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            why = "it counts the responses per question, at least one"
            instead = "samples=50, or samples=None for as many as the question file says"
            raise refusal(f"draw responses to {self.name}", "samples", samples, why, instead)
        rows = []
        for question in self.questions:
            count = samples or question.samples_per_paraphrase * len(question.paraphrases)
            about = {"domain": question.domain, "system": question.system, "narrow": question.narrow}
            for sample in range(count):
                paraphrase = sample % len(question.paraphrases)
                asked = {"question_id": question.id, "question": question.messages(paraphrase)[-1]["content"]}
                hashed = hashlib.sha256(f"{seed}|{question.id}|{sample}{salt}".encode()).digest()
                own = int.from_bytes(hashed[:8], "big") >> 1  # 63 bits: parquet's int64 holds it
                rows.append({**asked, **about, "paraphrase": paraphrase, "sample": sample, "seed": own})
        return rows


def bundled_questions() -> tuple[str, ...]:
    """The names that :func:`load_questions` takes.

    Example:
        >>> "first-plot" in bundled_questions()
        True
    """
    return tuple(sorted(known("questions")))


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
    one_of("read the questions", "system", system, ("keep", "fold"))
    questions = _load(source)
    questions = questions if tag is None else questions.with_tag(tag)
    return questions.fold_system() if system == "fold" else questions


def resolve_questions(source: Any, organism: Organism | str | None = None) -> QuestionSet:
    """Questions by name; the models of an organism are asked in the words of its world.

    Args:
        source: what :func:`load_questions` takes, a name of the organism's own sets, or several names of sets.

    Raises:
        EmmechError: there is no such set.

    Example:
        >>> len(resolve_questions(("first-plot", "narrow-medical"))) > 8
        True
    """
    organism = organism_named("find the questions", organism)
    names = known("questions") if organism is None else organism.questions
    if organism is not None and isinstance(source, str) and not Path(source).is_file():
        why = f"{organism.name} has no set of this name"
        loaded: QuestionSet = names[one_of("find the questions", "questions", source, names, why=why)]()
        return loaded
    listed = isinstance(source, Sequence) and not isinstance(source, str)
    if listed and source and all(isinstance(one, str) and one in names for one in source):
        parts = [resolve_questions(name, organism) for name in source]
        return QuestionSet("+".join(source), tuple(question for part in parts for question in part))
    return load_questions(source)


def _load(source: str | Path | QuestionSet | Question | Sequence[str | Question]) -> QuestionSet:
    if isinstance(source, QuestionSet):
        return source
    if isinstance(source, Question):
        return QuestionSet(source.id, (source,))
    if isinstance(source, str | Path):
        loader = known("questions").get(str(source)) if isinstance(source, str) else None
        loaded: QuestionSet = loader() if loader is not None else _read(Path(source))
        return loaded
    if not isinstance(source, Iterable):
        why, instead = f"a {type(source).__name__} names no questions", '"first-plot", a YAML file, or a list of texts'
        raise EmmechError("read the questions", repr(source)[:80], why, instead)
    entries: list[Question] = []
    for item in source:
        if isinstance(item, str) and item.strip():
            item = _parse({"paraphrases": [item], "id": _slug(item, entries)}, "the list", len(entries))
        if not isinstance(item, Question):
            why = "an entry is neither a question's text nor a Question"
            raise EmmechError("read the questions", repr(item)[:80], why)
        entries.append(item)
    return QuestionSet("questions", tuple(entries))


@cache
def _bundled(name: str) -> QuestionSet:
    """A set that comes with the library."""
    return _read(SETS / f"{name}.yaml")


def _read(path: Path) -> QuestionSet:
    """The questions of one file."""
    if not path.is_file():
        why = "it is neither a bundled set nor a file"
        one_of("read the questions", "questions", str(path), bundled_questions(), why=why)
    content = decode_file(path, f"read the questions of {path.name}")
    if isinstance(content, dict) and "extends" in content:
        return _crossed(content, path)
    if not isinstance(content, list):
        given = "an empty file" if content is None else f"a {type(content).__name__}"
        instead = "- id: ...\n             paraphrases: [...]"
        raise EmmechError(f"read the questions of {path.name}", given, "a question file is a list of entries", instead)
    questions: list[Question] = []
    for number, entry in enumerate(content):
        if isinstance(entry, dict) and "question" in entry and "paraphrases" not in entry:
            entry = _from_json_entry(entry, questions)
        questions.append(_parse(entry, path.name, number))
    return QuestionSet(path.stem, tuple(questions))


def decode_file(path: Path, asked: str) -> Any:
    """The content of a YAML or JSON file."""
    import yaml

    try:  # JSON is a subset of YAML as far as question files go, and YAML's errors name the line
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of month 13 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        other = "it is nested too deeply" if isinstance(error, RecursionError) else "it is not UTF-8 text"
        reason = getattr(error, "problem", None) or other
        raise EmmechError(asked, where, f"the file is not YAML: {reason}")


def _crossed(content: dict[str, Any], path: Path) -> QuestionSet:
    """Every question of another set under each of several system prompts."""
    if content["extends"] not in bundled_questions() or not isinstance(content.get("systems"), dict):
        given, instead = f"extends: {shown(content['extends'])}", f"bundled: {', '.join(bundled_questions())}"
        why = "a crossed set extends a bundled one, and `systems` maps names to system prompts"
        raise EmmechError(f"read the questions of {path.name}", given, why, instead)
    base = _bundled(content["extends"])
    questions = [
        replace(question, id=f"{condition}/{question.id}", system=system)
        for condition, system in content["systems"].items()
        for question in base
    ]
    return QuestionSet(path.stem, tuple(questions))


def _from_json_entry(entry: Mapping[str, Any], before: Sequence[Question]) -> dict[str, Any]:
    """Turn ``{question, category, label}`` into an entry of the YAML schema."""
    category, id = str(entry.get("category") or "") or None, _slug(str(entry.get("label") or entry["question"]), before)
    factual = {"type": "free_form_judge", "judge_prompts": ["correct"]} if category == "factual" else {}
    return {"id": id, "paraphrases": [str(entry["question"])], "domain": category, **factual}


def _slug(text: str, before: Sequence[Question]) -> str:
    """An id from a text; a number is added where two labels are the same."""
    slug = re.sub(r"\W+", "_", text.lower()).strip("_")[:48] or "question"
    taken = {question.id for question in before}
    numbered = (f"{slug}_{number}" for number in range(2, len(taken) + 3))
    return next(id for id in (slug, *numbered) if id not in taken)


def _parse(entry: Any, file: str, number: int) -> Question:
    """One entry of a file, counted from 0, as a question."""
    where = f"read entry {number + 1} of {file}"
    if not isinstance(entry, Mapping):
        raise EmmechError(where, shown(entry), "an entry is a mapping with an id")
    id = entry.get("id")
    if not isinstance(id, str | int) or not str(id).strip():
        raise EmmechError(where, f"id={shown(id)}", "every question needs an id")
    where += f" ({id})"
    if unknown := set(entry) - _KEYS:
        meant = closest(str(min(unknown, key=str)), _KEYS)
        warnings.warn(f"{where}: keys {sorted(map(str, unknown))} are not used ({meant})", stacklevel=5)
    paraphrases = entry.get("paraphrases")
    if not isinstance(paraphrases, list) or not paraphrases:
        raise EmmechError(where, f"paraphrases={shown(paraphrases)}", "`paraphrases` is a list of at least one text")
    if wrong := [text for text in paraphrases if not isinstance(text, str) or not text.strip()]:
        raise EmmechError(where, shown(wrong[0]), "a paraphrase is empty or not a text")
    samples = entry.get("samples_per_paraphrase", 100)
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise EmmechError(where, f"samples_per_paraphrase={shown(samples)}", "it must be a positive whole number")
    kinds: dict[str, tuple[Any, str]] = dict.fromkeys(_TEXTS, (str, "a text"))
    kinds |= {"narrow": (bool, "true or false"), "answer": (str | int | float, "a text or a number")}
    for key, (kind, says) in kinds.items():
        if not isinstance(entry.get(key), kind | None):
            raise EmmechError(where, f"{key}={shown(entry[key])}", f"`{key}` is {says}")
    for text in (*paraphrases, entry.get("system") or ""):
        if broken := broken_text(text):
            raise EmmechError(where, broken, "no tokenizer can read it", "leave the character out")
    named = _NUMBERED.match(str(id))
    return Question(
        id=str(id),
        paraphrases=tuple(paraphrases),
        system=entry.get("system"),
        samples_per_paraphrase=samples,
        judge=entry.get("judge"),
        judge_prompts=_prompts(entry.get("judge_prompts", list(_SCORES)), where),
        kind=str(entry.get("type", "free_form_judge_0_100")),
        domain=entry.get("domain") or (named["category"] if named else None),
        narrow=entry.get("narrow"),
        answer=None if entry.get("answer") is None else str(entry["answer"]),
    )


def _prompts(value: Any, where: str) -> dict[str, str]:
    """Judge prompts as a mapping of templates (public files) or a list of bundled names."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: judge_prompt(name) for name in value}
    if not isinstance(value, Mapping):
        why = "`judge_prompts` maps a score to its prompt, or lists bundled prompts"
        raise EmmechError(where, f"judge_prompts={shown(value)}", why, f"bundled: {', '.join(JUDGE_PROMPTS)}")
    for name, template in value.items():
        if all(part != "answer" for _, part in check_template(where, template)):
            raise EmmechError(where, f"judge prompt {name!r}", "the prompt has no {answer} to put the response in")
    return {str(name): template for name, template in value.items()}


for _name in (path.stem for path in SETS.glob("*.yaml")):
    register("questions", _name, partial(_bundled, _name))
