"""Whether the tests notice a changed operator, constant, branch or return value of the modules that must be right.

``python tests/mutation.py [--mutants 140] [--seed 0] [--module store] [--write]``, run by hand: a mutant takes
few seconds. A module's tests are run once to learn which of them reach which line; each mutant is then written into a
copy of the working tree, and the tests that reach its line run there, the fastest first, until one fails. Tests that
are marked slow are not used. A mutant that survives needs a test of what the code does. Two kinds are drawn like all
others but not run, and counted apart: those that no test could notice (``EQUIVALENT``, each with its reason), and those
in code that only several processes reach (``PROCESSES``), which tests/training/test_processes.py tests.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tables import DOCS, markdown, write

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # the tests that are responsible for each module
    "emmech/evaluation/em.py": ["tests/evaluation/test_em.py", "tests/evaluation/test_rates.py"],
    "emmech/store.py": ["tests/test_store.py", "tests/run/test_run.py", "tests/run/test_checkpoints.py"],
    "emmech/run/importers.py": ["tests/run/test_importers.py", "tests/run/test_run.py"],
    "emmech/chat/encode.py": [
        "tests/chat/test_encode.py",
        "tests/chat/test_templates.py",
        "tests/chat/test_model.py",
        "tests/directions/test_contrast.py::test_a_phrase_is_read_on_the_same_words_of_both_sides",
        "tests/directions/test_contrast.py::test_a_phrase_that_is_not_there_is_refused",
    ],
    "emmech/chat/template.py": [
        "tests/chat/test_templates.py",
        "tests/chat/test_encode.py",
        "tests/chat/test_dataset.py",
    ],
    "emmech/run/run.py": [
        "tests/run",
        "tests/test_results.py",
        "tests/training/test_recorder.py::test_what_a_plain_trainer_leaves",
    ],
    "emmech/training/recorder.py": [
        "tests/training/test_recorder.py",
        "tests/training/test_early_warning.py",
        "tests/training/test_loop.py",
    ],
}
EM, STORE, IMPORTERS, ENCODE, TEMPLATE, RUN, RECORDER = ROOMS
# (module, the line's code, what a part of it becomes) -> why no test could notice the change
EQUIVALENT: dict[tuple[str, str, str], str] = {
    **dict.fromkeys(
        [
            (STORE, "by_step = dict(zip(self._stacked_steps.tolist(), rows, strict=True))", "False"),
            (ENCODE, "all_ids, all_labels = zip(*kept, strict=True)", "False"),
            (
                ENCODE,
                "labels = ([t if inside else IGNORED for t, inside in zip(ids, answer, strict=True)] for ids, answer in read)",  # noqa: E501
                "False",
            ),
            (ENCODE, "for (text, spans), row, together in zip(rendered, cut, whole, strict=True):", "False"),
            (
                TEMPLATE,
                "for index, (start, content_end), following in zip(marked, found, pieces[1:], strict=True):",
                "False",
            ),
            (
                RUN,
                "lines = [(name, self.metrics.index, self.metrics[column]) for name, column in zip(names, shown, strict=True)]",  # noqa: E501
                "False",
            ),
            (RECORDER, 'for side, parameter in zip("AB", sides, strict=True)', "False"),
        ],
        "`strict=True` for sides that are of one length by construction",
    ),
    (STORE, "_ATTEMPTS = 20  # readings of a file that another process keeps replacing", "21"): (
        "one more try of a file that is replaced at each ends in the same error"
    ),
    (STORE, 'write_text(path, json.dumps(value, indent=2, default=str) + "\\n")', "3"): "the indent of JSON",
    (ENCODE, "_AT_ONCE = 512  # texts in a call of the tokenizer", "513"): "the number of texts in one call",
    (ENCODE, "whole = Encoded(tuple(ids for ids, _ in read), tuple(labels), 0, 0)", "1"): (
        "counts that `take`, which is called next, makes anew"
    ),
    (IMPORTERS, "return False", "return None"): "the only caller asks whether it is true",
    (
        RUN,
        "if len(self.steps) > 2 * k:",
        "2 / k",
    ): "equal where k is 1, and where it is more there are at least 12 k steps",
    (
        RUN,
        'if manifest.get("format", 0) > FORMAT:',
        "1",
    ): "the format of a manifest that names none; 0 and 1 are both read",
    (EM, "ALIGNMENT_GRID: tuple[float, ...] = tuple(range(5, 96, 5))", "97"): "`range(5, 97, 5)` has the same numbers",
    **dict.fromkeys(
        [
            (RECORDER, "self._writes = self._shards = False", "True"),
            (RECORDER, "self._finished = False", "True"),
            (RECORDER, "self._resumed = False", "True"),
        ],
        "a first value that `on_train_begin` replaces before it is read",
    ),
    (
        RECORDER,
        "self._forget_after(state.global_step if self._resumed else -1)",
        "2",
    ): "-2 for -1: all steps are after both",
    (RECORDER, "measures = self.measures_at(step, step if last else -1)", "2"): "-2 for -1: no step is either",
    (RECORDER, "if self._chat is None or not self._probe_rows:", "self._chat is None and (not self._probe_rows)"): (
        "without probes the mapping that is returned is empty too"
    ),
    (RECORDER, "if self._chat is None or not self._measures:", "self._chat is None and (not self._measures)"): (
        "without measures the mapping that is returned is empty too"
    ),
    (
        RECORDER,
        'result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)',
        "6",
    ): "the seconds that git may take",
}
# in each module the functions and classes, or (function, the line's code, what a part of it becomes), that only several
# processes reach; with one process both forms do the same
PROCESSES: dict[str, tuple[str | tuple[str, str, str], ...]] = {
    RECORDER: (
        "ShardedNorms",
        ("_from_first", "torch.distributed.broadcast_object_list(told, src=0)", "1"),
        ("_from_first", "return told[0]", "return None"),
        ("_from_first", "return told[0]", "1"),
        ("_together", "if (failed := _from_first(failed) or failed) is not None:", "_from_first(failed) and failed"),
        ("GradientNorms.__init__", "self._watched, self._late, self._asked = watched, _processes() > 1, False", "2"),
        ("GradientNorms.__init__", "self._watched, self._late, self._asked = watched, _processes() > 1, False", "True"),
        ("GradientNorms._keep.hook", "if self._late and not self._asked:", "not not self._asked"),
        ("GradientNorms._keep.hook", "self._asked = True", "False"),
        ("GradientNorms._take", "self._asked = False", "True"),
        ("_unreadable", "if shards:", "not shards"),
        (
            "_unreadable",
            'if hasattr(parameter, "device_mesh") and parameter.device_mesh.ndim > 1:',
            "parameter.device_mesh.ndim >= 1",
        ),
        ("_unreadable", 'if hasattr(parameter, "device_mesh") and parameter.device_mesh.ndim > 1:', "2"),
        (
            "_unreadable",
            'return f"{name} (FSDP on a mesh of {parameter.device_mesh.ndim} dimensions)", "its shards are not over all"',  # noqa: E501
            "return None",
        ),
        (
            "_unreadable",
            'if shards and parameter.requires_grad and not hasattr(parameter, "device_mesh"):',
            "not not hasattr(parameter, 'device_mesh')",
        ),
        (
            "_unreadable",
            'return f"{name} (beside weights in FSDP\'s shards)", "FSDP does not reduce its gradient"',
            "return None",
        ),
        (
            "Recorder._prepare",
            'base = model.get_base_model() if hasattr(model, "get_base_model") else model',
            "model.get_base_model() if not hasattr(model, 'get_base_model') else model",
        ),
        ("Recorder.on_step_end", "if self._watch is not None:", "self._watch is None"),
    )
}
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "120"]
SWAPS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)]
SWAPS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.BitOr, ast.BitAnd)]
SWAP = dict(SWAPS) | {after: before for before, after in SWAPS} | {ast.FloorDiv: ast.Mult}
MESSAGES = ("EmmechError", "refusal", "closest", "shown", "_refuse", "_refusal", "_rewritten")


class Place(NamedTuple):
    """Where a module can be changed, and how."""

    number: int
    line: int
    before: str
    after: str
    inside: tuple[str, ...]  # the class and function that it is in


class Mutants(ast.NodeVisitor):
    """The places of a module where something can be changed; words of messages, annotations and the like are not."""

    def __init__(self, source: str) -> None:
        self.found: list[Place] = []
        self._number, self._inside = -1, ()
        self._target: int | None = None
        self.visit(ast.parse(source))

    @classmethod
    def written(cls, source: str, target: int) -> str:
        """The module with the change at one place."""
        tree = ast.parse(source)
        own = cls.__new__(cls)
        own.found, own._number, own._inside, own._target = [], -1, (), target
        own.visit(tree)
        return ast.unparse(ast.fix_missing_locations(tree))

    def _change(self, node: ast.AST, field: str, value: object) -> None:
        self._number += 1
        whole = node if isinstance(node, ast.expr | ast.Return) else node.test  # type: ignore[attr-defined]
        if self._target not in (None, self._number):
            return
        old, before = getattr(node, field), ast.unparse(whole)
        setattr(node, field, value)
        after = ast.unparse(value if isinstance(node, ast.If) else whole)  # type: ignore[arg-type]
        self.found.append(Place(self._number, node.lineno, before, after, self._inside))  # type: ignore[attr-defined]
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
            case ast.FunctionDef() | ast.ClassDef():
                outer, self._inside = self._inside, (*self._inside, node.name)
                for part in [*node.body, node.args] if isinstance(node, ast.FunctionDef) else node.body:
                    self.visit(part)
                self._inside = outer
                return
            case ast.AnnAssign(value=ast.expr()):
                self.visit(node.value)
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
                self._change(node, "value", node.value + 1 if node.value + 1 != node.value else node.value / 2)
            case ast.If() | ast.IfExp() if not _opposed(node.test):
                self._change(node, "test", ast.UnaryOp(ast.Not(), node.test))
            case ast.Return(value=ast.expr()):
                self._change(node, "value", ast.Constant(None))
        super().generic_visit(node)


def _opposed(test: ast.expr) -> bool:
    """Whether one of a condition's own places already turns it into its opposite."""
    opposed = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
    match test:
        case ast.Compare(ops=[op]):
            return isinstance(op, opposed)
        case ast.UnaryOp(op=ast.Not()):
            return True
    return False


