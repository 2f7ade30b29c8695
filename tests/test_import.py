"""``import emmech`` is light, and its face is complete: one path for every public name, and a reference entry."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emmech

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "peft", "plotly", "pandas", "sklearn", "scipy", "trl", "nnsight",
         "transformer_lens", "openai", "datasets", "accelerate"}  # fmt: skip


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def stubs() -> dict[str, dict[str, str]]:
    """Per package with a face: public name -> the module that defines it, or the package itself for a subpackage."""
    found = {}
    for stub in sorted((ROOT / "emmech").rglob("__init__.pyi")):
        imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
        assert all(alias.name == alias.asname for node in imports for alias in node.names), stub
        package = ".".join(stub.parent.relative_to(ROOT).parts)
        found[package] = {alias.name: str(node.module) for node in imports for alias in node.names}
    return found


def public() -> dict[str, str]:
    """Public path -> the module that defines it; subpackages left out."""
    return {
        f"{package}.{name}": module
        for package, names in stubs().items()
        for name, module in names.items()
        if module != package
    }


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


def test_the_root_is_small():
    packages = {name.removeprefix("emmech.") for name in stubs()}
    assert len(set(emmech.__all__) - packages) <= 45  # functions and classes; each package is one more
    assert set(emmech.__all__) == set(dir(emmech)) == set(stubs()["emmech"])


def test_every_package_with_public_names_is_an_attribute_of_the_root():
    assert {name.removeprefix("emmech.") for name in stubs()} - {"emmech"} <= set(emmech.__all__)


def test_every_public_name_has_one_path():
    defined = [(module, path.rpartition(".")[2]) for path, module in public().items()]
    assert len(defined) == len(set(defined)), sorted(name for name in defined if defined.count(name) > 1)


@pytest.fixture(scope="module")
def every_module():
    for entry in pkgutil.walk_packages(emmech.__path__, "emmech."):
        if not entry.name.endswith("__main__"):
            importlib.import_module(entry.name)


def test_every_public_name_is_the_documented_object(every_module):
    """Importing a module makes it an attribute of its package, where it would replace a public name that it shares."""
    for path, module in public().items():
        package, _, name = path.rpartition(".")
        found = getattr(sys.modules[package], name)
        assert found is getattr(sys.modules[module], name), path
        assert getattr(found, "__module__", module) == module, f"{path} is defined in {found.__module__}"


def test_the_reference_has_every_public_name_by_its_path():
    documented = re.findall(
        r"^\.\. auto(?:function|class|exception):: (\S+)", (ROOT / "docs/reference.md").read_text(), re.M
    )
    assert len(documented) == len(set(documented))
    assert set(documented) == set(public())


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="finetun"):
        emmech.finetun  # noqa: B018


def test_the_organism_is_within_reach_of_the_import():
    assert run_python("import emmech; print(emmech.organism.data('medical', n=1)[0]['messages'][0]['role'])") == "user"
