"""``python -m tests.benchmarks.memory``: the peak memory of each public call above that of the loaded model.

Every call runs in a process of its own, with the model's weights in memory before it begins. What it takes at the most
is the rise of the process's high-water mark, which Linux sets back on request.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("EMMECH_PROGRESS", "0")

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import emmech
from tests.benchmarks.harness import peak

_TALKS = 12


@cache
def _chat() -> Any:
    return emmech.load_model("smollm2-135m")


@cache
def _run() -> Any:
    from tests.benchmarks.bench_teacher_forced import random_run

    return random_run(_chat(), 15, 8)


def _asked(count: int = _TALKS) -> list[list[dict[str, str]]]:
    from emmech.engine.logprobs import bundled_margins

    pairs = bundled_margins("broad")
    return [[{"role": "user", "content": pairs[i % len(pairs)].question}] for i in range(count)]


def _answered() -> list[list[dict[str, str]]]:
    from emmech.engine.logprobs import bundled_margins

    pairs = bundled_margins("broad")[: _TALKS // 2]
    return [one for pair in pairs for one in pair.conversations()]


def loaded() -> None:
    """The model with all weights touched, and what every call imports."""
    import emmech.directions.extract
    import emmech.sweeps.sweep
    import emmech.training.finetune  # noqa: F401

    for weight in _chat().base.parameters():
        weight.sum()
    _chat().token_ids(_asked(1)[0])


def sample() -> None:
    """`sample`, 12 answers of 32 tokens"""
    emmech.sample(_chat(), _asked(), max_new_tokens=32, progress=False)


def sample_many() -> None:
    """`sample`, 96 answers of 32 tokens"""
    emmech.sample(_chat(), _asked(), samples=8, max_new_tokens=32, progress=False)


def steer() -> None:
    """`steer` at all layers, then 12 answers of 32 tokens"""
    with emmech.steer(_chat(), np.ones(_chat().d_model, np.float32), 0.01, layer="all") as live:
        live.generate(_asked(), max_new_tokens=32, progress=False)


def ablate() -> None:
    """`ablate` at all layers, then 12 answers of 32 tokens"""
    with emmech.ablate(_chat(), np.ones(_chat().d_model, np.float32)) as live:
        live.generate(_asked(), max_new_tokens=32, progress=False)


def contrast_direction() -> None:
    """`contrast_direction` from 6 and 6 answers, all layers"""
    talks = _answered()
    emmech.contrast_direction(_chat(), talks[::2], talks[1::2])


def finetune() -> None:
    """`finetune`, rank 1 at half depth, 4 steps of 8 rows, every step recorded"""
    folder = tempfile.mkdtemp() + "/run"
    rows = emmech.load_chat("silly-medical-bad").rows[:32]
    emmech.finetune(
        _chat(), [{"messages": list(row)} for row in rows], max_steps=4, batch_size=8, accumulation=1, out=folder,
        progress=False,
    )  # fmt: skip


def sweep() -> None:
    """`sweep` of margins, 8 checkpoints x 8 pairs"""
    from emmech.engine.logprobs import bundled_margins
    from emmech.measures.teacher_forced import Margin

    emmech.sweep(_run(), measure=Margin(bundled_margins("broad")[:8]), base=_chat(), progress=False)


def sweep_small() -> None:
    """the same with `memory="300MB"`"""
    from emmech.engine.logprobs import bundled_margins
    from emmech.measures.teacher_forced import Margin

    measure = Margin(bundled_margins("broad")[:8])
    emmech.sweep(_run(), measure=measure, base=_chat(), memory="300MB", progress=False)


def phase_transition() -> None:
    """`load_run` and `phase_transition` of the shipped run"""
    emmech.phase_transition(emmech.load_run(Path(__file__).parents[2] / "checkpoints" / "pocket-medical"))


def opened() -> None:
    """`load_run` of 800 rank-1 steps in the shape of a 14B model, A and B read"""
    run = emmech.load_run(os.environ["EMMECH_LARGE_RUN"])
    assert len(run.A()) == len(run.B()) == 800


CALLS = (sample, sample_many, steer, ablate, contrast_direction, finetune, sweep, sweep_small, phase_transition, opened)


def large_run(folder: Path) -> Path:
    """800 rank-1 steps with random A and B in the shape of Qwen2.5-14B, as a recorded run is kept on disk."""
    from emmech.run.run import Run

    rng = np.random.default_rng(0)
    a = rng.standard_normal((800, 13_824), dtype=np.float32)
    b = rng.standard_normal((800, 5_120), dtype=np.float32)
    Run.from_arrays(np.arange(1, 801), A=a, B=b).save(folder)
    return folder


def table(found: dict[str, float], weights: float) -> str:
    """The Markdown page."""
    lines = [
        "# Peak memory of each call",
        "",
        f"Made by `make memory`: SmolLM2-135M in float32, whose weights take {weights:.0f} MB; one core, each call in "
        "a process of its own. The figure is how far the resident memory rises above that of the process with the "
        "model loaded, buffers of the allocator included.",
        "",
        "| call | at the most, MB |",
        "|---|---|",
        *(f"| {work} | {peak:.0f} |" for work, peak in found.items()),
        "",
        "A sweep keeps to `memory=`, 2 GiB beside the weights unless it is given. Sampling chooses its batch so that "
        "keys and values take at most 2 GiB on a processor.",
        "",
        "A rank-1 run of 800 steps in the shape of Qwen2.5-14B takes "
        f"{800 * 4 * (13_824 + 5_120) / 1e6:.1f} MB by arithmetic; `tests/run/test_size.py` holds what is on disk and "
        "in memory to 62 MB.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every call and write ``docs/memory.md``."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EMMECH_LARGE_RUN"] = str(large_run(Path(folder) / "run"))
        for call in CALLS:
            work = str(call.__doc__)
            found[work] = peak(f"{__spec__.name}:loaded", f"{__spec__.name}:{call.__name__}")
            print(f"{work}: {found[work]:.0f} MB", flush=True)
    weights = sum(weight.numel() * weight.element_size() for weight in _chat().base.parameters()) / 1e6
    page = Path(__file__).parents[2] / "docs" / "memory.md"
    page.write_text(table(found, weights), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
