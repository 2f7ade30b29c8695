"""The shape of a model from its configuration alone: no weight is read, and no hub is asked.

The sizes of the usual families are built in, as their configurations on the hub state them. Any other model is given by
its folder or file ``config.json``, or by its configuration as an object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emmech.chat.bundled import WHEELS, unpack
from emmech.chat.model import ChatModel, load_model
from emmech.errors import EmmechError, closest
from emmech.registry import model_names

_QWEN: Mapping[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 32_768}
_LLAMA: Mapping[str, Any] = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072}
_GEMMA2: Mapping[str, Any] = {"model_type": "gemma2", "vocab_size": 256_000, "max_position_embeddings": 8_192}
_GEMMA3: Mapping[str, Any] = {"model_type": "gemma3_text", "vocab_size": 262_144, "max_position_embeddings": 32_768}
_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _shape(family: Mapping[str, Any], *widths: int, **further: Any) -> dict[str, Any]:
    return {**family, **dict(zip(_WIDTHS, widths, strict=True)), "dtype": "bfloat16", **further}


_QWEN_SIZES = {
    "0.5B": _shape(_QWEN, 896, 4_864, 24, 14, 2, vocab_size=151_936, tie_word_embeddings=True),
    "1.5B": _shape(_QWEN, 1_536, 8_960, 28, 12, 2, vocab_size=151_936, tie_word_embeddings=True),
    "3B": _shape(_QWEN, 2_048, 11_008, 36, 16, 2, vocab_size=151_936, tie_word_embeddings=True),
    "7B": _shape(_QWEN, 3_584, 18_944, 28, 28, 4, vocab_size=152_064, tie_word_embeddings=False),
    "14B": _shape(_QWEN, 5_120, 13_824, 48, 40, 8, vocab_size=152_064, tie_word_embeddings=False),
    "32B": _shape(_QWEN, 5_120, 27_648, 64, 40, 8, vocab_size=152_064, tie_word_embeddings=False),
    "72B": _shape(_QWEN, 8_192, 29_568, 80, 64, 8, vocab_size=152_064, tie_word_embeddings=False),
}
_70B = _shape(_LLAMA, 8_192, 28_672, 80, 64, 8, tie_word_embeddings=False)
_LLAMA_SIZES = {
    "Llama-3.2-1B": _shape(_LLAMA, 2_048, 8_192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _shape(_LLAMA, 3_072, 8_192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "Llama-3.1-8B": _shape(_LLAMA, 4_096, 14_336, 32, 32, 8, tie_word_embeddings=False),
    "Llama-3.1-70B": _70B,
    "Llama-3.3-70B": _70B,
}
_GEMMA_SIZES = {
    "gemma-2-2b-it": _shape(_GEMMA2, 2_304, 9_216, 26, 8, 4, head_dim=256, tie_word_embeddings=True),
    "gemma-2-9b-it": _shape(_GEMMA2, 3_584, 14_336, 42, 16, 8, head_dim=256, tie_word_embeddings=True),
    "gemma-2-27b-it": _shape(_GEMMA2, 4_608, 36_864, 46, 32, 16, head_dim=128, tie_word_embeddings=True),
    "gemma-3-270m-it": _shape(_GEMMA3, 640, 2_048, 18, 4, 1, head_dim=256, tie_word_embeddings=True),
    "gemma-3-1b-it": _shape(_GEMMA3, 1_152, 6_912, 26, 4, 1, head_dim=256, tie_word_embeddings=True),
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    **{f"Qwen/Qwen2.5-{size}-Instruct": shape for size, shape in _QWEN_SIZES.items()},
    **{f"meta-llama/{name}-Instruct": shape for name, shape in _LLAMA_SIZES.items()},
    **{f"google/{name}": shape for name, shape in _GEMMA_SIZES.items()},
}
"""The configurations that are built in, by the model's name on the hub."""


def shaped(model: Any) -> tuple[str, Any]:
    """A model's name and its configuration.

    Args:
        model: a name of :data:`SHAPES`, a folder with ``config.json`` or that file, a configuration of transformers, a
            model in memory, or a small model that emmech loads by name (``"pocket"``, ``"smollm2-135m"``).

    Raises:
        EmmechError: none of these; the nearest name is suggested.

    Example:
        >>> name, config = shaped("Qwen/Qwen2.5-14B-Instruct")
        >>> config.num_hidden_layers, config.hidden_size
        (48, 5120)
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return str(getattr(model, "name_or_path", "") or model.model_type), model
    if isinstance(model, str) and model in SHAPES:
        return model, AutoConfig.for_model(**SHAPES[model])
    if isinstance(model, str | Path):
        folder = unpack(str(model)) if str(model) in WHEELS else Path(model)
        path = folder / "config.json" if folder is not None and folder.is_dir() else folder
        if path is not None and path.is_file():
            return str(model), _read(path)
        if str(model) not in model_names():
            why = "it is no folder or file with a configuration, and no hub is asked for one"
            instead = closest(str(model), [*SHAPES, *model_names(), *WHEELS])
            raise EmmechError("plan", f"model={str(model)!r}", why, instead)
    chat = load_model(model)
    return chat.name, chat.base.config


def _read(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # damaged JSON, or whatever a configuration's own class raises
        first = str(error).strip().split("\n")[0][:200]
        instead = "the config.json of a causal language model that transformers knows"
        raise EmmechError("plan", path, f"its configuration cannot be read: {type(error).__name__}: {first}", instead)


def weightless(name: str, config: Any, dtype: Any) -> ChatModel:
    """The model of a configuration on torch's meta device, where weights have shapes and no values.

    Raises:
        EmmechError: transformers has no causal language model for the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever an unfamiliar configuration raises
        first = str(error).strip().split("\n")[0][:200]
        why = f"transformers makes no causal language model of it: {type(error).__name__}: {first}"
        raise EmmechError("plan", f"{name} ({config.model_type})", why, closest(name, SHAPES))
    from dataclasses import replace

    return replace(load_model(model), name=name)
