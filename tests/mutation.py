"""Whether the tests notice a changed operator, constant, branch or return value of the modules that must be right.

``python tests/mutation.py [--mutants 140] [--seed 0] [--module store] [--write]``, run by hand: a mutant takes
few seconds. A module's tests are run once to learn which of them reach which line; each mutant is then written into a
copy of the working tree, and the tests that reach its line run there, the fastest first, until one fails. Tests that
are marked slow are not used. A mutant that survives needs a test of what the code does, or no test can notice it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tables import DOCS, markdown, write

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # the tests that are responsible for each module
    "emmech/evaluation/em.py": ["tests/evaluation/test_em.py", "tests/evaluation/test_rates.py"],
    "emmech/store.py": ["tests/test_store.py", "tests/run/test_run.py", "tests/run/test_checkpoints.py"],
    "emmech/run/importers.py": ["tests/run/test_importers.py", "tests/run/test_run.py"],
    "emmech/chat/encode.py": ["tests/chat/test_encode.py", "tests/chat/test_templates.py"],
    "emmech/chat/template.py": [
        "tests/chat/test_templates.py",
        "tests/chat/test_encode.py",
        "tests/chat/test_dataset.py",
    ],
    "emmech/run/run.py": ["tests/run", "tests/test_results.py"],
    "emmech/training/recorder.py": ["tests/training/test_recorder.py"],
}
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "120"]
SWAPS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)]
SWAPS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.BitOr, ast.BitAnd)]
SWAP = dict(SWAPS) | {after: before for before, after in SWAPS} | {ast.FloorDiv: ast.Mult}
MESSAGES = ("EmmechError", "refusal", "closest", "shown", "_refuse", "_refusal", "_rewritten")


class Mutants(ast.NodeVisitor):
    """The places of a module where something can be changed; words of messages, annotations and the like are not."""

    def __init__(self, source: str) -> None:
        self.found: list[tuple[int, int, str, str]] = []  # the place's number, line, text before and after
        self._number = -1
        self._target: int | None = None
        self.visit(ast.parse(source))

    @classmethod
    def written(cls, source: str, target: int) -> str:
        """The module with the change at one place."""
        tree = ast.parse(source)
        own = cls.__new__(cls)
        own.found, own._number, own._target = [], -1, target
        own.visit(tree)
        return ast.unparse(ast.fix_missing_locations(tree))

    def _change(self, node: ast.AST, field: str, value: object) -> None:
        self._number += 1
        whole = node if isinstance(node, ast.expr | ast.Return) else node.test  # type: ignore[attr-defined]
        if self._target not in (None, self._number):
            return
        old, before = getattr(node, field), ast.unparse(whole)
        setattr(node, field, value)
        self.found.append((self._number, node.lineno, before, ast.unparse(whole)))  # type: ignore[attr-defined]
        if self._target is None:
            setattr(node, field, old)

    def generic_visit(self, node: ast.AST) -> None:
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.AnnAssign(value=None) | ast.Assert():
                return
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in MESSAGES:
                return
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return
            case ast.FunctionDef() | ast.AnnAssign():
                parts = [*node.body, node.args] if isinstance(node, ast.FunctionDef) else [node.value]
                for part in parts:
                    self.visit(part)  # type: ignore[arg-type]
                return
            case ast.ClassDef():
                for part in node.body:
                    self.visit(part)
                return
            case ast.arg() | ast.Return(value=ast.Constant(value=None)):
                return
            case ast.Assign(targets=[ast.Name(id="why" | "instead" | "given" | "asked")]):
                return
            case ast.Compare(ops=[op, *_]) if type(op) in SWAP:
                self._change(node, "ops", [SWAP[type(op)](), *node.ops[1:]])
            case ast.BinOp() | ast.BoolOp() if type(node.op) in SWAP:
                self._change(node, "op", SWAP[type(node.op)]())
            case ast.UnaryOp(op=ast.Not()):
                self._change(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
            case ast.Constant(value=bool()):
                self._change(node, "value", not node.value)
            case ast.Constant(value=int() | float()):
                self._change(node, "value", node.value + 1)
            case ast.If() | ast.IfExp():
                self._change(node, "test", ast.UnaryOp(ast.Not(), node.test))
            case ast.Return(value=ast.expr()):
                self._change(node, "value", ast.Constant(None))
        super().generic_visit(node)


class Reached:
    """A pytest plugin that notes which lines of a module each test runs, and how long it takes."""

    def __init__(self, module: str) -> None:
        self.file = str(ROOT / module)
        self.lines: dict[str, list[int]] = {}
        self.seconds: dict[str, float] = {}
        self._now: set[int] = set()

    def _trace(self, frame, event, arg):
        return self._line if frame.f_code.co_filename == self.file else None

    def _line(self, frame, event, arg):
        self._now.add(frame.f_lineno)
        return self._line

    def pytest_runtest_protocol(self, item, nextitem):
        self._now, self._began, self._item = set(), time.monotonic(), item.nodeid
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def pytest_runtest_logfinish(self, nodeid, location):
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        self.seconds[nodeid] = time.monotonic() - self._began
        self.lines[nodeid] = sorted(self._now)


def in_child(call, limit: float) -> int | None:
    """The exit status of a function in a process of its own, or None if it took longer."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 70
        try:
            code = int(call())
        finally:
            os._exit(code)
    began = time.monotonic()
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def learn(module: str, path: Path) -> dict[str, dict]:
    """Which lines of a module each of its tests reaches, and the test's seconds; kept in a file."""

    def run() -> int:
        import pytest

        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        reached = Reached(module)
        code = pytest.main([*OPTIONS, *ROOMS[module], module], plugins=[reached])
        path.write_text(json.dumps({"lines": reached.lines, "seconds": reached.seconds}))
        return int(code)

    if not path.exists() and (code := in_child(run, 7200)) != 0:
        raise SystemExit(f"the tests of {module} do not pass without a mutant (pytest's status {code})")
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=140)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", default="", help="a part of the module's path")
    parser.add_argument("--write", action="store_true", help="put the table into docs/damaged.md")
    parser.add_argument("--out", type=Path, default=Path("build/mutation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warm()
    places = {module: Mutants((ROOT / module).read_text()).found for module in ROOMS}
    share = options.mutants / sum(map(len, places.values()))
    scratch = Path(tempfile.mkdtemp())
    tree = shutil.copytree(ROOT, scratch / "tree", ignore=shutil.ignore_patterns(".git", ".venv", "build", "site"))
    counts: Counter = Counter()
    results = (options.out / f"mutants-{options.seed}.jsonl").open("a")
    for module in (module for module in ROOMS if options.module in module):
        known = learn(module, options.out / f"{Path(module).stem}.json")
        source, seconds = (ROOT / module).read_text(), known["seconds"]
        dice = random.Random(f"{options.seed} {module}")
        for number, line, before, after in dice.sample(places[module], max(3, round(share * len(places[module])))):
            tests = [test for test, lines in known["lines"].items() if line in lines]
            # what runs as the module is imported is everyone's
            tests = sorted(tests or [test for test, lines in known["lines"].items() if lines], key=seconds.__getitem__)
            (tree / module).write_text(Mutants.written(source, number))

            def run(tests=tests) -> int:
                import pytest

                os.chdir(tree)
                sys.path.insert(0, str(tree))
                return int(pytest.main([*OPTIONS, "-x", *tests]))

            began = time.monotonic()
            killed = in_child(run, 120 + 4 * sum(seconds[test] for test in tests)) != 0
            (tree / module).write_text(source)
            counts[module, killed] += 1
            row = {"module": module, "line": line, "before": before, "after": after, "killed": killed}
            row |= {"tests": len(tests), "seconds": round(time.monotonic() - began, 1)}
            results.write(json.dumps(row) + "\n")
            results.flush()
            print(json.dumps(row), flush=True)
    shutil.rmtree(scratch)
    tried = {module: (counts[module, True], counts[module, True] + counts[module, False]) for module in places}
    rows = [[f"`{module}`", str(len(places[module])), str(all_), str(k)] for module, (k, all_) in tried.items() if all_]
    table = markdown(["module", "places", "tried", "noticed"], rows)
    print(table)
    if options.write:
        write(DOCS / "damaged.md", "mutants", table)


def warm() -> None:
    """Load what every test needs, once for all mutants."""
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "datasets",
        "hypothesis",
        "jaxtyping",
        "pandas",
        "peft",
        "plotly.graph_objects",
        "pytest",
        "transformers",
    ):
        importlib.import_module(name)
    import torch
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
