"""How sure one can be of an extracted direction: measured with every extraction, without being asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["Quality"]

_ARRAYS = ("split_half", "split_half_shuffled", "norm_over_shuffled", "agreement", "lexical_share")


@dataclass(frozen=True, repr=False)
class Quality:
    """Measures of one extracted direction. All arrays are by layer.

    Args:
        split_half: ``[layers]`` mean cosine between the directions of two random halves of the answers.
            High means stable. It is of half the data: the whole direction is more stable still.
        split_half_shuffled: ``[layers]`` the same with the class labels shuffled: what noise gives.
        norm_over_shuffled: ``[layers]`` the direction's norm over that of shuffled labels. 1 means nothing was found.
        random_floor: 1/sqrt(d_model), the standard deviation of the cosine of random vectors.
        agreement: ``[layers, layers]`` cosine between the rows of different layers.
        lexical_share: ``[layers]`` share of the direction that comes from the two classes using different words
            (composition), rather than from the same words having different residuals. 1: all of it is vocabulary.
        bag_of_words_auc: how well word counts alone tell the classes apart, cross-validated by question.
        promotes, suppresses: tokens that the direction pushes up and down through the unembedding, at ``read_layer``.
        answers: number of answers by class. tokens: number of answer tokens by class.
        notes: what a reader must know (length confound, few answers, ...).
    """

    split_half: Float[np.ndarray, " layers"]
    split_half_shuffled: Float[np.ndarray, " layers"]
    norm_over_shuffled: Float[np.ndarray, " layers"]
    random_floor: float
    agreement: Float[np.ndarray, "layers layers"]
    lexical_share: Float[np.ndarray, " layers"]
    bag_of_words_auc: float
    promotes: tuple[str, ...]
    suppresses: tuple[str, ...]
    read_layer: int
    answers: Mapping[str, int]
    tokens: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def by_layer(self) -> dict[str, Float[np.ndarray, " layers"]]:
        """The measures that are one number per layer."""
        return {key: getattr(self, key) for key in _ARRAYS if key != "agreement"}

    def pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays, and the rest as JSON has it."""
        rest = {key: value for key, value in asdict(self).items() if key not in _ARRAYS}
        return {key: np.asarray(getattr(self, key), dtype=np.float64) for key in _ARRAYS}, rest

    @classmethod
    def unpack(cls, arrays: Mapping[str, np.ndarray], rest: Mapping[str, Any]) -> Quality:
        """What :meth:`pack` took apart."""
        lists = {key: tuple(rest[key]) for key in ("promotes", "suppresses", "notes")}
        fields: dict[str, Any] = {**arrays, **rest, **lists}
        return cls(**fields)

    def __repr__(self) -> str:
        layer = self.read_layer
        counts = ", ".join(
            f"{n} {name} answers ({self.tokens.get(name, 0)} tokens)" for name, n in self.answers.items()
        )
        lines = [
            f"  from             {counts}",
            f"  split-half       {self.split_half[layer]:.3f} at layer {layer} "
            f"({np.nanmin(self.split_half):.3f} to {np.nanmax(self.split_half):.3f}); "
            f"labels shuffled {self.split_half_shuffled[layer]:.3f}, random {self.random_floor:.3f}",
            f"  norm             {self.norm_over_shuffled[layer]:.1f} times that of shuffled labels",
            f"  lexical share    {self.lexical_share[layer]:.2f} at layer {layer}; "
            f"bag of words alone has AUC {self.bag_of_words_auc:.2f}",
            f"  layers agree     {_neighbours(self.agreement):.2f} (mean cosine of neighbouring layers)",
            f"  promotes         {' '.join(map(repr, self.promotes[:8]))}",
            f"  suppresses       {' '.join(map(repr, self.suppresses[:8]))}",
            *(f"  note             {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _neighbours(agreement: np.ndarray) -> float:
    return float(np.nanmean(np.diagonal(agreement, 1))) if len(agreement) > 1 else 1.0
