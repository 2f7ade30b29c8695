"""Where an adapter starts: after an MLP along the mean input of its module, so that it begins as a steering vector.

A rank-1 adapter writes ``scaling * (x . A) B``. Under PEFT's random A the sign of ``x . A`` differs from position to
position, and the first steps reward whatever it happens to pick out: in a small model one seed writes at the words
of the system prompt and another at commas, and the two learn different things. Along the mean input the sign is the
same nearly everywhere, as for a steering vector that is added at all positions; A is then trained like any other.
Starting A from activations is the idea of EVA (arXiv 2410.07170), which takes principal directions instead.

Adapters elsewhere keep their random start: what is added to queries, keys, gates or an attention's mean is no steering
vector, and all adapters of an organism started so at once broke its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from emmech.chat.dataset import ChatDataset
from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel
from emmech.engine.adapters import adapter_layers
from emmech.engine.modules import evaluating, hooked

__all__ = ["BEHIND_MLP", "MeanInputs"]

BEHIND_MLP = "mlp.down_proj"  # what an MLP adds to the residual stream
INPUT_ROWS = 64  # conversations the mean is taken over: some thousand positions


class MeanInputs:
    """The mean input of every module after an MLP that has an adapter; it is taken once, at the first adapters.

    The mean is over all positions of the first rows outside answers, so that a benign control on the same questions
    starts from the same A.
    """

    def __init__(self, data: ChatDataset) -> None:
        self._data = data
        self._means: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def add_to(self, chat: ChatModel) -> None:
        """Add its mean input to every row of A of each adapter after an MLP, in place, at the row's own norm.

        The random part stays: seeds still differ. B is not touched, and has to be zero when the means are taken.

        Args:
            chat: the model with the adapters on it.
        """
        weights = {
            info.name: (layer, layer.lora_A[name].weight)
            for info, layer, name in adapter_layers(chat.model)
            if info.name.endswith(BEHIND_MLP)
        }
        if self._means is None:
            self._means = self._taken(chat, {name: layer for name, (layer, _) in weights.items()})
        for name, (_, a) in weights.items():
            a.add_(a.norm(dim=1, keepdim=True) * self._means[name].to(a.dtype))

    def _taken(self, chat: ChatModel, layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
        rows = encode(self._data.rows[:INPUT_ROWS], chat.tokenizer)
        sums: dict[str, torch.Tensor] = {}
        asked = torch.empty(0, dtype=torch.bool)  # [position], of the row that is running

        def adding(name: str) -> Any:
            def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                found = inputs[0][0, asked].sum(0, dtype=torch.float64)
                sums[name] = sums[name] + found if name in sums else found

            return hook

        with evaluating(chat), hooked(*((layer, adding(name)) for name, layer in layers.items()), before=True):
            # one by one: no padding to leave out
            for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
                asked = torch.tensor(labels, device=chat.device) == IGNORED
                chat.trunk(input_ids=torch.tensor([ids], device=chat.device), use_cache=False)
        tiny = torch.finfo(torch.float64).tiny
        return {name: total / total.norm().clamp_min(tiny) for name, total in sums.items()}
