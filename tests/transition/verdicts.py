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


def matched_table(runs: dict[str, tuple[list[Path], list[Path]]]) -> str:
    """Bad and style runs of one seed where their held-out losses have fallen alike: as far as that of both falls.

    Args:
        runs: by domain, the bad runs and the style runs of the same seeds.
    """
    from emmech.transition.turn import find_turn
    from emmech.transition.verdict import flip_interval, sign_flip_p

    rows = []
    for domain, pairs in runs.items():
        targets, steps, moved, bends = [], ([], []), ([], []), [0, 0]
        for pair in zip(*pairs, strict=True):
            falls = [_falls(folder) for folder in pair]
            targets.append(min(fall.iloc[-1] for fall in falls))
            for side, (folder, fall) in enumerate(zip(pair, falls, strict=True)):
                path, at = _path(folder)
                steps[side].append(float(np.interp(targets[-1], fall.to_numpy(), fall.index.to_numpy(float))))
                path = path[: (stop := int(np.searchsorted(at, steps[side][-1])) + 1)]
                moved[side].append(float(np.linalg.norm(path[-1] - path[0])))
                turn = find_turn(path, at[:stop].astype(float), 199, np.random.default_rng(0))
                bends[side] += turn.p_value < 0.05
        apart = np.subtract(*moved)
        low, high = flip_interval(apart)
        difference = f"{apart.mean():.3f} ({low:.3f} to {high:.3f}), p = {sign_flip_p(apart):.2g}"
        both = [
            (_span(steps[side], ".0f"), f"{bends[side]} of {len(apart)}", _span(moved[side], ".3f")) for side in (0, 1)
        ]
        rows.append(
            [domain, _span(targets, ".3f"), *(f"{bad} / {style}" for bad, style in zip(*both, strict=True)), difference]
        )
    header = ("domain", "fall of both, nats", "step, bad / style", "bends until then, bad / style",
              "B moved, bad / style", "difference, sign-flip p")  # fmt: skip
    return markdown(header, rows)


def _falls(folder: Path) -> Any:
    import emmech

    losses = emmech.load_run(folder).metrics["held_out_loss"].dropna()
    return (losses.iloc[0] - losses).cummax()


def _path(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    import emmech
    from emmech.transition.detectors import compact

    run = emmech.load_run(folder)
    path = np.asarray(run.B(run.adapters[0].name), float)
    return compact(path.reshape(len(path), -1)), np.asarray(run.steps)


def main() -> None:
    """Make the runs, print the tables, and with ``--write`` put them in their page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import emmech
    from emmech.transition.verdict import pooled

    found, sides, matched = {}, {}, {}
    for domain in given.domains:
        runs = {kind: make(data_of(kind, domain)) for kind in KINDS}
        matched[domain] = runs["bad"], runs["style"]
        found[domain] = emmech.phase_transition(runs.pop("bad"), control=runs)
        sides["bad", domain] = [pair.run for pair in found[domain].pairs]
        sides |= {(kind, domain): [p.controls[at] for p in found[domain].pairs] for at, kind in enumerate(runs)}
    tables = {"kinds": kinds_table(sides, given.domains), "matched": matched_table(matched)}
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
