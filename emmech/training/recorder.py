"""The Recorder: a ``TrainerCallback`` that writes a Run while any Trainer trains.

It only reads. Losses and weights are bit for bit those of the same training without it: no
random number is drawn from the global generators, and the model's mode is restored.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerState

from emmech.chat.families import find_family
from emmech.chat.model import ChatModel, load_model
from emmech.chat.shards import apart, in_shards, kind, own_part, whole
from emmech.engine.adapters import AdapterInfo, adapter_layers, bare
from emmech.engine.modules import hooked
from emmech.engine.stream import mean_residual, probe_rows
from emmech.errors import EmmechError, check_folder, check_texts
from emmech.measures.choose import as_measures
from emmech.measures.measure import measure_all
from emmech.run.run import FORMAT, is_metrics
from emmech.store import Series, append_jsonl, drop_files, read_jsonl, save_tensors, write_json, write_jsonl, writing
from emmech.transition.watch import EarlyWarning, as_watch

_SKETCH = 16


class Capture:
    """Reads a trajectory's tensors and scalars from a model in training."""

    kind: str
    adapters: tuple[AdapterInfo, ...] = ()

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors that are recorded at a step."""
        raise NotImplementedError

    def scalars(self) -> dict[str, float]:
        """The numbers that are added to the metrics."""
        return {}

    def watched(self) -> dict[str, nn.Parameter]:
        """Parameters whose gradient norms are recorded, by metric name."""
        return {}


class LoraCapture(Capture):
    """A ``[rank, d_in]`` and B ``[d_out, rank]`` of every pair, squeezed to vectors at rank 1.

    Anything added here is recorded wherever adapters train: in any Trainer and in each of several runs.

    Args:
        pairs: each adapter with its A and B.
    """

    kind = "lora"

    def __init__(self, pairs: Sequence[tuple[AdapterInfo, nn.Parameter, nn.Parameter]]) -> None:
        self._pairs = pairs
        self.adapters = tuple(info for info, _, _ in pairs)

    def tensors(self) -> dict[str, np.ndarray]:
        """``"A/<adapter>"`` and ``"B/<adapter>"`` in float32."""
        found = {}
        for info, *sides in self._pairs:
            a, b = map(whole, sides)
            a, b = (a[0], b[:, 0]) if info.rank == 1 else (a, b)
            found[f"A/{info.name}"], found[f"B/{info.name}"] = _float32(a), _float32(b)
        return found

    def watched(self) -> dict[str, nn.Parameter]:
        """A and B of every pair, if they train."""
        return {
            f"grad_norm_{side}/{info.name}": parameter
            for info, *sides in self._pairs
            for side, parameter in zip("AB", sides, strict=True)
            if parameter.requires_grad
        }


class FullCapture(Capture):
    """The update of all trained weights, as a seeded projection, and its norm by block.

    Args:
        start: copies of the weights before training, on the CPU; by default the current weights.
        writes: False in a process that only takes part in gathering the weights, and needs no copy of them.
    """

    kind = "full"

    def __init__(
        self, model: nn.Module, *, seed: int, start: Mapping[str, torch.Tensor] | None = None, writes: bool = True
    ) -> None:
        self.weights = {bare(name): p for name, p in model.named_parameters() if p.requires_grad}
        known, self.start, self._seed = start or {}, {}, seed
        for name, parameter in self.weights.items():
            value = whole(parameter.detach())  # in every process, whether it is known there or not
            if writes:
                self.start[name] = known[name] if name in known else value.cpu().clone()

    def copies(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, on the CPU."""
        found = {}
        for name, parameter in self.weights.items():
            value = whole(parameter.detach())
            if name in self.start:
                found[name] = value.cpu().contiguous().clone()
        return found

    def _updates(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.weights.items():
            value = whole(parameter.detach())
            if name in self.start:
                yield name, value.cpu().float() - self.start[name].float()

    def tensors(self) -> dict[str, np.ndarray]:
        """``"projection" [k]``, with k = 256 per matrix and 16 per vector."""
        generator = torch.Generator().manual_seed(self._seed)  # made anew, so that P and Q are the same at every step
        parts = []
        with torch.no_grad():
            for _, update in self._updates():
                rows = update.reshape(-1, update.shape[-1])
                right = torch.randn(rows.shape[1], _SKETCH, generator=generator) / _SKETCH**0.5
                sketch = rows @ right
                if rows.shape[0] > 1:
                    left = torch.randn(_SKETCH, rows.shape[0], generator=generator) / _SKETCH**0.5
                    sketch = left @ sketch
                parts.append(sketch.reshape(-1))
        return {"projection": torch.cat(parts).numpy()} if parts else {}

    def scalars(self) -> dict[str, float]:
        """``update_norm/<block>``, the exact Frobenius norm of the update by block, and that of the whole update."""
        squares: dict[str, float] = {}
        with torch.no_grad():
            for name, update in self._updates():
                parts = name.split(".")
                place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
                group = f"{parts[place - 1]}.{parts[place]}" if place else parts[-2]
                squares[group] = squares.get(group, 0.0) + float(update.double().square().sum())
        norms = {f"update_norm/{group}": value**0.5 for group, value in squares.items()}
        return {"update_norm": sum(squares.values()) ** 0.5, **norms}


def find_capture(
    model: Any, *, seed: int = 0, start: Mapping[str, torch.Tensor] | None = None, writes: bool = True
) -> Capture:
    """LoRA pairs if the model has any, else the weights that require a gradient.

    Args:
        writes: False in a process that only takes part in gathering the weights.

    Raises:
        EmmechError: nothing trains, something other than the LoRA pairs trains too, adapters are no plain pairs, or
            weights are in shards of another kind than those of FSDP 2 (FSDP 1, DeepSpeed, tensor parallelism).
    """
    asked = "record the training"
    if refused := _unreadable(model):
        raise EmmechError(asked, *refused, "FSDP 2, fsdp_config={'version': 2} or --fsdp_version 2, or DDP")
    pairs = [
        (info, layer.lora_A[name].weight, layer.lora_B[name].weight) for info, layer, name in adapter_layers(model)
    ]
    kept = {id(parameter) for _, *sides in pairs for parameter in sides}
    trained = {name: id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        given = f"{len(pairs)} LoRA pairs, all of them frozen" if pairs else f"a {type(model).__name__}"
        instead = "PeftModel.from_pretrained(model, folder, is_trainable=True), or parameter.requires_grad_(True)"
        raise EmmechError(asked, given, "nothing in the model requires a gradient, so that nothing trains", instead)
    if pairs and (others := [name for name, one in trained.items() if one not in kept]):
        raise _trains_too(others)
    return LoraCapture(pairs) if pairs else FullCapture(model, seed=seed, start=start, writes=writes)


def _unreadable(model: nn.Module) -> tuple[str, str] | None:
    """The first weight that the processes cannot put together here, and why; None if all can be read."""
    asunder = "each process has a part of the weights or of their gradients only"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":  # accelerate sets this if it is in use
        return "DeepSpeed", asunder
    shards = in_shards(model)
    if shards:
        apart(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            return f"{name} (DeepSpeed)", asunder
        if hasattr(parameter, "_fsdp_flattened"):
            return f"{name} (FSDP 1)", "FSDP 1 makes one flat vector of the weights of many modules"
        if hasattr(parameter, "device_mesh") and not shards:
            return f"{name} (tensor parallelism)", asunder
        if hasattr(parameter, "device_mesh") and parameter.device_mesh.ndim > 1:
            return f"{name} (FSDP on a mesh of {parameter.device_mesh.ndim} dimensions)", "its shards are not over all"
        if shards and parameter.requires_grad and not hasattr(parameter, "device_mesh"):
            return f"{name} (beside weights in FSDP's shards)", "FSDP does not reduce its gradient"
    return None


def _trains_too(names: Sequence[str]) -> EmmechError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    why = "it trains beside the LoRA pairs, of which A and B alone are recorded"
    instead = "freeze it: parameter.requires_grad_(False), bias='none', no modules_to_save"
    return EmmechError("record the training", f"{', '.join(names[:3])}{more}", why, instead)


def _processes() -> int:
    """The number of processes that train together."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _from_first(value: Any) -> Any:
    """In every process, the value that the first one has."""
    if _processes() == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def _together(call: Callable[[], object]) -> None:
    """Call a function; what it raises in the first process is raised in all of them, so that none waits for another."""
    failed = None
    try:
        call()
    except Exception as error:
        failed = error
    if (failed := _from_first(failed) or failed) is not None:
        raise failed


class GradientNorms:
    """Norms of accumulated gradients at the end of backward, that is, before the Trainer clips them.

    ``on_pre_optimizer_step`` sees gradients that are already clipped. A post-accumulate hook runs during backward,
    after each micro-batch, and the last one before the optimizer step sees the whole gradient. Where several processes
    train, each has only its own part of the gradient at that time, and the norms are computed at the end of backward,
    once the parts are reduced. The norms stay on the device until they are read, so that no step waits for them.
    """

    def __init__(self, watched: dict[str, nn.Parameter]) -> None:
        self._norms: dict[str, torch.Tensor] = {}
        self._watched, self._late, self._asked = watched, _processes() > 1, False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._keep(name)) for name, parameter in watched.items()
        ]

    def _keep(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self._late and not self._asked:
                self._asked = True
                # the reduction ends in a callback that is queued before this one
                _after_backward(lambda: _after_backward(self._take))
            elif parameter.grad is not None and not self._late:
                self._norms[name] = torch.linalg.vector_norm(parameter.grad)

        return hook

    def _take(self) -> None:
        self._asked = False
        for name, parameter in self._watched.items():
            if parameter.grad is not None:
                self._norms[name] = torch.linalg.vector_norm(parameter.grad)

    def read(self) -> dict[str, float]:
        """The norms of the last step's gradients."""
        return {name: float(norm) for name, norm in self._norms.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class ShardedNorms(GradientNorms):
    """The same where each process has a shard of every gradient; :meth:`read` has to be called in all of them.

    FSDP sets the gradients without the parameters' hooks, in a callback that it queues when backward reaches the
    model's output. A hook on the same output queues another one, which runs after it.
    """

    def __init__(self, watched: dict[str, nn.Parameter], model: nn.Module) -> None:
        super().__init__({})
        self._watched = watched
        self._held = contextlib.ExitStack()
        self._held.enter_context(hooked((model, self._forward)))

    def close(self) -> None:
        """Remove the hook."""
        self._held.close()

    def _forward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._backward)

    def _backward(self, _gradient: torch.Tensor) -> None:
        if not self._asked:
            self._asked = True
            _after_backward(lambda: _after_backward(self._take))

    def _take(self) -> None:
        self._asked = False
        for name, parameter in self._watched.items():
            if parameter.grad is not None:
                self._norms[name] = torch.linalg.vector_norm(own_part(parameter.grad))

    def read(self) -> dict[str, float]:
        """The norms of the last step's gradients."""
        if not self._watched:
            return {}
        one = next(iter(self._watched.values()))
        found = torch.zeros(2, len(self._watched), dtype=torch.float64, device=own_part(one).device)
        for place, name in enumerate(self._watched):
            if name in self._norms:
                found[0, place], found[1, place] = self._norms[name].double() ** 2, 1
        torch.distributed.all_reduce(found, group=one.device_mesh.get_group())  # type: ignore[attr-defined]
        pairs = zip(self._watched, found.T.tolist(), strict=True)
        return {name: square**0.5 for name, (square, known) in pairs if known}


def _after_backward(call: Callable[[], None]) -> None:
    """Call a function at the end of the current backward pass, after the callbacks that are already queued."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).numpy()


_PACKAGES = ("emmech", "torch", "transformers", "peft", "accelerate", "trl", "numpy", "tokenizers")


class Recorder(TrainerCallback):
    """Record a training into a Run folder.

    The following is recorded:

    - ``on_train_begin``: the manifest, and step 0 (B = 0 for a new adapter);
    - in every backward pass: the gradient norm of each A and B, before clipping;
    - ``on_step_end`` (after the optimizer step), every ``every`` steps and at the last one: A and B of every
      adapter, or the projected update in full fine-tuning; every ``measure_every`` steps also probes and measures;
    - ``on_log``: everything that the Trainer logs (set ``logging_steps=1`` for the loss of every step); with its
      summary at the end also the last step of a training that stopped early, before the best weights are restored;
    - ``on_train_end``: the trajectory is stacked into one file and the run marked complete.

    A training that dies leaves a readable run of all steps until then. Where several processes train together (DDP or
    FSDP 2), the first one writes, and gradient norms are those after the reduction. Under FSDP 2 all of them gather
    what is recorded and run the probes, and measures are refused. Trained parts that cannot be recorded (biases,
    norms or heads in addition to LoRA pairs, other kinds of adapters) are refused when the training begins.

    Args:
        path: the run's folder; it must not hold a run, unless the Trainer resumes from a checkpoint.
        probes: texts (strings, asked as user turns) or conversations (whose answers count) whose mean residual per
            layer is recorded: a list, or named lists ``{"narrow": [...], "broad": [...]}``.
        measures: measures of the model while it trains, as in :func:`emmech.sweep`: measures, or functions
            by name, ``{"entropy": chat_model -> float}``; their means become metrics.
        every: the number of steps from one recording to the next.
        measure_every: the same for probes and measures, which by default are taken about 20 times in a training; each
            time at the first recorded step that is due.
        on_transition: what happens at the first sign that answers outside the training data turn misaligned:
            ``"warn"``, ``"stop"``, or a function of the :class:`~emmech.transition.EarlyWarning`; a
            :class:`~emmech.transition.Watch` also says what is watched, by default the norm of the gradient of all B.
            A training that is stopped is whole, its manifest says why it ended, and a Trainer keeps its state so that
            it can go on from there.
        manifest: more entries for the manifest.
        keep: in full fine-tuning, the steps whose whole weights are kept in addition to the last.
        seed: the seed of the projection in full fine-tuning.

    Example:
        ``SFTTrainer(..., callbacks=[emmech.Recorder("checkpoints/my-run")]).train()``, then
        ``run = emmech.load_run("checkpoints/my-run")``.
    """

    watch = GradientNorms  # the class that keeps the gradient norms of the captured parameters

    def __init__(
        self,
        path: str | Path,
        *,
        probes: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
        measures: Any = None,
        every: int = 1,
        measure_every: int | None = None,
        on_transition: Any = None,
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
        self._watch = as_watch(on_transition)
        self._watched: list[float] = []  # what is watched, whenever it was measured
        self.warning: EarlyWarning | None = None
        self.stopped = False  # whether the warning ends the training
        self._extra = dict(manifest or {})
        self._keep, self._seed = tuple(keep), seed
        # in the process that writes, or, where weights are in shards, in all of them; while the training lasts
        self._gradients: GradientNorms | None = None
        self._writes = self._shards = False
        self._finished = False
        self._resumed = False
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._held = contextlib.ExitStack()  # the folder's lock, while the training lasts
        self._start: Mapping[str, torch.Tensor] | None = None  # weights, in full fine-tuning
        self.again = False  # whether a training that died before its first checkpoint is recorded anew

    # the Trainer's events

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the starting weights of full fine-tuning, before a Trainer that resumes loads its checkpoint."""
        with contextlib.suppress(EmmechError):  # what cannot be recorded is refused when the training begins
            capture = find_capture(kwargs["model"], writes=state.is_world_process_zero)
            self._start = getattr(capture, "start", None)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the manifest and record step 0 (or, when resuming, delete what will be recorded again)."""
        model = kwargs["model"]
        self._frozen = []
        self._writes, self._shards = state.is_world_process_zero, in_shards(model)
        if "capture" in kwargs:  # emmech's own training selects one run of several
            self._capture: Capture = kwargs["capture"]
        else:
            self._capture = find_capture(model, seed=self._seed, start=self._start, writes=self._writes)
            self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._start = None
        # all processes know of a failure of the first one before they gather anything together
        _together(lambda: self._prepare(state, **kwargs))
        _together(lambda: self._open(state))
        self._resumed = _from_first(self._resumed)
        _together(lambda: self._describe(args, state, **kwargs))
        _together(lambda: self._begin(state, model))

    def _prepare(self, state: TrainerState, *, model: Any, **kwargs: Any) -> None:
        """Make ready what is taken of the model."""
        self._finished, self._chat = False, None
        if self.measure_every is None:
            self.measure_every = self._every * max(1, round(state.max_steps / (20 * self._every)))
        if not (self._texts or self._measures) or not (self._writes or self._shards):
            return
        if self._shards and self._measures:
            given = f"{len(self._measures)} measures, and weights in the shards of FSDP"
            why = "a measure may run any part of the model, and a part alone does not get its weights together"
            instead = "measure the run afterwards, emmech.sweep(run, ...), or train with DDP; probes are recorded"
            raise EmmechError("record the training", given, why, instead)
        tokenizer = kwargs.get("processing_class") or kwargs.get("tokenizer")
        # no family is needed to read adapters, so an architecture unknown to emmech can be recorded too
        if self._shards:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            self._chat = ChatModel(model, tokenizer, str(base.name_or_path), find_family(base))
        else:
            self._chat = kwargs.get("chat") or load_model(model, tokenizer)
        data = self._extra.get("data", {}).get("name", "")
        self._measures = as_measures(self._measures, self._chat, data=data) if self._measures else []
        self._probe_rows = {name: probe_rows(self._chat, texts) for name, texts in self._texts.items()}

    def _open(self, state: TrainerState) -> None:
        """Take the folder."""
        if not self._writes:
            return
        self._held.enter_context(writing(self.path, "record the training"))
        self._trajectory = Series(self.path / "trajectory")
        self._probes = Series(self.path / "probes")
        known = (self.path / "run.json").exists()
        self._resumed = state.global_step > 0 and known
        if self._resumed or (known and self.again):
            self._forget_after(state.global_step if self._resumed else -1)
        elif known:
            why = "there is a run in it already"
            raise EmmechError("record the training", f"path={self.path}", why, "another folder, or delete that one")

    def _describe(self, args: Any, state: TrainerState, *, model: Any, **kwargs: Any) -> None:
        """Write the manifest, or read that of the training that resumes."""
        self.warning, self.stopped, self._watched = None, False, []
        if self._resumed and self._writes:
            self._remember(state.global_step)
        elif not self._resumed and (self._writes or self._shards):
            tokenizer = kwargs.get("processing_class") or kwargs.get("tokenizer")
            self._write_manifest(model, tokenizer, args, state, kwargs.get("train_dataloader"))

    def _begin(self, state: TrainerState, model: Any) -> None:
        """Watch the gradients, and record the start."""
        if self._writes or self._shards:
            watched = self._capture.watched()
            self._gradients = ShardedNorms(watched, model) if self._shards else self.watch(watched)
            if not self._resumed:
                self._record(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Record the step that the optimizer just took, if it is one to record."""
        if late := [name for name, parameter in self._frozen if parameter.requires_grad]:
            raise _trains_too(late)
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        if self._gradients is not None:  # else another process records
            self._record(state.global_step, last=state.global_step == state.max_steps)
        if self._watch is not None:
            self.stopped = _from_first(self.stopped)
        self._stop(control)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the numbers that the Trainer logs; its summary shows that the last step has been taken."""
        if self._gradients is None:
            return
        logs = kwargs.get("logs") or {}
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        if "train_runtime" in numbers:  # logged once, before the best weights are restored
            self._finish(state.global_step)
        # the summary describes the whole training, not a step
        numbers = {name: one for name, one in numbers.items() if not name.startswith(("train_", "total_flos"))}
        if numbers and self._writes:
            append_jsonl(self.path / "metrics.jsonl", {"step": state.global_step, **numbers})
            self._look(state.global_step, numbers)
            if _processes() == 1:
                self._stop(control)

    def _look(self, step: int, numbers: Mapping[str, float]) -> None:
        """Give the warning once, if what was measured at this step calls for it."""
        if self._watch is None or self.warning is not None or (value := self._watch.value(numbers)) is None:
            return
        self._watched.append(value)
        self.warning = self._watch.look(str(self.path), step, self._watched)
        if self.warning is not None:
            self._note(warning=self.warning.to_dict())
            self.stopped = self._watch.tell(self.warning)

    def _stop(self, control: Any) -> None:
        if self.stopped:
            control.should_training_stop = control.should_save = True

    def _remember(self, step: int) -> None:
        """In a training that resumes at this step: the warning until then, which is not given again."""
        manifest = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        known = manifest.pop("warning", None)
        if known is not None and known["step"] <= step:
            self.warning = EarlyWarning(**known)
            manifest["warning"] = known
        write_json(self.path / "run.json", manifest | {"status": "training"})
        if self._watch is not None:
            values = map(self._watch.value, read_jsonl(self.path / "metrics.jsonl"))
            self._watched = [value for value in values if value is not None]

    def _note(self, **entries: Any) -> None:
        """Add entries to the manifest."""
        manifest = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        write_json(self.path / "run.json", manifest | entries)

    def _finish(self, step: int) -> None:
        """Record the last step while the model is still in that state."""
        if self._finished:
            return
        self._finished = True
        known = self._writes and step in self._trajectory.steps
        if not (_from_first(known) if self._shards else known):  # stopped early by another callback
            self._record(step, last=True)
        if isinstance(self._capture, FullCapture) and step not in self._keep:
            self._save_weights(step, self._capture.copies())

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stack the trajectory and mark the run complete."""
        if self._gradients is None:
            return
        self._finish(state.global_step)
        if self._writes:
            self._trajectory.compact()
            self._probes.compact()
            status = "stopped" if self.stopped else "complete"
            self._note(status=status, seconds=round(time.monotonic() - self._began, 2))
        self.close()

    def close(self) -> None:
        """Remove the gradient hooks and release the folder, which is only needed after a training that died."""
        self._held.close()
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None

    # what is recorded

    def measures_at(self, step: int, last: int) -> bool:
        """Whether probes and measures are taken at a step of a training that ends at step ``last``."""
        assert self.measure_every is not None
        due = step // self.measure_every > (step - self._every) // self.measure_every
        return step == last or (due and step % self._every == 0)

    def _record(self, step: int, *, last: bool = False) -> None:
        assert self._gradients is not None
        # gathered before anything is written, so that no process waits for one that cannot write
        tensors = self._capture.tensors()
        scalars = {**self._gradients.read(), **self._capture.scalars()}
        measures = self.measures_at(step, step if last else -1)
        probes = self._probe() if measures else {}
        kept = self._capture if step in self._keep and isinstance(self._capture, FullCapture) else None
        copies = kept.copies() if kept is not None else {}
        if not self._writes:
            return
        self._trajectory.append(step, tensors)
        if probes:
            self._probes.append(step, probes)
        if measures:
            scalars |= self._measure()
        if scalars:
            append_jsonl(self.path / "metrics.jsonl", {"step": step, **scalars})
            self._look(step, scalars)
        if copies:
            self._save_weights(step, copies)

    def _probe(self) -> dict[str, np.ndarray]:
        """The mean residual of every layer on each set of texts."""
        if self._chat is None or not self._probe_rows:
            return {}
        with untouched_randomness():
            return {name: mean_residual(self._chat, rows) for name, rows in self._probe_rows.items()}

    def _measure(self) -> dict[str, float]:
        if self._chat is None or not self._measures:
            return {}
        try:
            with untouched_randomness():
                return measure_all(self._chat, self._measures).means()
        except EmmechError as error:
            why = f"{error.why}; the steps until then are recorded"
            raise EmmechError(error.asked, error.given, why, error.instead)

    def _save_weights(self, step: int, copies: Mapping[str, torch.Tensor]) -> None:
        if self._writes:
            file = self.path / "weights" / f"step-{step:06d}.safetensors"
            save_tensors(copies, file, f"keep the weights of step {step}")

    def _forget_after(self, step: int) -> None:
        self._trajectory.drop_after(step)
        self._probes.drop_after(step)
        drop_files(self.path / "weights", after=step)
        kept = [row for row in read_jsonl(self.path / "metrics.jsonl", sound=is_metrics) if row["step"] <= step]
        write_jsonl(self.path / "metrics.jsonl", kept)
        self._began = time.monotonic()

    def _write_manifest(self, model: Any, tokenizer: Any, args: Any, state: TrainerState, loader: Any) -> None:
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
                "architecture": kind(base),
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
        if self._writes:
            write_json(self.path / "run.json", entries)


def named_texts(probes: Any) -> dict[str, Sequence[Any]]:
    """Probe texts by name; a single list is called ``"probe"``."""
    if probes is None or (isinstance(probes, Sequence | Mapping) and not probes):
        return {}
    several = isinstance(probes, Mapping)
    named = dict(probes) if several else {"probe": probes}
    for name, texts in named.items():
        check_texts("record the training", f"probes[{name!r}]" if several else "probes", texts)
    return named


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restore the random generators of Python, numpy and torch afterwards."""
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
