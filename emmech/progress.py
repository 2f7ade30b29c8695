"""Progress bars over whatever takes more than a second, and one way to silence them."""

from __future__ import annotations

import os
from typing import Any


def bar(total: int | None, description: str, *, progress: bool = True) -> Any:
    """A tqdm bar (a widget in notebooks); silent when ``progress=False`` or ``EMMECH_PROGRESS=0``.

    Example:
        >>> with bar(3, "sampling", progress=False) as steps:
        ...     for _ in range(3):
        ...         steps.update() and None
    """
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, disable=_silent(progress), leave=False)


def forecast(seconds: float, description: str, *, progress: bool = True) -> None:
    """Print beforehand about how long something will take, where that is over a minute.

    Example:
        >>> forecast(59, "sampling"), forecast(7200, "sampling", progress=False)
        (None, None)
    """
    from tqdm.auto import tqdm

    if seconds > 60 and not _silent(progress):
        about = f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
        tqdm.write(f"{description}: about {about} from now")


def _silent(progress: bool) -> bool:
    return not progress or os.environ.get("EMMECH_PROGRESS") == "0"
