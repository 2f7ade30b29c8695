from __future__ import annotations

import pytest
import torch

from emmech.chat.model import load_model
from emmech.engine.adapters import adapter_layers
from emmech.interventions.weights import scale_adapters

pytest.importorskip("nnsight")

from emmech.interop.bridges import to_nnsight

IDS = torch.randint(20, 250, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])

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


def _traced(view):
    with view.trace({"input_ids": IDS, "attention_mask": MASK}):
        logits = view.output.logits.save()
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_under_left_padding_and_the_adapter_stays_live(any_tiny, dtype):
    any_tiny.base.to(dtype)
    chat = _adapted(any_tiny)
    forwards = {type(m).forward for m in chat.base.modules()}
    own = [m.__dict__.get("forward") for m in chat.base.modules()]
    view = to_nnsight(chat)

    def gap():
        with torch.no_grad():
            ours = chat.model(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS).logits
            return (ours - _traced(view))[MASK.bool()].abs().max().item()

    assert gap() < 1e-5
    with scale_adapters(chat, 3.0):
        assert gap() < 1e-5
    assert [m.__dict__.get("forward") for m in chat.base.modules()] == own
    assert {type(m).forward for m in chat.base.modules()} == forwards
    assert {p.data_ptr() for p in view._module.parameters()} == {p.data_ptr() for p in chat.base.parameters()}


def test_the_adapters_scalar_is_read_in_a_trace(tiny):
    chat = _adapted(tiny("qwen2"))
    view = to_nnsight(chat)
    with view.trace({"input_ids": IDS, "attention_mask": MASK}):
        scalar = view.model.layers[2].mlp.down_proj.lora_A.default.output.save()
    kept = []
    layer = next(iter(adapter_layers(chat.model)))[1]
    hook = layer.lora_A["default"].register_forward_hook(lambda m, i, out: kept.append(out))
    with torch.no_grad():
        chat.model(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS)
    hook.remove()
    assert torch.allclose(scalar, kept[0], atol=1e-6)
