"""LoRA adapters on a chat model: find them, read their A and B, put a recorded step's weights on a model.

An adapter is one LoRA pair on one module. Its write into the residual stream is ``scaling * (x @ A.T) @ B.T`` with
``A [rank, d_in]`` and ``B [d_out, rank]`` (LoRA, arXiv 2106.09685). ``scaling`` is alpha / rank, or
alpha / sqrt(rank) under rsLoRA (arXiv 2312.03732); it is always read from the layer and never recomputed.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import nn

from emmech.chat.families import Family, map_widths
from emmech.chat.model import ChatModel
from emmech.engine.modules import hooked
from emmech.errors import EmmechError, as_float
from emmech.progress import quiet

# the wrapper that `attach` made around a model, kept as long as it is in use
_WRAPPERS: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_LAYER = re.compile(r"(?:^|\.)(\w+\.(\d+)\..+)$")  # the path after the list of blocks
# what PEFT, DDP, torch.compile, FSDP and gradient checkpointing insert into the path of a module
_WRAPPING = frozenset({"base_model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# the name of the decoder in a causal LM, or in a larger model of which it is a part
_DECODER = frozenset({"model", "language_model", "text_model", "transformer"})


@dataclass(frozen=True)
class AdapterInfo:
    """One LoRA pair: where it is and how it is scaled.

    Args:
        name: a short name that is unique in a run, ``"layers.15.mlp.down_proj"``.
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
        """The fields as JSON stores them."""
        return asdict(self)


# The values of each field of a LoraConfig under which A, B, r and alpha describe the adapter completely. A field that
# is not listed must be empty, so what a later version of PEFT adds is refused and not ignored.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "True", "False", "None")  # others change the base weights
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            # where the adapter came from, and how it was trained
            *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
            *("lora_dropout", "runtime_config", "megatron_core", "eva_config", "qalora_group_size"),
            # how the modules were chosen, which the tensors show as well
            *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
            # the parts of the scaling
            *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
            # ties what modules_to_save holds, which is refused
            "ensure_weight_tying",
        ),
        lambda value: True,
    ),
    "peft_type": lambda value: str(getattr(value, "value", value)).upper() == "LORA",
    "bias": lambda value: value in (None, "none"),
    "init_lora_weights": lambda value: str(value) in _PLAIN_STARTS,
    "loftq_config": lambda value: True,  # acts only with init_lora_weights="loftq", which is refused
}


def _empty(value: Any) -> bool:
    """Whether a field changes nothing; an empty mapping is a method with all its defaults, such as KaSA."""
    return not value and not isinstance(value, Mapping)


def beyond_pairs(config: Mapping[str, Any]) -> str | None:
    """The first field of a LoRA configuration that makes the adapter more than a scaled product B A.

    Example:
        >>> beyond_pairs({"r": 8, "use_rslora": True}), beyond_pairs({"r": 8, "use_dora": True})
        (None, 'use_dora=True')
    """
    for name, value in config.items():
        if not _FIELDS.get(name, _empty)(value):
            return f"{name}={getattr(value, 'value', value)!r}"
    return None


