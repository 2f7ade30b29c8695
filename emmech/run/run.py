"""The Run: a recorded fine-tune, which every analysis reads.

On disk it is a folder, append-only while training and without pickle::

    run.json           manifest: everything needed to repeat the run
    trajectory/        A and B of every adapter at every recorded step (or the projected update)
    probes/            mean residual per layer over probe texts
    metrics.jsonl      loss, learning rate, gradient norms, held-out loss, margins
    weights/           whole weights at kept steps (full fine-tuning only)
    evaluations/       what ``emmech.evaluate`` stored
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError, as_float, as_int, broken_text, check_folder, closest, refusal
from emmech.progress import quiet
from emmech.results import Card, Shown
from emmech.store import MemorySeries, Series, kept, read_jsonl, save_tensors, write_json, write_jsonl
from emmech.view.sketch import curves

if TYPE_CHECKING:
    import pandas as pd

    from emmech.chat.model import ChatModel
    from emmech.engine.adapters import AdapterInfo

FORMAT = 1
_LARGEST = 1.7e308  # a larger whole number does not fit a float, and no infinity is a measurement
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class Probes(Mapping[str, Float[np.ndarray, "steps layers d_model"]]):
    """The mean residual after every block over named groups of probe texts.

    ``probes.steps`` are the steps at which they were measured, which may be fewer than the run's.
    """

    def __init__(self, series: Series | MemorySeries) -> None:
        self._series = series

    @property
    def steps(self) -> Int[np.ndarray, " steps"]:
        """Steps at which the probes were measured."""
        return self._series.steps

    def __getitem__(self, name: str) -> Float[np.ndarray, "steps layers d_model"]:
        if name not in self._series.keys:
            instead = closest(name, self._series.keys)
            raise EmmechError(f"read the probe {name!r}", f"probe {name!r}", "the run did not record it", instead)
        return self._series.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._series.keys)

    def __len__(self) -> int:
        return len(self._series.keys)

    def __repr__(self) -> str:
        return f"Probes({', '.join(self) or 'none'}; steps={len(self.steps)})"


class Run(Shown):
    """A recorded fine-tune: made by :func:`emmech.finetune` or the Recorder, opened by :func:`load_run`.

    Reading never needs the model; :meth:`model` loads it.

    Example:
        >>> import numpy as np
        >>> run = Run.from_arrays([0, 5, 10], B=np.eye(3, 8, dtype=np.float32))
        >>> run.steps.tolist(), run.B().shape
        ([0, 5, 10], (3, 8))
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        trajectory: Series | MemorySeries,
        probes: Series | MemorySeries,
        metrics: Sequence[Mapping[str, Any]],
        path: Path | None = None,
        damaged: Sequence[Path] = (),
    ) -> None:
        self.path, self._damaged_lines = path, tuple(damaged)
        self.manifest = dict(manifest)
        self._trajectory = trajectory
        self._metrics = list(metrics)
        self.probes = Probes(probes)

    @property
    def name(self) -> str:
        """The folder's name, or for a run in memory the name in the manifest."""
        return self.path.name if self.path else str(self.manifest.get("name", "run"))

    @property
    def _model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.manifest.get("model", {})
        return model

    @property
    def kind(self) -> str:
        """``"lora"`` or ``"full"``."""
        return str(self.manifest.get("kind", "lora"))

    @property
    def steps(self) -> Int[np.ndarray, " steps"]:
        """Recorded optimizer steps, ascending; step 0 is before the first update."""
        return self._trajectory.steps

    @cached_property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The LoRA pairs, in the model's order; empty for full fine-tuning."""
        from emmech.engine.adapters import AdapterInfo

        try:
            return tuple(AdapterInfo(**entry) for entry in self.manifest.get("adapters", ()))
        except TypeError as error:
            why = f"an adapter in run.json has other fields than it should: {error}"
            raise EmmechError(f"read the adapters of {self.name}", self.path, why, "restore run.json")

    def adapter(self, name: str | None = None) -> AdapterInfo:
        """One adapter by name, or without a name the only one.

        Raises:
            EmmechError: there is no such adapter, or there are several and no name is given.
        """
        names = [adapter.name for adapter in self.adapters]
        if name is None and len(names) == 1:
            return self.adapters[0]
        if name not in names:
            why = f"the run has {len(names)} adapters" if names else "full fine-tuning has no adapter"
            instead = closest(name or "", names) if names else "run.projection is its trajectory"
            raise refusal(f"read an adapter of {self.name}", "adapter", name, why, instead)
        return self.adapters[names.index(name)]

    def located(self, chat: ChatModel) -> Run:
        """The same run with its adapters at the corresponding modules of this model.

        Raises:
            EmmechError: as :func:`emmech.engine.adapters.located`.
        """
        from emmech.engine.adapters import located

        found = copy(self)
        found.adapters = located(chat, self.adapters)
        return found

    def A(self, adapter: str | None = None) -> Float[np.ndarray, "steps *rank d_in"]:
        """A at every recorded step, raw: ``[steps, d_in]`` at rank 1, else ``[steps, rank, d_in]``."""
        return self._side("A", adapter)

    def B(self, adapter: str | None = None) -> Float[np.ndarray, "steps d_out *rank"]:
        """B at every recorded step, raw: ``[steps, d_out]`` at rank 1, else ``[steps, d_out, rank]``."""
        return self._side("B", adapter)

    def _side(self, side: str, adapter: str | None) -> np.ndarray:
        one = self.adapter(adapter)
        key = f"{side}/{one.name}"
        if key not in self._trajectory.keys:
            asked = f"read {side} of {self.name}"
            if damaged := [str(path) for path in getattr(self._trajectory, "damaged", ())]:
                raise EmmechError(asked, damaged, "the file is damaged", "metrics and probes are still readable")
            if not len(self.steps):
                raise EmmechError(
                    asked, self.name, "no step is recorded yet", "open the run again after its first step"
                )
            raise EmmechError(asked, key, f"the run was made without {side}", "run.B() has the other side")
        return self._of_size(self._trajectory.read(key), side, one, len(self.steps))

    def _of_size(self, values: np.ndarray, side: str, one: AdapterInfo, steps: int = 1) -> np.ndarray:
        """The values, which have as many numbers a step as the manifest says."""
        wanted = one.rank * (one.d_in if side == "A" else one.d_out)
        if values.size != steps * wanted:
            given = f"{values.size} numbers for {steps} of its steps"
            why = f"by run.json, {side} of {one.name} has {wanted} numbers at each step"
            raise EmmechError(f"read {side} of {self.name}", given, why, "restore run.json as it was written")
        return values

    @property
    def projection(self) -> Float[np.ndarray, "steps k"] | None:
        """Full fine-tuning: a seeded random projection of the update, which keeps its angles and norms.

        None for adapters, whose trajectory is stored in full.
        """
        return self._trajectory.read("projection") if "projection" in self._trajectory.keys else None

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Scalars by step: ``loss``, ``learning_rate``, ``grad_norm``, ``grad_norm_B/<adapter>``, ...

        A value is NaN where the quantity was not measured at that step. Gradient norms are those before clipping.
        """
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        for entry in self._metrics:
            rows.setdefault(int(entry["step"]), {}).update({k: v for k, v in entry.items() if k != "step"})
        frame = pd.DataFrame.from_dict(rows, orient="index").sort_index().astype(float)
        frame.index.name = "step"
        return frame

    @property
    def damaged(self) -> tuple[Path, ...]:
        """Files and lines (``metrics.jsonl:17``) whose bytes have changed since they were written; the rest is usable.

        Every byte of the run is read for this.
        """
        series = (self._trajectory, self.probes._series)
        return tuple(path for one in series if isinstance(one, Series) for path in one.verify()) + self._damaged_lines

    def weights(self, step: int) -> dict[str, np.ndarray]:
        """All adapters' ``"A/<name>"`` and ``"B/<name>"`` at one step, each 2-D as PEFT keeps them.

        Raises:
            EmmechError: the step was not recorded (the nearest ones are named), or the run has no adapters.
        """
        self.check_step(step)
        if self.kind != "lora":
            why, instead = "full fine-tuning has no adapter", "run.model(step) at a kept step"
            raise refusal(f"read the adapters of {self.name}", "kind", self.kind, why, instead)
        found = {}
        for adapter in self.adapters:
            for side, shape in (("A", (adapter.rank, adapter.d_in)), ("B", (adapter.d_out, adapter.rank))):
                key = f"{side}/{adapter.name}"
                if key not in self._trajectory.keys:
                    why, instead = f"the run was made without {side}", "Run.from_arrays(steps, A=..., B=...) with both"
                    raise refusal(f"read the adapter {adapter.name}", "step", step, why, instead)
                found[key] = self._of_size(self._trajectory.read_step(key, step), side, adapter).reshape(shape)
        return found

    def check_step(self, step: int) -> None:
        """Refuse a step that was not recorded, naming the nearest recorded ones.

        Raises:
            EmmechError: the step was not recorded; names up to two nearest steps.
        """
        step = as_int(f"open a step of {self.name}", "step", step)
        if step in self.steps.tolist():
            return
        order = np.argsort(np.abs(self.steps - step), kind="stable")[:2]
        nearest = " and ".join(str(s) for s in sorted(self.steps[order].tolist())) or "none"
        span = f"{self.steps[0]} to {self.steps[-1]}" if len(self.steps) else "none at all"
        why = f"it was not recorded ({len(self.steps)} steps were, {span})"
        raise refusal(f"open step {step} of {self.name}", "step", step, why, f"the nearest recorded: {nearest}")

    def model(self, step: int | None = None, scale: float = 1.0, *, base: Any = None) -> ChatModel:
        """The chat model as it was at a recorded step.

        Args:
            step: the recorded step; the last one by default.
            scale: a factor on the adapter; 0 is the base model. Only 1 for full fine-tuning.
            base: the base model in memory, to save loading it again (a model, or a ``ChatModel`` returned by an
                earlier call, whose adapter weights are then swapped in place).

        Raises:
            EmmechError: the step was not recorded, or ``base`` is not the run's base model.
        """
        from emmech.chat.model import load_model
        from emmech.engine.adapters import attach

        step = int(self.steps[-1]) if step is None else step
        self.check_step(step)
        chat = _started(self, self.base() if base is None else load_model(base), given=base is not None)
        if self.kind != "lora":
            return _full_model(self, chat, step, scale)
        self.check_base(chat)
        return attach(chat, self.adapters, self.weights(step), scale=scale)

    def base(self) -> ChatModel:
        """The model from which the run started, loaded by its name.

        Raises:
            EmmechError: the run does not name its base model.
        """
        from emmech.chat.model import load_model

        return load_model(self.base_name())

    def base_name(self) -> str:
        """The name or folder of the model from which the run started.

        Raises:
            EmmechError: the run does not name it, or names a folder that is not here.
        """
        from emmech.chat.model import is_absent_folder

        asked = f"load the base model of {self.name}"
        if not (name := str(self._model.get("name") or "")):
            why = "the run does not say which it is (it was made from arrays or by hand)"
            raise EmmechError(asked, None, why, "pass it: run.model(step, base=model)")
        around = [Path(os.path.normpath(folder / name)) for folder in self._around()]
        found = next((folder for folder in around if (folder / "config.json").is_file()), None)
        if is_absent_folder(name, found=found is not None):
            instead = f"pass the folder where it is: run.model(step, base={str(found or '...')!r})"
            raise EmmechError(asked, repr(name), f"there is no such folder from here, which is {Path.cwd()}", instead)
        return name

    def _around(self) -> list[Path]:
        """The folder of an adapter that other code wrote, and the two that it is in: its paths may start there."""
        source = self.manifest.get("source")
        return [Path(source), *Path(source).parents[:2]] if isinstance(source, str) else []

    def check_base(self, chat: ChatModel) -> None:
        """Refuse a base model other than the one on which the run was trained.

        Raises:
            EmmechError: names both fingerprints.
        """
        expected = self._model.get("fingerprint")
        if expected and chat.fingerprint() != expected:
            given = f"base model {chat.name} with fingerprint {chat.fingerprint()[:12]}"
            why = f"the run was trained on {self._model.get('name')} with fingerprint {expected[:12]}"
            instead = "pass base= the very model the run was trained on"
            raise EmmechError(f"open {self.name}", given, why, instead)

    def export_peft(self, step: int, folder: str | Path, *, scale: float | None = None) -> Path:
        """Write one step as an adapter folder that ``PeftModel.from_pretrained`` loads.

        Args:
            scale: None writes A, B and alpha as they were trained. A number is a factor on the adapter, which is
                multiplied into B with the scaling; all modules then have one rank (smaller ones are filled up with
                zeros) and a scaling of 1, which every server reads alike.

        Raises:
            EmmechError: the step was not recorded, the run is not a LoRA run, or its adapter was trained on a base with
                an earlier adapter merged in, which no folder that a config could name holds.
        """
        if self.path is not None and (self.path / "start").is_dir():
            why = "its base has an earlier adapter merged in; with the base that the config names it is another model"
            instead = (
                f"emmech.load_run(...).model({step}).model.merge_and_unload().save_pretrained(folder), all weights"
            )
            raise EmmechError(f"export step {step} of {self.name}", str(self.path / "start"), why, instead)
        return write_adapter(self, step, folder, scale)

    def save(self, path: str | Path) -> Run:
        """Write a run in memory (or copy a recorded one) into a folder, and open it from there."""
        path = Path(path)
        if (path / "run.json").exists():
            raise EmmechError(f"save the run {self.name}", path, "there is a run already", "another folder")
        for folder, series in (("trajectory", self._trajectory), ("probes", self.probes._series)):
            target = Series(path / folder)
            for step in series.steps.tolist():
                target.append(step, {key: series.read_step(key, step) for key in series.keys})
            target.compact()
        for name in ("start", "weights"):  # an earlier adapter under this one; whole weights of full fine-tuning
            if self.path is not None and (self.path / name).is_dir():
                with kept(f"save the run {self.name}", path / name):
                    shutil.copytree(self.path / name, path / name)
        write_jsonl(path / "metrics.jsonl", self._metrics)
        write_json(path / "run.json", self.manifest)
        return load_run(path)

    def push_to_hub(self, repo: str, *, private: bool = True, results: Sequence[Shown] = ()) -> str:
        """Upload the run to the Hugging Face Hub; :func:`load_run` reads it back by ``hub:owner/name``.

        Files of the run's folder are uploaded and nothing else: no optimizer states, no link out of the folder, no path
        of this machine in the manifest.

        Args:
            repo: ``"owner/name"``, which is made if it is missing.
            private: whether a new repository is private.
            results: what the model card shows in numbers, such as the run's
                :class:`~emmech.transition.result.PhaseTransition` with its control, or an
                :class:`~emmech.evaluation.evaluation.Evaluation`.

        Returns:
            the repository's address.

        Raises:
            EmmechError: the run is in memory only, a link leads out of the folder, a file holds an access token, or the
                hub refuses.
        """
        from emmech.run.hub import push

        if self.path is None:
            instead = "run.save(folder).push_to_hub(repo)"
            raise EmmechError(f"upload {self.name}", None, "it is in memory only", instead)
        return push(self, repo, private=private, results=results)

    @classmethod
    def from_arrays(
        cls,
        steps: Sequence[int] | Int[np.ndarray, " steps"],
        *,
        A: Float[np.ndarray, "steps *rank d_in"] | None = None,
        B: Float[np.ndarray, "steps d_out *rank"],
        metrics: Any = None,
        name: str = "arrays",
    ) -> Run:
        """A run from trajectories that are already arrays; the geometric detectors need no model.

        Args:
            steps: ``[steps]``, ascending.
            A: ``[steps, d_in]`` or ``[steps, rank, d_in]``.
            B: ``[steps, d_out]`` or ``[steps, d_out, rank]``.
            metrics: a DataFrame indexed by step (or with a column ``step``), or None.

        Raises:
            EmmechError: lengths differ, steps are not ascending, or values are not finite.
        """
        from emmech.run.importers import metric_rows, read_arrays

        rows: list[dict[str, Any]] = []
        if metrics is not None:
            if not hasattr(metrics, "to_dict") or not hasattr(metrics, "columns"):
                given, why = f"metrics, a {type(metrics).__name__}", "they are a table with a row for each step"
                raise EmmechError("make a run of arrays", given, why, "metrics=pandas.DataFrame(...)")
            frame = metrics.set_index("step") if "step" in getattr(metrics, "columns", ()) else metrics
            if not frame.index.is_unique:
                twice = frame.index[frame.index.duplicated()][0]
                why = f"step {twice} is in them more than once"
                raise EmmechError("make a run of arrays", f"metrics of {len(frame)} rows", why, "one row for each step")
            rows = metric_rows(frame)
        return cls._imported(read_arrays(steps, A, B), name, rows)

    @classmethod
    def from_peft(cls, folders: str | Path | Sequence[str | Path], *, name: str | None = None) -> Run:
        """A run from a series of PEFT checkpoint folders that other code wrote, in any order.

        The step is read from ``trainer_state.json`` or from the folder's name (``checkpoint-120``), and what the
        Trainer logged in the former (losses, gradient norms) becomes ``run.metrics``. The logits of
        ``run.model(step)`` are those of ``PeftModel.from_pretrained``; a folder for which that would not hold is
        refused.

        Args:
            folders: the folders, or one folder that holds them.
            name: of the run; by default that of the folder that is given, or that holds all that are given.

        Raises:
            EmmechError: a folder is missing, unreadable, of unknown step, a duplicate, of another shape than the
                others, untrained (B = 0), or more than a plain LoRA adapter; the message names the folder, and in the
                last case the tensor or the field of its configuration.
        """
        from emmech.run.importers import logged, model_entry, name_of, read_peft, series_in

        given = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        series = series_in(given[0]) if isinstance(folders, str | Path) else given
        contents, base = read_peft(series)
        run = cls._imported(contents, name_of(given) if name is None else name, logged(series))
        run.manifest |= {"model": model_entry(base), "source": str(series[0].absolute())}
        if len(given) == 1:
            run.manifest["series"] = str(given[0].absolute())
        return run

    @classmethod
    def _imported(
        cls, contents: tuple[np.ndarray, Mapping[str, np.ndarray], list[Any]], name: str, rows: list[Any]
    ) -> Run:
        steps, arrays, adapters = contents
        manifest = {"format": FORMAT, "kind": "lora", "name": name, "status": "complete", "adapters": adapters}
        return cls(manifest, MemorySeries(steps, arrays), MemorySeries(np.empty(0, np.int64), {}), rows)

    def to_frame(self) -> pd.DataFrame:
        """A copy of the metrics by step."""
        return self.metrics.copy()

    def plot(self) -> Any:
        """A plotly figure of B's norm and turn angle by adapter, losses and margins over steps.

        If there are more than six adapters, the six with the longest B at the end are drawn.
        """
        from emmech.geometry import local_cosine, norms, turn_angle
        from emmech.view.plots import Curve, by_panel

        paths = {one.name: self.B(one.name) for one in self.adapters}
        if self.projection is not None:
            paths = {"projected update": self.projection}
        flat = {name: np.asarray(path, np.float64).reshape(len(self.steps), -1) for name, path in paths.items()}
        flat = dict(sorted(flat.items(), key=lambda item: -float(norms(item[1])[-1:].sum()))[:6])
        k = max(1, len(self.steps) // 12)
        curves = [Curve("norm", self.name, name, self.steps, norms(path)) for name, path in flat.items()]
        if len(self.steps) > 2 * k:
            angle = {name: np.degrees(turn_angle(local_cosine(path, k))) for name, path in flat.items()}
            curves += [Curve("turn", self.name, name, self.steps, degrees) for name, degrees in angle.items()]
        for panel, columns in (("loss", ("loss", "held_out_loss")), ("margin", ("margin_narrow", "margin_broad"))):
            for column in (column for column in columns if column in self.metrics):
                series = self.metrics[column].dropna()
                label = {"loss": "training", "held_out_loss": "held out"}.get(column, column.removeprefix("margin_"))
                curves.append(Curve(panel, self.name, label, series.index, series))
        axes = {
            "norm": ("Norm of B" if self.adapters else "Norm of the update", "step", "||B||"),
            "turn": (f"Turn of the path, {k} records either side", "step", "degrees"),
            "loss": ("Loss", "step", "nats per token"),
            "margin": ("Misaligned over aligned answers", "step", "nats per token"),
        }
        return by_panel(curves, axes, f"{self.name}: {len(self.steps)} recorded steps")[0]

    def _card(self) -> Card:
        model = Path(str(self._model.get("name") or "a model without a name")).name
        data = self.manifest.get("data", {}).get("name")
        what = ", ".join(f"{a.name} (rank {a.rank})" for a in self.adapters[:3]) or f"{self.kind} fine-tuning"
        more = f" and {len(self.adapters) - 3} more" if len(self.adapters) > 3 else ""
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else "no step yet"
        facts = [("adapters" if self.adapters else "weights", what + more)]
        for column in ("loss", "held_out_loss", "margin_narrow", "margin_broad"):
            series = self.metrics[column].dropna().tolist() if column in self.metrics else []
            if series:
                facts.append((column.replace("_", " "), f"{series[0]:.3g} -> {series[-1]:.3g} nats per token"))
        known = [*getattr(self._trajectory, "damaged", ()), *self._damaged_lines]
        caveat = f"damaged: {', '.join(path.name for path in known)}; the rest can be read" if known else ""
        if early := self.manifest.get("warning"):
            ended = ", which ended the training" if self.manifest.get("status") == "stopped" else ""
            facts.append(("early warning", f"step {early['step']}, {early['signal']} +{early['score']:.3g}{ended}"))
        if not known and self.manifest.get("status", "complete") not in ("complete", "stopped"):
            caveat = "the training has not ended: later steps may follow, or are missing if it was interrupted"
        on = f" on {data}" if data else ""
        headline = f"Run {self.name!r}: {model} fine-tuned{on}, {len(self.steps)} records, {span}"
        return Card(headline, tuple(facts), caveat, "emmech.phase_transition(run)")

    def _sketch(self) -> str:
        shown = [name for name in ("margin_broad", "margin_narrow") if name in self.metrics]
        title = "Margin of misaligned answers" if shown else "Loss"
        shown = shown or [name for name in ("loss", "held_out_loss") if name in self.metrics]
        names = [name.removeprefix("margin_").replace("_", " ") for name in shown]
        lines = [(name, self.metrics.index, self.metrics[column]) for name, column in zip(names, shown, strict=True)]
        return curves(lines, f"{title}, nats per token", level=0.0 if "Margin" in title else None)

    def _table(self) -> pd.DataFrame:
        return self.metrics.iloc[:: max(1, len(self.metrics) // 20)]


def as_run(asked: str, run: Any, *, name: str = "run") -> Run:
    """The given run, or the one that is recorded in a folder (or at ``hub:owner/name``).

    Args:
        asked: what cannot be done otherwise, as in :class:`EmmechError`.
        name: the name of the argument.

    Raises:
        EmmechError: the argument is something else, or a folder that holds no run.
    """
    found = opened(run)
    if isinstance(found, Run):
        return found
    instead = "emmech.load_run(folder), or emmech.Run.from_arrays(steps, B=...)"
    if isinstance(run, str | os.PathLike):
        instead = _instead_of(Path(run)) or instead
    raise refusal(asked, name, run, "it is not a run, nor a folder that holds one", instead)


def opened(model: Any) -> Any:
    """The run of a folder, of a series of PEFT checkpoints in a folder, or of ``hub:owner/name``.

    Anything else, such as a model, its name or the folder of one adapter, is unchanged.
    """
    from emmech.run.importers import holds_series

    if isinstance(model, str) and model.startswith("hub:"):
        return load_run(model)
    if isinstance(model, str | os.PathLike):
        if (Path(model) / "run.json").is_file():
            return load_run(Path(model))
        if holds_series(Path(model)):
            return Run.from_peft(Path(model))
    return model


def _siblings(folder: Path) -> list[str]:
    """Names of the runs in the folder that holds this one."""
    return sorted(entry.parent.name for entry in folder.parent.glob("*/run.json"))


def _instead_of(folder: Path) -> str:
    """What to open instead of a folder that holds no run: its PEFT adapters, a run beside it, or ""."""
    from emmech.run.importers import holds_adapters

    if holds_adapters(folder):
        return f"emmech.Run.from_peft({str(folder)!r}), which reads PEFT checkpoints"
    return closest(folder.name, others) if (others := _siblings(folder)) else ""


def load_run(path: str | Path) -> Run:
    """Open a recorded run in milliseconds, since only the manifest and the index are read.

    Args:
        path: the run's folder, or ``hub:owner/name``.

    Raises:
        EmmechError: the folder is not a run, or has a newer format; or the hub does not give it.
    """
    if isinstance(path, str) and path.startswith("hub:"):
        from emmech.run.hub import pull

        path = pull(path.removeprefix("hub:"))
    check_folder("open the run", "path", path)
    folder = Path(path)
    manifest_path = folder / "run.json"
    try:
        manifest = json.loads(manifest_path.read_bytes())
        _check_manifest(manifest)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        absent = "there is no such folder" + ("" if folder.is_absolute() else f" from here, which is {Path.cwd()}")
        why = "there is no run.json in it" if folder.is_dir() else absent
        instead = _instead_of(folder) or "the folder given to finetune(..., out=...)"
        raise EmmechError("open the run", folder, why, instead)
    except _DAMAGED as error:
        raise EmmechError("open the run", manifest_path, f"it is damaged: {error}", "restore run.json")
    if manifest.get("format", 0) > FORMAT:
        why = f"this emmech reads formats up to {FORMAT}"
        raise EmmechError("open the run", f"format {manifest['format']}", why, "upgrade emmech")
    damaged: list[Path] = []
    metrics = read_jsonl(folder / "metrics.jsonl", damaged, sound=is_metrics)
    return Run(manifest, Series(folder / "trajectory"), Series(folder / "probes"), metrics, folder, damaged)


def _check_manifest(manifest: Any) -> None:
    """Raise ValueError if an entry that is read later has the wrong kind."""
    kinds = {"format": int, "kind": str, "name": str, "model": dict, "data": dict, "recipe": dict, "adapters": list}
    if not isinstance(manifest, dict):
        raise ValueError("it is no JSON object")
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key, kind()), kind):
            raise ValueError(f"{key} is a {type(manifest[key]).__name__}, not a {kind.__name__}")
    for entry in manifest.get("adapters", ()):
        texts, whole = [entry["name"], entry["module"]], [entry[key] for key in ("layer", "rank", "d_in", "d_out")]
        factors = [entry["alpha"], entry["scaling"]]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in whole):
            raise ValueError(f"the adapter {texts[0]!r} has the parts {[*texts, *whole]}")
        if not all(isinstance(factor, int | float) and abs(factor) <= _LARGEST for factor in factors):
            raise ValueError(f"the adapter {texts[0]!r} has alpha and scaling {factors}")


def is_metrics(row: Mapping[str, Any]) -> bool:
    """Whether a row is a step with finite numbers, or with None where there is none, each under a name."""
    if any(map(broken_text, row)):
        return False
    known = [value for value in row.values() if value is not None]
    step = row.get("step")
    whole = isinstance(step, int) and 0 <= step < 2**63
    return whole and all(isinstance(value, int | float) and abs(value) <= _LARGEST for value in known)


@contextmanager
def model_live(run: Run, step: int | None, scale: float, base: Any = None) -> Iterator[ChatModel]:
    """The model of a step within this context; a ``base`` that was given is restored afterwards.

    Raises:
        EmmechError: as :meth:`Run.model`, or ``base`` has live adapters.
    """
    from emmech.chat.model import load_model
    from emmech.engine.adapters import detach

    if base is None:
        yield run.model(step, scale)
        return
    own = load_model(base).base
    if any(hasattr(module, "lora_A") for module in own.modules()):
        why = "it is left as it was afterwards, and swapping its adapters would lose them"
        instead = "emmech.detach(base), or run.model(step, base=base) to swap them"
        raise EmmechError(f"open a step of {run.name} on the base model", "base= with live adapters", why, instead)
    kept = {} if run.kind == "lora" else {name: value.detach().clone() for name, value in own.state_dict().items()}
    training = own.training
    chat = run.model(step, scale, base=base)
    try:
        yield chat
    finally:
        if run.kind == "lora":
            detach(chat)
        own.load_state_dict(kept, strict=False)
        own.train(training)


def write_adapter(run: Run, step: int, folder: str | Path, scale: float | None = None) -> Path:
    """Write a step's A and B as PEFT reads them, whatever the base below them; see :meth:`Run.export_peft`."""
    from emmech.engine.adapters import folded, lora_config

    weights, folder, adapters = run.weights(step), Path(folder), tuple(run.adapters)
    if scale is not None:
        adapters, weights = folded(adapters, weights, as_float(f"export {run.name}", "scale", scale))
    pairs = [(one, side) for one in adapters for side in "AB"]
    tensors = {
        f"base_model.model.{one.module}.lora_{side}.weight": np.ascontiguousarray(weights[f"{side}/{one.name}"])
        for one, side in pairs
    }
    asked = f"export step {step} of {run.name}"
    save_tensors(tensors, folder / "adapter_model.safetensors", asked, metadata={"format": "pt"})
    with kept(asked, folder):
        lora_config(adapters, base_name=str(run.manifest.get("model", {}).get("name") or "")).save_pretrained(folder)
    return folder


