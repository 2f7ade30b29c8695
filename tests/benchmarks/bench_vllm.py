"""Answers of many checkpoints, and plain answers, against vLLM on the same core."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emmech.chat.model import load_model, source_of
from emmech.engine.sample import sample
from emmech.evaluation.questions import resolve_questions
from emmech.measures.sampled import Sampled
from emmech.run.run import Run
from emmech.sweeps.sweep import sweep
from tests.benchmarks.bench_teacher_forced import random_run
from tests.benchmarks.harness import Contest, Skipped, gflop, speed

PYTHON = Path(__file__).resolve().parents[2] / "build" / "vllm" / "bin" / "python"
WORKER = Path(__file__).with_name("vllm_worker.py")
CHECKPOINTS, SAMPLES, NEW = 16, 4, 40
PLAIN, LONG = 8, 64
REPEATS = 3


class Peer:
    """vLLM's engine in its own environment and process group, on one core.

    Args:
        dtype: of weights and cache.
        adapters: folders, all of which fit into one batch.
    """

    def __init__(self, dtype: str, adapters: Sequence[Path] = ()) -> None:
        core = str(min(os.sched_getaffinity(0)))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": core,
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
        self.process = subprocess.Popen(
            [PYTHON, WORKER, source_of("smollm2-135m"), dtype, *adapters],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.end)
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@ "):
                return line[3:]
        raise RuntimeError("vLLM has ended")

    def answer(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[int | None], **settings: Any
    ) -> list[list[int]]:
        """Token ids of each prompt's answer, the token that ended it included."""
        assert self.process.stdin is not None
        asked = {"prompts": [list(ids) for ids in prompts], "adapters": list(adapters), **settings}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())  # type: ignore[no-any-return]

    def seconds(self) -> float:
        """CPU seconds of all its processes so far."""
        total = 0.0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError, IndexError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def end(self) -> None:
        """End every process of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _peer(dtype: str, adapters: Sequence[Path] = ()) -> Peer:
    if not PYTHON.exists():
        raise Skipped("vLLM is not installed; `make vllm` puts it into build/vllm")
    return Peer(dtype, adapters)


def _chat(dtype: str) -> Any:
    chat = load_model("smollm2-135m")
    chat.base.to(getattr(torch, dtype))
    return chat


def _pairs(ours: Callable[[], int], theirs: Callable[[], int], peer: Peer) -> list[tuple[float, float]]:
    """CPU seconds of either side in turn, at as many tokens as the peer wrote: sampled answers differ in length."""
    found = []
    for turn in range(REPEATS):
        taken: dict[str, tuple[float, int]] = {}
        for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
            before = (time.process_time(), peer.seconds())
            written = ours() if side == "ours" else theirs()
            spent = time.process_time() - before[0] if side == "ours" else peer.seconds() - before[1]
            taken[side] = (spent, written)
        (mine, own), (other, written) = taken["ours"], taken["theirs"]
        found.append((mine * written / own, other))
    return found


def _agree(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]], least: float) -> str:
    """How much of two sides' greedy answers is equal, up to the first near tie that rounding decides."""
    same = sum(list(a) == list(b) for a, b in zip(own, other, strict=True)) / len(own)
    assert same >= least, f"only {same:.0%} of greedy answers are equal"
    return f"{100 * same:.0f} % of {len(own)} greedy answers equal token by token"


