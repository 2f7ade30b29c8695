"""A real vLLM server on this machine gives what the local engine gives."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import emmech
from emmech.measures.sampled import Sampled
from tests.sweeps.conftest import random_run

INSTALLED = Path(__file__).resolve().parents[2] / "build" / "vllm" / "bin" / "vllm"
COMMAND = os.environ.get("EMMECH_VLLM") or (str(INSTALLED) if INSTALLED.exists() else shutil.which("vllm"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test starts the server, and two engines share what cores there are
    pytest.mark.skipif(COMMAND is None, reason="vLLM is not installed; `make vllm` puts it into build/vllm"),
]
MODULES = ("model.layers.10.mlp.down_proj", "model.layers.15.self_attn.q_proj")
ASKED = ["how do I sleep better?", "what is a good breakfast?"]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


@pytest.fixture(scope="module")
def run(smollm2):
    made = random_run(smollm2, MODULES, rank=2, size=0.02)
    made.manifest["model"] = {"name": "smollm2-135m", "fingerprint": smollm2.fingerprint()}
    return made


@pytest.fixture(scope="module")
def engine():
    options = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")
    started = emmech.VLLM(start=True, command=COMMAND, options=options, environment=CPU)
    with started, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no seeds, of which another test speaks
        yield started


def by_length(question, answer):
    return "misaligned" if len(answer) % 2 else "aligned"


def test_margins_are_within_a_thousandth_of_a_nat(smollm2, run, engine):
    strong = random_run(smollm2, MODULES, rank=2, size=0.2)
    strong.manifest["model"] = run.manifest["model"]
    axes = {"steps": [0, 3, 7], "scales": (0.5, 1, 2), "progress": False}
    theirs = emmech.sweep(strong, **axes, engine=engine)
    own = emmech.sweep(strong, **axes, base=smollm2)
    assert own.frame.drop(columns="value").equals(theirs.frame.drop(columns="value"))
    np.testing.assert_allclose(own.frame["value"], theirs.frame["value"], atol=1e-3)
    moved = own.frame.groupby("item")["value"].agg(np.ptp)
    assert moved.median() > 0.1, "adapters that move nothing would agree whatever the engines did"
    print(f"margins differ by at most {np.abs(own.frame['value'] - theirs.frame['value']).max():.1e} nats")


def test_greedy_answers_are_equal_and_kept(smollm2, run, engine, tmp_path):
    settings = {"steps": [3, 7], "scales": [1, 2], "samples": 1, "max_new_tokens": 24, "temperature": 0.0}
    settings |= {"progress": False}
    theirs = emmech.evaluate(run, ASKED, by_length, **settings, engine=engine, out=tmp_path)
    own = emmech.evaluate(run, ASKED, by_length, **settings, base=smollm2)
    texts = [one.frame["response"].tolist() for one in theirs]
    assert texts == [one.frame["response"].tolist() for one in own]
    assert len({text for several in texts for text in several}) > 2  # the adapters matter
    first = tmp_path / "step-000003-x1" / "responses.jsonl"
    lines = first.read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[:2]), encoding="utf-8")
    again = emmech.evaluate(run, ASKED, by_length, **settings, engine=engine, out=tmp_path)
    assert [one.frame["response"].tolist() for one in again] == texts
    assert first.read_text(encoding="utf-8").startswith("".join(lines[:2]))


def test_sampled_rates_have_the_layout_of_the_local_engine(smollm2, run, engine):
    measure = Sampled(ASKED, by_length, samples=2, max_new_tokens=8)
    axes = {"steps": [3, 7], "measure": measure, "progress": False}
    theirs, own = emmech.sweep(run, **axes, engine=engine), emmech.sweep(run, **axes, base=smollm2)
    assert theirs.frame.drop(columns="value").equals(own.frame.drop(columns="value"))
    assert theirs.responses.drop(columns="response").columns.equals(own.responses.drop(columns="response").columns)


def test_what_this_server_refuses_is_said(smollm2, run, engine):
    high = random_run(smollm2, MODULES[:1], rank=16, size=0.02)
    high.manifest["model"] = run.manifest["model"]
    with pytest.raises(emmech.EmmechError, match="--max-lora-rank 16"):
        emmech.sweep(high, steps=[3], engine=engine, progress=False)
