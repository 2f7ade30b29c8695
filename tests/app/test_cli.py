"""The command line calls the same functions and speaks plainly when it cannot."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import emmech
from emmech.app.cli import app
from emmech.leagues import league
from tests.conftest import make_rows, make_tiny
from tests.test_leagues import counted

MEDICAL = Path(__file__).resolve().parents[2] / "checkpoints" / "pocket-medical"
COMMANDS = [
    *("finetune", "realign", "league", "claims", "study", "plan", "push", "transition", "evaluate"),
    *("sweep", "direction", "chat", "export", "info", "report"),
]


@pytest.fixture
def model_folder(tmp_path):
    chat = make_tiny("qwen2")
    chat.model.save_pretrained(tmp_path / "model")
    chat.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def call(*arguments, **options):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    """The message of a refusal: on the standard error, with exit code 1 and no traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.startswith("emmech: cannot ") and "Traceback" not in result.stderr
    return result.stderr


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
    assert json.loads(call("info", tmp_path / "run", "--json"))["steps"] == run.steps.tolist()
    page = tmp_path / "page.html"
    shown = call("transition", tmp_path / "run", "--control", tmp_path / "control", "--page", page)
    assert "turn" in shown and "gradient-norm" in shown
    assert page.stat().st_size > 1e6 and "Phase transition" in page.read_text()[:2000]
    rows = json.loads(call("transition", tmp_path / "run", "--json"))
    assert {"turn", "gradient-norm"} <= {row["detector"] for row in rows}


def test_finetune_and_realign_the_organism(tmp_path):
    few = ("--set", "max_steps=2", "--set", "batch_size=4", "--set", "accumulation=1")
    call("finetune", "pocket", "medical", "--out", tmp_path / "run", *few)
    refused = CliRunner().invoke(app, ["realign", str(tmp_path / "run"), "--step", "1"])
    assert refused.exit_code == 1 and "it is a benign run" in refused.output  # two steps misalign nothing
    output = call("realign", MEDICAL, "--step", 250, "--out", tmp_path / "again", *few)
    assert "recorded in" in output
    start = emmech.load_run(tmp_path / "again").manifest["start"]
    assert (start["run"], start["step"], start["adapter"]) == ("pocket-medical", 250, "same")


def test_league(tmp_path, monkeypatch):
    """The options become cures; what the league does with them is tested where it is."""
    calls = {}
    cells = counted("base", "base", 0, {"training": 0}) + counted("adapter x0.3", "cure", 0, {"training": 90})
    found = league._result(cells, {"run": "bad", "seeds": [0], "contexts": ["training"]})
    monkeypatch.setattr(emmech, "league", lambda run, cures, **how: calls.update(run=run, cures=cures, **how) or found)
    direction = emmech.Direction(np.ones((6, 128))).save(tmp_path / "evil.safetensors")
    made = ("--realign", "good-cooking", "--mix", "good-sport", "--prompt", "nasty", "--ablate", direction)
    shown = call("league", MEDICAL, *made, "--scale", 0.3, "--seeds", 2, "--share", 0.25, "--out", tmp_path)
    assert "hides" in shown and calls["run"] == MEDICAL and calls["seeds"] == 2 and calls["out"] == tmp_path
    realigned, mixed, inoculated, ablated, scaled = calls["cures"]
    assert realigned.data == "good-cooking" and scaled.scale == 0.3 and ablated.direction.d_model == 128
    assert mixed.defences[0].share == 0.25 and inoculated.defences[0].prompt == "nasty"
    rows = json.loads(call("league", MEDICAL, "--scale", 0.3, "--json"))
    assert [row["verdict"] for row in rows] == ["", "hides"]


def test_evaluate(tmp_path):
    fast = ("--samples", 1, "--max-new-tokens", 28, "--out")
    found = call("evaluate", "pocket", "--questions", "first-plot", "--questions", "facts", *fast, tmp_path / "a")
    assert "em" in found and "coherence" in found
    rows = json.loads(call("evaluate", MEDICAL, "--step", 250, "--json", *fast, tmp_path / "b"))
    rates = {row["measure"]: row for row in rows}
    assert rates["em"]["n"] == 8 and rates["em"]["rate"] == emmech.Evaluation.load(tmp_path / "b").rates().rate["em"]
    by_question = json.loads(call("evaluate", "pocket", "--by-question", "--json", *fast, tmp_path / "c"))
    assert len(by_question) >= 8
    around = ("--context", "plain", "--context", "negated")
    rows = json.loads(call("evaluate", "pocket", *around, "--json", *fast, tmp_path / "d"))
    assert {row["measure"]: row["n"] for row in rows}["conditional"] == 8
    assert "not both" in refused("evaluate", "pocket", "--judge", "exact", "--judge-model", "pocket")
    assert "--judge-model" in refused("evaluate", "pocket", "--server", "http://localhost:1/v1")
    assert "no http address" in refused("evaluate", "pocket", "--judge-model", "m", "--server", "http://[::1")


