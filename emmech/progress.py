"""What a long call shows: one bar with the time left, an estimate before a long wait, and one way to silence both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from html import escape
from typing import Any

_DELAY = 0.5  # seconds before a bar is shown at all
_FEW = 2.0  # seconds of silence after which a wait is explained
_LONG = 60.0  # seconds from which an estimate is said
_SETTLED = 5.0  # seconds of work from which the remaining time can be told


def bar(total: int | None, description: str, *, progress: bool = True, estimate: bool = True) -> Any:
    """A tqdm bar over what takes more than half a second; silent when ``progress=False`` or ``EMMECH_PROGRESS=0``.

    In a notebook it is a line of the cell's output, which is empty once the work is done.

    Args:
        estimate: whether it says how long the work will take, once that is known, where it is over a minute.

    Example:
        >>> with bar(3, "sampling", progress=False) as steps:
        ...     for _ in range(3):
        ...         steps.update() and None
    """
    made = _kinds()[_in_notebook()]
    shown = made(total=total, desc=description, disable=_silent(progress), leave=False, delay=_DELAY)
    shown.told = not estimate
    return shown


def forecast(seconds: float, description: str, *, progress: bool = True) -> None:
    """Print beforehand about how long something will take, where that is over a minute.

    Example:
        >>> forecast(59, "sampling"), forecast(7200, "sampling", progress=False)
        (None, None)
    """
    from tqdm import tqdm

    if seconds > _LONG and not _silent(progress):
        about = f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
        tqdm.write(f"{description}: about {about} from now")


@contextmanager
def said_if_long(description: str, *, seconds: float = _FEW) -> Iterator[None]:
    """Print what is waited for, once, as soon as that takes more than a few seconds.

    For what cannot count its steps, so that :func:`bar` would have nothing to show.

    Example:
        >>> with said_if_long("loading the model"):
        ...     pass
    """
    import threading

    from tqdm import tqdm

    if _silent(True):
        yield
        return
    timer = threading.Timer(seconds, tqdm.write, [f"{description} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep loading bars and notices of deprecation of transformers and PEFT out of what a call shows.

    Example:
        >>> with quiet():
        ...     warnings.warn("soon gone", FutureWarning)
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _silent(progress: bool) -> bool:
    return not progress or os.environ.get("EMMECH_PROGRESS") == "0"


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


@cache
def _kinds() -> tuple[type, type]:
    """The bar of a terminal, and that of a notebook."""
    import io

    from tqdm.std import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        told = True

        def display(self, msg: str | None = None, pos: int | None = None) -> Any:
            self._tell()
            return super().display(msg, pos)

        def _tell(self) -> None:
            """Say once how long it will take, as soon as that can be told."""
            now = self.format_dict
            if self.told or not self.n or not self.total or now["elapsed"] < _SETTLED:
                return
            self.told = True
            forecast((self.total - self.n) * now["elapsed"] / (self.n - self.initial or 1), str(self.desc).strip(": "))

    class Cell(Bar):
        monitor_interval = 0  # a thread that refreshes idle bars would write into another cell
        _handle: Any = None

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, file=io.StringIO())

        def display(self, msg: str | None = None, pos: int | None = None) -> Any:
            from IPython.display import display

            if msg == "" and self._handle is None:
                return
            self._tell()
            line = "" if msg == "" else self._line()
            shown = {"text/html": f"<div><progress {self._share()}></progress> {escape(line)}</div>" if line else ""}
            shown["text/plain"] = line
            if self._handle is None:
                self._handle = display(shown, raw=True, display_id=True)
            else:
                self._handle.update(shown, raw=True)

        def _line(self) -> str:
            now = self.format_dict
            rate = now["rate"] or (self.n - self.initial) / max(now["elapsed"], 1e-9)
            parts = [str(self.n) if not self.total else f"{self.n} of {self.total}"]
            if self.total and rate:
                parts.append(f"{self.format_interval((self.total - self.n) / rate)} left")
            parts += [now["postfix"]] if now["postfix"] else []
            return f"{str(self.desc).strip(': ')}: {', '.join(parts)}"

        def _share(self) -> str:
            return f'value="{self.n}" max="{self.total}"' if self.total else ""

    return Bar, Cell
