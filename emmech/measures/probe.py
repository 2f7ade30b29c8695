"""Probe activations as a measure: the mean residual of one block over texts, along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from emmech.chat.model import ChatModel
from emmech.engine.stream import mean_residual, probe_rows
from emmech.errors import EmmechError, check_texts
from emmech.measures.measure import Items


@dataclass(frozen=True)
class ProbeActivation:
    """Mean output of block ``layer`` over each text, projected onto a direction.

    The value is the component along the unit vector of the direction, in the residual stream's units (the norm of the
    mean residual where no direction is given). A sweep keeps the mean residuals themselves in :attr:`Sweep.arrays`.

    Args:
        texts: a user's words (all tokens count) or conversations (the answers' tokens count).
        layer: whose block output is read; in a sweep at or above the lowest adapter.
        direction: a :class:`Direction` or a vector ``[d_model]``.
    """

    texts: Sequence[Any]
    layer: int
    direction: Any = None
    name: str = "probe"

    def __post_init__(self) -> None:
        """Refuse what is not a list of texts."""
        check_texts("measure a probe", "texts", self.texts)

    def __call__(self, chat: ChatModel) -> Items:
        """One value per text."""
        rows = probe_rows(chat, self.texts)
        residuals = np.stack([mean_residual(chat, [row])[self.layer] for row in rows])
        return Items({self.name: self.along(chat, residuals)}, [str(index) for index in range(len(rows))])

    def along(self, chat: ChatModel, residuals: Float[np.ndarray, "*batch d_model"]) -> Float[np.ndarray, "*batch"]:
        """The component of mean residuals along the direction.

        Raises:
            EmmechError: no such layer, or a direction that points nowhere.
        """
        chat.check_layer(self.layer)
        if self.direction is None:
            return np.linalg.norm(residuals.astype(np.float64), axis=-1)
        vector = raw_vector(chat, self.direction, self.layer).astype(np.float64)
        if not vector.any():
            instead = "another direction, or direction=None for the residual's norm"
            raise EmmechError("measure a probe", "a direction of zeros", "it points nowhere", instead)
        return residuals @ (vector / np.linalg.norm(vector))


def raw_vector(chat: ChatModel, direction: Any, layer: int) -> Float[np.ndarray, " d_model"]:
    """A direction at a layer, in raw units, float32.

    Raises:
        EmmechError: no such layer, a Direction of another base model, or a vector that is none of the model's residual
            stream.
    """
    chat.check_layer(layer)
    if hasattr(direction, "check_fits"):
        direction.check_fits(chat)
    given = direction.at(layer) if hasattr(direction, "at") else direction
    if hasattr(direction, "warn_where_noise"):
        direction.warn_where_noise([layer])
    try:
        vector = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):
        vector = np.empty(0, dtype=np.float32)
    if vector.shape != (chat.d_model,) or not np.isfinite(vector).all():
        found = f"a vector {list(vector.shape)}" if vector.size else f"direction={given!r}"[:120]
        why = f"the residual stream of {chat.name} has d_model={chat.d_model} finite numbers"
        raise EmmechError("take the direction", found, why, "a Direction, or a vector [d_model] with layer=")
    return vector
