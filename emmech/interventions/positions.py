"""Which token positions an intervention touches, told from the tokens themselves.

``"answer"`` means the tokens of assistant turns behind their header, end-of-turn token included, wherever they come
from: a teacher-forced conversation, a prompt's earlier turns, or tokens being generated behind a key-value cache.
``"prompt"`` is every other token. Padding on either side changes nothing. A function ``(ids [batch, seq], start)``
returns any other mask of the same shape; ``start`` counts the tokens that a key-value cache holds before them;
:func:`emmech.directions.phrase_tokens` makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import nn

from emmech.chat.edits import announced_rows
from emmech.chat.model import ChatModel
from emmech.errors import EmmechError

__all__ = ["PositionMask", "Positions", "answer_tokens", "header_ids"]

Positions = Literal["all", "answer", "prompt"] | torch.Tensor | Callable[[torch.Tensor, int], torch.Tensor]


class PositionMask:
    """Follows the trunk's forward calls and says which positions of the current one are touched.

    ``current`` is None for all of them, else ``[batch, seq]`` bool.
    """

    def __init__(self, chat: ChatModel, positions: Any) -> None:
        self._where = positions
        self.current: torch.Tensor | None = None
        if isinstance(positions, str) and positions == "all":
            return
        if isinstance(positions, str) and positions in ("answer", "prompt"):
            self._header = header_ids(chat)
            self._stops = torch.tensor(chat.stop_ids)
            return
        if callable(positions) and not isinstance(positions, torch.Tensor):
            return
        if isinstance(positions, torch.Tensor) and positions.ndim == 2:
            self._where = positions.bool()
            return
        raise EmmechError(
            "choose the positions",
            f"positions={positions!r}"
            if isinstance(positions, str)
            else f"a {type(positions).__name__} {list(getattr(positions, 'shape', ()))}",
            "positions are named, or given as a mask",
            '"all", "answer", "prompt", a bool tensor [batch, seq], or a function of the token ids',
        )

    @property
    def identity(self) -> str:
        """A text that tells these positions from others; a function goes by its name."""
        if isinstance(self._where, torch.Tensor):
            return f"mask {self._where.int().tolist()}"
        return self._where if isinstance(self._where, str) else repr(getattr(self._where, "__qualname__", self._where))

    def follow(self, trunk: nn.Module) -> Any:
        """Hook the trunk, unless every position is touched; returns the hook's handle or None."""
        if isinstance(self._where, str) and self._where == "all":
            return None
        return trunk.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if isinstance(self._where, torch.Tensor):
            self.current = self._given(ids, kwargs, seen)
            return
        if ids is None:
            raise EmmechError(
                f"find the {self._where} positions",
                "a forward call with inputs_embeds",
                "without token ids nobody can tell where an answer starts",
                'positions="all", or a bool tensor [batch, seq]',
            )
        if callable(self._where):
            self.current = self._where(ids, seen).bool()
            return
        # behind a cache that holds the prompt, every new token is answer
        answer = torch.ones_like(ids, dtype=torch.bool) if seen else answer_tokens(ids, self._header, self._stops)
        self.current = answer if self._where == "answer" else ~answer

    def _given(self, ids: Any, kwargs: dict[str, Any], seen: int) -> torch.Tensor:
        assert isinstance(self._where, torch.Tensor)
        if announced_rows() is not None:
            raise EmmechError(
                "apply the position mask",
                f"positions {list(self._where.shape)} while conversations are sampled or scored",
                "they are sorted, repeated and padded there, so the mask's rows and columns are not the batch's",
                '"answer", "prompt", or a function of the token ids',
            )
        shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
        part = self._where[:, seen : seen + shape[1]]
        if tuple(part.shape) != shape:
            raise EmmechError(
                "apply the position mask",
                f"positions {list(self._where.shape)} for tokens {seen} to {seen + shape[1]} of {shape[0]} rows",
                "the mask has one entry per token of the batch, generated ones included",
                f"a bool tensor [{shape[0]}, at least {seen + shape[1]}]",
            )
        return part


def header_ids(chat: ChatModel) -> list[int]:
    """Token ids of the assistant's header, as the template writes it before an answer.

    Raises:
        EmmechError: the template has none.
    """
    asked = [{"role": "user", "content": "a"}]
    with_header, without = chat.token_ids(asked), chat.token_ids(asked, generate=False)
    header = with_header[len(without) :]
    if not header or with_header[: len(without)] != without:
        raise EmmechError(
            "find where answers start",
            f"the chat template of {chat.name}",
            "it writes no header before an answer",
            'positions="all", or a bool tensor [batch, seq]',
        )
    return header


def answer_tokens(
    ids: Int[torch.Tensor, "batch seq"], header: list[int], stops: Int[torch.Tensor, " stops"]
) -> Bool[torch.Tensor, "batch seq"]:
    """Tokens behind an assistant header, up to and including the next stop token.

    Example:
        >>> ids = torch.tensor([[0, 5, 9, 7, 2, 5, 8]])
        >>> answer_tokens(ids, header=[5, 9], stops=torch.tensor([2])).int().tolist()
        [[0, 0, 0, 1, 1, 0, 0]]
    """
    inside = torch.zeros_like(ids, dtype=torch.bool)
    size = len(header)
    if ids.shape[1] <= size:
        return inside
    wanted = torch.tensor(header, device=ids.device)
    starts = (ids.unfold(1, size, 1) == wanted).all(-1)
    stop = torch.isin(ids, stops.to(ids.device))
    for row, first in starts.nonzero().tolist():
        begin = first + size
        ends = stop[row, begin:].nonzero()
        end = begin + int(ends[0]) + 1 if len(ends) else ids.shape[1]
        inside[row, begin:end] = True
    return inside
