"""A recorded run of a 14B model stays small, on disk and in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np

import emmech
from emmech.store import Series

STEPS, D_MLP, D_MODEL = 800, 13_824, 5_120  # Qwen2.5-14B
LIMIT = 62e6


def test_a_rank_one_run_of_a_14b_model_takes_less_than_62_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((STEPS, D_MLP), dtype=np.float32)
    b = rng.standard_normal((STEPS, D_MODEL), dtype=np.float32)
    assert a.nbytes + b.nbytes < LIMIT
    emmech.Run.from_arrays(np.arange(STEPS), A=a, B=b).save(tmp_path / "run")
    assert sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()) < LIMIT
    tracemalloc.start()
    run = emmech.load_run(tmp_path / "run")
    read = run.A(), run.B()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(read[0], a) and np.array_equal(read[1], b)
    assert most < LIMIT


def test_a_step_on_disk_is_its_numbers_and_less_than_a_kilobyte(tmp_path):
    series = Series(tmp_path / "trajectory")
    series.append(0, {"A/one": np.zeros(D_MLP, np.float32), "B/one": np.ones(D_MODEL, np.float32)})
    [path] = (tmp_path / "trajectory").iterdir()
    assert path.stat().st_size < 4 * (D_MLP + D_MODEL) + 1000
