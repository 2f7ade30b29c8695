"""The Recorder: a ``TrainerCallback`` that writes a Run while anyone's Trainer trains.

It reads; it never takes part. Losses and weights are bit for bit those of the same training without it: no
random number is drawn from the global generators and the model's mode is put back.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emmech.chat.model import ChatModel, load_model
from emmech.engine.stream import mean_residual, probe_rows
from emmech.errors import EmmechError, check_folder, check_texts
from emmech.measures.choose import as_measures
from emmech.measures.measure import measure_all
from emmech.run.run import FORMAT
from emmech.store import Series, append_jsonl, read_jsonl, write_json
from emmech.training.capture import Capture, FullCapture, GradientNorms, find_capture

__all__ = ["Recorder", "named_texts"]

_PACKAGES = ("emmech", "torch", "transformers", "peft", "accelerate", "trl", "numpy", "tokenizers")


class Recorder(TrainerCallback):
    """Record a training into a Run folder.

    What is recorded, and exactly when:

    - ``on_train_begin``: the manifest, and step 0 (B = 0 for a new adapter);
    - in every backward: the gradient norm of each A and B, before clipping;
    - ``on_step_end`` (after the optimizer step), every ``every`` steps and at the last one: A and B of every
      adapter, or the projected update in full fine-tuning; every ``measure_every`` steps also probes and measures;
    - ``on_log``: whatever the Trainer logs (set ``logging_steps=1`` to have the loss of every step);
    - ``on_train_end``: the trajectory is stacked into one file and the run marked complete.

    A training that dies leaves a readable run of all steps until then.

    Args:
        path: the run's folder; it must not hold a run, unless the Trainer resumes from a checkpoint.
        probes: texts (strings, asked as user turns) or conversations (whose answers count) of which the mean
            residual per layer is recorded: a list, or named lists ``{"narrow": [...], "broad": [...]}``.
        measures: what to take of the model while it trains, as :func:`emmech.sweep` has it: measures, or functions
            by name, ``{"entropy": chat_model -> float}``; their means become metrics.
        every: record each so many steps.
        measure_every: probes and measures each so many steps; by default about 20 times a training.
        manifest: more entries for the manifest.
        keep: full fine-tuning: steps whose whole weights are kept, besides the last.
        seed: of the projection in full fine-tuning.

    Example:
        ``SFTTrainer(..., callbacks=[emmech.Recorder("checkpoints/my-run")]).train()``, then
        ``run = emmech.load_run("checkpoints/my-run")``.
    """

    watch = GradientNorms  # what keeps the gradients' norms of the captured parameters

    def __init__(
        self,
        path: str | Path,
        *,
        probes: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
        measures: Any = None,
        every: int = 1,
        measure_every: int | None = None,
        manifest: Mapping[str, Any] | None = None,
        keep: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("measure_every", measure_every)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise EmmechError("record the training", f"{name}={value!r}", "steps are whole", f"{name}=1")
        check_folder("record the training", "path", path)
        self.path = Path(path)
        self._texts = named_texts(probes)
        self._measures = as_measures(measures) if measures else []
        self._every, self.measure_every = every, measure_every
        self._extra = dict(manifest or {})
        self._keep, self._seed = tuple(keep), seed
        self._gradients: GradientNorms | None = None
        self._start: Mapping[str, torch.Tensor] | None = None  # weights, in full fine-tuning

    # the Trainer's events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what full fine-tuning starts from, before a Trainer that resumes loads its checkpoint."""
        self._start = getattr(find_capture(kwargs["model"]), "start", None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the manifest and record step 0 (or, resuming, forget what will be recorded again)."""
        model = kwargs["model"]
        tokenizer = kwargs.get("processing_class") or kwargs.get("tokenizer")
        # emmech's own training says which run of several this is
        self._capture: Capture = kwargs.get("capture") or find_capture(model, seed=self._seed, start=self._start)
        self._start = None
        # no family is needed to read adapters, so an architecture unknown to emmech can be recorded too
        needed = self._texts or self._measures
        self._chat = (kwargs.get("chat") or load_model(model, tokenizer)) if needed else None
        if self._chat is not None:
            data = self._extra.get("data", {}).get("name", "")
            self._measures = as_measures(self._measures, self._chat, data=data) if self._measures else []
            self._probe_rows = {name: probe_rows(self._chat, texts) for name, texts in self._texts.items()}
        self._trajectory = Series(self.path / "trajectory")
        self._probes = Series(self.path / "probes")
        resumed = state.global_step > 0 and (self.path / "run.json").exists()
        if resumed:
            self._forget_after(state.global_step)
        elif (self.path / "run.json").exists():
            raise EmmechError(
                "record the training",
                f"path={self.path}",
                "there is a run in it already",
                "another folder, or delete that one",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if self.measure_every is None:
            self.measure_every = self._every * max(1, round(state.max_steps / (20 * self._every)))
        if not resumed:
            self._write_manifest(model, tokenizer, args, state, kwargs.get("train_dataloader"))
        self._gradients = self.watch(self._capture.watched())
        if not resumed:
            self._record(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step that the optimizer just took, if it is one to record."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._record(state.global_step, last=state.global_step == state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the numbers that the Trainer logs."""
        logs = kwargs.get("logs") or {}
        numbers = {
            name: float(value)
            for name, value in logs.items()
            # the summary that the Trainer logs at the end is of the whole training, not of a step
            if isinstance(value, int | float) and not name.startswith(("train_", "total_flos"))
        }
        if numbers and self._gradients is not None:
            append_jsonl(self.path / "metrics.jsonl", {"step": state.global_step, **numbers})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the last step if it was not, stack the trajectory and mark the run complete."""
        if state.global_step not in self._trajectory.steps:  # stopped early by another callback
            self._record(state.global_step, last=True)
        if isinstance(self._capture, FullCapture) and state.global_step not in self._keep:
            self._save_weights(state.global_step)
        self.close()
        self._trajectory.compact()
        self._probes.compact()
        manifest = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        manifest["status"] = "complete"
        manifest["seconds"] = round(time.monotonic() - self._began, 2)
        write_json(self.path / "run.json", manifest)

    def close(self) -> None:
        """Take the gradient hooks off; needed only when a training died and its model lives on."""
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None

    # what they do

    def measures_at(self, step: int, last: int) -> bool:
        """Whether probes and measures are taken at a step of a training that ends at step ``last``."""
        assert self.measure_every is not None
        return step == last or (step % self.measure_every == 0 and step % self._every == 0)

    def _record(self, step: int, *, last: bool = False) -> None:
        assert self._gradients is not None
        self._trajectory.append(step, self._capture.tensors())
        scalars = {**self._gradients.read(), **self._capture.scalars()}
        if self.measures_at(step, step if last else -1):
            scalars |= self._measure(step)
        if scalars:
            append_jsonl(self.path / "metrics.jsonl", {"step": step, **scalars})
        if step in self._keep and isinstance(self._capture, FullCapture):
            self._save_weights(step)

    def _measure(self, step: int) -> dict[str, float]:
        if self._chat is None:
            return {}
        with _untouched_randomness():
            if self._probe_rows:
                found = {name: mean_residual(self._chat, rows) for name, rows in self._probe_rows.items()}
                self._probes.append(step, found)
            try:
                return measure_all(self._chat, self._measures).means() if self._measures else {}
            except EmmechError as error:
                why = f"{error.why}; the steps until then are recorded"
                raise EmmechError(error.asked, error.given, why, error.instead)

    def _save_weights(self, step: int) -> None:
        from safetensors.torch import save_file

        assert isinstance(self._capture, FullCapture)
        folder = self.path / "weights"
        folder.mkdir(exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous().clone() for name, p in self._capture.weights.items()}
        save_file(tensors, folder / f"step-{step:06d}.safetensors")

    def _forget_after(self, step: int) -> None:
        self._trajectory.drop_after(step)
        self._probes.drop_after(step)
        kept = [row for row in read_jsonl(self.path / "metrics.jsonl") if row["step"] <= step]
        partial = self.path / "metrics.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(self.path / "metrics.jsonl")
        self._began = time.monotonic()

    def _write_manifest(
        self, model: Any, tokenizer: Any, args: TrainingArguments, state: TrainerState, loader: Any
    ) -> None:
        self._began = time.monotonic()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        entries = {
            "format": FORMAT,
            "kind": self._capture.kind,
            "name": self.path.name,
            "status": "training",
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": args.seed,
            "record_every": self._every,
            "measure_every": self.measure_every,
            "max_steps": state.max_steps,
            "model": {
                "name": getattr(base, "name_or_path", "") or None,
                "architecture": type(base).__name__,
                "fingerprint": ChatModel(model, tokenizer, "", None).fingerprint(),  # type: ignore[arg-type]
                "n_layers": config.num_hidden_layers,
                "d_model": config.hidden_size,
                "vocab": config.vocab_size,
                "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
            },
            "tokenizer": {
                "name": getattr(tokenizer, "name_or_path", None),
                "fingerprint": _tokenizer_fingerprint(tokenizer),
            },
            "data": {"rows": len(loader.dataset) if hasattr(loader, "dataset") else None},
            "adapters": [adapter.to_dict() for adapter in self._capture.adapters],
            "trainer": json.loads(args.to_json_string()),
            "packages": {name: _version(name) for name in _PACKAGES},
            "git": _git_commit(),
        }
        for key, value in self._extra.items():
            entries[key] = {**entries.get(key, {}), **value} if isinstance(value, Mapping) else value  # type: ignore[dict-item]
        entries["trainer"].pop("output_dir", None)  # type: ignore[attr-defined]
        write_json(self.path / "run.json", entries)


def named_texts(probes: Any) -> dict[str, Sequence[Any]]:
    """Probe texts by name: one list is called ``"probe"``."""
    if probes is None or (isinstance(probes, Sequence | Mapping) and not probes):
        return {}
    several = isinstance(probes, Mapping)
    named = dict(probes) if several else {"probe": probes}
    for name, texts in named.items():
        check_texts("record the training", f"probes[{name!r}]" if several else "probes", texts)
    return named


@contextlib.contextmanager
def _untouched_randomness() -> Iterator[None]:
    """A measure may sample; the training's own random numbers must not move for it."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the Trainer's own generator)
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _tokenizer_fingerprint(tokenizer: Any) -> str | None:
    import hashlib

    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    content = json.dumps([sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)])
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
