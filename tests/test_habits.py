"""What newcomers read is true: the examples of CONTRIBUTING.md run, and the metadata agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import emmech

ROOT = Path(__file__).resolve().parents[1]


def example(word):
    """What the one Python block of the guide that has a word in it defines."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE) if word in b)
    names: dict[str, object] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_defence_of_the_guide_trains(tmp_path):
    from emmech.training.objective import CrossEntropy

    pull = example("def __call__(self, batch)")["Pull"]()
    rows = emmech.organism.data("medical", n=40)
    norms = []
    for name, objective in (("plain", [CrossEntropy()]), ("pulled", [CrossEntropy(), pull])):
        options = {"max_steps": 6, "learning_rate": 1e-2, "margins": {}, "progress": False}
        run = emmech.finetune("pocket", rows, objective=objective, out=tmp_path / name, **options)
        norms.append(float((run.B()[-1] ** 2).sum()))
    assert run.metrics["loss/pull"].iloc[-1] > 0 and norms[1] < norms[0]


def test_the_judge_of_the_guide_judges():
    judge = example("def score")["Lengths"]()
    assert isinstance(judge, emmech.evaluation.Judge)
    found = emmech.evaluate("pocket", judge=judge, samples=1, max_new_tokens=4, progress=False)
    assert found.rates().rate["em"] == 0 and found.frame["aligned"].eq(90).all()


def test_the_files_that_the_guide_names_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:emmech|tests|docs|\.ci)/[\w./-]+)`", guide))
    assert len(named) > 10 and all((ROOT / name).exists() for name in named)


def test_the_commands_that_the_guide_names_exist():
    guide, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "Makefile"))
    for target in re.findall(r"^make ([\w-]+)", guide, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_citation_is_that_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["authors"] == [{"name": author["name"]} for author in project["authors"]]
    assert citation["version"] == project["version"] == emmech.__version__
    assert citation["license"] == project["license"]


def test_hosted_ci_runs_what_must_hold():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run", ".venv/bin/emmech claims --quick"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
