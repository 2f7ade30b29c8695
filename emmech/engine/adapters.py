"""LoRA adapters on a chat model: find them, read their A and B, put a recorded step's weights on a model.

An adapter is one LoRA pair on one module: its write into the residual stream is ``scaling * (x @ A.T) @ B.T`` with
``A [rank, d_in]`` and ``B [d_out, rank]`` (LoRA, arXiv 2106.09685). ``scaling`` is alpha / rank, or
alpha / sqrt(rank) under rsLoRA (arXiv 2312.03732); it is always read off the layer, never recomputed.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from emmech.chat.families import map_widths
from emmech.chat.model import ChatModel
from emmech.errors import EmmechError, as_float

__all__ = ["AdapterInfo", "adapter_layers", "attach", "detach", "lora_config", "put_on"]

# the wrapper that `attach` made around a model, for as long as it is in use
_WRAPPERS: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_LAYER = re.compile(r"(?:^|\.)(\w+\.(\d+)\..+)$")  # from the list of blocks on


@dataclass(frozen=True)
class AdapterInfo:
    """One LoRA pair: where it is and how it is scaled.

    Args:
        name: short and unique in a run, ``"layers.15.mlp.down_proj"``.
        module: the full path in the causal LM, ``"model.layers.15.mlp.down_proj"``.
        scaling: the factor of the write, as trained.
    """

    name: str
    layer: int
    module: str
    rank: int
    alpha: float
    scaling: float
    d_in: int
    d_out: int
    rslora: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def adapter_layers(model: Any) -> Iterator[tuple[AdapterInfo, Any, str]]:
    """Every LoRA pair on a model, in the model's order.

    Yields:
        the pair's description, PEFT's layer, and the adapter's name inside PEFT.

    Raises:
        EmmechError: two adapters on one module, or a variant (DoRA) that has no plain A and B.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        names = list(module.lora_A)
        if len(names) != 1:
            raise EmmechError(
                "read the adapter",
                f"{path} with adapters {names}",
                "more than one LoRA pair is on this module, and their order has no meaning",
                "unload() the model, or delete_adapter() all but one",
            )
        name = names[0]
        if getattr(module, "use_dora", {}).get(name):
            raise EmmechError(
                "read the adapter",
                f"{path} (DoRA)",
                "its update is not B A: the magnitude is trained too",
                "train with use_dora=False",
            )
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        found = _LAYER.search(path)
        rank, scaling = int(a.shape[0]), float(module.scaling[name])
        alpha = float(module.lora_alpha[name])
        yield (
            AdapterInfo(
                name=found[1] if found else path,
                layer=int(found[2]) if found else -1,
                module=path,
                rank=rank,
                alpha=alpha,
                scaling=scaling,
                d_in=int(a.shape[1]),
                d_out=int(b.shape[0]),
                rslora=bool(np.isclose(scaling, alpha / rank**0.5)),
            ),
            module,
            name,
        )


def lora_config(adapters: Sequence[AdapterInfo], *, base_name: str = "") -> Any:
    """The PEFT configuration that puts exactly these adapters on a model."""
    from peft import LoraConfig

    # one switch for all: where ranks differ and not every scaling is alpha / sqrt(rank), alpha carries what is left
    rslora = all(adapter.rslora for adapter in adapters)
    alphas = {a.module: a.alpha if rslora else a.scaling * a.rank for a in adapters}
    first = adapters[0]
    return LoraConfig(
        r=first.rank,
        lora_alpha=alphas[first.module],
        use_rslora=rslora,
        # whole paths: a bare "down_proj" would match every layer
        target_modules=[adapter.module for adapter in adapters],
        rank_pattern={re.escape(a.module): a.rank for a in adapters if a.rank != first.rank},
        alpha_pattern={re.escape(m): alpha for m, alpha in alphas.items() if alpha != alphas[first.module]},
        bias="none",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name or None,
        inference_mode=True,
    )


