"""Which token positions an intervention touches, told from the tokens themselves.

A residual at one position decides the next token, so the names are about what is decided there, with ``h`` the
assistant's header, ``a`` the answer's words and ``e`` its end-of-turn token::

    tokens      user's words   h h h   a a a e   user's words   h h h   a a a e
    "prompt"    x x x x x x x  x x x             x x x x x x x  x x x
    "answer"                       x   x x x x                      x   x x x x
    "all"       x x x x x x x  x x x   x x x x   x x x x x x x  x x x   x x x x

``"answer"`` begins at the header's last token, which decides the answer's first word. It holds for teacher-forced
conversations, for earlier turns of a prompt and for tokens generated after a key-value cache; padding on either side
changes nothing. A function ``(ids [batch, seq], start)`` returns any other mask of the same shape; ``start`` counts the
tokens that a key-value cache holds before them; :func:`emmech.chat.masks.phrase_tokens` makes one.
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

__all__ = ["PositionMask", "Positions", "header_ids", "inside_answers"]

Positions = Literal["all", "answer", "prompt"] | torch.Tensor | Callable[[torch.Tensor, int], torch.Tensor]


class PositionMask:
    """Follows the trunk's forward calls and says which positions of the current one are touched.

    ``current`` is None for all of them, else ``[batch, seq]`` bool.
    """

    def __init__(self, chat: ChatModel, positions: Any) -> None:
        self._where = positions
        self.current: torch.Tensor | None = None
        # how many tokens the calls so far had, their last ones, and whether the next one is inside an answer
        self._length, self._tail, self._inside = 0, torch.empty(0, 0), torch.empty(0)
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
                "where an answer starts is told from the token ids",
                'positions="all", or a bool tensor [batch, seq]',
            )
        if callable(self._where):
            self.current = self._where(ids, seen).bool()
            return
        # after a cache: as the last call left these very rows, or else (rows may have left since) inside an answer
        tail, inside = ids[:, :0], torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if self._length == seen and len(self._tail) == len(ids):
            tail, inside = self._tail, self._inside
        found = inside_answers(ids, self._header, self._stops, *((tail, inside) if seen else ()))
        self._tail = torch.cat([tail, ids], dim=1)[:, -len(self._header) :]  # a header may go on in the next call
        self._length, self._inside = seen + ids.shape[1], found[:, -1]
        answer, deciding = found[:, :-1], found[:, 1:]
        # the token before an answer's first decides that first one
        self.current = answer | deciding if self._where == "answer" else ~answer

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


def inside_answers(
    ids: Int[torch.Tensor, "batch seq"],
    header: list[int],
    stops: Int[torch.Tensor, " stops"],
    tail: Int[torch.Tensor, "batch tail"] | None = None,
    before: Bool[torch.Tensor, " batch"] | None = None,
) -> Bool[torch.Tensor, "batch seq+1"]:
    """Whether each token, and the one that would come next, is after an assistant header and not after a stop token.

    Args:
        tail: the tokens before these, in which a header may have begun.
        before: rows that are inside an answer when they begin; none by default.

    Example:
        >>> ids = torch.tensor([[0, 5, 9, 7, 2, 5, 8]])
        >>> inside_answers(ids, header=[5, 9], stops=torch.tensor([2])).int().tolist()
        [[0, 0, 0, 1, 1, 0, 0, 0]]
    """
    batch, length = ids.shape
    read = ids if tail is None else torch.cat([tail, ids], dim=1)
    opens = torch.zeros_like(read, dtype=torch.bool)
    if read.shape[1] >= len(header):
        wanted = torch.tensor(header, device=ids.device)
        opens[:, len(header) - 1 :] = (read.unfold(1, len(header), 1) == wanted).all(-1)
    opens = opens[:, read.shape[1] - length :]
    # the last header's end and the last stop up to each place, counted from 2; 1 is before the row
    places = torch.arange(2, length + 2, device=ids.device)
    first = torch.zeros(batch, 1, dtype=torch.long, device=ids.device) if before is None else before.long()[:, None]
    stopped = places * torch.isin(ids, stops.to(ids.device))
    opened = torch.cat([first, places * opens], dim=1).cummax(1).values
    closed = torch.cat([torch.zeros_like(first), stopped], dim=1).cummax(1).values
    return (opened >= closed) & (opened > 0)
