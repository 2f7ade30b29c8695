"""The calibration table, detector x generator: ``python tests/transition/calibration.py [--count 200] [--write]``.

Each row has its number of paths, the share of calls at p < 0.05 with a 95 % Wilson interval (false calls on null paths,
power on planted turns) and how often the 95 % interval holds the planted step, given a call.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from generators import NULLS, TURNS, Generator

TABLE = Path(__file__).parents[2] / "docs" / "transition-calibration.md"
SEED = 1_900_000
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """Calls of one generator's paths, and planted steps held by the interval among those called."""

    name: str
    count: int
    calls: int
    held: int

    def wilson(self) -> tuple[float, float]:
        """95 % interval of the share of calls."""
        from scipy.stats import binomtest

        found = binomtest(self.calls, self.count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def decide(path: np.ndarray, seed: int, n_null: int) -> tuple[bool, int, int]:
    """Whether a path ``[steps, d]`` is called, and the interval of its turn."""
    from emmech.transition.detectors import compact
    from emmech.transition.turn import find_turn

    coordinates = compact(np.asarray(path, dtype=np.float64))
    turn = find_turn(coordinates, np.arange(float(len(coordinates))), n_null, np.random.default_rng(seed))
    return turn.p_value < LEVEL, turn.location.low, turn.location.high


def measure(name: str, generator: Generator, count: int, n_null: int) -> Row:
    """Run one generator's paths."""
    calls = held = 0
    for i in range(count):
        path, at = generator(np.random.default_rng([SEED, zlib.crc32(name.encode()), i]))
        called, low, high = decide(path, i, n_null)
        calls += called
        held += called and at is not None and low <= at <= high
    return Row(name, count, calls, held)


def table(rows: Iterable[Row]) -> str:
    """Markdown table of rows."""
    lines = ["| path | n | calls at p < 0.05, % (95 % Wilson) | interval holds the step, % of calls |", "|---|---|---|---|"]
    for row in rows:
        low, high = row.wilson()
        held = f"{100 * row.held / row.calls:.0f}" if row.name in TURNS and row.calls else "-"
        share = f"{100 * row.calls / row.count:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"| {row.name} | {row.count} | {share} | {held} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--n-null", type=int, default=199)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args(arguments)
    for name, generator in {**NULLS, **TURNS}.items():
        if not given.only or any(word in name for word in given.only):
            row = measure(name, generator, given.count, given.n_null)
            print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
