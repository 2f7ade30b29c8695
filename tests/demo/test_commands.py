"""The commands of ``python -m emmech.demo`` and ``python -m docs.studies``: what they call, with what."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import emmech
from docs.studies.__main__ import app as studies
from emmech.demo.__main__ import app as demo
from emmech.evaluation.screening import calibration
from emmech.organism.pretrain import ORGANISMS

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments, app=demo, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


@pytest.mark.parametrize(
    ("arguments", "function", "expected"),
    [
        ((), "pocket.main", ("demo/pocket",)),
        (("--out", "x"), "pocket.main", (Path("x"),)),
        (("pocket",), "pocket.main", ("demo/pocket",)),
        (("smollm2",), "smollm2.main", ("demo/smollm2-135m",)),
        (("capstone", "--model", "smollm2-135m"), "capstone.main", ("demo/capstone-smollm2-135m", "smollm2-135m")),
    ],
)
def test_the_demos(arguments, function, expected, monkeypatch):
    called = []
    monkeypatch.setattr(f"emmech.demo.{function}", lambda *given: called.append(given))
    call(*arguments)
    assert called == [expected]


@pytest.mark.parametrize(
    ("arguments", "module", "expected"),
    [
        (("pocket-directions", "--weights", "pocket-llama"), "pocket_directions", ("pocket-llama", None, None)),
        (("smollm2-directions",), "smollm2_directions", (Path("docs/directions-smollm2.md"),)),
    ],
)
def test_the_pages(arguments, module, expected, monkeypatch):
    called = []
    monkeypatch.setattr(f"docs.studies.{module}.main", lambda *given: called.append(given))
    call(*arguments, app=studies)
    assert called == [expected]


def test_the_organism_report(monkeypatch):
    monkeypatch.setattr("docs.studies.organism_report.bag_of_words_auc", lambda: {"same domain": 0.5})
    shown = call("organism-report", "--part", "base", "--samples", 1, app=studies)
    assert shown.startswith("# pocket: what it shows") and "| base | broad |" in shown and "same domain 0.50" in shown
    assert "did you mean 'base'" in call("organism-report", "--part", "bass", app=studies, code=1)
    assert "did you mean 'pocket-steep'" in call("organism-report", "--recipe", "pocket-step", app=studies, code=1)


def test_pretrain(tmp_path, monkeypatch):
    monkeypatch.setitem(ORGANISMS, "pocket-llama", replace(ORGANISMS["pocket-llama"], post_steps=1))
    assert "pocket-llama, seed 3" in call(
        "pretrain", "--name", "pocket-llama", "--seed", 3, "--steps", 1, "--out", tmp_path / "pocket-mine"
    )
    assert emmech.load_model(str(tmp_path / "pocket-mine")).n_layers == 6
    assert "did you mean 'pocket-llama'" in call("pretrain", "--name", "pocket-lama", "--out", tmp_path / "no", code=1)


def test_the_screening_fit_is_shown():
    assert json.loads(call("fit-screening", app=studies)) == calibration()


def test_the_make_file_and_the_texts_name_commands_that_exist():
    known = {
        module: {command.callback.__name__.replace("_", "-") for command in app.registered_commands} | {""}
        for module, app in (("emmech.demo", demo), ("docs.studies", studies))
    }
    folders = (("docs", "md"), ("docs/studies", "py"), ("emmech", "py"), ("emmech", "md"), ("notebooks", "ipynb"))
    texts = [path for folder, ending in folders for path in (ROOT / folder).rglob(f"*.{ending}")]
    named = re.compile(r"python -m ((?:emmech|docs)[.\w]*)(?: ([a-z][\w-]*))?")
    found = {
        (path.name, *match)
        for path in (ROOT / "Makefile", ROOT / "README.md", *texts)
        for match in named.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 5
    for name, module, command in found:
        assert module == "emmech" or command in known[module], (name, module, command)
