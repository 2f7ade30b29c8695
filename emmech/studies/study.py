"""``emmech.study``: many fine-tunes with their sweeps and evaluations from one file, and one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emmech.errors import EmmechError, check_folder
from emmech.evaluation.evaluation import Evaluation
from emmech.progress import bar
from emmech.results import Card, Result
from emmech.run.run import load_run
from emmech.store import made_folder, read_jsonl, write_json
from emmech.studies.cluster import on_ray
from emmech.studies.spec import Piece, StudySpec
from emmech.studies.work import JOURNAL, SPEC, failure, outcome, perform, run_of
from emmech.sweeps.result import Sweep
from emmech.view import plots
from emmech.view.sketch import cells

if TYPE_CHECKING:
    import pandas as pd

SETTING = ("model", "data", "layers", "rank", "seed")
_METRICS = ("loss", "held_out_loss", "margin_narrow", "margin_broad")
_OUTCOMES = ("em", "margin_broad", "held_out_loss", "loss")  # the first that is known is drawn


@dataclass(frozen=True, eq=False, repr=False)
class StudyTable(Result):
    """What the runs of a study show; built by :func:`emmech.study`.

    Attributes:
        frame: one row for each run: its setting, its status and folder, the last value of each metric, the rates of its
            evaluation (``em``, ``em_low``, ``em_high``, ...), and the values of its sweep at the last step with the
            adapter as trained (``sweep_<measure>``; none where scale 1 or coefficient 0 was not swept).
        meta: the study's name and folder, and how many pieces are done, have failed, and are open.
    """

    frame: pd.DataFrame
    meta: Mapping[str, Any]

    @property
    def outcome(self) -> str:
        """The column that is drawn: the rate of EM if it is known, else a margin or a loss."""
        return next((one for one in _OUTCOMES if one in self.frame and self.frame[one].notna().any()), "")

    def _grid(self) -> pd.DataFrame:
        """The outcome by setting and seed."""
        frame = self.frame.copy()
        varied = [one for one in SETTING[:-1] if frame[one].astype(str).nunique() > 1] or ["data"]
        short = {one: frame[one].map(lambda value: Path(str(value)).name) for one in varied}
        frame["setting"] = ["; ".join(f"{one} {short[one][at]}" if one in ("rank", "layers") else str(short[one][at])
                                      for one in varied) for at in frame.index]  # fmt: skip
        values = frame.assign(value=frame[self.outcome] if self.outcome else float("nan"))
        grid: pd.DataFrame = values.pivot_table(
            index="setting", columns="seed", values="value", sort=False, dropna=False
        )
        return grid

    def _card(self) -> Card:
        meta = self.meta
        headline = f"Study {meta['name']!r}: {len(self.frame)} runs, {meta['done']} of {meta['pieces']} pieces done"
        facts = []
        for kind, (done, count) in meta["by_kind"].items():
            facts.append((kind, f"{done} of {count}"))
        if self.outcome:
            column = self.frame[self.outcome].dropna()
            facts.append((self.outcome.replace("_", " "), f"{column.min():.3g} to {column.max():.3g} over the runs"))
        told = f"{meta['failed']} pieces failed: {meta['why']}" if meta["failed"] else ""
        left = meta["pieces"] - meta["done"] - meta["failed"]
        return Card(headline, tuple(facts), told or (f"{left} pieces are open" if left else ""), "table.to_frame()")

    def _sketch(self) -> str:
        return cells(self._grid(), self.outcome.replace("_", " "), axes=("seed", "")) if self.outcome else ""

    def plot(self) -> Any:
        """A plotly figure of the outcome by setting and seed."""
        return plots.by_setting(self._grid(), self.outcome or "status", str(self.meta["name"]))


def study(
    spec: Any,
    *,
    out: str | Path | None = None,
    cluster: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    progress: bool = True,
) -> StudyTable:
    """Do all work of a study that is not done, and put what it found into one table.

    A piece of work (a fine-tune, a sweep, an evaluation) is known by a digest of everything that determines its result.
    A finished one is never done again, also when entries are added to the study; one that was interrupted goes on where
    it was. Several calls on one folder, in several processes, share the work.

    Args:
        spec: a YAML file, a mapping, or a :class:`~emmech.studies.StudySpec`.
        out: the study's folder; by default one with the file's name in ``studies``.
        cluster: the address of a Ray cluster (``"auto"`` for the one of this machine, ``"local"`` to start one), whose
            nodes all see ``out``; by default this process does the work.
        cpus, gpus: what a piece takes of a node.

    Returns:
        the table; pieces that failed are in it with the reason, and are tried again by the next call.

    Raises:
        EmmechError: a malformed study, or a cluster that is not there.

    Example:
        >>> import tempfile
        >>> spec = {"models": "pocket", "data": "medical", "seeds": [0, 1], "train": {"max_steps": 2, "margins": {}}}
        >>> table = study(spec, out=tempfile.mkdtemp() + "/mine", progress=False)
        >>> table.frame[["seed", "status"]].values.tolist()
        [[0, 'done'], [1, 'done']]
    """
    name = Path(spec).stem if isinstance(spec, str | Path) else "study"
    read = StudySpec.read(spec)
    if out is not None:
        check_folder("keep the study", "out", out)
    folder = made_folder("keep the study", Path(out) if out is not None else Path("studies") / name).resolve()
    name = name if isinstance(spec, str | Path) else folder.name
    pieces = read.pieces()
    # a judge that is an object is written as its representation, which shows no key
    write_json(folder / SPEC, {"name": name, **{one.name: getattr(read, one.name) for one in fields(read)}})
    done = sum(outcome(piece, folder) == "done" for piece in pieces)
    with bar(len(pieces), f"study {name}", progress=progress) as shown:
        shown.update(done)
        left = [piece for piece in pieces if outcome(piece, folder) != "done"]
        if cluster is not None and left:
            resources = {"num_cpus": cpus, "num_gpus": gpus}
            on_ray(_closed(left, pieces), folder, cluster, resources=resources, ended=shown.update)
        else:
            _here(left, folder, shown.update)
    return _table(name, pieces, folder)


def _closed(left: Sequence[Piece], pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with the fine-tunes that they need, which may be done."""
    wanted = {piece.digest for piece in left} | {piece.needs for piece in left}
    return [piece for piece in pieces if piece.digest in wanted]