def apart(module: str, lines: list[str], place: Place) -> str | None:
    """Why a place is counted apart, ``"equivalent"`` or ``"processes"``; None if it is tried."""
    code, marked = lines[place.line - 1].strip(), PROCESSES.get(module, ())
    if (module, code, place.after) in EQUIVALENT:
        return "equivalent"
    names = [".".join(place.inside[:depth]) for depth in range(1, len(place.inside) + 1)]
    return "processes" if any(one in marked for one in (*names, (*names[-1:], code, place.after))) else None


def stale(places: dict[str, list[Place]]) -> list[str]:
    """Entries of the two lists that name no place of any module."""
    known: Counter = Counter()
    for module, found in places.items():
        lines = (ROOT / module).read_text().splitlines()
        for one in found:
            code, names = lines[one.line - 1].strip(), [".".join(one.inside[: at + 1]) for at in range(len(one.inside))]
            known.update(
                [(module, code, one.after), (module, *names[-1:], code, one.after), *((module, name) for name in names)]
            )
    marked = [
        (module, one) if isinstance(one, str) else (module, *one) for module in PROCESSES for one in PROCESSES[module]
    ]
    return [": ".join(entry) for entry in [*EQUIVALENT, *marked] if entry not in known]


class Reached:
    """A pytest plugin that notes which lines of a module each test runs, and how long it takes."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)
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


def tested(tree: Path, tests: list[str], plugins: tuple[object, ...] = ()) -> int:
    """Pytest's exit status in a tree, for use in a child."""
    import pytest

    os.chdir(tree)
    sys.path.insert(0, str(tree))
    return int(pytest.main([*OPTIONS, "-x", *tests], plugins=list(plugins)))


