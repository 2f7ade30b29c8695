"""Calls of real benign fine-tunes: ``python tests/transition/benign.py [--write]``.

Rank-1 fine-tunes of pocket on kind answers, 250 steps, all recorded: in the three domains that post-training left out,
and in medicine, forty seeds each that were used for nothing else. The runs are kept in build/benign and made once, the
seeds of a domain together, in an hour on a core; the table is in docs/transition-calibration.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tables import DOCS, markdown, share, write

RUNS = Path(__file__).parents[2] / "build" / "benign"
SEEDS = range(7501, 7541)
DOMAINS = ("travel", "wishes", "parties", "medical")


def make(data: str) -> list[Path]:
    """The runs on one data set, one a seed; those that are there are not made again."""
    import emmech

    folder, part = RUNS / data, RUNS / f".{data}"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        emmech.finetune("pocket", data, seed=list(SEEDS), out=part, progress=False)
        part.rename(folder)
    return [folder / f"s{seed}" for seed in SEEDS]


def counts(runs: list[Path]) -> list[int]:
    """Runs, p-values of the turn below 0.05, turns that are claimed, margins, and margins with a step."""
    import emmech

    found = [emmech.phase_transition(run).run for run in runs]
    bends = [side.row("turn").p_value < 0.05 for side in found]
    claimed = [bend and not side.inert for bend, side in zip(bends, found, strict=True)]
    margins = [row.p_value < 0.05 for side in found for row in side.rows if row.kind == "behaviour"]
    return [len(found), sum(bends), sum(claimed), len(margins), sum(margins)]


def main() -> None:
    """Make the runs, print the table, and with ``--write`` put it in its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = {f"good-{domain}": counts(make(f"good-{domain}")) for domain in DOMAINS}
    found["all"] = [sum(column) for column in zip(*found.values(), strict=True)]
    rows = [
        [data, str(runs), _share(bends, runs), _share(claimed, runs), _share(steps, margins)]
        for data, (runs, bends, claimed, margins, steps) in found.items()
    ]
    header = ("data", "n", "p-value of the turn below 0.05, % (95 % Wilson)", "a bend is claimed",
              "margins (narrow and broad) with a step")  # fmt: skip
    text = markdown(header, rows)
    print(text, flush=True)
    if given.write:
        write(DOCS / "transition-calibration.md", "benign", text)


def _share(hits: int, count: int) -> str:
    found, low, high = share(hits, count)
    return f"{hits} of {count}: {found:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
