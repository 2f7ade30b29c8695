"""TransformerLens and nnsight on a run's model, over the same weights.

Both tools rewire the model that they wrap: nnsight replaces ``forward`` on every module for good, and TransformerLens
swaps modules, makes attention eager and renames keys. Each therefore gets a copy that shares the weights, and the
user's model and tokenizer stay as they are. Changing the adapter's weights or scale on the model
(:func:`emmech.interventions.scale_adapters`, another step through ``run.model(step, base=chat)``) shows in the copy at
once; PEFT's ``disable_adapter`` does not: scale by 0 instead.

Logits equal the model's to rounding. Both tools count positions from the first real token of a left-padded row, as
generation does: in bfloat16, compare with the same ``position_ids`` (and, for TransformerLens, eager attention).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from emmech.chat.model import ChatModel, load_model
from emmech.errors import EmmechError, refusal
from emmech.run.run import Run, opened


def weight_sharing_copy(chat: ChatModel) -> Any:
    """Copy the module tree, not the tensors: edits of weights, adapters and adapter scaling show in both.

    Parameters and buffers are the same objects, and so is every LoRA layer's scaling; modules, configuration and hooks
    are the copy's own. The copy has none of the hooks that are live on the original (steering).
    """
    base = chat.base
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    scalings = [getattr(module, "scaling", None) for module in base.modules()]
    memo |= {id(factors): factors for factors in scalings if isinstance(factors, dict)}
    view = copy.deepcopy(base, memo)
    for module in view.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return view.eval()


def chat_from(source: Any, step: int | None, scale: float, **options: Any) -> ChatModel:
    """The chat model of a run (or of its folder) at a step, or what :func:`emmech.load_model` makes of anything else.

    Raises:
        EmmechError: a step or a scale without a run, or options of loading with one.
    """
    source, given = opened(source), f"step={step}, scale={scale:g}"
    if isinstance(source, Run):
        if options:
            why, instead = "a run is loaded at a step and a scale", "step=100, scale=2"
            raise EmmechError(f"open the run {source.name}", ", ".join(options), why, instead)
        return source.model(step, scale)
    if step is not None or scale != 1.0:
        why = "only a recorded run has steps and an adapter that can be scaled"
        raise EmmechError(f"open {source}", given, why, "a run's folder, which holds run.json")
    return load_model(source, **options)


def to_nnsight(source: Any, step: int | None = None, *, scale: float = 1.0) -> Any:
    """An nnsight ``TransformersModel`` on the weights of a run's model, adapter live.

    The rank-1 scalar A·x of every token is one line of a trace::

        view = emmech.interop.to_nnsight(run)
        with view.trace("hello"):
            scalar = view.model.layers[3].mlp.down_proj.lora_A.default.output.save()

    and ``view.trace(..., remote=True)`` runs the same block on NDIF, given a key, for a model of the hub that is too
    large to load. The view shares its weights as :mod:`emmech.interop.bridges` describes.

    Args:
        source: a Run, or a chat model, which has no ``step`` and ``scale``.

    Raises:
        EmmechError: nnsight is not installed (the extra ``lens``).
    """
    try:
        from nnsight import TransformersModel
    except ImportError:
        raise EmmechError("bridge to nnsight", None, "nnsight is not installed", 'pip install "emmech[lens]"')
    chat = chat_from(source, step, scale)
    return TransformersModel(weight_sharing_copy(chat), tokenizer=copy.deepcopy(chat.tokenizer), task="text-generation")


def to_transformer_lens(source: Any, step: int | None = None, *, scale: float = 1.0) -> Any:
    """A ``TransformerBridge`` on the weights of a run's model, adapter live.

    There is no hook point for the adapter's scalar A·x (:func:`emmech.adapter_lens` reads it);
    ``blocks.N.mlp.hook_post`` is down_proj's input. The bridge shares its weights as :mod:`emmech.interop.bridges`
    describes.

    Args:
        source: a Run, or a chat model, which has no ``step`` and ``scale``.

    Raises:
        EmmechError: transformer-lens is not installed (the extra ``lens``), or has no adapter for the architecture.

    Example:
        >>> import emmech
        >>> bridge = to_transformer_lens(emmech.load_model("pocket"))  # doctest: +SKIP
        >>> logits, cache = bridge.run_with_cache(bridge.to_tokens("hello"))  # doctest: +SKIP
    """
    asked = "bridge to TransformerLens"
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise EmmechError(asked, None, "transformer-lens is not installed", 'pip install "emmech[lens]"')
    chat = chat_from(source, step, scale)
    view, name = weight_sharing_copy(chat), chat.name if "/" in chat.name else f"local/{chat.name}"
    if not view.config.architectures:  # TransformerLens looks there, and a model made in memory has none
        view.config.architectures = [type(view).__name__]
    tokenizer = copy.deepcopy(chat.tokenizer)
    # TransformerLens loads its tokenizer a second time unless its settings have add_bos_token
    tokenizer.init_kwargs.setdefault("name_or_path", "")
    if tokenizer.bos_token is not None:
        tokenizer.init_kwargs["add_bos_token"] = True
    how = {"hf_model": view, "tokenizer": tokenizer, "device": str(chat.device), "dtype": chat.dtype}
    try:
        return TransformerBridge.boot_transformers(name, **how)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise EmmechError(asked, type(chat.base).__name__, why, "to_nnsight, which takes any architecture")


def adapter_attribution(bridge: Any, tokens: Any, layer: int, *, targets: Any, against: Any) -> dict[str, Any]:
    """What the adapter at ``layer`` does to a logit difference: directly, and through later layers.

    Direct logit attribution: the adapter's write at the last position, through the final norm at its present scale, to
    the difference of two tokens' logits. Total effect: the same difference less that of a run without the adapter.
    What is left is what later layers make of the write. Where the block does not add the write to the residual stream
    as it is (Gemma 2 and 3 normalise it, Granite scales it), or where the logits are not a linear map of the stream
    over its root mean square, the direct part does not exist: it and the rest are NaN, and a warning says so.

    Args:
        bridge: from :func:`to_transformer_lens`, with a live LoRA pair on ``layer``'s down_proj.
        tokens: ``[batch, seq]`` token ids without padding.
        targets, against: token ids whose logits are compared, one each.

    Returns:
        ``direct``, ``total`` and ``indirect``, each ``[batch]``, in logits.

    Raises:
        EmmechError: there is no LoRA pair on that layer's down_proj.
    """
    adapted = [(name, one) for name, one in bridge.named_modules() if hasattr(one, "lora_A")]
    here = [one for name, one in adapted if f".{layer}." in f".{name}." and "down_proj" in f"{name}{one}"]
    pair: Any = next(iter(here), None)
    if pair is None:
        why, instead = "there is no LoRA pair on its down_proj", "the layer of run.adapters"
        raise refusal("attribute the adapter's write", "layer", layer, why, instead)
    seen: dict[str, torch.Tensor] = {}

    def read(tensor: torch.Tensor, hook: Any) -> None:
        name = next(iter(pair.lora_A))
        seen["write"] = pair.lora_B[name](pair.lora_A[name](tensor)) * pair.scaling[name]

    def keep(name: str) -> Any:
        return lambda tensor, hook: seen.update({name: tensor})

    places = {"block": f"blocks.{layer}.hook_out", "stream": "ln_final.hook_in", "norm": "ln_final.hook_scale"}
    hooks = [(f"blocks.{layer}.mlp.hook_post", read), *((place, keep(name)) for name, place in places.items())]
    factors = dict(pair.scaling)
    with torch.no_grad():
        with_adapter = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        try:
            pair.scaling.update(dict.fromkeys(factors, 0.0))
            without = bridge.run_with_hooks(tokens, fwd_hooks=[(places["block"], keep("unwritten"))])
        finally:
            pair.scaling.update(factors)
        difference = bridge.unembed.weight[targets] - bridge.unembed.weight[against]
        gain = bridge.ln_final(torch.ones_like(seen["write"][:1, :1]))[0, 0]  # an RMS norm of ones is its gain
        last = {name: tensor[:, -1] for name, tensor in seen.items()}
        direct = (last["write"] / last["norm"] * gain) @ difference

    tuned, base = (logits[:, -1, targets] - logits[:, -1, against] for logits in (with_adapter, without))
    total = tuned - base
    rounding = 32 * torch.finfo(direct.dtype).eps
    added = last["block"] - last["unwritten"] - last["write"]
    normed = last["stream"] / last["norm"] * gain
    read_off = (normed @ difference - tuned).abs() <= rounding * (normed.abs() @ difference.abs() + 1)
    if not read_off.all() or (added.abs() > rounding * (last["block"].abs().max() + 1)).any():
        why = "its block does not add what the adapter writes as it is, or its logits are capped or scaled"
        warnings.warn(f"the adapter at layer {layer} has no direct part in this model: {why}", stacklevel=2)
        direct = torch.full_like(total, float("nan"))
    return {"direct": direct, "total": total, "indirect": total - direct}
