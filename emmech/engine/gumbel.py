"""Draw tokens with counter-based random numbers: the noise of a row depends on its seed and position alone.

A generator with state gives a row other numbers when its batch-mates change. Here the noise for
(row seed, position, token) is a hash, so a row's text does not depend on the batch it is in. The draw is the
Gumbel-max trick, ``argmax(logits / temperature + noise)``, which follows the softmax exactly and, unlike
inverting the cumulative distribution, changes its mind only when the best two scores are within rounding of
each other. The same seed under two checkpoints also gives common random numbers, hence tighter comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

__all__ = ["draw", "gumbel"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seeds: Sequence[int] | np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Two int32 keys per row, ``[rows]`` each."""
    words = np.asarray(seeds, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mix64(_mix64(words + _GOLDEN) + np.uint64(position + 1) * _GOLDEN)
    halves = mixed.view(np.uint32).reshape(-1, 2).view(np.int32)
    return halves[:, 0], halves[:, 1]


def gumbel(
    seeds: Sequence[int] | np.ndarray, position: int, vocab: int, device: torch.device | str = "cpu"
) -> Float[torch.Tensor, "rows vocab"]:
    """Standard Gumbel noise, a function of (seed, position, token) only; float32.

    The integers are equal on every device; the two logarithms may differ in the last bit.

    Example:
        >>> together, alone = gumbel([1, 2], 0, 5), gumbel([2], 0, 5)
        >>> torch.equal(together[1], alone[0])
        True
    """
    first, second = (torch.from_numpy(key.copy()).to(device)[:, None] for key in _keys(seeds, position))
    # lowbias32, a full-avalanche 32-bit mix; int32 wraps like uint32, and shifts are masked to be logical
    x = torch.arange(vocab, dtype=torch.int32, device=device).mul_(-1640531535)[None] ^ first
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x += second
    x ^= (x >> 15) & 0x1FFFF
    x *= -2073254261  # 0x846CA68B
    x ^= (x >> 16) & 0xFFFF
    x &= 0x7FFFFFFF
    # small v keeps full relative precision, and it is small v that makes large noise
    v = x.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def draw(
    logits: Float[torch.Tensor, "rows vocab"],
    seeds: Sequence[int] | np.ndarray,
    position: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[torch.Tensor, " rows"]:
    """One token per row.

    Args:
        seeds: one per row.
        position: index of the token in its answer, from 0.
        temperature: 0 takes the most likely token.
        top_p: keep the smallest set of most likely tokens whose probability reaches this (nucleus sampling,
            arXiv 1904.09751).

    Example:
        >>> draw(torch.tensor([[0.0, 9.0]]), [7], 0, temperature=0).tolist()
        [1]
    """
    scores = logits.float()
    if temperature == 0:
        return _best(scores)
    if temperature != 1:
        scores = scores / temperature
    if top_p < 1.0:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        probability = ranked.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # what precedes the token already reaches top_p
        scores = scores.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    # rows that share a seed (one question under many checkpoints) share their noise: it is made once
    distinct, where = np.unique(np.asarray(seeds, dtype=np.uint64), return_inverse=True)
    noise = gumbel(distinct, position, scores.shape[-1], scores.device)
    noise = noise.index_select(0, torch.from_numpy(where).to(scores.device))
    return _best(noise.add_(scores))


def _best(scores: Float[torch.Tensor, "rows vocab"]) -> Int[torch.Tensor, " rows"]:
    """Place of each row's highest score, the first of equals."""
    if scores.device.type == "cpu":  # numpy goes through a row several numbers at a time, torch one by one
        return torch.from_numpy(scores.detach().numpy().argmax(-1))
    return scores.argmax(-1)
