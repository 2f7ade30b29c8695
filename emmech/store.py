"""Append-only series of named tensors on disk: one file per step while recording, one stacked file at rest.

A recording that is killed must lose nothing and a finished one must open in milliseconds. Both hold because
each recorded step is first a small safetensors file of its own (written under a temporary name, then renamed,
so that it exists whole or not at all), and ``compact`` later stacks them into one memory-mapped file::

    trajectory/step-000005.safetensors     {"A/layers.15.mlp.down_proj": [d_in], "B/...": [d_out]}
    trajectory/stacked.safetensors         {"steps": [steps], "A/...": [steps, d_in], "B/...": [steps, d_out]}

No pickle anywhere; JSON lines carry the scalars.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError

__all__ = ["MemorySeries", "Series", "append_jsonl", "read_jsonl", "write_json"]

_STEP_FILE = re.compile(r"step-(\d+)\.safetensors$")
_STACKED = "stacked.safetensors"


class MemorySeries:
    """The same reading face as :class:`Series`, over arrays that are already in memory."""

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

    ``damaged`` lists the files that could not be read; everything else stays readable.

    Example:
        >>> import numpy as np, tempfile
        >>> series = Series(Path(tempfile.mkdtemp()) / "trajectory")
        >>> for step in (0, 5): series.append(step, {"B": np.full(3, step, np.float32)})
        >>> series.compact()
        >>> series.steps.tolist(), series.read("B").shape
        ([0, 5], (2, 3))
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._reload()

    def _reload(self) -> None:
        self.damaged.clear()
        self._stacked_steps = np.empty(0, dtype=np.int64)
        self._keys: tuple[str, ...] = ()
        self._loose: dict[int, Path] = {}
        if not self.folder.is_dir():
            self.steps = self._stacked_steps
            return
        stacked = self.folder / _STACKED
        if stacked.exists() and (header := self._header(stacked)) is not None:
            self._stacked_steps = header["steps"]
            self._keys = header["keys"]
        known = set(self._stacked_steps.tolist())
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            match = _STEP_FILE.search(entry.name)
            if match and int(match[1]) not in known:  # a crash between stacking and unlinking leaves both
                header = self._header(Path(entry.path))
                if header is not None:
                    self._loose[int(match[1])] = Path(entry.path)
                    self._keys = self._keys or header["keys"]
        self.steps = np.array(sorted(known | set(self._loose)), dtype=np.int64)

    def _header(self, path: Path) -> dict[str, Any] | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                keys = tuple(key for key in file.keys() if key != "steps")  # noqa: SIM118 (not a mapping)
                steps = file.get_tensor("steps") if path.name == _STACKED else None
        except (SafetensorError, OSError, ValueError):
            self.damaged.append(path)
            return None
        return {"keys": keys, "steps": steps}

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors' names, those of the first readable file."""
        return self._keys

    def append(self, step: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Write one step; it exists whole or not at all, whenever the process dies."""
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, partial)
        partial.replace(path)
        self._loose[step] = path
        self._keys = self._keys or tuple(tensors)
        # Steps are appended in order; sorting only matters for a caller who does not.
        self.steps = np.unique(np.append(self.steps, np.int64(step)))

    def read(self, key: str) -> Float[np.ndarray, "steps *shape"]:
        """All recorded steps of one tensor, stacked: ``[steps, *shape]``."""
        from safetensors import safe_open
        from safetensors.numpy import load_file

        rows: dict[int, np.ndarray] = {}
        if len(self._stacked_steps):
            with safe_open(self.folder / _STACKED, framework="np") as file:
                stacked = file.get_tensor(key)
            if not self._loose:
                return np.asarray(stacked)
            rows = dict(zip(self._stacked_steps.tolist(), stacked, strict=True))
        for step, path in self._loose.items():
            rows[step] = load_file(path)[key]
        return np.stack([rows[step] for step in self.steps.tolist()])

    def read_step(self, key: str, step: int) -> np.ndarray:
        """One step of one tensor, ``[*shape]``, without reading the others."""
        from safetensors import safe_open

        if step in self._loose:
            with safe_open(self._loose[step], framework="np") as file:
                return np.asarray(file.get_tensor(key))
        row = int(np.searchsorted(self._stacked_steps, step))
        with safe_open(self.folder / _STACKED, framework="np") as file:
            return np.asarray(file.get_slice(key)[row])

    def drop_after(self, step: int) -> None:
        """Forget every step after ``step``: a resumed training will record them again."""
        if len(self._stacked_steps) and self._stacked_steps[-1] > step:
            kept = {key: self.read(key)[self.steps <= step] for key in self.keys}
            self._write_stacked(self.steps[self.steps <= step], kept)
        for later in [s for s in self._loose if s > step]:
            self._loose[later].unlink()
        self._reload()

    def compact(self) -> None:
        """Stack the per-step files into one; safe to interrupt at any point."""
        if not self._loose:
            return
        self._write_stacked(self.steps, {key: self.read(key) for key in self.keys})
        for path in self._loose.values():
            path.unlink()
        self._reload()

    def _write_stacked(self, steps: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        partial = self.folder / "stacked.partial"
        save_file({"steps": steps, **{k: np.ascontiguousarray(v) for k, v in tensors.items()}}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.folder / _STACKED)


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row; NaN is written as null, since JSON has no NaN."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows; an unfinished last line (the process died writing it) is left out.

    Raises:
        EmmechError: a line in the middle of the file is not JSON (file and line are named).
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline behind it: it was being written
                break
            raise EmmechError(
                f"read {path.name}",
                f"{path}:{number}: {line[:80]!r}",
                f"the line is not JSON ({error.msg})",
                "mend or delete that line; the others are intact",
            )
    return rows