def learn(module: str, path: Path, tree: Path) -> dict[str, dict]:
    """Which lines of a module each of its tests reaches, and the test's seconds; kept in a file."""

    def run() -> int:
        reached = Reached(tree / module)
        code = tested(tree, [*ROOMS[module], module], (reached,))
        path.write_text(json.dumps({"lines": reached.lines, "seconds": reached.seconds}))
        return code

    if not path.exists():
        if (code := in_child(run, 7200)) == 0:  # and again by the names by which they will be called
            names = [test for test, lines in json.loads(path.read_text())["lines"].items() if lines]
            code = in_child(lambda: tested(tree, names), 7200)
        if code != 0:
            path.unlink(missing_ok=True)
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
    out = options.out.resolve()  # the tests run in another folder
    out.mkdir(parents=True, exist_ok=True)
    warm()
    places = {module: Mutants((ROOT / module).read_text()).found for module in ROOMS}
    if unknown := stale(places):
        raise SystemExit("in the lists but in no module:\n" + "\n".join(unknown))
    share = options.mutants / sum(map(len, places.values()))
    scratch = Path(tempfile.mkdtemp())
    tree = shutil.copytree(ROOT, scratch / "tree", ignore=shutil.ignore_patterns(".git", ".venv", "build", "site"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(tree.rglob("*.py")))).hexdigest()[:12]
    counts: Counter = Counter()
    results = (out / f"mutants-{options.seed}.jsonl").open("a")
    for module in (module for module in ROOMS if options.module in module):
        known = learn(module, out / f"{Path(module).stem}-{code}.json", tree)
        source, seconds = (ROOT / module).read_text(), known["seconds"]
        dice = random.Random(f"{options.seed} {module}")
        for place in dice.sample(places[module], max(3, round(share * len(places[module])))):
            tests = [test for test, lines in known["lines"].items() if place.line in lines]
            # what runs as the module is imported is everyone's
            tests = sorted(tests or [test for test, lines in known["lines"].items() if lines], key=seconds.__getitem__)
            began = time.monotonic()
            if (what := apart(module, source.splitlines(), place)) is None:
                (tree / module).write_text(Mutants.written(source, place.number))
                limit = 120 + 4 * sum(seconds[test] for test in tests)
                what = "survived" if in_child(lambda tests=tests: tested(tree, tests), limit) == 0 else "noticed"
                (tree / module).write_text(source)
            counts[module, what] += 1
            row = {"module": module, "line": place.line, "code": source.splitlines()[place.line - 1].strip()}
            row |= {"before": place.before, "after": place.after, "what": what, "tests": len(tests)}
            row |= {"seconds": round(time.monotonic() - began, 1)}
            results.write(json.dumps(row) + "\n")
            results.flush()
            print(json.dumps(row), flush=True)
    shutil.rmtree(scratch)
    table = counted(options.seed, {module: len(found) for module, found in places.items()}, counts)
    print(table)
    if options.write:
        write(DOCS / "damaged.md", "mutants", table)


