"""Append-only series of named tensors on disk: one file per step while recording, one stacked file afterwards.

A recording that is killed must lose nothing, and a finished one must open in milliseconds. Both hold because each
recorded step is first a small safetensors file (written under a temporary name, then renamed, so that it exists whole
or not at all), and ``compact`` later stacks them into one memory-mapped file::

    trajectory/step-000005.safetensors     {"A/layers.15.mlp.down_proj": [d_in], "B/...": [d_out]}
    trajectory/stacked.safetensors         {"steps": [steps], "A/...": [steps, d_in], "B/...": [steps, d_out]}

Nothing is pickled; scalars are kept as JSON lines. Every row has a checksum in its file, so that reading a row with a
changed bit raises an error that names it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError

_STEP_FILE = re.compile(r"step-(\d+)\.safetensors$")
_STACKED = "stacked.safetensors"
_CHECK = "sum/"  # of every row of every tensor, in the same file


class MemorySeries:
    """The reading interface of :class:`Series`, over arrays that are already in memory."""

    def __init__(self, steps: Int[np.ndarray, " steps"], arrays: Mapping[str, np.ndarray]) -> None:
        self.steps = np.asarray(steps, dtype=np.int64)
        self._arrays = dict(arrays)

    @property
    def keys(self) -> tuple[str, ...]:
        """The arrays' names."""
        return tuple(self._arrays)

    def read(self, key: str) -> Float[np.ndarray, "steps *shape"]:
        """All recorded steps of one array: ``[steps, *shape]``."""
        return self._arrays[key]

    def read_step(self, key: str, step: int) -> np.ndarray:
        """One step of one array: ``[*shape]``."""
        return self._arrays[key][int(np.searchsorted(self.steps, step))]


