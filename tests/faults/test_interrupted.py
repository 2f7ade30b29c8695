"""Work that dies at any call that changes a file, at any time, or on a disk that fails, and readers beside a writer.

Each attempt is a process of its own (``worker.py``) whose calls are counted by ``shim.c``. After every fault the same
call goes on, and what it gives is compared with an uninterrupted one bit for bit.
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import emmech
from emmech.errors import EmmechError

HERE = Path(__file__).resolve()
TASKS = ("lora", "prefix", "full", "seeds", "uneven seeds", "evaluate", "sweep")
DISK = {"full": errno.ENOSPC, "read-only": errno.EROFS, "forbidden": errno.EACCES, "vanished": errno.ENOENT}
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="the calls are counted by a library that cc builds"
)


class Worker:
    """The warmed process, and what each task gives where nothing interrupts it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tries = folder, 0
        self._whole: dict[str, dict] = {}
        library = folder / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE.with_name("shim.c"), "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, "-m", "tests.faults.worker"]
        self.process = subprocess.Popen(command, cwd=HERE.parents[2], env=environment, **pipes)
        assert self.process.stdout.readline().strip() == "ready"
        self.ask("lora", folder / "swept")  # the run that sweeps read

    def start(self, task: str, folder: Path, **changes) -> None:
        self.process.stdin.write(json.dumps({"task": task, "folder": str(folder), **changes}) + "\n")
        self.process.stdin.flush()

    def ask(self, task: str, folder: Path, **changes) -> dict:
        self.start(task, folder, **changes)
        return json.loads(self.process.stdout.readline())

    def running(self) -> bool:
        return not select.select([self.process.stdout], [], [], 0)[0]

    def whole(self, task: str) -> dict:
        """What the task gives, and the number of calls that it makes."""
        if task not in self._whole:
            self._whole[task] = self.ask(task, self.folder / task.replace(" ", "_"))
        return self._whole[task]

    def fresh(self) -> Path:
        self.tries += 1
        return self.folder / f"try-{self.tries}"

    def goes_on(self, task: str, folder: Path, where: object) -> None:
        """The same call once more ends as if nothing had happened."""
        got = self.ask(task, folder, resume=True)
        assert "result" in got, (where, got.get("raw") or got.get("refused"))
        wanted = self.whole(task)["result"]
        differing = [key for key in wanted.keys() | got["result"].keys() if wanted.get(key) != got["result"].get(key)]
        assert not differing, (where, differing)
        shutil.rmtree(folder)

    def die_at(self, task: str, call: int) -> None:
        folder = self.fresh()
        assert self.ask(task, folder, at=call) == {"killed": True}, call
        self.goes_on(task, folder, f"{task} killed at call {call}")

    def fail_at(self, task: str, call: int, error: int, *, lasting: bool) -> None:
        folder, where = self.fresh(), f"{task}: error {error} at call {call}"
        got = self.ask(task, folder, at=call, error=error, lasting=int(lasting))
        assert "raw" not in got, (where, got["raw"])
        if "result" in got:  # what failed was of no account, as the deletion of a file that nothing reads
            assert {k: v for k, v in got["result"].items() if k != "left over"} == {
                k: v for k, v in self.whole(task)["result"].items() if k != "left over"
            }, where
        else:
            assert "is kept" in got["refused"] or "no folder can be made" in got["refused"], (where, got["refused"])
        self.goes_on(task, folder, where)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    started = Worker(tmp_path_factory.mktemp("faults"))
    yield started
    started.process.stdin.close()
    started.process.wait(60)


# every call


