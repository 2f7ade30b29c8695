"""The bridge shows the same model: logits, live adapter, and the user's own objects untouched."""

from __future__ import annotations

import pytest
import torch

from emmech.chat.model import load_model
from emmech.engine.adapters import adapter_layers
from emmech.errors import EmmechError
from emmech.interventions.weights import scale_adapters

pytest.importorskip("transformer_lens")

from emmech.interop.bridges import adapter_attribution, to_transformer_lens

IDS = torch.randint(20, 250, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [1] * 8])

# both tools count positions from the first real token, as generation does; in bfloat16 the count shows in rounding
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)


def _adapted(chat, layer=2):
    from peft import LoraConfig, get_peft_model

    modules = [f"model.layers.{layer}.mlp.down_proj"]
    model = get_peft_model(chat.model, LoraConfig(r=1, lora_alpha=4, target_modules=modules, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return load_model(model.eval(), chat.tokenizer)


def _gap(chat, bridge):
    with torch.no_grad():
        ours = chat.model(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS).logits
        theirs = bridge(IDS, attention_mask=MASK)
    return (ours - theirs)[MASK.bool()].abs().max().item()


def test_logits_are_equal_under_left_padding_and_the_adapter_stays_live(any_tiny):
    chat = _adapted(any_tiny)
    before = {key: value.clone() for key, value in chat.base.state_dict().items()}
    attention, modules = chat.config._attn_implementation, [type(m) for m in chat.base.modules()]
    tokenizer = dict(chat.tokenizer.init_kwargs)
    bridge = to_transformer_lens(chat)
    assert _gap(chat, bridge) < 1e-5
    with scale_adapters(chat, 3.0):
        assert _gap(chat, bridge) < 1e-5
    with torch.no_grad():
        next(iter(adapter_layers(chat.model)))[1].lora_B["default"].weight.mul_(-2)
    assert _gap(chat, bridge) < 1e-5
    with torch.no_grad():
        next(iter(adapter_layers(chat.model)))[1].lora_B["default"].weight.mul_(-0.5)
    after = chat.base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert chat.config._attn_implementation == attention
    assert [type(m) for m in chat.base.modules()] == modules
    assert chat.tokenizer.init_kwargs == tokenizer
    ours = {p.data_ptr() for p in chat.base.parameters()}
    assert {p.data_ptr() for p in bridge.parameters()} <= ours  # no second copy of the weights


def test_bfloat16_is_equal_with_the_same_attention(tiny):
    # sdpa and eager attention differ by bfloat16 rounding; TransformerLens is eager
    chat = tiny("qwen2", attention="eager")
    chat.base.to(torch.bfloat16)
    assert _gap(chat, to_transformer_lens(chat)) < 1e-5


def test_attribution_of_the_adapters_write(tiny):
    chat = _adapted(tiny("qwen2"), layer=1)
    bridge = to_transformer_lens(chat)
    targets, against = 30, 31
    found = adapter_attribution(bridge, IDS, 1, targets=targets, against=against)

    def gap():
        with torch.no_grad():
            logits = chat.model(input_ids=IDS).logits[:, -1]
        return logits[:, targets] - logits[:, against]

    tuned = gap()
    with scale_adapters(chat, 0.0):
        base = gap()
    assert torch.allclose(found["total"], tuned - base, atol=1e-5)
    # by hand: the write at the last position, through the frozen final norm
    kept = {}
    info, layer, name = next(iter(adapter_layers(chat.model)))
    hooks = [
        layer.register_forward_pre_hook(lambda m, x: kept.__setitem__("x", x[0])),
        chat.final_norm.register_forward_pre_hook(lambda m, x: kept.__setitem__("h", x[0])),
    ]
    gap()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        write = info.scaling * (kept["x"][:, -1] @ layer.lora_A[name].weight.T) @ layer.lora_B[name].weight.T
        rms = (kept["h"][:, -1].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rows = chat.unembedding.weight
        direct = (write / rms * chat.final_norm.weight) @ (rows[targets] - rows[against])
    assert torch.allclose(found["direct"], direct, atol=1e-5)
    assert torch.allclose(found["direct"] + found["indirect"], found["total"])
    with pytest.raises(EmmechError, match="no LoRA pair"):
        adapter_attribution(bridge, IDS, 0, targets=30, against=31)
    for wrong in ({"step": 3}, {"scale": 2.0}):  # neither is silently left out
        with pytest.raises(EmmechError, match="only a recorded run"):
            to_transformer_lens(chat, **wrong)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "granite"])
def test_a_write_that_is_not_added_as_it_is_has_a_total_effect_only(tiny, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny("qwen2").tokenizer
    shape = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    shape |= {"residual_multiplier": 0.5} if kind == "granite" else {"head_dim": 12, "query_pre_attn_scalar": 12}
    name = "gemma3_text" if kind == "gemma3" else kind
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape), attn_implementation="eager").eval()
    chat = _adapted(load_model(model, tokenizer), layer=1)
    with pytest.warns(UserWarning, match="no direct part"):
        found = adapter_attribution(to_transformer_lens(chat), IDS, 1, targets=30, against=31)

    def gap():
        with torch.no_grad():
            logits = chat.model(input_ids=IDS).logits[:, -1]
        return logits[:, 30] - logits[:, 31]

    tuned = gap()
    with scale_adapters(chat, 0.0):
        base = gap()
    assert torch.allclose(found["total"], tuned - base, atol=1e-5) and found["total"].abs().max() > 1e-4
    assert found["direct"].isnan().all() and found["indirect"].isnan().all()


def test_live_steering_is_not_copied_into_the_bridge(tiny):
    import numpy as np

    from emmech.interventions.residual import steer

    chat = tiny("qwen2")
    with torch.no_grad():
        plain = chat.model(input_ids=IDS).logits
    with steer(chat, np.ones(48), 3.0, layer=1):
        bridge = to_transformer_lens(chat)
    with torch.no_grad():
        assert torch.allclose(bridge(IDS), plain, atol=1e-5)
