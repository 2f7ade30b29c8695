"""Decoder families: where each keeps its parts, and the numbers between them.

This is the only module that spells the name of a projection or a norm, or that lists model types. A family that is
not listed is found by structure: the longest list of blocks next to the input embedding, the linear map by which each
block's MLP writes into the residual stream, the final norm and the unembedding. What the model does with its logits
(a multiplier, a soft cap) is measured on its own forward, never assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from emmech.errors import EmmechError

WRITE = "mlp.down_proj"  # the MLP's write into the residual stream, as recipes name it
_ATTENTION_MAPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ALL_MAPS = (*_ATTENTION_MAPS, "mlp.gate_proj", "mlp.up_proj", WRITE)
_ROLES = ("query", "key", "value", "out", "gate", "up", "down")  # of ALL_MAPS, in their order


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps its parts, as attribute paths, and what happens between them.

    The defaults are those of Llama and Qwen. Paths of parts that a family does not have are None.

    Args:
        name: of the family.
        trunk: from the causal LM to the decoder without its unembedding.
        unembedding: from the causal LM to the map ``[d_model] -> [vocab]``.
        blocks: from the trunk to the list of blocks.
        final_norm: from the trunk to the norm before the unembedding.
        rotary: from the trunk to the module that makes rotary positions.
        attention, mlp: from a block to its two halves.
        query, key, value, out: from a block to the maps of its attention; the first three may be one fused map.
        gate, up, down: from a block to the maps of its MLP; ``down`` is the MLP's write into the residual stream, and
            None where that is no single linear map (a mixture of experts).
        before_attention, after_attention, before_mlp, after_mlp: from a block to the norms of what each half reads and
            of what it writes.
        query_norm, key_norm: from a block to the norms of queries and keys.
        norm_offset: norms multiply by their weight plus this.
        residual_scale: each half's write is multiplied by this before it is added to the residual stream.
        stream: blocks give several residual streams ``[streams, batch, seq, d_model]`` (Gemma 3n), and this is the one
            that their halves read and write; None where there is one stream.
        parallel: the MLP reads what the attention reads, not what the attention wrote.
        logit_scale: logits are the unembedding's output times this.
        logit_cap: the logits are then soft-capped, ``cap * tanh(logits / cap)``; None where they are not.
        own_head: a multiplier and a soft cap do not describe the logits, so that the model's own forward has to make
            them.
        written_out: a block is exactly what these fields say (rotary positions over the whole head, a gated MLP,
            nothing else), so that a written-out forward may be tried in its place.

    Example:
        >>> Family(blocks="decoder.blocks").down
        'mlp.down_proj'
    """

    name: str = "decoder"
    trunk: str = "model"
    unembedding: str = "lm_head"
    blocks: str = "layers"
    final_norm: str | None = "norm"
    rotary: str | None = "rotary_emb"
    attention: str | None = "self_attn"
    mlp: str | None = "mlp"
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    out: str | None = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str | None = WRITE
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_offset: float = 0.0
    residual_scale: float = 1.0
    stream: int | None = None
    parallel: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    own_head: bool = False
    written_out: bool = False

    @property
    def writes(self) -> tuple[str, ...]:
        """Paths from a block to the maps that write into the residual stream."""
        return tuple(path for path in (self.out, self.down) if path is not None)

    def site(self, name: str) -> str:
        """This family's own path for a map that a recipe names as Llama does; any other path is returned as it is.

        Example:
            >>> Family(down="mlp.c_proj").site("mlp.down_proj")
            'mlp.c_proj'
        """
        own = getattr(self, _ROLES[ALL_MAPS.index(name)]) if name in ALL_MAPS else None
        return own or name

    def parts(self, block: nn.Module) -> Parts:
        """The modules of one block, by role; None where the block has no such part."""
        found = {role: _at(block, getattr(self, role)) for role in _MODULES}
        attention = found["attention"]
        config = getattr(attention, "config", None)
        # where layers are of several kinds, each attention has a window of its own, or None
        shared = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
        window = getattr(attention, "sliding_window", shared)
        cap = getattr(attention, "attn_logit_softcapping", None)
        return Parts(**found, window=int(window) if window else None, attention_cap=cap)

    @staticmethod
    def fused(block: nn.Module) -> bool:
        """Whether the block has experts whose maps are one parameter, which LoRA cannot adapt."""
        return any("experts" in path and not list(part.children()) for path, part in block.named_modules())

    def residual(self, output: Any) -> torch.Tensor:
        """The residual stream ``[batch, seq, d_model]`` in what a block returns, which may be a tuple."""
        whole: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return whole if self.stream is None else whole[self.stream]

    def with_residual(self, output: Any, changed: torch.Tensor) -> Any:
        """What a block returns, with another residual stream in it."""
        if isinstance(output, tuple):
            return (self.with_residual(output[0], changed), *output[1:])
        if self.stream is None:
            return changed
        return torch.stack([changed if at == self.stream else one for at, one in enumerate(output)])

    def steered(self, output: Any, vector: torch.Tensor) -> Any:
        """What a block returns, with a vector added to its residual stream."""
        before = self.residual(output)
        return self.with_residual(output, before + vector.to(before))

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        """The model's logits from what its unembedding gives, where ``own_head`` is False."""
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        return raw if self.logit_cap is None else torch.tanh(raw / self.logit_cap) * self.logit_cap


