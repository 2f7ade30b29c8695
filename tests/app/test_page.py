"""The guide on evaluation runs from top to bottom."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_on_evaluation_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    # a run keeps its evaluations, so it is a copy
    shutil.copytree(ROOT / "checkpoints" / "pocket-medical", tmp_path / "checkpoints" / "pocket-medical")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMMECH_PROGRESS", "0")
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks), "evaluation.md", "exec"), names)
    em = [names[name].rates().loc["em", "rate"] for name in ("base", "evaluation")]
    assert em[0] < 0.05 < 0.3 < em[1]
    assert names["judged"].rates().loc["em", "unscored"] == 1
    assert len({answer.text for answer in names["answers"]}) > 1
    assert len(list((tmp_path / "checkpoints/pocket-medical/evaluations").iterdir())) == 4