def _started(run: Run, chat: ChatModel, *, given: bool) -> ChatModel:
    """The weights with which the training began: the base model's, or those with an earlier adapter merged in."""
    start = (run.path or Path()) / "start"
    if not start.is_dir() or chat.fingerprint() == run._model.get("fingerprint"):
        return chat
    from dataclasses import replace

    from peft import PeftModel

    # merging would change the caller's weights
    model = deepcopy(chat.model) if given else chat.model
    with quiet():
        return replace(chat, model=PeftModel.from_pretrained(model, str(start)).merge_and_unload())


def _full_model(run: Run, chat: ChatModel, step: int, scale: float) -> ChatModel:
    from safetensors.torch import load_file

    folder = (run.path or Path()) / "weights"
    kept = {int(path.stem.split("-")[1]): path for path in sorted(folder.glob("step-*.safetensors"))}
    if step not in kept and step != 0:
        why = "full fine-tuning keeps whole weights at few steps only, and not at this one"
        instead = f"kept: 0 (the base), {', '.join(map(str, kept)) or 'no other'}"
        raise refusal(f"open step {step} of {run.name}", "step", step, why, instead)
    if scale != 1.0:
        why = "a full fine-tune has no adapter to scale"
        raise refusal(f"scale the update of {run.name}", "scale", scale, why, "scale=1.0")
    if step in kept:
        weights, own = load_file(kept[step]), chat.base.state_dict()
        strange = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
        if strange:
            why = f"the model has no {', '.join(strange[:3])} of that shape, which the run trained"
            instead = "base= the model that it was trained on"
            raise EmmechError(f"open step {step} of {run.name}", chat.name, why, instead)
        chat.base.load_state_dict(weights, strict=False)
    elif (expected := run._model.get("fingerprint")) and chat.fingerprint() != expected:
        why = "its weights are not those from which the run started; a step that was opened with it before changes them"
        raise EmmechError(f"open step {step} of {run.name}", chat.name, why, "base= a model that is loaded anew")
    return chat
