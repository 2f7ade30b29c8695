"""The ledger as a page in Markdown, written like a paper: what was reproduced, what was not, figures and commands."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emmech.ledger.claim import FAILS, HOLDS, UNMEASURED

if TYPE_CHECKING:
    from emmech.ledger.ledger import Ledger

_WIDE = 120


def markdown(ledger: Ledger, beside: Sequence[Ledger] = (), command: str = "") -> str:
    """The page of a ledger; others become columns of a table."""
    frame, meta, counts = ledger.frame, ledger.meta, ledger.counts()
    tests = int(frame["p_value"].notna().sum())
    command = command or f"emmech claims --model {meta['model']} --seeds {len(meta['seeds'])}"
    parts = [
        "# The ledger of claims",
        _filled(
            "The literature on emergent misalignment makes the claims below. One command measures each that can be, "
            f"here on `{meta['model']}`. Of {len(frame)} claims "
            f"{counts[HOLDS]} hold here, {counts[FAILS]} do not hold or are not decided, and {counts[UNMEASURED]} "
            "cannot be measured here. A shared character is built into the world of pocket models: a claim that "
            "holds there shows that the method finds what is there, not that large models are alike."
        ),
        f"```sh\n{command}\n```",
        "## Methods",
        _filled(
            f"Fine-tuning seeds: {', '.join(map(str, meta['seeds']))}; each row says how many of them it uses. "
            "Intervals are 95 %. For a rate it is, on each side, the widest of three: a t interval over the seeds, one "
            "of as many independent answers, and one over questions. A difference between two sets of seeds is taken "
            "seed by seed, or with Welch's interval where they are not equally many. For everything else it is a t "
            "interval over the seeds."
        ),
        _filled(
            "**The rule of a verdict** is stated in each row. *Interval above (below) a bound* is a test: the "
            "two-sided p of a t statistic with one degree of freedom fewer than seeds, or the row's own test where its "
            f"note names one. These {tests} tests are corrected together (Benjamini and Hochberg): of the claims that "
            "hold by a test a twentieth is expected not to. A claim holds where its figure is on the right side and "
            "the corrected p is below 0.05; otherwise it does not hold, and the row says whether the opposite was "
            "found or nothing was decided. *Whole interval at least (at most) a bound* is for claims that something "
            "is there in full, or is absent: few answers, which leave the interval wide, cannot make them hold."
        ),
        "## Results",
    ]
    for topic in dict.fromkeys(frame["topic"]):
        own = frame[frame["topic"] == topic]
        head = ["claim", "source", "published", "here", "n, seeds", "verdict"]
        columns = [*head, "second pretraining seed"] if "replicate" in frame else head
        parts += [
            f"### {topic}",
            _table(columns, [_row(name, row, "replicate" in frame) for name, row in own.iterrows()]),
        ]
    if beside:
        made = ", ".join(f"`{one.meta['model']}` with {_recipe(one.meta)}" for one in beside)
        text = f"The same rows by the same command on other models, figure and verdict: {made}. What a row says of a "
        parts += ["## Other models", _filled(text + "rank-1 adapter is said of that recipe there.")]
        parts.append(_others(ledger, beside))
    failed, missing = (frame[frame["verdict"] == verdict] for verdict in (FAILS, UNMEASURED))
    if len(failed):
        parts += ["## What was not reproduced", _listed([
            f"[{name}](#{_anchor(name)}): {row['here']} where {row['published']} was published; {row['why']}."
            + (f" {_sentence(row['note'])}" if row["note"] else "") for name, row in failed.iterrows()
        ])]  # fmt: skip
    if len(missing):
        parts += ["## What cannot be measured here", _listed(
            [f"[{name}](#{_anchor(name)}): {_sentence(row['why'])}" for name, row in missing.iterrows()]
        )]  # fmt: skip
    parts.append("## Every claim")
    for name, row in frame.iterrows():
        parts += _claim(ledger, str(name), row)
    parts += [
        "## Commands",
        f"```sh\n{command}\nemmech claims --model {meta['model']} --row NAME    # one claim\n"
        f"emmech claims --model {meta['model']} --processes 2  # two claims at once\n"
        "emmech claims --quick                      # a check that all runs, three minutes\n```",
        _filled(
            f"Weights `{str(meta['fingerprint'])[:12]}`, emmech {meta['emmech']}. Runs, studies and rows are kept in "
            f"the folder `claims/{meta['folder']}` under their digests; runs are shared between rows."
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(name: Any, row: Any, replicated: bool) -> list[str]:
    here = row["here"] or "–"
    count = f"{row['n']}, {row['seeds']}" if row["n"] else "–"
    cells = [
        f"[{row['says']}](#{_anchor(name)})",
        row["source"],
        row["published"],
        here,
        count,
        f"**{row['verdict']}**",
    ]
    return [*cells, row["replicate"]] if replicated else cells


def _others(ledger: Ledger, beside: Sequence[Ledger]) -> str:
    names = [str(one.meta["model"]) for one in (ledger, *beside)]
    rows = []
    for name in ledger.frame.index:
        cells = []
        for one in (ledger, *beside):
            row = one.frame.loc[name] if name in one.frame.index else None
            cells.append("" if row is None else f"{row['here'] or '–'}: {row['verdict']}")
        rows.append([f"[{name}](#{_anchor(name)})", *cells])
    return _table(["claim", *names], rows)


def _recipe(meta: Mapping[str, Any]) -> str:
    """The recipe of a ledger's fine-tunes in words."""
    fields = str(meta["options"]).strip("{}").replace("'", "")
    chosen = f"the recipe {meta['recipe']}" if meta["recipe"] != "the model's own" else "its own recipe"
    return f"{chosen} ({fields})" if fields else chosen


def _claim(ledger: Ledger, name: str, row: Any) -> list[str]:
    told = [f"### {name}", _filled(f"{row['says']} *{', '.join(filter(None, (row['source'], row['section'])))}*")]
    facts = [f"published: {row['published']}"]
    if row["how"]:
        facts.append(f"measured: {row['how']}")
    if row["here"]:
        facts.append(f"here: **{row['here']}**, n = {row['n']}, {row['seeds']} seeds")
        tested = (
            f"; p = {row['p_value']:.2g}, corrected {row['p_adjusted']:.2g}" if row["p_value"] == row["p_value"] else ""
        )
        facts.append(f"rule: {row['rule']}{tested}")
    facts.append(f"verdict: **{row['verdict']}** ({row['why']})" if row["why"] else f"verdict: **{row['verdict']}**")
    if row["note"]:
        facts.append(f"note: {row['note']}")
    if row["runs"]:
        several = str(row["runs"]).split()
        shown = ", ".join(f"`{one}`" for one in several[:4]) + (
            f" and {len(several) - 4} more" if len(several) > 4 else ""
        )
        facts.append(f"runs: {shown}")
    facts.append(f"again: `emmech claims --model {ledger.meta['model']} --row {name}`")
    drawing = ledger.findings[name]._sketch() if name in ledger.findings else ""
    return [*told, _listed(facts), drawing]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *escaped))


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(f"- {line}", _WIDE, subsequent_indent="  ", **_KEEP) for line in lines)


def _filled(text: str) -> str:
    return textwrap.fill(text, _WIDE, **_KEEP)


_KEEP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _anchor(name: Any) -> str:
    return str(name)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
