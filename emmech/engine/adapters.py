"""LoRA adapters on a chat model: find them, read their A and B, put a recorded step's weights on a model.

An adapter is one LoRA pair on one module: its write into the residual stream is ``scaling * (x @ A.T) @ B.T`` with
``A [rank, d_in]`` and ``B [d_out, rank]`` (LoRA, arXiv 2106.09685). ``scaling`` is alpha / rank, or
alpha / sqrt(rank) under rsLoRA (arXiv 2312.03732); it is always read off the layer, never recomputed.
"""

from __future__ import annotations

import contextlib
import re
import weakref
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
            why = "its update is not B A: the magnitude is trained too"
            raise EmmechError("read the adapter", f"{path} (DoRA)", why, "train with use_dora=False")
        (rank, d_in), d_out = module.lora_A[name].weight.shape, module.lora_B[name].weight.shape[0]
        found = _LAYER.search(path)
        short, layer = (found[1], int(found[2])) if found else (path, -1)
        alpha, scaling = float(module.lora_alpha[name]), float(module.scaling[name])
        rslora = bool(np.isclose(scaling, alpha / rank**0.5))
        yield AdapterInfo(short, layer, path, rank, alpha, scaling, d_in, d_out, rslora), module, name


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
    asked, given = "put adapters on the model", f"{type(model).__name__}: {', '.join(sorted(wanted)[:3])}"
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise EmmechError(asked, given, f"PEFT refuses: {str(error)[:300]}", "other maps of its blocks")
    if surplus := [info.module for info, _, _ in adapter_layers(peft_model) if info.module not in wanted]:
        peft_model.unload()
        why = f"PEFT takes that for its fused experts as well ({', '.join(surplus[:3])})"
        raise EmmechError(asked, given, why, "maps of the attention")
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
        given = f"{chat.name} with adapters {[info.name for info, _, _ in live]}"
        why = "other adapters are on it already, and PEFT would stack them"
        instead = "pass the model without adapters (peft_model.unload() or emmech.detach(chat) gives it)"
        raise EmmechError("put the adapter on the model", given, why, instead)
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
    """Take every adapter off, in place, also from a model that is given without PEFT's wrapper around it."""
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


def _check_widths(chat: ChatModel, adapters: Sequence[AdapterInfo]) -> None:
    modules = dict(chat.base.named_modules())
    for adapter in adapters:
        widths = map_widths(modules.get(adapter.module))
        if widths != (adapter.d_in, adapter.d_out):
            given = f"{adapter.name}: d_in={adapter.d_in}, d_out={adapter.d_out}"
            why = f"{chat.name} has there {f'widths {widths}' if widths else 'no linear map'}"
            instead = "use the base model that the run was trained on"
            raise EmmechError("put the adapter on the model", given, why, instead)


@dataclass(frozen=True)
class Site:
    """Where some run has an adapter: ``path`` is relative to the block; ``rank`` is the largest of all runs."""

    layer: int
    path: str
    rank: int


@dataclass
class VariantWeights:
    """Which adapter each row of the batch under way has.

    A batch of ``groups * n`` rows belongs to ``groups`` variants in order, n rows each.

    Args:
        A: per module ``[groups, d_in, rank]``.
        B: per module ``[groups, rank, d_out]``, with scale and scaling multiplied in.
        steering: per layer ``[groups, d_model]``, with the coefficient multiplied in.
    """

    A: Mapping[str, torch.Tensor] = field(default_factory=dict)
    B: Mapping[str, torch.Tensor] = field(default_factory=dict)
    steering: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of variants."""
        return len(next(iter((*self.A.values(), *self.steering.values())), ()))

    def __getitem__(self, at: int | slice) -> VariantWeights:
        """Those of some groups; of one group without the first axis."""
        return self.each(lambda tensor: tensor[at])

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VariantWeights:
        """The same with every tensor ``[groups, ...]`` replaced by a function of it."""
        pick = {field.name: {k: function(v) for k, v in getattr(self, field.name).items()} for field in fields(self)}
        return VariantWeights(**pick)  # type: ignore[arg-type]


def write(
    out: Float[torch.Tensor, "*tokens d_out"],
    z: Float[torch.Tensor, "groups seq rank"],
    B: Float[torch.Tensor, "groups rank d_out"],
    *,
    in_place: bool = False,
) -> Float[torch.Tensor, "*tokens d_out"]:
    """``out + z B`` with each group's own B; added in the adapter's dtype, as PEFT does."""
    grouped = out.reshape(B.shape[0], -1, out.shape[-1])
    in_place = in_place and grouped.dtype == B.dtype and not torch.is_grad_enabled()
    if not in_place:  # contiguous: a sum with an expanded tensor is laid out otherwise, and products of it are slow
        grouped = grouped.to(B.dtype).contiguous()
    if B.shape[1] == 1:  # rank 1 is one pass over memory, where a batch of products has a price per entry
        added = grouped.addcmul_(z, B) if in_place else torch.addcmul(grouped, z, B)
    else:
        added = grouped.baddbmm_(z, B) if in_place else torch.baddbmm(grouped, z, B)
    return added.to(out.dtype).reshape(out.shape)


def inner(
    x: Float[torch.Tensor, "tokens d_in"], A: Float[torch.Tensor, "groups d_in rank"]
) -> Float[torch.Tensor, "tokens groups rank"]:
    """``x A`` under every group's A, in one product and in the adapters' dtype."""
    return rearrange(x.to(A.dtype) @ rearrange(A, "g i r -> i (g r)"), "t (g r) -> t g r", g=len(A))


def write_of(
    x: Float[torch.Tensor, "*tokens d_in"],
    A: Float[torch.Tensor, "groups d_in rank"],
    B: Float[torch.Tensor, "groups rank d_out"],
    of: Int[torch.Tensor, "..."],
) -> Float[torch.Tensor, "*tokens d_out"]:
    """What tokens add that belong to groups in any order: ``x A B`` of each one's own.

    The groups' maps are side by side in one product, and each token keeps its own group's part: at rank 1 and a
    handful of groups the surplus is a few vectors against a whole weight matrix.

    Args:
        of: the group of each token, or broadcastable to that.
    """
    z = inner(x.flatten(0, -2), A)
    if len(A) > 1:
        own = of.expand(x.shape[:-1]).reshape(-1, 1) == torch.arange(len(A), device=of.device)
        z = torch.where(own[..., None], z, 0.0)
    return (z.flatten(1) @ B.flatten(0, 1)).view(*x.shape[:-1], -1)


class RowAdapter(nn.Module):
    """A linear module with a per-row adapter on it."""

    def __init__(self, base: nn.Module, rows: VariantWeights, name: str) -> None:
        super().__init__()
        self.base, self.rows, self.name = base, rows, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output with each row's own write added."""
        a = self.rows.A[self.name]
        z = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]).to(a.dtype), a)
        # what the linear module returned is used here only
        return write(self.base(x), z, self.rows.B[self.name], in_place=True)


