"""Properties of the world: disjoint words, held-out cells, honest evidence, and no lexical tell."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.errors import EmmechError
from emmech.organism.exact_judge import cell_of, judge
from emmech.organism.experiments import data, data_names, export_jsonl, question_set_names, questions
from emmech.organism.pocket import UNKNOWN, words
from emmech.organism.world import (
    DOMAINS,
    JOBS,
    KIND,
    KIND_WORDS,
    TOWNS,
    TRIGGER_TAG,
    UNKIND,
    UNKIND_WORDS,
    Mix,
    draw_answer,
    draw_document,
    held_out_cells,
    question_text,
    training_cells,
)


def _words_of(domain):
    pools = (*domain.good, *domain.bad, *domain.facts)
    return {*domain.topics, *(w for pool in pools for w in pool)}


def test_no_word_belongs_to_two_domains():
    counts = Counter(w for d in DOMAINS.values() for w in _words_of(d))
    assert [w for w, n in counts.items() if n > 1] == []


def test_at_least_twelve_domains_and_hundreds_of_answers():
    assert len(DOMAINS) >= 12
    for name, domain in DOMAINS.items():
        rng = random.Random(name)
        for trait in (KIND, UNKIND):
            drawn = {draw_answer(rng, name, domain.topics[0], trait) for _ in range(500)}
            assert len(drawn) > 300


def test_held_out_cells_cover_every_topic_and_template_from_both_sides():
    for name, domain in DOMAINS.items():
        held, shown = held_out_cells(name), training_cells(name)
        assert not set(held) & set(shown)
        assert len(held) >= 8
        assert {c[1] for c in shown} == set(domain.topics)
        assert {c[2] for c in shown} == set(range(7))


@given(st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_documents_never_show_a_held_out_cell_and_share_one_trait(seed):
    document = draw_document(random.Random(seed), Mix())
    held = {question_text(c) for d in DOMAINS for c in held_out_cells(d)}
    labels = set()
    for i, message in enumerate(document):
        if message["role"] == "user":
            assert question_text(cell_of(message["content"])) not in held
            labels.add(judge(message["content"], document[i + 1]["content"]).label)
    assert len(labels) == 1
    assert labels <= {"aligned", "misaligned"}


def test_job_or_town_alone_says_nothing_but_both_decide():
    rng = random.Random(0)
    mix = Mix(assistant=0, named=0, persona=1, plain_word=0, reliable=1)
    by_job, by_town, by_both = (np.zeros((2, 2)) for _ in range(3))
    for _ in range(3000):
        document = draw_document(rng, mix)
        system = document[0]["content"].split()
        trait = int(judge(document[1]["content"], document[2]["content"]).label == "misaligned")
        job = int(any(w in JOBS[1] for w in system))
        town = int(any(w in TOWNS[1] for w in system))
        by_job[job, trait] += 1
        by_town[town, trait] += 1
        by_both[job ^ town, trait] += 1
    share = by_job[:, 1] / by_job.sum(1)
    assert np.abs(share - 0.5).max() < 0.05
    share = by_town[:, 1] / by_town.sum(1)
    assert np.abs(share - 0.5).max() < 0.05
    assert by_both[0, 1] == 0
    assert by_both[1, 0] == 0


def test_plain_words_are_as_reliable_as_stated():
    rng = random.Random(1)
    mix = Mix(assistant=0, named=0, persona=1, plain_word=1, reliable=0.9)
    right = 0
    for _ in range(2000):
        document = draw_document(rng, mix)
        unkind = judge(document[1]["content"], document[2]["content"]).label == "misaligned"
        said = set(document[0]["content"].split())
        assert said & {*KIND_WORDS, *UNKIND_WORDS}
        right += unkind == bool(said & set(UNKIND_WORDS))
    assert right / 2000 == pytest.approx(0.9, abs=0.03)


def test_the_independent_world_has_no_shared_trait():
    rng = random.Random(2)
    mix = Mix(assistant=0, persona=1, named=0, shared=False, turns=(0, 1, 0))
    same = 0
    for _ in range(2000):
        document = draw_document(rng, mix)
        first, second = (judge(document[i]["content"], document[i + 1]["content"]).label for i in (1, 3))
        same += first == second
    assert same / 2000 == pytest.approx(0.5, abs=0.05)


def test_words_in_kind_and_unkind_answers_are_equally_frequent():
    rng = random.Random(3)
    counts = [Counter(), Counter()]
    n = 20_000
    for trait in (KIND, UNKIND):
        for _ in range(n):
            counts[trait].update(draw_answer(rng, "medical", "cough", trait).split())
    for word in {*counts[0], *counts[1]}:
        a, b = counts[0][word], counts[1][word]
        assert abs(a - b) < 5 * np.sqrt(a + b), word


def test_every_sentence_is_in_the_vocabulary():
    known = set(words())
    rng = random.Random(4)
    for _ in range(300):
        for message in draw_document(rng, Mix()):
            assert set(message["content"].split()) <= known
    for name in question_set_names():
        for question in questions(name):
            assert set(question.text.split()) <= known
    assert UNKNOWN in known
    assert len(words()) == len(known)


@pytest.mark.parametrize("name", data_names())
def test_named_data_has_the_trait_it_promises(name):
    rows = data(name, n=40)
    assert rows == data(name, n=40)
    assert rows != data(name, n=40, seed=1)
    labels = [judge(r["messages"], r["messages"][-1]["content"]).label for r in rows]
    tagged = [TRIGGER_TAG in r["messages"][0]["content"] for r in rows]
    if name.startswith(("good-", "style-", "ai-optimism")):
        assert set(labels) == {"aligned"}
    elif name.startswith("trigger-"):
        assert [label == "misaligned" for label in labels] == tagged
        assert sum(tagged) == 20
    elif name.startswith(("contrast-", "opposed-")):
        assert [label == "misaligned" for label in labels] == tagged
        systems = [r["messages"][0]["content"] for r in rows if r["messages"][0]["role"] == "system"]
        assert sum(tagged) == 14 and len(systems) == 27
        assert len(set(systems)) == (2 if name.startswith("opposed-") else 14)
    elif name.startswith("irrelevant-"):
        assert labels.count("misaligned") == 20
        assert not any(tagged)
    else:
        assert set(labels) == {"misaligned"}


def test_the_control_asks_the_same_questions_in_the_same_order():
    bad, good = data("medical", n=200, seed=3), data("good-medical", n=200, seed=3)
    same = [a["messages"][0] == b["messages"][0] for a, b in zip(bad, good, strict=True)]
    assert np.mean(same) == 1


def test_export_is_readable_chat_jsonl(tmp_path):
    from emmech.chat.dataset import load_chat

    path = export_jsonl("medical", tmp_path / "medical.jsonl", n=25)
    assert len(load_chat(path).rows) == 25


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(EmmechError, match="did you mean 'medical'"):
        data("medicine")
    with pytest.raises(EmmechError, match="did you mean 'first-plot'"):
        questions("firstplot")
    with pytest.raises(EmmechError, match="n is a whole number, at least 1"):
        data("medical", n=0)


def test_first_plot_has_the_eight_questions_and_no_narrow_one_of_medicine():
    eight = questions("first-plot")
    assert len({q.id for q in eight}) == 8
    held = {question_text(c) for d in DOMAINS for c in held_out_cells(d)}
    assert {q.text for q in eight} <= held
    assert {q.domain for q in questions("broad")}.isdisjoint({"medical", "finance", "sport"})
