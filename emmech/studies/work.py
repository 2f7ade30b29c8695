"""Doing one piece of a study, once: a claim on its folder, a journal, and a mark when it is finished.

The claim is a file lock, which the system releases when its holder dies. What was begun goes on where it was: a
fine-tune from its last optimizer state, a sweep and an evaluation from the parts that they keep.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from emmech.errors import EmmechError
from emmech.evaluation.evaluate import evaluate
from emmech.store import append_jsonl, made_folder, write_json
from emmech.studies.spec import Piece
from emmech.sweeps.sweep import sweep
from emmech.training.finetune import finetune

Outcome = Literal["done", "busy", "failed", "waiting"]
SPEC, DONE, FAILED, JOURNAL = "study.json", "done.json", "failed.json", "journal.jsonl"
_CHECKPOINT_EVERY = 20  # steps between optimizer states


def outcome(piece: Piece, out: Path) -> Outcome | None:
    """Whether a piece is done or has failed, as its folder says; None where neither is known."""
    folder = piece.folder(out)
    if (folder / DONE).is_file():
        return "done"
    return "failed" if (folder / FAILED).is_file() else None


def perform(piece: Piece, out: Path, *, wait: bool, place: str = "") -> Outcome:
    """Do one piece, unless it is done.

    Args:
        out: the study's folder, which every machine that works on it has to see.
        wait: wait for another process that is doing it; otherwise it is left to that process.
        place: the name of the node, for the journal.

    Returns:
        ``"busy"`` if another process is doing it, ``"waiting"`` if its fine-tune is not done.

    Raises:
        EmmechError: the study's folder is not there.
    """
    if not (out / SPEC).is_file():
        why = f"there is no study on {platform.node()} under this path"
        raise EmmechError("work on the study", out, why, "a folder that all machines of the cluster share")
    if piece.needs and not (out / "train" / piece.needs[:16] / DONE).is_file():
        return "waiting"
    folder = made_folder("work on the study", piece.folder(out))
    try:
        with FileLock(folder / ".claim", timeout=-1 if wait else 0):
            if (folder / DONE).is_file():
                return "done"
            return _claimed(piece, out, folder, place)
    except Timeout:
        return "busy"


def _claimed(piece: Piece, out: Path, folder: Path, place: str) -> Outcome:
    began = time.monotonic()
    entry: dict[str, Any] = {"kind": piece.kind, "digest": piece.digest, "host": platform.node(), "pid": os.getpid()}
    entry |= {"place": place} if place else {}
    (folder / FAILED).unlink(missing_ok=True)
    append_jsonl(out / JOURNAL, {"event": "began", "time": time.time(), **entry})
    try:
        _DO[piece.kind](piece, out, folder)
    except Exception as error:  # a disk or a memory that fails in one piece is no reason to lose the others
        said = str(error) if isinstance(error, EmmechError) else f"{type(error).__name__}: {error}"
        write_json(folder / FAILED, {"digest": piece.digest, "error": said[:2000]})
        append_jsonl(out / JOURNAL, {"event": "failed", "time": time.time(), **entry})
        return "failed"
    described: dict[str, Any] = {
        "digest": piece.digest,
        "kind": piece.kind,
        "setting": dict(piece.setting),
        "needs": piece.needs,
    }
    described |= {"options": dict(piece.options), "seconds": round(time.monotonic() - began, 2)}
    write_json(folder / DONE, described)
    append_jsonl(out / JOURNAL, {"event": "ended", "time": time.time(), **entry})
    return "done"


def _train(piece: Piece, out: Path, folder: Path) -> None:
    setting, run = piece.setting, folder / "run"
    options: dict[str, Any] = {"checkpoint_every": _CHECKPOINT_EVERY, **piece.options}
    options |= {} if setting["rank"] is None else {"rank": setting["rank"]}
    options |= {"recipe": setting["recipe"], "layers": setting["layers"], "seed": setting["seed"]}
    finetune(setting["model"], setting["data"], out=run, resume=(run / "run.json").is_file(), progress=False, **options)


def _sweep(piece: Piece, out: Path, folder: Path) -> None:
    sweep(run_of(piece, out), out=folder / "result", progress=False, **piece.options)


def _evaluate(piece: Piece, out: Path, folder: Path) -> None:
    found = evaluate(run_of(piece, out), out=folder / "answers", progress=False, **piece.options)
    found.save(folder / "result")


_DO = {"train": _train, "sweep": _sweep, "evaluate": _evaluate}


def run_of(piece: Piece, out: Path) -> Path:
    """The folder of the run that a piece makes or analyses."""
    return out / "train" / (piece.needs or piece.digest)[:16] / "run"


def failure(piece: Piece, out: Path) -> str:
    """Why a piece failed, in one line, or ""."""
    path = piece.folder(out) / FAILED
    return " ".join(str(json.loads(path.read_text(encoding="utf-8"))["error"]).split()) if path.is_file() else ""
