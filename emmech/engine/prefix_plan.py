"""The cut at the lowest adapter: what is the same for all adapters, and whether it may be and pays to be kept.

With adapters only at layer l and above, the residual that enters block l is the same under all of them. Where the only
adapter of block l sits on the MLP's write (``down_proj``), so is everything of that block but the write itself: the
adapter reads what is the same for all, and only what it adds differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emmech.chat.model import ChatModel
from emmech.engine.blocks import Blocks, Places
from emmech.engine.modules import Hook, evaluating, hooked
from emmech.engine.row_adapters import Capture

__all__ = [
    "DOES_NOT_RUN",
    "TOLERANCE",
    "Frozen",
    "Lower",
    "State",
    "deviation",
    "dropout",
    "find_frozen",
    "pays",
    "why_not",
]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of a deviation
# what a model's modules raise when they are run in another way than their own
DOES_NOT_RUN = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

_PAYS_FROM = 1.4  # uses per row: the cache costs about one forward of the prefix per row, and a write to disk


@dataclass(frozen=True)
class Frozen:
    """What no adapter touches.

    Args:
        layer: the lowest layer with an adapter.
        at_write: the only adapter there is on the MLP's write, so that the rest of the block is frozen too.
    """

    layer: int
    at_write: bool

    @property
    def blocks(self) -> int:
        """How many blocks are computed once, the one around a lone write included."""
        return self.layer + int(self.at_write)


def find_frozen(chat: ChatModel, modules: Sequence[str], steering: int | None = None) -> Frozen:
    """The largest part of the model that adapters on these modules, and steering, leave alone.

    Args:
        modules: full paths in the causal LM.
        steering: the layer whose output is steered, or None.

    Example:
        >>> from emmech.chat.model import load_model
        >>> find_frozen(load_model("pocket"), ["model.layers.3.mlp.down_proj", "model.layers.4.mlp.up_proj"])
        Frozen(layer=3, at_write=True)
    """
    places = _places(chat, modules)
    layer = min([layer for layer, _ in places] or [chat.n_layers])
    if steering is not None and steering < layer:
        return Frozen(steering + 1, False)
    lowest = [inner for at, inner in places if at == layer]
    return Frozen(layer, lowest == [chat.family.down])


def _places(chat: ChatModel, modules: Sequence[str]) -> list[tuple[int, str]]:
    """Layer and path inside the block of each module; layer -1 outside the blocks."""
    listed = f"{chat.family.trunk}.{chat.family.blocks}."
    found = []
    for module in modules:
        layer, _, inner = module.removeprefix(listed).partition(".")
        inside = module.startswith(listed) and layer.isdecimal()
        found.append((int(layer), inner) if inside else (-1, module))
    return found


@dataclass(frozen=True)
class State:
    """What all adapters have in common at some tokens; any leading dimensions.

    Args:
        residual: where the adapters part, ``[..., d_model]`` (token ids ``[...]`` where they part at once).
        read: the lone adapter's input ``[..., d_mlp]``; None where no write is shared.
        wrote: what the module under it wrote, ``[..., d_model]``.
    """

    residual: torch.Tensor
    read: torch.Tensor | None = None
    wrote: torch.Tensor | None = None


class Lower:
    """The blocks below the cut, and what enters those above it."""

    def __init__(self, chat: ChatModel, frozen: Frozen) -> None:
        self.frozen = frozen
        self._captured: Capture | None = None
        edits: dict[str, Callable[[nn.Module], nn.Module]] = {}
        if frozen.at_write:
            edits[f"{frozen.layer}.{chat.family.down}"] = self._capture
        self.blocks = Blocks(chat, 0, frozen.blocks, norm=False, edits=edits)
        # what some families do to a write before it is added
        self._norm: Any = (chat.parts(frozen.layer).after_mlp if frozen.at_write else None) or nn.Identity()
        self._scale = chat.family.residual_scale
        #: whether :attr:`State.wrote` is looked at
        self.uses_wrote = not isinstance(self._norm, nn.Identity) or self._scale != 1.0

    def _capture(self, module: nn.Module) -> nn.Module:
        self._captured = Capture(module)
        return self._captured

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, places: Places = Places(), cache: Any = None) -> State:  # noqa: B008
        """Run token ids up to the cut; arguments as :class:`Blocks` takes them."""
        if not self.frozen.blocks:
            return State(ids)
        residual = self.blocks(ids, places, cache)
        taken = self._captured.taken() if self._captured else ()
        return State(residual, *(one.reshape(*residual.shape[:-1], one.shape[-1]) for one in taken))

    def entering(self, state: State, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The residual above the cut once an adapter has written.

        Args:
            add: from a tensor and the adapter's input to the tensor with the adapter's write added.
        """
        assert state.read is not None
        if not self.uses_wrote:
            return add(state.residual, state.read)
        # a norm is not linear: the change of the block's output is a difference
        assert state.wrote is not None
        change = self._norm(add(state.wrote, state.read)) - self._norm(state.wrote)
        return state.residual + change * self._scale  # type: ignore[no-any-return]


