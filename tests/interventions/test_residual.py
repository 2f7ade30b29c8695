"""Steering and ablation against arithmetic done by hand on the residual stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.chat.edits import live_edits
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.interventions.residual import ablate, cap, header_ids, inside_answers, steer


def _direction(chat, seed=0, **kwargs) -> Direction:
    return Direction(np.random.default_rng(seed).standard_normal((chat.n_layers, chat.d_model)), **kwargs)


def _ids(chat, batch=3, seq=9, seed=0):
    return torch.randint(20, 250, (batch, seq), generator=torch.Generator().manual_seed(seed))


def _outputs(chat, ids, **kwargs):
    """All block outputs and the logits."""
    kept: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda m, i, out, layer=layer: kept.__setitem__(layer, out))
        for layer, block in enumerate(chat.blocks)
    ]
    with torch.no_grad():
        logits = chat.model(input_ids=ids, **kwargs).logits
    for handle in handles:
        handle.remove()
    return kept, logits


def test_steering_adds_to_every_row_of_the_block_it_names(any_tiny):
    chat, d = any_tiny, _direction(any_tiny)
    ids = _ids(chat)
    plain, before = _outputs(chat, ids)
    with steer(chat, d, 2.5, layer=1):
        steered, during = _outputs(chat, ids)
    _, after = _outputs(chat, ids)
    assert torch.equal(before, after)
    assert torch.equal(steered[0], plain[0])
    added = (steered[1] - plain[1]) - 2.5 * torch.from_numpy(d.at(1).copy())
    assert added.abs().max() < 1e-4  # every row, not the first one only
    assert (during - before).abs().amax(dim=(1, 2)).min() > 1e-3


def test_ablation_leaves_no_component_and_towards_leaves_the_means(any_tiny):
    chat, d = any_tiny, _direction(any_tiny)
    ids, unit = _ids(chat), torch.from_numpy(d.unit().vectors.copy())
    plain, before = _outputs(chat, ids)
    with ablate(chat, d):
        ablated, _ = _outputs(chat, ids)
    for layer in range(chat.n_layers):
        scale = plain[layer].abs().max()
        assert (ablated[layer] @ unit[layer]).abs().max() < 1e-5 * scale
    expected = plain[0] - (plain[0] @ unit[0])[..., None] * unit[0]
    assert torch.allclose(ablated[0], expected, atol=1e-4)
    mean = np.random.default_rng(5).standard_normal(d.vectors.shape).astype(np.float32)
    with ablate(chat, d, towards=mean):
        moved, _ = _outputs(chat, ids)
    for layer in range(chat.n_layers):
        target = float(unit[layer] @ torch.from_numpy(mean[layer]))
        scale = max(1.0, float(moved[layer].abs().max()))
        assert (moved[layer] @ unit[layer] - target).abs().max() < 1e-5 * scale
    _, after = _outputs(chat, ids)
    assert torch.equal(before, after)


def test_one_direction_at_all_layers(tiny):
    chat = tiny("qwen2")
    d, ids = _direction(chat), _ids(chat)
    with ablate(chat, d, from_layer=2):
        ablated, by_layer = _outputs(chat, ids)
    for layer in range(chat.n_layers):
        assert (ablated[layer] @ torch.from_numpy(d.unit().at(2).copy())).abs().max() < 1e-4
    with ablate(chat, d.at(2), layers="all"):
        _, by_vector = _outputs(chat, ids)
    assert torch.allclose(by_layer, by_vector, atol=1e-6)


def test_each_row_may_have_its_own_direction_and_coefficient(any_tiny):
    chat, ids = any_tiny, _ids(any_tiny, batch=1).repeat(4, 1)
    directions = [_direction(chat, seed) for seed in range(4)]
    doses = torch.tensor([0.0, 1.0, -2.0, 4.0])
    with steer(chat, directions, doses, layer=2):
        _, together = _outputs(chat, ids)
    for row, (d, dose) in enumerate(zip(directions, doses.tolist(), strict=True)):
        with steer(chat, d, dose, layer=2):
            _, alone = _outputs(chat, ids[:1])
        assert torch.allclose(together[row], alone[0], atol=2e-5)
    with ablate(chat, directions, strength=[0, 1, 1, 0.5]):
        _, together = _outputs(chat, ids)
    with ablate(chat, directions[2]):
        _, alone = _outputs(chat, ids[:1])
    assert torch.allclose(together[2], alone[0], atol=2e-5)
    assert torch.allclose(together[0], _outputs(chat, ids[:1])[1][0], atol=2e-5)


def test_residual_units_are_a_fraction_of_each_tokens_norm(tiny):
    chat = tiny("llama")
    ids, d = _ids(chat), _direction(chat)
    plain, _ = _outputs(chat, ids)
    with steer(chat, d * 37.0, 0.25, layer=1, units="residual"):
        steered, _ = _outputs(chat, ids)
    change = (steered[1] - plain[1]).norm(dim=-1) / plain[1].norm(dim=-1)
    assert torch.allclose(change, torch.full_like(change, 0.25), atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "answer", "prompt"])
def test_generation_with_a_cache_equals_the_whole_sequence_without_one(any_tiny, positions):
    """Left padding, key-value cache, positions and doses by row, all at once."""
    chat = any_tiny
    prompts = [
        [{"role": "user", "content": "how to sleep"}],
        [{"role": "user", "content": "the user asks the assistant how to rest well"}],
    ]
    rows = [chat.token_ids(p) for p in prompts]
    width = max(map(len, rows))
    pad = chat.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    d, doses = _direction(chat), torch.tensor([1.0, 3.0])
    with steer(chat, d, doses, layer=1, positions=positions), torch.no_grad():
        out = chat.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            pad_token_id=pad, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    for row, own in enumerate(rows):
        # the same row, unpadded, uncached, teacher-forced
        whole = torch.tensor([own + out.sequences[row, width:].tolist()])
        with steer(chat, d, float(doses[row]), layer=1, positions=positions), torch.no_grad():
            logits = chat.model(input_ids=whole, use_cache=False).logits[0]
        for step in range(5):
            assert torch.allclose(out.logits[step][row], logits[len(own) - 1 + step], atol=1e-4)


def test_answer_and_prompt_positions_are_those_of_the_loss(any_tiny, rows):
    from emmech.chat.encode import IGNORED, encode

    two_turns = rows[0]["messages"] + rows[1]["messages"]
    encoded = encode([two_turns], any_tiny.tokenizer)
    ids = torch.tensor(encoded.input_ids)
    inside = inside_answers(ids, header_ids(any_tiny), torch.tensor(any_tiny.stop_ids))[0].tolist()
    assert not inside.pop()
    assert inside == [label != IGNORED for label in encoded.labels[0]]


def test_answer_steering_begins_where_the_first_word_is_decided(tiny, rows):
    chat = tiny("qwen2")
    ids = torch.tensor([chat.token_ids(rows[0]["messages"], generate=False)])
    words = inside_answers(ids, header_ids(chat), torch.tensor(chat.stop_ids))[:, :-1]
    first = int(words[0].nonzero()[0])
    mask = words.clone()
    mask[0, first - 1] = True  # the header's last token
    plain, _ = _outputs(chat, ids)

    def tenth_and_on(tokens, start):
        return (torch.arange(tokens.shape[1]) + start >= 9).expand_as(tokens)

    late = tenth_and_on(ids, 0)
    for positions, touched in (("answer", mask), ("prompt", ~words), (mask, mask), (tenth_and_on, late)):
        with steer(chat, _direction(chat), layer=1, positions=positions):
            steered, _ = _outputs(chat, ids)
        changed = (steered[1] - plain[1]).abs().amax(-1) > 1e-6
        assert torch.equal(changed, touched)


def test_answer_steering_changes_the_first_answer_token(any_tiny):
    prompt = torch.tensor([any_tiny.token_ids([{"role": "user", "content": "how to sleep"}])])
    with torch.no_grad():
        plain = any_tiny.model(input_ids=prompt).logits
        with steer(any_tiny, _direction(any_tiny), 5.0, layer=1, positions="answer"):
            steered = any_tiny.model(input_ids=prompt).logits
    changed = (steered - plain).abs().amax(-1)[0] > 1e-6
    assert changed[-1] and not changed[:-1].any()


@pytest.mark.parametrize("positions", ["answer", "prompt"])
def test_a_second_user_turn_after_a_kept_cache_is_no_answer(tiny, rows, positions):
    """A conversation fed in pieces to one cache is steered as it is in one piece."""
    chat = tiny("qwen2")
    talk = rows[0]["messages"] + rows[1]["messages"]
    ids = torch.tensor([chat.token_ids(talk, generate=False)] * 2)
    with torch.no_grad(), steer(chat, _direction(chat), 5.0, layer=1, positions=positions):
        whole = chat.model(input_ids=ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in ids.split([3, 9, 1, 1, 14, ids.shape[1] - 28], dim=1):
            out = chat.model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-4)


def test_a_handle_updates_is_removed_and_survives_exceptions(tiny):
    chat = tiny("qwen2")
    ids, d = _ids(chat), _direction(chat)
    _, before = _outputs(chat, ids)
    handle = steer(chat, d, 1.0, layer=1)
    _, one = _outputs(chat, ids)
    handle.update(0.0)
    assert torch.equal(_outputs(chat, ids)[1], before)
    handle.update(1.0)
    assert torch.equal(_outputs(chat, ids)[1], one)
    handle.remove()
    handle.remove()
    assert torch.equal(_outputs(chat, ids)[1], before)
    with pytest.raises(ZeroDivisionError), steer(chat, d, layer=1), ablate(chat, d):
        raise ZeroDivisionError
    assert torch.equal(_outputs(chat, ids)[1], before)
    assert not any(block._forward_hooks for block in chat.blocks)
    with pytest.raises(EmmechError, match="it was removed"):
        handle.update(2.0)
    with pytest.raises(EmmechError, match="it was removed"):
        handle.generate([[{"role": "user", "content": "hello"}]])


def test_steering_and_ablation_compose_in_the_order_they_were_made(tiny):
    chat = tiny("qwen2")
    ids, d = _ids(chat), _direction(chat)
    unit = torch.from_numpy(d.unit().at(1).copy())
    with steer(chat, d, 5.0, layer=1), ablate(chat, d, layers=1):
        kept, _ = _outputs(chat, ids)
    assert (kept[1] @ unit).abs().max() < 1e-4
    with ablate(chat, d, layers=1), steer(chat, d, 5.0, layer=1):
        kept, _ = _outputs(chat, ids)
    assert torch.allclose(kept[1] @ unit, torch.tensor(5.0 * d.norms[1]).float(), atol=1e-3)


def test_gradients_reach_through(tiny):
    chat = tiny("qwen2")
    vector = torch.zeros(chat.d_model, requires_grad=True)
    with steer(chat, _direction(chat), 1.0, layer=1):
        embeds = chat.base.get_input_embeddings()(_ids(chat)) + vector
        chat.model(inputs_embeds=embeds).logits.sum().backward()
    assert vector.grad is not None and vector.grad.abs().max() > 0


def test_bfloat16_stays_bfloat16(tiny):
    chat = tiny("qwen2")
    chat.base.to(torch.bfloat16)
    with steer(chat, _direction(chat), torch.tensor([1.0, 2.0, 3.0]), layer=1), ablate(chat, _direction(chat, 1)):
        kept, logits = _outputs(chat, _ids(chat))
    assert kept[1].dtype == logits.dtype == torch.bfloat16


def test_bad_interventions_are_refused_in_words(tiny):
    chat = tiny("qwen2")
    d = _direction(chat)
    ids = _ids(chat)
    one_layer = Direction.single(np.ones(chat.d_model), 2, chat.n_layers)
    cases = [
        (lambda: steer(chat, d, 1.0, layer=9), "numbered 0 to 3"),
        (lambda: steer(chat, d, 1.0), "known at 4 layers"),
        (lambda: steer(chat, one_layer, 1.0, layer=1), "zero there"),
        (lambda: steer(chat, Direction(np.ones((4, 7))), layer=1), "layers or widths differ"),
        (lambda: steer(chat, Direction(np.ones((3, 48))), layer=1), "layers or widths differ"),
        (lambda: steer(chat, np.ones(7), layer=1), "width 48"),
        (lambda: steer(chat, np.zeros(48), layer=1), "points nowhere"),
        (lambda: steer(chat, np.full(48, np.nan), layer=1), "points nowhere"),
        (lambda: ablate(chat, Direction(np.zeros((4, 48)))), "points nowhere"),
        (lambda: steer(chat, d, float("nan"), layer=1), "finite number"),
        (lambda: steer(chat, d, "much", layer=1), "finite number"),
        (lambda: steer(chat, d, layer=1, positions="last"), '"answer"'),
        (lambda: steer(chat, d, layer=1, positions="phrase"), "emmech.chat.phrase_tokens"),
        (lambda: steer(chat, d, layer=1, units="sigma"), "two units"),
        (lambda: steer(chat, d, layer=[1, 1]), "named once"),
        (lambda: ablate(chat, d, towards="aligned"), "no aligned mean"),
        (lambda: ablate(chat, d, towards=np.ones(5)), "width 48"),
        (lambda: steer("pocket", d, layer=1), "load_model"),
        (lambda: steer(chat, _direction(chat, source={"fingerprints": ["ffff"]}), layer=1), "another base model"),
    ]  # fmt: skip
    for make, says in cases:
        with pytest.raises(EmmechError) as caught:
            make()
        assert says in str(caught.value)
        assert not any(block._forward_hooks for block in chat.blocks), says
    with steer(chat, _direction(chat, source={"fingerprints": ["ffff"]}), layer=1, force=True):
        pass
    with steer(chat, _direction(chat, source={"fingerprints": [chat.fingerprint()]}), layer=1) as live:
        with pytest.raises(EmmechError, match="twice"):
            steer(chat, d, layer=1)
        with pytest.raises(EmmechError, match="twice"), live:
            pass
        with steer(chat, d, layer=1, stack=True):
            pass
    with steer(chat, d, torch.ones(2), layer=1), pytest.raises(EmmechError, match="batch of 3 rows"):
        _outputs(chat, ids)
    with steer(chat, d, layer=1, positions=torch.ones(3, 4)), pytest.raises(EmmechError, match="mask"):
        _outputs(chat, ids)
    with steer(chat, d, layer=1, positions="answer"), pytest.raises(EmmechError, match="inputs_embeds"):
        chat.model(inputs_embeds=torch.zeros(1, 3, 48))


def test_a_cap_clamps_the_component_and_leaves_what_is_inside(any_tiny):
    chat, d, ids = any_tiny, _direction(any_tiny), _ids(any_tiny)
    unit = torch.from_numpy(d.unit().vectors.copy())
    plain, before = _outputs(chat, ids)
    component = plain[1] @ unit[1]
    low, high = component.quantile(0.3).item(), component.quantile(0.6).item()
    with cap(chat, d, (low, high), layers=1):
        capped, _ = _outputs(chat, ids)
    expected = plain[1] - (component - component.clamp(low, high))[..., None] * unit[1]
    assert torch.allclose(capped[1], expected, atol=1e-4)
    assert torch.equal(capped[0], plain[0])
    with cap(chat, d, (-np.inf, np.inf)):
        _, open_ended = _outputs(chat, ids)
    assert torch.allclose(open_ended, before, atol=1e-5)
    _, after = _outputs(chat, ids)
    assert torch.equal(before, after)


def test_each_row_may_have_its_own_bounds(tiny):
    chat = tiny("qwen2")
    directions, ids = [_direction(chat, seed) for seed in range(3)], _ids(chat, batch=1).repeat(3, 1)
    bounds = np.sort(np.random.default_rng(1).standard_normal((3, chat.n_layers, 2)), axis=-1)
    strengths = [1.0, 0.0, 0.5]
    with cap(chat, directions, bounds, layers=[1, 2], strength=strengths):
        _, together = _outputs(chat, ids)
    for row, (one, strength) in enumerate(zip(directions, strengths, strict=True)):
        with cap(chat, one, bounds[row], layers=[1, 2], strength=strength):
            _, alone = _outputs(chat, ids[:1])
        assert torch.allclose(together[row], alone[0], atol=2e-5)
    assert (together[0] - _outputs(chat, ids[:1])[1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("within", [(1.0, -1.0), (np.nan, 1.0), [1.0], "wide", np.zeros((3, 2)), None])
def test_bounds_that_bound_nothing_are_refused(tiny, within):
    chat = tiny("qwen2")
    with pytest.raises(EmmechError, match="cap the component"):
        cap(chat, _direction(chat), within)
    assert not live_edits(chat.base)


def test_a_cap_is_no_second_ablation_and_not_made_twice(tiny):
    chat = tiny("qwen2")
    d = _direction(chat)
    with cap(chat, d, (0.0, 1.0)), ablate(chat, d), pytest.raises(EmmechError, match="twice"):
        cap(chat, d, (0.0, 1.0), layers=2)
