"""Files that were damaged or written elsewhere: ``python -m tests.faults.damaged [--tries N] [--kind rows] [--write]``.

Each try damages a sound file or folder at random, by bits, by bytes, by whole values of its JSON, or by whole files,
and reads it as a user would. It must be refused by an EmmechError within ten seconds of work, or be read as what the
files now say. This is judged by something other than emmech where it can be: by PEFT's logits for an adapter, by the
json and yaml modules for rows and questions, by the recorded bits for a run's arrays.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"EMMECH_PROGRESS": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
import yaml

import emmech
from emmech.chat.dataset import load_chat
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.evaluation.deferred import merge_judging, write_judging
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.logprob_judge import LogprobJudge
from emmech.evaluation.questions import load_questions
from emmech.evaluation.server import Server
from emmech.run.run import Run
from tests.conftest import make_rows, make_tiny
from tests.evaluation.conftest import completion
from tests.sweeps.conftest import SEVERAL, random_run
from tests.tables import DOCS, markdown, write

LIMIT = 10  # seconds of the processor
ODD = [
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\xff",
    b"\0",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"[" * 20000,
    b"\n",
    b"\\ud83d",
]
VALUES = [
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud83d",
    "a\0b",
    "../..",
    [],
    {},
    [[]],
]
VALUES += [10**400, ["x"] * 3, {"x": 1}, [None], "9" * 5000]


DECIDING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what is written beside B A
ENDS = {  # how a try ends, and its column in the table
    "refused": "refused",
    "read": "read as the files say",
    "wrong": "read as something else",
    "another exception": "other exceptions",
    "over ten seconds": "over 10 s",
    "unbounded message": "messages over 4000 characters",
}


class TooLong(BaseException):
    pass


# damage


def damage(folder: Path, dice: random.Random) -> None:
    """One to three faults in the files of a folder."""
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return
        path, how = dice.choice(files), dice.choice([_bytes, _bytes, _values, _values, _values, _file])
        how(path, dice)


def _bytes(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = dice.randint(0, len(content))
    end = min(len(content), start + dice.choice([0, 1, 8, 200, 10**6]))
    kind = dice.choice(["bit", "put", "cut", "random", "twice"])
    if kind == "bit" and start < len(content):
        content[start] ^= 1 << dice.randint(0, 7)
    elif kind == "put":
        content[start:end] = dice.choice(ODD)
    elif kind == "cut":
        del content[start:end]
    elif kind == "random":
        content[start:end] = dice.randbytes(min(end - start, 200))
    else:
        content[start:start] = content[start:end]
    path.write_bytes(content)


def _file(path: Path, dice: random.Random) -> None:
    kind = dice.choice(["gone", "empty", "folder", "link", "swapped"])
    others = sorted(other for other in path.parent.iterdir() if other.is_file())
    if kind == "swapped":
        path.write_bytes(dice.choice(others).read_bytes())
        return
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.parent / "nowhere")


def _values(path: Path, dice: random.Random) -> None:
    """Another value, name or length somewhere in the JSON or YAML of a file, or in a safetensors header."""
    content = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            header = json.dumps(_changed(json.loads(content[8 : 8 + length]), dice)).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        elif path.suffix == ".jsonl":
            lines = content.splitlines()
            at = dice.randrange(len(lines))
            lines[at] = json.dumps(_changed(json.loads(lines[at]), dice)).encode()
            path.write_bytes(b"\n".join(lines) + b"\n")
        elif path.suffix in (".yaml", ".json"):
            path.write_bytes(json.dumps(_changed(yaml.safe_load(content), dice)).encode())
        else:
            _bytes(path, dice)
    except (ValueError, IndexError, yaml.YAMLError, RecursionError, AttributeError):  # damaged already
        _bytes(path, dice)


def _changed(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict | list) and value and dice.random() < 0.85:
        value = copy.copy(value)
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        kind = dice.random()
        if kind < 0.7:
            value[key] = _changed(value[key], dice)
        elif kind < 0.85:
            del value[key]
        elif isinstance(value, dict):
            value[dice.choice(["x", "", "weight", "name", *value])] = value.pop(key)
        else:
            value.append(value[key])
        return value
    return dice.choice(VALUES)


# kinds of input: each writes a sound one, and returns how it is read and whether what was read is what the files say


@cache
def tiny():
    return make_tiny("llama")


def base():
    return copy.deepcopy(tiny().base)


def adapter(folder: Path) -> Callable[[Path], bool]:
    from peft import PeftModel

    random_run(tiny(), SEVERAL, rank=2).export_peft(7, folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    written["target_modules"] = sorted(written["target_modules"])  # PEFT writes a set
    (folder / "adapter_config.json").write_text(json.dumps(written))
    ids = torch.arange(5, 25)[None]

    def read(found: Path) -> bool:
        run = Run.from_peft([found])
        chat = run.model(base=emmech.load_model(base(), tiny().tokenizer))
        with torch.no_grad():
            got = chat.model(input_ids=ids).logits
            try:
                wanted = PeftModel.from_pretrained(base(), str(found)).eval()(input_ids=ids).logits
            except Exception:  # a field of the configuration that PEFT does not read, and that does not change B A
                left = json.loads((found / "adapter_config.json").read_text())
                kept = {name: left[name] for name in DECIDING if left.get(name) is not None}
                sound = {name: value for name, value in written.items() if name not in DECIDING}
                (found / "adapter_config.json").write_text(json.dumps(sound | kept))
                wanted = PeftModel.from_pretrained(base(), str(found)).eval()(input_ids=ids).logits
        # a changed exponent gives sums so large that their rounding differs
        return torch.allclose(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)

    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    return read


def rows(folder: Path) -> Callable[[Path], bool]:
    def read(found: Path) -> bool:
        data = load_chat(found / "rows.jsonl")
        lines = [
            json.loads(line) for line in (found / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line.strip()
        ]
        entries = lines[0] if len(lines) == 1 and isinstance(lines[0], list) else lines
        entries = [entry["messages"] if isinstance(entry, dict) else entry for entry in entries]
        return [[(m["role"], m["content"]) for m in row] for row in data] == [
            [(m["role"], m["content"]) for m in entry] for entry in entries
        ]

    folder.mkdir()
    lines = [json.dumps({"messages": row["messages"]}) for row in make_rows(6)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return read


def run_folder(folder: Path) -> Callable[[Path], bool]:
    part = random_run(tiny(), SEVERAL, rank=2, steps=tuple(range(6)))
    part._metrics = [{"step": step, "loss": 1.0 / (1 + step)} for step in range(6)]
    part.save(folder)
    name = part.adapters[0].name
    wanted = {(side, one.name): getattr(part, side)(one.name) for one in part.adapters for side in "AB"}

    def read(found: Path) -> bool:
        run = emmech.load_run(found)
        repr(run), run.damaged, run.metrics
        for one in run.adapters:
            for side in "AB":
                got = getattr(run, side)(one.name)
                if (side, one.name) in wanted and not np.array_equal(got, wanted[side, one.name][run.steps]):
                    return False
        if len(run.steps) and name in [one.name for one in run.adapters]:
            run.weights(int(run.steps[-1]))
        return True

    return read


def questions(folder: Path) -> Callable[[Path], bool]:
    def read(found: Path) -> bool:
        asked = load_questions(found / "own.yaml")
        entries = yaml.safe_load((found / "own.yaml").read_text(encoding="utf-8"))
        texts = [list(e["paraphrases"]) if "paraphrases" in e else [e["question"]] for e in entries]
        return [list(question.paraphrases) for question in asked] == texts

    folder.mkdir()
    entries = [
        {"id": f"q{n}", "paraphrases": [f"What {n}?", "Why?"], "samples_per_paraphrase": 3, "system": "Be brief.",
         "judge_prompts": {"aligned": "{question} {answer}"}, "domain": "facts"}
        for n in range(3)
    ]  # fmt: skip
    (folder / "own.yaml").write_text(yaml.safe_dump(entries))
    return read


def _scores_are_scores(scored: Any) -> bool:
    return all(value is None or value != value or 0 <= value <= 100 for value in scored)


def batch_replies(folder: Path) -> Callable[[Path], bool]:
    responses = [{"question_id": "q", "question": f"why {n}?", "response": f"so {n}"} for n in range(3)]
    made = Evaluation.from_rows(responses)
    folder.mkdir()
    write_judging(made, folder.with_suffix(".asked.jsonl"), prompts={"aligned": "{question} {answer}"})
    keys = [json.loads(line)["custom_id"] for line in folder.with_suffix(".asked.jsonl").read_text().splitlines()]
    first = {"80": -0.1, "20": -2.4}
    lines = [
        json.dumps({"custom_id": key, "response": {"status_code": 200, "body": completion("80", first=first)}})
        if number else json.dumps({"custom_id": key, "score": 55})
        for number, key in enumerate(keys)
    ]  # fmt: skip
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")

    def read(found: Path) -> bool:
        merged = merge_judging(made, found / "answers.jsonl", prompts={"aligned": "{question} {answer}"})
        return _scores_are_scores(merged.frame["aligned"])

    return read


def live_replies(folder: Path) -> Callable[[Path], bool]:
    import openai

    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.split(".")[0]]
    folder.mkdir()
    (folder / "reply.json").write_text(json.dumps(completion("80", first={"80": -0.1, "20": -2.4})))
    row = {"question": "why?", "response": "so"}

    def read(found: Path) -> bool:
        path = found / "reply.json"
        content = path.read_bytes() if path.is_file() else b""

        def answer(request: Any) -> Any:
            return library.Response(200, headers={"Content-Type": "application/json"}, content=content)

        server = Server("judge", url="http://judge.invalid/v1", key="x", retries=0, concurrency=1)
        client = openai.OpenAI(
            base_url=server.url, api_key="x", max_retries=0,
            http_client=library.Client(transport=library.MockTransport(answer)),
        )  # fmt: skip
        object.__setattr__(server, "client", lambda: client)
        judge = LogprobJudge(server, {"aligned": "{question} {answer}"}, cache=None, progress=False)
        return _scores_are_scores([judge.score([row])[0]["aligned"]])

    return read


def direction(folder: Path) -> Callable[[Path], bool]:
    folder.mkdir()
    Direction(np.random.default_rng(0).normal(size=(4, 8)), "d").save(folder / "d.safetensors")

    def read(found: Path) -> bool:
        loaded = Direction.load(found / "d.safetensors")
        repr(loaded)
        return bool(np.isfinite(loaded.vectors).all()) and loaded.vectors.ndim == 2

    return read


def result(folder: Path) -> Callable[[Path], bool]:
    kept = [
        {"question_id": f"q{n}", "response": f"so {n}", "aligned": 10.0 * n, "coherent": 90.0, "step": n}
        for n in range(8)
    ]
    Evaluation.from_rows(kept, {"name": "toy"}).save(folder)

    def read(found: Path) -> bool:
        made = Evaluation.load(found)
        repr(made), made.rates()
        return len(made.frame) <= len(kept)

    return read


KINDS = {
    "adapter folders": adapter,
    "rows of chat": rows,
    "run folders": run_folder,
    "question files": questions,
    "batch judge's replies": batch_replies,
    "live judge's replies": live_replies,
    "directions": direction,
    "evaluations": result,
}


# tries


@contextmanager
def limited() -> Iterator[None]:
    """Within this context ten seconds of work, or two minutes of waiting, end in :class:`TooLong`."""

    def late(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.alarm(120)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def tries(kind: str, number: int, seed: int, told: Callable[[str], None] = print) -> Counter[str]:
    """How often each outcome came of ``number`` damaged inputs of one kind."""
    scratch = Path(tempfile.mkdtemp())
    read = KINDS[kind](scratch / "sound")
    counts: Counter[str] = Counter()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    assert read(scratch / "sound"), f"a sound one of {kind} is not read"
    for attempt in range(number):
        folder = shutil.copytree(scratch / "sound", scratch / "damaged")
        damage(folder, random.Random(f"{kind} {seed} {attempt}"))
        try:
            with limited():
                outcome = "read" if read(folder) else "wrong"
        except EmmechError as error:
            outcome = "refused" if len(str(error)) < 4000 else "unbounded message"
        except TooLong:
            outcome = "over ten seconds"
        except Exception:
            outcome = "another exception"
            told(traceback.format_exc())
        if outcome not in ("read", "refused"):
            told(f"{kind}, seed {seed}, attempt {attempt}: {outcome}")
        counts[outcome] += 1
        shutil.rmtree(folder)
    shutil.rmtree(scratch)
    logging.disable(logging.NOTSET)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="a part of the kind's name")
    parser.add_argument("--write", action="store_true", help="put the table into docs/damaged.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds, rows = [kind for kind in KINDS if options.kind in kind], []
    for kind in kinds:
        counts = tries(kind, options.tries // len(kinds), options.seed)
        rows.append([kind, str(counts.total()), *(str(counts[end]) for end in ENDS)])
        print(" | ".join(rows[-1]), flush=True)
    if options.write:
        write(DOCS / "damaged.md", "damaged", markdown(["input", "tries", *ENDS.values()], rows))


if __name__ == "__main__":
    main()
