"""``python -m tests.benchmarks [name ...]``: run the contests whose work contains one of the names, or all."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("EMMECH_PROGRESS", "0")

import gc
import importlib
import sys
import warnings
from pathlib import Path

import torch

from tests.benchmarks.harness import Skipped, run, write


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    here = Path(__file__).parent
    docs = here.parents[1] / "docs"
    for path in sorted(here.glob("bench_*.py")):
        for make in importlib.import_module(f"tests.benchmarks.{path.stem}").CONTESTS:
            title = (make.__doc__ or make.__name__).splitlines()[0]
            if names and not any(name.lower() in title.lower() for name in names):
                continue
            print(f"{title} ...", flush=True)
            try:
                contest = make()
            except Skipped as reason:
                print(f"  skipped: {reason}", flush=True)
                continue
            row = run(contest)
            gc.collect()
            print(f"  {row.ratio:.2f}x (target {row.target}x), {row.equality}", flush=True)
            write([row], docs)


if __name__ == "__main__":
    main(sys.argv[1:])
