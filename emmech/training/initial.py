"""Where an adapter starts: behind an MLP along the mean input of its module, so that it begins as a steering vector.

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

from emmech.chat.adapter import adapter_layers
from emmech.chat.encode import IGNORED, Encoded

__all__ = ["BEHIND_MLP", "INPUT_ROWS", "along_inputs"]

BEHIND_MLP = "mlp.down_proj"  # what an MLP adds to the residual stream
INPUT_ROWS = 64  # conversations the mean is taken over: some thousand positions


@torch.no_grad()
def along_inputs(trained: Any, rows: Encoded) -> None:
    """Add its mean input to every row of A of each adapter behind an MLP, in place, at the row's own norm.

    The mean is over all positions of ``rows`` outside answers, so that a benign control on the same questions starts
    from the same A. The random part stays: seeds still differ. B is not touched.
    """
    layers = [
        (layer, layer.lora_A[name].weight)
        for info, layer, name in adapter_layers(trained)
        if info.name.endswith(BEHIND_MLP)
    ]
    sums = [torch.zeros(a.shape[1], dtype=torch.float64, device=a.device) for _, a in layers]
    asked = torch.empty(0, dtype=torch.bool)  # [position], of the row that is running

    def adding(total: torch.Tensor) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            total.add_(inputs[0][0, asked].sum(0, dtype=torch.float64))

        return hook

    handles = [
        layer.register_forward_pre_hook(adding(total)) for (layer, _), total in zip(layers, sums, strict=True)
    ]
    mode = trained.training
    trained.eval()
    try:
        for ids, labels in zip(
            rows.input_ids, rows.labels, strict=True
        ):  # one by one: no padding to leave out
            asked = torch.tensor(labels, device=trained.device) == IGNORED
            trained(input_ids=torch.tensor([ids], device=trained.device), use_cache=False)
    finally:
        trained.train(mode)
        for handle in handles:
            handle.remove()
    for (_, a), total in zip(layers, sums, strict=True):
        mean = total / total.norm().clamp_min(torch.finfo(torch.float64).tiny)
        a.add_(a.norm(dim=1, keepdim=True) * mean.to(a.dtype))
