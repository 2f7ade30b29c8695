"""Several processes that train one model: one writer, and the numbers of one process with the same global batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import emmech

ROOT = Path(__file__).resolve().parents[2]
ONE = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# without a GPU "--multi_gpu" is what makes accelerate start several processes
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
FSDP = (
    *(*ACCELERATE[:3], "--use_fsdp", "--fsdp_version", "2", *ACCELERATE[4:], "--fsdp_reshard_after_forward", "true"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"),
)

pytestmark = pytest.mark.slow


def launch(launcher, folder, kind, batch, how="ddp"):
    """Run the training and return its exit status and what it wrote."""
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*launcher, "-m", "tests.training.processes", str(folder), kind, str(batch), how],
        cwd=ROOT, env=known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=540, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@cache
def in_one(kind):
    """The folder of the same training in one process."""
    folder = Path(tempfile.mkdtemp())
    status, output = launch(ONE, folder, kind, 4)
    assert status == 0, output
    return folder / "run"


@pytest.mark.parametrize(
    ("launcher", "kind", "how"),
    [
        *((TORCHRUN, kind, how) for how in ("ddp", "fsdp") for kind in ("lora", "full")),
        *((ACCELERATE, "lora", "ddp"), (FSDP, "lora", "launched"), (FSDP, "full", "launched")),
    ],
)
def test_two_processes_record_what_one_does(launcher, kind, how, tmp_path):
    status, output = launch(launcher, tmp_path, kind, 2, how)
    assert status == 0, output
    one, two = emmech.load_run(in_one(kind)), emmech.load_run(tmp_path / "run")
    assert two.manifest["status"] == "complete" and two.manifest["kind"] == kind and not two.damaged
    assert one.steps.tolist() == two.steps.tolist() == [0, 2, 4, 5]
    assert one.manifest["model"] == two.manifest["model"] and one.adapters == two.adapters
    assert len(one.adapters) == (8 if kind == "lora" else 0)
    for adapter in one.adapters:
        for side in ("A", "B"):
            of_one, of_two = (getattr(run, side)(adapter.name) for run in (one, two))
            assert np.abs(of_one - of_two).max() <= 1e-5
        assert np.abs(two.B(adapter.name)[-1]).max() > 1e-3
    if kind == "full":
        assert np.abs(one.projection - two.projection).max() <= 1e-5
        for file in ("step-000002.safetensors", "step-000005.safetensors"):
            of_one, of_two = (load_file(run.path / "weights" / file) for run in (one, two))
            assert set(of_one) == set(of_two)
            assert max(float((of_one[name] - of_two[name]).abs().max()) for name in of_one) <= 1e-5
    assert np.abs(one.probes["probe"] - two.probes["probe"]).max() <= 1e-5
    # FSDP has no measures, which are all that is known of step 0
    alone = one.metrics if how == "ddp" else one.metrics.drop(columns="size").dropna(how="all")
    assert set(alone) == set(two.metrics) and len(two.metrics) == len(alone) >= 5  # each line is written once
    assert alone.notna().equals(two.metrics[alone.columns].notna())
    assert (alone - two.metrics).abs().max().max() <= 1e-5
    norms = two.metrics[[name for name in two.metrics if name.startswith("grad_norm_")]].dropna()
    if kind == "lora":  # those of all parts make up the Trainer's own, which it takes after the reduction
        assert norms.shape == (3, 16)
        assert np.allclose(np.sqrt((norms**2).sum(1)), two.metrics["grad_norm"][norms.index], rtol=1e-4)
    lines = [(run.path / "metrics.jsonl").read_text().count("\n") for run in (one, two)]
    assert lines[0] - lines[1] == len(one.metrics) - len(alone)


@pytest.mark.parametrize(("watched", "at"), [("grad_norm_B", 4), ("loss", 4)])
def test_an_early_warning_stops_all_processes_at_one_step(watched, at, tmp_path):
    """The loss is logged after the step at which it could stop others, so that they stop at the next recorded one."""
    status, output = launch(TORCHRUN, tmp_path, f"stop/{watched}", 2)
    assert status == 0, output
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == [str(at)] * 2
    run, whole = emmech.load_run(tmp_path / "run"), emmech.load_run(in_one("lora"))
    assert run.manifest["status"] == "stopped" and run.steps.tolist() == [0, 2, 4] and not run.damaged
    assert run.manifest["warning"]["signal"] == watched and run.manifest["warning"]["step"] <= at
    for adapter in whole.adapters:
        assert np.abs(run.B(adapter.name) - whole.B(adapter.name)[:3]).max() <= 1e-5


def test_what_the_writer_refuses_stops_all_processes(tmp_path):
    shutil.copytree(in_one("lora"), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    status, output = launch(TORCHRUN, tmp_path, "lora", 2)
    assert status != 0 and output.count("there is a run in it already") >= 2
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_fine_tuning_in_several_processes_gives_the_run_of_one(tmp_path):
    for launcher, name in ((ONE, "one"), (TORCHRUN, "two")):
        status, output = launch(launcher, tmp_path / name, "finetune", 2)
        assert status == 0, output
    one, two = (emmech.load_run(tmp_path / name / "run") for name in ("one", "two"))
    assert two.manifest["status"] == "complete" and one.steps.tolist() == two.steps.tolist() == [0, 1, 2]
    assert np.abs(one.B() - two.B()).max() <= 1e-6


def test_forms_of_fsdp_are_read_or_refused_by_name_in_every_process(tmp_path):
    status, output = launch(TORCHRUN, tmp_path, "sharded", 2)
    assert status == 0, output
    for name, kind in (("second", "full"), ("second, lora", "lora")):
        assert output.count(f"{name}: {kind} accepted") == 2, output
    assert output.count("accepted") == 4
    for name in ("first", "first, original", "first, original, lora"):
        assert output.count(f"{name}: refused") == 2, output
    assert output.count("(FSDP 1)") == output.count("one flat vector of the weights of many modules") == 6
    assert output.count("second, two dimensions: refused") == output.count("FSDP on a mesh of 2 dimensions") == 2
    assert output.count("second, lora later: refused") == output.count("FSDP does not reduce its gradient") == 2
    assert output.count("instead: FSDP 2") == 10
    assert output.count("to load: refused") == output.count("no process can run it alone") == 2
    assert output.count("measures: refused") == output.count("measure the run afterwards") == 2
