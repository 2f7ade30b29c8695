"""The append-only series: whole or not at all, and readable after any death."""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from inspect import currentframe, unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.errors import EmmechError
from emmech.store import (
    MemorySeries,
    Series,
    _checksums,
    append_jsonl,
    drop_files,
    drop_unfinished,
    file_name,
    intact,
    kept,
    made_folder,
    read_jsonl,
    save_tensors,
    sealed,
    warn_of_lines,
    write_bytes,
    write_json,
    write_jsonl,
    writing,
)


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


def test_arrays_in_memory_are_read_as_a_series_is():
    arrays = {"B": np.arange(6.0).reshape(3, 2), "A": np.ones((3, 1))}
    series = MemorySeries([0, 5, 10], arrays)
    assert series.keys == ("B", "A") and series.steps.tolist() == [0, 5, 10]
    assert series.read("B") is arrays["B"] and series.read_step("B", 5).tolist() == [2.0, 3.0]


def test_steps_are_read_in_order_whatever_else_is_in_the_folder(tmp_path):
    series = filled(tmp_path, [10, 0])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-x.safetensors").write_text("no step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (series, Series(tmp_path)):
            assert one.steps.tolist() == [0, 10] and set(one.keys) == {"A", "B"}
            assert one.read("B")[:, 0].tolist() == [0, 10] and not one.damaged
    assert Series(tmp_path / "nowhere").steps.tolist() == [] and Series(tmp_path / "nowhere").keys == ()


def test_the_sums_are_those_of_files_that_were_written_before():
    """Words of eight bytes where the row is made of such, else of four, two or one; each row has its own sum."""
    for width, word in ((8, 8), (16, 8), (12, 4), (20, 4), (6, 2), (10, 2), (9, 1), (15, 1), (5, 1), (3, 1)):
        rows = np.arange(200, 200 + 2 * width).astype(np.uint8).reshape(2, width)
        wanted = [
            sum(int.from_bytes(row[at : at + word].tobytes(), "little") for at in range(0, width, word)) % 2**64
            for row in rows
        ]
        assert _checksums(rows).tolist() == wanted, width
    assert _checksums(np.zeros((3, 0), np.float32)).tolist() == [0, 0, 0]
    assert _checksums(np.ones((2, 3, 2), np.float32)).shape == (2,)


def test_a_header_that_claims_more_than_the_file_is_damage(tmp_path):
    filled(tmp_path, [0, 5])
    path = tmp_path / "step-000005.safetensors"
    content = path.read_bytes()
    for length in (2**62, len(content) + 1, 0):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        series = Series(tmp_path)
        assert series.damaged == [path] and series.steps.tolist() == [0]
    path.write_bytes(content + b"more")
    assert Series(tmp_path).damaged == [path]


@pytest.mark.parametrize("count", [2, 12])
def test_the_steps_of_changed_rows_are_named_up_to_ten(tmp_path, count):
    steps = [5 * at for at in range(14)]
    filled(tmp_path, steps).compact()
    path = tmp_path / "stacked.safetensors"
    content = bytearray(path.read_bytes())
    for step in steps[1 : 1 + count]:
        content[content.rindex(np.full(5, step, np.float32).tobytes())] ^= 1
    path.write_bytes(content)
    series = Series(tmp_path)
    with pytest.raises(EmmechError, match="bytes of B have changed") as caught:
        series.read("B")
    assert str(steps[1 : 1 + min(count, 10)]) in str(caught.value)
    with pytest.raises(EmmechError, match=r"since they were written *\n"):
        series.read_step("B", 5)
    assert series.read_step("B", 0).tolist() == [0] * 5 and series.damaged == [path]
    assert series.read("A")[:, 0].tolist() == steps


def test_what_has_no_steps_or_is_gone_is_refused_by_name(tmp_path):
    with pytest.raises(EmmechError, match="step 3 is not in it"):
        filled(tmp_path, [0]).read_step("B", 3)
    filled(tmp_path, [5]).compact()
    reader = Series(tmp_path)
    with pytest.raises(EmmechError, match="step 3 is not in it"):
        reader.read_step("B", 3)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(EmmechError, match="B is no longer in it"):
        reader.read("B")
    assert reader.steps.tolist() == []


