"""Public names of a package, resolved on first use (PEP 562), so that importing the package loads no back end.

The names are those of the package's stub, ``__init__.pyi``: what a type checker and an editor read is also what is
looked up at run time, and there is no second list.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a package with a stub.

    A line ``from emmech.run.run import Run as Run`` of the stub makes ``Run`` a public name of the package, and ``from
    emmech import organism as organism`` makes a subpackage one of its attributes.

    Args:
        package: the package's ``__name__``.
        file: the package's ``__file__``; the stub has the same name with the suffix ``.pyi``.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_bytes())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    where = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if where[name] == package:
            return import_module(f"{package}.{name}")
        return getattr(import_module(where[name]), name)

    return get, lambda: sorted(where), sorted(where)