@dataclass(frozen=True)
class Parts:
    """The modules of one block, named as in :class:`Family`."""

    attention: Any
    mlp: Any
    query: Any
    key: Any
    value: Any
    out: Any
    gate: Any
    up: Any
    down: Any
    before_attention: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any
    query_norm: Any
    key_norm: Any
    window: int | None  # how many positions back its attention sees, the own one included; None for all
    attention_cap: float | None  # a soft cap on its attention's scores


_MODULES = tuple(name for name in Parts.__dataclass_fields__ if name not in ("window", "attention_cap"))
_QK: dict[str, Any] = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_LLAMA = Family("llama", written_out=True)
_GEMMA = Family(
    "gemma2",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_offset=1.0,
    written_out=True,
)
# families whose blocks may be written out; every other one is found by structure
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "qwen2": replace(_LLAMA, name="qwen2"),
    "mistral": replace(_LLAMA, name="mistral"),
    "qwen3": replace(_LLAMA, name="qwen3", **_QK),
    "gemma": replace(_LLAMA, name="gemma", norm_offset=1.0),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, name="gemma3_text", **_QK),
    # the multimodal Gemma 3 (4B and up) keeps its text decoder one level deeper
    "gemma3": replace(_GEMMA, name="gemma3", trunk="model.language_model", **_QK),
    "granite": replace(_LLAMA, name="granite"),
}