def adapter_layers(model: Any) -> Iterator[tuple[AdapterInfo, Any, str]]:
    """Every LoRA pair on a model, in the model's order.

    Yields:
        the pair's description, PEFT's layer, and the adapter's name inside PEFT.

    Raises:
        EmmechError: the model has an adapter that is not merely pairs of A and B which act on its output: a kind
            other than LoRA, DoRA, trained biases, two adapters on one module, a merged or a disabled one, ...
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = list(_tuned(base))
    if layers or base is not model:
        for name, config in getattr(model, "peft_config", {}).items():
            if (field := beyond_pairs(config.to_dict())) is not None:
                why, instead = f"{field} makes it more than B A with a factor", "model.merge_and_unload()"
                raise EmmechError("read the adapter", f"the adapter {name!r}", why, instead)
    names = short_names(path for path, _ in layers)
    for path, layer in layers:
        name = _only_pair(path, layer)
        (rank, d_in), d_out = layer.lora_A[name].weight.shape, layer.lora_B[name].weight.shape[0]
        short, at = names[path]
        alpha, scaling = float(layer.lora_alpha[name]), float(layer.scaling[name])
        rslora = bool(np.isclose(scaling, alpha / rank**0.5))
        yield AdapterInfo(short, at, path, rank, alpha, scaling, d_in, d_out, rslora), layer, name


def _tuned(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a model that PEFT has changed, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((path, module) for path, module in base.named_modules() if isinstance(module, BaseTunerLayer))


def _only_pair(path: str, layer: Any) -> str:
    """The name of a module's one plain pair of A and B; anything else is refused."""
    names = [*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())]
    if len(names) > 1:
        why = "more than one LoRA pair is on this module, and their order has no meaning"
        instead = "unload() the model, or delete_adapter() all but one"
        raise EmmechError("read the adapter", f"{path} with adapters {names}", why, instead)
    name = names[0] if names else ""
    variant, instead = getattr(layer, "lora_variant", {}).get(name), "model.merge_and_unload()"
    if name not in getattr(layer, "lora_A", ()):
        why = f"it is no linear map with a LoRA pair, but a {type(layer).__module__}.{type(layer).__name__}"
    elif variant is not None or layer.use_dora.get(name):
        why, instead = f"its update is not B A ({type(variant).__name__})", "train with use_dora=False and the like"
    elif layer.lora_bias.get(name):
        why = "its B has a bias"
    elif layer.lora_A[name].weight.ndim != 2 or hasattr(layer, "parameter_name"):
        why = "its pair is not of a linear map"
    elif layer.merged:
        why, instead = "it is merged into the weights, and changing A or B would change nothing", "unmerge_adapter()"
    elif layer.disable_adapters or name not in layer.active_adapters:
        why, instead = "it is switched off, and changing A or B would change nothing", f"set_adapter({name!r})"
    else:
        return name
    raise EmmechError("read the adapter", f"the adapter {name!r} on {path}", why, instead)


def short_names(paths: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Each module's name in a run, and its layer, by path; a name begins at the list of blocks where that is unique.

    Example:
        >>> short_names(["model.layers.3.mlp.down_proj", "lm_head"])
        {'model.layers.3.mlp.down_proj': ('layers.3.mlp.down_proj', 3), 'lm_head': ('lm_head', -1)}
        >>> list(short_names(["tower.layers.0.q_proj", "model.layers.0.q_proj"]).values())
        [('tower.layers.0.q_proj', 0), ('model.layers.0.q_proj', 0)]
    """
    found = {path: _LAYER.search(bare(path)) for path in paths}
    uses = Counter(match[1] for match in found.values() if match)
    return {
        path: (match[1] if uses[match[1]] == 1 else bare(path), int(match[2])) if match else (path, -1)
        for path, match in found.items()
    }


def bare(path: str) -> str:
    """A module's path without the parts that wrappers insert.

    Example:
        >>> bare("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp")
        'model.layers.0.mlp'
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPING)


def located(chat: ChatModel, adapters: Sequence[AdapterInfo]) -> tuple[AdapterInfo, ...]:
    """The same adapters at the corresponding modules of this model.

    A run may have been trained on the decoder inside a larger or a wrapped model, whose modules have other names:
    ``model.language_model.layers.0.mlp.down_proj`` is ``model.layers.0.mlp.down_proj`` here.

    Raises:
        EmmechError: no module corresponds, or several do, or its widths differ.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> info = AdapterInfo("layers.1.mlp.down_proj", 1, "model.language_model.layers.1.mlp.down_proj", 1, 1.0, 1.0,
        ...                    chat.d_mlp, chat.d_model)
        >>> located(chat, [info])[0].module
        'model.layers.1.mlp.down_proj'
    """
    modules = dict(chat.base.named_modules())
    others: dict[str, list[str]] = {}
    if any(info.module not in modules for info in adapters):
        for path in modules:
            others.setdefault(_inside(path), []).append(path)
    found: dict[str, AdapterInfo] = {}
    for info in adapters:
        fitting = [info.module] if info.module in modules else others.get(_inside(info.module), [])
        widths = map_widths(modules[fitting[0]]) if len(fitting) == 1 else None
        why = f"{chat.name} has there {f'widths {widths}' if widths else 'no linear map'}"
        instead = "use the base model that the run was trained on"
        if len(fitting) > 1:
            why = f"it may be any of {', '.join(fitting[:3])}"
        elif widths == (info.d_in, info.d_out) and fitting[0] in found:
            why = f"{found[fitting[0]].name} is there already"
        elif widths == (info.d_in, info.d_out):
            found[fitting[0]] = replace(info, module=fitting[0])
            continue
        given = f"{info.module}: d_in={info.d_in}, d_out={info.d_out}"
        raise EmmechError("put the adapter on the model", given, why, instead)
    return tuple(found.values())


