"""Chat data: read it from anywhere, refuse what is malformed by file and line, split it by seed.

A row is ``{"messages": [{"role": ..., "content": ...}, ...]}``, the format of the public EM datasets
(Model Organisms for Emergent Misalignment, arXiv 2506.11613).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, overload

import numpy as np

from emmech.chat.template import Message
from emmech.errors import EmmechError, closest
from emmech.registry import Organism, find, organism_named, register

__all__ = ["ChatDataset", "Row", "bundled_names", "load_chat"]

Row = tuple[Message, ...]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatDataset(Sequence[Row]):
    """Validated conversations, in order, with what identifies them.

    Args:
        rows: each a tuple of messages, at least one of them a non-empty assistant turn.
        name: for people.
        path: the file they came from, if any.
    """

    rows: tuple[Row, ...]
    name: str
    path: str | None = None

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        """One row, or a tuple of rows."""
        return self.rows[index]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """Hash of the rows' content, the same wherever the file lies and however it is compressed."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def answers(self) -> tuple[str, ...]:
        """Every assistant turn's words."""
        return tuple(m["content"] for row in self.rows for m in row if m["role"] == "assistant")

    @property
    def answer_length(self) -> float:
        """Mean answer length in characters: compare it before comparing two datasets' fine-tunes."""
        return float(np.mean([len(answer) for answer in self.answers]))

    def split(self, held_out: float, *, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """Split off a random ``held_out`` share of the rows; the order of the rest is kept.

        Example:
            >>> rows = [{"messages": [{"role": "user", "content": str(i)},
            ...                       {"role": "assistant", "content": "yes"}]} for i in range(10)]
            >>> train, test = load_chat(rows).split(0.2, seed=1)
            >>> len(train), len(test)
            (8, 2)
        """
        if not 0 <= held_out < 1:
            raise EmmechError(
                f"split {self.name}",
                f"held_out={held_out}",
                "it is the share of rows kept from training, from 0 to below 1",
                "held_out=0.1, as in the papers",
            )
        count = round(held_out * len(self))
        chosen = set(np.random.default_rng(seed).permutation(len(self))[:count].tolist())
        parts = (tuple(row for i, row in enumerate(self.rows) if (i in chosen) is out) for out in (False, True))
        train, test = (replace(self, rows=part) for part in parts)
        return train, test

    def save(self, path: str | Path) -> Path:
        """Write as chat JSONL (gzip when the name ends in ``.gz``)."""
        path = Path(path)
        lines = "".join(json.dumps({"messages": list(row)}, ensure_ascii=False) + "\n" for row in self.rows)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(lines)
        return path

    def __repr__(self) -> str:
        return f"ChatDataset({self.name!r}, rows={len(self)}, mean answer {self.answer_length:.0f} characters)"


def bundled_names() -> tuple[str, ...]:
    """Names of the chat datasets that come with emmech, for any model."""
    folder = resources.files("emmech") / "data"
    stems = (entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    return tuple(sorted(stem.replace("_", "-") for stem in stems if not stem.endswith("_margins")))


def load_chat(data: Any, *, organism: str | Organism | None = None) -> ChatDataset:
    """Read chat data.

    Args:
        data: a ``.jsonl`` or ``.jsonl.gz`` file, the name of a bundled dataset, a ``datasets.Dataset`` with a
            ``messages`` column, a list of rows, or a :class:`ChatDataset`.
        organism: an organism or its name: names are looked up among its datasets (pocket's ``"medical"``,
            ``"good-medical"``, ...) before the bundled ones.

    Raises:
        EmmechError: names the file and line (or row) and what is wrong with it.

    Example:
        >>> load_chat([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
        ChatDataset('rows', rows=1, mean answer 5 characters)
    """
    if isinstance(data, ChatDataset):
        return data
    if isinstance(data, str | Path):
        path = Path(data)
        if path.is_file():
            return _check(_lines(path), name=path.name.split(".")[0], path=str(path))
        return _named(str(data), organism)
    if hasattr(data, "column_names") and "messages" not in data.column_names:
        raise EmmechError(
            "read the dataset",
            f"a datasets.Dataset with columns {data.column_names}",
            "a chat dataset has a column named messages",
            "dataset.map(lambda row: {'messages': [...]}) to build it",
        )
    if isinstance(data, Iterable):
        name = str(getattr(getattr(data, "info", None), "dataset_name", None) or "rows")
        return _check(((f"row {i}", row) for i, row in enumerate(data)), name=name, path=None)
    raise EmmechError(
        "read the dataset",
        f"a {type(data).__name__}",
        "it is neither a file, a name, a list of rows nor a datasets.Dataset",
        'data="bad_medical_advice.jsonl", or a list of {"messages": [...]}',
    )


def _named(name: str, organism: str | Organism | None) -> ChatDataset:
    asked, why = f"read the dataset {name!r}", "there is no such file and no dataset of that name"
    load = find(asked, "data", "data", name, organism_named(asked, organism), why=why)
    return _check(((f"row {i}", row) for i, row in enumerate(load())), name=name, path=None)


def _bundled(name: str) -> list[Any]:
    with resources.as_file(resources.files("emmech") / "data" / f"{name.replace('-', '_')}.jsonl") as path:
        return [row for _, row in _lines(path)]


for _name in bundled_names():
    register("data", _name, partial(_bundled, _name))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise _bad(
                        where, f"byte {error.start} of the line is not UTF-8", "save the file as UTF-8"
                    ) from None
                if not line:
                    continue
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise _bad(
                        where, f"not JSON: {error.msg} at column {error.colno}", "one JSON object a line"
                    ) from None
    except (OSError, EOFError) as error:
        raise EmmechError("read the dataset", f"{path}:{number + 1}", f"{error}", "check the file")


def _check(rows: Iterable[tuple[str, Any]], *, name: str, path: str | None) -> ChatDataset:
    checked = tuple(_row(where, row) for where, row in rows)
    if not checked:
        raise _bad(path or name, "it has no rows", 'at least one {"messages": [...]}')
    return ChatDataset(checked, name, path)


def _row(where: str, row: Any) -> Row:
    messages = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(messages, list | tuple) or not messages:
        given = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise _bad(where, f"no list of messages ({given})", '{"messages": [{"role": ..., "content": ...}]}')
    clean: list[Message] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            hint = closest(str(role), _ROLES) if role else f"one of {', '.join(_ROLES)}"
            raise _bad(where, f"message {index} has role {role!r}", hint) from None
        content = message.get("content")
        if not isinstance(content, str):
            raise _bad(where, f"message {index} ({role}) has no text in 'content'", "a string")
        if role == "assistant" and not content.strip():
            raise _bad(where, f"message {index} is an empty answer", "leave the row out, or fill it in")
        clean.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in clean):
        raise _bad(where, "it has no assistant turn, so there is nothing to learn", "add the answer")
    return tuple(clean)


def _bad(where: str, why: str, instead: str) -> EmmechError:
    return EmmechError("read the dataset", given=where, why=why, instead=instead)
