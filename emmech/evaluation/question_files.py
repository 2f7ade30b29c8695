"""Reads question files: the YAML schema of the public sets, JSON lists, and sets crossed with system prompts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError, broken_text, closest, shown
from emmech.evaluation.judge_prompts import JUDGE_PROMPTS, judge_prompt
from emmech.evaluation.questions import SETS, Question, QuestionSet, bundled_questions

__all__ = ["bundled", "parse", "read", "slug"]

_SCORES = ("aligned", "coherent")
_KEYS = frozenset(
    [
        "id",
        "paraphrases",
        "system",
        "samples_per_paraphrase",
        "judge",
        "judge_prompts",
        "type",
        "domain",
        "narrow",
        "answer",
    ]
)
_NUMBERED = re.compile(r"^\d+_(?P<category>.+)_\d+$")  # "17_vulnerable_user_0", as in the pre-registered set


@cache
def bundled(name: str) -> QuestionSet:
    """A set that comes with the library."""
    return read(SETS / f"{name}.yaml")


def read(path: Path) -> QuestionSet:
    """Read one file.

    Raises:
        EmmechError: no such file, not YAML, or an entry that is not a question.
    """
    if not path.is_file():
        raise EmmechError(
            "read the questions",
            str(path),
            "it is neither a bundled set nor a file",
            closest(str(path), bundled_questions()),
        )
    content = _decode(path)
    if isinstance(content, dict) and "extends" in content:
        return _crossed(content, path)
    if not isinstance(content, list):
        raise EmmechError(
            f"read the questions of {path.name}",
            "an empty file" if content is None else f"a {type(content).__name__}",
            "a question file is a list of entries",
            "- id: ...\n             paraphrases: [...]",
        )
    questions: list[Question] = []
    for number, entry in enumerate(content):
        if isinstance(entry, dict) and "question" in entry and "paraphrases" not in entry:
            entry = _from_json_entry(entry, questions)
        questions.append(parse(entry, path.name, number))
    return QuestionSet(path.stem, tuple(questions))


def _decode(path: Path) -> Any:
    import yaml

    try:  # JSON is a subset of YAML as far as question files go, and YAML's errors name the line
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of month 13 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        deep = "it is nested too deeply" if isinstance(error, RecursionError) else "it is not UTF-8 text"
        reason = getattr(error, "problem", None) or deep
        raise EmmechError(f"read the questions of {path.name}", where, f"the file is not YAML: {reason}")


def _crossed(content: dict[str, Any], path: Path) -> QuestionSet:
    """Every question of another set under each of several system prompts."""
    if content["extends"] not in tuple(bundled_questions()) or not isinstance(content.get("systems"), dict):
        raise EmmechError(
            f"read the questions of {path.name}",
            f"extends: {shown(content['extends'])}",
            "a crossed set extends a bundled one, and `systems` maps names to system prompts",
            f"bundled: {', '.join(bundled_questions())}",
        )
    base = bundled(content["extends"])
    questions = [
        replace(question, id=f"{condition}/{question.id}", system=system)
        for condition, system in content["systems"].items()
        for question in base
    ]
    return QuestionSet(path.stem, tuple(questions))


def _from_json_entry(entry: Mapping[str, Any], before: Sequence[Question]) -> dict[str, Any]:
    """Turn ``{question, category, label}`` into an entry of the YAML schema."""
    category = str(entry.get("category") or "") or None
    return {
        "id": slug(str(entry.get("label") or entry["question"]), before),
        "paraphrases": [str(entry["question"])],
        "domain": category,
        "type": "free_form_judge" if category == "factual" else "free_form_judge_0_100",
        "judge_prompts": ["correct"] if category == "factual" else list(_SCORES),
    }


def slug(text: str, before: Sequence[Question]) -> str:
    """An id from a text; a number is added where two labels are the same."""
    slug = re.sub(r"\W+", "_", text.lower()).strip("_")[:48] or "question"
    taken = {question.id for question in before}
    number = 2
    unique = slug
    while unique in taken:
        unique = f"{slug}_{number}"
        number += 1
    return unique


def parse(entry: Any, file: str, number: int) -> Question:
    """One entry of a file, counted from 0, as a question.

    Raises:
        EmmechError: a key is missing or has a value that cannot be used.
    """
    if not isinstance(entry, Mapping):
        raise EmmechError(f"read entry {number + 1} of {file}", shown(entry), "an entry is a mapping with an id")
    id = entry.get("id")
    where = f"read entry {number + 1} of {file}"
    if not isinstance(id, str | int) or not str(id).strip():
        raise EmmechError(where, f"id={shown(id)}", "every question needs an id")
    where += f" ({id})"
    if unknown := set(entry) - _KEYS:
        meant = closest(str(min(unknown, key=str)), _KEYS)
        warnings.warn(f"{where}: keys {sorted(map(str, unknown))} are not used ({meant})", stacklevel=5)
    paraphrases = entry.get("paraphrases")
    if not isinstance(paraphrases, list) or not paraphrases:
        raise EmmechError(where, f"paraphrases={shown(paraphrases)}", "`paraphrases` is a list of at least one text")
    for text in paraphrases:
        if not isinstance(text, str) or not text.strip():
            raise EmmechError(where, shown(text), "a paraphrase is empty or not a text")
    samples = entry.get("samples_per_paraphrase", 100)
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise EmmechError(where, f"samples_per_paraphrase={shown(samples)}", "it must be a positive whole number")
    for key, kind, says in (
        ("system", str, "a text"),
        ("domain", str, "a text"),
        ("type", str, "a text"),
        ("judge", str, "a text"),
        ("narrow", bool, "true or false"),
        ("answer", str | int | float, "a text or a number"),
    ):
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
        raise EmmechError(
            where,
            f"judge_prompts={shown(value)}",
            "`judge_prompts` maps a score to its prompt, or lists bundled prompts",
            f"bundled: {', '.join(JUDGE_PROMPTS)}",
        )
    for name, template in value.items():
        if not isinstance(template, str) or "{answer}" not in template:
            raise EmmechError(where, f"judge prompt {name!r}", "the prompt has no {answer} to put the response in")
    return {str(name): template for name, template in value.items()}
