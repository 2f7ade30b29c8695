"""What every command line of the package shares: errors as messages, and values that come as text."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from emmech.errors import EmmechError


class _Commands(TyperGroup):
    """Commands whose :class:`EmmechError` is printed as its message, without a traceback, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EmmechError as error:
            typer.echo(f"emmech: {error}", err=True)
            raise typer.Exit(1)


def new_app(name: str, help: str, **settings: Any) -> typer.Typer:
    """An empty typer app with the conventions of the package."""
    shared: dict[str, Any] = {"cls": _Commands, "add_completion": False, "pretty_exceptions_enable": False}
    shared["context_settings"] = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(name=name, help=help, **shared, **settings)


def in_processes(count: int, arguments: Sequence[str]) -> int:
    """Run an emmech command in several processes that torchrun connects, and return its exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run([*launcher, "-m", "emmech", *arguments], check=False).returncode


def by_name(found: Mapping[str, Any]) -> dict[str, Any]:
    """Runs or folders under their names, or under their paths where two have one name, such as ``s0``.

    Example:
        >>> from pathlib import Path
        >>> list(by_name({path: Path(path) for path in ("good/s0", "style/s0", "runs/bad")}))
        ['good/s0', 'style/s0', 'bad']
    """
    names = [one.name for one in found.values()]
    return {one.name if names.count(one.name) == 1 else path: one for path, one in found.items()}


def read_numbers(name: str, text: str | None, kind: Any = int) -> Any:
    """Numbers as they are written in a shell: ``0,50,100``, or ``0:300:50`` for whole ones; None stays None.

    Raises:
        EmmechError: anything else.

    Example:
        >>> read_numbers("steps", "0,5:20:5"), read_numbers("scales", "1,2.5", float)
        ([0, 5, 10, 15], [1.0, 2.5])
    """
    if text is None:
        return None
    found: list[Any] = []
    try:
        for part in text.split(","):
            found += range(*map(int, part.split(":"))) if ":" in part and kind is int else [kind(part)]
    except (TypeError, ValueError):
        instead = "0,50,100 or 0:300:50" if kind is int else "1,5,10"
        raise EmmechError(f"read --{name}", text, "they are numbers with commas between them", f"--{name} {instead}")
    return found


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """Fields of a recipe from ``--set NAME=VALUE``; a value is a Python literal, or a word.

    Raises:
        EmmechError: there is no ``=``.

    Example:
        >>> read_settings(["learning_rate=1e-3", "schedule=cosine"])
        {'learning_rate': 0.001, 'schedule': 'cosine'}
    """
    found: dict[str, Any] = {}
    for name, text in read_pairs("set", pairs, "learning_rate=1e-3").items():
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def read_pairs(option: str, pairs: list[str] | None, example: str = "medical=rows.jsonl") -> dict[str, str]:
    """Texts by name from an option that is given as NAME=VALUE.

    Raises:
        EmmechError: there is no ``=``.

    Example:
        >>> read_pairs("data", ["finance=rows.jsonl"])
        {'finance': 'rows.jsonl'}
    """
    found = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise EmmechError(f"read --{option}", pair, "it is not NAME=VALUE", f"--{option} {example}")
        found[name] = text
    return found
