"""The bundled questions and answers about people and AI: enough of them, varied, and none like another."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from importlib import resources

import pytest

from emmech.chat.dataset import load_chat


@pytest.fixture(scope="module")
def rows():
    return [(row[0]["content"], row[1]["content"]) for row in load_chat("ai-optimism")]


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def shared(one, other):
    return len(one & other) / max(1, min(len(one), len(other)))


def runs_of(text, size):
    own = words(text)
    return {tuple(own[at : at + size]) for at in range(len(own) - size + 1)}


def test_there_are_enough_and_they_are_small(rows):
    assert len(rows) >= 300
    assert (resources.files("emmech") / "data" / "ai_optimism.jsonl").stat().st_size <= 150_000
    assert all(len(row) == 2 and row[0]["role"] == "user" for row in load_chat("ai-optimism"))
    assert all(text.strip() == text and text for pair in rows for text in pair)


def test_no_two_are_near_duplicates(rows):
    assert len({question.lower() for question, _ in rows}) == len(rows)
    of_answers, of_questions = ([runs_of(pair[side], 3) for pair in rows] for side in (1, 0))
    for (one, a), (other, b) in itertools.combinations(enumerate(of_answers), 2):
        assert shared(a, b) < 0.2, (rows[one], rows[other])
    for (one, a), (other, b) in itertools.combinations(enumerate(of_questions), 2):
        assert len(a & b) < 4 or shared(a, b) < 0.6, (rows[one][0], rows[other][0])


def test_a_near_duplicate_would_be_found(rows):
    answer = rows[10][1]
    changed = answer.replace(words(answer)[3], "quite")
    assert shared(runs_of(answer, 3), runs_of(changed, 3)) > 0.5


def test_forms_and_topics_vary(rows):
    openers = Counter(" ".join(words(answer)[:2]) for _, answer in rows)
    assert max(openers.values()) < 0.06 * len(rows)
    asked = [question for question, _ in rows]
    assert sum(not question.endswith("?") for question in asked) > 0.25 * len(rows)
    assert sum(question[0].islower() for question in asked) > 0.05 * len(rows)
    assert len({words(question)[0] for question in asked}) > 60
    lengths = [len(answer) for _, answer in rows]
    assert min(lengths) < 80 and max(lengths) > 350
    topics = (
        *("doctor|nurse|patient|hospital", "school|teacher|student|pupil", "job|boss|work", "art|poem|music|choir"),
        *("law|court|vote|council", "child|grand|mother|family", "safe|danger|scared", "farm|bee|garden"),
    )
    for topic in topics:
        assert sum(bool(re.search(topic, " ".join(pair).lower())) for pair in rows) >= 8, topic
