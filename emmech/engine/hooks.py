"""Whether somebody listens to a module: then its own forward has to run."""

from __future__ import annotations

from typing import Any

__all__ = ["has_hooks"]


def has_hooks(module: Any) -> bool:
    """Whether a call of the module is more than its class's forward: hooks, or a forward put in its place.

    Example:
        >>> import torch
        >>> one = torch.nn.Linear(2, 2)
        >>> handle = one.register_forward_hook(lambda module, inputs, output: None)
        >>> has_hooks(one), handle.remove(), has_hooks(one)
        (True, None, False)
    """
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
