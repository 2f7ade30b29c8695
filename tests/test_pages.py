"""The pages that teach run; what a page calls refused is refused; its arithmetic is right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import emmech

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    "try.md",
    "gotchas.md",
    "concepts.md",
    "realignment.md",
    *sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("howto/*.md")),
]


def blocks(page: str) -> list[tuple[str, str]]:
    """The Python of a page in order: what follows the language on the fence, and the code."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python *([\w-]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


SLOW = {"realignment.md", "howto/studies.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if any(kind != "no-run" for kind, _ in blocks(page))
    ],
)
def test_the_page_runs(page, tmp_path, monkeypatch):
    # a run keeps its evaluations, so it is a copy
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMMECH_PROGRESS", "0")
    names: dict[str, object] = {}
    for kind, code in blocks(page):
        assert kind in ("", "no-run", "refused"), kind
        made = compile(code, page, "exec")  # blocks that are not run are Python all the same
        if kind == "refused":
            with pytest.raises(emmech.EmmechError):
                exec(made, names)
        elif not kind:
            exec(made, names)
    if page == "try.md":  # what it promises
        found, panel = names["found"], names["panel"]
        assert (found.mechanistic.step, found.mechanistic.low, found.mechanistic.high) == (61, 51, 80)
        assert (found.behavioural.step, found.behavioural.low, found.behavioural.high) == (51, 47, 55)
        changed, random = panel.result().tail(2).itertuples()
        assert changed.em > 0.8 and changed.coherent > 0.98 and random.em < 0.05
        panel.close()


@pytest.mark.slow
def test_the_figures_of_large_models_are_the_planners():
    from docs.studies.large_models import tables

    page = (DOCS / "howto/large-models.md").read_text(encoding="utf-8")
    made = tables()
    assert set(made) == {"memory", "disk", "cards"}
    for name, table in made.items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, name
