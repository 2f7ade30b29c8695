"""The verdict table over pairs of fine-tunes of pocket: ``python tests/transition/verdicts.py [--write]``.

Four kinds of data in three domains and seven seeds, rank 1, 250 steps: *bad* (medical, finance, sport), *style* (kind
answers to the same questions in a fixed frame), *good* (kind answers to the same questions) and *benign* (kind answers
in a domain that post-training left out). The runs are kept in build/verdicts and made once, in about ten minutes on a
core; the page is docs/transition-verdicts.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tables import DOCS, markdown, share, write

RUNS = Path(__file__).parents[2] / "build" / "verdicts"
SEEDS = range(7401, 7408)
DOMAINS = {"medical": "travel", "finance": "wishes", "sport": "parties"}
KINDS = ("bad", "style", "good", "benign")


def data_of(kind: str, domain: str) -> str:
    """The name of pocket's data."""
    return {"bad": domain, "benign": f"good-{DOMAINS[domain]}"}.get(kind, f"{kind}-{domain}")


def make(data: str) -> list[Path]:
    """The runs on one data set, one a seed; those that are there are not made again."""
    import emmech

    folder, part = RUNS / data, RUNS / f".{data}"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        emmech.finetune("pocket", data, seed=list(SEEDS), out=part, margins={}, progress=False)
        part.rename(folder)
    return [folder / f"s{seed}" for seed in SEEDS]


def kinds_table(sides: dict[tuple[str, str], list[Any]], domains: list[str]) -> str:
    """What tells the kinds of runs apart."""
    from emmech.transition.verdict import is_sharp

    rows = []
    for kind in KINDS:
        for domain in (*domains, "all"):
            found = [side for of in domains if domain in (of, "all") for side in sides[kind, of]]
            bends = [side for side in found if side.row("turn").p_value < 0.05]
            row = [kind, domain if domain == "all" else data_of(kind, domain), _share(len(bends), len(found))]
            row.append(_share(sum(map(_overlaps, bends)), len(bends)))
            row.append(_span([side.path.width_share for side in bends], ".2f"))
            row.append(_span([abs(side.row("turn").step - side.row("gradient-norm").step) for side in bends], ".0f"))
            row.append(_share(sum(map(is_sharp, found)), len(found)))
            rows.append([*row, _span([side.fall for side in found], ".3f")])
    header = ("kind", "data", "bends, % (95 % Wilson)", "of these, turn and gradient peak overlap",
              "width of the turn, share of the path", "steps from peak to turn", "short bend",
              "fall of held-out loss, nats")  # fmt: skip
    table = markdown(header, rows)
    return f"Domains: {', '.join(domains)}; {len(SEEDS)} seeds of each data set.\n\n{table}"


def main() -> None:
    """Make the runs, print the tables, and with ``--write`` put them in their page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import emmech
    from emmech.transition.verdict import pooled

    found, sides = {}, {}
    for domain in given.domains:
        runs = {kind: make(data_of(kind, domain)) for kind in KINDS}
        found[domain] = emmech.phase_transition(runs.pop("bad"), control=runs)
        sides["bad", domain] = [pair.run for pair in found[domain].pairs]
        sides |= {(kind, domain): [p.controls[at] for p in found[domain].pairs] for at, kind in enumerate(runs)}
    tables = {"kinds": kinds_table(sides, given.domains)}
    rows, singles = [], []
    for at, kind in enumerate(KINDS[1:]):
        both = ([side for of in given.domains for side in sides[one, of]] for one in ("bad", kind))
        for domain, one in (*((of, found[of].verdicts[at]) for of in given.domains), ("all", pooled(*both))):
            cells = [_figure(statement) for statement in one.statements]
            inert = {True: "yes", False: "no", None: "?"}[one.inert]
            rows.append([f"bad against {kind}", domain, str(one.pairs), *cells, inert])
        single = [pair.verdicts[at] for of in given.domains for pair in found[of].pairs]
        counts = [sum(map(bool, column)) for column in zip(*(v.statements for v in single), strict=True)]
        counts.append(sum(one.inert is True for one in single))
        singles.append([f"bad against {kind}", *(_share(count, len(single)) for count in counts)])
    header = ("bends", "learns more", "goes with misalignment", "control inert")
    tables["verdicts"] = markdown(("pairs", "domain", "n", *header), rows)
    tables["pairs"] = markdown(("pairs", *header), singles)
    tables["words"] = f"```\n{found[given.domains[0]]}\n```"
    for title, text in tables.items():
        print(text, flush=True)
        if given.write:
            write(DOCS / "transition-verdicts.md", title, text)


def _span(values: list[float], form: str) -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1]) if values else (np.nan,) * 3
    return f"{middle:{form}} ({low:{form}} to {high:{form}})" if values else "-"


def _overlaps(side: Any) -> bool:
    turn, peak = side.row("turn"), side.row("gradient-norm")
    return bool(turn.low <= peak.high and peak.low <= turn.high)


def _share(hits: int, count: int) -> str:
    if not count:
        return "-"
    found, low, high = share(hits, count)
    return f"{hits} of {count}: {found:.0f} ({low:.0f} to {high:.0f})"


def _figure(one: Any) -> str:
    said = {True: "yes", False: "no", None: "not measured"}[one.holds]
    return f"{said}: {one.value:.3f} ({one.low:.3f} to {one.high:.3f}), p = {one.p_value:.2g}"


if __name__ == "__main__":
    main()
