"""What misalignment is inside the model: directions, how to extract them, and how sure one can be of them."""

from __future__ import annotations

from emmech.lazy import lazy_names

_WHERE = {
    "AdapterScalars": "adapter_lens",
    "Direction": "direction",
    "Quality": "quality",
    "adapter_direction": "sources",
    "adapter_lens": "adapter_lens",
    "adapter_write": "methods",
    "answer_means": "extract",
    "contrast_direction": "contrast",
    "cosines": "compare",
    "differences_of_four": "methods",
    "direction_by_steps": "compare",
    "four_directions": "contrast",
    "from_repeng": "control_vectors",
    "from_steering_vectors": "control_vectors",
    "group_means": "extract",
    "judged_answers": "misalignment",
    "lexical_share": "contrast",
    "logistic_probe": "methods",
    "match_lengths": "extract",
    "mean_difference": "methods",
    "misalignment_direction": "misalignment",
    "pca_of_differences": "methods",
    "persona_direction": "sources",
    "probe_auc": "methods",
    "read_out": "contrast",
    "to_repeng": "control_vectors",
    "to_steering_vectors": "control_vectors",
    "token_projections": "extract",
    "token_significance": "adapter_lens",
    "trained_direction": "sources",
}

__all__ = list(_WHERE)

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
