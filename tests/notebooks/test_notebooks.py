"""The notebooks keep clean outputs, and run from top to bottom; the homework's checks tell right from wrong."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from docs.studies.notebooks import LIVE, PICTURES, STILL, execute, pictures

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
# what the outputs of each must say, in the kept file and after an execution
SAID = {
    "01-tour": ("% misaligned answers (95 % interval", "Panel: pocket-medical"),
    "02-transition": ("learned nothing", "lag:"),
    "03-directions": ("degenerate", "EM beyond random"),
    "04-realignment": ("then AI optimism", "conditional", "zig zag", "inoculation prompt"),
    "05-your-model": ("bad - control", "No turn is found"),
    "06-bridges": ("good-medical", "indirect"),
    "homework": ("question 12: not answered yet",),
}
books = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def _cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def _text(value):
    return "".join(value) if isinstance(value, list) else value


def _said(outputs):
    texts = [_text(one.get("text", "")) for one in outputs]
    texts += [
        _text(value) for one in outputs for mime, value in one.get("data", {}).items() if mime.startswith("text/")
    ]
    return "\n".join(texts)


def _outputs(cells):
    return [output for cell in cells for output in cell.get("outputs", [])]


def _shows(source: str) -> bool:
    """Whether a cell ends in a value, prints or checks."""
    tree = ast.parse(source)
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return isinstance(tree.body[-1], ast.Expr) or bool(calls & {"print", "check"})


def test_the_pictures_of_pages_are_those_of_the_notebooks(tmp_path):
    made = pictures(tmp_path)
    assert [path.name for path in made] == list(PICTURES)
    assert all(path.read_bytes() == (ROOT / "docs" / "figures" / path.name).read_bytes() for path in made)


def test_all_of_them_are_there():
    assert [path.stem for path in BOOKS] == list(SAID)


@books
def test_every_cell_that_shows_something_keeps_what_it_showed(path):
    code = _cells(path)
    showing = [cell for cell in code if _shows(_text(cell["source"]))]
    assert len(showing) > 6
    for cell in showing:
        assert cell["outputs"], _text(cell["source"])[:200]
    # executed once, from top to bottom
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


@books
def test_the_kept_outputs_are_clean(path):
    outputs = _outputs(_cells(path))
    assert not [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"]
    said = _said(outputs)
    assert not re.findall(r"(?:/tmp|/root|/home|/work|/Users)/\S*|Traceback|Warning:|\d+%\||at 0x[0-9a-f]+", said)
    assert all(words in said for words in SAID[path.stem])
    assert path.stat().st_size < 1_500_000


@books
def test_every_figure_has_a_still_picture(path):
    for data in (one["data"] for one in _outputs(_cells(path)) if LIVE in one.get("data", {})):
        assert data[STILL]


@books
def test_the_prose_leads_on(path):
    prose = [_text(cell["source"]) for cell in _cells(path, "markdown")]
    assert prose[0].startswith("# ") and "**" in prose[0]
    assert path.stem == "homework" or any("## Exercise" in one or "## Your turn" in one for one in prose[-2:])
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", "\n".join(prose)):
        assert (FOLDER / link).exists(), link


@pytest.mark.slow
@books
def test_it_runs(path):
    outputs = _outputs(execute(path).cells)
    assert not [one for one in outputs if one.get("name") == "stderr"]
    assert all(words in _said(outputs) for words in SAID[path.stem])


def _solutions():
    parts = re.split(r"^%% (\S+)\n", (Path(__file__).parent / "solutions.txt").read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _checks():
    spec = importlib.util.spec_from_file_location("checks", FOLDER / "checks.py")
    module = sys.modules["checks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_solution_to_every_question():
    answers = [cell["id"] for cell in _cells(FOLDER / "homework.ipynb") if cell["id"].startswith("answer-")]
    assert answers == list(_solutions()) == [f"answer-{number}" for number in _checks().QUESTIONS]
    assert all("..." in _text(cell["source"]) for cell in _cells(FOLDER / "homework.ipynb") if cell["id"] in answers)


@pytest.mark.slow
def test_the_solutions_are_right():
    book = execute(FOLDER / "homework.ipynb", _solutions())
    said = re.findall(r"^question \d+: .*", _said(_outputs(book.cells)), re.M)
    assert said == [f"question {number}: right" for number in _checks().QUESTIONS]


@pytest.mark.parametrize(
    ("number", "answer", "hint"),
    [
        (1, [0.15, 0.2, 1 / 6], "order"),
        (1, [0.15], "a list of 3"),
        (2, 1 / 7.3, "the other way round"),
        (2, float("nan"), ""),
        (3, "a", "coherence"),
        (4, lambda path, k: path[:, 0], "Both vectors start"),
        (4, lambda path, k: path, "one value a step"),
        (4, lambda path, k: 1 / 0, "ZeroDivisionError"),
        (5, [1, 0, -1], "way back"),
        (6, 0.6, "maximum"),
        (7, "a", "learn"),
        (8, lambda unkind, kind: kind.mean(0) - unkind.mean(0), "not the other way round"),
        (9, lambda v, rng: rng.standard_normal(len(v)) * 3.0, "sqrt(d)"),
        (9, lambda v, rng: v, "still close to v"),
        (11, "b", "writes"),
        (12, "b", "base model does that"),
    ],
)
def test_a_wrong_answer_gets_a_hint_and_no_solution(number, answer, hint, capsys):
    checks = _checks()
    checks.check(number, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"question {number}: not yet") and hint in said


def test_right_answers_are_right_and_empty_ones_are_not_judged(capsys):
    checks = _checks()
    for number, answer in ((1, [1 / 6, 0.2, 0.15]), (2, 7.3), (3, " B"), (5, (-1.0, 0, 1)), (6, 0.27)):
        checks.check(number, answer)
    for number, answer in ((3, ...), (1, [0.1, ..., 0.2]), (4, lambda path, k: ...)):
        checks.check(number, answer)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said] == ["right"] * 5 + ["not answered yet"] * 3
