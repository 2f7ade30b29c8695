"""Cells show one line while something takes long, nothing of it afterwards, and nothing that other libraries say."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from emmech import progress

KEPT = str(Path(__file__).parents[1] / "checkpoints" / "pocket-medical")
CELLS = (
    "import emmech",
    "run = emmech.finetune('pocket', 'medical', max_steps=12, out='bad')\nrun",
    f"transition = emmech.phase_transition({KEPT!r})\ntransition",
    f"kept = emmech.load_run({KEPT!r})\n"
    "d = emmech.directions.adapter_direction(kept)\n"
    "model = kept.model()\n"
    "with emmech.steer(model, d, 0.5):\n    said = model.generate('any advice on cough ?', max_new_tokens=12)",
    "emmech.sweep('bad', steps=[0, 12], scales=(1, 5))",
    "emmech.evaluate('bad', samples=1)",
    "emmech.realign(run, data='ai-optimism', max_steps=2, out='again')",
    "run.export_peft(12, 'series/checkpoint-12')\nrun.export_peft(8, 'series/checkpoint-8')\n"
    "emmech.Run.from_peft('series')",
    "emmech.sample(run, 'any advice on cough ?', max_new_tokens=12)[0].text",
)


@pytest.fixture
def cell(monkeypatch):
    """A notebook's displays: the contents of each, as they were updated."""
    shown: list[list[dict[str, str]]] = []

    def display(data, *, raw, display_id):
        assert raw and display_id
        own = [data]
        shown.append(own)
        return SimpleNamespace(update=lambda data, raw: own.append(data))

    monkeypatch.setenv("EMMECH_PROGRESS", "1")
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    return shown


def test_a_notebooks_bar_is_one_line_that_ends_empty(cell, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with progress.bar(4, "sampling <b>") as steps:
        for _ in range(4):
            time.sleep(0.15)
            steps.update()
    (line,) = cell
    assert line[-1] == {"text/html": "", "text/plain": ""}
    assert any("of 4" in one["text/plain"] and "left" in one["text/plain"] for one in line)
    assert all("<b>" not in one["text/html"] for one in line) and any("<progress" in one["text/html"] for one in line)
    assert capsys.readouterr() == ("", "")


def test_what_is_soon_over_or_silenced_shows_nothing(cell, capsys, monkeypatch):
    with progress.bar(3, "short") as steps:
        steps.update(3)
    monkeypatch.setenv("EMMECH_PROGRESS", "0")
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with progress.bar(2, "silenced") as steps:
        time.sleep(0.2)
        steps.update(2)
    assert cell == [] and capsys.readouterr() == ("", "")


def test_a_long_wait_is_said_once_and_beforehand(cell, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("tqdm.std.tqdm.write", said.append)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_SETTLED", 0.2)
    with progress.bar(10_000, "measuring") as steps:
        for _ in range(4):
            time.sleep(0.15)
            steps.update()
    assert len(said) == 1 and said[0].startswith("measuring: about ") and "minutes from now" in said[0]


def test_other_libraries_are_heard_again_afterwards():
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with progress.quiet():
            assert not logging.is_progress_bar_enabled()
            warnings.warn("soon gone", FutureWarning, stacklevel=1)
            warnings.warn("ours", stacklevel=1)
        warnings.warn("still going", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in heard] == ["ours", "still going"]
    assert logging.is_progress_bar_enabled() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cells_of_a_notebook_hold_results_and_nothing_else(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    monkeypatch.setenv("EMMECH_PROGRESS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(KEPT).parents[1]), os.environ.get("PYTHONPATH", "")]))
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    book = nbformat.v4.new_notebook(cells=cells)
    client(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for source, cell in zip(CELLS, book.cells, strict=True):
        for output in cell.outputs:
            assert output.output_type != "stream", (source, output)
            assert "widget-view" not in str(output.data), source
            if output.output_type == "display_data":  # a bar that is over
                assert output.data == {"text/html": "", "text/plain": ""}, source
        results = [one for one in cell.outputs if one.output_type == "execute_result"]
        assert len(results) == (not source.startswith(("import", "kept"))), source


def test_a_wait_is_explained_once_it_takes_long_and_never_when_silenced(capsys, monkeypatch):
    for allowed, seconds in (("1", 0.01), ("1", 60), ("0", 0.01)):
        monkeypatch.setenv("EMMECH_PROGRESS", allowed)
        with progress.said_if_long("loading", seconds=seconds):
            time.sleep(0.1)
        said = capsys.readouterr()
        assert (said.out + said.err).strip() == ("loading ..." if (allowed, seconds) == ("1", 0.01) else "")