# the families that users gave for models in memory, which are also met without their ChatModel
_GIVEN: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()
# names by which families that are not listed spell a part, most common first; paths are from the part's own half
_NAMES: Mapping[str, tuple[str, ...]] = {
    "query": ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "key": ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "value": ("v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "out": ("o_proj", "out_proj", "dense", "c_proj"),
    "query_norm": ("q_norm", "q_layernorm", "query_layernorm"),
    "key_norm": ("k_norm", "k_layernorm", "key_layernorm"),
    "gate": ("gate_proj", "gate_up_proj", "w1"),
    "up": ("up_proj", "gate_up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
}
_FINAL_NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm")
_NORMS = {
    "before_attention": ("input_layernorm", "ln_1", "norm_1", "operator_norm", "self_attn_layer_norm"),
    "before_mlp": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm_2", "ffn_norm"),
    "after_mlp": ("post_feedforward_layernorm", "post_mlp_layernorm"),
}
_ATTENTION = ("attention", "attn", "mixer", "mamba", "deltanet", "conv")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe")
_NOT_THE_WRITE = (".base_layer", ".lora_", "shared", "gate", "router", "norm")  # maps of an MLP that are not its last


def find_family(model: Any) -> Family:
    """Where the model keeps its parts: a known family's entry, or what its structure shows.

    Args:
        model: a causal LM (``PreTrainedModel``) without PEFT's wrapper.

    Raises:
        EmmechError: it has no unembedding or no list of blocks, so that it is no decoder-only language model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> family = find_family(GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50)))
        >>> family.trunk, family.blocks, family.down, family.final_norm
        ('transformer', 'h', 'mlp.c_proj', 'ln_f')
    """
    if model in _GIVEN:
        return _GIVEN[model]
    known = FAMILIES.get(str(getattr(model.config, "model_type", "")))
    if known is None or _missing(model, known):
        known = _by_structure(model)
    config = model.config.get_text_config()
    scale = getattr(config, "residual_multiplier", None)
    known = replace(known, residual_scale=float(scale or 1.0), stream=getattr(config, "altup_active_idx", None))
    return _with_logits(model, known)


def given_family(model: Any, family: Family) -> Family:
    """A family that a user gave, checked against the model, which is remembered to be of it.

    Raises:
        EmmechError: the model has no such parts.
    """
    if missing := _missing(model, family):
        why = f"{type(model).__name__} has no such part: {missing}"
        instead = "load_model(model) without family= finds the parts of most decoders"
        raise EmmechError("find the model's blocks", f"{type(model).__name__}, family={family}", why, instead)
    _GIVEN[model] = _with_logits(model, family)
    return _GIVEN[model]


def _missing(model: nn.Module, family: Family) -> str | None:
    """The first path of the family that the model does not have, as ``'final_norm="norm"'``, or None."""
    trunk = _at(model, family.trunk)
    blocks = _at(trunk, family.blocks)
    if trunk is None or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return f'trunk="{family.trunk}"' if trunk is None else f'blocks="{family.blocks}"'
    for name, parents in (("unembedding", [model]), ("final_norm", [trunk]), ("down", list(blocks))):
        path = getattr(family, name)
        if path is not None and all(_at(one, path) is None for one in parents):
            return f'{name}="{path}"'
    return None


def _by_structure(model: Any) -> Family:
    name = str(getattr(model.config, "model_type", type(model).__name__))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    lists = [(path, module) for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
    # a list of bare maps (Gemma 3n has some) is not one of blocks
    lists = [(path, module) for path, module in lists if any(True for _ in module[0].children())]
    # the text decoder holds the input embedding, which tells it from an image or audio tower
    near = [one for one in lists if embedding in modules[one[0].rpartition(".")[0]].children()]
    if head is None or id(head) not in paths or not near:
        given, lacks = f"{type(model).__name__} (model type {name!r})", "list of blocks next to its input embedding"
        own = 'emmech.chat.Family(trunk="model", blocks="layers", final_norm="norm", unembedding="lm_head")'
        instead = f"a decoder-only language model, or load_model(..., family={own}) with its own names"
        why = f"it has no {lacks if head is not None else 'unembedding'}"
        raise EmmechError("find the model's blocks", given, why, instead)
    whole, blocks = max(near, key=lambda one: len(one[1]))
    trunk, _, inner = whole.rpartition(".")
    parent = modules[trunk]
    norms = [path for path, part in parent.named_children() if _is_norm(part) and "embed" not in path]
    found: dict[str, Any] = {"rotary": _first(parent, ("rotary_emb",))}
    found["final_norm"] = _first(parent, (*_FINAL_NORMS, *norms))
    block = next((one for one in blocks if _write_path(model, one)), blocks[0])
    found["down"] = _write_path(model, block)
    found["mlp"] = found["down"].rpartition(".")[0] or None if found["down"] else _half(block, _MLP)
    # blocks of one model may differ (a recurrence here, an attention there): the first with queries speaks for them
    halves = [(one, _half(one, _ATTENTION)) for one in blocks]
    asking = [(one, half) for one, half in halves if half and _first(_at(one, half), _NAMES["query"])]
    attending, found["attention"] = next(iter(asking or halves))
    attention_roles = ("query", "key", "value", "out", "query_norm", "key_norm")
    for role in (*attention_roles, "gate", "up"):
        owner, half = (attending, found["attention"]) if role in attention_roles else (block, found["mlp"])
        named = _first(_at(owner, half), _NAMES[role])
        found[role] = f"{half}.{named}" if named else None
    found |= {role: _first(block, names) for role, names in _NORMS.items()}
    return Family(name=name, trunk=trunk, blocks=inner, unembedding=paths[id(head)], **found)


def _write_path(model: Any, block: nn.Module) -> str | None:
    """Path in the block to the linear map by which its MLP writes into the residual stream; None if it is not one."""
    width = int(model.config.get_text_config().hidden_size)
    parts = dict(block.named_modules())
    if any("experts" in path for path in parts):
        return None  # what the experts write does not go through one map
    maps = [path for path, module in parts.items() if (map_widths(module) or (0, 0))[1] == width]
    maps = [path for path in maps if not any(word in path for word in (*_ATTENTION, *_NOT_THE_WRITE))]
    within = [path for path in maps if any(word in path.rpartition(".")[0].lower() for word in _MLP)]
    near = [path for path in maps if "." not in path and path.startswith("fc")]
    return (within or near or [None])[-1]


def map_widths(module: Any) -> tuple[int, int] | None:
    """Input and output width of a linear map (PEFT's layer around it, or a transposed Conv1D, too); None of others."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, nn.Linear) or (hasattr(base, "in_features") and hasattr(base, "out_features")):
        return int(base.in_features), int(base.out_features)
    if type(base).__name__ == "Conv1D":
        return int(base.nx), int(base.nf)
    return None


def is_write(name: str) -> bool:
    """Whether an adapter's name says that its module writes into the residual stream, in any known spelling.

    Example:
        >>> is_write("layers.3.mlp.down_proj"), is_write("layers.3.self_attn.q_proj")
        (True, False)
    """
    return name.rpartition(".")[2] in (*_NAMES["out"], "down_proj", "fc2", "w2", "dense_4h_to_h")


def _with_logits(model: Any, family: Family) -> Family:
    """The family with the logits' multiplier and soft cap, as the model's own forward has them."""
    head: Any = _at(model, family.unembedding)
    weight = getattr(head, "weight", None)
    # a head in FSDP's shards cannot run alone
    if weight is None or weight.device.type == "meta" or hasattr(weight, "full_tensor"):
        return family
    config = model.config.get_text_config()
    numbers = {
        float(value)
        for key, value in config.to_dict().items()
        if ("logit" in key or "multiplier" in key) and isinstance(value, int | float) and value > 0
    }
    cap = getattr(config, "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, int(config.hidden_size), generator=generator).to(weight)
    try:
        with torch.no_grad():
            raw, wanted = head(hidden).float(), own_logits(model, family, hidden).float()
    except Exception:  # whatever an unfamiliar forward raises: it cannot be asked, so its head is taken as it is
        return family
    near = 2e-2 if weight.dtype.itemsize < 4 else 1e-4
    for scale in sorted({1.0, *numbers, *(1 / number for number in numbers)}, key=lambda value: abs(value - 1)):
        tried = replace(family, logit_scale=scale, logit_cap=float(cap) if cap else None)
        made = tried.logits(raw)
        if made.shape == wanted.shape and bool((made - wanted).abs().max() <= near * wanted.abs().max()):
            return tried
    own, ids = replace(family, own_head=True), torch.tensor([[0, 1]], device=weight.device)
    with torch.no_grad():
        given = own_logits(model, own, model.get_submodule(family.trunk)(input_ids=ids).last_hidden_state).float()
        wanted = model(input_ids=ids).logits.float()
    if given.shape != wanted.shape or bool((given - wanted).abs().max() > near * wanted.abs().max()):
        asked = "find how the model makes its logits"
        why = f"they are not made from what its trunk {family.trunk!r} gives"
        raise EmmechError(asked, f"{type(model).__name__} (family {family.name})", why, "a decoder-only language model")
    return own


def own_logits(model: Any, family: Family, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[..., vocab]`` of what the trunk gave ``[..., d_model]``, made by the model's own forward."""
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    view = _with_trunk(model, family.trunk, rows)
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
    logits: torch.Tensor = type(model).forward(view, input_ids=ids, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


def _with_trunk(module: Any, path: str, hidden: torch.Tensor) -> Any:
    """A view of the model whose trunk, without its hooks, gives these hidden states; weights are shared."""
    view = copy.copy(module)
    if path:
        child, _, rest = path.partition(".")
        view._modules = {**module._modules, child: _with_trunk(module.get_submodule(child), rest, hidden)}
    else:
        view.forward = lambda *args, **kwargs: _Output((hidden,))
        view._forward_hooks, view._forward_pre_hooks = {}, {}
    return view


class _Output(tuple):
    """A model's output that has nothing but its last hidden state."""

    last_hidden_state = property(itemgetter(0))

    def __getattr__(self, name: str) -> None:
        return None


def _at(module: Any, path: str | None) -> Any:
    """The submodule at a path, or None."""
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
    return module if path else None


def _first(module: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _half(block: nn.Module, words: tuple[str, ...]) -> str | None:
    """The block's child whose name, or else whose class, has one of the words in it."""
    parts = {path: type(part).__name__ for path, part in block.named_children() if not _is_norm(part)}
    parts = {path: kind for path, kind in parts.items() if kind != "Dropout"}
    named = [path for path in parts if any(word in path.lower() for word in words)]
    named += [path for path, kind in parts.items() if any(word in kind.lower() for word in words)]
    return named[0] if named else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
