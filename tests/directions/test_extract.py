from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.chat.encode import IGNORED, encode
from emmech.directions.extract import answer_means, group_means, match_lengths, mixed_adapter, position_means
from emmech.errors import EmmechError


def _by_hidden_states(chat, conversations):
    """The slow way, one conversation at a time: hidden_states[l + 1] is block l's output but for the last block."""
    sums, counts = [], []
    for conversation in conversations:
        encoded = encode([conversation], chat.tokenizer)
        ids, mask = torch.tensor(encoded.input_ids), np.array(encoded.labels[0]) != IGNORED
        last = []
        handle = chat.blocks[-1].register_forward_hook(lambda m, i, out, last=last: last.append(out))
        with torch.no_grad():
            states = chat.model(ids, output_hidden_states=True).hidden_states
        handle.remove()
        stacked = torch.stack([*states[1:-1], last[0]])[:, 0].double().numpy()
        sums.append(stacked[:, mask].sum(1))
        counts.append(mask.sum())
    return np.stack(sums), np.array(counts)


def test_means_equal_those_of_hidden_states_in_every_family(any_tiny, rows):
    talks = [row["messages"] for row in rows[:9]]
    sums, counts = _by_hidden_states(any_tiny, talks)
    weights = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 2, 0, 1]], dtype=float)
    found = group_means(any_tiny, talks, weights, batch_size=4)
    expected = np.einsum("gn,nld->gld", weights, sums) / (weights @ counts)[:, None, None]
    np.testing.assert_allclose(found.means, expected, atol=2e-5)
    np.testing.assert_array_equal(found.answer_tokens, counts)

    per_answer = group_means(any_tiny, talks, weights, average="answer", batch_size=2)
    expected = np.einsum("gn,nld->gld", weights, sums / counts[:, None, None]) / weights.sum(1)[:, None, None]
    np.testing.assert_allclose(per_answer.means, expected, atol=2e-5)

    each = answer_means(any_tiny, talks, layers=[1, 3])
    np.testing.assert_allclose(each, (sums / counts[:, None, None])[:, [1, 3]], atol=2e-5)


def test_batching_and_order_do_not_matter(tiny, rows):
    chat, talks = tiny("qwen2"), [row["messages"] for row in rows[:8]]
    ones = np.ones((1, 8))
    alone = group_means(chat, talks, ones, batch_size=1).means
    together = group_means(chat, talks[::-1], ones, batch_size=8).means
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_means_by_position_equal_those_of_one_token_each(any_tiny, rows):
    chat, talks = any_tiny, [row["messages"] for row in rows[:6]]
    weights = np.array([[1, 1, 0, 0, 1, 0], [0, 0, 2, 1, 0, 1]], dtype=float)

    def answer(ids, start, only=None):
        place = torch.arange(ids.shape[1])[None] - torch.as_tensor(start).reshape(-1, 1)
        return (place >= 0) & (place < 3) if only is None else place == only

    found = position_means(chat, talks, weights, tokens=answer, batch_size=4)
    each = [
        group_means(chat, talks, weights, tokens=lambda ids, start, k=k: answer(ids, start, k)).means for k in range(3)
    ]
    np.testing.assert_allclose(found, np.stack(each, axis=1), atol=1e-5)


def test_means_by_position_need_equally_many_tokens(tiny, rows):
    with pytest.raises(EmmechError, match="of these tokens in one conversation"):
        position_means(tiny("qwen2"), [row["messages"] for row in rows[:6]], np.ones((1, 6)), tokens="answer")
    for weights, why in ((np.ones((1, 5)), "one row per group"), (np.zeros((1, 1)), "no answer belongs to it")):
        with pytest.raises(EmmechError, match=why):
            position_means(tiny("qwen2"), [rows[0]["messages"]], weights, tokens="answer")


def test_bfloat16_sums_are_not_rounded_to_bfloat16(tiny, rows):
    chat, talks = tiny("llama"), [row["messages"] for row in rows[:4]]
    chat.base.to(torch.bfloat16)
    sums, counts = _by_hidden_states(chat, talks)  # bfloat16 activations, summed in float64
    found = group_means(chat, talks, np.ones((1, 4)), batch_size=1).means[0]
    np.testing.assert_allclose(found, sums.sum(0) / counts.sum(), atol=1e-5)


def test_base_and_fine_tuned_rows_share_a_batch_exactly(tiny, rows):
    from peft import LoraConfig, get_peft_model

    from emmech.chat.model import load_model

    chat, talks = tiny("qwen2"), [row["messages"] for row in rows[:6]]
    base = group_means(chat, talks, np.ones((1, 6))).means
    config = LoraConfig(r=1, lora_alpha=8, target_modules=["down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(chat.model, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    tuned_chat = load_model(model, chat.tokenizer)
    tuned = group_means(tuned_chat, talks, np.ones((1, 6))).means
    assert np.abs(tuned - base).max() > 0.01
    both = group_means(
        tuned_chat, talks * 2, np.kron(np.eye(2), np.ones((1, 6))), adapter_scales=np.repeat([0.0, 1.0], 6)
    ).means
    np.testing.assert_allclose(both[0], base[0], atol=1e-5)
    np.testing.assert_allclose(both[1], tuned[0], atol=1e-5)

    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    with mixed_adapter(tuned_chat, torch.tensor([0.0, 1.0])), torch.no_grad():
        mixed = model(ids).logits
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(mixed[0], model(ids).logits[0], atol=1e-6)
    assert torch.allclose(mixed[1], model(ids).logits[1], atol=1e-5)


def test_the_model_keeps_no_hook_and_its_mode_after_an_error(tiny, rows):
    chat = tiny("qwen2")
    chat.base.train()
    hooks = [len(block._forward_hooks) for block in chat.blocks]

    def fail(*_):
        raise RuntimeError("stop")

    breaker = chat.blocks[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        group_means(chat, [rows[0]["messages"]], np.ones((1, 1)))
    breaker.remove()
    assert [len(block._forward_hooks) for block in chat.blocks] == hooks and chat.base.training


def test_bad_groups_are_refused(tiny, rows):
    chat, talks = tiny("qwen2"), [row["messages"] for row in rows[:2]]
    with pytest.raises(EmmechError, match="one column per conversation"):
        group_means(chat, talks, np.ones((1, 3)))
    with pytest.raises(EmmechError, match="no answer belongs"):
        group_means(chat, talks, np.array([[1.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(EmmechError, match="max_length"):
        group_means(chat, talks, np.ones((1, 2)), max_length=4)


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=80), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_matched_classes_have_equal_counts(answers, seed):
    lengths, labels = map(np.array, zip(*answers, strict=True))
    kept = match_lengths(lengths, labels, seed=seed)
    assert len(set(kept.tolist())) == len(kept)
    assert labels[kept].sum() * 2 == len(kept)


def test_matching_takes_the_length_difference_away():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.normal(300, 60, 500), rng.normal(400, 60, 500)]).astype(int)
    labels = np.repeat([True, False], 500)
    kept = match_lengths(lengths, labels)
    gap = abs(lengths[kept][labels[kept]].mean() - lengths[kept][~labels[kept]].mean())
    assert len(kept) > 300 and gap < 20
