"""Change what a model does while it runs, and give it back bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "AnswerMeasure": "measures",
    "Handle": "handle",
    "Items": "measures",
    "MarginMeasure": "measures",
    "Study": "studies",
    "ablate": "ablate",
    "ablation_table": "studies",
    "adapter_shares": "studies",
    "dose_response": "studies",
    "fold_bias": "weights",
    "orthogonalise_writes": "weights",
    "project_adapter": "adapter",
    "rotate_adapter": "adapter",
    "scale_adapters": "adapter",
    "steer": "steer",
    "transfer_matrix": "studies",
    "transplant_adapter": "adapter",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