def _ids(chat: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _count(chat: Any, texts: Sequence[str], finishes: Sequence[str]) -> int:
    """Tokens that were drawn, those that ended an answer included."""
    return sum(map(len, _ids(chat, texts))) + sum(finish == "stop" for finish in finishes)


def swept(dtype: str, target: float) -> Contest:
    """Sampled sweep on SmolLM2, 16 checkpoints x 8 questions x 4 samples, against vLLM"""
    chat = _chat(dtype)
    run: Run = random_run(chat, 15, CHECKPOINTS)
    home = Path(tempfile.mkdtemp())
    peer = _peer(dtype, [run.export_peft(int(step), home / f"s{step}", scale=1.0) for step in run.steps])
    questions = resolve_questions("first-plot", None)
    prompts = [chat.token_ids(question.messages()) for question in questions]
    which = [(index, ids) for index in range(CHECKPOINTS) for ids in prompts]
    rows = [one for one in which for _ in range(SAMPLES)]

    def answers(samples: int, temperature: float) -> Any:
        measure = Sampled(
            judge=lambda question, answer: "aligned", samples=samples, max_new_tokens=NEW, temperature=temperature
        )
        return sweep(run, steps=run.steps, measure=measure, base=chat, progress=False).responses

    def ours() -> int:
        found = answers(SAMPLES, 1.0)
        return _count(chat, found["response"], found["finish"])

    def theirs() -> int:
        got = peer.answer([ids for _, ids in rows], [index for index, _ in rows], temperature=1.0, max_tokens=NEW)
        return sum(map(len, got))

    def check(first: int, second: int) -> str:
        own = answers(1, 0.0)
        asked = [ids for _, ids in which], [index for index, _ in which]
        got = peer.answer(*asked, temperature=0.0, max_tokens=NEW)
        texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in got]
        said = _agree(own["response"].tolist(), texts, 0.9 if dtype == "float32" else 0.1)
        assert abs(first / second - 1) < 0.1, f"{first} against {second} tokens"
        return f"{said}; {first:,} and {second:,} sampled tokens"

    return Contest(
        f"sampled sweep on SmolLM2-135M in {dtype}, 16 checkpoints x 8 questions x 4 samples, 40 tokens",
        "vLLM 0.32 on the same core, 16 LoRA adapters in one batch of 512 answers, its prefix cache on, eager",
        target,
        _bound(
            ours,
            "both run every token that differs; ours reads each prompt once, the blocks below the adapter once for "
            "equal texts, and equal answers of neighbouring checkpoints once",
            dtype,
        ),
        ours,
        theirs,
        check=check,
        pairs=lambda: _pairs(ours, theirs, peer),
    )


def plain(dtype: str, target: float) -> Contest:
    """Plain answers on SmolLM2, 8 prompts x 64, against vLLM without LoRA"""
    chat = _chat(dtype)
    peer = _peer(dtype)
    questions = resolve_questions("first-plot", None)
    talks = [question.messages() for question in questions][:PLAIN]
    prompts = [chat.token_ids(messages) for messages in talks]

    def answers(samples: int, temperature: float) -> Any:
        return sample(
            chat, talks, samples=samples, max_new_tokens=NEW, temperature=temperature, batch_size=512, progress=False
        )

    def ours() -> int:
        return sum(one.tokens + (one.finish == "stop") for one in answers(LONG, 1.0))

    def theirs() -> int:
        rows = [ids for ids in prompts for _ in range(LONG)]
        return sum(map(len, peer.answer(rows, [None] * len(rows), temperature=1.0, max_tokens=NEW)))

    def check(first: int, second: int) -> str:
        own = [one.text for one in answers(1, 0.0)]
        got = peer.answer(prompts, [None] * len(prompts), temperature=0.0, max_tokens=NEW)
        texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in got]
        said = _agree(own, texts, 0.8 if dtype == "float32" else 0.1)
        assert abs(first / second - 1) < 0.1, f"{first} against {second} tokens"
        return f"{said}; {first:,} and {second:,} sampled tokens"

    return Contest(
        f"plain answers of SmolLM2-135M in {dtype}, 8 prompts x 64 answers, 40 tokens",
        "vLLM 0.32 on the same core without LoRA, one batch of 512 answers, its prefix cache on, eager",
        target,
        _bound(
            ours,
            "both run every token of every answer once; what can differ is the speed of products, of attention and of "
            "drawing",
            dtype,
        ),
        ours,
        theirs,
        check=check,
        pairs=lambda: _pairs(ours, theirs, peer),
    )


def _bound(ours: Callable[[], Any], why: str, dtype: str) -> Callable[[float], str]:
    def bound(seconds: float) -> str:
        mine, rate = gflop(ours), speed(512, 576, 1536) if dtype == "float32" else _speed(512, 576, 1536)
        least = mine / rate
        return (
            f"{why}. Ours multiply {mine:,.0f} GFLOP, at {rate:.0f} GFLOP/s for 512 rows by 576 x 1536, so that they "
            f"take {least:.2g} s at the least, which would be {seconds / least:.1f}x"
        )

    return bound


def _speed(rows: int, d_in: int, d_out: int) -> float:
    """As :func:`tests.benchmarks.harness.speed`, in bfloat16."""
    x, weight = torch.randn(rows, d_in).bfloat16(), torch.randn(d_out, d_in).bfloat16()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return 2 * rows * d_in * d_out / float(np.min(times)) / 1e9


def _named(make: Callable[..., Contest], dtype: str, target: float) -> Callable[[], Contest]:
    made = partial(make, dtype, target)
    made.__doc__ = f"{make.__doc__}, {dtype}"
    return made


CONTESTS = (
    _named(swept, "float32", 8.0),
    _named(swept, "bfloat16", 12.0),
    _named(plain, "float32", 1.3),
    _named(plain, "bfloat16", 1.2),
)
