"""Three answers while they are written: their tokens, what each colour reads at them, and the base model's, kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.edits import announced_rows
from emmech.chat.model import ChatModel
from emmech.engine.kept import KeptPrompt
from emmech.engine.modules import Hook

COLUMNS = ("base", "changed", "random")
_FIRST = 5  # alternatives of a token


@dataclass
class Token:
    """A written token: its text, log-probability, one reading for each colour, and the likeliest alternatives.

    The readings are those of the position that decided the token: its projection on the direction, and A·x of every
    rank-1 adapter.
    """

    text: str
    logprob: float
    readings: list[float]
    alternatives: list[tuple[str, float]]

    def packed(self) -> list[Any]:
        """The token in the form that the front end takes."""
        best = [[text, round(value, 3)] for text, value in self.alternatives]
        return [self.text, round(self.logprob, 3), [round(one, 4) for one in self.readings], best]


@dataclass(frozen=True)
class Scalar:
    """A rank-1 adapter, whose A·x is a colour."""

    name: str
    layer: int
    A: Any


@dataclass
class BaseAnswer:
    """The base model's answer, which no slider changes, and all that its readings are computed from.

    Args:
        key: what it depends on.
        ids, tokens: with the token that ended it.
        residuals: of each token, at the position that decided it, what each block returned: ``[layers, d_model]``.
        inputs: likewise, what each rank-1 adapter read there: ``[d_in]``.
        whole: whether it is written to its end.
    """

    key: tuple[Any, ...] = ()
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    residuals: list[Float[torch.Tensor, "layers d_model"]] = field(default_factory=list)
    inputs: list[list[Float[torch.Tensor, " d_in"]]] = field(default_factory=list)
    whole: bool = False


@dataclass
class Writing:
    """The columns as they grow.

    Args:
        layer: whose output the colour of the direction reads.
        axis: the unit vector that it is projected on, ``[d_model]``.
        base: the base model's answer: told at once if it is whole, else written as well and kept.
        kept: the prompt's reading in blocks below the change; what A·x is there is kept beside it.
        apart: the first block in which the rows differ.
        text: the text of a token.
        told: called with the new tokens of every column.
    """

    chat: ChatModel
    layer: int
    axis: Float[torch.Tensor, " d_model"]
    scalars: Sequence[Scalar]
    base: BaseAnswer
    kept: KeptPrompt
    apart: int
    text: Callable[[int], str]
    told: Callable[[list[list[Token]]], object]
    columns: list[list[Token]] = field(default_factory=lambda: [[] for _ in COLUMNS])
    ids: list[list[int]] = field(default_factory=lambda: [[] for _ in COLUMNS])

    def __post_init__(self) -> None:
        #: the column of each row that is written
        self.rows = [1, 2] if self.base.whole else [0, 1, 2]
        self._stops = set(self.chat.stop_ids)
        self._of_prompt: dict[int, list[float]] = {}  # by colour
        self._last = np.zeros((len(COLUMNS), 1 + len(self.scalars)))
        skipped = range(min(self.kept.blocks, self.apart))
        self._residuals = {layer: self.kept.residual(layer)[0, -1] for layer in skipped}
        self._inputs: dict[int, torch.Tensor] = {}
        for colour, scalar in enumerate(self.scalars, 1):
            if scalar.layer in skipped:
                self._read(colour, torch.tensor([self.kept.beside[scalar.layer, scalar.name]]), self.rows)

    @property
    def prompt(self) -> list[list[float]]:
        """Of every prompt token each colour's reading in the changed model."""
        return [list(one) for one in zip(*(self._of_prompt[colour] for colour in sorted(self._of_prompt)), strict=True)]

    def hooks(self) -> list[Hook]:
        """What reads the colours, and whatever else a kept answer needs, as forward hooks."""
        family, found = self.chat.family, []

        def reads_direction(module: Any, inputs: Any, output: Any) -> None:
            self._read(0, family.residual(output).float() @ self.axis)

        def reads_scalar(colour: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
                self._read(colour, output[..., 0].float())
                if not self.base.whole:
                    self._inputs[colour] = self._of_base(inputs[0])

            return hook

        def keeps(layer: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                self._residuals[layer] = self._of_base(family.residual(output))

            return hook

        if not self.base.whole:
            found = [(block, keeps(layer)) for layer, block in enumerate(self.chat.blocks)]
        found.append((self.chat.block(self.layer), reads_direction))
        return [*found, *((scalar.A, reads_scalar(colour)) for colour, scalar in enumerate(self.scalars, 1))]

    def _of_base(self, values: torch.Tensor) -> torch.Tensor:
        """What the base model's row has at its last position; one row is there for all as long as they agree."""
        owners = self._owners()
        row = owners.index(0) if 0 in owners and len(values) > 1 else 0
        return values[row, -1].clone()

    def _owners(self) -> list[int]:
        rows = announced_rows()
        assert rows is not None
        return [self.rows[owner] for owner in rows.conversation.tolist()]

    def _read(self, colour: int, values: torch.Tensor, owners: list[int] | None = None) -> None:
        """Take a colour's values ``[rows or 1, positions]``."""
        owners = self._owners() if owners is None else owners
        values = values.expand(len(owners), -1)
        if colour not in self._of_prompt:  # the prompt is being read
            self._of_prompt[colour] = values[owners.index(1)].tolist()
            if colour and self.scalars[colour - 1].layer < self.apart:
                scalar = self.scalars[colour - 1]
                self.kept.beside[scalar.layer, scalar.name] = self._of_prompt[colour]
        self._last[owners, colour] = values[:, -1].tolist()

    def known(self) -> list[Token]:
        """The whole base answer, with the readings of the present colours."""
        found = []
        for token, residuals, inputs in zip(self.base.tokens, self.base.residuals, self.base.inputs, strict=True):
            along = float(residuals[self.layer].float() @ self.axis)
            reads = [float(one @ scalar.A.weight[0]) for one, scalar in zip(inputs, self.scalars, strict=True)]
            found.append(Token(token.text, token.logprob, [along, *reads], token.alternatives))
        return found

    def write(self, answers: np.ndarray, position: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """One more token of some rows, as :func:`emmech.engine.decode.write_answers` draws them."""
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(_FIRST, logprobs.shape[-1]))
        new: list[list[Token]] = [[] for _ in COLUMNS]
        if not position and self.base.whole:
            new[0] = self.known()
            self.ids[0] = list(self.base.ids)
        for at, row in enumerate(answers.tolist()):
            column, token = self.rows[row], int(tokens[at])
            pairs = zip(best.indices[at].tolist(), best.values[at].tolist(), strict=True)
            alternatives = [(self.text(one), value) for one, value in pairs]
            written = Token(self._piece(column, token), float(logprobs[at, token]), self._last[column].tolist(),
                            alternatives)  # fmt: skip
            new[column] = [written]
            if column == 0:
                self._keep(written, token)
        for column, added in zip(self.columns, new, strict=True):
            column += added
        self.told(new)

    def _keep(self, written: Token, token: int) -> None:
        base = self.base
        base.ids.append(token)
        base.tokens.append(written)
        base.residuals.append(torch.stack([self._residuals[layer] for layer in range(self.chat.n_layers)]))
        base.inputs.append([self._inputs[colour] for colour in range(1, 1 + len(self.scalars))])
        base.whole |= token in self._stops

    def _piece(self, column: int, token: int) -> str:
        """What one more token adds to a column's text; nothing where it ends the answer."""
        ids = self.ids[column]
        if token in self._stops:
            ids.append(token)
            return ""
        before = self.chat.tokenizer.decode(ids)
        ids.append(token)
        whole = self.chat.tokenizer.decode(ids)
        return str(whole[len(before) :]) if whole.startswith(before) else self.text(token)
