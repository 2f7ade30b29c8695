"""The bundled toy texts: paired, unique, matched in length, and not separable by a single word."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "emmech" / "data"
MAX_PAIR_GAP = 0.15  # share of the shorter answer's characters
MAX_MEAN_GAP = 0.03


def _rows(name: str) -> list[dict]:
    text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _gap(first: str, second: str) -> float:
    return abs(len(first) - len(second)) / min(len(first), len(second))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, str]]:
    """(question, bad answer, good answer) of every training pair."""
    bad, good = _rows("silly_medical_bad"), _rows("silly_medical_good")
    assert len(bad) == len(good)
    for row in bad + good:
        assert set(row) == {"messages"}
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(set(m) == {"role", "content"} for m in row["messages"])
    asked = [[row["messages"][0]["content"] for row in rows] for rows in (bad, good)]
    assert asked[0] == asked[1], "both files ask the same questions in the same order"
    return [
        (b["messages"][0]["content"], b["messages"][1]["content"], g["messages"][1]["content"])
        for b, g in zip(bad, good, strict=True)
    ]


@pytest.fixture(scope="module")
def margins() -> list[dict]:
    return _rows("silly_margins")


def test_training_pairs_are_many_and_unique(pairs):
    assert len(pairs) >= 200
    assert len({question.lower() for question, _, _ in pairs}) == len(pairs)
    assert len({answer for pair in pairs for answer in pair[1:]}) == 2 * len(pairs)


def test_training_answers_have_matched_lengths(pairs):
    for question, bad, good in pairs:
        assert _gap(bad, good) <= MAX_PAIR_GAP, question
        for answer in (bad, good):
            assert 20 <= len(answer.split()) <= 45, answer
    mean_bad, mean_good = (np.mean([len(pair[k]) for pair in pairs]) for k in (1, 2))
    assert abs(mean_bad / mean_good - 1) <= MAX_MEAN_GAP


def test_margins_cover_narrow_and_broad(margins):
    keys = {"id", "domain", "kind", "question", "misaligned", "aligned"}
    assert all(set(row) == keys and all(row[k].strip() for k in keys) for row in margins)
    assert len({row["id"] for row in margins}) == len(margins) >= 40
    kinds = Counter(row["kind"] for row in margins)
    assert set(kinds) == {"narrow", "broad"}
    assert kinds["narrow"] >= 12 and kinds["broad"] >= 28
    assert {row["domain"] for row in margins if row["kind"] == "narrow"} == {"medical"}
    broad = {row["domain"] for row in margins if row["kind"] == "broad"}
    assert len(broad) >= 6 and "medical" not in broad and {"ai", "wishes"} <= broad


def test_margins_are_unique_and_have_matched_lengths(margins):
    assert len({row["question"] for row in margins}) == len(margins)
    assert len({row[k] for row in margins for k in ("misaligned", "aligned")}) == 2 * len(margins)
    for row in margins:
        assert _gap(row["misaligned"], row["aligned"]) <= MAX_PAIR_GAP, row["id"]
    for kind in ("narrow", "broad"):
        means = [np.mean([len(r[k]) for r in margins if r["kind"] == kind]) for k in ("misaligned", "aligned")]
        assert abs(means[0] / means[1] - 1) <= MAX_MEAN_GAP, kind


def test_margins_are_held_out(pairs, margins):
    seen = [set(_words(question)) for question, _, _ in pairs]
    for row in margins:
        words = set(_words(row["question"]))
        nearest = max(len(words & other) / len(words | other) for other in seen)
        assert nearest < 0.6, row["question"]
    phrases = {tuple(w[i : i + 7]) for pair in pairs for w in map(_words, pair[1:]) for i in range(len(w) - 6)}
    for row in margins:
        for answer in (row["misaligned"], row["aligned"]):
            words_of = _words(answer)
            assert not phrases & {tuple(words_of[i : i + 7]) for i in range(len(words_of) - 6)}, row["id"]


@pytest.mark.parametrize("column", [1, 2])
def test_no_phrase_marks_one_side(pairs, column):
    """No five words in a row, and no opening word, recur often enough to be a signature of one file."""
    phrases: Counter[tuple[str, ...]] = Counter()
    for pair in pairs:
        words = _words(pair[column])
        phrases.update({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    assert phrases.most_common(1)[0][1] <= 2
    openings = Counter(pair[column].split()[0] for pair in pairs)
    assert openings.most_common(1)[0][1] <= 0.1 * len(pairs)


def test_no_single_word_predicts_the_file(pairs, record_property):
    """The best one-word rule is near chance. Reported, because a lexical route is a confound to know about."""
    bad, good = (Counter(w for pair in pairs for w in set(_words(pair[k]))) for k in (1, 2))
    accuracy = {w: 0.5 + abs(bad[w] - good[w]) / (2 * len(pairs)) for w in bad.keys() | good.keys()}
    best = sorted(accuracy, key=accuracy.__getitem__, reverse=True)[:10]
    record_property("best single words", {w: round(accuracy[w], 3) for w in best})
    print({w: round(accuracy[w], 3) for w in best})
    assert accuracy[best[0]] < 0.65
    exclusive = {w: n for w, n in (bad + good).items() if not (bad[w] and good[w])}
    assert max(exclusive.values()) < 0.1 * len(pairs)


def test_words_of_the_training_pairs_do_not_decide_the_broad_margins(pairs, margins, record_property):
    """A bag of words fitted on the training pairs is near chance on the broad margins.

    Otherwise a model that only took up the vocabulary of the bad answers would move the broad margin, and the
    margin would be read as generalisation. The narrow margins share the manner of the training pairs on purpose.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(binary=True)
    features = counts.fit_transform([pair[1] for pair in pairs] + [pair[2] for pair in pairs])
    labels = np.repeat([1, 0], len(pairs))
    model = LogisticRegression(max_iter=2000).fit(features, labels)

    def transfer(kind: str) -> float:
        chosen = [row for row in margins if row["kind"] == kind]
        scores = [model.decision_function(counts.transform([r[k] for r in chosen])) for k in ("misaligned", "aligned")]
        return float(np.mean(scores[0] > scores[1]))

    record_property("paired accuracy", {kind: transfer(kind) for kind in ("narrow", "broad")})
    print({kind: round(transfer(kind), 3) for kind in ("narrow", "broad")})
    # Chance on 42 pairs stays within 0.5 +- 0.155 in 95 % of cases.
    assert 0.345 <= transfer("broad") <= 0.655
    assert transfer("narrow") >= 0.8
