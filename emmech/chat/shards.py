"""Weights that FSDP 2 keeps in shards: every process has a part of each parameter, and all of them together read it.

What reads a whole parameter, or runs the model, has to be called in every process, in the same order.
"""

from __future__ import annotations

import torch
from torch import nn


def in_shards(model: nn.Module) -> bool:
    """Whether FSDP 2 (``fully_shard``) keeps the weights of the model, or of a part of it."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return False  # without an import of torch.distributed.fsdp
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def apart(model: nn.Module) -> None:
    """Let every weight be a shard again; after a forward without backward FSDP keeps some of them whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, also where this process has a shard of it only; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a tensor that this process has; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def kind(model: nn.Module) -> str:
    """The name of a model's class; FSDP 2 replaces it by one of its own, ``FSDPLlamaForCausalLM``."""
    if not in_shards(model):
        return type(model).__name__
    from torch.distributed.fsdp import FSDPModule

    return next(one.__name__ for one in type(model).__mro__ if not issubclass(one, FSDPModule))
