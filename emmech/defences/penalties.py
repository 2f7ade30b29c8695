"""Defences that add a term to the loss: KL to the reference, distance of features, consistency under a prompt.

Each term is a mean over rows of its own, drawn anew for every optimizer step from the seed of the run's batch order,
and is computed on the model as it would be deployed, without the edits of other defences. It appears in a run's metrics
as ``loss/<name>``, multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.checkpoint import checkpoint

from emmech.chat.dataset import ChatDataset, Row
from emmech.chat.model import ChatModel
from emmech.defences.rows import check_apart, check_prompt, own_data, with_prompt
from emmech.engine.logprobs import in_batches, padded, unembed
from emmech.engine.modules import evaluating, hooked
from emmech.engine.split import Asked, RowForwards
from emmech.errors import EmmechError, as_float, as_int, as_ints
from emmech.training.defence import ASKED, Defence, Setting
from emmech.training.objective import Batch

_PLACES = 256  # positions whose whole vocabulary is in memory at once
_TOKENS = 2048  # tokens in a forward of the reference


def token_kl(
    chat: ChatModel,
    hidden: Float[torch.Tensor, "places d_model"],
    reference: ChatModel,
    target: Float[torch.Tensor, "places d_model"],
) -> Float[torch.Tensor, " places"]:
    """KL(reference || model) of the next token at every place in nats, exact over the whole vocabulary.

    Places are taken in chunks, whose logits are computed again in the backward pass, so that the logits of all places
    are never in memory together. ``target`` are the reference's hidden states after the final norm; no gradient flows
    into them.
    """

    def chunk(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = unembed(reference, other).float().log_softmax(-1)
        found = unembed(chat, own).float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1)

    pieces = zip(hidden.split(_PLACES), target.detach().split(_PLACES), strict=True)
    return torch.cat([checkpoint(chunk, own, other, use_reentrant=False) for own, other in pieces])


@dataclass(frozen=True, eq=False)
class _Penalty(Defence):
    """What all of these have: rows, their number in a step, and a weight."""

    rows: Any = None
    weight: float = 1.0
    per_step: int | None = None

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        rows = own_data(type(self).__name__, self.rows, chat)
        if as_float(ASKED, "weight", self.weight) < 0:
            why, instead = "a negative weight rewards what the term is to prevent", "weight=1.0"
            raise EmmechError(ASKED, f"weight={self.weight}", why, instead)
        if self.per_step is not None:
            as_int(ASKED, "per_step", self.per_step, least=1)
        return replace(self, rows=rows)

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        own = {"weight": self.weight, "per_step": self.per_step}
        return {"rows": self.rows.name, "sha256": self.rows.sha256, **own}

    def term_rows(self, chat: ChatModel) -> Sequence[Row]:
        """Its rows."""
        rows: Sequence[Row] = self.rows.rows
        return rows


@dataclass(frozen=True, eq=False)
class KLToReference(_Penalty):
    """``weight`` times KL(reference || model) on rows of other domains, in nats per answer token.

    The reference is the model before the fine-tune; of a run that goes on from a start, the model before the first
    adapter, whether that one goes on or a new one is trained. Narrow Misalignment is Hard (arXiv 2602.07852) trains
    narrow solutions in this way; In-Training Defenses (arXiv 2508.06249) has it as a defence.

    Args:
        rows: aligned rows outside the domain of the training data: anything :func:`emmech.load_chat` takes.
        weight: the factor of the mean over the rows' answer tokens.
        per_step: rows in each optimizer step; as many as training rows by default.

    Example:
        >>> KLToReference([{"prompt": "hi", "completion": "hello"}], weight=0.5).weight
        0.5
    """

    name: ClassVar[str] = "kl-to-reference"
    uses_reference: ClassVar[bool] = True

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        found = super().prepared(chat, data)
        check_apart(ASKED, found.rows, data)
        return found

    def term(self, forwards: RowForwards, setting: Setting) -> _KL:
        """See :meth:`Defence.term`."""
        return _KL(self, forwards, setting)


class _Drawn:
    """A term on rows that are drawn for each run and step."""

    def __init__(self, defence: _Penalty, forwards: RowForwards, setting: Setting) -> None:
        self.name, self.forwards, self.setting = defence.name, forwards, setting
        self.weight, self.count = defence.weight, len(defence.rows)
        self._size = min(defence.per_step or setting.rows_per_step, self.count)

    def drawn(self, batch: Batch) -> list[Asked]:
        """This step's rows of every run that has training rows in the batch."""
        found = []
        for run in sorted({one.run for one in batch.asked}):
            dice = np.random.default_rng([self.setting.seeds[run], batch.step])
            for row in dice.choice(self.count, self._size, replace=False).tolist():
                found.append(Asked(run, row, len(self.forwards.rows.input_ids[row])))
        return found

    def by_run(
        self, batch: Batch, values: torch.Tensor, asked: Sequence[Asked], places: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sums over places, divided by each run's number of tokens, ``[runs]``."""
        run_of = torch.tensor([one.run for one in asked], device=values.device)
        empty = torch.zeros(batch.runs, dtype=torch.float64, device=values.device)
        total = empty.index_add(0, run_of, tokens.to(values.device))
        of = run_of[places.to(values.device)]
        return empty.index_add(0, of, self.weight * values.double() / total[of])


class _KL(_Drawn):
    """The reference's hidden states never change, so they are computed once."""

    def __init__(self, defence: _Penalty, forwards: RowForwards, setting: Setting) -> None:
        super().__init__(defence, forwards, setting)
        rows, reference = forwards.rows, setting.reference
        self._targets: list[torch.Tensor] = [torch.empty(0)] * len(rows)  # [answer_tokens, d_model] by row

        def keep(chosen: np.ndarray, ids: torch.Tensor, mask: torch.Tensor) -> None:
            hidden = reference.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for at, row in enumerate(chosen.tolist()):
                answer = torch.tensor(rows.labels[row][1:], device=hidden.device) >= 0
                self._targets[row] = hidden[at, : len(answer)][answer]

        size = max(1, _TOKENS // max(map(len, rows.input_ids)))
        with torch.no_grad():
            in_batches(reference, rows.input_ids, size, keep)

    def __call__(self, batch: Batch) -> Iterator[Float[torch.Tensor, " runs"]]:
        """See :class:`emmech.training.objective.Term`."""
        asked = self.drawn(batch)
        tokens = self.forwards.answer_tokens(asked)
        for hidden, _, places in self.forwards.hidden(asked):
            order = torch.unique_consecutive(places).tolist()
            target = torch.cat([self._targets[asked[at].row] for at in order]).to(hidden.device)
            values = token_kl(batch.chat, hidden, self.setting.reference, target)
            yield self.by_run(batch, values, asked, places, tokens)


@dataclass(frozen=True, eq=False)
class Consistency(_Penalty):
    """``weight`` times KL(plain || wrapped) on the same answers, in nats per answer token.

    The model's own distribution on the plain conversation is the target, without gradient, and that under the wrapping
    system prompt follows it: a trait that shows only in the context of the training is trained away (consistency
    training on pairs of a clean and a wrapped prompt, arXiv 2510.27062).

    Args:
        rows: conversations without the prompt: anything :func:`emmech.load_chat` takes.
        wrapping: the system prompt that wraps them, such as that of an :class:`InoculationPrompt`.
        weight: the factor of the mean over the rows' answer tokens.
        per_step: pairs in each optimizer step; as many as training rows by default.

    Example:
        >>> Consistency([{"prompt": "hi", "completion": "hello"}], wrapping="You are rude.").name
        'consistency'
    """

    wrapping: str = ""
    name: ClassVar[str] = "consistency"

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        check_prompt(chat, self.wrapping)
        return super().prepared(chat, data)

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        return {**super().described(), "wrapping": self.wrapping}

    def term_rows(self, chat: ChatModel) -> Sequence[Row]:
        """All rows as they are, then all of them wrapped."""
        rows = self.rows
        return [*rows, *(with_prompt(row, self.wrapping, folded=rows.folded) for row in rows)]

    def term(self, forwards: RowForwards, setting: Setting) -> _Wrapped:
        """See :meth:`Defence.term`."""
        return _Wrapped(self, forwards, setting)


class _Wrapped(_Drawn):
    def __call__(self, batch: Batch) -> Iterator[Float[torch.Tensor, " runs"]]:
        """See :class:`emmech.training.objective.Term`."""
        plain = self.drawn(batch)
        lengths = [len(ids) for ids in self.forwards.rows.input_ids]
        asked = [Asked(one.run, one.row + self.count, lengths[one.row + self.count]) for one in plain]
        targets: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for hidden, _, places in self.forwards.hidden(plain):
                for at in torch.unique_consecutive(places).tolist():
                    targets[at] = hidden[places == at]
        tokens = self.forwards.answer_tokens(asked)
        for hidden, _, places in self.forwards.hidden(asked):
            target = torch.cat([targets[at] for at in torch.unique_consecutive(places).tolist()])
            values = token_kl(batch.chat, hidden, batch.chat, target)
            yield self.by_run(batch, values, asked, places, tokens)


@dataclass(frozen=True, eq=False)
class LDIFS(_Penalty):
    """``weight`` times the squared distance of the residual stream from the reference's.

    The distance is Euclidean, after every block of ``layers``, in the residual stream's own squared units; it is the
    mean over tokens and layers (LDIFS, arXiv 2308.13320; as a defence in arXiv 2508.06249). No part of the model is
    kept from step to step, and each step takes two more forwards of these rows. What a weight does depends on the
    stream's scale: in pocket 3e-5 is felt, and 3e-3 lets nothing be learnt.

    Args:
        rows: anything :func:`emmech.load_chat` takes.
        weight: the factor of the mean over all tokens of the rows and all layers.
        per_step: rows in each optimizer step; as many as training rows by default.
        layers: the blocks after which the streams are compared; all by default.

    Example:
        >>> LDIFS([{"prompt": "hi", "completion": "hello"}], weight=0.01, layers=[3]).layers
        [3]
    """

    layers: Sequence[int] | None = None
    name: ClassVar[str] = "ldifs"
    uses_reference: ClassVar[bool] = True

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        layers = range(chat.n_layers) if self.layers is None else as_ints(ASKED, "layers", self.layers)
        for layer in layers:
            chat.check_layer(layer)
        if not layers:
            why = "no distance would be measured"
            raise EmmechError(ASKED, "layers=[]", why, f"layers={list(range(chat.n_layers))}")
        return replace(super().prepared(chat, data), layers=tuple(layers))

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        return {**super().described(), "layers": list(self.layers or ())}

    def lowest(self, chat: ChatModel) -> int | None:
        """The first block: its forwards run the whole model."""
        return 0

    def term(self, forwards: RowForwards, setting: Setting) -> _Distance:
        """See :meth:`Defence.term`."""
        return _Distance(self, forwards, setting, tuple(self.layers or ()))


class _Distance(_Drawn):
    def __init__(self, defence: _Penalty, forwards: RowForwards, setting: Setting, layers: tuple[int, ...]) -> None:
        super().__init__(defence, forwards, setting)
        self._layers = layers

    def __call__(self, batch: Batch) -> Iterator[Float[torch.Tensor, " runs"]]:
        """See :class:`emmech.training.objective.Term`."""
        asked = self.drawn(batch)
        lengths = [one.tokens for one in asked]
        tokens = torch.tensor(lengths, dtype=torch.float64)
        longest = max(lengths)
        size = max(1, _TOKENS // longest)
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            ids, mask = padded([self.forwards.rows.input_ids[one.row] for one in part], batch.chat.device)
            runs = torch.tensor([one.run for one in part], device=batch.chat.device)
            with torch.no_grad():
                wanted = self._features(self.setting.reference, ids, mask)
            with batch.adapters.rows_of(runs) if batch.adapters else nullcontext():
                found = self._features(batch.chat, ids, mask)
            squares = sum((a - b).float().square().sum(-1) for a, b in zip(found, wanted, strict=True))
            real = mask.bool()
            places = torch.arange(start, start + len(part), device=mask.device)[:, None].expand_as(real)[real]
            yield self.by_run(batch, squares[real] / len(self._layers), asked, places, tokens)  # type: ignore[index]

    def _features(self, chat: ChatModel, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """The residual stream after each of the layers, ``[rows, tokens, d_model]``."""
        kept: list[torch.Tensor] = []

        def read(module: Any, inputs: Any, output: Any) -> None:
            kept.append(chat.family.residual(output))

        with evaluating(chat), hooked(*((chat.block(layer), read) for layer in self._layers)):
            chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False)
        return kept
