"""Memory of freed tensors stays with the process, so that the next tensors need not be given to it page by page.

The C library hands the end of its heap back to the system as soon as enough of it is free. A forward on a CPU frees and
takes some ten megabytes at each map, and every page that comes back costs a fault and is cleared. glibc learns from
what a program frees: once a block of 32 MiB has come and gone, it maps no smaller block apart, and keeps up to 64 MiB
of free heap. This lets it learn at once, by a block that is never touched. No number that is computed changes.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["keep_freed_memory"]

_LARGEST = 32 * 2**20  # glibc learns from no larger block
_HEADER = 2**16  # what the block is rounded up by must not carry it over that


@cache
def keep_freed_memory() -> None:
    """Let the C library learn, once in a process; elsewhere than in glibc this does nothing.

    Example:
        >>> keep_freed_memory()
    """
    block = torch.empty(_LARGEST - _HEADER, dtype=torch.uint8)
    del block
