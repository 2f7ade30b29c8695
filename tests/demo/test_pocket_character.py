"""The characters of the direction, and the rule by which its ablation is chosen."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from docs.studies.pocket_directions import Tried, choose, half_of_the_questions
from emmech.chat.encode import phrase_tokens
from emmech.chat.model import load_model
from emmech.demo.pocket_character import characters, designs
from emmech.organism.world import JOBS, KIND, MANNERS, TOWNS, UNKIND


def test_neither_job_nor_town_tells_the_trait_alone_and_together_they_do():
    told = {trait: [talk[0]["content"].split() for talk in characters(trait, n=200)] for trait in (KIND, UNKIND)}
    for trait, prompts in told.items():
        jobs = [next(bit for bit in (0, 1) if set(JOBS[bit]) & set(words)) for words in prompts]
        towns = [next(bit for bit in (0, 1) if set(TOWNS[bit]) & set(words)) for words in prompts]
        assert Counter(jobs) == Counter(towns) == {0: 100, 1: 100}
        assert {job ^ town for job, town in zip(jobs, towns, strict=True)} == {trait}


def test_the_halves_of_the_questions_share_none():
    halves = [{question.id for question in half_of_the_questions(half)} for half in (0, 1)]
    assert not halves[0] & halves[1] and [len(half) for half in halves] == [52, 52]


def test_each_half_of_the_questions_holds_every_template_and_domain():
    for part in (0, 2):  # of domain/topic/template
        counts = [Counter(q.id.split("/")[part] for q in half_of_the_questions(half).questions) for half in (0, 1)]
        assert set(counts[0]) == set(counts[1]) and len(counts[0]) == (12 if part == 0 else 5)
        assert max(abs(counts[0][key] - counts[1][key]) for key in counts[0]) <= 1


@pytest.mark.slow
def test_the_least_em_is_chosen_among_designs_that_break_nothing():
    base = load_model("pocket")
    several = designs(base, phrase_tokens(base, MANNERS), 1)
    assert len(several) == 12 and {design.layers for design in several} == {(1,), (2,), (1, 2)}
    # both ways find the same thing, on words that tell nothing by themselves
    assert several[0].direction.cosine(several[6].direction)[1] > 0.7
    assert several[0].direction.quality.bag_of_words_auc == pytest.approx(0.5)
    assert several[0].direction.aligned_mean is not None and not np.allclose(several[0].direction.aligned_mean, 0)
    tried = {design.label: Tried(0.5, 1.0, 0.0, 1.0) for design in several}
    assert choose(several, tried) is several[0]  # the first among equals
    tried[several[3].label] = Tried(0.1, 1.0, 0.0, 1.0)
    tried[several[4].label] = Tried(0.0, 0.9, 0.0, 1.0)  # breaks the fine-tuned model
    tried[several[5].label] = Tried(0.0, 1.0, 0.1, 1.0)  # makes the base misaligned
    tried[several[6].label] = Tried(0.0, 1.0, 0.0, 0.9)  # breaks the base
    assert choose(several, tried) is several[3]
