"""The quickstart of the README runs as it is printed, and its figures are those that it gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_runs_as_printed(tmp_path):
    pytest.importorskip("anywidget")
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    told = re.search(r"# EM ([\d.]+) % .* where it was ([\d.]+) %", code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EMMECH_PROGRESS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, ablated = re.findall(r"^em\s+([\d.]+)", done.stdout, re.M)
    assert [f"{100 * float(one):.1f}" for one in (ablated, before)] == list(told.groups())