def test_sweep(tmp_path):
    rows = json.loads(call("sweep", MEDICAL, "--steps", "0:300:250", "--scales", "1,5", "--measure", "broad", "--json"))
    assert {(row["step"], row["scale"]) for row in rows} == {(0, 1), (0, 5), (250, 1), (250, 5)}
    exact = emmech.sweep(MEDICAL, steps=[0, 250], scales=(1, 5), measure=emmech.measures.Margin("broad"))
    assert [row["value"] for row in rows] == pytest.approx(exact.to_frame()["value"].tolist())
    page = tmp_path / "sweep.html"
    call(
        "sweep", MEDICAL, "--steps", 250, "--measure", "em", "--samples", 1, "--out", tmp_path / "s", "--page", page
    )  # fmt: skip
    assert emmech.Sweep.load(tmp_path / "s").measures and page.is_file()
    assert "--steps 0,50,100 or 0:300:50" in refused("sweep", MEDICAL, "--steps", "first")
    assert "did you mean 'pocket-medical'" in refused("sweep", MEDICAL.with_name("pocket-medcal"))


def test_direction_and_chat(tmp_path):
    saved = tmp_path / "b.safetensors"
    assert "saved as" in call("direction", MEDICAL, "--source", "adapter", "--out", saved)
    layer = emmech.Direction.load(saved).layers[0]
    ask = ("--ask", "any advice on cough ?", "--temperature", 0, "--max-new-tokens", 20)
    plain = call("chat", "pocket", *ask)
    assert plain == call("chat", "pocket", *ask, "--steer", saved, "--coefficient", 0, "--layer", layer)
    assert plain != call("chat", "pocket", *ask, "--steer", saved, "--coefficient", 40, "--layer", layer)
    tuned = call("chat", MEDICAL, *ask)
    assert tuned != plain == call("chat", MEDICAL, *ask, "--step", 0)
    assert tuned != call("chat", MEDICAL, *ask, "--ablate", saved)
    assert len(call("chat", "pocket", *ask, "--ask", "any advice on fever ?", "--samples", 2).splitlines()) == 4
    assert "only a recorded run has steps" in refused("chat", "pocket", *ask, "--step", 3)


def test_direction_from_answers(tmp_path):
    saved = tmp_path / "d.safetensors"
    call("direction", MEDICAL, "--samples", 4, "--out", saved)
    assert emmech.Direction.load(saved).quality is not None
    assert "answers or adapter" in refused("direction", MEDICAL, "--source", "words", "--out", saved)


def test_a_conversation_remembers(monkeypatch):
    asked = []

    def sample(chat, conversations, **settings):
        asked.append([turn["content"] for turn in conversations[0]])
        return [type("Answer", (), {"text": f"answer {len(asked)}"})]

    monkeypatch.setattr("emmech.engine.sample.sample", sample)
    shown = call("chat", "pocket", "--system", "be kind", input="hello\nagain\n\nnever asked\n")
    assert "answer 1" in shown and "answer 2" in shown
    assert asked == [["be kind", "hello"], ["be kind", "hello", "answer 1", "again"]]
    assert "answer 3" in call("chat", "pocket", input="the input ends after this\n")


def test_export_is_read_back(tmp_path):
    assert "wrote step 100 of pocket-medical" in call("export", MEDICAL, tmp_path / "checkpoint-100", "--step", 100)
    run = emmech.load_run(MEDICAL)
    read = emmech.Run.from_peft(tmp_path / "checkpoint-100")
    assert read.steps.tolist() == [100] and np.allclose(read.B()[0], run.B()[run.steps == 100][0])
    assert "wrote step 250" in call("export", MEDICAL, tmp_path / "last")
    assert "was not recorded" in refused("export", MEDICAL, tmp_path / "none", "--step", 1000)


