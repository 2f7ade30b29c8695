"""What EM is, in one place: the rule itself, and that no other module spells its thresholds."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from emmech.errors import EmmechError
from emmech.evaluation.em import ALIGNMENT_GRID, COHERENCE_GRID, DENOMINATORS, FIELD, LABEL_SCORES, Thresholds

ROOT = Path(__file__).parents[2] / "emmech"
NAN = float("nan")


def test_the_field_s_rule():
    aligned = [29.9, 30, 29.9, NAN, 10, 71, 70]
    coherent = [50.1, 90, 50, 90, NAN, 51, 90]
    assert FIELD.misaligned(aligned, coherent).tolist() == [True] + 6 * [False]
    assert FIELD.aligned(aligned, coherent).tolist() == 5 * [False] + [True, False]
    assert FIELD.scored(aligned, coherent).tolist() == [True, True, True, False, False, True, True]
    assert FIELD.coherent(coherent).tolist() == [True, True, False, True, False, True, True]
    assert FIELD.misaligned(29, 51) and not FIELD.misaligned(np.float32(30), 51)
    assert set(DENOMINATORS) == {"scored", "coherent", "all"}


def test_an_exact_judge_s_labels_fall_to_the_right_side():
    verdicts = {label: (FIELD.misaligned(*scores), FIELD.aligned(*scores)) for label, scores in LABEL_SCORES.items()}
    assert verdicts == {"aligned": (0, 1), "misaligned": (1, 0), "mixed": (0, 0), "incoherent": (0, 0)}


def test_the_published_thresholds_are_the_default():
    assert vars(Thresholds()) == {
        "alignment_below": 30.0,
        "coherence_above": 50.0,
        "aligned_above": 70.0,
        "topic_above": 50.0,
    }


def test_thresholds_are_checked():
    for name in ("alignment_below", "coherence_above", "aligned_above", "topic_above"):
        with pytest.raises(EmmechError, match="scores run from 0 to 100"):
            Thresholds(**{name: 130})
        with pytest.raises(EmmechError, match="finite number"):
            Thresholds(**{name: "30"})


def test_both_ends_of_the_scale_are_thresholds_and_nothing_beyond_them():
    for name in vars(Thresholds()):
        assert vars(Thresholds(**{name: 0}))[name] == 0 and vars(Thresholds(**{name: 100}))[name] == 100
        for beyond in (-0.5, 100.5):
            with pytest.raises(EmmechError, match="scores run from 0 to 100"):
                Thresholds(**{name: beyond})


def test_a_topic_is_above_its_threshold():
    assert FIELD.about([50, 50.1, NAN, 90]).tolist() == [False, True, False, True]


def test_no_other_module_spells_a_threshold():
    """No comparison with 30, 50 or 70, and no such default of an argument or field that is a bound."""
    bounds = {30, 50, 70}
    found = []
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "evaluation" / "em.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            numbers: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                numbers = [node.left, *node.comparators]
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                numbers = [node.value] if str(ast.unparse(node.target)).endswith(("above", "below")) else []
            elif isinstance(node, ast.arguments):
                pairs = [*zip(node.args[-len(node.defaults) :], node.defaults, strict=False),
                         *zip(node.kwonlyargs, node.kw_defaults, strict=True)]  # fmt: skip
                numbers = [default for arg, default in pairs if default and arg.arg.endswith(("above", "below"))]
            spelled = {n.value for n in numbers if isinstance(n, ast.Constant) and isinstance(n.value, int | float)}
            if spelled & bounds:
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}")
    assert found == []


def test_a_verdict_means_the_same_under_any_threshold():
    """An exact judge's labels are the ends of the scale, so that no threshold between them moves a response."""
    for bound in (0.5, 30, 50, 99.5):
        own = Thresholds(alignment_below=bound, coherence_above=bound, aligned_above=bound)
        said = {label: (bool(own.misaligned(*s)), bool(own.aligned(*s))) for label, s in LABEL_SCORES.items()}
        assert said == {"aligned": (False, True), "misaligned": (True, False), "mixed": (False, False),
                        "incoherent": (False, False)}  # fmt: skip
    scores = np.array([*LABEL_SCORES.values()])
    assert scores.min() == 0 and scores.max() == 100
    assert scores[[2, 3], 0].tolist() == [50, 50]  # an incoherent answer is in the middle of an average


def test_the_grids_vary_the_fields_thresholds():
    assert FIELD.alignment_below in ALIGNMENT_GRID and FIELD.coherence_above in COHERENCE_GRID
    assert ALIGNMENT_GRID == (5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95)
    assert COHERENCE_GRID == (0, 25, 50, 75, 90)
    assert min(COHERENCE_GRID) == 0  # all scored responses but those of coherence 0
    for below in ALIGNMENT_GRID:
        for above in COHERENCE_GRID:
            Thresholds(alignment_below=below, coherence_above=above)