@pytest.mark.parametrize(
    "task,shares",
    [("lora", (0.02, 0.45, 0.97)), ("evaluate", (0.6,)), ("contexts", (0.7,)), ("sweep", (0.5,)), ("league", (0.75,))],
)
def test_killed_at_some_calls_it_ends_as_if_uninterrupted(worker, task, shares):
    for share in shares:
        worker.die_at(task, 1 + int(share * (worker.whole(task)["calls"] - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_at_every_call_it_ends_as_if_uninterrupted(worker, task):
    calls = worker.whole(task)["calls"]
    assert calls > 20
    for call in range(1, calls + 1):
        worker.die_at(task, call)


# any time


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lora", "full", "seeds", "evaluate", "contexts", "league", "sweep"])
def test_killed_at_random_times_again_and_again(worker, task):
    """Ten times a task, each up to three times before it may finish."""
    dice, seconds = random.Random(task), worker.whole(task)["seconds"]
    for attempt in range(10):
        folder = worker.fresh()
        for again in range(dice.randint(1, 3)):
            worker.ask(task, folder, after=dice.uniform(0, 1.2 * seconds), resume=again > 0)
        worker.goes_on(task, folder, f"{task}: {attempt}")


# a disk that fails


@pytest.mark.parametrize("task,share", [("lora", 0.01), ("lora", 0.5), ("evaluate", 0.6)])
def test_on_a_full_disk_the_error_says_what_is_kept(worker, task, share):
    worker.fail_at(task, 1 + int(share * (worker.whole(task)["calls"] - 1)), errno.ENOSPC, lasting=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", DISK)
@pytest.mark.parametrize("task", ["lora", "full", "seeds", "evaluate", "sweep"])
def test_a_disk_that_fails_at_any_call_is_an_error_that_says_what_is_kept(worker, task, fault):
    calls = worker.whole(task)["calls"]
    for call in range(1 + list(DISK).index(fault), calls + 1, len(DISK)):  # each call with one of the faults
        worker.fail_at(task, call, DISK[fault], lasting=call % 2 == 0)


# readers beside a writer


@pytest.mark.slow
def test_a_reader_beside_a_writer_always_succeeds(worker):
    """Opened and read whole while it trains; what was opened early is read again after the files were stacked."""
    folder = worker.fresh()
    worker.start("long", folder)
    early, reads, seen = None, 0, set()
    while worker.running():
        try:
            run = emmech.load_run(folder / "out")
        except EmmechError as error:  # before the manifest is written there is no run
            assert reads == 0 and ("no run.json" in str(error) or "no such folder" in str(error)), error
            continue
        if not len(run.steps):
            with pytest.raises(EmmechError, match="no step is recorded yet"):
                run.B(run.adapters[0].name)
        for name in (info.name for info in run.adapters if len(run.steps)):
            a, b = run.A(name), run.B(name)  # the files may be stacked in between
            assert len(a) == len(b) == len(run.steps) and np.isfinite(a).all() and np.isfinite(b).all()
        assert not run.damaged
        assert repr(run) and run.metrics is not None
        reads += 1
        seen.add(len(run.steps))
        early = early or (run if len(run.steps) else None)
    told = json.loads(worker.process.stdout.readline())
    assert "result" in told, told
    assert reads > 3 and len(seen) > 2
    final = emmech.load_run(folder / "out")
    assert final.manifest["status"] == "complete" and len(final.steps) == 201
    steps = len(early.steps)
    for info in final.adapters:
        assert np.array_equal(early.B(info.name), final.B(info.name)[:steps])
        assert np.array_equal(early.A(info.name), final.A(info.name)[:steps])


def test_a_second_sweep_into_one_folder_is_refused(tmp_path):
    from emmech.store import writing
    from tests.conftest import make_tiny
    from tests.sweeps.conftest import random_run

    chat = make_tiny("llama")
    run = random_run(chat)
    options = dict(measure={"one": lambda chat: 1.0}, base=chat, out=tmp_path / "s", progress=False)
    with writing(tmp_path / "s", "sweep"), pytest.raises(EmmechError, match="is writing there"):
        emmech.sweep(run, **options)
    made = emmech.sweep(run, **options)
    with writing(tmp_path / "s", "sweep"):  # a finished one is read beside a writer
        assert np.array_equal(emmech.sweep(run, **options).frame["value"], made.frame["value"])
