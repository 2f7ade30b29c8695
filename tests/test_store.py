"""The append-only series: whole or not at all, and readable after any death."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.errors import EmmechError
from emmech.store import Series, append_jsonl, drop_unfinished, read_jsonl, writing


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


def test_only_the_unfinished_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content, left in ((b"1\n2\n", b"1\n2\n"), (b"1\n23", b"1\n"), (b"1", b""), (b"", b"")):
        path.write_bytes(content)
        drop_unfinished(path)
        assert path.read_bytes() == left


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(EmmechError, match=r"metrics\.jsonl:2"):
        read_jsonl(path)


def test_a_bad_line_is_left_out_and_named_where_the_caller_asks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \xff}\n[3]\n{"step": 2}\n')
    damaged = []
    assert read_jsonl(path, damaged) == [{"step": 1}, {"step": 2}]
    assert [one.name for one in damaged] == ["metrics.jsonl:2", "metrics.jsonl:3"]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), stacked=st.booleans())
def test_a_flipped_bit_is_named_and_never_handed_out(tmp_path_factory, data, stacked):
    folder = tmp_path_factory.mktemp("series")
    series = filled(folder, [0, 5, 10])
    wanted = {(key, step): series.read_step(key, step) for key in "AB" for step in (0, 5, 10)}
    if stacked:
        series.compact()
    path = folder / ("stacked.safetensors" if stacked else "step-000005.safetensors")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    broken = Series(folder)
    refused = []
    for (key, step), value in wanted.items():
        if step in broken.steps and key in broken.keys:
            try:
                assert np.array_equal(broken.read_step(key, step), value)
            except EmmechError as error:
                assert path.name in str(error)
                refused.append((key, step))
        else:
            refused.append((key, step))
    assert not refused or broken.verify() == [path]
    if not stacked:
        assert all(step == 5 for _, step in refused)


def test_files_without_checksums_are_read_as_they_are(tmp_path):
    from safetensors.numpy import save_file

    old = {"steps": np.array([0, 5]), "B": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_file(old, tmp_path / "stacked.safetensors")
    series = Series(tmp_path)
    assert np.array_equal(series.read("B"), old["B"]) and series.verify() == []


def test_a_reader_survives_the_stacking(tmp_path):
    filled(tmp_path, [0, 5, 10])
    reader = Series(tmp_path)
    Series(tmp_path).compact()
    assert reader.read("B")[:, 0].tolist() == [0, 5, 10]
    filled(tmp_path, [15])
    assert reader.read_step("B", 10).tolist() == [10] * 5


def test_an_opened_series_keeps_its_steps_when_more_are_recorded_and_stacked(tmp_path):
    """What is read before and after the stacking has the same steps; opened again, there are more."""
    writer = filled(tmp_path, [0, 5])
    reader = Series(tmp_path)
    first = reader.read("A")
    for step in (10, 15):
        writer.append(step, {"B": np.full(5, step, np.float32), "A": np.arange(3, dtype=np.float32) + step})
    writer.compact()
    assert reader.read("B")[:, 0].tolist() == [0, 5] == reader.steps.tolist()
    assert np.array_equal(reader.read("A"), first) and reader.read_step("B", 5).tolist() == [5] * 5
    with pytest.raises(EmmechError, match="step 10"):
        reader.read_step("B", 10)
    assert Series(tmp_path).read("B")[:, 0].tolist() == [0, 5, 10, 15]
    stacked = Series(tmp_path)
    writer.append(20, {"B": np.full(5, 20, np.float32), "A": np.full(3, 20, np.float32)})
    writer.compact()
    assert stacked.read("B")[:, 0].tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize("earlier", [[], [0]])
def test_a_series_that_is_stacked_while_it_is_opened_has_all_steps(tmp_path, monkeypatch, earlier):
    """The stacked file is written, and the steps' own files deleted, after they were listed."""
    import emmech.store

    if earlier:
        filled(tmp_path, earlier).compact()
    writer, own, calls = filled(tmp_path, [5, 10]), emmech.store._File, []

    class Slow(own):
        def __init__(self, path):
            if path.name.startswith("step") and not calls:
                calls.append(path)
                writer.compact()
            super().__init__(path)

    monkeypatch.setattr(emmech.store, "_File", Slow)
    series = Series(tmp_path)
    assert calls and series.steps.tolist() == [*earlier, 5, 10] and not series.damaged
    assert series.read("B")[:, 0].tolist() == [*earlier, 5, 10]


