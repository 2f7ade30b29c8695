"""``import emmech`` is light, and its face is complete."""

from __future__ import annotations

import subprocess
import sys

import emmech

HEAVY = {"torch", "transformers", "peft", "plotly", "pandas", "sklearn", "scipy", "trl", "nnsight",
         "transformer_lens", "openai", "datasets", "accelerate"}  # fmt: skip


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_loads_no_back_end():
    loaded = run_python("import sys, emmech; print(*sorted({m.split('.')[0] for m in sys.modules}))")
    assert not HEAVY & set(loaded.split())
    assert "numpy" not in loaded.split()


def test_import_is_quick():
    # the best of five: a busy machine can only make it slower
    times = [
        float(run_python("import time; t = time.perf_counter(); import emmech; print(time.perf_counter() - t)"))
        for _ in range(5)
    ]
    assert min(times) < 0.3


def test_every_public_name_resolves():
    for name in emmech.__all__:
        assert getattr(emmech, name) is not None
    assert set(emmech.__all__) <= set(dir(emmech))


def test_unknown_name_is_an_attribute_error():
    try:
        emmech.finetun  # noqa: B018
    except AttributeError as error:
        assert "finetun" in str(error)
    else:
        raise AssertionError("no error")


def test_the_organism_is_within_reach_of_the_import():
    assert run_python("import emmech; print(emmech.organism.data('medical', n=1)[0]['messages'][0]['role'])") == "user"
