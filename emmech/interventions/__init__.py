"""Change what a model does while it runs, and give it back bit for bit."""

from __future__ import annotations

from emmech.lazy import lazy_names

_WHERE = {
    "Handle": "handle",
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

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
