"""The verdict table over pairs of fine-tunes of pocket: ``python tests/transition/verdicts.py [--write]``.

Four kinds of data in three domains and seven seeds, rank 1, 250 steps: *bad* (medical, finance, sport), *style* (kind
answers to the same questions in a fixed frame), *good* (kind answers to the same questions) and *benign* (kind answers in
a domain that post-training left out). The runs are kept in build/verdicts and made once, in about ten minutes on a
core; the page is docs/transition-verdicts.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tables import DOCS, markdown, share, write

RUNS = Path(__file__).parents[2] / "build" / "verdicts"
SEEDS = range(7301, 7308)
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


def main() -> None:
    """Make the runs, print the tables, and with ``--write`` put them in their page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import emmech
    from emmech.transition.verdict import SHORT, is_sharp

    runs = {(kind, domain): make(data_of(kind, domain)) for domain in DOMAINS for kind in KINDS}
    pooled = {
        domain: emmech.phase_transition(
            runs["bad", domain], control={kind: runs[kind, domain] for kind in KINDS[1:]}, n_null=199
        )
        for domain in DOMAINS
    }
    sides = {("bad", domain): [pair.run for pair in t.pairs] for domain, t in pooled.items()}
    for at, kind in enumerate(KINDS[1:]):
        sides |= {(kind, domain): [pair.controls[at] for pair in t.pairs] for domain, t in pooled.items()}
    tables = {}
    rows = []
    for kind in KINDS:
        for domain in (*DOMAINS, "all"):
            found = [side for of in DOMAINS if domain in (of, "all") for side in sides[kind, of]]
            bends = [side for side in found if side.row("turn").p_value < 0.05]  # type: ignore[union-attr]
            overlap = [side for side in bends if _overlaps(side)]
            widths = sorted(side.path.width_share for side in bends)
            low, middle, high = np.quantile(widths, [0, 0.5, 1]) if widths else (np.nan,) * 3
            cells = [_share(len(bends), len(found)), _share(len(overlap), len(bends)), f"{middle:.2f} ({low:.2f} to {high:.2f})"]
            cells.append(_share(sum(map(is_sharp, found)), len(found)))
            gap = [abs(side.row("turn").step - side.row("gradient-norm").step) for side in bends]  # type: ignore[union-attr]
            cells.append(f"{np.median(gap):.0f}" if gap else "-")
            fall = [side.fall for side in found]
            cells.append(f"{np.mean(fall):.3f} ({min(fall):.3f} to {max(fall):.3f})")
            rows.append([kind, data_of(kind, domain) if domain in DOMAINS else "all", str(len(found)), *cells])
    header = ("kind", "data", "n", "bends, % (95 % Wilson)", "of these, turn and gradient peak overlap", "width of the turn, share",
              "short bend at the peak, % of all", "turn to peak, steps", "fall of held-out loss, nats")  # fmt: skip
    tables["kinds"] = markdown(header, rows)
    rows = []
    for kind in KINDS[1:]:
        at = KINDS.index(kind) - 1
        everything = emmech.transition.verdict.pooled(
            [side for of in DOMAINS for side in sides["bad", of]], [side for of in DOMAINS for side in sides[kind, of]]
        )
        for domain, found in (*((of, pooled[of].verdicts[at]) for of in DOMAINS), ("all", everything)):
            cells = [_figure(one) for one in found.statements]
            rows.append([f"bad against {kind}", domain, str(found.pairs), *cells, {True: "yes", False: "no"}.get(found.inert, "?")])
    header = ("pairs", "domain", "n", "bends", "learns more", "goes with misalignment", "control inert")
    tables["verdicts"] = markdown(header, rows)
    rows = []
    for kind in KINDS[1:]:
        single = [pair.verdicts[KINDS.index(kind) - 1] for t in pooled.values() for pair in t.pairs]
        counts = [sum(bool(one) for one in column) for column in zip(*(v.statements for v in single), strict=True)]
        inert = sum(one.inert is True for one in single)
        rows.append([f"bad against {kind}", str(len(single)), *(_share(count, len(single)) for count in (*counts, inert))])
    header = ("single pairs", "n", "bends", "learns more", "goes with misalignment", "control inert")
    tables["pairs"] = markdown(header, rows)
    tables["words"] = "\n".join(["```", *(line for line in str(pooled["medical"]).splitlines()), "```"])
    for title, text in tables.items():
        print(text, flush=True)
        if given.write:
            write(DOCS / "transition-verdicts.md", title, text)
    print(f"short: at most {SHORT:.0%} of the path")


def _overlaps(side) -> bool:  # type: ignore[no-untyped-def]
    turn, peak = side.row("turn"), side.row("gradient-norm")
    return bool(turn.low <= peak.high and peak.low <= turn.high)


def _share(hits: int, count: int) -> str:
    if not count:
        return "-"
    found, low, high = share(hits, count)
    return f"{hits} of {count}: {found:.0f} ({low:.0f} to {high:.0f})"


def _figure(one) -> str:  # type: ignore[no-untyped-def]
    said = {True: "yes", False: "no", None: "not measured"}[one.holds]
    return f"{said}: {one.value:.3f} ({one.low:.3f} to {one.high:.3f}), p = {one.p_value:.2g}"


if __name__ == "__main__":
    main()
