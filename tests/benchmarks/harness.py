"""Contests between emmech and a peer at its best settings: equality first, then interleaved medians.

What is compared is the thread's own CPU time, since a wall clock on a shared machine measures the neighbours too;
with one thread and an idle machine the two agree. Both are kept.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Contest:
    """One row of the table.

    Args:
        work: what both do.
        peer: what it is measured against, with its settings.
        target: the ratio that is wanted, at least.
        bound: the ratio that arithmetic or memory traffic allows, and the reason in words; or what says so from the
            peer's seconds (:func:`arithmetic`).
        ours: does the work and returns its numbers.
        theirs: the same, by the peer.
        tolerance: largest absolute difference between the two that counts as equal; None where the outputs are
            random samples, and ``check`` compares them instead.
        check: compares both outputs, and says in words what was found equal; raises AssertionError otherwise.
    """

    work: str
    peer: str
    target: float
    bound: str | Callable[[float], str]
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    tolerance: float | None = 5e-6
    check: Callable[[Any, Any], str] | None = None
    times: float = 1.0  # a peer that works one variant at a time does a part of them, and its seconds count so often
    repeats: int = 5
    # seconds of ours and theirs where both are parts of one run
    pairs: Callable[[], list[tuple[float, float]]] | None = None
    # "module:function" that loads the model, and that does the work of either side: for the memory of a process alone
    alone: tuple[str, str, str] | None = None


class Skipped(Exception):
    """A contest whose peer is not installed."""


@dataclass(frozen=True)
class Row:
    """A contest's outcome; seconds of thread time, one entry per repeat."""

    work: str
    peer: str
    target: float
    bound: str
    equality: str
    ours: list[float]
    theirs: list[float]
    ours_wall: list[float]
    theirs_wall: list[float]
    threads: int
    times: float = 1.0
    peaks: tuple[float, float] | None = None  # MB
    profile: str = ""  # where ours spend their time

    @property
    def ratio(self) -> float:
        """Median of the interleaved pairs' ratios."""
        return statistics.median(b / a for a, b in zip(self.ours, self.theirs, strict=True))


