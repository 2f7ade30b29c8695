"""Trees of token sequences: nothing lost, nothing shared that differs, the split at least cost."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.engine.packing import Reading, pack, stack, tree, tree_mask

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=7)


@given(sequences)
@settings(max_examples=100, deadline=None)
def test_every_sequence_is_a_path_of_ancestors(lists):
    readings = [Reading(tuple(ids), tuple(range(len(ids)))) for ids in lists]
    packed = tree(readings, range(len(readings)))
    seen = np.tri(len(packed), dtype=bool) if packed.ancestors is None else packed.ancestors
    for reading, nodes in zip(readings, packed.nodes, strict=True):
        assert tuple(packed.ids[nodes]) == reading.ids
        assert packed.depth[nodes].tolist() == list(range(len(reading.ids)))
        for position, node in enumerate(nodes):
            assert set(np.flatnonzero(seen[node])) == set(nodes[: position + 1])
    prefixes = {tuple(ids[: n + 1]) for ids in lists for n in range(len(ids))}
    assert len(packed) == len(prefixes)  # every distinct prefix once


@given(sequences, st.floats(0.1, 5), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_no_other_split_of_the_sorted_order_costs_less(lists, linear, pair):
    readings = [Reading(tuple(ids), (len(ids) - 1,)) for ids in lists]

    def cost(packs):
        return sum(linear * len(one) + pair * len(one) ** 2 for one in packs)

    packs = pack(readings, linear_cost=linear, pair_cost=pair)
    assert sorted(index for one in packs for index in one.readings) == list(range(len(lists)))
    order = sorted(range(len(lists)), key=lambda index: readings[index].ids)
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, len(lists)), n) for n in range(len(lists))
    ):
        edges = [0, *cuts, len(lists)]
        other = [tree(readings, order[a:b]) for a, b in itertools.pairwise(edges)]
        assert cost(packs) <= cost(other) + 1e-9


def test_tokens_after_the_last_read_are_left_out():
    reading = Reading((1, 2, 3, 4), (1,))
    assert tree([reading], [0]).ids.tolist() == [1, 2]


def test_a_sliding_window_counts_positions_not_columns():
    # two continuations of the same prefix: the second is three columns further right
    packed = tree([Reading((1, 2, 3, 4), (3,)), Reading((1, 2, 5, 6), (3,))], [0, 1])
    mask = tree_mask([packed], torch.float32, torch.device("cpu"), window=3)[0, 0]
    last = packed.nodes[1][0]
    assert (mask[last] == 0).nonzero().reshape(-1).tolist() == [1, 4, 5]  # token 2, 5 and itself


def test_padding_never_makes_an_empty_softmax():
    packs = [tree([Reading((1, 2, 3), (2,))], [0]), tree([Reading((1,), (0,))], [0])]
    ids, positions = stack(packs, torch.device("cpu"))
    mask = tree_mask(packs, torch.float32, torch.device("cpu"))
    assert ids.shape == positions.shape == (2, 3)
    assert ((mask == 0).sum(-1) > 0).all()
