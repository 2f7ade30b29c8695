"""The page of a run: well-formed, complete without a network, and open about what is not there."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import emmech
from emmech import Direction, EmmechError
from emmech.app.cli import app
from emmech.app.report import _by_step, write_report
from emmech.evaluation.evaluate import stored_evaluations
from tests.test_results import EVIL, _evaluation, _run, _study, _sweep

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
HEADINGS = [
    "What was trained", "Does it turn, and when?", "Phase diagram", "Directions", "Interventions", "Evaluations",
    "Realignment",
]  # fmt: skip
VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The page's elements, with a check that all are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.commands: list[str] = []
        self.scripts: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.figures = 0
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        self.outside += [url for key in ("src", "href") if (url := given.get(key) or "#")[:1] != "#"]
        self.figures += given.get("class") == "plotly-graph-div"
        assert not any(key.startswith("on") for key in given)
        if tag == "h2":
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] == ["h2"]:
            self.headings[-1] += data
        elif self.open[-1:] == ["code"]:
            self.commands.append(data)
        self.text += "" if self.open[-1:] in (["script"], ["style"]) else data


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("pocket-medical", "pocket-good-medical"):
        shutil.copytree(CHECKPOINTS / name, folder / name)
    return folder


def test_a_run_with_nothing_but_its_record_names_what_is_missing(runs):
    path = write_report(runs / "pocket-medical", [runs / "pocket-good-medical"])
    page = Page(path)
    assert page.headings == HEADINGS and not page.outside
    assert path == runs / "pocket-medical" / "report.html" and 3e6 < path.stat().st_size < 8e6
    assert sum(len(one) > 1e6 for one in page.scripts) == 1  # plotly.js once
    for command in ("sweep", "direction", "evaluate", "realign"):
        assert f"emmech {command} {runs / 'pocket-medical'}" in page.text, command
    assert "ablation_table" in page.text and "No control was given" not in page.text
    assert "against pocket-good-medical" in page.text and "mlp.down_proj: rank 1" in page.text
    assert f"emmech transition {runs / 'pocket-medical'} --control {runs / 'pocket-good-medical'}" in page.commands


def test_what_is_there_is_shown_and_no_name_is_markup(tmp_path):
    folder = tmp_path / "x<b>&'\"y"
    run = _run().save(folder)
    sweep = _sweep()
    sweep = type(sweep)(sweep.frame.assign(run=run.name), sweep.meta)
    sweep.save(folder / "sweep")
    _study().save(folder / "kept" / EVIL.replace("/", "_"))
    Direction(np.eye(3, 8), EVIL).save(folder / "direction.safetensors")
    for step in (1, 2, 3):
        one = _evaluation(step)
        type(one)(one.frame, {**one.meta, "step": step, "questions": EVIL}).save(folder / "evaluations" / f"e{step}")
    again = _run(1)
    again.manifest |= {"start": {"run": run.name, "step": 59}, "data": {"name": EVIL}}
    again.save(tmp_path / "again")
    page = Page(write_report(folder))
    assert page.headings == HEADINGS and not page.outside
    assert not any(script.lstrip().startswith("alert(") for script in page.scripts)
    assert page.text.count(EVIL) > 20 and "recorded here. It is made by" not in page.text
    assert page.figures == len(re.findall("newPlot", "".join(one for one in page.scripts if len(one) < 1e6)))
    assert page.figures >= 8 and len(page.commands) >= page.figures
    assert "Answers to read: the least aligned of 60" in page.text and "again goes on from step 59" in page.text
    assert "No control was given" in page.text


def test_a_curve_of_answers_is_of_one_judge_and_one_way_of_asking(tmp_path):
    folder = tmp_path / "run"
    _run().save(folder)
    others = [
        {},
        {"judge": "another"},
        {"pinned": {"judge": "mine", "code": "b"}},
        {"temperature": 0.0},
        {"system": "fold"},
    ]
    for step, more in enumerate([*others, {}, {}, {}], start=1):
        one = _evaluation(step)
        meta = {
            **one.meta,
            "step": step,
            "questions": "q",
            "judge": "mine",
            "pinned": {"judge": "mine", "code": "a"},
            **more,
        }
        type(one)(one.frame, meta).save(folder / "evaluations" / f"e{step}")
    path = _by_step(stored_evaluations(folder))
    assert sorted(set(path["step"])) == [1, 6, 7, 8]
    page = Page(write_report(folder))
    assert "judged by another" in page.text and "judged by mine" in page.text


def test_the_command_reads_checkpoints_of_other_code(runs, tmp_path):
    run = emmech.load_run(runs / "pocket-medical")
    for step in (50, 100, 150):
        run.export_peft(step, tmp_path / "theirs" / f"checkpoint-{step}")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "theirs")], catch_exceptions=False)
    assert result.exit_code == 0 and str(tmp_path / "theirs" / "report.html") in result.stdout
    page = Page(tmp_path / "theirs" / "report.html")
    assert page.headings == HEADINGS and "could not be measured" in page.text


def test_results_elsewhere_are_read_and_damaged_ones_left_out(runs, tmp_path):
    _study().save(tmp_path / "study")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "study.json").write_text("{")
    path = write_report(runs / "pocket-medical", results=[tmp_path], out=tmp_path / "page.html")
    assert path == tmp_path / "page.html" and "No study" not in Page(path).text


@pytest.mark.parametrize("options", [{}, {"full": True, "out": "page.html"}])
def test_a_run_in_memory_has_no_folder(options):
    with pytest.raises(EmmechError, match="in memory"):
        write_report(_run(), **options)


@pytest.mark.slow
def test_everything_is_made_where_it_is_asked_for(runs, tmp_path):
    shutil.copytree(runs / "pocket-medical", tmp_path / "run")
    page = Page(write_report(tmp_path / "run", full=True))
    assert page.text.count("recorded here. It is made by") == 1  # realignment needs data
    assert {"sweep", "ablation", "misalignment.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    again = Page(write_report(tmp_path / "run"))
    assert again.figures == page.figures


def test_a_light_page_says_the_same_without_a_script(tmp_path) -> None:
    full, light = (
        write_report(CHECKPOINTS / "pocket-medical", out=tmp_path / f"{one}.html", light=one) for one in (0, 1)
    )
    page, whole = Page(light), Page(full)
    assert page.headings == whole.headings and page.commands == whole.commands
    assert not page.figures and not page.scripts and whole.figures
    assert "<svg" in light.read_text(encoding="utf-8") and light.stat().st_size < 200_000