def equal(first: Any, second: Any, tolerance: float = 5e-6) -> str:
    """Assert that two arrays agree; says how well."""
    difference = float(np.abs(np.asarray(first) - np.asarray(second)).max())
    assert difference <= tolerance, f"differ by {difference:.2e}, allowed {tolerance:.0e}"
    return f"equal to {difference:.1e}"


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, the CPU seconds of the process and the wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def peak(load: str, work: str) -> float:
    """How far the resident memory of a process of its own rises while it works, above that of the loaded model, in MB.

    Linux only: the high-water mark is set back once the model is loaded.
    """
    names = ", ".join(f"{one.partition(':')[2]} as {name}" for one, name in ((load, "load"), (work, "work")))
    code = (
        f"import torch; torch.set_num_threads(1); from {load.partition(':')[0]} import {names}\n"
        "def read(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(key))\n"
        "load(); open('/proc/self/clear_refs', 'w').write('5'); before = read('VmRSS'); work()\n"
        "print(read('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def run(contest: Contest) -> Row:
    """Assert equality, then time both in turn."""
    first, second = contest.ours(), contest.theirs()
    if contest.check is not None:
        equality = contest.check(first, second)
    else:
        equality = equal(first, second, contest.tolerance or 5e-6)
    taken = _in_turn(contest)
    return Row(
        contest.work,
        contest.peer,
        contest.target,
        contest.bound if isinstance(contest.bound, str) else contest.bound(statistics.median(taken["theirs"])),
        equality,
        threads=torch.get_num_threads(),
        peaks=(peak(*contest.alone[:2]), peak(*contest.alone[::2])) if contest.alone else None,
        profile=profiled(contest.ours),
        **taken,
    )


def _in_turn(contest: Contest) -> dict[str, list[float]]:
    """CPU and wall seconds of both sides, interleaved."""
    taken: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_wall": [], "theirs_wall": []}
    if contest.pairs is not None:
        for pair in contest.pairs():
            taken["ours"].append(pair[0])
            taken["theirs"].append(pair[1])
        return taken
    for turn in range(contest.repeats):
        sides = [("ours", contest.ours), ("theirs", contest.theirs)]
        for name, function in sides if turn % 2 == 0 else sides[::-1]:
            _, cpu, wall = timed(function)
            times = contest.times if name == "theirs" else 1.0
            taken[name].append(cpu * times)
            taken[f"{name}_wall"].append(wall * times)
    return taken


def gflop(work: Callable[[], Any]) -> float:
    """Billions of additions and multiplications in the matrix products of a piece of work.

    As torch's own counter has them; attention in a fused kernel is not among them on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


# torch's operators by what they do to memory; what is in none of these is a pass over numbers
_KINDS = {
    "matrix products": ("mm", "addmm", "addmm_"),
    "products of many small matrices": ("bmm", "baddbmm", "baddbmm_"),
    "fused attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "copies and gathers": (
        *("copy_", "cat", "index", "index_select", "gather", "index_copy_", "index_add_", "index_put_"),
    ),
}


def profiled(work: Callable[[], Any]) -> str:
    """Shares of CPU time by kind of operator, largest first, as torch's profiler sees one more repeat."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        _, total, _ = timed(work)
    spent: dict[str, float] = {}
    for one in seen.key_averages():
        space, _, name = one.key.rpartition("::")
        if space == "aten":
            kind = next((kind for kind, names in _KINDS.items() if name in names), "element-wise and other operators")
            spent[kind] = spent.get(kind, 0.0) + one.self_cpu_time_total / 1e6
    spent["between operators"] = max(total - sum(spent.values()), 0.0)
    total = sum(spent.values())  # the profiler's own clock may see more than the process's
    largest = sorted(spent.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * seconds / total:.0f} %" for kind, seconds in largest if seconds > 0.005 * total)


def speed(rows: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of one product ``[rows, d_in] x [d_in, d_out]``, the best of twenty."""
    x, weight = torch.randn(rows, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype)
    best = min(timed(lambda: torch.nn.functional.linear(x, weight))[2] for _ in range(20))
    return 2 * rows * d_in * d_out / best / 1e9


def arithmetic(
    ours: Callable[[], Any], theirs: Callable[[], Any], why: str, shape: tuple[int, int, int], times: float = 1.0
) -> Callable[[float], str]:
    """A bound counted and measured: the products of both sides, and how long ours take at the least.

    Args:
        why: what ours leave out.
        shape: rows, width in and width out of the product that ours are mostly made of.
        times: as in the contest.
    """

    def bound(seconds: float) -> str:
        mine, other, rate = gflop(ours), gflop(theirs) * times, speed(*shape)
        least = mine / rate
        return (
            f"matrix products: {mine:,.0f} GFLOP against {other:,.0f}, {other / mine:.2f}x ({why}). Products of "
            f"{shape[0]:,} rows by {shape[1]} x {shape[2]} run at {rate:.0f} GFLOP/s, so that ours take {least:.2g} s "
            f"at the least, which would be {seconds / least:.1f}x"
        )

    return bound


def write(rows: list[Row], folder: Path) -> None:
    """``benchmarks.json`` keeps every figure; ``benchmarks.md`` is the table made from it. Old rows stay."""
    path = folder / "benchmarks.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    fresh = {
        row.work: {**asdict(row), "ratio": row.ratio, "processor": _processor(), "torch": torch.__version__}
        for row in rows
    }
    merged = [fresh.pop(old["work"], old) for old in known] + list(fresh.values())
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text(table(merged), encoding="utf-8")


def table(entries: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench` from `docs/benchmarks.json`, which holds every repeat. Each row: both sides give equal "
        "results first, then run in turn; seconds are medians of CPU time of the process, the ratio is the median over "
        "the interleaved pairs. The profile of each row is of one more repeat under torch's profiler, which makes "
        "small operators a little dearer than they are.",
        "",
        "| | work | emmech, s | peer, s | ratio | target | peak memory above the model, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    details = ["## Row by row", ""]
    for number, one in enumerate(entries, 1):
        ours, theirs = statistics.median(one["ours"]), statistics.median(one["theirs"])
        peaks = " against ".join(f"{value:.0f}" for value in one.get("peaks") or ())
        met = f"{one['ratio']:.2f}x" if one["ratio"] >= one["target"] else f"**{one['ratio']:.2f}x (missed)**"
        lines.append(
            f"| {number} | {one['work']} | {ours:.3g} | {theirs:.3g} | {met} | {one['target']:.3g}x | {peaks} |"
        )
        details += [
            f"{number}. **{one['work'][0].upper()}{one['work'][1:]}.**",
            f"   Against {one['peer']}. Outputs: {one['equality']}. {one['threads']} thread, "
            f"{len(one['ours'])} repeats, {one['processor']}.",
            "",
            f"   *What bounds the ratio:* {one['bound']}.",
            "",
            f"   *Where ours spend it:* {one.get('profile') or 'not profiled'}.",
            "",
        ]
    parts = [f"{one['times']:g} times in row {row}" for row, one in enumerate(entries, 1) if one.get("times", 1) != 1]
    if parts:
        lines += [
            "",
            "Where the peer works one variant at a time and its time is linear in their number, it does an even "
            "selection of them (compared with ours value by value), and its seconds are multiplied: "
            f"{', '.join(parts)}.",
        ]
    torches = ", ".join(sorted({one["torch"] for one in entries}))
    return "\n".join([*lines, "", f"torch {torches}.", "", *details])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