@torch.no_grad()
def deviation(
    chat: ChatModel,
    found: torch.Tensor,
    ids: torch.Tensor,
    reads: torch.Tensor,
    hooks: Sequence[Hook],
    mask: torch.Tensor | None = None,
    stop: int | None = None,
) -> float:
    """Largest relative difference of a cut forward's result from the model's own forward.

    Rounding leaves 1e-6 in float32. More means that the architecture does something between its blocks, or with a
    block's writes, that a cut cannot see.

    Args:
        found: after the final norm, or of the block ``stop``, at ``reads`` of ``ids [rows, tokens]``.
        hooks: the adapters, as hooks on the model's own modules.
    """

    kept: list[torch.Tensor] = []
    reading: list[Hook] = []
    if stop is not None:
        reading.append((chat.blocks[stop], lambda module, inputs, output: kept.append(chat.family.residual(output))))
    with evaluating(chat), hooked(*hooks, *reading):
        whole = chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = (kept[0] if kept else whole)[reads].float()
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def why_not(chat: ChatModel, modules: Sequence[str], frozen: Frozen | None = None) -> str | None:
    """Why training on kept states would be wrong here, or None.

    Args:
        modules: full paths of the adapted modules; none in full fine-tuning.
        frozen: the part in question; by default the largest, :func:`find_frozen`.
    """
    if not modules:
        return "all weights train, so no part of the model is frozen"
    places = _places(chat, modules)
    if outside := [inner for layer, inner in places if layer < 0]:
        return f"an adapter sits outside the blocks: {outside[0]}"
    frozen = frozen or find_frozen(chat, modules)
    if below := [f"layers.{layer}.{inner}" for layer, inner in places if layer < frozen.layer]:
        return f"adapters train below layer {frozen.layer}: {', '.join(below[:3])}"
    if frozen.blocks == 0:
        return "an adapter acts in block 0 before its write, so nothing is below it"
    if (rate := dropout(chat)) > 0:
        return f"dropout (p={rate:g}) draws anew in every forward, so no state stays the same"
    placed = getattr(chat.base, "hf_device_map", None)
    if placed and len(set(placed.values())) > 1:
        return "the model is spread over several devices"
    return None


def dropout(chat: ChatModel) -> float:
    """The highest dropout rate anywhere in the model, 0 for most current chat models as they are shipped."""
    said = chat.config.to_dict().items()  # of functions that draw without a module of their own
    rates = [rate for name, rate in said if "drop" in name and "classifier" not in name and "summary" not in name]
    rates += [module.p for module in chat.base.modules() if isinstance(module, nn.Dropout)]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)


def pays(frozen: Frozen, *, uses: float, rows: int) -> bool:
    """Whether each row is used often enough to make up for the cache; ``uses`` counts all runs and epochs."""
    return frozen.blocks > 0 and uses >= _PAYS_FROM * rows
