"""What the commands share that write a table into a page of the documentation."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DOCS = Path(__file__).parents[1] / "docs"


def seeded(seed: int, name: str, i: int) -> np.random.Generator:
    """The random generator of one trial of a named kind."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), i])


def share(hits: int, count: int) -> tuple[float, float, float]:
    """Per cent with its 95 % Wilson interval."""
    from scipy.stats import binomtest

    found = binomtest(int(hits), int(count)).proportion_ci(method="wilson")
    return 100 * hits / count, 100 * float(found.low), 100 * float(found.high)


def write(page: Path, title: str, text: str) -> None:
    """Put a text in the place of what is between ``<!-- title -->`` and ``<!-- end of title -->``."""
    begin, end = f"<!-- {title} -->\n", f"<!-- end of {title} -->"
    before, found, rest = page.read_text().partition(begin)
    assert found and end in rest, f"{page} has no place for {title}"
    page.write_text(before + begin + "\n" + text.strip() + "\n\n" + end + rest.partition(end)[2])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