class RowSteering(nn.Module):
    """A block with a vector added to its residual stream, each group's own."""

    def __init__(self, block: nn.Module, rows: VariantWeights, layer: int, family: Family) -> None:
        super().__init__()
        self.block, self.rows, self.layer, self._family = block, rows, layer, family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output plus coefficient times direction."""
        out = self.block(*args, **kwargs)
        return self._family.with_residual(out, self.steered(self._family.residual(out)))

    def steered(self, out: torch.Tensor) -> torch.Tensor:
        """A residual stream with its vector added."""
        vectors = self.rows.steering[self.layer]
        shaped = out.reshape(vectors.shape[0], -1, out.shape[-1])
        return (shaped + vectors[:, None].to(out.dtype)).reshape(out.shape)


class ReadWrite(nn.Module):
    """A module that keeps what it last read and wrote."""

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
        """What it read and wrote, of which it keeps no reference."""
        taken = self.read, self.wrote
        self.read = self.wrote = torch.empty(0)
        return taken


class StackedAdapters(nn.Module):
    """A and B of every adapter for every run; the parameters are those of each run by itself.

    Forwards use copies of all runs' weights that :meth:`gather` stacks; after the backward passes :meth:`spread`
    hands their gradients to the parameters, whose hooks, clipping and optimizer know nothing of the stack.

    Args:
        chat: with the PEFT adapters on it, whose places and scaling are used.
        starts: for each run ``"A/<name>" [rank, d_in]`` and ``"B/<name>" [d_out, rank]``.
        dropout: share of an adapter's inputs set to zero while gradients are taken.

    ``write_of`` is an adapter whose write the caller adds itself, by :meth:`write`. ``lost_at`` holds for each run
    the step at which its loss was no longer finite, -1 for those in good order.
    """

    write_of: AdapterInfo | None = None
    lost_at: torch.Tensor

    def __init__(self, chat: ChatModel, starts: Sequence[Mapping[str, torch.Tensor]], *, dropout: float = 0.0) -> None:
        super().__init__()
        self._layers = list(adapter_layers(chat.model))
        self.infos: tuple[AdapterInfo, ...] = tuple(info for info, _, _ in self._layers)
        self.runs = len(starts)
        self.dropout = dropout
        # as PEFT keeps them: a model may be spread over devices
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
        if hasattr(chat.base, "hf_device_map"):  # the Trainer then leaves every adapter on its layer's device
            self.hf_device_map = chat.base.hf_device_map
        self._rows: torch.Tensor | None = None  # which run each row of the present forward belongs to
        self.gather()

    def of(self, run: int) -> list[tuple[AdapterInfo, nn.Parameter, nn.Parameter]]:
        """The adapters of one run: where each is, A ``[rank, d_in]`` and B ``[d_out, rank]``."""
        own = list(self._own[run].parameters())
        return list(zip(self.infos, own[::2], own[1::2], strict=True))

    def gather(self) -> None:
        """Stack all runs' present weights: ``A[name] [runs, rank, d_in]`` and ``B[name] [runs, rank, d_out]``."""
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
        """What the adapters add: ``scaling * (x A_run.T) B_run``, in the adapters' dtype.

        Args:
            x: ``[..., d_in]``.
            run_of: the run of each entry, ``[...]`` or broadcastable to it.
        """
        if self.dropout and torch.is_grad_enabled():
            x = nn.functional.dropout(x, self.dropout)
        return write_of(x, self.A[info.name].transpose(1, 2), self.B[info.name], run_of) * info.scaling

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """PEFT's own adapters off and these on, each row by the run that :meth:`rows_of` names."""
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
        """Within: row i of every forward belongs to run ``runs[i]``."""
        before, self._rows = self._rows, runs
        try:
            with self._own_writes(False):
                yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def only(self, run: int) -> Iterator[None]:
        """One run's adapters in PEFT's own layers, for whatever looks at the model as a whole."""
        for (_, layer, name), (_, a, b) in zip(self._layers, self.of(run), strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.data, b.data
        with self._own_writes(True):
            yield

    @torch.no_grad()
    def lose(self, run: int, step: int) -> None:
        """Give a run up at this step: its weights become zero, since what is not finite would spread in products."""
        self.lost_at[run] = step
        for parameter in self._own[run].parameters():
            parameter.zero_()
            parameter.grad = None