def test_a_file_that_is_replaced_at_every_reading_is_given_up(tmp_path, monkeypatch):
    filled(tmp_path, [0]).compact()
    reader = Series(tmp_path)
    os.utime(tmp_path / "stacked.safetensors", (1, 1))
    monkeypatch.setattr(Series, "_reload", lambda self, known: None)  # opened, and replaced before it is read
    with pytest.raises(EmmechError, match="replaced again and again"):
        reader.read("B")


def test_the_stacked_file_is_on_the_disk_before_the_steps_are_deleted(tmp_path, monkeypatch):
    """A single step is not waited for: it is lost with the machine at most."""
    synced, sync = [], os.fsync

    def names():
        return sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(names()), sync(number)))
    series = filled(tmp_path, [0, 5])
    assert synced == []
    series.compact()
    steps = ["step-000000.safetensors", "step-000005.safetensors"]
    assert synced == [["stacked.safetensors.partial", *steps]]
    assert names() == ["stacked.safetensors"]
    series.compact()  # nothing is left to stack
    assert len(synced) == 1


def test_a_stacked_file_without_later_steps_is_left_alone(tmp_path):
    filled(tmp_path, [0, 5]).compact()
    before = (tmp_path / "stacked.safetensors").stat()
    Series(tmp_path).drop_after(5)
    after = (tmp_path / "stacked.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    series = Series(tmp_path)
    series.drop_after(0)
    assert series.steps.tolist() == [0] and series.read("B").tolist() == [[0] * 5]


def test_only_unfinished_files_are_dropped_without_a_step(tmp_path, monkeypatch):
    filled(tmp_path, [0, 5])
    unfinished = [tmp_path / "step-000009.safetensors.partial", tmp_path / ".tmpAbC"]
    for path in unfinished:
        path.write_bytes(b"x")
    listed = list(tmp_path.iterdir())
    drop_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000.safetensors", "step-000005.safetensors"]
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed))  # another process has deleted them since
    drop_files(tmp_path)
    drop_files(tmp_path / "nowhere")


def test_a_file_of_tensors_is_made_with_its_folders(tmp_path):
    from safetensors import safe_open

    for name, tensor in (("a", np.arange(3.0)), ("b", torch.arange(3.0))):
        path = tmp_path / "x" / name / "t.safetensors"
        save_tensors({"t": tensor}, path, "write it", metadata={"format": "pt"})
        save_tensors({"t": tensor}, path, "write it", metadata={"format": "pt"})
        with safe_open(path, framework="np") as file:
            assert file.get_tensor("t").tolist() == [0, 1, 2] and file.metadata() == {"format": "pt"}
        assert [one.name for one in path.parent.iterdir()] == ["t.safetensors"]


