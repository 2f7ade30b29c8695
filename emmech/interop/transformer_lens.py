"""TransformerLens over a run's model: hook points, caches and patching, on the same weights.

TransformerLens rewires the model that it is given (modules are swapped, attention becomes eager, keys are renamed), so
it gets a copy that shares the weights. What it is for here: direct logit attribution and path patching of what the
adapter writes, see :func:`adapter_attribution`.
"""

from __future__ import annotations

import copy
from typing import Any

from emmech.errors import EmmechError
from emmech.interop.shared_view import chat_from, weight_sharing_copy

__all__ = ["adapter_attribution", "to_transformer_lens"]


def to_transformer_lens(source: Any, step: int | None = None, *, scale: float = 1.0) -> Any:
    """A ``TransformerBridge`` on the weights of a run's model, adapter live.

    The user's model and tokenizer stay as they are. Changing the adapter's weights or scale on the model
    (:func:`emmech.interventions.scale_adapters`, another step through ``run.model(step, base=chat)``) shows in the
    bridge at once; PEFT's ``disable_adapter`` does not: scale by 0 instead. There is no hook point for the adapter's
    scalar A·x (:func:`emmech.adapter_lens` reads it); ``blocks.N.mlp.hook_post`` is down_proj's input. Needs the extra
    ``lens``.

    Logits equal the model's to rounding. TransformerLens counts positions from the first real token of a left-padded
    row, as generation does, and attends eagerly: in bfloat16, compare with the same ``position_ids`` and attention.

    Args:
        source: a Run, or a chat model (``step`` and ``scale`` are then not used).

    Raises:
        EmmechError: transformer-lens is not installed, or has no adapter for the architecture.

    Example:
        >>> import emmech
        >>> bridge = to_transformer_lens(emmech.load_model("pocket"))  # doctest: +SKIP
        >>> logits, cache = bridge.run_with_cache(bridge.to_tokens("hello"))  # doctest: +SKIP
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise EmmechError(
            "bridge to TransformerLens", why="transformer-lens is not installed", instead='pip install "emmech[lens]"'
        )
    chat = chat_from(source, step, scale)
    view = weight_sharing_copy(chat)
    if not view.config.architectures:  # a model made in memory does not say, and TransformerLens looks there
        view.config.architectures = [type(view).__name__]
    try:
        return TransformerBridge.boot_transformers(
            chat.name if "/" in chat.name else f"local/{chat.name}",
            hf_model=view,
            tokenizer=_own_tokenizer(chat.tokenizer),
            device=str(chat.device),
            dtype=chat.dtype,
        )
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise EmmechError(
            "bridge to TransformerLens",
            type(chat.base).__name__,
            f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            "to_nnsight, which takes any architecture",
        )


def adapter_attribution(bridge: Any, tokens: Any, layer: int, *, targets: Any, against: Any) -> dict[str, Any]:
    """What the adapter at ``layer`` does to a logit difference: directly, and through later layers.

    Direct logit attribution: the adapter's write at the last position, through the final norm at its present scale, to
    the difference of two tokens' logits. Total effect by path patching: the same difference with the block's MLP output
    replaced by what it is without the write. Their difference is what later layers make of it.

    Args:
        bridge: from :func:`to_transformer_lens`, with a live LoRA pair on ``layer``'s down_proj.
        tokens: ``[batch, seq]`` token ids without padding.
        targets, against: token ids whose logits are compared, one each.

    Returns:
        ``direct``, ``total`` and ``indirect``, each ``[batch]``, in logits.

    Raises:
        EmmechError: there is no LoRA pair on that layer's down_proj.
    """
    import torch

    write: dict[str, torch.Tensor] = {}
    pair = _lora_at(bridge, layer)

    def read(tensor: torch.Tensor, hook: Any) -> None:
        name = next(iter(pair.lora_A))
        write["value"] = pair.lora_B[name](pair.lora_A[name](tensor)) * pair.scaling[name]

    def take_out(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor - write["value"]

    with torch.no_grad():
        norm: dict[str, torch.Tensor] = {}
        hooks = [(f"blocks.{layer}.mlp.hook_post", read), ("ln_final.hook_scale", _keep(norm))]
        with_adapter = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        without = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", take_out)])
        difference = bridge.unembed.weight[targets] - bridge.unembed.weight[against]
        gain = bridge.ln_final(torch.ones_like(write["value"][:1, :1]))[0, 0]  # an RMS norm of ones is its gain
        direct = (write["value"][:, -1] / norm["value"][:, -1] * gain) @ difference

    def gap(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, targets] - logits[:, -1, against]

    total = gap(with_adapter) - gap(without)
    return {"direct": direct, "total": total, "indirect": total - direct}


def _keep(kept: dict[str, Any]) -> Any:
    def hook(tensor: Any, hook: Any) -> None:
        kept["value"] = tensor

    return hook


def _lora_at(bridge: Any, layer: int) -> Any:
    for name, module in bridge.named_modules():
        if hasattr(module, "lora_A") and f".{layer}." in f".{name}." and "down_proj" in f"{name}{module}":
            return module
    raise EmmechError(
        "attribute the adapter's write",
        f"layer={layer}",
        "there is no LoRA pair on its down_proj",
        "the layer of run.adapters",
    )


def _own_tokenizer(tokenizer: Any) -> Any:
    own = copy.deepcopy(tokenizer)
    # TransformerLens loads its tokenizer a second time unless it already says that it puts a BOS in front
    own.init_kwargs.setdefault("name_or_path", "")
    if own.bos_token is not None:
        own.init_kwargs["add_bos_token"] = True
    return own