class Series:
    """Named tensors by step in one folder.

    Args:
        folder: created by the first :meth:`append`; a folder that does not exist is an empty series.

    ``keys`` are the tensors' names, those of the first readable file.
    ``damaged`` lists the files that were found damaged so far, and :meth:`verify` looks through all of them; everything
    else stays readable. A series that is read while another process writes or stacks it stays readable as well.

    Example:
        >>> import numpy as np, tempfile
        >>> series = Series(Path(tempfile.mkdtemp()) / "trajectory")
        >>> for step in (0, 5): series.append(step, {"B": np.full(3, step, np.float32)})
        >>> series.compact()
        >>> series.steps.tolist(), series.read("B").shape, series.verify()
        ([0, 5], (2, 3), [])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._reload()

    def _reload(self) -> None:
        self.damaged.clear()
        self._stacked_steps = np.empty(0, dtype=np.int64)
        self.keys: tuple[str, ...] = ()
        self._loose: dict[int, Path] = {}
        if not self.folder.is_dir():
            self.steps = self._stacked_steps
            return
        # listed before the stacked file is opened: a step that is stacked in between is then in both, not in neither
        entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        stacked = self.folder / _STACKED
        if stacked.exists() and (header := self._header(stacked)) is not None:
            self.keys, self._stacked_steps = header
        known = set(self._stacked_steps.tolist())
        for entry in entries:
            path, match = Path(entry.path), _STEP_FILE.search(entry.name)
            if match and int(match[1]) not in known and path.exists() and (header := self._header(path)) is not None:
                self._loose[int(match[1])] = path
                self.keys = self.keys or header[0]
        self.steps = np.array(sorted(known | set(self._loose)), dtype=np.int64)

    def _header(self, path: Path) -> tuple[tuple[str, ...], np.ndarray] | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                keys = tuple(name for name in names if name != "steps" and not name.startswith(_CHECK))
                steps = file.get_tensor("steps") if path.name == _STACKED else np.empty(0, np.int64)
                if f"{_CHECK}steps" in names and file.get_tensor(f"{_CHECK}steps")[0] != _checksums(steps[None])[0]:
                    raise ValueError("the steps are damaged")
        except (SafetensorError, OSError, ValueError):
            self.damaged.append(path)
            return None
        return keys, steps

    def append(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Write one step; it exists in full or not at all, whenever the process dies.

        Raises:
            EmmechError: the disk is full or the folder is gone; earlier steps are kept.
        """
        path = self.folder / f"step-{step:06d}.safetensors"
        rows = {key: np.ascontiguousarray(value)[None] for key, value in tensors.items()}
        checks = {f"{_CHECK}{key}": _checksums(value) for key, value in rows.items()}
        save_tensors({key: value[0] for key, value in rows.items()} | checks, path, f"record step {step}")
        self._loose[step] = path
        self.keys = self.keys or tuple(tensors)
        self.steps = np.unique(np.append(self.steps, np.int64(step)))

    def read(self, key: str) -> Float[np.ndarray, "steps *shape"]:
        """All recorded steps of one tensor, stacked: ``[steps, *shape]``.

        Raises:
            EmmechError: names the file and the steps whose bytes have changed since they were written.
        """

        def read() -> np.ndarray:
            stacked = len(self._stacked_steps) > 0
            rows = self._rows(self.folder / _STACKED, key, slice(None)) if stacked else np.empty(0)
            if stacked and not self._loose:
                return rows
            by_step = dict(zip(self._stacked_steps.tolist(), rows, strict=True))
            by_step |= {step: self._rows(path, key, None) for step, path in self._loose.items()}
            return np.stack([by_step[step] for step in self.steps.tolist()])

        return self._again(read)

    def read_step(self, key: str, step: int) -> np.ndarray:
        """One step of one tensor, ``[*shape]``, without reading the others.

        Raises:
            EmmechError: names the file whose bytes have changed since they were written.
        """

        def read() -> np.ndarray:
            if step in self._loose:
                return self._rows(self._loose[step], key, None)
            row = int(np.searchsorted(self._stacked_steps, step))
            return self._rows(self.folder / _STACKED, key, slice(row, row + 1))[0]

        return self._again(read)

    def _rows(self, path: Path, key: str, chosen: slice | None) -> np.ndarray:
        """Some rows of a stacked file, or (``chosen`` None) what a single step's file holds, checked."""
        from safetensors import SafetensorError, safe_open

        with safe_open(path, framework="np") as file:
            try:
                names = set(file.keys())
                found = file.get_tensor(key) if chosen in (None, slice(None)) else file.get_slice(key)[chosen]
                if not any(name.startswith(_CHECK) for name in names):  # written before there were checksums
                    return np.asarray(found)
                wanted = file.get_tensor(f"{_CHECK}{key}")[chosen or slice(None)]
            except SafetensorError as error:
                raise self._damage(path, str(error))
        bad = np.flatnonzero(_checksums(found[None] if chosen is None else found) != wanted)
        if len(bad):
            steps = self._stacked_steps[chosen][bad].tolist() if chosen is not None else [path.stem]
            raise self._damage(path, f"bytes of {key} have changed since they were written: {steps[:10]}")
        return np.asarray(found)

    def _damage(self, path: Path, why: str) -> EmmechError:
        if path not in self.damaged:
            self.damaged.append(path)
        return EmmechError(f"read {path.name}", path, why, "other steps and tensors of it, or a copy of the file")

    def _again(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Read, and read again where another process has stacked the files meanwhile."""
        try:
            return read()
        except FileNotFoundError:
            self._reload()
            return read()

    def verify(self) -> list[Path]:
        """Read every byte, and return the files that are damaged."""
        for key in self.keys:
            for step in self.steps.tolist():
                with contextlib.suppress(EmmechError):
                    self.read_step(key, step)
        return list(self.damaged)

    def drop_after(self, step: int) -> None:
        """Forget every step after ``step``: a resumed training will record them again."""
        stacked = self.folder / _STACKED
        with kept(f"forget the steps after {step}", self.folder):
            if len(self._stacked_steps) and self._stacked_steps[-1] > step:
                if (wanted := self.steps <= step).any():
                    self._write_stacked(self.steps[wanted], {key: self.read(key)[wanted] for key in self.keys})
                else:
                    stacked.unlink()
        drop_files(self.folder, after=step)
        self._reload()

    def compact(self) -> None:
        """Stack the per-step files into one; safe to interrupt at any point.

        Raises:
            EmmechError: the disk is full or the folder is gone; the per-step files are kept.
        """
        if not self._loose:
            return
        self._write_stacked(self.steps, {key: self.read(key) for key in self.keys})
        with kept("delete the steps that are stacked", self.folder):
            for step in self.steps.tolist():
                (self.folder / f"step-{step:06d}.safetensors").unlink(missing_ok=True)
        self._reload()

    def _write_stacked(self, steps: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        checks = {f"{_CHECK}{key}": _checksums(value) for key, value in tensors.items()}
        checks[f"{_CHECK}steps"] = _checksums(steps[None])
        contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        asked = "stack the recorded steps"
        save_tensors({"steps": steps, **contiguous, **checks}, self.folder / _STACKED, asked, synced=True)


def _checksums(rows: np.ndarray) -> np.ndarray:
    """The sum of each row's bytes, taken in words and modulo 2**64: ``[rows]``. Any single changed bit changes it."""
    rows = np.ascontiguousarray(rows).reshape(len(rows), -1)
    size = rows.shape[1] * rows.itemsize
    word = next(np.dtype(f"u{width}") for width in (8, 4, 2, 1) if size % width == 0)
    return rows.view(word).sum(axis=1, dtype=np.uint64) if size else np.zeros(len(rows), np.uint64)


def drop_files(folder: Path, *, after: int | None = None) -> None:
    """Delete what a process that died was writing in a folder, and the files of steps after one."""
    with kept("delete what was being written", folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            match = _STEP_FILE.search(path.name)
            late = after is not None and match is not None and int(match[1]) > after
            if late or path.suffix == ".partial" or path.name.startswith(".tmp"):  # safetensors' own temporary files
                path.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Any], path: Path, asked: str, *, metadata: dict[str, str] | None = None, synced: bool = False
) -> None:
    """Write arrays, or torch's tensors, into a file that exists whole or not at all; its folder is made.

    Args:
        asked: what is being done, for the message where the disk refuses it.
        metadata: of the file.
        synced: wait until it is on the disk: the files that it replaces are about to go.

    Raises:
        EmmechError: the disk is full, read-only or gone.
    """
    from safetensors import SafetensorError

    arrays = all(isinstance(tensor, np.ndarray) for tensor in tensors.values())
    save = import_module(f"safetensors.{'numpy' if arrays else 'torch'}").save_file
    partial = path.with_name(f"{path.name}.partial")
    with kept(asked, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(dict(tensors), partial, metadata=metadata)
        except SafetensorError as error:  # which is how it reports a disk that is full
            raise OSError(str(error))
        if synced:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def kept(asked: str, path: Path) -> Iterator[None]:
    """Within, a failure of the disk becomes an error that says what is kept.

    Raises:
        EmmechError: the disk is full, read-only or gone.
    """
    if "\0" in str(path):
        raise EmmechError(asked, repr(str(path)), "a path holds no NUL character", "another folder")
    try:
        yield
    except OSError as error:
        why = f"the disk refuses it ({error.strerror or error}); what was recorded before is kept"
        raise EmmechError(asked, path, why, "free some space or mend the folder, then resume")


@contextlib.contextmanager
def writing(folder: Path, asked: str) -> Iterator[None]:
    """Hold a folder's one lock for writing; it names its holder, and is free again when that process ends.

    Args:
        asked: what is being done, for the message to a second writer.

    Raises:
        EmmechError: another process is writing there; the message names it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with writing(folder, "train"), writing(folder, "train"):
        ...     pass
        Traceback (most recent call last):
        emmech.errors.EmmechError: cannot train
        ...
    """
    from filelock import FileLock, Timeout

    path = folder / ".writer"
    made_folder(asked, folder)
    lock = FileLock(folder / ".lock")
    with kept(asked, path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = path.read_text(encoding="utf-8") if path.is_file() else "another process"
            raise EmmechError(asked, folder, f"{holder} is writing there", "another folder, or wait until it is done")
    try:
        with kept(asked, path):
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def made_folder(asked: str, folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        EmmechError: a file is in the way, or the disk is full, read-only or gone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError where the path holds a NUL character
        why = f"no folder can be made there ({getattr(error, 'strerror', error)})"
        raise EmmechError(asked, repr(str(folder)), why, "another folder")
    return folder


def file_name(text: str) -> str:
    """A text as the name of one file or folder, whatever it holds: what separates folders becomes ``_``.

    Example:
        >>> file_name("../my runs/a")
        '.._my runs_a'
    """
    return re.sub(r"[\\/\x00-\x1f]", "_", text)[:200]


def write_text(path: Path, text: str) -> None:
    """Write a text under a temporary name and rename it, so that a reader never sees half a file; its folder is made.

    Raises:
        EmmechError: the disk is full, read-only or gone.
    """
    partial = path.with_name(f"{path.name}.partial")
    with kept(f"write {path.name}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write JSON as :func:`write_text` writes a text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as :func:`write_text` writes a text."""
    write_text(path, "".join(map(_line, rows)))


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row."""
    with kept(f"append to {path.name}", path), path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON; NaN is written as null, since JSON has no NaN."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def drop_unfinished(path: Path) -> None:
    """Cut off an unfinished last line, which the process died writing."""
    with kept(f"go on with {path.name}", path):
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def read_jsonl(path: Path, damaged: list[Path] | None = None) -> list[dict[str, Any]]:
    """Read the rows; an unfinished last line (the process died writing it) is left out.

    Args:
        damaged: lines that are no JSON objects are left out and named here, as ``path:line``.

    Raises:
        EmmechError: without ``damaged``, a line in the middle of the file is no JSON object (file and line are named).
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: it was being written
                break
            if damaged is not None:
                damaged.append(path.with_name(f"{path.name}:{number}"))
                continue
            given, why = f"{path}:{number}: {line[:80]!r}", f"the line is not JSON ({error})"
            raise EmmechError(f"read {path.name}", given, why, "mend or delete that line; the others are intact")
    return rows
