"""The page on the bridges runs from top to bottom, and its two tools agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformer_lens")
pytest.importorskip("nnsight")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_on_the_bridges_runs(tmp_path):
    page = (ROOT / "docs" / "bridges.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    # nnsight reads the source of its with blocks, so the page becomes a file
    script = tmp_path / "bridges.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    at = said.index("True")  # the control vector came back bit for bit
    assert "finetuned_models:" in said[at:]
    effect, shape, share = said[at - 3 : at]
    direct, total, indirect = map(float, re.findall(r"-?\d+\.\d+", effect))
    assert abs(direct + indirect - total) < 0.02 and "128" in shape
    # the adapter's effect on "gravel" over "herbs" is made at the prompt, by later layers
    assert total > 1 and abs(direct) < 0.2 * total
    assert float(share.split()[-1]) > 0.5 * total