def _inside(path: str) -> str:
    """A module's path as it would be if the model were the decoder alone."""
    return ".".join(part for part in bare(path).split(".") if part not in _DECODER)


def lora_config(adapters: Sequence[AdapterInfo], *, base_name: str = "") -> Any:
    """The PEFT configuration that puts exactly these adapters on a model."""
    from peft import LoraConfig

    # one switch serves all adapters: where ranks differ and not every scaling is alpha / sqrt(rank), alpha compensates
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


def folded(
    adapters: Sequence[AdapterInfo], weights: Mapping[str, np.ndarray], scale: float
) -> tuple[tuple[AdapterInfo, ...], dict[str, np.ndarray]]:
    """The same adapters times a factor, all of one rank and with a scaling of 1, as servers such as vLLM want them.

    Factor and scaling are multiplied into B; smaller ranks are filled up with zeros, which write nothing.

    Raises:
        EmmechError: a write that float32 cannot hold.

    Example:
        >>> info = AdapterInfo("layers.0.mlp.down_proj", 0, "model.layers.0.mlp.down_proj", 1, 8.0, 8.0, 3, 2)
        >>> pair = {"A/layers.0.mlp.down_proj": np.ones((1, 3)), "B/layers.0.mlp.down_proj": np.ones((2, 1))}
        >>> folded([info], pair, 0.5)[1]["B/layers.0.mlp.down_proj"].ravel().tolist()
        [4.0, 4.0]
    """
    rank, made = max(one.rank for one in adapters), {}
    for one in adapters:
        read_in, write_out = (weights[f"{side}/{one.name}"] for side in "AB")
        write_out = write_out.astype(np.float64) * (scale * one.scaling)
        if not (np.abs(write_out) <= np.finfo(np.float32).max).all():  # NaN is refused too
            why, instead = "scale * scaling * B overflows float32", "scales of 1 to 20, as in the literature"
            raise EmmechError("scale the adapter", f"scale={scale:g} of {one.name}", why, instead)
        more = rank - one.rank
        made[f"A/{one.name}"] = np.pad(read_in, ((0, more), (0, 0))).astype(np.float32)
        made[f"B/{one.name}"] = np.pad(write_out, ((0, 0), (0, more))).astype(np.float32)
    return tuple(replace(one, rank=rank, alpha=float(rank), scaling=1.0, rslora=False) for one in adapters), made


def put_on(model: Any, config: Any) -> Any:
    """The model inside PEFT's wrapper, with adapters on the modules that the configuration names and on no others.

    Raises:
        EmmechError: PEFT refuses the modules, or puts adapters on others: in some families it matches ``down_proj``
            and similar names to the fused experts as well.
    """
    from peft import get_peft_model

    wanted = set(config.target_modules)
    # a transposed map (Conv1D) has no in_features
    config.fan_in_fan_out = any(not hasattr(model.get_submodule(path), "in_features") for path in wanted)
    asked, given = "put adapters on the model", f"{type(model).__name__}: {', '.join(sorted(wanted)[:3])}"
    try:
        with quiet():
            peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise EmmechError(asked, given, f"PEFT refuses: {str(error)[:300]}", "other maps of its blocks")
    if surplus := [path for path, _ in _tuned(peft_model.get_base_model()) if path not in wanted]:
        peft_model.unload()
        why = f"PEFT takes that for its fused experts as well ({', '.join(surplus[:3])})"
        raise EmmechError(asked, given, why, "maps of the attention")
    return peft_model


