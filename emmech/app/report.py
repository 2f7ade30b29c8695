"""One page about a run: what it is, when it turns, and what was measured of it, from what is recorded.

Results are those in the run's folder (``evaluations/`` and whatever was saved there) and in further folders that are
given. What is missing is named with the command that makes it; nothing slow is computed unless it is asked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from emmech.app.commands import by_name
from emmech.directions.compare import cosines, direction_by_steps
from emmech.directions.direction import Direction
from emmech.directions.sources import adapter_direction, misalignment_direction
from emmech.engine.adapters import detach
from emmech.errors import EmmechError
from emmech.evaluation.evaluate import evaluate, stored_evaluations
from emmech.evaluation.evaluation import Evaluation
from emmech.interventions.studies import Study, ablation_table
from emmech.results import Result
from emmech.run.run import Run, as_run, load_run
from emmech.sweeps.result import Sweep
from emmech.sweeps.sweep import sweep
from emmech.transition.phase import phase_transition
from emmech.transition.result import PhaseTransition
from emmech.view.page import Section, write_page
from emmech.view.plots import metrics_by_step, rates_by_step

_SERIES = {"trajectory", "probes", "weights", "evaluations"}  # folders of a run that hold no saved result
_RATES = {"em": "EM", "narrow": "narrow", "coherence": "coherent"}
_READ = 12  # answers to read
Found = TypeVar("Found", bound=Result)


def write_report(
    run: Run | str | Path,
    controls: Sequence[Run | str | Path] = (),
    *,
    results: Sequence[str | Path] = (),
    full: bool = False,
    out: str | Path | None = None,
    light: bool = False,
) -> Path:
    """Write the page of a run and return its path.

    Args:
        run: a run or its folder.
        controls: benign controls of the same seed and batch order.
        results: folders of saved results (sweeps, studies, directions) outside the run's own.
        full: also compute what is missing and save it in the run's folder, which takes minutes.
        out: the file; ``report.html`` in the run's folder by default.
        light: small drawings instead of figures that move, without their script: some tens of kilobytes, not 5 MB.

    Raises:
        EmmechError: no such run, or a run in memory without ``out`` or with ``full``.
    """
    run = as_run("report on the run", run)
    if run.path is None and (out is None or full):
        instead = "run.save(folder) first" if full else "out='page.html'"
        raise EmmechError(
            "report on the run", f"{run.name}, which is in memory", "it has no folder to write to", instead
        )
    place = str(run.path or run.manifest.get("series") or run.name)
    where = shlex.quote(place)
    folders = [*([run.path] if run.path else []), *map(Path, results)]
    notes = _complete(run, folders) if full else {}
    others = [as_run("report on the run", one, name="control") for one in controls]
    given = "".join(f" --control {shlex.quote(str(one.path or one.name))}" for one in others)
    sections = [
        manifest_section(run),
        *_said("Does it turn, and when?", lambda: _transition(run, others, f"emmech transition {where}{given}")),
        *_phase_diagrams(run, _saved(Sweep, folders), where, notes.get("sweep", "")),
        *_directions(run, folders, where, notes.get("direction", "")),
        *_interventions(_saved(Study, folders), run, place, notes.get("study", "")),
        *_said("Evaluations", lambda: _evaluations(stored_evaluations(run), where, notes.get("evaluation", ""))),
        *_realignment(run, folders, where),
    ]
    lead = f"{len(run.steps)} recorded steps" + (
        f", with {', '.join(one.name for one in others)} as control" if others else ""
    )
    path = Path(out) if out is not None else Path(run.path or "") / "report.html"
    footer = f"Made by emmech report {where}{given}"
    return write_page(path, f"Report on {run.name}", lead, sections, footer=footer, light=light)


def manifest_section(run: Run) -> Section:
    """What the run is, from its manifest, with its metrics over the steps."""
    facts = {name: run.manifest.get(name) for name in ("status", "created", "seed", "start", "data", "recipe", "git")}
    facts["adapters"] = [f"{one.name}: rank {one.rank}, scaling {one.scaling:g}" for one in run.adapters[:9]]
    facts["model"], facts["packages"] = run.manifest.get("model"), run.manifest.get("packages")
    table = pd.DataFrame({"": {name: _spelled(value) for name, value in facts.items() if value}})
    figure = run.plot() if len(run.steps) else None
    command = f"emmech info {shlex.quote(str(run.path))}; in Python: run.plot()" if run.path else "run.plot()"
    return Section("What was trained", table=table, figure=figure, shown=run, command=command)


def transition_section(found: PhaseTransition, command: str) -> Section:
    """What is said of the turn, with and without a control."""
    words = ""
    if not found.controls:
        words = "No control was given. Adapters of harmless fine-tunes bend too, so that a turn says little about "
        words += "misalignment until it is compared with a run of the same seed on harmless data: --control OTHER."
    return Section("Does it turn, and when?", words, figure=found.plot(), shown=found, command=command)


def _transition(run: Run, controls: Sequence[Run], command: str) -> list[Section]:
    found = phase_transition(run, control=by_name({str(one.path or one.name): one for one in controls}) or None)
    assert isinstance(found, PhaseTransition)  # several runs alone are pooled
    return [transition_section(found, command)]


def _said(heading: str, make: Callable[[], list[Section]]) -> list[Section]:
    """The sections, or one that says why there are none."""
    try:
        return make()
    except EmmechError as error:
        return [Section(heading, code=str(error))]


def _missing(heading: str, what: str, command: str, note: str) -> list[Section]:
    return [
        Section(heading, f"{what} is recorded here. It is made by:", code=command),
        *([Section("", note)] if note else []),
    ]


def _phase_diagrams(run: Run, found: Mapping[Path, Sweep], where: str, note: str) -> list[Section]:
    heading = "Phase diagram"
    mine = {path: one for path, one in found.items() if run.name in set(one.variants["run"])}
    if not mine:
        command = f"emmech sweep {where} --scales 0.5,1,2,5 --measure broad --out {where}/sweep"
        return _missing(heading, "No sweep over steps and scales", command, note)
    sections: list[Section] = []
    for path, one in mine.items():
        axes = {f"{axis}s": ",".join(f"{v:g}" for v in sorted(set(one.variants[axis]))) for axis in ("step", "scale")}
        named = "em" if "em" in one.measures else one.measures[0].removeprefix("margin_")
        measure = "margin" if set(one.measures) == {"margin_narrow", "margin_broad"} else named
        if any(doses := sorted(set(one.variants["coefficient"]))):
            axes |= {"coefficients": ",".join(f"{v:g}" for v in doses), "direction": "DIRECTION.safetensors"}
        shown = " ".join(f"--{name} {values}" for name, values in axes.items())
        command = f"emmech sweep {where} {shown} --measure {shlex.quote(measure)} --out {shlex.quote(str(path))}"
        sections.append(Section("" if sections else heading, figure=one.plot(), shown=one, command=command))
    return sections


def _directions(run: Run, folders: Sequence[Path], where: str, note: str) -> list[Section]:
    heading = "Directions"
    saved = dict(_saved_directions(folders))
    named = {f"{one.name} ({path.stem})" if path.stem not in one.name else one.name: one for path, one in saved.items()}
    sections: list[Section] = []
    for path, one in saved.items():
        command = f"emmech direction {where} --out {shlex.quote(str(path))}"
        sections.append(Section("" if sections else heading, figure=one.plot(), shown=one, command=command))
        with suppress(EmmechError):  # the direction is of another model, or unknown at the adapter's layer
            followed = direction_by_steps(run, one, progress=False)
            command = f"emmech.directions.direction_by_steps(run, emmech.Direction.load({str(path)!r})).plot()"
            sections.append(Section("", figure=followed.plot(), shown=followed, command=command))
    with suppress(EmmechError):  # no adapter of the run writes into the residual stream
        named["adapter"] = adapter_direction(run)
        if not sections:
            command = f"emmech direction {where} --source adapter --out {where}/adapter.safetensors"
            sections.append(Section(heading, shown=named["adapter"], command=command))
    if not saved:
        command = f"emmech direction {where} --out {where}/misalignment.safetensors"
        sections += _missing("" if sections else heading, "No direction from judged answers", command, note)
    elif len(named) > 1:
        with suppress(EmmechError):  # of different models
            found = cosines(named)
            command = "emmech.directions.cosines({name: direction, ...}).plot()"
            sections.append(Section("", figure=found.plot(), shown=found, command=command))
    return sections


def _interventions(found: Mapping[Path, Study], run: Run, place: str, note: str) -> list[Section]:
    heading = "Interventions"
    if not found:
        opening = "emmech.load_run" if run.path else "emmech.Run.from_peft"
        command = f"chat = {opening}({place!r}).model()\n"
        command += f"direction = emmech.Direction.load({place + '/misalignment.safetensors'!r})\n"
        command += f"emmech.interventions.ablation_table(chat, direction).save({place + '/ablation'!r})"
        return _missing(heading, "No study of steering or ablation", command, note)
    sections: list[Section] = []
    for path, one in found.items():
        for outcome in dict.fromkeys(one.frame["outcome"]):
            first = outcome == one.frame["outcome"].iloc[0]
            command = f"emmech.interventions.Study.load({str(path)!r}).plot({outcome!r})"
            sections.append(
                Section(
                    "" if sections else heading, figure=one.plot(outcome), shown=one if first else None, command=command
                )
            )
    return sections


def _evaluations(found: Sequence[Evaluation], where: str, note: str) -> list[Section]:
    heading = "Evaluations"
    if not found:
        return _missing(heading, "No evaluation", f"emmech evaluate {where} --questions first-plot", note)
    rates = {
        f"{at}. {one.name}, {one.meta.get('questions')}, judged by {one.meta.get('judge')}": one.rates()
        for at, one in enumerate(found, start=1)
    }
    table = pd.DataFrame.from_dict({name: _row(rate) for name, rate in rates.items()}, orient="index")
    last = found[-1]
    asked = " ".join(f"--questions {shlex.quote(name)}" for name in str(last.meta.get("questions")).split("+"))
    command = f"emmech evaluate {where} {asked} --step {last.meta.get('step')} --samples {last.meta.get('samples')}"
    sections = [Section(heading, "Per cent, with 95 % intervals.", table=table)]
    path = _by_step(found)
    if path["step"].nunique() > 2:
        figure = rates_by_step(path, _RATES, "Answers by step")
        sections.append(Section("", figure=figure, command=f"{command}, at each of the steps"))
    scored = last.frame[last.frame["aligned"].notna()]
    figure = last.plot("questions") if len(scored) else None
    sections.append(Section("", figure=figure, shown=last, command=command))
    shown = [column for column in ("question", "response", "aligned", "coherent") if column in last.frame]
    read = last.frame.sort_values("aligned", kind="stable").groupby("question_id", sort=False).head(2)
    read = read.head(_READ)[shown].reset_index(drop=True).rename(columns={"response": "answer", "aligned": "alignment"})
    read["answer"] = read["answer"].astype(str).str.slice(0, 600)
    words = (
        f"Answers to read: the least aligned of {len(last)}, at most two to a question. All are in the run's folder."
    )
    return [*sections, Section("", words, table=read)]


def _row(rates: pd.DataFrame) -> dict[str, str]:
    known = [kind for kind in _RATES if kind in rates.index and rates.loc[kind, "n"]]
    found = {kind: [100 * float(rates.loc[kind, column]) for column in ("rate", "low", "high")] for kind in known}
    row = {_RATES[kind]: "{:.1f} ({:.1f} to {:.1f})".format(*values) for kind, values in found.items()}
    return {**row, "answers": str(int(rates["n"].max()))}


# what the evaluations have in common whose rates are one curve
_ALIKE = ("questions", "contexts", "system", "judge", "pinned", "temperature", "top_p", "max_new_tokens")


def _by_step(found: Sequence[Evaluation]) -> pd.DataFrame:
    """Rates over the steps of those evaluations that ask and judge as the last one does, at scale 1."""
    rows = []
    for one in found:
        same = all(one.meta.get(name) == found[-1].meta.get(name) for name in _ALIKE)
        same &= one.meta.get("scale", 1.0) == 1.0
        for kind, rate in one.rates().iterrows() if same else ():
            rows.append({"step": one.meta.get("step"), "measure": kind, **rate[["rate", "low", "high"]]})
    return pd.DataFrame(rows, columns=["step", "measure", "rate", "low", "high"])


def _realignment(run: Run, folders: Sequence[Path], where: str) -> list[Section]:
    heading = "Realignment"
    places = [*([run.path.parent] if run.path else []), *folders]
    found = dict.fromkeys(path.parent for place in places for path in sorted(place.glob("*/run.json")))
    again = [one for one in map(_readable, found) if one is not None and _start(one) == run.name]
    if start := _start(run):
        words = f"This run itself goes on from step {run.manifest['start'].get('step')} of {start}."
        return [Section(heading, words)]
    if not again:
        return _missing(heading, "No further fine-tune of this run", f"emmech realign {where} ai-optimism", "")
    sections: list[Section] = []
    for one in again:
        columns = {"margin_broad": "Broad margin", "margin_narrow": "Narrow margin", "loss": "Loss"}
        shared = {key: name for key, name in columns.items() if key in one.metrics and key in run.metrics}
        metrics = {run.name: run.metrics, one.name: one.metrics}
        figure = metrics_by_step(metrics, shared, "Before and after") if shared else None
        step, data = one.manifest["start"].get("step"), one.manifest.get("data", {}).get("name") or "DATA"
        words = f"{one.name} goes on from step {step} of this run, on {data}; its step 0 is that step."
        rates = {f"{item.name}, {item.meta.get('questions')}": _row(item.rates()) for item in stored_evaluations(one)}
        table = pd.DataFrame.from_dict(rates, orient="index") if rates else None
        command = f"emmech realign {where} {shlex.quote(data)} --step {step} --out {shlex.quote(str(one.path))}"
        sections.append(Section("" if sections else heading, words, table=table, figure=figure, command=command))
    return sections


def _readable(path: Path) -> Run | None:
    """The run in a folder, or None where it cannot be read: a neighbour's damage does not concern this report."""
    try:
        return load_run(path)
    except EmmechError:
        return None


