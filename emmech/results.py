"""The results of analyses: frozen values with one way to read, draw, print and save them.

A result is a frozen dataclass. Its :class:`Card` states the findings; ``repr`` and the card of a notebook are made from
it. A result is saved as a folder without pickle: ``<name>.json`` with the plain values, one parquet file for each data
frame, and ``arrays.safetensors``. The JSON file is written last and marks the folder as complete.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from emmech.errors import EmmechError
from emmech.store import file_name, kept, save_tensors, write_json, write_text
from emmech.view.page import card

if TYPE_CHECKING:
    import pandas as pd

_ARRAYS = "arrays.safetensors"


class Card(NamedTuple):
    """What is said of a result, as text and as HTML alike.

    Args:
        headline: what was found, one sentence in plain words.
        facts: the numbers with their intervals, each with its name.
        caveat: what a reader must know before relying on them.
        then: the line of code that would be called next.
        details: more text, which a notebook shows folded.
    """

    headline: str
    facts: tuple[tuple[str, str], ...] = ()
    caveat: str = ""
    then: str = ""
    details: str = ""


class Shown(ABC):
    """An object that can be shown as text, as a card in a notebook, as a table and as a figure."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The findings as a table."""

    @abstractmethod
    def plot(self) -> Any:
        """The findings as a plotly figure, which is returned but not shown."""

    @abstractmethod
    def _card(self) -> Card: ...

    def _sketch(self) -> str:
        """A small drawing for the card, of :mod:`emmech.view.sketch`."""
        return ""

    def _table(self) -> pd.DataFrame:
        """The table that is folded in the card: the findings, unless they are too long to read."""
        return self.to_frame()

    def _body(self) -> str:
        """More HTML for the card, escaped."""
        return ""

    def __repr__(self) -> str:
        said = self._card()
        width = max((len(name) for name, _ in said.facts), default=0)
        lines = [said.headline]
        for at, (name, text) in enumerate(said.facts):
            lines.append(f"  {'' if at and said.facts[at - 1][0] == name else name:<{width}}  {text}")
        lines += [f"  Note: {said.caveat}"] if said.caveat else []
        lines += [f"  Next: {said.then}"] if said.then else []
        return "\n".join(lines)

    def _repr_html_(self, *, sketch: bool = True) -> str:
        return card(*self._card(), sketch=self._sketch() if sketch else "", table=self._table(), body=self._body())


def percent(share: float) -> str:
    """A share as text.

    Example:
        >>> percent(0.985)
        '98.5 %'
    """
    return f"{100 * share:.1f} %"


def within(value: float, low: float, high: float, *, percent: bool = False, sign: bool = False) -> str:
    """A number with its 95 % interval in words.

    Example:
        >>> within(0.985, 0.929, 0.996, percent=True), within(0.02, -0.01, 0.05, sign=True)
        ('98.5 % (92.9 to 99.6 %)', '+0.02 (-0.01 to +0.05)')
    """
    how = ("+" if sign else "") + (".1f" if percent else ".3g")
    shown = [format(100 * one if percent else one, how) for one in (value, low, high)]
    unit = " %" if percent else ""
    return f"{shown[0]}{unit}" + (f" ({shown[1]} to {shown[2]}{unit})" if math.isfinite(low + high) else "")


