"""The Run: a recorded fine-tune, the one noun that every analysis reads.

On disk it is a folder, append-only while training and without pickle::

    run.json           manifest: everything needed to repeat the run
    trajectory/        A and B of every adapter at every recorded step (or the projected update)
    probes/            mean residual per layer over probe texts
    metrics.jsonl      loss, learning rate, gradient norms, held-out loss, margins
    weights/           whole weights at kept steps (full fine-tuning only)
    evaluations/       what ``emmech.evaluate`` stored
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError, as_int, check_folder, closest
from emmech.results import Card, Shown
from emmech.run.probes import Probes
from emmech.store import MemorySeries, Series, read_jsonl, write_json

if TYPE_CHECKING:
    import pandas as pd

    from emmech.chat.model import ChatModel
    from emmech.engine.adapters import AdapterInfo

__all__ = ["Run", "as_run", "load_run", "opened"]

FORMAT = 1


class Run(Shown):
    """A recorded fine-tune: made by :func:`emmech.finetune` or the Recorder, opened by :func:`load_run`.

    Reading never needs the model; :meth:`model` loads it when it must run.

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

    # what was recorded

    @property
    def name(self) -> str:
        """The folder's name, or the manifest's for a run in memory."""
        return self.path.name if self.path else str(self.manifest.get("name", "run"))

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

        return tuple(AdapterInfo(**entry) for entry in self.manifest.get("adapters", ()))

    def adapter(self, name: str | None = None) -> AdapterInfo:
        """One adapter by name; without a name, the only one.

        Raises:
            EmmechError: no such adapter, or several and no name.
        """
        names = [adapter.name for adapter in self.adapters]
        if name is None and len(names) == 1:
            return self.adapters[0]
        if name not in names:
            why = f"the run has {len(names)} adapters" if names else "full fine-tuning has no adapter"
            raise EmmechError(
                f"read an adapter of {self.name}",
                f"adapter={name!r}",
                why,
                closest(name or "", names) if names else "run.projection is its trajectory",
            )
        return self.adapters[names.index(name)]

    def A(self, adapter: str | None = None) -> Float[np.ndarray, "steps *rank d_in"]:
        """A at every recorded step, raw: ``[steps, d_in]`` at rank 1, else ``[steps, rank, d_in]``."""
        return self._side("A", adapter)

    def B(self, adapter: str | None = None) -> Float[np.ndarray, "steps d_out *rank"]:
        """B at every recorded step, raw: ``[steps, d_out]`` at rank 1, else ``[steps, d_out, rank]``."""
        return self._side("B", adapter)

    def _side(self, side: str, adapter: str | None) -> np.ndarray:
        key = f"{side}/{self.adapter(adapter).name}"
        if key not in self._trajectory.keys:
            damaged = getattr(self._trajectory, "damaged", [])
            raise EmmechError(
                f"read {side} of {self.name}",
                f"{[str(path) for path in damaged]}" if damaged else key,
                "the file is damaged" if damaged else f"the run was made without {side}",
                "metrics and probes are still readable" if damaged else "run.B() has the other side",
            )
        return self._trajectory.read(key)

    @property
    def projection(self) -> Float[np.ndarray, "steps k"] | None:
        """Full fine-tuning: a seeded random projection of the update, which keeps its angles and norms.

        None for adapters, whose trajectory is kept whole.
        """
        return self._trajectory.read("projection") if "projection" in self._trajectory.keys else None

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Scalars by step: ``loss``, ``learning_rate``, ``grad_norm``, ``grad_norm_B/<adapter>``, ...

        NaN where a quantity was not measured at that step. Gradient norms are before clipping.
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
        """Files and lines (``metrics.jsonl:17``) whose bytes are not what was written; the rest of the run is usable.

        Every byte of the run is read for this.
        """
        series = (self._trajectory, self.probes._series)
        return tuple(path for one in series if isinstance(one, Series) for path in one.verify()) + self._damaged_lines

    # what it can become

    def weights(self, step: int) -> dict[str, np.ndarray]:
        """All adapters' ``"A/<name>"`` and ``"B/<name>"`` at one step, each 2-D as PEFT keeps them.

        Raises:
            EmmechError: the step was not recorded (the nearest ones are named), or the run is not of adapters.
        """
        self.check_step(step)
        if self.kind != "lora":
            raise EmmechError(
                f"read the adapters of {self.name}",
                f"kind={self.kind!r}",
                "full fine-tuning has no adapter",
                "run.model(step) at a kept step",
            )
        found = {}
        for adapter in self.adapters:
            for side, shape in (("A", (adapter.rank, adapter.d_in)), ("B", (adapter.d_out, adapter.rank))):
                key = f"{side}/{adapter.name}"
                if key not in self._trajectory.keys:
                    raise EmmechError(
                        f"read the adapter {adapter.name}",
                        f"step={step}",
                        f"the run was made without {side}",
                        "Run.from_arrays(steps, A=..., B=...) with both",
                    )
                found[key] = self._trajectory.read_step(key, step).reshape(shape)
        return found

    def check_step(self, step: int) -> None:
        """Refuse a step that was not recorded, naming the nearest recorded ones.

        Raises:
            EmmechError: with up to two nearest steps.
        """
        step = as_int(f"open a step of {self.name}", "step", step)
        if step in self.steps.tolist():
            return
        order = np.argsort(np.abs(self.steps - step), kind="stable")[:2]
        nearest = " and ".join(str(s) for s in sorted(self.steps[order].tolist())) or "none"
        raise EmmechError(
            f"open step {step} of {self.name}",
            f"step={step}",
            f"it was not recorded ({len(self.steps)} steps were, "
            + (f"{self.steps[0]} to {self.steps[-1]})" if len(self.steps) else "none at all)"),
            f"the nearest recorded: {nearest}",
        )

    def model(self, step: int | None = None, scale: float = 1.0, *, base: Any = None) -> ChatModel:
        """The chat model as it was at a recorded step.

        Args:
            step: the last one by default.
            scale: a factor on the adapter; 0 is the base model. Only 1 for full fine-tuning.
            base: the base model in memory, to save loading it again (a model, or a ``ChatModel`` returned by an
                earlier call, whose adapter weights are then swapped in place).

        Raises:
            EmmechError: step not recorded, or ``base`` is another model than the run's.
        """
        from emmech.run.recorded_model import model_at

        return model_at(self, step, scale, base)

    def base(self) -> ChatModel:
        """The model the run started from, loaded by its name.

        Raises:
            EmmechError: the run does not say which it is.
        """
        from emmech.chat.model import load_model
        from emmech.run.recorded_model import base_name

        return load_model(base_name(self))

    def export_peft(self, step: int, folder: str | Path) -> Path:
        """Write one step as an adapter folder that ``PeftModel.from_pretrained`` loads.

        Raises:
            EmmechError: step not recorded, or not a LoRA run.
        """
        from emmech.run.recorded_model import export_adapter

        return export_adapter(self, step, Path(folder))

    def save(self, path: str | Path) -> Run:
        """Write a run that is in memory (or copy one) into a folder, and open it from there."""
        path = Path(path)
        if (path / "run.json").exists():
            raise EmmechError(f"save the run {self.name}", path, "there is a run already", "another folder")
        path.mkdir(parents=True, exist_ok=True)
        from emmech.store import append_jsonl

        for folder, series in (("trajectory", self._trajectory), ("probes", self.probes._series)):
            target = Series(path / folder)
            for step in series.steps.tolist():
                target.append(step, {key: series.read_step(key, step) for key in series.keys})
            target.compact()
        for entry in self._metrics:
            append_jsonl(path / "metrics.jsonl", entry)
        write_json(path / "run.json", self.manifest)
        return load_run(path)

    def push_to_hub(self, repo: str, *, private: bool = True) -> str:
        """Upload the run's folder to the Hugging Face Hub; :func:`load_run` reads it back by ``hub:owner/name``."""
        from huggingface_hub import HfApi

        if self.path is None:
            raise EmmechError(
                f"upload {self.name}", why="it is in memory only", instead="run.save(folder).push_to_hub(repo)"
            )
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=self.path))

    # runs that were not recorded here

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
        """A run from trajectories that already are arrays; the geometric detectors need no model.

        Args:
            steps: ``[steps]``, ascending.
            A: ``[steps, d_in]`` or ``[steps, rank, d_in]``.
            B: ``[steps, d_out]`` or ``[steps, d_out, rank]``.
            metrics: a DataFrame indexed by step (or with a column ``step``), or None.

        Raises:
            EmmechError: lengths differ, steps not ascending, or values that are not finite.
        """
        from emmech.run.importers import read_arrays

        rows: list[dict[str, Any]] = []
        if metrics is not None:
            frame = metrics.set_index("step") if "step" in getattr(metrics, "columns", ()) else metrics
            rows = [{"step": int(step), **row} for step, row in frame.to_dict(orient="index").items()]
        return cls._elsewhere(read_arrays(steps, A, B), name, rows)

    @classmethod
    def from_peft(cls, folders: str | Path | Sequence[str | Path]) -> Run:
        """A run from a series of PEFT checkpoint folders made elsewhere, in any order.

        The step is read from ``trainer_state.json`` or from the folder's name (``checkpoint-120``). The logits of
        ``run.model(step)`` are those of ``PeftModel.from_pretrained``; a folder for which that would not hold is
        refused.

        Args:
            folders: the folders, or one folder that holds them.

        Raises:
            EmmechError: names the folder that is missing, unreadable, of unknown step, a duplicate, of another
                shape than the others, or untrained (B = 0), and the tensor or the field of its configuration that
                makes it more than a plain LoRA adapter.
        """
        from emmech.run.importers import read_peft, series_in

        series = series_in(Path(folders)) if isinstance(folders, str | Path) else [Path(folder) for folder in folders]
        contents, base = read_peft(series)
        run = cls._elsewhere(contents, "peft", [])
        run.manifest["model"] = {"name": base or None}
        return run

    @classmethod
    def _elsewhere(
        cls, contents: tuple[np.ndarray, Mapping[str, np.ndarray], list[Any]], name: str, rows: list[Any]
    ) -> Run:
        steps, arrays, adapters = contents
        manifest = {"format": FORMAT, "kind": "lora", "name": name, "status": "complete", "adapters": adapters}
        return cls(manifest, MemorySeries(steps, arrays), MemorySeries(np.empty(0, np.int64), {}), rows)

    # for people

    def to_frame(self) -> pd.DataFrame:
        """A copy of the metrics by step."""
        return self.metrics.copy()

    def plot(self) -> Any:
        """Norm of B and turn angle by adapter, losses and margins over steps; returns a plotly figure.

        Of more than six adapters the six are drawn whose B is longest at the end.
        """
        from emmech.geometry import local_cosine, norms, turn_angle
        from emmech.view.trajectories import Curve, by_panel

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
                curves.append(Curve(panel, self.name, column.replace("_", " "), series.index, series))
        axes = {
            "norm": ("Norm of B" if self.adapters else "Norm of the update", "step", "||B||"),
            "turn": (f"Turn angle over {k} records either side", "step", "degrees"),
            "loss": ("Loss", "step", "nats per token"),
            "margin": ("Margin of misaligned over aligned answers", "step", "nats per token"),
        }
        return by_panel(curves, axes, f"{self.name}: {len(self.steps)} recorded steps")[0]

    def _card(self) -> Card:
        span = f"{self.steps[0]}..{self.steps[-1]}" if len(self.steps) else "none"
        model = self.manifest.get("model", {}).get("name", "no model")
        data = self.manifest.get("data", {}).get("name", "no data")
        what = ", ".join(f"{a.name} (rank {a.rank})" for a in self.adapters[:3]) or self.kind
        more = f" and {len(self.adapters) - 3} more" if len(self.adapters) > 3 else ""
        known = [*getattr(self._trajectory, "damaged", ()), *self._damaged_lines]
        damaged = f", damaged: {[path.name for path in known]}" if known else ""
        head = f"Run({self.name!r}: {model} on {data}, {what}{more}, steps {span} ({len(self.steps)}){damaged})"
        return Card(head)