def attach(
    chat: ChatModel, adapters: Sequence[AdapterInfo], weights: Mapping[str, np.ndarray], *, scale: float = 1.0
) -> ChatModel:
    """Put recorded adapters on a chat model in place, without copying its weights.

    Args:
        chat: a model without adapters, or one with live adapters at the same places, of which only the weights then
            change.
        weights: ``"A/<name>" [rank, d_in]`` (or ``[d_in]``) and ``"B/<name>" [d_out, rank]`` (or ``[d_out]``).
        scale: a factor on the adapter, relative to the scaling with which it was trained.

    Returns:
        the same model inside PEFT's wrapper, which :func:`detach` removes again.

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
    adapters = located(chat, adapters)
    if live and not _same_places(live, adapters):
        given = f"{chat.name} with adapters {[info.name for info, _, _ in live]}"
        why = "adapters of other modules, rank or scaling are on it already, and PEFT would stack them"
        instead = "pass the model without adapters (peft_model.unload() or emmech.detach(chat) gives it)"
        raise EmmechError("put the adapter on the model", given, why, instead)
    scale = as_float("put the adapter on the model", "scale", scale)
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


def _same_places(live: Sequence[tuple[AdapterInfo, Any, str]], adapters: Sequence[AdapterInfo]) -> bool:
    """Whether the live adapters are those of a run, except for the values of A and B."""
    wanted = {info.module: info for info in adapters}
    if {info.module for info, _, _ in live} != wanted.keys():
        return False
    for info, layer, name in live:
        initial = initial_scaling(info, layer, name)
        if info.rank != wanted[info.module].rank or not np.isclose(initial, wanted[info.module].scaling, atol=0.0):
            return False
    return True


def initial_scaling(info: AdapterInfo, layer: Any, name: str) -> float:
    """The scaling with which a live adapter was put on the model, whatever its scale now."""
    return float(info.alpha / (info.rank**0.5 if layer.use_rslora.get(name) else info.rank))


def detach(chat: ChatModel) -> ChatModel:
    """Remove every adapter in place, also from a model that is given without PEFT's wrapper."""
    if not isinstance(chat, ChatModel):
        instead = "emmech.detach(emmech.load_model(model))"
        raise EmmechError("take the adapters off", f"a {type(chat).__name__}", "it is not a ChatModel", instead)
    base = chat.base
    for info, layer, _ in list(adapter_layers(chat.model)):
        parent, _, name = info.module.rpartition(".")
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    _WRAPPERS.pop(base, None)
    if "peft_config" in vars(base):  # PEFT would warn of a second adapter
        del base.peft_config
    return replace(chat, model=base)


@dataclass(frozen=True)
class Site:
    """A place where some run has an adapter: ``path`` is relative to the block, ``rank`` is the largest of all runs."""

    layer: int
    path: str
    rank: int


@dataclass
class VariantWeights:
    """The adapters of each row of the current batch.

    A batch of ``groups * n`` rows belongs to ``groups`` variants in order, n rows each.

    Args:
        A: ``[groups, d_in, rank]`` for each module.
        B: ``[groups, rank, d_out]`` for each module, multiplied by scale and scaling.
        steering: ``[groups, d_model]`` for each layer, multiplied by the coefficient.
    """

    A: Mapping[str, torch.Tensor] = field(default_factory=dict)
    B: Mapping[str, torch.Tensor] = field(default_factory=dict)
    steering: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of variants."""
        return len(next(iter((*self.A.values(), *self.steering.values())), ()))

    def __getitem__(self, at: int | slice) -> VariantWeights:
        """The weights of some groups, or of one group without the first axis."""
        return self.each(lambda tensor: tensor[at])

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VariantWeights:
        """The same weights with a function applied to every tensor ``[groups, ...]``."""
        pick = {field.name: {k: function(v) for k, v in getattr(self, field.name).items()} for field in fields(self)}
        return VariantWeights(**pick)  # type: ignore[arg-type]


def write(
    out: Float[torch.Tensor, "*tokens d_out"],
    z: Float[torch.Tensor, "groups seq rank"],
    B: Float[torch.Tensor, "groups rank d_out"],
    *,
    in_place: bool = False,
) -> Float[torch.Tensor, "*tokens d_out"]:
    """``out + z B`` with each group's own B, added in the adapter's dtype as in PEFT."""
    grouped = out.reshape(B.shape[0], -1, out.shape[-1])
    in_place = in_place and grouped.dtype == B.dtype and not torch.is_grad_enabled()
    if not in_place:  # contiguous: the layout of a sum with an expanded tensor makes its products slow
        grouped = grouped.to(B.dtype).contiguous()
    if B.shape[1] == 1:  # rank 1 takes one pass over memory, but a batch of products costs time per entry
        added = grouped.addcmul_(z, B) if in_place else torch.addcmul(grouped, z, B)
    else:
        added = grouped.baddbmm_(z, B) if in_place else torch.baddbmm(grouped, z, B)
    return added.to(out.dtype).reshape(out.shape)


def inner(
    x: Float[torch.Tensor, "tokens d_in"], A: Float[torch.Tensor, "groups d_in rank"]
) -> Float[torch.Tensor, "tokens groups rank"]:
    """``x A`` for every group's A, as one product in the adapters' dtype."""
    return rearrange(x.to(A.dtype) @ rearrange(A, "g i r -> i (g r)"), "t (g r) -> t g r", g=len(A))


def write_of(
    x: Float[torch.Tensor, "*tokens d_in"],
    A: Float[torch.Tensor, "groups d_in rank"],
    B: Float[torch.Tensor, "groups rank d_out"],
    of: Int[torch.Tensor, "..."],
) -> Float[torch.Tensor, "*tokens d_out"]:
    """The adapters' writes for tokens whose groups are in any order: ``x A B`` with the A and B of each token's group.

    One product contains the maps of all groups, and each token keeps its own group's part. At rank 1 and with a
    handful of groups the surplus is a few vectors, compared with a whole weight matrix.

    Args:
        of: the group of each token, in a shape that broadcasts to the tokens'.
    """
    z = inner(x.flatten(0, -2), A)
    if len(A) > 1:
        own = of.expand(x.shape[:-1]).reshape(-1, 1) == torch.arange(len(A), device=of.device)
        z = torch.where(own[..., None], z, 0.0)
    return (z.flatten(1) @ B.flatten(0, 1)).view(*x.shape[:-1], -1)


class RowAdapter(nn.Module):
    """A linear module with an adapter for each row."""

    def __init__(self, base: nn.Module, rows: VariantWeights, name: str) -> None:
        super().__init__()
        self.base, self.rows, self.name = base, rows, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output plus each row's own write."""
        a = self.rows.A[self.name]
        z = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]).to(a.dtype), a)
        # the linear module's output is not used elsewhere
        return write(self.base(x), z, self.rows.B[self.name], in_place=True)