class Result(Shown):
    """A result that can be saved: a frozen dataclass of plain values, arrays, data frames and dataclasses of these.

    A new kind of result adds its fields, ``_card`` and ``plot``, and ``to_frame`` where it has no field ``frame``.

    Example:
        >>> import tempfile
        >>> from emmech.directions.compare import Cosines
        >>> folder = Cosines(("a", "b"), np.ones((2, 2, 3)), floor=0.1).save(tempfile.mkdtemp() + "/kept")
        >>> Cosines.load(folder).names
        ('a', 'b')
    """

    _format: ClassVar[int] = 1
    _parts: ClassVar[tuple[type, ...]] = ()  # dataclasses that its fields hold
    _stems: ClassVar[Mapping[str, str]] = {}  # names of parquet files that are not those of their fields

    def to_frame(self) -> pd.DataFrame:
        """A copy of the findings, as a table."""
        frame: pd.DataFrame = self.frame  # type: ignore[attr-defined]  # for results that are one table
        return frame.copy()

    def _comments(self) -> Sequence[str]:
        """Lines before the table in a CSV file."""
        return ()

    @classmethod
    def _upgrade(cls, head: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The fields of a JSON file that an older version wrote."""
        return head

    def save(self, path: str | Path) -> Path:
        """Write everything into a folder, which ``load`` reads; a path ending in ``.csv`` gets the table alone.

        Raises:
            EmmechError: the disk is full, or the folder is read-only or gone.
        """
        import pandas as pd

        path = Path(path)
        if path.suffix == ".csv":
            frame = self.to_frame()
            plain = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
            head = "".join(f"# {line}\n" for line in self._comments())
            write_text(path, head + frame.to_csv(index=not plain))
            return path
        frames: dict[str, pd.DataFrame] = {}
        arrays: dict[str, np.ndarray] = {}
        values = {
            field.name: _pack(getattr(self, field.name), self._stems.get(field.name, field.name), frames, arrays)
            for field in fields(self)  # type: ignore[arg-type]  # every result is a dataclass
        }
        with kept(f"save the {type(self).__name__.lower()}", path):
            path.mkdir(parents=True, exist_ok=True)
            for name, frame in frames.items():
                frame.to_parquet(path / f"{name}.parquet.partial")
                (path / f"{name}.parquet.partial").replace(path / f"{name}.parquet")
        if arrays:
            save_tensors(arrays, path / _ARRAYS, f"save the {type(self).__name__.lower()}")
        written = [*(f"{name}.parquet" for name in frames), *([_ARRAYS] if arrays else [])]
        files = {name: _content(path / name) for name in written}
        write_json(path / f"{type(self).__name__.lower()}.json", {"format": self._format, "files": files, **values})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote into a folder.

        Raises:
            EmmechError: there is no such result, it is of a newer format, or a file is missing or damaged.
        """
        name = cls.__name__.lower()
        asked, folder = f"load the {name}", Path(path)
        file = folder / f"{name}.json"
        if not file.is_file():
            why = f"there is no {file.name} (was it interrupted, or is it a table?)"
            raise EmmechError(asked, folder, why, f"the folder given to {cls.__name__}.save")
        try:
            head = json.loads(file.read_text(encoding="utf-8"))
            kept_as = head.get("files", {})
            if (written := head.get("format", 0)) > cls._format:
                why = f"this version reads formats up to {cls._format}"
                raise EmmechError(asked, f"format {written} in {file}", why, "the version of emmech that wrote it")
            if written < cls._format:
                head = cls._upgrade(head, folder)
            arrays: Mapping[str, np.ndarray] = {}
            if (folder / _ARRAYS).exists():
                from safetensors.numpy import load_file

                arrays = load_file(folder / _ARRAYS)
            parts = {part.__name__: part for part in cls._parts}
            found = {field.name: _unpack(head[field.name], folder, arrays, parts) for field in fields(cls)}  # type: ignore[arg-type]
            whole = cls(**found)
            for name, content in kept_as.items():
                if _content(folder / name) != content:
                    why = f"{name} is not what was written with {file.name}: it is damaged, or of another result"
                    raise EmmechError(asked, folder, why, "a folder of its own for every result")
            return whole
        except EmmechError:
            raise
        except Exception as error:  # json, pyarrow and safetensors each raise classes of their own
            first = (str(error).splitlines() or [""])[0][:200]
            raise EmmechError(asked, folder, f"it is damaged ({type(error).__name__}: {first})")


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _pack(value: Any, name: str, frames: dict[str, pd.DataFrame], arrays: dict[str, np.ndarray]) -> Any:
    """A value as JSON stores it; frames and arrays are collected separately under the name of their place."""

    def inside(one: Any, key: object) -> Any:
        return _pack(one, f"{name}.{key}", frames, arrays)

    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"~": "float", "value": str(value)}  # JSON has neither NaN nor infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        arrays[name] = np.array(value, order="C")
        return {"~": "array", "name": name}
    if hasattr(value, "to_parquet"):
        name = file_name(name)  # the caller's keys may be part of it
        while name in frames:
            name += "_"
        frames[name] = value
        return {"~": "frame", "name": name, "rows": len(value)}
    if is_dataclass(value):
        inner = {field.name: inside(getattr(value, field.name), field.name) for field in fields(value)}
        return {"~": type(value).__name__, **inner}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != "~" for key in value):
            return {key: inside(one, key) for key, one in value.items()}
        return {"~": "map", "items": [[inside(key, "key"), inside(one, key)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        packed = [inside(one, index) for index, one in enumerate(value)]
        return packed if isinstance(value, list) else {"~": "tuple", "items": packed}
    return str(value)  # a path or a date of the provenance


def _unpack(value: Any, folder: Path, arrays: Mapping[str, np.ndarray], parts: Mapping[str, type]) -> Any:
    """The value from which :func:`_pack` made this one."""

    def inside(one: Any) -> Any:
        return _unpack(one, folder, arrays, parts)

    if isinstance(value, list):
        return [inside(one) for one in value]
    if not isinstance(value, dict):
        return value
    match value.get("~"):
        case None:
            return {key: inside(one) for key, one in value.items()}
        case "float":
            return float(value["value"])
        case "array":
            return arrays[value["name"]]
        case "frame":
            return _read_frame(folder / f"{file_name(value['name'])}.parquet", value.get("rows"))
        case "map":
            return {inside(key): inside(one) for key, one in value["items"]}
        case "tuple":
            return tuple(inside(one) for one in value["items"])
        case name:
            return parts[name](**{key: inside(one) for key, one in value.items() if key != "~"})


def _read_frame(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises its own classes, OSError and ValueError alike
        raise EmmechError("load the result", path, f"the file is missing or damaged ({type(error).__name__})")
    if rows is not None and len(frame) != rows:
        raise EmmechError("load the result", path, f"{len(frame)} {path.stem} are stored where {rows} were written")
    return frame
