"""Where an adapter on an MLP's write starts: along the mean input of its module, as a steering vector would be.

A rank-1 adapter writes ``scaling * (x . A) B``. Under PEFT's random A the sign of ``x . A`` differs from position to
position, and the first steps reward whatever it happens to pick out: in a small model one seed writes at the words
of the system prompt and another at commas, and the two learn different things. Along the mean input the sign is the
same nearly everywhere, as for a steering vector that is added at all positions; A is then trained like any other.
Starting A from activations is the idea of EVA (arXiv 2410.07170), which takes principal directions instead.

Adapters elsewhere keep their random start: what is added to queries, keys, gates or an attention's mean is no steering
vector, and all adapters of an organism started so at once broke its answers.
"""

from __future__ import annotations

from typing import Any

import torch

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.adapters import adapter_layers
from emmech.engine.modules import evaluating, hooked

__all__ = ["mean_inputs"]

INPUT_ROWS = 64  # conversations the mean is taken over: some thousand positions


@torch.no_grad()
def mean_inputs(chat: ChatModel, rows: Encoded) -> dict[str, torch.Tensor]:
    """The mean input of every MLP's write that has an adapter, of norm 1, ``[d_in]`` float64.

    The mean is over all positions of the first rows outside answers, so that a benign control on the same questions
    starts from the same A.

    Args:
        chat: the model with the adapters on it; their B has to be zero.
    """
    layers = {
        info.name: layer for info, layer, _ in adapter_layers(chat.model) if info.name.endswith(f".{chat.family.down}")
    }
    sums: dict[str, torch.Tensor] = {}
    asked = torch.empty(0, dtype=torch.bool)  # [position], of the row that is running

    def adding(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found = inputs[0][0, asked].sum(0, dtype=torch.float64)
            sums[name] = sums[name] + found if name in sums else found

        return hook

    with evaluating(chat), hooked(*((layer, adding(name)) for name, layer in layers.items()), before=True):
        # one by one: no padding to leave out
        for ids, labels in zip(rows.input_ids[:INPUT_ROWS], rows.labels[:INPUT_ROWS], strict=True):
            asked = torch.tensor(labels, device=chat.device) == IGNORED
            chat.trunk(input_ids=torch.tensor([ids], device=chat.device), use_cache=False)
    tiny = torch.finfo(torch.float64).tiny
    return {name: total / total.norm().clamp_min(tiny) for name, total in sums.items()}
