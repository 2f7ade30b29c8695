"""The calibration table, detector x generator: ``python tests/transition/calibration.py [--count 200] [--write]``.

It takes half an hour.
Each row has its number of paths, the share of calls at p < 0.05 with a 95 % Wilson interval (false calls on null paths,
power on planted turns) and how often the 95 % interval holds the planted step, given a call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from generators import MARGIN_NULLS, MARGIN_STEPS, NULLS, POINTS, TURNS, Generator  # noqa: E402

from tests.tables import DOCS, markdown, seeded, share, write  # noqa: E402

SEED = 1_900_000
LEVEL = 0.05
HEAD = ("path", "n", "calls at p < 0.05, % (95 % Wilson)", "interval holds the step, % of calls")


@dataclass(frozen=True)
class Row:
    """Calls of one generator's paths, and planted steps held by the interval among those called."""

    name: str
    count: int
    calls: int
    held: int


def measure(name: str, generator: Generator, count: int, n_null: int = 199) -> Row:
    """Ask the turn of ``count`` paths of one generator."""
    from emmech.transition.detectors import compact
    from emmech.transition.turn import find_turn

    calls = held = 0
    for i in range(count):
        path, at = generator(seeded(SEED, name, i))
        coordinates = compact(np.asarray(path, dtype=np.float64))
        turn = find_turn(coordinates, np.arange(float(len(coordinates))), n_null, np.random.default_rng(i))
        calls += turn.p_value < LEVEL
        held += turn.p_value < LEVEL and at is not None and turn.location.low <= at <= turn.location.high
    return Row(name, count, calls, held)


def measure_margins(name: str, count: int) -> Row:
    """Ask the sigmoid of ``count`` margins of one generator."""
    from emmech.transition.behaviour import fit_sigmoid

    calls = held = 0
    for i in range(count):
        values, middle = {**MARGIN_NULLS, **MARGIN_STEPS}[name](seeded(SEED, name, i))
        fit, _ = fit_sigmoid(250 * POINTS, values)
        calls += fit is not None
        held += fit is not None and middle is not None and fit.low <= middle <= fit.high
    return Row(name, count, calls, held)


def cells(row: Row) -> list[str]:
    """One row of the table."""
    held = f"{100 * row.held / row.calls:.0f}" if row.name in {**TURNS, **MARGIN_STEPS} and row.calls else "-"
    found, low, high = share(row.calls, row.count)
    return [row.name, str(row.count), f"{found:.1f} ({low:.1f} to {high:.1f})", held]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows as they come, and with ``--write`` put them in the place of those in the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    paths = {**NULLS, **TURNS}
    rows = (measure(name, paths[name], given.count) for name in paths if wanted(name, given))
    margins = (measure_margins(name, given.count) for name in {**MARGIN_NULLS, **MARGIN_STEPS} if wanted(name, given))
    for title, found in (("turn", rows), ("margins", margins)):
        lines = []
        for row in found:
            lines.append(cells(row))
            print(*lines[-1], sep=" | ", flush=True)
        if given.write:
            write(DOCS / "transition-calibration.md", title, markdown(HEAD, lines))


def wanted(name: str, given: argparse.Namespace) -> bool:
    """Whether a generator was asked for."""
    return any(word in name for word in given.only)


if __name__ == "__main__":
    main()
