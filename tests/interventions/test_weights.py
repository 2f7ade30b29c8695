"""Adapter surgery and weight-space forms: what they do to weights and outputs, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.chat.model import load_model
from emmech.directions.direction import Direction
from emmech.directions.sources import adapter_direction
from emmech.engine.adapters import adapter_layers
from emmech.errors import EmmechError
from emmech.interventions.residual import ablate, steer
from emmech.interventions.weights import (
    fold_bias,
    orthogonalise_writes,
    project_adapter,
    rotate_adapter,
    scale_adapters,
    transplant_adapter,
)
from emmech.run.run import Run

IDS = torch.randint(20, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def _adapted(chat, layers=(1, 2), rank=1):
    from peft import LoraConfig, get_peft_model

    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
    config = LoraConfig(r=rank, lora_alpha=4, use_rslora=True, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(chat.model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return load_model(model, chat.tokenizer)


def _direction(chat, seed=0):
    return Direction(np.random.default_rng(seed).standard_normal((chat.n_layers, chat.d_model)), name="d")


def _logits(chat):
    with torch.no_grad():
        return chat.model(input_ids=IDS).logits


def _bs(chat):
    return {info.name: layer.lora_B[n].weight.detach().clone() for info, layer, n in adapter_layers(chat.model)}


def _state(chat):
    return {key: value.detach().clone() for key, value in chat.base.state_dict().items()}


def _same(chat, before):
    after = chat.base.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("rank", [1, 3])
def test_projection_and_rotation_do_what_they_say_to_b(tiny, rank):
    chat = _adapted(tiny("qwen2"), rank=rank)
    d, before, state = _direction(chat), _bs(chat), _state(chat)
    plain = _logits(chat)

    def unit(name):
        return torch.from_numpy(d.unit().at(int(name.split(".")[1])).copy())

    with project_adapter(chat, d):
        for name, b in _bs(chat).items():
            assert (unit(name) @ b).abs().max() < 1e-6
        assert not torch.equal(_logits(chat), plain)
    with project_adapter(chat, d, renormalise=True, adapters=2):
        now = _bs(chat)
        changed = now["layers.2.mlp.down_proj"]
        assert (unit("layers.2") @ changed).abs().max() < 1e-6
        assert torch.allclose(changed.norm(dim=0), before["layers.2.mlp.down_proj"].norm(dim=0), rtol=1e-5)
        assert torch.equal(now["layers.1.mlp.down_proj"], before["layers.1.mlp.down_proj"])
    for cosine in (1.0, 0.5, -1.0, 0.0):
        with rotate_adapter(chat, d, cosine=cosine):
            for name, b in _bs(chat).items():
                assert torch.allclose(b.norm(dim=0), before[name].norm(dim=0), rtol=1e-5)
                assert torch.allclose((unit(name) @ b) / b.norm(dim=0), torch.full((rank,), cosine), atol=1e-5)
    assert _same(chat, state) and torch.equal(_logits(chat), plain)


def test_scaling_subsets_is_additive_where_the_adapters_do_not_meet(tiny):
    chat = _adapted(tiny("qwen2"), layers=(1, 3))
    plain = _logits(chat)
    with chat.model.disable_adapter():
        base = _logits(chat)
    with scale_adapters(chat, 0.0):
        assert torch.allclose(_logits(chat), base, atol=1e-6)
    with scale_adapters(chat, 0.0, adapters=[1]), scale_adapters(chat, 0.0, adapters="layers.3.mlp.down_proj"):
        assert torch.allclose(_logits(chat), base, atol=1e-6)
    with scale_adapters(chat, 2.0), scale_adapters(chat, 0.5):
        assert torch.allclose(_logits(chat), plain, atol=1e-6)
    with scale_adapters(chat, {"layers.1.mlp.down_proj": 3.0}):
        assert not torch.allclose(_logits(chat), plain, atol=1e-3)
    assert torch.equal(_logits(chat), plain)


def test_transplanting_takes_the_other_steps_side(tiny):
    chat = _adapted(tiny("qwen2"), layers=(1,))
    name = "layers.1.mlp.down_proj"
    rng = np.random.default_rng(0)
    run = Run.from_arrays(
        [0, 5], A=rng.standard_normal((2, 80)).astype(np.float32), B=rng.standard_normal((2, 48)).astype(np.float32)
    )
    run.manifest["adapters"] = [info.to_dict() for info, _, _ in adapter_layers(chat.model)]
    for series in ("A", "B"):
        run._trajectory._arrays[f"{series}/{name}"] = run._trajectory._arrays.pop(next(
            key for key in run._trajectory.keys if key.startswith(series)))  # fmt: skip
    before = _state(chat)
    with transplant_adapter(chat, run, 5):
        assert torch.equal(_bs(chat)[name][:, 0], torch.from_numpy(run.B()[1]))
        layer = next(iter(adapter_layers(chat.model)))[1]
        assert torch.equal(layer.lora_A["default"].weight, before[next(k for k in before if "lora_A" in k)])
    assert _same(chat, before)
    with pytest.raises(EmmechError, match="nearest recorded"):
        transplant_adapter(chat, run, 3)
    for one in run.manifest["adapters"]:
        one["scaling"] /= 4
    run.__dict__.pop("adapters", None)
    with scale_adapters(chat, 0.0), transplant_adapter(chat, run, 5):  # it writes what it wrote in its run
        assert torch.equal(4 * _bs(chat)[name][:, 0], torch.from_numpy(run.B()[1]))
    assert _same(chat, before)
    run.manifest["model"] = {"name": "other", "fingerprint": "a" * 64}
    with pytest.raises(EmmechError, match="was trained on other"):
        transplant_adapter(chat, run, 5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_folded_bias_is_steering(tiny, family):
    chat = tiny(family)
    d, state, plain = _direction(chat), _state(chat), _logits(chat)
    with steer(chat, d, 1.5, layer=2):
        steered = _logits(chat)
    with fold_bias(chat, d, 1.5, layer=2):
        assert torch.allclose(_logits(chat), steered, atol=1e-5)
    assert _same(chat, state) and torch.equal(_logits(chat), plain)


def test_orthogonal_writes_leave_no_component_anywhere(tiny):
    chat = _adapted(tiny("qwen2"))
    chat.base.config.tie_word_embeddings = True
    chat.unembedding.weight = chat.base.get_input_embeddings().weight
    d, state, plain = _direction(chat), _state(chat), _logits(chat)
    unit = torch.from_numpy(d.unit().at(2).copy())
    seen = []
    hooks = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        for block in chat.blocks
    ]
    hooks += [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in chat.blocks]
    with orthogonalise_writes(chat, d, from_layer=2):
        _logits(chat)
        assert len(seen) == 8 and max(float((x @ unit).abs().max()) for x in seen) < 1e-5
        assert chat.unembedding.weight is not chat.base.get_input_embeddings().weight
    for hook in hooks:
        hook.remove()
    assert chat.unembedding.weight is chat.base.get_input_embeddings().weight
    assert _same(chat, state) and torch.equal(_logits(chat), plain)


def test_ablating_b_in_its_own_rank_one_organism_cancels_the_adapter(tiny):
    """The degenerate control: on the last block the logits are those of the identically ablated base, exactly."""
    chat = _adapted(tiny("qwen2"), layers=(3,))
    b = adapter_direction(chat)
    with ablate(chat, b, layers=3):
        tuned = _logits(chat)
        with chat.model.disable_adapter():
            base = _logits(chat)
    assert torch.allclose(tuned, base, atol=1e-5)
    with pytest.raises(EmmechError, match="taking the adapter off"):
        project_adapter(chat, b, renormalise=True)


def test_what_cannot_be_done_is_refused_and_leaves_no_trace(tiny):
    chat, gemma = _adapted(tiny("qwen2")), tiny("gemma3")
    state = _state(chat)
    cases = [
        (lambda: scale_adapters(tiny("llama"), 2.0), "no adapter is live"),
        (lambda: scale_adapters(chat, float("nan")), "finite"),
        (lambda: scale_adapters(chat, 2.0, adapters=7), "layers [1, 2]"),
        (lambda: scale_adapters(chat, 2.0, adapters="layers.1.mlp.down"), "did you mean"),
        (lambda: scale_adapters(chat, {2: 0.0}), "2 names no adapter"),
        (lambda: scale_adapters(chat, {"layers.1.mlp.down": 0.0}), "did you mean 'layers.1.mlp.down_proj'"),
        (lambda: scale_adapters(chat, {}), "no factor"),
        (lambda: scale_adapters(chat, {"layers.1.mlp.down_proj": 0.0}, adapters=2), "choose the adapters already"),
        (lambda: fold_bias(chat, _direction(chat), float("nan"), layer=1), "finite number"),
        (lambda: fold_bias(chat, _direction(chat), [1, 2], layer=1), "finite number"),
        (lambda: rotate_adapter(chat, _direction(chat), cosine=2.0), "between -1 and 1"),
        (lambda: rotate_adapter(chat, adapter_direction(chat), cosine=0.5), "no plane"),
        (lambda: project_adapter(chat, Direction.single(np.ones(48), 1, 4)), "zero there"),
        (lambda: fold_bias(gemma, _direction(gemma), layer=1), "a norm is between"),
        (lambda: orthogonalise_writes(gemma, _direction(gemma), from_layer=1), "a norm is between"),
        (lambda: orthogonalise_writes(chat, _direction(chat)), "one is taken out"),
        (lambda: fold_bias(chat, [_direction(chat)] * 2, layer=1), "shared by all rows"),
        (lambda: orthogonalise_writes(chat, np.ones((2, 48))), "shared by all rows"),
    ]
    for make, says in cases:
        with pytest.raises(EmmechError) as caught:
            make()
        assert says in str(caught.value)
    assert _same(chat, state)


def test_weights_come_back_after_an_exception(tiny):
    chat = _adapted(tiny("qwen2"))
    state, plain = _state(chat), _logits(chat)
    with (
        pytest.raises(ZeroDivisionError),
        fold_bias(chat, _direction(chat), layer=2),
        orthogonalise_writes(chat, _direction(chat), from_layer=1),
        rotate_adapter(chat, _direction(chat)),
        scale_adapters(chat, 3.0),
    ):
        raise ZeroDivisionError
    assert _same(chat, state) and torch.equal(_logits(chat), plain)


def test_handles_may_be_removed_in_any_order(tiny):
    """A cell run again removes the first handle after the second was made: the weights must still come back."""
    chat = _adapted(tiny("qwen2"))
    state, plain = _state(chat), _logits(chat)
    scalings = [dict(layer.scaling) for _, layer, _ in adapter_layers(chat.model)]
    changes = (
        lambda seed: project_adapter(chat, _direction(chat, seed)),
        lambda seed: rotate_adapter(chat, _direction(chat, seed), cosine=0.5),
        lambda seed: scale_adapters(chat, 2.0 + seed),
        lambda seed: fold_bias(chat, _direction(chat, seed), layer=2),
        lambda seed: orthogonalise_writes(chat, _direction(chat, seed), from_layer=1),
    )
    for change in changes:
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
            handles = [change(seed) for seed in range(3)]
            last = _logits(chat)
            for index in order[:-1]:
                handles[index].remove()
                if index != 2 and 2 not in order[: order.index(index)]:
                    assert torch.equal(_logits(chat), last)  # the newest change stays as it was
            handles[order[-1]].remove()
            assert _same(chat, state) and torch.equal(_logits(chat), plain)
    mixed = [changes[i](i) for i in (0, 4, 2, 1, 3)]
    for index in (1, 3, 0, 4, 2):
        mixed[index].remove()
    assert _same(chat, state) and torch.equal(_logits(chat), plain)
    assert [dict(layer.scaling) for _, layer, _ in adapter_layers(chat.model)] == scalings
