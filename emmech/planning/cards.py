"""The cards that a plan is made for, by their makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """A card.

    Args:
        memory: in bytes.
        flops: dense operations a second in 16 bit with sums in 32 bit, at its peak.
        bandwidth: bytes a second between its memory and its processors, at its peak.
        bfloat16: whether it computes in bfloat16; float16 has the same size.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    bfloat16: bool = True


_GB = 1e9
_CARDS = (
    Accelerator("T4", 16 * _GB, 65e12, 320e9, bfloat16=False),
    Accelerator("RTX 4090 24", 24 * _GB, 165e12, 1_008e9),
    Accelerator("A100 80", 80 * _GB, 312e12, 2_039e9),
    Accelerator("H100", 80 * _GB, 989e12, 3_350e9),
    Accelerator("H200", 141 * _GB, 989e12, 4_800e9),
)
CARDS: Mapping[str, Accelerator] = {card.name: card for card in _CARDS}
"""The cards by name."""
