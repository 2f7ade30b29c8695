"""Pack token sequences that share a prefix: the shared tokens once, then every continuation.

A set of sequences is a tree (a trie of their tokens). When the tree is flattened into one row, each token attends only
to its ancestors and its position is its depth, so every sequence sees exactly what it would see alone (tree attention,
as in SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Reading:
    """A token sequence and what is read from it.

    Args:
        ids: the tokens.
        at: positions that are read, ascending; position ``p`` predicts token ``p + 1``.
        targets: for each read position the token ids whose log-probability is wanted; None is the whole vocabulary.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...] | None = None

    @property
    def needed(self) -> tuple[int, ...]:
        """The tokens up to the last read position; later ones cannot change what is read."""
        return self.ids[: self.at[-1] + 1]


@dataclass(frozen=True)
class Pack:
    """One row, which is the tree of some readings' tokens.

    Args:
        ids: ``[tokens]``, parents before children.
        depth: ``[tokens]``, the position of each token in its own sequence.
        ancestors: ``[tokens, tokens]``, True where the row's token attends to the column's; None for a plain chain.
        readings: indices of the readings in the tree.
        nodes: for each reading the flat index of each of its read positions.
    """

    ids: Int[np.ndarray, " tokens"]
    depth: Int[np.ndarray, " tokens"]
    ancestors: Bool[np.ndarray, "tokens tokens"] | None
    readings: tuple[int, ...]
    nodes: tuple[Int[np.ndarray, " _reads"], ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def tree(readings: Sequence[Reading], chosen: Sequence[int]) -> Pack:
    """The pack of the chosen readings.

    Example:
        >>> two = [Reading((5, 6, 7), (2,)), Reading((5, 6, 8), (1, 2))]
        >>> packed = tree(two, [0, 1])
        >>> packed.ids.tolist(), packed.depth.tolist(), packed.nodes[1].tolist()
        ([5, 6, 7, 8], [0, 1, 2, 2], [1, 3])
    """
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    depth: list[int] = []
    parents: list[int] = []
    nodes = []
    for index in chosen:
        node, path = -1, []
        for position, token in enumerate(readings[index].needed):
            found = children.get((node, token))
            if found is None:
                found = children[node, token] = len(ids)
                ids.append(token)
                depth.append(position)
                parents.append(node)
            node = found
            path.append(node)
        nodes.append(np.array([path[position] for position in readings[index].at], dtype=np.int64))
    ancestors = None
    if parents != list(range(-1, len(ids) - 1)):
        ancestors = np.eye(len(ids), dtype=bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                ancestors[node] |= ancestors[parent]
    return Pack(np.array(ids), np.array(depth), ancestors, tuple(chosen), tuple(nodes))


def pack(
    readings: Sequence[Reading], *, linear_cost: float, pair_cost: float, longest: int = 4096, reach: int | None = None
) -> list[Pack]:
    """Group readings into packs so that the estimated work is least.

    A longer row shares more of its prefix, but its attention is quadratic in its length (up to ``reach``). In
    lexicographic order sequences with a common prefix are adjacent, so the best grouping is a split of that order,
    which dynamic programming finds.

    Args:
        linear_cost: work per token of a row.
        pair_cost: work per pair of tokens of a row.
        longest: the largest number of tokens in a row, unless a single reading is longer.
        reach: the largest number of columns to which a token attends; None is all of the row's.
    """
    order = sorted(range(len(readings)), key=lambda index: readings[index].needed)
    needed = [readings[index].needed for index in order]
    # the number of tokens that each sequence has in common with its predecessor
    shared = [0]
    for pair in itertools.pairwise(needed):
        shared.append(sum(itertools.takewhile(bool, itertools.starmap(operator.eq, zip(*pair, strict=False)))))
    best = [0.0] + [float("inf")] * len(order)
    start_of = [0] * (len(order) + 1)
    for start in range(len(order)):
        tokens = 0
        for end in range(start, len(order)):
            tokens += len(needed[end]) - (shared[end] if end > start else 0)
            if tokens > longest and end > start:
                break
            cost = best[start] + linear_cost * tokens + pair_cost * tokens * min(tokens, reach or tokens)
            if cost < best[end + 1]:
                best[end + 1], start_of[end + 1] = cost, start
    packs: list[Pack] = []
    end = len(order)
    while end > 0:
        packs.append(tree(readings, order[start_of[end] : end]))
        end = start_of[end]
    return packs[::-1]


def stack(packs: Sequence[Pack], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of several packs, ``[packs, tokens]`` each, padded on the right."""
    width = max(len(one) for one in packs)
    ids = np.zeros((len(packs), width), dtype=np.int64)
    depth = np.zeros((len(packs), width), dtype=np.int64)
    for row, one in enumerate(packs):
        ids[row, : len(one)], depth[row, : len(one)] = one.ids, one.depth
        # positions keep increasing in the padding, since they must not look like several packed sequences
        depth[row, len(one) :] = np.arange(width - len(one)) + one.depth[-1] + 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(depth).to(device)


def tree_mask(
    packs: Sequence[Pack], dtype: torch.dtype, device: torch.device, *, window: int | None = None
) -> torch.Tensor:
    """Additive attention mask ``[packs, 1, tokens, tokens]`` of packs that branch.

    Args:
        window: in a sliding-window layer, the number of positions back that a token sees, itself included.
    """
    width = max(len(one) for one in packs)
    allowed = np.tile(np.eye(width, dtype=bool), (len(packs), 1, 1))  # padding sees itself, so that no softmax is empty
    for row, one in enumerate(packs):
        size = len(one)
        seen = np.tri(size, dtype=bool) if one.ancestors is None else one.ancestors
        if window is not None:
            seen = seen & (one.depth[:, None] - one.depth[None, :] < window)
        allowed[row, :size, :size] = seen
    blocked = torch.zeros(allowed.shape, dtype=dtype)
    blocked.masked_fill_(torch.from_numpy(~allowed), torch.finfo(dtype).min)
    return blocked[:, None].to(device)
