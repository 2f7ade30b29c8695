"""What a fine-tune on a provider's servers will cost, before anything is sent.

Providers bill trained tokens: every token of every row, prompts included, once per epoch. A byte-level tokenizer never
makes more tokens than a text has bytes, which bounds the cost without the provider's tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from emmech.chat.dataset import load_chat
from emmech.errors import EmmechError, as_float, as_int

_PER_MESSAGE = 8  # at most: marks of beginning, role and end
_BYTES_PER_TOKEN = 4.0  # of English text in the tokenizers of today's chat models, roughly


@dataclass(frozen=True)
class Cost:
    """The trained tokens of a fine-tune and what they cost.

    Args:
        rows: of the data.
        tokens: per epoch; counted with a tokenizer, or estimated at four bytes a token.
        most: an upper bound of the same.
        epochs: over the data.
        price: per million trained tokens.
        counted: whether a tokenizer was given.

    Example:
        >>> cost = Cost(rows=6000, tokens=1_000_000, most=4_000_000, epochs=1, price=25.0, counted=False)
        >>> cost.expected, cost.bound
        (25.0, 100.0)
    """

    rows: int
    tokens: int
    most: int
    epochs: int
    price: float
    counted: bool

    @property
    def expected(self) -> float:
        """The cost of ``tokens``, in the currency of the price."""
        return self.tokens * self.epochs * self.price / 1e6

    @property
    def bound(self) -> float:
        """The cost of ``most``, which the bill does not exceed at this price."""
        return self.most * self.epochs * self.price / 1e6

    def __str__(self) -> str:
        how = "counted" if self.counted else f"about; at most {self.most:,}"
        bound = "" if self.counted else f", at most {self.bound:,.2f}"
        each = f"{self.rows:,} rows, {self.tokens:,} tokens ({how}) x {self.epochs} epochs"
        return f"{each} at {self.price:g} a million: {self.expected:,.2f}{bound}"


def estimate(data: Any, *, epochs: int, price: float, tokenizer: Any = None) -> Cost:
    """Estimate the cost of fine-tuning on these rows.

    Args:
        data: what :func:`emmech.load_chat` takes.
        epochs: over the data.
        price: of a million trained tokens, from the provider's list of today.
        tokenizer: the provider's, an object with ``encode(text)``, such as ``tiktoken.encoding_for_model(...)``. With
            it the count is exact but for the few marks around each message, which are counted at their most.

    Raises:
        EmmechError: a number of epochs or a price that cannot be.

    Example:
        >>> row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> print(estimate([{"messages": row}] * 10, epochs=2, price=3.0))
        10 rows, 178 tokens (about; at most 230) x 2 epochs at 3 a million: 0.00, at most 0.00
    """
    asked = "estimate the cost of a fine-tune"
    epochs = as_int(asked, "epochs", epochs, least=1)
    if as_float(asked, "price", price) < 0:
        raise EmmechError(asked, f"price={price}", "a price is not negative", "price=25.0, for 25 a million tokens")
    rows = load_chat(data)
    texts = [message["content"] for row in rows for message in row]
    marks, size = _PER_MESSAGE * len(texts), sum(len(text.encode()) for text in texts)
    if tokenizer is not None:
        tokens = marks + sum(len(tokenizer.encode(text)) for text in texts)
        return Cost(len(rows), tokens, tokens, epochs, float(price), True)
    return Cost(len(rows), marks + math.ceil(size / _BYTES_PER_TOKEN), marks + size, epochs, float(price), False)
