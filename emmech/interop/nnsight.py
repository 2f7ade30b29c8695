"""nnsight over a run's model: custom traces in plain Python, also of models too large for this machine.

nnsight replaces ``forward`` on every module of the model that it wraps, for good, so it gets a copy that shares the
weights. What it is for here: reading and writing anything inside a forward pass, the adapter's scalar included, and
running the same code remotely on a model that outgrows the machine.
"""

from __future__ import annotations

import copy
from typing import Any

from emmech.errors import EmmechError
from emmech.interop.shared_view import chat_from, weight_sharing_copy

__all__ = ["to_nnsight"]


def to_nnsight(source: Any, step: int | None = None, *, scale: float = 1.0) -> Any:
    """An nnsight ``TransformersModel`` on the weights of a run's model, adapter live.

    The user's model and tokenizer stay as they are. Changing the adapter's weights or scale on the model shows in the
    view at once; PEFT's ``disable_adapter`` does not: scale by 0 instead. Needs the extra ``lens``.

    The rank-1 scalar A·x of every token is one line of a trace::

        view = emmech.to_nnsight(run)
        with view.trace("hello"):
            scalar = view.model.layers[3].mlp.down_proj.lora_A.default.output.save()

    and on a model of the hub that is too large for this machine, ``view.trace(..., remote=True)`` runs the same block
    on NDIF, given a key.

    Logits equal the model's to rounding. nnsight counts positions from the first real token of a left-padded row, as
    generation does: in bfloat16, compare with the same ``position_ids``.

    Args:
        source: a Run, or a chat model (``step`` and ``scale`` are then not used).

    Raises:
        EmmechError: nnsight is not installed.
    """
    try:
        from nnsight import TransformersModel
    except ImportError:
        raise EmmechError("bridge to nnsight", why="nnsight is not installed", instead='pip install "emmech[lens]"')
    chat = chat_from(source, step, scale)
    return TransformersModel(weight_sharing_copy(chat), tokenizer=copy.deepcopy(chat.tokenizer), task="text-generation")
