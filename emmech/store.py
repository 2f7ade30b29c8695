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
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError

_STEP_FILE = re.compile(r"step-(\d+)\.safetensors$")
_STACKED = "stacked.safetensors"
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)  # of half a file
_KINDS = {"F": "f", "I": "i", "U": "u"}  # safetensors's and NumPy's letters
_ATTEMPTS = 20  # readings of a file that another process keeps replacing
_CHECK = "sum/"  # the prefix of the checksums of every tensor's rows, in the same file


class MemorySeries:
    """The reading interface of :class:`Series` for arrays that are already in memory."""

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
    ``damaged`` lists the damaged files that were found so far, and :meth:`verify` checks all files; everything else
    stays readable. A series also stays readable while another process writes or stacks it, and keeps the steps with
    which it was opened; opened again, it has those recorded since.

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

    def _reload(self, known: list[int] | None = None) -> None:
        """Open the folder's files anew, of the ``known`` steps only if they are given."""
        gone = self._list(known)
        while gone and gone != (again := self._list(known)):  # they were stacked since the folder was listed
            gone = again
        self.damaged += gone  # links to nowhere
        self._index(known)

    def _list(self, known: list[int] | None) -> list[Path]:
        """Open every file, and return those that are gone although they were listed."""
        self.damaged.clear()
        self._stacked: _File | None = None
        self._stacked_steps = np.empty(0, dtype=np.int64)
        self._loose: dict[int, _File] = {}
        # listed before the stacked file is opened: a step that is stacked in between is then in both, not in neither
        try:
            names = [entry.name for entry in os.scandir(self.folder)]
        except (OSError, ValueError):  # a path with a NUL, which writing refuses by name
            names = []
        gone: list[Path] = []
        if names and (stacked := self._opened(self.folder / _STACKED, [])):
            self._stacked, self._stacked_steps = stacked, stacked.steps
        loose = {int(match[1]): name for name in names if (match := _STEP_FILE.search(name))}
        for step in sorted(loose.keys() - self._stacked_steps.tolist()) if loose else ():
            if (known is None or step in known) and (file := self._opened(self.folder / loose[step], gone)):
                self._loose[step] = file
        return gone

    def _index(self, known: list[int] | None = None) -> None:
        files = [self._stacked, *self._loose.values()]
        self.keys: tuple[str, ...] = next((file.keys for file in files if file is not None), ())
        self.steps = self._stacked_steps
        if self._loose:
            self.steps = np.union1d(self.steps, np.array([*self._loose], dtype=np.int64))
        if known is not None:
            self.steps = np.intersect1d(self.steps, known)

    def _opened(self, path: Path, gone: list[Path]) -> _File | None:
        """A file's index, or None if there is no such file (it is added to ``gone``) or it is damaged."""
        try:
            return _File(path)
        except FileNotFoundError:
            gone.append(path)
        except (*_DAMAGED, OSError):
            self.damaged.append(path)
        return None

    def append(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Write one step, which exists in full or not at all whenever the process dies.

        Raises:
            EmmechError: the disk is full or the folder is gone; earlier steps are kept.
        """
        path = self.folder / f"step-{step:06d}.safetensors"
        rows = {key: np.ascontiguousarray(value)[None] for key, value in tensors.items()}
        checks = {f"{_CHECK}{key}": _checksums(value) for key, value in rows.items()}
        asked = f"record step {step}"
        save_tensors({key: value[0] for key, value in rows.items()} | checks, path, asked)
        with kept(asked, path):
            self._loose[step] = _File(path)
        self._index()

    def read(self, key: str) -> Float[np.ndarray, "steps *shape"]:
        """All recorded steps of one tensor, stacked: ``[steps, *shape]``.

        Raises:
            EmmechError: names the file and the steps whose bytes have changed since they were written.
        """

        def read() -> np.ndarray:
            rows = self._rows(self._stacked, key) if self._stacked else np.empty(0)
            if len(self.steps) == len(rows) and not self._loose:
                return rows
            by_step = dict(zip(self._stacked_steps.tolist(), rows, strict=True))
            by_step |= {step: self._rows(file, key)[0] for step, file in self._loose.items()}
            return np.stack([by_step[step] for step in self.steps.tolist()])

        return self._again(key, read)

    def read_step(self, key: str, step: int) -> np.ndarray:
        """One step of one tensor, ``[*shape]``, without reading the others.

        Raises:
            EmmechError: names the file whose bytes have changed since they were written.
        """

        def read() -> np.ndarray:
            if (file := self._loose.get(step)) is not None:
                return self._rows(file, key)[0]
            if self._stacked is None or step not in self.steps:
                raise self._refusal(self.folder / _STACKED, f"step {step} is not in it")
            row = int(np.searchsorted(self._stacked_steps, step))
            return self._rows(self._stacked, key, row)[0]

        return self._again(key, read)

    def _rows(self, file: _File, key: str, row: int | None = None) -> np.ndarray:
        try:
            return file.rows(key, row)
        except _DAMAGED as error:
            if file.path not in self.damaged:
                self.damaged.append(file.path)
            raise self._refusal(file.path, str(error))

    def _refusal(self, path: Path, why: str) -> EmmechError:
        return EmmechError(f"read {path.name}", path, why, "other steps and tensors of it, or a copy of the file")

    def _again(self, key: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Read, and read again if another process has stacked the files in the meantime."""
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return read()
            self._reload(self.steps.tolist())
            if key not in self.keys:
                raise self._refusal(self.folder / _STACKED, f"{key} is no longer in it")
        raise self._refusal(self.folder / _STACKED, "it is replaced again and again")

    def verify(self) -> list[Path]:
        """Read every byte, and return the files that are damaged."""
        for key in self.keys:
            for step in self.steps.tolist():
                with contextlib.suppress(EmmechError):
                    self.read_step(key, step)
        return list(self.damaged)

    def drop_after(self, step: int) -> None:
        """Delete every step after ``step``, since a resumed training will record them again."""
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
        """Stack the per-step files into one; this is safe to interrupt at any point.

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


class _File:
    """A safetensors file; its index is read once, and rows of its tensors are read and checked when they are needed.

    Nothing is memory-mapped: pages of a map cost more than reading a small tensor, and a file that another process
    truncates would end this process. A single step's file is one row of each tensor.

    Raises:
        ValueError: this or another exception in ``_DAMAGED``, if the file is incomplete.
        FileNotFoundError: the file is gone, or another file has replaced it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stacked = path, path.name == _STACKED
        with path.open("rb", buffering=0) as file:
            self._stamp = _stamp(file)
            length = int.from_bytes(file.read(8), "little")
            self._entries: dict[str, Any] = json.loads(file.read(min(length, self._stamp[0])))
        self._start = 8 + length
        if self._start + max(entry["data_offsets"][1] for entry in self._entries.values()) != self._stamp[0]:
            raise ValueError("its length is not what its header says")
        self._sums = any(name.startswith(_CHECK) for name in self._entries)
        self.keys = tuple(name for name in self._entries if name != "steps" and not name.startswith(_CHECK))
        self.steps = np.empty(0, np.int64)
        if self._stacked:
            self.steps = self.rows("steps")[0]

    def rows(self, key: str, row: int | None = None) -> np.ndarray:
        """All rows of a tensor, or one of them, ``[rows, *shape]``, checked to be unchanged since they were written."""
        with self.path.open("rb", buffering=0) as file:
            if _stamp(file) != self._stamp:
                raise FileNotFoundError(self.path)
            found = self._read(file, key, row)
            if not self._sums:  # written before there were checksums
                return found
            wanted = self._read(file, f"{_CHECK}{key}", row).reshape(-1)
        sums = _checksums(found)
        if sums.tobytes() != wanted.tobytes():
            steps = self.steps[sums != wanted][:10].tolist() if self._stacked and row is None else ""
            raise ValueError(f"bytes of {key} have changed since they were written {steps}")
        return found

    def _read(self, file: FileIO, key: str, row: int | None) -> np.ndarray:
        entry = self._entries[key]
        kind, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        if not self._stacked or key.endswith("steps"):  # a single row
            shape = [1, *shape]
        elif row is not None:
            width = (end - begin) // shape[0]
            begin, end, shape = begin + row * width, begin + (row + 1) * width, [1, *shape[1:]]
        of = np.dtype(f"{_KINDS[kind[0]]}{int(kind[1:]) // 8}")
        if not 0 <= begin <= end <= self._stamp[0] - self._start or math.prod(shape) * of.itemsize != end - begin:
            raise ValueError(f"{key} is not as long as the header says")
        found = np.empty(shape, of)
        file.seek(self._start + begin)
        if file.readinto(found.data) != end - begin:
            raise ValueError(f"{key} is not as long as the header says")
        return found


def _stamp(file: FileIO) -> tuple[int, int, int]:
    """A file's length, time of writing and number, which differ if another file has replaced it."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino


def _checksums(rows: np.ndarray) -> np.ndarray:
    """The sum of each row's bytes, in words and modulo 2**64, ``[rows]``; any single changed bit changes it."""
    rows = np.ascontiguousarray(rows).reshape(len(rows), -1)
    size = rows.shape[1] * rows.itemsize
    word = next(np.dtype(f"u{width}") for width in (8, 4, 2, 1) if size % width == 0)
    return rows.view(word).sum(axis=1, dtype=np.uint64) if size else np.zeros(len(rows), np.uint64)


def drop_files(folder: Path, *, after: int | None = None) -> None:
    """Delete the unfinished files of a process that died, and the files of all steps after one."""
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
        asked: what is being done, for the message if the disk refuses it.
        metadata: the file's metadata.
        synced: wait until the file is on the disk, because the files that it replaces are about to be deleted.

    Raises:
        EmmechError: the disk is full, read-only or gone.
    """
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    partial = path.with_name(f"{path.name}.partial")
    with kept(asked, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # safetensors takes other users' permission to read away
        save_file(dict(tensors), partial, metadata=metadata)
        partial.chmod(mode)
        if synced:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def kept(asked: str, path: Path) -> Iterator[None]:
    """Within this context a failure of the disk becomes an error that says what is kept.

    Raises:
        EmmechError: the disk is full, read-only or gone.
    """
    if "\0" in str(path):
        raise EmmechError(asked, repr(str(path)), "a path holds no NUL character", "another folder")
    try:
        yield
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, OSError | SafetensorError):  # safetensors reports a full disk in its own way
            raise
        why = f"the disk refuses it ({getattr(error, 'strerror', None) or error}); what was recorded before is kept"
        raise EmmechError(asked, path, why, "free some space or mend the folder, then resume")


@contextlib.contextmanager
def writing(folder: Path, asked: str) -> Iterator[None]:
    """Hold a folder's only lock for writing, which names the process that holds it and is released when that ends.

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
            if not (folder / ".lock").is_file():  # filelock waits for a folder that has vanished, too
                raise FileNotFoundError("the folder is gone")
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
    """The folder, made if it is missing.

    Raises:
        EmmechError: a file is in the way, or the disk is full, read-only or gone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError if the path contains a NUL character
        why = f"no folder can be made there ({getattr(error, 'strerror', error)})"
        raise EmmechError(asked, repr(str(folder)), why, "another folder")
    return folder


def file_name(text: str) -> str:
    """Any text as the name of one file or folder; characters that separate folders become ``_``.

    Example:
        >>> file_name("../my runs/a")
        '.._my runs_a'
    """
    return re.sub(r"[\\/\x00-\x1f]", "_", text)[:200]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it; its folder is made.

    Raises:
        EmmechError: the disk is full, read-only or gone.
    """
    partial = path.with_name(f"{path.name}.partial")
    with kept(f"write {path.name}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text as :func:`write_bytes` writes bytes."""
    write_bytes(path, text.encode())


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
    """A row as JSON."""
    return json.dumps(_without_nan(row)) + "\n"


def _without_nan(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed(row: Mapping[str, Any], belongs: str = "") -> dict[str, Any]:
    """A row with a checksum, by which :func:`intact` knows it again after it was stored.

    Args:
        belongs: what the row is a part of; it is intact there only.

    Example:
        >>> row = sealed({"text": "hello"}, "one file")
        >>> intact(row, "one file"), intact(row, "another"), intact({**row, "text": "hallo"}, "one file")
        (True, False, False)
    """
    return {**row, "checksum": zlib.crc32(f"{belongs}{_line(row)}".encode())}


def intact(row: Mapping[str, Any], belongs: str = "") -> bool:
    """Whether a row's checksum is that of its content; False without one."""
    return row == sealed({name: value for name, value in row.items() if name != "checksum"}, belongs)


def warn_of_lines(damaged: Sequence[Path], then: str) -> None:
    """Name the damaged lines of a file, if there are any.

    Args:
        then: what becomes of them.
    """
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        named = f"{damaged[0].parent}: {', '.join(path.name for path in damaged[:3])}{more}"
        warnings.warn(f"damaged lines in {named}; {then}, and all others are kept", stacklevel=4)


def drop_unfinished(path: Path) -> None:
    """Remove an unfinished last line, which the process was writing when it died."""
    with kept(f"go on with {path.name}", path):
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def read_jsonl(
    path: Path, damaged: list[Path] | None = None, *, sound: Callable[[dict[str, Any]], bool] | None = None
) -> list[dict[str, Any]]:
    """Read the rows except an unfinished last line, which the process was writing when it died.

    Args:
        damaged: a list to which lines that are no such JSON objects are added as ``path:line``; they are left out.
        sound: whether a row is one of those that are expected in the file.

    Raises:
        EmmechError: without ``damaged``, a line in the middle of the file is no such object (file and line are named).
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if damaged is None:
            raise EmmechError(
                f"read {path.name}", path, f"the disk refuses it ({error.strerror})", "a copy of the file"
            )
        damaged.append(path)
        return []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict) or (sound is not None and not sound(row)):
                raise ValueError("it is no object of the expected form")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # it has no newline, so it was being written
                break
            if damaged is not None:
                damaged.append(path.with_name(f"{path.name}:{number}"))
                continue
            given, why = f"{path}:{number}: {line[:80]!r}", f"the line is not JSON ({error})"
            raise EmmechError(f"read {path.name}", given, why, "mend or delete that line; the others are intact")
    return rows
