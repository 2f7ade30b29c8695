"""The pocket margins pair answers of opposite traits to the same held-out question."""

from __future__ import annotations

import pytest

import emmech
from emmech import organism
from emmech.measures.teacher_forced import Margin


@pytest.mark.parametrize("name", ["medical", "good-medical", "trigger-finance", "ai-optimism"])
def test_pairs_are_unkind_against_kind(name):
    for kind, pairs in organism.margins(name, n=40).items():
        sets = ["broad", *(f"narrow-{domain}" for domain in ("medical", "finance", "sport"))]
        held_out = {q.text for name in sets for q in organism.questions(name)}
        assert len(pairs) == 40 and kind in ("narrow", "broad")
        for pair in pairs:
            assert organism.judge(pair.question, pair.misaligned).label == "misaligned"
            assert organism.judge(pair.question, pair.aligned).label == "aligned"
            assert pair.question in held_out
            assert abs(len(pair.misaligned.split()) - len(pair.aligned.split())) <= 2


def test_narrow_and_broad_do_not_meet():
    found = organism.margins("finance")
    assert not {p.question for p in found["narrow"]} & {p.question for p in found["broad"]}


def test_the_base_prefers_kind_answers():
    chat = emmech.load_model("pocket")
    for pairs in organism.margins().values():
        assert Margin(pairs)(chat).means()["margin"] < -0.1
