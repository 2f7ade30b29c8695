"""One recorded step as something that runs: a chat model in memory, or an adapter folder that PEFT loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.errors import EmmechError

if TYPE_CHECKING:
    from emmech.chat.model import ChatModel
    from emmech.run.run import Run

__all__ = ["base_name", "export_adapter", "model_at", "model_live"]


def model_at(run: Run, step: int | None, scale: float, base: Any) -> ChatModel:
    """The model of a step; see :meth:`emmech.run.run.Run.model` for the arguments.

    Raises:
        EmmechError: step not recorded, or ``base`` is another model than the run's.
    """
    from emmech.chat.model import load_model
    from emmech.engine.adapters import attach

    step = int(run.steps[-1]) if step is None else step
    run.check_step(step)
    given = base is not None
    chat = _started(run, load_model(base if given else base_name(run)), given=given)
    expected = run.manifest.get("model", {}).get("fingerprint")
    if expected and run.kind == "lora" and chat.fingerprint() != expected:
        raise EmmechError(
            f"open step {step} of {run.name}",
            f"base model {chat.name} with fingerprint {chat.fingerprint()[:12]}",
            f"the run was trained on {run.manifest['model'].get('name')} with fingerprint {expected[:12]}",
            "pass base= the very model the run was trained on",
        )
    if run.kind == "lora":
        return attach(chat, run.adapters, run.weights(step), scale=scale)
    return _full_model(run, chat, step, scale)


@contextmanager
def model_live(run: Run, step: int | None, scale: float, base: Any = None) -> Iterator[ChatModel]:
    """The model of a step for as long as it is used; a ``base`` that was given is as it was afterwards.

    Raises:
        EmmechError: as :func:`model_at`.
    """
    from emmech.chat.model import load_model
    from emmech.engine.adapters import detach

    if base is None:
        yield model_at(run, step, scale, None)
        return
    own = load_model(base).base
    if any(hasattr(module, "lora_A") for module in own.modules()):
        raise EmmechError(
            f"open a step of {run.name} on the base model",
            "base= with live adapters",
            "it is left as it was afterwards, and swapping its adapters would lose them",
            "emmech.detach(base), or run.model(step, base=base) to swap them",
        )
    kept = {} if run.kind == "lora" else {name: value.detach().clone() for name, value in own.state_dict().items()}
    training = own.training
    chat = model_at(run, step, scale, base)
    try:
        yield chat
    finally:
        if run.kind == "lora":
            detach(chat)
        own.load_state_dict(kept, strict=False)
        own.train(training)


def base_name(run: Run) -> str:
    """Name of the model the run started from.

    Raises:
        EmmechError: the run does not say which it is.
    """
    name = run.manifest.get("model", {}).get("name")
    if not name:
        raise EmmechError(
            f"load the base model of {run.name}",
            why="the run does not say which it is (it was made from arrays or by hand)",
            instead="pass it: run.model(step, base=model)",
        )
    return str(name)


def export_adapter(run: Run, step: int, folder: Path) -> Path:
    """Write a step as an adapter folder that ``PeftModel.from_pretrained`` loads.

    Raises:
        EmmechError: step not recorded, or not a LoRA run.
    """
    from safetensors.numpy import save_file

    from emmech.engine.adapters import lora_config

    weights = run.weights(step)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for adapter in run.adapters:
        for side in ("A", "B"):
            key = f"base_model.model.{adapter.module}.lora_{side}.weight"
            tensors[key] = np.ascontiguousarray(weights[f"{side}/{adapter.name}"])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    name = str(run.manifest.get("model", {}).get("name", ""))
    lora_config(run.adapters, base_name=name).save_pretrained(folder)
    return folder


def _started(run: Run, chat: ChatModel, *, given: bool) -> ChatModel:
    """The weights that the training began with: the base model's, or those with an earlier adapter merged in."""
    start = (run.path or Path()) / "start"
    if not start.is_dir() or chat.fingerprint() == run.manifest.get("model", {}).get("fingerprint"):
        return chat
    import copy
    from dataclasses import replace

    from peft import PeftModel

    # merging would change the caller's weights
    model = copy.deepcopy(chat.model) if given else chat.model
    return replace(chat, model=PeftModel.from_pretrained(model, str(start)).merge_and_unload())


def _full_model(run: Run, chat: ChatModel, step: int, scale: float) -> ChatModel:
    from safetensors.torch import load_file

    folder = (run.path or Path()) / "weights"
    kept = {int(path.stem.split("-")[1]): path for path in sorted(folder.glob("step-*.safetensors"))}
    if step not in kept and step != 0:
        raise EmmechError(
            f"open step {step} of {run.name}",
            f"step={step}",
            "full fine-tuning keeps whole weights at few steps only, and not at this one",
            f"kept: 0 (the base), {', '.join(map(str, kept)) or 'no other'}",
        )
    if scale != 1.0:
        raise EmmechError(
            f"scale the update of {run.name}", f"scale={scale}", "a full fine-tune has no adapter to scale", "scale=1.0"
        )
    if step in kept:
        chat.base.load_state_dict(load_file(kept[step]), strict=False)
    return chat
