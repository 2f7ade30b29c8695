"""Which part of a model training never touches, whether that part may be kept, and whether keeping it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from emmech.chat.model import ChatModel

__all__ = ["Frozen", "dropout", "find_frozen", "pays", "why_not"]

_PAYS_FROM = 1.4  # uses per row: the cache costs about one forward of the prefix per row, and a write to disk


@dataclass(frozen=True)
class Frozen:
    """What training does not touch.

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


def find_frozen(chat: ChatModel, modules: Sequence[str]) -> Frozen:
    """The largest part of the model that adapters on these modules leave alone.

    Args:
        modules: full paths in the causal LM.

    Example:
        >>> from emmech.chat.model import load_model
        >>> find_frozen(load_model("pocket"), ["model.layers.3.mlp.down_proj", "model.layers.4.mlp.up_proj"])
        Frozen(layer=3, at_write=True)
    """
    places = [_place(chat, module) for module in modules]
    layer = min(layer for layer, _ in places)
    lowest = [inner for at, inner in places if at == layer]
    return Frozen(layer, lowest == [chat.family.down])


def _place(chat: ChatModel, module: str) -> tuple[int, str]:
    """Layer and path inside the block; layer -1 outside the blocks."""
    names = {id(part): path for path, part in chat.base.named_modules()}
    for layer, block in enumerate(chat.blocks):
        if module.startswith(f"{names[id(block)]}."):
            return layer, module.removeprefix(f"{names[id(block)]}.")
    return -1, module


def why_not(chat: ChatModel, modules: Sequence[str], frozen: Frozen | None = None) -> str | None:
    """Why training on kept states would be wrong here, or None.

    Args:
        modules: full paths of the adapted modules; none in full fine-tuning.
        frozen: the part in question; by default the largest, :func:`find_frozen`.
    """
    if not modules:
        return "all weights train, so no part of the model is frozen"
    places = [_place(chat, module) for module in modules]
    if outside := [inner for layer, inner in places if layer < 0]:
        return f"an adapter sits outside the blocks: {outside[0]}"
    frozen = frozen or find_frozen(chat, modules)
    if below := [f"layers.{layer}.{inner}" for layer, inner in places if layer < frozen.layer]:
        return f"adapters train below layer {frozen.layer}: {', '.join(below[:3])}"
    if frozen.blocks == 0:
        return "an adapter acts in block 0 before its write, so nothing lies below it"
    if (rate := dropout(chat)) > 0:
        return f"dropout (p={rate:g}) draws anew in every forward, so no state stays the same"
    placed = getattr(chat.base, "hf_device_map", None)
    if placed and len(set(placed.values())) > 1:
        return "the model is spread over several devices"
    return None


def dropout(chat: ChatModel) -> float:
    """The highest dropout rate anywhere in the model, 0 for every current chat model as it is shipped."""
    rates = [float(getattr(chat.config, "attention_dropout", 0.0) or 0.0)]
    rates += [module.p for module in chat.base.modules() if isinstance(module, nn.Dropout)]
    return max(rates)


def pays(frozen: Frozen, *, uses: float, rows: int) -> bool:
    """Whether each row is used often enough to make up for the cache; ``uses`` counts all runs and epochs."""
    return frozen.blocks > 0 and uses >= _PAYS_FROM * rows