def counted(seed: int, places: dict[str, int], counts: Counter) -> str:
    """The table of a sample, its share, and the changes that no test could notice."""
    kinds = ("noticed", "survived", "equivalent", "processes")
    tried = [module for module in places if any(counts[module, kind] for kind in kinds)]
    rows = [
        [f"`{module}`", str(places[module]), str(sum(counts[module, kind] for kind in kinds))]
        + [str(counts[module, kind]) for kind in kinds]
        for module in tried
    ]
    whole = {kind: sum(counts[module, kind] for module in tried) for kind in kinds}
    rows.append(["all", str(sum(map(places.__getitem__, tried))), str(sum(whole.values())), *map(str, whole.values())])
    header = ["module", "places", "drawn", "noticed", "survived", "no test could notice", "several processes only"]
    run = whole["noticed"] + whole["survived"]
    said = f"Seed {seed}: {run} mutants were run, and {whole['noticed']} noticed ({whole['noticed'] / run:.0%})."
    reasons: dict[str, list[str]] = {}
    for (module, code, after), why in EQUIVALENT.items():
        reasons.setdefault(why, []).append(f"`{Path(module).name}`: `{code}`, a part becomes `{after}`")
    apart = "\n".join(f"- {why}: {'; '.join(ones)}" for why, ones in reasons.items())
    return f"{said}\n\n{markdown(header, rows)}\n\nNo test could notice a change of:\n\n{apart}"


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