def as_run(asked: str, run: Any, *, name: str = "run") -> Run:
    """A run, or the one that is recorded in a folder (or at ``hub:owner/name``).

    Args:
        asked: what cannot be done otherwise, as in :class:`EmmechError`.
        name: of the argument.

    Raises:
        EmmechError: something else, or a folder that holds no run.
    """
    found = opened(run)
    if isinstance(found, Run):
        return found
    instead = "emmech.load_run(folder), or emmech.Run.from_arrays(steps, B=...)"
    if isinstance(run, str | os.PathLike) and (beside := _beside(Path(run))):
        instead = closest(Path(run).name, beside)
    raise EmmechError(asked, f"{name}={run!r}"[:120], "it is not a run, nor a folder that holds one", instead)


def opened(model: Any) -> Any:
    """The run in a folder, where one is named; anything else, such as a model or its name, as it is."""
    if isinstance(model, str) and model.startswith("hub:"):
        return load_run(model)
    if isinstance(model, str | os.PathLike) and (Path(model) / "run.json").is_file():
        return load_run(Path(model))
    return model


def _beside(folder: Path) -> list[str]:
    """Names of the runs that are beside a folder."""
    return sorted(entry.parent.name for entry in folder.parent.glob("*/run.json"))


def load_run(path: str | Path) -> Run:
    """Open a recorded run, in milliseconds: nothing but the manifest and the index is read.

    Args:
        path: the run's folder, or ``hub:owner/name``.

    Raises:
        EmmechError: not a run, or of a newer format.
    """
    if isinstance(path, str) and path.startswith("hub:"):
        from huggingface_hub import snapshot_download

        path = snapshot_download(path.removeprefix("hub:"))
    check_folder("open the run", "path", path)
    folder = Path(path)
    manifest_path = folder / "run.json"
    if not manifest_path.is_file():
        beside = _beside(folder)
        raise EmmechError(
            "open the run",
            folder,
            "there is no run.json in it" if folder.is_dir() else "there is no such folder",
            closest(folder.name, beside) if beside else "the folder given to finetune(..., out=...)",
        )
    import json

    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise EmmechError("open the run", manifest_path, f"it is damaged: {error}", "restore run.json")
    if manifest.get("format", 0) > FORMAT:
        raise EmmechError(
            "open the run",
            f"format {manifest['format']}",
            f"this emmech reads formats up to {FORMAT}",
            "upgrade emmech",
        )
    damaged: list[Path] = []
    metrics = read_jsonl(folder / "metrics.jsonl", damaged)
    return Run(manifest, Series(folder / "trajectory"), Series(folder / "probes"), metrics, folder, damaged)


def _check_manifest(manifest: Any) -> None:
    """Raise ValueError where an entry that is read later is of another kind."""
    kinds = {"format": int, "kind": str, "name": str, "model": dict, "data": dict, "recipe": dict, "adapters": list}
    if not isinstance(manifest, dict):
        raise ValueError("it is no JSON object")
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key, kind()), kind):
            raise ValueError(f"{key} is a {type(manifest[key]).__name__}, not a {kind.__name__}")
    for entry in manifest.get("adapters", ()):
        numbers = [entry[key] for key in ("layer", "rank", "alpha", "scaling", "d_in", "d_out")]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"the numbers of the adapter {entry.get('name')} are {numbers}")
