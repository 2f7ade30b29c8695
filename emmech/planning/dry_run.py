"""What one batch of a training keeps in memory, from a run of its code on tensors that have shapes and no values.

One block is run under torch's fake tensors, which stand for real ones of any size at no cost: the same code as in
training decides what the backward pass needs. Every tensor counts from the moment it is made until it is freed. Blocks
with the same adapters are alike, so that a model's memory follows from one block of each kind, the final norm, the
unembedding and the loss.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from emmech.chat.families import Family, map_widths
from emmech.chat.model import ChatModel
from emmech.engine.adapters import write_of
from emmech.engine.attention import RUN, Rowwise
from emmech.engine.blocks import MOST_READ, Blocks
from emmech.engine.logprobs import target_logprobs
from emmech.engine.modules import hooked
from emmech.training.recipe import Recipe


@dataclass(frozen=True)
class Activations:
    """The memory of a batch's activations at its peak, in bytes.

    Args:
        kept: with every block's activations kept for the backward pass.
        checkpointed: with only the input of every block kept, and the rest computed again.
    """

    kept: int
    checkpointed: int


@dataclass(frozen=True)
class _Cost:
    """Bytes that are still there after a forward pass, and the largest number at any time of both passes."""

    kept: int
    most: int


class _Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def activations(
    config: Any, family: Family, recipe: Recipe, sites: Sequence[str], dtype: Any, *,
    first: int, layers: int, rows: int, tokens: int, answers: int, runs: int = 1,
) -> Activations:  # fmt: skip
    """The memory of one batch's activations in a training.

    Args:
        config: of the model; only its widths matter, not its depth.
        sites: full paths of the adapted modules, empty in full fine-tuning.
        first: the first block whose activations are kept for the backward pass, of ``layers``.
        rows: rows that go forward together, of ``tokens`` tokens each, ``answers`` of which carry loss.
        runs: runs whose adapters share the forwards.
    """
    listed = f"{family.trunk}.{family.blocks}."
    by_block: dict[int, list[str]] = {layer: [] for layer in range(first, layers)}
    for site in sites:
        layer, _, path = site.removeprefix(listed).partition(".")
        if int(layer) in by_block:
            by_block[int(layer)].append(path)
    last = tuple(sorted(by_block.pop(layers - 1, ())))
    kinds = Counter(tuple(sorted(paths)) for paths in by_block.values())
    whole = not sites
    with _one_block(config, family, dtype, whole=whole) as chat:
        how: dict[str, Any] = {"rows": rows, "tokens": tokens, "runs": runs}
        how["modules"] = whole or recipe.dropout > 0
        costs = {kind: _of_block(chat, kind, recipe.rank, **how) for kind in kinds}
        reads = answers if answers < MOST_READ * tokens else None
        ending = _of_last_block(chat, last, recipe.rank, reads, how)
        head = _of_head(chat, rows * answers)
    kept = sum(costs[kind].kept * count for kind, count in kinds.items()) + ending.kept
    entering = (layers - first) * rows * tokens * int(config.get_text_config().hidden_size) * dtype.itemsize
    # the backward pass frees the last block before it comes to the one below it
    below = kept - ending.kept + max((cost.most - cost.kept for cost in costs.values()), default=0)
    most = max(kept + head.most, kept - ending.kept + ending.most, below)
    again = max([ending.most, *(cost.most for cost in costs.values())])
    return Activations(most, entering + max(head.most, again))


@contextlib.contextmanager
def _one_block(config: Any, family: Family, dtype: Any, *, whole: bool) -> Iterator[ChatModel]:
    """A model of one block on fake tensors, within this context."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    inner = config.get_text_config()
    inner.num_hidden_layers = 1
    if getattr(inner, "layer_types", None):
        inner.layer_types = ["full_attention"] if "full_attention" in inner.layer_types else inner.layer_types[:1]
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(whole)
        yield ChatModel(model, None, "", family)


def _of_block(
    chat: ChatModel,
    paths: Sequence[str],
    rank: int,
    *,
    rows: int,
    tokens: int,
    runs: int,
    modules: bool,
    reads: int | None = None,
) -> _Cost:
    """The cost of one block whose input needs a gradient.

    Args:
        modules: run the model's own modules, not the block as it is written out.
        reads: the last block's queries run at this number of tokens of each row; None is all.
    """
    blocks, block = Blocks(chat, 0, 1, norm=False), chat.blocks[0]
    blocks.written = blocks.written and not modules
    own = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
    hooks = [(at, _adapter(at, rank, runs)) for at in map(block.get_submodule, paths)]
    x = torch.empty(rows, tokens, chat.d_model, dtype=chat.dtype, requires_grad=True)
    with _Tally() as tally, hooked(*hooks):
        if reads is None or not blocks.written:
            out = blocks(x)
        else:
            asking = torch.zeros(rows, reads, dtype=torch.long)
            out = blocks._run(x, blocks._turns(x, None, 0), Rowwise(), asking)
        kept = tally.now
        out.sum().backward()
    return _Cost(kept, max(kept, tally.most - own))  # gradients of weights are counted apart


def _of_last_block(chat: ChatModel, paths: Sequence[str], rank: int, reads: int | None, how: dict[str, Any]) -> _Cost:
    """The cost of the block whose queries run at the answers alone, which grows by the same amount with each of them.

    Attention over more than ``RUN`` queries depends on the values of its mask, which fake tensors do not have.
    """
    if reads is None or reads <= RUN:
        return _of_block(chat, paths, rank, reads=reads, **how)
    half, whole = (_of_block(chat, paths, rank, reads=at, **how) for at in (RUN // 2, RUN))
    further = (reads - RUN) / (RUN - RUN // 2)
    return _Cost(
        round(whole.kept + further * (whole.kept - half.kept)), round(whole.most + further * (whole.most - half.most))
    )


def _adapter(module: Any, rank: int, runs: int) -> Any:
    d_in, d_out = map_widths(module)  # type: ignore[misc]
    a = torch.empty(runs, rank, d_in, requires_grad=True)
    b = torch.empty(runs, rank, d_out, requires_grad=True)

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        of = torch.zeros(len(output), 1, dtype=torch.long)
        return (output + write_of(inputs[0], a.transpose(1, 2), b, of) * 1.0).to(output.dtype)

    return hook


def _of_head(chat: ChatModel, places: int) -> _Cost:
    """The cost of the final norm, the unembedding and the loss at some places."""
    own = sum(p.numel() * p.element_size() for p in chat.unembedding.parameters() if p.requires_grad)
    x = torch.empty(places, chat.d_model, dtype=chat.dtype, requires_grad=True)
    with _Tally() as tally:
        hidden = chat.final_norm(x)
        nll = -target_logprobs(replace(chat), hidden, torch.zeros(places, 1, dtype=torch.long))
        kept = tally.now
        nll.sum().backward()
    return _Cost(kept, tally.most - own)
