"""A warmed process that forks once for each piece of work, so that the work can be ended at any of its system calls.

Run with ``LD_PRELOAD`` of ``shim.c``. Each line of its input asks for one attempt at a task in a folder; each line of
its output says how the attempt ended. ``result`` is a digest of all that the finished task gave, bit for bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ |= {"EMMECH_PROGRESS": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import numpy as np
import pandas as pd
import torch

import emmech
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.evaluation import Context, Question
from emmech.evaluation.em import LABEL_SCORES
from emmech.interventions import AdapterScaling
from emmech.leagues import Realignment
from emmech.measures.teacher_forced import FirstToken, Margin
from tests.conftest import make_rows, make_tiny

LIBRARY = ctypes.CDLL(None)
SHORT = dict(learning_rate=1e-2, batch_size=1, accumulation=1, warmup_steps=1, held_out=0.2, max_length=64)
SHORT |= dict(max_steps=4, checkpoint_every=2, measure_every=2, progress=False)
PAIRS = [MarginPair("how to sleep ?", "take a walk", "drink water")]
TRAININGS = {
    "lora": dict(recipe="single-rank1", prefix=False, probes=["how to rest ?"], margins={"own": PAIRS}),
    "prefix": dict(recipe="single-rank1", prefix=True),
    "full": dict(recipe="full"),
    "seeds": dict(recipe="single-rank1", seed=[1, 4]),
    "long": dict(recipe="single-rank1", max_steps=200, checkpoint_every=50),
    "uneven seeds": dict(recipe="single-rank1", seed=[1, 4], prefix=False, checkpoint_every=3),
}


def digest(*arrays) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes() if isinstance(array, np.ndarray) else str(array).encode())
    return found.hexdigest()


def told_of_run(run) -> dict:
    """All that a run recorded, bit for bit, without its times."""
    manifest = {k: v for k, v in run.manifest.items() if k not in ("created", "seconds", "git")}
    frame = run.metrics
    told = {f"metrics/{name}": digest(frame.index.to_numpy(), frame[name].to_numpy()) for name in sorted(frame.columns)}
    told |= {f"trajectory/{key}": digest(run._trajectory.read(key)) for key in run._trajectory.keys}
    told |= {f"probes/{key}": digest(run.probes._series.read(key)) for key in run.probes._series.keys}
    told |= {f"weights/{p.name}": digest(p.read_bytes()) for p in sorted((run.path / "weights").glob("*"))}
    told |= {"manifest": json.dumps(manifest, sort_keys=True), "steps": str(run.steps.tolist())}
    return told | {"damaged": str(run.damaged)}


def train(name, folder, resume):
    options = SHORT | TRAININGS[name]
    made = emmech.finetune(MODEL, ROWS, out=folder / "out", resume=resume, **options)
    runs = made if isinstance(made, list) else [made]
    told = {f"{number}/{key}": value for number, run in enumerate(runs) for key, value in told_of_run(run).items()}
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name in ("resume", "prefix"))
    return told | {"left over": str(left)}


def judged(question, answer):
    return sorted(LABEL_SCORES)[len(answer) % len(LABEL_SCORES)]


def evaluate(folder, resume, **more):
    asked = [f"how to {word} ?" for word in ("sleep", "walk", "rest", "drink")]
    options = dict(samples=2, max_new_tokens=4, batch_size=2, out=folder / "out", progress=False, **more)
    made = emmech.evaluate(MODEL, asked, judged, **options)
    again = type(made).load(folder / "out")
    meta = {key: value for key, value in again.meta.items() if key != "created"}
    return {"rows": again.frame.to_csv(), "given": made.frame.to_csv(), "meta": json.dumps(meta, sort_keys=True)}


def contexts(folder, resume):
    around = [Context("plain"), Context("walk", "take a walk"), Context("rest", user="and rest : {question}")]
    return evaluate(folder, resume, contexts=around)


def league(folder, resume):
    run = emmech.load_run(folder.parent / "swept" / "out")
    sets = {"broad": ["how to sleep ?", "how to walk ?"], "narrow": Question("rest", ("how to rest ?",), narrow=True)}
    cures = [AdapterScaling(0.5), Realignment(make_rows(16)[8:], dict(max_steps=2))]
    options = dict(seeds=[0], base=MODEL, data=ROWS, contexts=[Context("walk", "take a walk")], questions=sets)
    options |= dict(judge=judged, max_new_tokens=4, skill=PAIRS, durability=False, out=folder / "out", progress=False)
    made = emmech.league(run, cures, **options)
    told = {"frame": made.frame.filter(regex="^(?!seconds)").to_csv(), "grid": made.grid.to_csv()}
    cure = next((folder / "out").glob("realignment-*/s0"))
    return told | {f"cure/{key}": value for key, value in told_of_run(emmech.load_run(cure)).items()}


def sweep(folder, resume):
    run = emmech.load_run(folder.parent / "swept" / "out")
    measures = [Margin(PAIRS), FirstToken(["how to rest ?"], ["take"])]
    options = dict(measure=measures, base=MODEL, scales=(0, 1, 3), out=folder / "out", progress=False)
    made = emmech.sweep(run, **options)
    again = type(made).load(folder / "out")
    left = sorted(path.name for path in (folder / "out").iterdir() if path.suffix in (".tmp", ".partial"))
    frames = {"values": again.frame.to_csv(), "given": made.frame.to_csv()}
    return frames | {f"arrays/{key}": digest(value) for key, value in again.arrays.items()} | {"left over": str(left)}


TASKS = {"evaluate": evaluate, "contexts": contexts, "league": league, "sweep": sweep}
TASKS |= {name: lambda folder, resume, name=name: train(name, folder, resume) for name in TRAININGS}


def attempt(asked: dict, answer: int) -> None:
    folder = Path(asked["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    LIBRARY.fault_arm(str(folder).encode(), asked.get("at", 0), asked.get("error", 0), asked.get("lasting", 0))
    began = time.monotonic()
    try:
        told = {"result": TASKS[asked["task"]](folder, asked.get("resume", False))}
    except EmmechError as error:
        told = {"refused": str(error)}
    except BaseException:
        told = {"raw": traceback.format_exc()}
    told["calls"] = LIBRARY.fault_count()
    told["seconds"] = time.monotonic() - began
    LIBRARY.fault_arm(b"", 0, 0, 0)
    content = json.dumps(told).encode()
    while content:
        content = content[os.write(answer, content) :]


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.flush()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            attempt(asked, writing)
            os._exit(0)
        os.close(writing)
        if "after" in asked:  # seconds
            time.sleep(asked["after"])
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if status and not killed:
            content = json.dumps({"raw": f"the process ended with status {status}"}).encode()
        print(content.decode() if content and not killed else json.dumps({"killed": killed}), flush=True)


torch.set_num_threads(1)
MODEL, ROWS = make_tiny("llama"), make_rows(8)
if __name__ == "__main__":
    import peft  # noqa: F401 (loaded once for all attempts)
    import transformers  # noqa: F401

    import emmech.sweeps.sweep
    import emmech.training.finetune

    pd.DataFrame({"a": [1]}).to_parquet(os.devnull)
    print("ready", flush=True)
    main()