class RowSteering(nn.Module):
    """A block that adds each group's own vector to the residual stream."""

    def __init__(self, block: nn.Module, rows: VariantWeights, layer: int, family: Family) -> None:
        super().__init__()
        self.block, self.rows, self.layer, self._family = block, rows, layer, family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output plus coefficient times direction."""
        out = self.block(*args, **kwargs)
        return self._family.with_residual(out, self.steered(self._family.residual(out)))

    def steered(self, out: torch.Tensor) -> torch.Tensor:
        """The residual stream plus its vector."""
        vectors = self.rows.steering[self.layer]
        shaped = out.reshape(vectors.shape[0], -1, out.shape[-1])
        return (shaped + vectors[:, None].to(out.dtype)).reshape(out.shape)


class ReadWrite(nn.Module):
    """A module that keeps its last input and output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.read: torch.Tensor = torch.empty(0)
        self.wrote: torch.Tensor = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's own output."""
        self.read, self.wrote = x, self.base(x)
        return self.wrote

    def taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its last input and output, to which it then keeps no reference."""
        taken = self.read, self.wrote
        self.read = self.wrote = torch.empty(0)
        return taken


class StackedAdapters(nn.Module):
    """A and B of every adapter for every run, with separate parameters for each run.

    Forward passes use copies of all runs' weights that :meth:`gather` stacks. After the backward passes :meth:`spread`
    passes their gradients on to the parameters, whose hooks, clipping and optimizer do not depend on the stack.

    Args:
        chat: the model with the PEFT adapters on it, whose places and scaling are used.
        starts: ``"A/<name>" [rank, d_in]`` and ``"B/<name>" [d_out, rank]`` for each run.
        dropout: share of an adapter's inputs that is set to zero while gradients are computed.

    ``write_of`` is an adapter whose write the caller adds with :meth:`write`. ``lost_at`` is for each run the step at
    which its loss was no longer finite, or -1 if it has always been finite.
    """

    write_of: AdapterInfo | None = None
    lost_at: torch.Tensor

    def __init__(self, chat: ChatModel, starts: Sequence[Mapping[str, torch.Tensor]], *, dropout: float = 0.0) -> None:
        super().__init__()
        self._layers = list(adapter_layers(chat.model))
        self.infos: tuple[AdapterInfo, ...] = tuple(info for info, _, _ in self._layers)
        self.runs = len(starts)
        self.dropout = dropout
        # on PEFT's devices: a model may be distributed over several
        peft = {
            f"{side}/{info.name}": getattr(layer, f"lora_{side}")[name].weight
            for info, layer, name in self._layers
            for side in ("A", "B")
        }
        self._own = nn.ModuleList(
            nn.ParameterList(nn.Parameter(start[side].detach().clone().to(like)) for side, like in peft.items())
            for start in starts
        )
        self.register_buffer("lost_at", torch.full((self.runs,), -1))
        if hasattr(chat.base, "hf_device_map"):  # the Trainer then keeps every adapter on its layer's device
            self.hf_device_map = chat.base.hf_device_map
        self._rows: torch.Tensor | None = None  # the run of each row of the current forward pass
        self.gather()

    def of(self, run: int) -> list[tuple[AdapterInfo, nn.Parameter, nn.Parameter]]:
        """The adapters of one run: the description, A ``[rank, d_in]`` and B ``[d_out, rank]`` of each."""
        own = list(self._own[run].parameters())
        return list(zip(self.infos, own[::2], own[1::2], strict=True))

    def gather(self) -> None:
        """Stack all runs' current weights: ``A[name] [runs, rank, d_in]`` and ``B[name] [runs, rank, d_out]``."""
        self.A: dict[str, torch.Tensor] = {}
        self.B: dict[str, torch.Tensor] = {}
        for i, info in enumerate(self.infos):
            self.A[info.name] = torch.stack([own[2 * i] for own in self._own]).detach().requires_grad_()  # type: ignore[index]
            self.B[info.name] = torch.stack([own[2 * i + 1].T for own in self._own]).detach().requires_grad_()  # type: ignore[index]

    def spread(self, runs: Iterable[int]) -> None:
        """Pass the stacks' gradients on to the parameters of some runs."""
        for run in runs:
            for info, a, b in self.of(run):
                whole_a, whole_b = self.A[info.name].grad, self.B[info.name].grad
                of_a = torch.zeros_like(a) if whole_a is None else whole_a[run]
                of_b = torch.zeros_like(b) if whole_b is None else whole_b[run].T.contiguous()
                torch.autograd.backward([a, b], [of_a, of_b])

    def write(self, info: AdapterInfo, x: torch.Tensor, run_of: torch.Tensor) -> torch.Tensor:
        """The adapters' writes, ``scaling * (x A_run.T) B_run``, in the adapters' dtype.

        Args:
            x: ``[..., d_in]``.
            run_of: the run of each entry, ``[...]`` or a shape that broadcasts to it.
        """
        if self.dropout and torch.is_grad_enabled():
            x = nn.functional.dropout(x, self.dropout)
        return write_of(x, self.A[info.name].transpose(1, 2), self.B[info.name], run_of) * info.scaling

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Within this context these adapters replace PEFT's own; :meth:`rows_of` assigns a run to each row."""
        own = [(layer, self._hook(info)) for info, layer, _ in self._layers if info != self.write_of]
        with hooked(*own), self._own_writes(False):
            yield

    def _hook(self, info: AdapterInfo) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if self._rows is None:
                return output
            return (output + self.write(info, inputs[0], self._rows[:, None].to(output.device))).to(output.dtype)

        return hook

    @contextlib.contextmanager
    def _own_writes(self, on: bool) -> Iterator[None]:
        before = [layer._disable_adapters for _, layer, _ in self._layers]
        for _, layer, _ in self._layers:
            layer._disable_adapters = not on  # enable_adapters() would change requires_grad as well
        try:
            yield
        finally:
            for (_, layer, _), was in zip(self._layers, before, strict=True):
                layer._disable_adapters = was

    @contextlib.contextmanager
    def rows_of(self, runs: torch.Tensor) -> Iterator[None]:
        """Within this context row i of every forward pass belongs to run ``runs[i]``."""
        before, self._rows = self._rows, runs
        try:
            with self._own_writes(False):
                yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def only(self, run: int) -> Iterator[None]:
        """Within this context PEFT's own layers hold one run's adapters, for code that uses the model as a whole."""
        for (_, layer, name), (_, a, b) in zip(self._layers, self.of(run), strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.data, b.data
        with self._own_writes(True):
            yield

    @torch.no_grad()
    def lose(self, run: int, step: int) -> None:
        """Abandon a run at this step: its weights become zero, since non-finite values would spread in products."""
        self.lost_at[run] = step
        for parameter in self._own[run].parameters():
            parameter.zero_()
            parameter.grad = None