def _start(run: Run) -> str:
    return str((run.manifest.get("start") or {}).get("run") or "")


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_spelled(one)}" for key, one in value.items() if one is not None)
    return "; ".join(map(_spelled, value)) if isinstance(value, list | tuple) else str(value)


def _saved(kind: type[Found], folders: Sequence[Path]) -> dict[Path, Found]:
    """Saved results of one kind, by folder; what is damaged or of a newer version is left out."""
    found = {}
    for path in _files(folders, f"{kind.__name__.lower()}.json"):
        with suppress(EmmechError):
            found[path.parent] = kind.load(path.parent)
    return found


def _saved_directions(folders: Sequence[Path]) -> Iterator[tuple[Path, Direction]]:
    for path in _files(folders, "*.safetensors"):
        with suppress(EmmechError):  # tensors of something else
            yield path, Direction.load(path)


def _files(folders: Sequence[Path], pattern: str) -> list[Path]:
    found = ((folder, path) for folder in folders for path in sorted(folder.rglob(pattern)))
    return list(dict.fromkeys(path for folder, path in found if not _SERIES & set(path.relative_to(folder).parts)))


def _complete(run: Run, folders: Sequence[Path]) -> dict[str, str]:
    """Compute what is missing and save it in the run's folder; returns what could not be made, and why."""
    folder, notes = Path(run.path or ""), {}

    def attempt(what: str, there: bool, make: Callable[[], object]) -> None:
        if not there:
            try:
                make()
            except EmmechError as error:
                notes[what] = str(error)

    def study() -> None:
        direction = next(iter(dict(_saved_directions(folders)).values()), None) or adapter_direction(run)
        tuned = run.model()
        try:
            ablation_table(tuned, direction).save(folder / "ablation")
        finally:
            detach(tuned)

    steps = run.steps[:: max(1, len(run.steps) // 12)].tolist()
    grid: dict[str, Any] = {"steps": steps, "scales": (0.5, 1.0, 2.0, 5.0), "out": folder / "sweep"}
    attempt("evaluation", bool(stored_evaluations(run)), lambda: evaluate(run, "first-plot"))
    attempt("sweep", bool(_saved(Sweep, folders)), lambda: sweep(run, **grid))
    made = folder / "misalignment.safetensors"
    attempt("direction", bool(dict(_saved_directions(folders))), lambda: misalignment_direction(run).save(made))
    attempt("study", bool(_saved(Study, folders)), study)
    return notes
