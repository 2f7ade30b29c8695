"""A study does each piece of work once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

import emmech
from emmech import EmmechError
from emmech.studies import StudySpec, work
from emmech.studies.study import journal

SPEC = {
    "models": "pocket", "data": ["medical"], "ranks": [1, 2], "seeds": [0, 1],
    "train": {"max_steps": 2, "margins": {}, "batch_size": 1, "accumulation": 1, "checkpoint_every": 1},
    "sweep": {"steps": [2], "measure": "answers"},
}  # fmt: skip


@pytest.fixture
def spec(tmp_path, monkeypatch):
    rows = emmech.organism.data("medical", n=12)
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(work, "sweep", lambda run, out, **_: _swept(run, out))
    return {**SPEC, "data": [str(path)]}


def _swept(run, out):
    """A sweep's result without its work."""
    import pandas as pd

    from emmech.sweeps.result import Sweep

    row = {
        "run": "r",
        "step": 2,
        "scale": 1.0,
        "coefficient": 0.0,
        "measure": "m",
        "item": 0,
        "value": 0.5,
        "weight": 1,
    }
    assert (Path(run) / "run.json").is_file()
    Sweep(pd.DataFrame([row]), {}).save(out)


def events(out) -> Counter:
    return Counter((row["event"], row["kind"]) for row in journal(out))


def times(out) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(out.rglob("done.json"))}


