"""The 2 x 2 of model by text: does a direction come from what is read, or from who reads it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from emmech.chat.dataset import load_chat
from emmech.chat.masks import Tokens
from emmech.chat.model import load_model
from emmech.directions.direction import Direction
from emmech.directions.extract import group_means
from emmech.directions.methods import differences_of_four
from emmech.errors import EmmechError

__all__ = ["four_directions"]


def four_directions(
    model: Any,
    misaligned: Any,
    aligned: Any,
    *,
    average: Literal["token", "answer"] = "token",
    tokens: Tokens = "answer",
    batch_size: int = 8,
    progress: bool = True,
) -> Mapping[str, Direction]:
    """Text difference in each model, model difference on each text, both, and their interaction.

    Rows read by the base model (adapter off) and by the fine-tuned one share batches, in one pass. The names are those
    of :func:`differences_of_four`; Convergent Linear Representations of EM (arXiv 2506.11618) uses "text/tuned model".

    Args:
        model: a chat model with a live adapter.
        misaligned, aligned: conversations, or anything that :func:`emmech.load_chat` reads.
        tokens: as in :func:`contrast_direction`; ``"prompt"`` shows what the fine-tune changed before a word is said.

    Raises:
        EmmechError: the model has no adapter, so there is no second model.
    """
    from emmech.engine.adapters import adapter_layers

    chat = load_model(model)
    if not list(adapter_layers(chat.model)):
        raise EmmechError(
            "compare the fine-tuned model with its base",
            chat.name,
            "it has no live adapter, so there is only one model",
            "run.model(step), or contrast_direction for the text difference alone",
        )
    texts = [list(load_chat(side, organism=chat.organism)) for side in (aligned, misaligned)]
    talks = [row for side in texts for row in side]
    which = np.repeat([0, 1], [len(side) for side in texts])
    cells = np.stack([np.concatenate([(which == text) & on for on in (tuned == 0, tuned == 1)])
                      for tuned in (0, 1) for text in (0, 1)])  # fmt: skip
    found = group_means(
        chat,
        talks + talks,
        cells.astype(np.float64),
        average=average,
        tokens=tokens,
        adapter_scales=np.repeat([0.0, 1.0], len(talks)),
        batch_size=batch_size,
        progress=progress,
    )
    means = found.means.reshape(2, 2, chat.n_layers, chat.d_model)
    source = {
        "method": "2 x 2 of model by text",
        "model": chat.name,
        "fingerprints": [chat.fingerprint()],
        "answers": {"aligned": len(texts[0]), "misaligned": len(texts[1])},
    }
    return {
        name: Direction(vectors, name, {**source, "cell": name}, means[0, 0])
        for name, vectors in differences_of_four(means).items()
    }
