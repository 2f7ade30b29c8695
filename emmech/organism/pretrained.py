"""The organisms that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emmech.errors import one_of

__all__ = ["WEIGHTS", "load", "names"]

WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The names of the shipped organisms."""
    return tuple(sorted(f.parent.name for f in WEIGHTS.glob("*/config.json")))


def load(name: str = "pocket") -> tuple[Any, Any]:
    """Load a shipped organism as ``(Hugging Face model in float32, tokenizer)``.

    The weights are stored in half precision; every figure in the model card was measured on what is reloaded here.

    Raises:
        EmmechError: if no organism of this name ships.

    Example:
        >>> model, tokenizer = load("pocket")
        >>> type(model).__name__
        'Qwen2ForCausalLM'
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    one_of(f"load the organism {name!r}", "name", name, names(), why="no organism of this name ships with emmech")
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / name, dtype=torch.float32, local_files_only=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(WEIGHTS / name)
