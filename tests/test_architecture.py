"""The rules of the house: floors as drawn, and what an import graph cannot see, read from the syntax trees."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "emmech"
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

Place = tuple[str, int, str]  # module, line, what was found there

# Modules that break a rule today. An entry that is no longer needed fails its test, so that the list only shrinks.
KNOWN: dict[str, set[str]] = {}


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the nodes that are docstrings, or other strings that are statements."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def words(allowed: Callable[[str], bool], pattern: str) -> Iterator[Place]:
    """Attributes and string literals that match, outside docstrings and the allowed modules."""
    wanted = re.compile(pattern)
    for name, tree in TREES.items():
        if allowed(name):
            continue
        text = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and wanted.search(node.attr):
                yield name, node.lineno, node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in text:
                yield from ((name, node.lineno, found) for found in wanted.findall(node.value)[:1])


def parts_of_a_model() -> Iterator[Place]:
    """Names of a family's modules, and hooks put on them."""
    allowed = lambda name: name.startswith("engine/") or name == "chat/families.py"  # noqa: E731
    return words(allowed, r"\b[qkvo]_proj\b|self_attn|\w+_layernorm\b|register_forward_(?:pre_)?hook")


def imports_by_string() -> Iterator[Place]:
    """``import_module("emmech...")``, which no check of the floors sees."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "import_module",
                "__import__",
            ):
                for argument in node.args[:1]:
                    text = argument.values[0] if isinstance(argument, ast.JoinedStr) and argument.values else argument
                    if isinstance(text, ast.Constant) and str(text.value).startswith("emmech"):
                        yield name, node.lineno, str(text.value)


def thresholds() -> Iterator[Place]:
    """30 or 50 in a comparison, or as the default of something named like a threshold, outside ``evaluation/em.py``."""

    def is_bound(node: ast.expr | None) -> bool:
        return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value in (30, 50)

    threshold = re.compile(r"below|above|threshold|cutoff|bound|^aligned|^coheren|^alignment")
    for name, tree in TREES.items():
        if name == "evaluation/em.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                ordered = any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
                if ordered and any(map(is_bound, sides)):
                    yield name, node.lineno, ast.unparse(node)
            elif isinstance(node, ast.arguments):
                positional = [*node.posonlyargs, *node.args]
                pairs = [*zip(positional[::-1], node.defaults[::-1], strict=False)]
                pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None]
                for argument, default in pairs:
                    if threshold.search(argument.arg) and is_bound(default):
                        yield name, argument.lineno, f"{argument.arg}={ast.unparse(default)}"
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name) and threshold.search(target.id.lower()) and is_bound(node.value):
                        yield name, node.lineno, ast.unparse(node)
            elif isinstance(node, ast.keyword) and node.arg and threshold.search(node.arg) and is_bound(node.value):
                yield name, node.value.lineno, ast.unparse(node)


def colours() -> Iterator[Place]:
    """Colour literals outside the theme."""
    return words(lambda name: name == "view/theme.py", r"#[0-9a-fA-F]{6}\b|#[0-9a-fA-F]{3}\b|\brgba?\(|\bhsla?\(")


def long_modules() -> Iterator[Place]:
    """More than 900 lines."""
    for name, path in MODULES.items():
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 900:
            yield name, 1, f"{lines} lines"


def relative_imports() -> Iterator[Place]:
    """``from . import``, which says nothing about where a name comes from."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield name, node.lineno, ast.unparse(node)


def doubled_classes() -> Iterator[Place]:
    """Public classes of one name in two modules."""
    found = [
        (name, node.lineno, node.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    counts = Counter(name for _, _, name in found)
    yield from (place for place in found if counts[place[2]] > 1)


RULES = [parts_of_a_model, imports_by_string, thresholds, colours, long_modules, relative_imports, doubled_classes]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    places = list(rule())
    known = KNOWN.get(rule.__name__, set())
    new = [f"emmech/{name}:{line}: {what}" for name, line, what in places if name not in known]
    assert not new, f"{rule.__doc__}\n" + "\n".join(new)
    assert not known - {name for name, _, _ in places}, "these keep the rule now: take them from KNOWN"


def test_the_rules_see_what_they_forbid(monkeypatch):
    """Each rule finds its example and nothing in what is allowed."""
    bad = {
        "a.py": 'x = model.self_attn\nimport_module("emmech.b")\nem = score < 30\nline = "#5b6675"\nfrom . import b\n'
        'class Twice: ...\nlayer.register_forward_hook(f)\nname = "input_layernorm"\n',
        "b.py": "class Twice: ...\ndef f(n, *, alignment_below=30.0): ...\n" + "\n" * 900,
    }
    fine = {
        "engine/a.py": "x = model.self_attn",
        "evaluation/em.py": "em = score < 30",
        "view/theme.py": 'ink = "#5b6675"',
        "c.py": '"""Of self_attn, at 30 < 50."""\nsamples = 50\nimport_module(f"{package}.x")\nclass Once: ...',
    }
    trees = {name: ast.parse(text) for name, text in {**bad, **fine}.items()}
    for name, value in (("TREES", trees), ("MODULES", {"b.py": ROOT / "nothing"})):
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: bad["b.py"])
    expected = {
        "parts_of_a_model": {("a.py", 1), ("a.py", 7), ("a.py", 8)},
        "imports_by_string": {("a.py", 2)},
        "thresholds": {("a.py", 3), ("b.py", 2)},
        "colours": {("a.py", 4)},
        "long_modules": {("b.py", 1)},
        "relative_imports": {("a.py", 5)},
        "doubled_classes": {("a.py", 6), ("b.py", 1)},
    }
    assert {rule.__name__: {place[:2] for place in rule()} for rule in RULES} == expected


# the floors


def layers() -> list[list[str]]:
    """Rooms from the top down, as import-linter checks them; those of one floor together."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (floors,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in re.split(r"[|:]", floor)] for floor in floors]


def drawing() -> list[list[str]]:
    """Rooms from the top down, as the page on the architecture draws them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [re.split(r",\s*", line.split("  ")[0]) for line in block.splitlines() if line and line[0] != " "]


def room_imports() -> dict[str, set[str]]:
    """The rooms that each room imports at run time, read from the syntax trees."""
    found: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        room = name.split("/")[0].removesuffix(".py")
        typed = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typed:
                continue
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [node.module] if node.module != "emmech" else [f"emmech.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            for target in targets:
                parts = target.split(".")
                if parts[0] == "emmech" and len(parts) > 1 and parts[1] != room:
                    found.setdefault(room, set()).add(parts[1])
    return found


def test_the_drawing_is_the_contract():
    assert drawing() == layers()


def test_the_floors_are_the_rooms():
    rooms = {name.split("/")[0].removesuffix(".py") for name in MODULES} - {"__init__"}
    assert sorted(room for floor in layers() for room in floor) == sorted(rooms)


def test_a_room_imports_only_what_is_below_it():
    level = {room: number for number, floor in enumerate(layers()) for room in floor}
    imports = room_imports()
    assert sum(map(len, imports.values())) > 30
    upward = [(room, other) for room, others in imports.items() for other in others
              if room in level and level[other] <= level[room]]  # fmt: skip
    assert not upward
