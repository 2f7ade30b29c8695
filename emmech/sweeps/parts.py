"""What a sweep has finished so far, on disk or in memory: one safetensors file per group of variants and job."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emmech.errors import EmmechError
from emmech.measures.measure import Value
from emmech.store import write_json
from emmech.sweeps.result import Sweep

__all__ = ["Outcome", "ResumableParts", "as_bytes", "from_bytes"]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What a job makes of all its parts; every array has one entry per distinct variant."""

    values: list[Value]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    responses: list[dict] | None = None


class ResumableParts:
    """Finished parts of one request.

    Args:
        out: a folder, or None to keep them in memory.
        request: identifies the sweep; a folder that holds another is refused.

    Raises:
        EmmechError: the folder belongs to another sweep.
    """

    def __init__(self, out: str | Path | None, request: str) -> None:
        self.folder = Path(out) if out is not None else None
        self._kept: dict[tuple[str, int], Arrays] = {}
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmmechError(
                f"sweep into {self.folder.name}",
                f"out={str(out)!r}",
                f"no folder can be made there ({error.strerror})",
                "another folder",
            )
        for name in ("request.json", "sweep.json"):
            path = self.folder / name
            head = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"request": request}
            found = head.get("meta", head).get("request")
            if found != request:
                raise EmmechError(
                    f"sweep into {self.folder.name}",
                    f"out={str(out)!r}",
                    "it holds a sweep of other runs, variants, measures or another model",
                    "another folder, or the arguments it was begun with",
                )
        write_json(self.folder / "request.json", {"request": request})

    def finished(self) -> Sweep | None:
        """The whole sweep, when it is there already."""
        if self.folder is not None and (self.folder / "sweep.json").exists():
            return Sweep.load(self.folder)
        return None

    def _path(self, kind: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{kind}-{number:04d}.safetensors"

    def has(self, kind: str, number: int) -> bool:
        """Whether this part was finished before."""
        if self.folder is not None:
            return self._path(kind, number).exists()
        return (kind, number) in self._kept

    def add(self, kind: str, number: int, arrays: Arrays) -> None:
        """Keep a finished part; on disk it exists whole or not at all."""
        if self.folder is None:
            self._kept[kind, number] = arrays
            return
        from safetensors.numpy import save_file

        path = self._path(kind, number)
        scratch = path.with_suffix(".tmp")
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, scratch)
        os.replace(scratch, path)  # noqa: PTH105 (the atomic rename is the point)

    def all(self, kind: str, count: int) -> list[Arrays]:
        """All parts of a job, in order."""
        if self.folder is None:
            return [self._kept[kind, number] for number in range(count)]
        from safetensors.numpy import load_file

        return [load_file(self._path(kind, number)) for number in range(count)]

    def finish(self, result: Sweep) -> Sweep:
        """Write the result and drop the parts."""
        if self.folder is not None:
            result.save(self.folder)
            for path in [*self.folder.glob("part-*.safetensors"), self.folder / "request.json"]:
                path.unlink(missing_ok=True)
        return result


def as_bytes(records: object) -> np.ndarray:
    """JSON as an array of bytes, so that records travel with arrays.

    Example:
        >>> from_bytes(as_bytes([{"label": "aligned"}]))
        [{'label': 'aligned'}]
    """
    return np.frombuffer(json.dumps(records).encode(), dtype=np.uint8).copy()


def from_bytes(array: np.ndarray) -> list:
    """The records of :func:`as_bytes`."""
    found: list = json.loads(array.tobytes().decode())
    return found