def test_only_failures_of_the_disk_are_explained(tmp_path):
    with pytest.raises(ZeroDivisionError), kept("write it", tmp_path):
        1 / 0  # noqa: B018
    with (
        pytest.raises(EmmechError, match=r"the disk refuses it \(No space left on device\)"),
        kept("write it", tmp_path),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(EmmechError, match=r"the disk refuses it \(odd\)"), kept("write it", tmp_path):
        raise OSError("odd")
    with pytest.raises(EmmechError, match="no NUL"), kept("write it", Path("a\0b")):
        raise AssertionError("it was begun")


def test_a_second_writer_does_not_wait(tmp_path, monkeypatch):
    def waits(seconds):
        raise AssertionError(f"it waited {seconds} s")

    with writing(tmp_path / "new" / "run", "train"):
        monkeypatch.setattr(time, "sleep", waits)
        with pytest.raises(EmmechError, match="is writing there"), writing(tmp_path / "new" / "run", "train"):
            pass
        (tmp_path / "new" / "run" / ".writer").unlink()
        unnamed = pytest.raises(EmmechError, match="another process is writing there")
        with unnamed, writing(tmp_path / "new" / "run", "train"):
            pass
    assert not (tmp_path / "new" / "run" / ".writer").exists()


def test_folders_are_made_or_refused(tmp_path):
    folder = tmp_path / "a" / "b"
    assert made_folder("train", folder) == folder == made_folder("train", folder) and folder.is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside", Path("a\0b")):
        with pytest.raises(EmmechError, match="no folder can be made there"):
            made_folder("train", path)


def test_a_name_of_a_file_is_short_and_of_one_folder():
    assert file_name("a/b\\c\nd") == "a_b_c_d" and file_name("x" * 300) == "x" * 200


def test_files_are_written_whole_with_their_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    write_bytes(path, b"first")
    write_json(path, {"path": Path("x"), "n": 1})
    assert path.read_text() == '{\n  "path": "x",\n  "n": 1\n}\n' and [one.name for one in path.parent.iterdir()] == [
        "c.json"
    ]
    nested = {"step": 1, "of": {"a": float("inf"), "b": 2.0}, "text": "x", "none": None, "whole": 3}
    write_jsonl(path.with_name("rows.jsonl"), [nested, {"step": 2}])
    append_jsonl(path.with_name("rows.jsonl"), {"step": 3, "loss": -float("inf")})
    rows = read_jsonl(path.with_name("rows.jsonl"))
    assert rows == [nested | {"of": {"a": None, "b": 2.0}}, {"step": 2}, {"step": 3, "loss": None}]


def test_a_sealed_row_is_known_again():
    row = sealed({"text": "hello", "score": float("nan")})
    assert row["checksum"] == sealed({"text": "hello", "score": float("nan")})["checksum"]
    whole = sealed({"text": "hello"}, "one file")
    assert whole["checksum"] == zlib.crc32(b'one file{"text": "hello"}\n')
    assert intact(whole, "one file") is True and intact({"text": "hello"}, "one file") is False
    assert intact(whole, "another") is False and intact(whole | {"more": 1}, "one file") is False


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, " and 1 more"), (6, " and 3 more")])
def test_damaged_lines_are_named_where_the_work_was_asked_for(tmp_path, count, more):
    lines = [tmp_path / f"rows.jsonl:{at}" for at in range(1, count + 1)]

    def reads():
        unwrap(warn_of_lines)(lines, "they are asked again")  # without the checks of shapes, which are calls too

    def goes_on():
        reads()

    with pytest.warns(UserWarning, match="they are asked again") as seen:
        asked = currentframe().f_lineno + 1
        goes_on()
    named = ", ".join(line.name for line in lines[:3])
    assert str(seen[0].message).startswith(f"damaged lines in {tmp_path}: {named}{more}; they are")
    assert len(seen) == 1 and (seen[0].filename, seen[0].lineno) == (__file__, asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lines([], "nothing")


def test_no_file_is_an_empty_one_and_a_folder_is_refused(tmp_path):
    damaged = []
    assert read_jsonl(tmp_path / "nowhere.jsonl") == [] == read_jsonl(tmp_path / "a" / "b.jsonl", damaged)
    drop_unfinished(tmp_path / "nowhere.jsonl")
    assert not damaged and not (tmp_path / "nowhere.jsonl").exists()
    with pytest.raises(EmmechError, match="the disk refuses it"):
        read_jsonl(tmp_path)
    assert read_jsonl(tmp_path, damaged) == [] and damaged == [tmp_path]


def test_rows_are_those_that_are_expected(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n   \n{"b": 2}\n[1]\n{"a": 3}\n')
    damaged = []
    assert read_jsonl(path, damaged, sound=lambda row: "a" in row) == [{"a": 1}, {"a": 3}]
    assert [one.name for one in damaged] == ["rows.jsonl:4", "rows.jsonl:5"]
    with pytest.raises(EmmechError, match=r"rows\.jsonl:4"):
        read_jsonl(path, sound=lambda row: "a" in row)
    with pytest.raises(EmmechError, match=r"rows\.jsonl:5"):
        read_jsonl(path)


def test_files_of_tensors_have_the_permissions_of_other_files(tmp_path):
    (tmp_path / "plain").touch()
    for folder in (tmp_path, tmp_path / "new"):
        save_tensors({"t": np.ones(2)}, folder / "t.safetensors", "write it")
        assert (folder / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
