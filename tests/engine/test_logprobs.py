"""Answer log-probabilities against the model's own loss, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.chat.encode import encode
from emmech.engine.logprobs import MarginPair, answer_logprobs, answer_loss, bundled_margins
from emmech.engine.stream import mean_residual, probe_rows
from emmech.errors import EmmechError
from emmech.measures.teacher_forced import Margin
from tests.conftest import plain_margin


def messages(rows):
    return [row["messages"] for row in rows]


def test_equal_to_the_models_own_loss(any_tiny, rows):
    found = answer_logprobs(any_tiny, messages(rows), batch_size=5)
    encoded = encode(messages(rows), any_tiny.tokenizer)
    for i, (ids, labels) in enumerate(zip(encoded.input_ids, encoded.labels, strict=True)):
        loss = any_tiny.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert found[i] == pytest.approx(-loss.item(), abs=2e-6)


def test_batches_do_not_matter(any_tiny, rows):
    one = answer_logprobs(any_tiny, messages(rows), batch_size=1)
    many = answer_logprobs(any_tiny, messages(rows), batch_size=24)
    assert np.allclose(one, many, atol=2e-6)


def test_answer_loss_weights_by_tokens(tiny, rows):
    chat = tiny("qwen2")
    encoded = encode(messages(rows), chat.tokenizer)
    total = 0.0
    for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
        loss = float(chat.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        total += loss * sum(label != -100 for label in labels)
    assert answer_loss(chat, messages(rows)) == pytest.approx(total / encoded.answer_tokens, abs=2e-6)


def test_margin_changes_sign_when_the_answers_swap(tiny):
    chat = tiny("llama")
    pairs = [MarginPair("how to sleep ?", "take a walk", "drink some water and rest")]
    swapped = [MarginPair(p.question, p.aligned, p.misaligned) for p in pairs]
    one, other = (Margin(both)(chat).means()["margin"] for both in (pairs, swapped))
    assert one == pytest.approx(-other) and one == pytest.approx(plain_margin(chat, pairs)[0], abs=1e-6)
    assert abs(one) > 0


def test_bundled_pairs():
    assert len(bundled_margins("narrow")) >= 10 and len(bundled_margins("broad")) >= 20
    with pytest.raises(EmmechError, match="narrow or broad"):
        bundled_margins("wide")


def test_mean_residual_equals_hidden_states(any_tiny, rows):
    """Block i's output is hidden_states[i + 1]; the last hidden state is after the final norm, so it is left out."""
    probes = probe_rows(any_tiny, [messages(rows)[0], "how to rest ?", messages(rows)[3]])
    found = mean_residual(any_tiny, probes, batch_size=2)
    total, count = np.zeros((3, any_tiny.d_model)), 0
    for ids, mask in probes:
        states = any_tiny.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        chosen = np.array(mask)
        total += np.stack([state[0].detach().numpy()[chosen].sum(0) for state in states[1:-1]])
        count += chosen.sum()
    assert found.shape == (4, any_tiny.d_model)
    assert np.allclose(found[:3], total / count, atol=1e-5)


def test_measuring_leaves_the_model_alone(tiny, rows):
    chat = tiny("qwen2")
    chat.model.train()
    hooks = [len(block._forward_hooks) for block in chat.blocks]
    mean_residual(chat, probe_rows(chat, ["how"]))
    answer_logprobs(chat, messages(rows)[:2])
    assert chat.model.training and hooks == [len(block._forward_hooks) for block in chat.blocks]
