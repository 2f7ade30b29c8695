"""The append-only series: whole or not at all, and readable after any death."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.errors import EmmechError
from emmech.store import Series, append_jsonl, read_jsonl


def filled(folder, steps, width=5):
    series = Series(folder)
    for step in steps:
        series.append(step, {"B": np.full(width, step, np.float32), "A": np.arange(3, dtype=np.float32) + step})
    return series


@settings(max_examples=20, deadline=None)
@given(steps=st.sets(st.integers(0, 999_999), min_size=1, max_size=12), cut=st.integers(0, 12))
def test_stacking_changes_nothing(tmp_path_factory, steps, cut):
    folder = tmp_path_factory.mktemp("series") / "trajectory"
    steps = sorted(steps)
    series = filled(folder, steps[:cut])
    series.compact()  # an interrupted run that was resumed has both forms
    filled_later = Series(folder)
    for step in steps[cut:]:
        filled_later.append(step, {"B": np.full(5, step, np.float32), "A": np.arange(3, dtype=np.float32) + step})
    for open_again in (Series, compacted):
        reopened = open_again(folder)
        assert reopened.steps.tolist() == steps
        assert np.array_equal(reopened.read("B")[:, 0], np.array(steps, np.float32))
        for step in steps:
            assert np.array_equal(reopened.read_step("A", step), np.arange(3, dtype=np.float32) + step)


def compacted(folder):
    series = Series(folder)
    series.compact()
    return series


def test_a_truncated_file_is_named_and_the_rest_is_readable(tmp_path):
    filled(tmp_path, [0, 5, 10])
    broken = tmp_path / "step-000005.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4])
    series = Series(tmp_path)
    assert series.damaged == [broken]
    assert series.steps.tolist() == [0, 10]
    assert series.read("B")[:, 0].tolist() == [0, 10]


def test_a_crash_between_stacking_and_unlinking_leaves_no_duplicates(tmp_path):
    filled(tmp_path, [0, 5])
    leftover = (tmp_path / "step-000005.safetensors").read_bytes()
    Series(tmp_path).compact()
    (tmp_path / "step-000005.safetensors").write_bytes(leftover)
    (tmp_path / "step-000006.partial").write_bytes(b"half")
    assert Series(tmp_path).steps.tolist() == [0, 5]


def test_drop_after(tmp_path):
    filled(tmp_path, [0, 5, 10]).compact()
    series = filled(tmp_path, [15, 20])
    series.drop_after(5)
    assert Series(tmp_path).steps.tolist() == [0, 5]
    assert Series(tmp_path).read("B")[:, 0].tolist() == [0, 5]


def test_an_unfinished_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "loss": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1, "loss": None}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(EmmechError, match=r"metrics\.jsonl:2"):
        read_jsonl(path)
