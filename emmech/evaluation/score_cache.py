"""Scores that were already paid for, keyed on content: the judge, and the very text it was shown."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError

__all__ = ["ScoreCache", "content_key"]


def content_key(judge: str, prompt: str) -> str:
    """A sha256 of the judge and the text it was shown.

    Example:
        >>> content_key("gpt-4o", "a") != content_key("gpt-4o", "b")
        True
    """
    return hashlib.sha256(f"{judge}\x00{prompt}".encode()).hexdigest()


class ScoreCache:
    """Scores on disk (SQLite, so that several processes may share it), by :func:`content_key`.

    Args:
        path: by default ``scores.sqlite`` in emmech's cache folder.

    Example:
        >>> import tempfile
        >>> cache = ScoreCache(Path(tempfile.mkdtemp()) / "scores.sqlite")
        >>> cache.put({"key": {"value": 12.5, "word": ""}}); cache.get(["key", "other"])
        {'key': {'value': 12.5, 'word': ''}}
    """

    def __init__(self, path: str | Path | None = None) -> None:
        from emmech.chat.bundled import cache_folder

        self.path = Path(path) if path is not None else cache_folder() / "scores.sqlite"

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=30)
        connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT NOT NULL)")
        return connection

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The known ones among the keys.

        Raises:
            EmmechError: the file cannot be read; better said before anything is paid for.
        """
        wanted: Sequence[str] = list(dict.fromkeys(keys))
        found: dict[str, dict[str, Any]] = {}
        try:
            with closing(self._open()) as connection:
                for start in range(0, len(wanted), 500):  # SQLite bounds the variables of a statement
                    part = wanted[start : start + 500]
                    query = f"SELECT key, score FROM scores WHERE key IN ({','.join('?' * len(part))})"
                    found |= {key: json.loads(score) for key, score in connection.execute(query, part)}
        except (sqlite3.Error, OSError, ValueError) as error:
            raise EmmechError(
                "read the score cache",
                self.path,
                f"{type(error).__name__}: {error}",
                "delete the file, or LogprobJudge(..., cache=None), or cache=ScoreCache(another path)",
            )
        return found

    def put(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep scores; where that fails there is a warning, since the scores themselves are in hand."""
        lines = [(key, json.dumps(dict(score))) for key, score in scores.items()]
        try:
            with closing(self._open()) as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", lines)
        except (sqlite3.Error, OSError) as error:
            warnings.warn(f"{len(lines)} scores are not cached in {self.path}: {error}", stacklevel=2)