def test_a_reader_beside_two_stackings_in_a_row_succeeds(tmp_path, monkeypatch):
    """The file that the series has opened again is replaced before it is read."""
    writer, reader = filled(tmp_path, [0, 5]), Series(tmp_path)
    writer.compact()
    reload, calls = Series._reload, []

    def slow(self, *known):
        reload(self, *known)
        if self is reader and not calls:
            calls.append(1)
            writer.append(10, {"B": np.full(5, 10, np.float32), "A": np.ones(3, np.float32)})
            writer.compact()

    monkeypatch.setattr(Series, "_reload", slow)
    assert reader.read("B")[:, 0].tolist() == [0, 5] and calls


def test_a_link_to_nowhere_among_the_steps_is_named(tmp_path):
    filled(tmp_path, [0])
    (tmp_path / "step-000005.safetensors").symlink_to(tmp_path / "nowhere")
    series = Series(tmp_path)
    assert series.steps.tolist() == [0] and [path.name for path in series.damaged] == ["step-000005.safetensors"]


@pytest.mark.parametrize("name", ["B", "steps", "sum/B", "sum/steps"])
@pytest.mark.parametrize("changed", [{"data_offsets": [-(2**20), 24 - 2**20]}, {"data_offsets": [2**60, 2**60 + 24]},
                                     {"shape": [2**40, 5]}, {"shape": [-3, -5]}, {"dtype": "F16"}])  # fmt: skip
def test_a_header_that_points_outside_its_file_is_named(name, changed, tmp_path):
    filled(tmp_path, [0, 5, 10]).compact()
    path = tmp_path / "stacked.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header[name] |= changed
    path.write_bytes(len(text := json.dumps(header).encode()).to_bytes(8, "little") + text + content[start:])
    series = Series(tmp_path)
    assert path in (*series.damaged, *series.verify())


def test_a_reader_sees_the_file_that_took_the_place_of_the_one_it_opened(tmp_path):
    filled(tmp_path, [0, 5, 10]).compact()
    reader = Series(tmp_path)
    Series(tmp_path).drop_after(5)
    assert reader.read("B")[:, 0].tolist() == [0, 5] == reader.steps.tolist()


def test_a_file_cut_short_after_it_was_opened_is_named(tmp_path):
    filled(tmp_path, [0, 5, 10]).compact()
    reader, path = Series(tmp_path), tmp_path / "stacked.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EmmechError, match="stacked"):
        reader.read("B")
    assert reader.damaged == [path]


def test_a_disk_that_refuses_keeps_what_was_recorded(tmp_path, monkeypatch):
    from pathlib import Path

    series = filled(tmp_path, [0, 5])

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for attempt in (lambda: series.append(10, {"B": np.ones(5, np.float32)}), series.compact):
        with pytest.raises(EmmechError, match=r"No space left on device.*is kept"):
            attempt()
    assert Series(tmp_path).steps.tolist() == [0, 5]


def test_a_second_writer_is_told_who_writes(tmp_path):
    import os
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from emmech.store import writing\n"
        "with writing(Path(sys.argv[1]), 'train'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(EmmechError, match=f"process {holder.pid} on "), writing(tmp_path, "train"):
        pass
    holder.kill()  # the lock goes with its process
    holder.wait()
    with writing(tmp_path, "train"):
        assert str(os.getpid()) in (tmp_path / ".writer").read_text()


def test_a_lock_that_could_not_name_its_holder_is_free_again(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(EmmechError, match="No space left") as caught, writing(tmp_path, "train"):
            pass
    assert "is kept" in str(caught.value)
    with writing(tmp_path, "train"):
        pass


def test_steps_are_forgotten_wherever_they_are_kept(tmp_path):
    """Stacked, loose, stacked without being deleted, and half written."""
    series = Series(tmp_path)
    for step in range(4):
        series.append(step, {"B": np.full(3, step, np.float32)})
    loose = {path: path.read_bytes() for path in tmp_path.glob("step-*")}
    series.compact()
    for path, content in loose.items():
        path.write_bytes(content)
    (tmp_path / "step-000009.safetensors.partial").write_bytes(b"x")
    (tmp_path / ".tmpAbC").write_bytes(b"x")
    again = Series(tmp_path)
    again.drop_after(1)
    assert again.steps.tolist() == [0, 1] == Series(tmp_path).steps.tolist()
    kept = [f"step-{step:06d}.safetensors" for step in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stacked.safetensors", *kept]
    again.drop_after(-1)
    assert len(again.steps) == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_any_number_of_bytes_are_summed_and_checked(tmp_path, width, dtype):
    series = Series(tmp_path)
    for step in (0, 5):
        series.append(step, {"B": np.full(width, step + 1, dtype)})
    series.compact()
    opened = Series(tmp_path)
    assert not opened.verify() and opened.read("B").dtype == dtype
    path = tmp_path / "stacked.safetensors"
    content = path.read_bytes()
    value = np.full(width, 6, dtype).tobytes()
    at = content.rindex(value)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert Series(tmp_path).verify() == [path]
