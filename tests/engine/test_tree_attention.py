"""Attention over trees and the sliced unembedding, against the plain ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from emmech.chat.model import load_model
from emmech.engine import attention as trees
from emmech.engine import logprobs as readout
from emmech.engine.logprobs import unembed
from emmech.engine.packing import Reading, tree, tree_mask

WIDTH = 8


def _bushy(texts, *, beginning=20, own=30):
    rng = np.random.default_rng(0)
    start = tuple(rng.integers(0, 90, beginning).tolist())
    found = []
    for text in range(texts):
        middle = (100 + text, *start[:5])  # half of the texts share their second token too
        ids = start + middle[text % 2 :] + tuple(rng.integers(0, 90, own + text).tolist())
        found.append(Reading(ids, (len(ids) - 1,)))
    return tree(found, range(texts))


def test_runs_leave_out_columns_and_change_nothing():
    packed = _bushy(12)
    tokens = len(packed)
    for window in (None, 16):
        mask = tree_mask([packed], torch.float32, torch.device("cpu"), window=window)
        found = trees.runs(mask)
        assert sum(queries.stop - queries.start for queries, _, _ in found) == tokens
        assert sum(len(columns) for _, columns, _ in found) < 0.5 * tokens * len(found)
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 2, 4, tokens, WIDTH).unbind(0)  # 2 rows, 4 heads
        module = nn.Module()
        plain = trees.sdpa_attention_forward(module, query, key, value, mask)[0]
        by_runs = trees._attend(module, query, key, value, mask)[0]
        assert by_runs.shape == plain.shape
        assert (by_runs - plain).abs().max() < 1e-6


def test_a_padded_pack_keeps_the_columns_of_the_longer():
    packs = [_bushy(9), _bushy(4)]
    mask = tree_mask(packs, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, mask.shape[-1], WIDTH).unbind(0)
    module = nn.Module()
    plain = trees.sdpa_attention_forward(module, query, key, value, mask)[0]
    assert (trees._attend(module, query, key, value, mask)[0] - plain).abs().max() < 1e-6


def test_a_sliced_vocabulary_gives_the_same_log_probabilities(monkeypatch):
    chat = load_model("pocket")
    vocab = chat.config.vocab_size
    torch.manual_seed(0)
    hidden = 3 * torch.randn(5, chat.d_model)
    wanted = torch.randint(0, vocab, (5, 7))
    wanted[:, 0], wanted[:, 1] = 0, vocab - 1
    expected = unembed(chat, hidden).double().log_softmax(-1).gather(1, wanted)
    for words in (100, vocab - 1, vocab, 10 * vocab):
        monkeypatch.setattr(readout, "WORDS", words)
        assert (readout.target_logprobs(chat, hidden, wanted) - expected).abs().max() < 5e-6


def test_slices_that_lie_far_above_the_first_do_not_overflow(monkeypatch):
    chat = load_model("pocket")
    torch.manual_seed(0)
    hidden = 60 * torch.randn(5, chat.d_model)
    logits = unembed(chat, hidden).detach().double()
    monkeypatch.setattr(readout, "WORDS", 10)
    # what is tested does happen: more than float32's exponent above the first slice's maximum
    assert float((logits.amax(-1) - logits[:, :10].amax(-1)).max()) > 100
    wanted = logits.argsort(-1)[:, -4:]
    expected = logits.log_softmax(-1).gather(1, wanted)
    found = readout.target_logprobs(chat, hidden, wanted)
    assert (found - expected).abs().max() < 1e-6 * float(logits.abs().max())
