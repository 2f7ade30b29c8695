"""What misalignment is inside the model: directions, how to extract them, and how sure one can be of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "AdapterScalars": "adapter_lens",
    "Direction": "direction",
    "Quality": "quality",
    "adapter_direction": "persona",
    "adapter_lens": "adapter_lens",
    "adapter_write": "methods",
    "answer_means": "extract",
    "contrast_direction": "contrast",
    "cosines": "compare",
    "differences_of_four": "methods",
    "direction_by_steps": "compare",
    "four_directions": "four",
    "from_repeng": "elsewhere",
    "from_steering_vectors": "elsewhere",
    "group_means": "extract",
    "judged_answers": "misalignment",
    "lexical_share": "contrast",
    "logistic_probe": "methods",
    "match_lengths": "extract",
    "mean_difference": "methods",
    "misalignment_direction": "misalignment",
    "pca_of_differences": "methods",
    "persona_direction": "persona",
    "phrase_tokens": "tokens",
    "probe_auc": "methods",
    "read_out": "contrast",
    "to_repeng": "elsewhere",
    "to_steering_vectors": "elsewhere",
    "token_projections": "extract",
    "token_significance": "adapter_lens",
    "trained_direction": "persona",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
