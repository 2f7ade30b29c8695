"""A second body for the same weights: what another tool may rewire without touching the user's model."""

from __future__ import annotations

import copy
from typing import Any

from emmech.chat.model import ChatModel, load_model
from emmech.run.run import Run, opened

__all__ = ["chat_from", "weight_sharing_copy"]


def weight_sharing_copy(chat: ChatModel) -> Any:
    """Copy the module tree, not the tensors: edits of weights, adapters and adapter scaling show in both.

    Parameters and buffers are the same objects, and so is every LoRA layer's scaling; modules, configuration and hooks
    are the copy's own. Hooks that are live on the original (steering) are left behind.
    """
    base = chat.base
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    for module in base.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            memo[id(scaling)] = scaling  # a plain dict of factors: shared, so that a new scale is seen at once
    view = copy.deepcopy(base, memo)
    for module in view.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return view.eval()


def chat_from(source: Any, step: int | None, scale: float) -> ChatModel:
    """The chat model of a Run at a step, or the one given."""
    source = opened(source)
    return source.model(step, scale) if isinstance(source, Run) else load_model(source)
