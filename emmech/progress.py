"""Progress bars over anything that takes more than a second, and one way to silence them."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["bar"]


def bar(total: int | None, description: str, *, progress: bool = True) -> Any:
    """A tqdm bar (a widget in notebooks); silent when ``progress=False`` or ``EMMECH_PROGRESS=0``.

    Example:
        >>> with bar(3, "sampling", progress=False) as steps:
        ...     for _ in range(3):
        ...         steps.update() and None
    """
    from tqdm.auto import tqdm

    silent = not progress or os.environ.get("EMMECH_PROGRESS") == "0"
    return tqdm(total=total, desc=description, disable=silent, leave=False)
