"""A memory budget, turned into how many tokens go through the model at once."""

from __future__ import annotations

import re
from typing import Any

import torch

from emmech.errors import EmmechError

__all__ = ["budget_bytes", "readable"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
DEFAULT = 2 * 2**30


def budget_bytes(memory: Any, device: torch.device) -> int:
    """The budget in bytes: a number, ``"2GB"``, ``"512MiB"``; None is 2 GiB, or 60 % of what a GPU has free.

    Raises:
        EmmechError: not an amount of memory.

    Example:
        >>> budget_bytes("512MiB", torch.device("cpu"))
        536870912
    """
    if memory is None:
        if device.type == "cuda":
            return int(0.6 * torch.cuda.mem_get_info(device)[0])
        return DEFAULT
    if isinstance(memory, int | float) and memory > 0:
        return int(memory)
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]I?)?B?\s*", str(memory).upper())
    if not match or not float(match[1]) > 0:
        raise EmmechError("keep to a memory budget", f"memory={memory!r}", "it is not an amount", 'memory="2GB"')
    return int(float(match[1]) * _UNITS[match[2] or ""])


def readable(size: float) -> str:
    """``"1.5 GiB"``, for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
