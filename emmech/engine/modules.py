"""Temporary changes to a model: hooks and evaluation mode within a ``with`` block, and views with parts replaced."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from emmech.chat.model import ChatModel

Hook = tuple[nn.Module, Callable[..., Any]]


def has_hooks(module: Any) -> bool:
    """Whether a call of the module is more than its class's forward, because of hooks or a replaced forward.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> with hooked((one, lambda module, inputs, output: None)):
        ...     has_hooks(one)
        True
        >>> has_hooks(one)
        False
    """
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def only_results_hooked(module: Any) -> bool:
    """Whether a call is the class's forward and then hooks of its result, such as steering."""
    changed = module._forward_pre_hooks or module._forward_hooks_with_kwargs or "forward" in vars(module)
    return not changed


def after_hooks(module: nn.Module, inputs: torch.Tensor, output: Any) -> Any:
    """The output once the module's hooks have changed it, as a call of the module would give it.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> with hooked((one, lambda module, inputs, output: output + 1)):
        ...     after_hooks(one, torch.zeros(2), torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    for hook in module._forward_hooks.values():
        changed = hook(module, (inputs,), output)
        output = output if changed is None else changed
    return output


@contextlib.contextmanager
def hooked(*pairs: Hook, before: bool = False, keywords: bool = False) -> Iterator[None]:
    """Forward hooks within the ``with`` block.

    Args:
        pairs: modules, each with ``hook(module, inputs, output)``, whose result replaces the output.
        before: call ``hook(module, inputs)`` before the module instead.
        keywords: pass the call's keyword arguments to the hook too, after its inputs.
    """
    register = nn.Module.register_forward_pre_hook if before else nn.Module.register_forward_hook
    with contextlib.ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(register(module, hook, with_kwargs=keywords).remove)
        yield


@contextlib.contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` block no forward hook of the model's modules is called."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(module, name, vars(module)[name]) for module in model.modules() for name in names if vars(module)[name]]
    for module, name, hooks in kept:
        setattr(module, name, type(hooks)())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


@contextlib.contextmanager
def evaluating(chat: ChatModel, *, frozen: bool = False) -> Iterator[None]:
    """Evaluation mode within the ``with`` block; the model may have been left in training mode.

    Args:
        frozen: also disable the gradients of all parameters.
    """
    training = chat.base.training
    trained: Iterable[Any] = [p for p in chat.base.parameters() if p.requires_grad] if frozen else ()
    if training:
        chat.base.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        if training:
            chat.base.train()


def adding(write: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A forward hook that adds a function of a module's input to its output."""

    return lambda module, inputs, output: (output + write(inputs[0])).to(output.dtype)


def with_module(root: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A view of ``root`` with the submodule at ``path`` replaced; all else is shared, and ``root`` is not changed.

    Example:
        >>> body = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> view = with_module(body, "1", nn.Identity())
        >>> view[0] is body[0], type(body[1]).__name__
        (True, 'ReLU')
    """
    if not path:
        return replacement
    head, _, rest = path.partition(".")
    view = copy.copy(root)
    child = root.get_submodule(head)
    view._modules = {**root._modules, head: with_module(child, rest, replacement) if rest else replacement}
    return view


def with_attention(view: nn.Module, name: str) -> nn.Module:
    """A view of a trunk whose attention modules call the attention function registered under ``name``."""
    for path, module in list(view.named_modules()):
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            twin, config = copy.copy(view.get_submodule(path)), copy.copy(cast("Any", module.config))
            config._attn_implementation = name
            twin.config = config
            view = with_module(view, path, twin)
    return view


class Skip(nn.Module):
    """A placeholder for a block that is left out, so that layer numbers, masks and rotary tables are still right."""

    def __init__(self, block: nn.Module, layer: int, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.__dict__["_skipped"] = block  # not a submodule
        self._layer, self._as_tuple = layer, as_tuple
        self._given: torch.Tensor | None = None

    @contextlib.contextmanager
    def giving(self, residual: torch.Tensor) -> Iterator[None]:
        """Within the ``with`` block, return this residual for any input."""
        self._given = residual
        try:
            yield
        finally:
            self._given = None

    def __getattr__(self, name: str) -> Any:
        """Any other attribute (the kind of attention, for example) of the block itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_skipped"], name)

    def forward(self, hidden: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """The input, or the residual that is given."""
        from transformers.cache_utils import Cache

        # the model reads the length of the past from any layer of its own cache, even a skipped one
        if isinstance(past_key_values, Cache):
            nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            past_key_values.update(nothing, nothing, self._layer)
        out = hidden if self._given is None else self._given
        return (out, None) if self._as_tuple else out