def killed(spec, out, *, before: str, count: int) -> None:
    """The study in a process that dies before the ``count``-th call of a step of its work."""
    child = os.fork()
    if not child:
        calls, kept = [0], work._DO[before]

        def dying(*args):
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            kept(*args)

        work._DO[before] = dying
        try:
            emmech.study(spec, out=out, progress=False)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_study_goes_on_and_does_nothing_twice(spec, tmp_path):
    out = tmp_path / "study"
    killed(spec, out, before="train", count=3)
    done = times(out)
    assert len(done) == 2 and events(out) == {("began", "train"): 3, ("ended", "train"): 2}
    killed(spec, out, before="sweep", count=2)
    table = emmech.study(spec, out=out, progress=False)
    assert done.items() <= times(out).items() and len(times(out)) == 8
    assert events(out)["ended", "train"] == events(out)["ended", "sweep"] == 4
    assert (table.frame["status"] == "done").all() and (table.frame["sweep_m"] == 0.5).all()
    assert table.frame[["rank", "seed"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert table.meta["done"] == table.meta["pieces"] == 8
    before = times(out)
    again = emmech.study({**spec, "seeds": [0, 1, 2]}, out=out, progress=False)
    assert before.items() <= times(out).items() and len(again.frame) == 6 and events(out)["ended", "train"] == 6
    for folder in again.frame["run"]:
        run = emmech.load_run(out / folder)
        assert run.manifest["status"] == "complete" and run.steps.tolist() == [0, 1, 2] and not run.damaged


def test_a_piece_that_another_process_holds_is_left_to_it(spec, tmp_path):
    from filelock import FileLock

    out = tmp_path / "study"
    (piece, *_) = StudySpec.read(spec).pieces()
    folder = piece.folder(out)
    folder.mkdir(parents=True)
    (out / "study.json").write_text("{}")
    with FileLock(folder / ".claim"):
        assert work.perform(piece, out, wait=False) == "busy"
    assert not (out / "journal.jsonl").exists()
    assert work.perform(StudySpec.read(spec).pieces()[-1], out, wait=False) == "waiting"


def test_a_piece_that_fails_is_told_and_tried_again(spec, tmp_path):
    out = tmp_path / "study"
    bad = {**spec, "ranks": [1], "seeds": [0], "layers": [[99]]}
    table = emmech.study(bad, out=out, progress=False)
    assert table.frame["status"].tolist() == ["failed"] and "layer=99" in repr(table)
    assert table.meta["failed"] == 1 and table.meta["done"] == 0
    emmech.study(bad, out=out, progress=False)
    assert events(out)["failed", "train"] == 2


def test_a_piece_that_runs_out_of_memory_does_not_end_the_study(spec, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError("no room for the keys")

    monkeypatch.setattr(work, "sweep", full)
    table = emmech.study({**spec, "ranks": [1], "seeds": [0]}, out=tmp_path / "study", progress=False)
    assert table.meta["failed"] == 1 and table.meta["done"] == 1
    assert "MemoryError: no room for the keys" in repr(table)


def test_what_a_piece_is_decides_its_digest(spec, tmp_path):
    pieces = StudySpec.read(spec).pieces()
    assert len({piece.digest for piece in pieces}) == len(pieces) == 8
    assert [one.digest for one in StudySpec.read(spec).pieces()] == [one.digest for one in pieces]
    path = Path(spec["data"][0])
    path.write_text(path.read_text() * 2)
    assert not {one.digest for one in StudySpec.read(spec).pieces()} & {one.digest for one in pieces}


def test_a_file_is_read_with_paths_beside_it(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}")
    (tmp_path / "study.yaml").write_text(
        "models: [pocket]\ndata: [mine.jsonl, medical]\nlayers: [[2], [1, 3], null]\nranks: 1\nsweep:\n"
    )
    read = StudySpec.read(tmp_path / "study.yaml")
    assert read.data == (str(tmp_path / "mine.jsonl"), "medical") and read.layers == ((2,), (1, 3), None)
    assert read.sweep == {} and read.evaluate is None and len(read.pieces()) == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": [1]}, "did you mean 'seeds'"),
        ({"models": None}, "names no models"),
        ({"ranks": ["one"]}, "whole number"),
        ({"train": {"seed": 3}}, "the study itself gives seed"),
        ({"sweep": [1]}, "arguments by name"),
        ({"sweep": {"scale": [1]}}, "did you mean 'scales'"),
        ({"evaluate": {"sample": 1}}, "did you mean 'samples'"),
        ({"evaluate": {"steps": [1, 2]}}, "the study itself gives steps"),
        ({"train": {"maximal_steps": 3}}, "emmech.finetune has no such argument"),
    ],
)
def test_a_malformed_study_is_refused(change, said):
    with pytest.raises(EmmechError, match=said):
        StudySpec.read({**SPEC, **change})


def test_no_file_and_no_yaml_are_refused(tmp_path):
    with pytest.raises(EmmechError, match="cannot be read"):
        StudySpec.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("models: [")
    with pytest.raises(EmmechError, match="no YAML"):
        StudySpec.read(tmp_path / "bad.yaml")


def test_other_weights_and_other_files_of_the_same_size_are_other_work(tmp_path):
    (model := tmp_path / "model").mkdir()
    for name, content in (("config.json", "{}"), ("model.safetensors", "a" * 9_000_000)):
        (model / name).write_text(content)
    (asked := tmp_path / "q.yaml").write_text("- a")

    def digests():
        how = {"evaluate": {"questions": str(asked)}, "sweep": {"measure": "answers"}}
        pieces = StudySpec.read({"models": [str(model)], "data": ["medical"], **how}).pieces()
        return [piece.digest for piece in pieces]

    first = digests()
    assert digests() == first
    asked.write_text("- b")
    other = digests()
    assert [one == two for one, two in zip(first, other, strict=True)] == [True, True, False]
    (model / "model.safetensors").write_text("a" * 8_999_999 + "b")
    assert not set(digests()) & {*first, *other}


JUDGE = {"url": "http://127.0.0.1:1/v1", "key": "sk-very-secret-123", "retries": 0}


@pytest.mark.parametrize("kind", ["server", "judge", "measure"])
def test_no_key_of_a_judge_is_written(spec, tmp_path, kind):
    from emmech.evaluation import LogprobJudge
    from emmech.measures import Sampled

    judge = emmech.Server("gpt", **JUDGE)
    judge = judge if kind == "server" else LogprobJudge(judge, cache=None)
    options = {"evaluate": {"judge": judge, "samples": 1, "max_new_tokens": 2}, "sweep": {"steps": [2]}}
    if kind == "measure":
        options = {"sweep": {"steps": [2], "measure": Sampled(judge=judge, samples=1)}}
    one = {name: value for name, value in spec.items() if name != "sweep"} | {"ranks": [1], "seeds": [0], **options}
    emmech.study(one, out=tmp_path / "s", progress=False)
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert b"gpt" in (tmp_path / "s" / "study.json").read_bytes()
    assert not [path for path in files if JUDGE["key"].encode() in path.read_bytes()]


class Named:
    """A judge that is known by its name alone."""

    columns = ("aligned", "coherent")

    def __init__(self, name):
        self.name = name

    def score(self, rows):
        return [{"aligned": 0.0, "coherent": 100.0} for _ in rows]


def test_a_judge_is_known_by_what_it_is():
    def digest(judge):
        spec = {"models": "pocket", "data": "medical", "evaluate": {"judge": judge}}
        return StudySpec.read(spec).pieces()[-1].digest

    def served(**extra):
        return emmech.Server("gpt", url="http://127.0.0.1:1/v1", extra=extra)

    assert digest(served(effort="low")) == digest(served(effort="low")) != digest(served(effort="high"))
    assert digest(Named("a")) == digest(Named("a")) != digest(Named("b"))  # in every process
    assert digest(lambda q, a: "aligned") == digest(lambda q, a: "aligned") != digest(lambda q, a: "mixed")
    assert digest(Path("judge")) == digest("judge")


def test_one_text_is_not_taken_letter_by_letter():
    with pytest.raises(EmmechError, match="one text"):
        StudySpec("pocket", ("medical",))
    with pytest.raises(EmmechError, match="one text"):
        StudySpec(("pocket",), "medical")


@pytest.mark.parametrize("scales", [(1.0, 20.0), (5.0, 20.0)])
def test_the_tables_sweep_is_the_adapter_as_trained(spec, tmp_path, monkeypatch, scales):
    import pandas as pd

    from emmech.sweeps.result import Sweep

    rows = [{"run": "r", "step": 2, "scale": scale, "coefficient": 0.0, "measure": "m", "item": str(item),
             "value": value * scale, "weight": weight}
            for scale in scales for item, (value, weight) in enumerate([(0.0, 3), (1.0, 1)])]  # fmt: skip
    monkeypatch.setattr(work, "sweep", lambda run, out, **_: Sweep(pd.DataFrame(rows), {}).save(out))
    table = emmech.study({**spec, "ranks": [1], "seeds": [0]}, out=tmp_path / "s", progress=False)
    assert table.frame.get("sweep_m", pd.Series(dtype=float)).tolist() == ([0.25] if 1.0 in scales else [])
