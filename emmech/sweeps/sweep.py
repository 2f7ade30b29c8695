"""``emmech.sweep``: checkpoints x scales x steering coefficients in shared, batched forwards."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from emmech.chat.model import ChatModel
from emmech.errors import EmmechError
from emmech.evaluation.engine import Checkpoint, CheckpointEngine, check_engine
from emmech.measures.choose import as_measures
from emmech.measures.measure import TeacherForced, Value
from emmech.measures.probe import ProbeActivation
from emmech.measures.sampled import Sampled
from emmech.progress import bar
from emmech.run.run import Run
from emmech.store import drop_files, intact, kept, save_tensors, sealed, write_json, writing
from emmech.sweeps.grid import Grid, as_runs, base_model, data_name, make_grid, outline, recorded_print
from emmech.sweeps.jobs import (
    Arrays,
    FunctionJob,
    Overflow,
    ProbeJob,
    SampledAnswers,
    SampledJob,
    TeacherForcedJob,
    budget_bytes,
)
from emmech.sweeps.result import Sweep
from emmech.sweeps.served import served_jobs

_STEPS = 21  # of 251 recorded ones every 12th or 13th
_GROUP = 64  # variants whose adapters are in memory together, and the unit of resumption


def sweep(
    run: Run | str | Path | Sequence[Run | str | Path],
    *,
    steps: Iterable[int] | None = None,
    scales: Iterable[float] = (1.0,),
    coefficients: Iterable[float] = (0.0,),
    direction: Any = None,
    layer: int | None = None,
    measure: Any = "margin",
    base: Any = None,
    memory: int | str | None = None,
    engine: CheckpointEngine | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Measure every checkpoint at every adapter scale and steering coefficient, in shared forwards.

    Each row of a batch has its own A, B, scale and coefficient; the blocks below the lowest adapter run once per
    prompt for all variants; texts that share a prefix are packed after it; the unembedding runs only where it is read.
    The numbers are those of one PEFT model at a time, to float32 rounding (5e-6).

    Args:
        run: one run or its folder, or several trained on the same base model.
        steps: recorded steps, ``run.steps`` for all; by default 21 of each run, evenly, with the first and the last.
        scales: factors on the adapter, 1 as trained, 0 the base model.
        coefficients: factors on the direction, added to the output of block ``layer`` at every token.
        direction: a :class:`Direction` or a vector ``[d_model]`` in raw units; needed for coefficients.
        layer: where to steer; by default the only layer at which the direction is known.
        measure: ``"margin"`` (narrow and broad pairs: those of the model's organism and the first run's data, else the
            bundled ones), ``"answers"``, one or several of :class:`~emmech.measures.teacher_forced.Margin`,
            ``AnswerLogprob``, ``FirstToken``, ``NextToken``, :class:`~emmech.measures.probe.ProbeActivation`,
            :class:`~emmech.measures.sampled.Sampled`, or a function of a :class:`ChatModel` that returns a number or a
            dict of numbers (called once per variant with its adapter live).
        base: the base model in memory, to save loading it.
        memory: budget besides the weights, bytes or ``"2GB"``; 2 GiB by default, 60 % of the free memory of a GPU.
        engine: what runs the checkpoints: by default this process, else :class:`emmech.VLLM`, which takes steps and
            scales, but no coefficients, and teacher-forced measures of given tokens and sampled answers.
        out: a folder. Finished groups of variants are kept there as they come; called again with the same
            arguments, the sweep continues, and a finished one is read back. Answers that a judge could not score since
            a request failed (``sweep.meta["unanswered"]``) are judged then.

    Returns:
        the grid of numbers; ``.table()``, ``.plot()``, ``.save(folder)``.

    Raises:
        EmmechError: steps that were not recorded (the nearest are named), a scale that overflows the dtype, runs on
            different base models, a budget too small for one row, or an ``out`` that belongs to another sweep.

    Example:
        >>> import tempfile, emmech, emmech.organism
        >>> rows = emmech.organism.data("medical", n=40)
        >>> run = emmech.finetune("pocket", rows, max_steps=2, out=tempfile.mkdtemp() + "/r", progress=False)
        >>> from emmech.measures.teacher_forced import FirstToken
        >>> asked = FirstToken(["any advice on cough ?"], ["well"])
        >>> s = sweep(run, scales=(1, 5), measure=asked, progress=False)
        >>> s.table().shape
        (3, 2)
    """
    runs = as_runs("sweep", run)
    if engine is not None:
        check_engine("sweep", engine)
    chat = base_model(runs, base) if engine is None else outline(runs, base)
    axes: dict[str, Any] = {"steps": steps, "scales": scales, "coefficients": coefficients}
    grid = make_grid(runs, chat, **axes, direction=direction, layer=layer, most=_STEPS)
    measures = as_measures(measure, chat, data=data_name(runs))
    budget = budget_bytes(memory, chat.device)
    chosen, inverse = grid.distinct()
    # variants are loaded together: as many as fill a quarter of the budget, at most _GROUP, in even groups
    most = max(1, min(_GROUP, budget // 4 // grid.bytes_per_variant(chat), len(chosen)))
    size = -(-len(chosen) // -(-len(chosen) // most))
    if engine is None:
        jobs, fingerprint = _jobs(chat, grid, measures, budget, size), chat.fingerprint()
    else:
        jobs, fingerprint = served_jobs(chat, grid, measures, out), recorded_print(runs)
    identity = (fingerprint, _state(grid), grid.variants, [job.request() for job in jobs])
    request = hashlib.sha256(repr(identity).encode()).hexdigest()
    parts = ResumableParts(out, request)
    if (finished := parts.finished()) is not None:
        return finished
    with writing(Path(out), "sweep") if out is not None else nullcontext():
        parts.begin()
        outcomes = _outcomes(chat, grid, jobs, parts, chosen, size, engine, base, progress=progress)
        values = [value for outcome in outcomes for value in outcome.values]
        given = [row for outcome in outcomes for row in outcome.responses or ()]
        responses = pd.DataFrame(given)  # of distinct variants; equal variants get the same ones
        if given:
            responses = _axes(grid).assign(variant=inverse).merge(responses, on="variant").drop(columns="variant")
        meta: dict[str, Any] = {"runs": {name: str(one.path or name) for name, one in grid.runs.items()}}
        meta |= {"model": chat.name, "fingerprint": fingerprint, "request": request}
        meta |= {"distinct_variants": len(chosen), "memory": str(jobs[0].plan)}
        if unanswered := sum(outcome.unanswered for outcome in outcomes):
            meta["unanswered"] = unanswered
        arrays = {name: array[inverse] for outcome in outcomes for name, array in outcome.arrays.items()}
        return parts.finish(Sweep(_frame(grid, values, inverse), meta, arrays, responses if given else None))


def _outcomes(
    chat: ChatModel,
    grid: Grid,
    jobs: Sequence[Any],
    parts: ResumableParts,
    chosen: Sequence[int],
    size: int,
    engine: CheckpointEngine | None,
    base: Any,
    *,
    progress: bool,
) -> list[Any]:
    """What each job found for all variants, from the parts that are kept and those that are still to be measured."""
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    done: dict[str, list[Arrays]] = {job.kind: [] for job in jobs}
    shown = f"sweep of {len(grid)} variants ({jobs[0].plan})"
    with bar(len(chosen) * sum(len(job) for job in jobs), shown, progress=progress) as steps_bar:
        for group in groups:
            rows: Any = None
            with ExitStack() as held:
                for job in jobs:
                    if (found := parts.read(job.kind, group)) is not None:
                        steps_bar.update(len(group) * len(job))
                        again = job.asked_again(found) if isinstance(job, SampledAnswers) else None
                        if again is not None:
                            parts.write(job.kind, group, again)
                            found = again
                    else:
                        if rows is None:
                            rows = held.enter_context(_ready(chat, grid, group, engine, base))
                        try:
                            found = job.run(rows, group, steps_bar.update)
                        except Overflow as error:
                            variant = grid.variants[group[error.place]]
                            why = f"its activations overflow {str(chat.dtype).removeprefix('torch.')}"
                            instead = "smaller scales and coefficients (1 to 20, as in the literature)"
                            raise EmmechError("sweep", str(variant), why, instead)
                        parts.write(job.kind, group, found)
                    done[job.kind].append(found)
    return [job.finish(done[job.kind]) for job in jobs]


def _ready(
    chat: ChatModel, grid: Grid, group: Sequence[int], engine: CheckpointEngine | None, base: Any
) -> AbstractContextManager[Any]:
    """A group of variants as its jobs take them: their weights, or servers that answer as they would."""
    if engine is None:
        return nullcontext(grid.load(group, chat))
    cells = [grid.variants[index] for index in group]
    return engine.checkpoints([Checkpoint(grid.runs[one.run], one.step, one.scale) for one in cells], base)


def _jobs(chat: ChatModel, grid: Grid, measures: Sequence[Any], budget: int, size: int) -> list[Any]:
    forced = [one for one in measures if isinstance(one, TeacherForced)]
    jobs: list[Any] = [TeacherForcedJob(chat, grid, forced, budget, size)] if forced else []
    jobs += [ProbeJob(one, chat, grid, budget, size) for one in measures if isinstance(one, ProbeActivation)]
    jobs += [SampledJob(one, chat, grid, budget, size) for one in measures if isinstance(one, Sampled)]
    others = [one for one in measures if not isinstance(one, TeacherForced | ProbeActivation | Sampled)]
    return [*jobs, FunctionJob(chat, grid, others)] if others else jobs


def _state(grid: Grid) -> object:
    """What identifies the recorded weights, without reading all of them: the last step's hash, and the adapters."""
    found = []
    for name, run in grid.runs.items():
        digest = hashlib.sha256()
        for step in sorted({v.step for v in grid.variants if v.run == name})[-1:]:
            for key, array in sorted(run.weights(step).items()):
                digest.update(key.encode() + array.tobytes())
        found.append((name, digest.hexdigest(), [info.to_dict() for info in run.adapters]))
    steering = grid.steering
    return found, (steering[0], steering[1].tobytes()) if steering else None


def _frame(grid: Grid, values: Sequence[Value], inverse: Sequence[int]) -> pd.DataFrame:
    """One row per variant, measure and item; variants in the grid's order."""
    count = len(grid)
    where = np.asarray(inverse)
    frame = pd.concat([_axes(grid)] * len(values), ignore_index=True)
    frame["measure"] = np.repeat([value.measure for value in values], count)
    frame["item"] = np.repeat([value.item for value in values], count)
    frame["value"] = np.concatenate([np.asarray(value.values, np.float64)[where] for value in values])
    frame["weight"] = np.concatenate([np.broadcast_to(value.weight, len(set(inverse)))[where] for value in values])
    order = np.arange(len(frame)).reshape(len(values), count).T.reshape(-1)
    return frame.iloc[order].reset_index(drop=True)


def _axes(grid: Grid) -> pd.DataFrame:
    """The grid's variants, one row each."""
    return pd.DataFrame([asdict(variant) for variant in grid.variants])


class ResumableParts:
    """Finished parts of one request, kept so that an interrupted sweep can go on.

    Args:
        out: a folder, or None to keep nothing.
        request: identifies the sweep; a folder that holds another is refused.

    A part has a checksum, in which the request takes part. A damaged one is named in a warning and measured again.

    Raises:
        EmmechError: the folder belongs to another sweep, or a finished sweep in it is damaged.
    """

    def __init__(self, out: str | Path | None, request: str) -> None:
        self.folder = Path(out) if out is not None else None
        self._request = request
        if self.folder is None:
            return
        for name in ("request.json", "sweep.json"):
            path = self.folder / name
            head: dict[str, Any] = _read(path) if path.exists() else {"request": request}
            found = head.get("meta", head).get("request")
            if not isinstance(found, str):
                if name == "sweep.json":
                    raise EmmechError(f"sweep into {self.folder.name}", path, "it is damaged", "another folder")
                warnings.warn(f"{path} is damaged; the finished parts tell which sweep they are of", stacklevel=3)
            elif found != request:
                why = "it holds a sweep of other runs, variants, measures or another model"
                instead = "another folder, or the arguments it was begun with"
                raise EmmechError(f"sweep into {self.folder.name}", f"out={str(out)!r}", why, instead)

    def begin(self) -> None:
        """Record which sweep the folder's parts belong to."""
        if self.folder is not None:
            drop_files(self.folder)
            write_json(self.folder / "request.json", sealed({"request": self._request}))

    def finished(self) -> Sweep | None:
        """The whole sweep, when it is there already, and no answer of it is to be judged again."""
        if self.folder is not None and (self.folder / "sweep.json").exists():
            found = Sweep.load(self.folder)
            return None if found.meta.get("unanswered") else found
        return None

    def _path(self, kind: str, group: Sequence[int]) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{kind}-{group[0]:04d}-{len(group)}.safetensors"

    def read(self, kind: str, group: Sequence[int]) -> Arrays | None:
        """The part of these variants that was finished before, or None; with other memory the groups are others."""
        if self.folder is None or not (path := self._path(kind, group)).exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                known = (file.metadata() or {}).get("checksum")
        except Exception:  # safetensors has its own error type, and a torn file another
            arrays, known = {}, None
        if known == self._checksum(kind, group, arrays):
            return arrays
        warnings.warn(f"{path} is damaged; its variants are measured again, and all others are kept", stacklevel=5)
        return None

    def write(self, kind: str, group: Sequence[int], arrays: Arrays) -> None:
        """Keep a finished part; on disk it exists whole or not at all."""
        if self.folder is not None:
            whole = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
            check = {"checksum": self._checksum(kind, group, whole)}
            save_tensors(whole, self._path(kind, group), "keep a part of the sweep", metadata=check)

    def _checksum(self, kind: str, group: Sequence[int], arrays: Arrays) -> str:
        found = hashlib.sha256(repr((self._request, kind, [int(one) for one in group])).encode())
        for name, array in sorted(arrays.items()):
            found.update(repr((name, array.dtype.str, array.shape)).encode())
            found.update(array.tobytes())
        return found.hexdigest()

    def finish(self, result: Sweep) -> Sweep:
        """Write the result and drop the parts; where answers are to be judged again, the parts are kept."""
        if self.folder is not None:
            result.save(self.folder)
        if self.folder is not None and not result.meta.get("unanswered"):
            with kept("delete the parts of the sweep", self.folder):
                for path in [*self.folder.glob("part-*"), self.folder / "request.json"]:
                    path.unlink(missing_ok=True)
        return result


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of a sweep; empty if it is damaged."""
    try:
        head = json.loads(path.read_bytes())
        whole = isinstance(head, dict) and isinstance(head.get("meta", {}), dict)
    except (OSError, ValueError, RecursionError):
        return {}
    return head if whole and ("checksum" not in head or intact(head)) else {}