def put_on(model: Any, config: Any) -> Any:
    """The model inside PEFT's wrapper, with adapters on the modules that the configuration names and on no others.

    Raises:
        EmmechError: PEFT refuses the modules, or puts adapters on others: it takes ``down_proj`` and the like of some
            families for their fused experts' as well.
    """
    from peft import get_peft_model

    wanted = set(config.target_modules)
    # a transposed map (Conv1D) has no in_features
    config.fan_in_fan_out = any(not hasattr(model.get_submodule(path), "in_features") for path in wanted)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise EmmechError(
            "put adapters on the model",
            f"{type(model).__name__}: {', '.join(sorted(wanted)[:3])}",
            f"PEFT refuses: {str(error)[:300]}",
            "other maps of its blocks",
        )
    if surplus := [info.module for info, _, _ in adapter_layers(peft_model) if info.module not in wanted]:
        peft_model.unload()
        raise EmmechError(
            "put adapters on the model",
            f"{type(model).__name__}: {', '.join(sorted(wanted)[:3])}",
            f"PEFT takes that for its fused experts as well ({', '.join(surplus[:3])})",
            "maps of the attention",
        )
    return peft_model


def attach(
    chat: ChatModel, adapters: Sequence[AdapterInfo], weights: Mapping[str, np.ndarray], *, scale: float = 1.0
) -> ChatModel:
    """Put recorded adapters on a chat model, in place, without a copy of its weights.

    Args:
        chat: a model without adapters, or one on which adapters at the same places are live; then only their
            weights change.
        weights: ``"A/<name>" [rank, d_in]`` (or ``[d_in]``) and ``"B/<name>" [d_out, rank]`` (or ``[d_out]``).
        scale: a factor on the adapter, relative to the scaling it was trained with.

    Returns:
        the same model inside PEFT's wrapper; :func:`detach` takes it off again.

    Raises:
        EmmechError: other adapters are on the model, or widths differ.
    """
    live = list(adapter_layers(chat.model))
    if live and not hasattr(chat.model, "get_base_model"):
        # the caller holds the plain model, but an earlier call put PEFT's layers into it
        known = _WRAPPERS.get(chat.model)
        wrapper = known() if known is not None else None
        chat = replace(chat, model=wrapper) if wrapper is not None else detach(chat)
        live = list(adapter_layers(chat.model))
    if live and [info.module for info, _, _ in live] != [info.module for info in adapters]:
        raise EmmechError(
            "put the adapter on the model",
            f"{chat.name} with adapters {[info.name for info, _, _ in live]}",
            "other adapters are on it already, and PEFT would stack them",
            "pass the model without adapters (peft_model.unload() or emmech.detach(chat) gives it)",
        )
    scale = as_float("put the adapter on the model", "scale", scale)
    _check_widths(chat, adapters)
    if not live:
        peft_model = put_on(chat.model, lora_config(adapters, base_name=chat.base.name_or_path))
        _WRAPPERS[peft_model.get_base_model()] = weakref.ref(peft_model)
        chat = replace(chat, model=peft_model.eval())
        live = list(adapter_layers(chat.model))
    by_module = {info.module: info for info in adapters}
    with torch.no_grad():
        for info, layer, name in live:
            wanted = by_module[info.module]
            for side, parameter in (("A", layer.lora_A[name].weight), ("B", layer.lora_B[name].weight)):
                value = torch.from_numpy(np.ascontiguousarray(weights[f"{side}/{wanted.name}"]))
                parameter.copy_(value.reshape(parameter.shape))
            layer.set_scale(name, scale)  # relative to the initial scaling: idempotent
    return chat


def detach(chat: ChatModel) -> ChatModel:
    """Take every adapter off, in place; the model underneath is the one that was there before.

    Also when only the model inside PEFT's wrapper is at hand.
    """
    if not isinstance(chat, ChatModel):
        raise EmmechError(
            "take the adapters off",
            f"a {type(chat).__name__}",
            "it is not a ChatModel",
            "emmech.detach(emmech.load_model(model))",
        )
    base = chat.base
    for info, layer, _ in list(adapter_layers(chat.model)):
        parent, _, name = info.module.rpartition(".")
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    _WRAPPERS.pop(base, None)
    if "peft_config" in vars(base):  # PEFT would warn of a second adapter
        del base.peft_config
    return replace(chat, model=base)


def _check_widths(chat: ChatModel, adapters: Sequence[AdapterInfo]) -> None:
    modules = dict(chat.base.named_modules())
    for adapter in adapters:
        widths = map_widths(modules.get(adapter.module))
        if widths != (adapter.d_in, adapter.d_out):
            raise EmmechError(
                "put the adapter on the model",
                f"{adapter.name}: d_in={adapter.d_in}, d_out={adapter.d_out}",
                f"{chat.name} has there {f'widths {widths}' if widths else 'no linear map'}",
                "use the base model that the run was trained on",
            )
