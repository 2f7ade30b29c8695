"""``emmech.claims``: what the literature claims, measured on one model, each row with a verdict by a stated rule.

Every row is measured through public functions with several fine-tuning seeds. Rows whose rule is tested share one
correction for multiple testing (Benjamini and Hochberg). Runs, studies and rows are kept under their digests, so that
the same call again computes only what is not there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from emmech.chat.model import ChatModel, load_model
from emmech.engine.responses import digest
from emmech.errors import EmmechError, as_int, as_ints, check_folder, one_of, refusal
from emmech.ledger import cures, directions, distillation, emergence, further, solutions, turning
from emmech.ledger.bench import Bench
from emmech.ledger.claim import UNMEASURED, VERDICTS, Claim, Finding, NotMeasurable, adjusted
from emmech.ledger.page import markdown
from emmech.processes import apart, check_apart
from emmech.progress import bar
from emmech.results import Card, Result
from emmech.run.identity import identity
from emmech.store import file_name
from emmech.view import ledger_plots
from emmech.view.sketch import intervals

if TYPE_CHECKING:
    import pandas as pd

CLAIMS: tuple[Claim, ...] = (
    *emergence.CLAIMS, *turning.CLAIMS, *directions.CLAIMS, *solutions.CLAIMS, *cures.CLAIMS, *distillation.CLAIMS,
    *further.CLAIMS,
)  # fmt: skip
"""Every claim of the ledger, in the order of the page."""

_ASKED = "measure the claims"


@dataclass(frozen=True, eq=False, repr=False)
class Ledger(Result):
    """Claims with what was found of them; built by :func:`emmech.claims`.

    Attributes:
        frame: one row per claim, indexed by name: ``says``, ``source``, ``section``, ``published``, ``how``, ``rule``,
            ``here`` (the figure in words), ``value``, ``low``, ``high``, ``unit``, ``n``, ``seeds``, ``p_value``,
            ``p_adjusted``, ``verdict``, ``why``, ``note``, ``runs`` and ``topic``; with another pretraining seed also
            ``replicate``, its figure and verdict.
        findings: what was measured, by name of the claim; each draws its figure.
        meta: the model, the seeds, the settings and the versions.
    """

    frame: pd.DataFrame
    findings: Mapping[str, Finding]
    meta: Mapping[str, Any]

    _parts: ClassVar[tuple[type, ...]] = (Finding,)

    def __getitem__(self, name: str) -> Finding:
        """What was measured of one claim."""
        one_of("read the ledger", "name", name, self.findings, why="no figure was measured for a claim of this name")
        return self.findings[name]

    def counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        found = self.frame["verdict"].value_counts()
        return {verdict: int(found.get(verdict, 0)) for verdict in VERDICTS}

    def plot(self, name: str | None = None) -> Any:
        """All shares and their differences with intervals, coloured by verdict; or the figure of one claim."""
        if name is not None:
            return self[name].plot()
        return ledger_plots.ledger(self.frame, f"Claims on {self.meta['model']}")

    def to_markdown(self, beside: Sequence[Ledger] = (), *, command: str = "") -> str:
        """The ledger as a page in Markdown, with the figure of every claim.

        Args:
            beside: ledgers of other models, which become columns of one more table.
            command: what made the page, as it is typed in a shell.
        """
        return markdown(self, beside, command)

    def _card(self) -> Card:
        found = self.counts()
        said = ", ".join(f"{count} {verdict}" for verdict, count in found.items() if count)
        seeds = len(self.meta["seeds"])
        headline = f"{len(self.frame)} claims on {self.meta['model']}, {seeds} seeds: {said}"
        facts = tuple(
            (str(name), f"{row['verdict']}: {row['here'] or row['why']}") for name, row in self.frame.iterrows()
        )
        tests = int(np.isfinite(self.frame["p_value"]).sum())
        caveat = f"verdicts of tested claims are corrected over {tests} tests (Benjamini and Hochberg)"
        return Card(headline, facts, caveat, "ledger.plot()")

    def _sketch(self) -> str:
        rows = self.frame[self.frame["unit"].isin(("%", "points"))].head(14)
        shown = [(str(name), *row[["value", "low", "high"]]) for name, row in rows.iterrows()]
        return intervals(shown, "Shares and differences of shares", percent=True, zero=True)

    def _table(self) -> pd.DataFrame:
        return self.frame[["published", "here", "n", "seeds", "p_adjusted", "verdict", "why"]]


def claims(
    model: Any = "pocket",
    *,
    seeds: int | Sequence[int] = 5,
    quick: bool = False,
    rows: Sequence[str | Claim] | None = None,
    data: Mapping[str, Any] | None = None,
    judge: Any = None,
    recipe: Any = None,
    layers: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    replicate: Any = None,
    out: str | Path | None = None,
    finished: bool = False,
    processes: int = 1,
    progress: bool = True,
) -> Ledger:
    """Measure the claims of the ledger on a model.

    Args:
        model: anything :func:`emmech.load_model` takes.
        seeds: the number of fine-tuning seeds of the headline rows, or the seeds; rows that are costly use fewer.
        quick: a part of the rows with two seeds, short fine-tunes and few answers: a check that everything runs, under
            three minutes on pocket. Its verdicts are of little worth.
        rows: names of claims, and claims of your own; all that ship by default.
        data: data by the names that rows use (``"medical"``, ``"finance"``, ``"good-medical"``, ``"style-medical"``,
            ...), for models that are of no organism.
        judge: as in :func:`emmech.evaluate`; without one, and without an organism's, rows that need answers are not
            measurable.
        recipe, layers, options: of the rank-1 fine-tunes, as in :func:`emmech.finetune`.
        replicate: the model of another pretraining seed, on which the headline rows are measured again.
        out: the folder of runs, studies and rows; ``claims/<model>`` by default. The same call again computes only what
            is not there; runs are shared between rows.
        finished: measure nothing, and leave out the claims that have not been measured.
        processes: how many claims are measured at once, each in a process that loads the model by its name. What two
            claims share is made once. A script then asks ``if __name__ == "__main__":``, because each process imports
            it.

    Returns:
        the ledger; ``.frame`` has the rows, ``ledger["turn"]`` what was measured of one, ``.to_markdown()`` the page.

    Raises:
        EmmechError: an unknown claim, two of one name, several processes with a model in memory, or as
            :func:`emmech.finetune`.

    Example:
        >>> ledger = emmech.claims("pocket", quick=True)  # doctest: +SKIP
        >>> ledger.frame["verdict"]  # doctest: +SKIP
    """
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        numbers = list(range(as_int(_ASKED, "seeds", seeds, least=1)))
    else:
        numbers = as_ints(_ASKED, "seeds", seeds)
    if not numbers:
        raise refusal(_ASKED, "seeds", seeds, "there is nothing to train", "seeds=5")
    if quick:
        numbers = numbers[:2]
    chosen = _chosen(rows, quick)
    if out is not None:
        check_folder(_ASKED, "out", out)
    if as_int(_ASKED, "processes", processes, least=1) > 1:
        for given in (model, replicate):
            if not isinstance(given, str | Path | None):
                why = "each process loads the model by its name or from its folder, and this one is in memory"
                raise EmmechError(_ASKED, f"processes={processes}", why, "the name or the folder, or processes=1")
    chat = load_model(model)
    name = Path(chat.name).name
    folder = (Path(out) if out is not None else Path("claims") / file_name(name)).resolve()
    own = {**({} if layers is None else {"layers": as_ints(_ASKED, "layers", layers)}), **(options or {})}
    bench = Bench(chat, numbers, folder, recipe, own, dict(data or {}), judge, quick)
    import emmech

    began = time.monotonic()
    how: dict[str, Any] = {"finished": finished, "processes": processes, "progress": progress}
    found, reasons = _measured(chosen, bench, model, **how)
    chosen = [one for one in chosen if one.name in found or one.name in reasons]
    if not chosen:
        raise EmmechError(_ASKED, f"finished=True in {folder.name}", "nothing of them is kept there", "finished=False")
    again: tuple[dict[str, Finding], dict[str, str]] | None = None
    if replicate is not None:
        other = load_model(replicate)
        place = folder / f"replicate-{other.fingerprint()[:8]}"
        second = replace(bench, chat=other, folder=place, used=[])
        headlines = [one for one in chosen if one.headline]
        again = _measured(headlines, second, replicate, **how)
    meta: dict[str, Any] = {"model": name, "fingerprint": chat.fingerprint(), "seeds": numbers, "quick": quick}
    meta |= {"recipe": str(recipe or "the model's own"), "options": str(own), "emmech": emmech.__version__}
    meta |= {"folder": folder.name, "minutes": (time.monotonic() - began) / 60, "replicate": again is not None}
    return _ledger(chosen, found, reasons, meta, again)


def _chosen(rows: Sequence[str | Claim] | None, quick: bool) -> list[Claim]:
    """The claims that are asked for, each under a name of its own."""
    if isinstance(rows, str) or not isinstance(rows, Sequence | None):
        raise refusal(_ASKED, "rows", rows, "they are a list of names and claims", 'rows=["turn"]')
    shipped = {one.name: one for one in CLAIMS}
    if rows is None:
        return [one for one in CLAIMS if one.quick or not quick]
    for row in rows:
        if not isinstance(row, Claim):
            one_of(_ASKED, "rows", row, shipped, why="there is no claim of this name")
    found = [row if isinstance(row, Claim) else shipped[row] for row in rows]
    names = [one.name for one in found]
    if not names or len(set(names)) < len(names):
        given = f"rows={names}"[:120]
        raise EmmechError(_ASKED, given, "the rows are told apart by their names", "at least one, each once")
    return found


def _measured(
    chosen: Sequence[Claim], bench: Bench, name: Any, *, finished: bool, processes: int, progress: bool
) -> tuple[dict[str, Finding], dict[str, str]]:
    """The findings by name, and why there is none of the other claims."""
    reasons = {claim.name: claim.measure for claim in chosen if isinstance(claim.measure, str)}
    places = {claim.name: _place(claim, bench) for claim in chosen if claim.name not in reasons}
    left = [claim for claim in chosen if claim.name in places and not _kept(places[claim.name])]
    if not finished and left:
        with bar(len(left), "claims", progress=progress) as done:
            if processes > 1:
                given = {"the model": name, "recipe": bench.recipe, "data": bench.data, "judge": bench.judge}
                check_apart(_ASKED, given | {f"the claim {claim.name}": claim for claim in left})
                loaded = partial(_row_apart, name, replace(bench, chat=None))  # type: ignore[arg-type]
                said: Iterator[tuple[Claim, str | None]] = zip(
                    left, apart(_ASKED, loaded, left, processes), strict=True
                )
            else:
                said = _in_turn(bench, left)
            for claim, reason in said:
                if reason is not None:
                    reasons[claim.name] = reason
                done.update()
    return {name: Finding.load(place) for name, place in places.items() if _kept(place)}, reasons


def _in_turn(bench: Bench, claims: Sequence[Claim]) -> Iterator[tuple[Claim, str | None]]:
    """Each claim with why it cannot be measured; those that another command is measuring come last."""
    from filelock import Timeout

    busy = []
    for claim in claims:
        try:
            yield claim, _row(bench, claim, wait=False)
        except Timeout:
            busy.append(claim)
    for claim in busy:
        yield claim, _row(bench, claim)


def _row(bench: Bench, claim: Claim, *, wait: bool = True) -> str | None:
    """Measure a claim and keep what was found; or why it cannot be measured."""
    place = _place(claim, bench)
    bench.used.clear()
    with bench.alone(place, wait=wait):
        if _kept(place):
            return None
        try:
            if claim.name in {one.name for one in CLAIMS} - _WITHOUT_JUDGE:
                bench.check_judged()  # before anything is trained for it
            found = claim.measure(bench)  # type: ignore[operator]
        except NotMeasurable as reason:
            return str(reason)
        except EmmechError as error:
            return f"it failed: {error}"
        replace(found, name=claim.name, runs=tuple(bench.used)).save(place)
        return None


def _row_apart(model: Any, bench: Bench, claim: Claim) -> str | None:
    """The same in a process of its own."""
    return _row(replace(bench, chat=_loaded(model), used=[]), claim)


@cache
def _loaded(model: str | Path) -> ChatModel:
    return load_model(model)


# the shipped claims that need no judged answers
_WITHOUT_JUDGE = frozenset(
    ("margin", "turn", "turn-early", "pca", "smooth-norm", "gradient-peak", "turn-in-good", "turn-in-style",
     "turn-specific", "efficiency", "stability", "not-durable", "learning-coefficient")
)  # fmt: skip


def _place(claim: Claim, bench: Bench) -> Path:
    """Where what is found of a claim is kept, under the digest of all that it depends on."""
    key = digest(bench.settings(), claim.name, identity(claim.measure))[:8]
    return bench.folder / "rows" / f"{file_name(claim.name)}-{key}"


def _kept(place: Path) -> bool:
    return (place / "finding.json").is_file()


def _ledger(
    chosen: Sequence[Claim], found: Mapping[str, Finding], reasons: Mapping[str, str], meta: dict[str, Any], again: Any
) -> Ledger:
    import pandas as pd

    frame = _frame(chosen, found, reasons)
    if again is not None:
        other = _frame([one for one in chosen if one.headline], *again)
        frame["replicate"] = pd.Series(
            {name: f"{row['here'] or row['why']}: {row['verdict']}" for name, row in other.iterrows()}, dtype=object
        ).reindex(frame.index, fill_value="")
    return Ledger(frame, dict(found), meta)


def _frame(chosen: Sequence[Claim], found: Mapping[str, Finding], reasons: Mapping[str, str]) -> pd.DataFrame:
    """The table: figures, tests corrected over all of them, verdicts."""
    import pandas as pd

    nan = float("nan")
    raw = [
        found[one.name].tested(one.rule.bound) if one.rule.tested and one.name in found else nan for one in chosen
    ]  # fmt: skip
    table = []
    for claim, p, corrected in zip(chosen, raw, adjusted(raw), strict=True):
        row: dict[str, Any] = {"name": claim.name, "topic": claim.topic, "says": claim.says, "source": claim.source}
        row |= {"section": claim.section, "published": claim.published, "how": claim.how}
        one = found.get(claim.name)
        if one is None:
            row |= {
                "rule": f"{claim.rule.side} {claim.rule.bound:g}",
                "here": "",
                "value": nan,
                "low": nan,
                "high": nan,
            }
            row |= {"unit": "", "n": 0, "seeds": 0, "p_value": nan, "p_adjusted": nan, "verdict": UNMEASURED}
            row |= {"why": reasons.get(claim.name, ""), "note": "", "runs": ""}
        else:
            verdict, why = claim.rule.verdict(one, corrected)
            row |= {"rule": claim.rule.says(one.unit), "here": one.shown(), "value": one.value, "low": one.low}
            row |= {"high": one.high, "unit": one.unit, "n": one.n, "seeds": one.seeds, "p_value": p}
            row |= {
                "p_adjusted": corrected,
                "verdict": verdict,
                "why": why,
                "note": one.note,
                "runs": " ".join(one.runs),
            }
        table.append(row)
    return pd.DataFrame(table).set_index("name")
