"""Options that change memory and the number of processes change no result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import emmech
from emmech import EmmechError
from tests.conftest import make_rows, make_tiny

ROOT = Path(__file__).resolve().parents[2]
SHORT = dict(max_steps=4, learning_rate=1e-2, warmup_steps=1, margins={}, progress=False)


def trained(folder, *, family="llama", recipe="all-adapter", **options):
    options = {"batch_size": 2, "accumulation": 4, **SHORT, **options}
    return emmech.finetune(make_tiny(family), make_rows(), recipe=recipe, out=folder, **options)


def largest(one, two) -> float:
    assert one.steps.tolist() == two.steps.tolist()
    pairs = [(run_a.B(a.name), run_a.A(a.name)) for run_a in (one, two) for a in run_a.adapters]
    count = len(one.adapters)
    return max(float(np.abs(x - y).max()) for a, b in zip(pairs[:count], pairs[count:], strict=True)
               for x, y in zip(a, b, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "all-adapter"), pytest.param("gemma3", "all-adapter", marks=pytest.mark.slow), ("qwen2", "full")],
)
def test_accumulation_and_tokens_at_once_leave_the_step_as_it_is(family, recipe, tmp_path):
    rate = {"learning_rate": 1e-3}  # Adam makes a step of this size even of a gradient that is rounding alone
    one = trained(tmp_path / "one", family=family, recipe=recipe, batch_size=8, accumulation=1, **rate)
    for name, options in {"few": {"batch_size": 1, "accumulation": 8}, "tokens": {"batch_tokens": 40}}.items():
        two = trained(tmp_path / name, family=family, recipe=recipe, **options, **rate)
        assert np.abs((one.metrics["loss"] - two.metrics["loss"]).dropna()).max() <= 1e-5
        if recipe == "full":
            assert np.abs(one.projection - two.projection).max() <= 1e-4
        else:
            assert largest(one, two) <= 1e-5


@pytest.mark.parametrize(
    ("family", "recipe", "further"),
    [
        ("llama", "all-adapter", {}),
        ("gemma3", "single-rank1", {"prefix": True}),
        ("qwen2", "all-adapter", {"dropout": 0.1}),
        ("qwen2", "full", {"learning_rate": 1e-3}),
    ],
)
def test_gradient_checkpointing_gives_equal_numbers(family, recipe, further, tmp_path):
    one, two = (
        trained(tmp_path / str(on), family=family, recipe=recipe, gradient_checkpointing=on, **further)
        for on in (False, True)
    )
    assert one.metrics.equals(two.metrics)
    if recipe == "full":
        assert np.array_equal(one.projection, two.projection)
    else:
        assert largest(one, two) == 0.0


def test_gradient_checkpointing_keeps_less(monkeypatch, tmp_path):
    from torch.utils import checkpoint

    calls = []
    kept = checkpoint.checkpoint
    monkeypatch.setattr("emmech.engine.blocks.checkpoint", lambda *a, **k: calls.append(1) or kept(*a, **k))
    trained(tmp_path / "off", max_steps=1)
    assert not calls
    trained(tmp_path / "on", max_steps=1, gradient_checkpointing=True)
    assert calls


def test_a_model_that_is_not_written_out_checkpoints_its_own_blocks(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    shape = dict(n_embd=24, n_layer=2, n_head=2, vocab_size=len(tokenizer), n_positions=128)
    shape |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    runs = []
    for on in (False, True):
        torch.manual_seed(0)
        chat = emmech.load_model(GPT2LMHeadModel(GPT2Config(**shape)).eval(), tokenizer)
        options = {**SHORT, "recipe": "single-rank1", "gradient_checkpointing": on, "out": tmp_path / str(on)}
        runs.append(emmech.finetune(chat, make_rows(), batch_size=2, accumulation=2, **options))
        assert not chat.base.is_gradient_checkpointing and not chat.base.training
    assert largest(*runs) <= 1e-5


def test_bfloat16_is_an_option_and_adapters_stay_in_float32(tmp_path):
    make_tiny("llama").base.save_pretrained(tmp_path / "model")
    make_tiny("llama").tokenizer.save_pretrained(tmp_path / "model")
    options = {**SHORT, "recipe": "single-rank1", "batch_size": 2, "accumulation": 1}
    runs = [
        emmech.finetune(tmp_path / "model", make_rows(), dtype=dtype, out=tmp_path / dtype, **options)
        for dtype in ("float32", "bfloat16")
    ]
    assert [run.manifest["model"]["dtype"] for run in runs] == ["float32", "bfloat16"]
    assert runs[1].B().dtype == np.float32 and 0 < largest(*runs) < 0.02
    with pytest.raises(EmmechError, match="in memory already, in float32"):
        emmech.finetune(make_tiny("llama"), make_rows(), dtype="bfloat16", out=tmp_path / "no")


def test_defences_that_read_a_forward_are_refused_with_checkpointing(tmp_path):
    steer = emmech.defences.PreventativeSteering(emmech.Direction.single([1.0] * 48, layer=2, n_layers=4))
    with pytest.raises(EmmechError, match="twice"):
        trained(tmp_path / "run", gradient_checkpointing=True, defences=[steer], recipe="single-rank1")


def test_quantised_bases_are_refused_by_name(tmp_path, monkeypatch):
    make_tiny("llama").base.save_pretrained(tmp_path / "model")
    with pytest.raises(EmmechError, match="did you mean 'nf4'"):
        emmech.load_model(tmp_path / "model", quantize="nf")
    with pytest.raises(EmmechError, match="in memory already"):
        emmech.load_model(make_tiny("llama"), quantize="nf4")
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(EmmechError, match="bitsandbytes, which quantises, is not installed"):
        emmech.finetune(tmp_path / "model", make_rows(), quantize="nf4", out=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "near"), [("nf4", 0.4), ("int8", 0.1)])
def test_adapters_train_on_a_quantised_base(kind, near, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make_tiny("llama").base.save_pretrained(tmp_path / "model")
    make_tiny("llama").tokenizer.save_pretrained(tmp_path / "model")
    options = {**SHORT, "batch_size": 2, "accumulation": 1, "recipe": "single-rank1"}
    plain = emmech.finetune(tmp_path / "model", make_rows(), out=tmp_path / "plain", **options)
    run = emmech.finetune(tmp_path / "model", make_rows(), quantize=kind, out=tmp_path / kind, **options)
    assert np.abs(run.B()[-1]).max() > 1e-3
    assert np.abs((run.metrics["loss"] - plain.metrics["loss"]).dropna()).max() < near
    with pytest.raises(EmmechError, match="quantised"):
        emmech.finetune(tmp_path / "model", make_rows(), quantize=kind, recipe="full", out=tmp_path / "no")


def launched(count, folder, *further):
    """``emmech finetune --launch`` on a small model in a folder."""
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "emmech", "finetune", str(folder / "model"), str(folder / "rows.jsonl")]
    command += ["--launch", str(count), "--recipe", "all-adapter", "--out", str(folder / f"of-{count}")]
    for setting in ("max_steps=5", "learning_rate=0.01", "batch_size=3", "accumulation=2", "warmup_steps=1"):
        command += ["--set", setting]
    done = subprocess.run([*command, *further], cwd=ROOT, env=known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=900, check=False)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_two_launched_processes_train_what_one_does(tmp_path):
    import json

    make_tiny("llama").base.save_pretrained(tmp_path / "model")
    make_tiny("llama").tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    for count in (1, 2):
        status, output = launched(count, tmp_path, "--checkpoint-every", "2")
        assert status == 0, output
        assert output.count("recorded in") == 1
    one, two = (emmech.load_run(tmp_path / f"of-{count}") for count in (1, 2))
    assert two.manifest["status"] == "complete" and not two.damaged
    assert largest(one, two) <= 1e-5 and np.abs(two.B(two.adapters[0].name)[-1]).max() > 1e-3
    assert set(one.metrics) == set(two.metrics) and len(one.metrics) == len(two.metrics)
    assert (one.metrics - two.metrics).abs().max().max() <= 1e-4
    assert not (two.path / "resume").exists() and not (two.path / "prefix").exists()
    status, output = launched(2, tmp_path)
    assert status != 0 and "there is a run in that folder" in output