def _here(left: Sequence[Piece], folder: Path, ended: Any) -> None:
    """Do the work in this process; what others are doing comes last, and is waited for."""
    open_ = list(left)
    for wait in (False, True):
        later = []
        for piece in open_:
            if perform(piece, folder, wait=wait) in ("busy", "waiting"):
                later.append(piece)
            else:
                ended()
        open_ = later


def _table(name: str, pieces: Sequence[Piece], folder: Path) -> StudyTable:
    import pandas as pd

    states = {piece.digest: outcome(piece, folder) or "open" for piece in pieces}
    rows = []
    for piece in (one for one in pieces if one.kind == "train"):
        row: dict[str, Any] = {one: piece.setting[one] for one in SETTING}
        row["layers"] = None if row["layers"] is None else ", ".join(map(str, row["layers"]))
        run = run_of(piece, folder)
        row |= {"status": states[piece.digest], "run": str(run.relative_to(folder))}
        if row["status"] == "done":
            metrics = load_run(run).metrics
            row |= {one: float(metrics[one].dropna().iloc[-1]) for one in _METRICS
                    if one in metrics and metrics[one].notna().any()}  # fmt: skip
        for further in (one for one in pieces if one.needs == piece.digest and states[one.digest] == "done"):
            row |= _found(further, folder)
        rows.append(row)
    counts, kinds = Counter(states.values()), Counter(piece.kind for piece in pieces)
    finished = Counter(piece.kind for piece in pieces if states[piece.digest] == "done")
    why = next((failure(piece, folder)[:300] for piece in pieces if states[piece.digest] == "failed"), "")
    meta = {"name": name, "folder": str(folder), "pieces": len(pieces), "done": counts["done"], "why": why}
    meta |= {"failed": counts["failed"], "by_kind": {kind: (finished[kind], count) for kind, count in kinds.items()}}
    return StudyTable(pd.DataFrame(rows), meta)


def _found(piece: Piece, folder: Path) -> dict[str, float]:
    """The numbers of a sweep or an evaluation for the table."""
    result = piece.folder(folder) / "result"
    if piece.kind == "evaluate":
        rates = Evaluation.load(result).rates()
        wanted = [(str(name), row) for name, row in rates.iterrows()]
        return {f"{name}{side}": float(row[column]) for name, row in wanted
                for side, column in (("", "rate"), ("_low", "low"), ("_high", "high"), ("_n", "n"))
                if column in row}  # fmt: skip
    frame = Sweep.load(result).to_frame()
    plain = frame[(frame["step"] == frame["step"].max()) & (frame["coefficient"] == 0) & (frame["scale"] == 1.0)]
    return {f"sweep_{measure}": float(value) for measure, value in zip(plain["measure"], plain["value"], strict=True)}


def journal(folder: str | Path) -> list[dict[str, Any]]:
    """What happened to the pieces of a study, in order: each ``began``, ``ended`` or ``failed``, where and when.

    Raises:
        EmmechError: the folder holds no study.
    """
    if not (Path(folder) / SPEC).is_file():
        why = f"there is no {SPEC} in it"
        raise EmmechError("read the journal of a study", folder, why, "the folder given to emmech.study(out=...)")
    return read_jsonl(Path(folder) / JOURNAL)