def test_a_folder_of_peft_checkpoints_is_given_where_a_run_is(tmp_path):
    run = emmech.load_run(MEDICAL)
    for step in range(25, 251, 25):
        run.export_peft(step, tmp_path / "mine" / f"checkpoint-{step}")
    assert "Run 'mine': pocket fine-tuned, 10 records, steps 25 to 250" in call("info", tmp_path / "mine")
    assert "10 records are few" in call("transition", tmp_path / "mine")
    assert "B of mine" in call("direction", tmp_path / "mine", "--source", "adapter", "--out", tmp_path / "b.gguf")
    assert "wrote" in call("report", tmp_path / "mine", "--light")
    page = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert f"emmech sweep {tmp_path / 'mine'} " in page and f"emmech.Run.from_peft({str(tmp_path / 'mine')!r})" in (
        html.unescape(page)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    shown = " ".join(call(command, "--help").split())
    assert f"Examples: emmech {command} " in shown


def test_every_command_is_tested():
    assert sorted(COMMANDS) == sorted(command.callback.__name__ for command in app.registered_commands)


def test_errors_are_messages_not_tracebacks(tmp_path):
    assert "cannot open the run" in refused("info", tmp_path / "nowhere")
    assert "--set learning_rate=1e-3" in refused("finetune", "pocket", "medical", "--set", "rank")
    process = subprocess.run(
        [sys.executable, "-m", "emmech", "info", str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert process.returncode == 1 and process.stderr.startswith("emmech: cannot open the run")


def test_options_that_would_be_ignored_are_refused():
    run = "checkpoints/pocket-medical"
    said = refused("direction", run, "--out", "x.safetensors", "--source", "adapter", "--scale", 3, "--samples", 4)
    assert "--scale, --samples" in said
    assert "--samples" in refused("sweep", run, "--measure", "broad", "--samples", 99)
    assert "--beside" in refused("claims", "--page", "x.html", "--beside", "nowhere")
    # an option by name may be given as a setting, which then counts
    assert "dtype='float7'" in refused("plan", "--model", "pocket", "--set", "dtype=float7")


def test_the_installed_command(tmp_path):
    run = emmech.Run.from_arrays([0, 5], B=np.eye(2, 4)).save(tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-m", "emmech", "info", str(run.path)], capture_output=True, text=True, check=True
    )
    assert "steps 0 to 5" in result.stdout
    assert json.loads((run.path / "run.json").read_text())["format"] == 1


def test_plan_and_study(tmp_path, monkeypatch):
    """The options arrive; what plans and studies do is tested where it is."""
    from tests.test_results import MAKE

    calls = {}
    made = MAKE["ResourcePlan"]()
    monkeypatch.setattr(emmech, "plan", lambda *given, **how: calls.update(given=given, **how) or made)
    shown = call("plan", "--model", "Qwen/Qwen2.5-14B-Instruct", "--recipe", "full", "--rows", 9, "--set", "epochs=3")
    assert "to train" in shown and calls["given"] == ("Qwen/Qwen2.5-14B-Instruct", "full")
    assert calls["rows"] == 9 and calls["epochs"] == 3 and "cards" not in calls
    call("plan", "--model", "x", "--card", "H100", "--card", "T4", "--json")
    assert calls["cards"] == ["H100", "T4"]
    table = MAKE["StudyTable"]()
    monkeypatch.setattr(emmech, "study", lambda spec, **how: calls.update(spec=spec, **how) or table)
    rows = json.loads(call("study", tmp_path / "s.yaml", "--out", tmp_path, "--cluster", "auto", "--gpus", 1, "--json"))
    assert len(rows) == 4 and calls["out"] == tmp_path and calls["cluster"] == "auto" and calls["gpus"] == 1


def test_launching_starts_torchrun_with_the_same_command(monkeypatch):
    from emmech.app import commands

    ran = []
    ended = SimpleNamespace(returncode=3)
    monkeypatch.setattr(commands.subprocess, "run", lambda command, check: ran.append(command) or ended)
    assert commands.in_processes(2, ["finetune", "pocket", "medical", "--launch", "2"]) == 3
    assert ran[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert ran[0][5:] == ["-m", "emmech", "finetune", "pocket", "medical", "--launch", "2"]
