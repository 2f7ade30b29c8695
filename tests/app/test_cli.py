"""The command line calls the same functions and speaks plainly when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import emmech
from emmech.app.cli import app, main
from tests.conftest import make_rows, make_tiny


@pytest.fixture
def model_folder(tmp_path):
    chat = make_tiny("qwen2")
    chat.model.save_pretrained(tmp_path / "model")
    chat.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_finetune_info_and_transition(model_folder, tmp_path):
    data = emmech.load_chat(make_rows()).save(tmp_path / "rows.jsonl")
    for name in ("run", "control"):
        output = call(
            "finetune", model_folder, data, "--out", tmp_path / name, "--layer", 2, "--set", "max_steps=24",
            "--set", "learning_rate=1e-2", "--set", "batch_size=2", "--set", "accumulation=1",
            "--set", "schedule=constant",
        )  # fmt: skip
        assert "recorded in" in output
    run = emmech.load_run(tmp_path / "run")
    assert run.adapters[0].layer == 2 and run.manifest["recipe"]["schedule"] == "constant"
    shown = call("info", tmp_path / "run")
    assert "layers.2.mlp.down_proj: rank 1" in shown and "grad_norm" in shown
    page = tmp_path / "page.html"
    shown = call("transition", tmp_path / "run", "--control", tmp_path / "control", "--page", page)
    assert "turn" in shown and "gradient-norm" in shown
    assert page.stat().st_size > 1e6 and "Phase transition" in page.read_text()[:2000]


@pytest.mark.parametrize("command", ["finetune", "transition", "info"])
def test_help_has_an_example(command):
    assert f"Example: emmech {command}" in " ".join(call(command, "--help").split())


def test_errors_are_messages_not_tracebacks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emmech", "info", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("emmech: cannot open the run") and "Traceback" not in error


def test_bad_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emmech", "finetune", "pocket", "medical", "--set", "rank"])
    with pytest.raises(SystemExit):
        main()
    assert "--set learning_rate=1e-3" in capsys.readouterr().err


def test_the_installed_command(tmp_path):
    run = emmech.Run.from_arrays([0, 5], B=np.eye(2, 4)).save(tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-m", "emmech", "info", str(run.path)], capture_output=True, text=True, check=True
    )
    assert "steps 0..5" in result.stdout
    assert json.loads((run.path / "run.json").read_text())["format"] == 1
