"""A PeftModel in memory: emmech's logits are its own, its A and B make the same model, or it is refused by name."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import _IN_MODULES as IN_MODULES
from emmech.chat.model import load_model
from emmech.engine.adapters import adapter_layers, attach, bare, located
from emmech.engine.logprobs import answer_logprobs
from emmech.errors import EmmechError
from emmech.run.run import FORMAT, Run
from emmech.store import MemorySeries
from tests.conftest import make_rows
from tests.run.test_importers import CASES, EQUAL, TARGETS, base

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
IDS = torch.arange(5, 45)[None]
# a live model's factor of 0 and its head are read as they are; in a folder they are refused
ACCEPTED_LIVE = [("lora_alpha", 0), ("target_modules", ["lm_head", "down_proj"])]


def rows():
    return encode([row["messages"] for row in make_rows(3)], base().tokenizer)


def trained(config, **options):
    """A model with an adapter of which every trained tensor is drawn at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base().model, config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def own_logprobs(model, encoded):
    """Mean log-probability of each answer by the model's own logits, one at a time."""
    means = []
    for ids, labels in zip(encoded.input_ids, map(torch.tensor, encoded.labels), strict=True):
        ids = torch.tensor([ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        told = labels[1:] != IGNORED
        means.append(logits[:-1].log_softmax(-1)[told].gather(1, labels[1:][told][:, None]).double().mean().item())
    return np.array(means)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def as_run(model):
    """A run of one step of what is live on a model."""
    pairs = list(adapter_layers(model))
    weights = {
        f"{side}/{info.name}": getattr(layer, f"lora_{side}")[name].weight.detach().numpy()
        for info, layer, name in pairs
        for side in "AB"
    }
    arrays = {key: value[None] for key, value in weights.items()}
    manifest = {"format": FORMAT, "kind": "lora", "adapters": [info.to_dict() for info, _, _ in pairs]}
    return Run(manifest, MemorySeries(np.array([0]), arrays), MemorySeries(np.empty(0, np.int64), {}), [])


def check_round_trip(model, folder):
    run, wanted = as_run(model), logits(model)
    assert (logits(run.model(0, base=base()).model) - wanted).abs().max() <= 1e-5
    again = PeftModel.from_pretrained(base().model, str(run.export_peft(0, folder))).eval()
    assert (logits(again) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(("field", "value", "more", "outcome"), CASES, ids=[f"{c[0]}={c[1]}" for c in CASES])
def test_a_field_of_a_live_configuration(field, value, more, outcome, tmp_path):
    try:
        model = trained(LoraConfig(**LORA | {field: value} | more))
    except ValueError as error:
        pytest.skip(f"PEFT refuses it here: {error}"[:80])
    if field == "layer_replication":  # PEFT's own model does not run: transformers knows no type of the new layers
        with pytest.raises(IndexError):
            logits(model)
    elif field == "alora_invocation_tokens":
        with pytest.raises(EmmechError, match=field):
            load_model(model, base().tokenizer)
    else:
        found = answer_logprobs(load_model(model, base().tokenizer), rows())
        assert np.abs(found - own_logprobs(model, rows())).max() <= 1e-5
    if outcome is EQUAL or (field, value) in ACCEPTED_LIVE:
        check_round_trip(model, tmp_path)
        return
    with pytest.raises(EmmechError, match=f"{field}|embed_tokens"):
        list(adapter_layers(model))
    with pytest.raises(EmmechError, match=f"{field}|embed_tokens|other adapters"):
        run = as_run(trained(LoraConfig(**LORA)))
        run.model(0, base=load_model(model, base().tokenizer))


# what a kind needs for so small a model
KINDS = {
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 20},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "C3A": {"block_size": 16},
    "WAVEFT": {"n_frequency": 64},
}


@pytest.mark.parametrize("kind", sorted(IN_MODULES - {"LORA"}))
def test_other_kinds_give_their_own_logits_and_are_no_pairs(kind):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, kind)]
    model = trained(config(task_type="CAUSAL_LM", target_modules=TARGETS, **KINDS.get(kind, {})))
    with torch.no_grad():
        assert (logits(model) - logits(base().model)).abs().max() > 1e-4
    found = answer_logprobs(load_model(model, base().tokenizer), rows())
    assert np.abs(found - own_logprobs(model, rows())).max() <= 1e-5
    with pytest.raises(EmmechError, match=f"peft_type='{kind}'"):
        list(adapter_layers(model))
    with pytest.raises(EmmechError, match=f"peft_type='{kind}'"):
        attach(load_model(model, base().tokenizer), as_run(trained(LoraConfig(**LORA))).adapters, {})


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "LILY"])
def test_kinds_that_act_outside_the_modules_are_refused(kind):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, kind)]
    more = {"target_modules": TARGETS} if kind == "LILY" else {}
    more |= {"num_virtual_tokens": 4} if "num_virtual_tokens" in {f.name for f in dataclasses.fields(config)} else {}
    with pytest.raises(EmmechError, match=f"of kind {kind}"):
        load_model(trained(config(task_type="CAUSAL_LM", **more)), base().tokenizer)


def several(model):
    model.add_adapter("second", LoraConfig(**LORA, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (several, "more than one LoRA pair"),
        (lambda model: model.add_adapter("second", LoraConfig(**LORA)), "more than one LoRA pair"),
        (lambda model: model.merge_adapter(), "merged into the weights"),
        (lambda model: model.base_model.disable_adapter_layers(), "switched off"),
    ],
)
def test_a_state_of_the_adapter_that_A_and_B_do_not_tell(change, said):
    model = trained(LoraConfig(**LORA))
    run = as_run(model)
    change(model)
    chat = load_model(model, base().tokenizer)
    assert np.abs(answer_logprobs(chat, rows()) - own_logprobs(model, rows())).max() <= 1e-5
    for use in (lambda: list(adapter_layers(model)), lambda: attach(chat, run.adapters, run.weights(0))):
        with pytest.raises(EmmechError, match=said):
            use()


def test_an_adapter_of_another_name_or_factor(tmp_path):
    model = trained(LoraConfig(**LORA), adapter_name="my-own")
    check_round_trip(model, tmp_path / "named")
    with torch.no_grad():
        for _, layer, name in adapter_layers(model):
            layer.set_scale(name, 3.0)
    check_round_trip(model, tmp_path / "scaled")


@pytest.mark.parametrize("more", [{"lora_alpha": 64}, {"r": 2}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_a_run_does_not_go_into_a_live_adapter_of_another_make(more):
    run = as_run(trained(LoraConfig(**LORA)))
    with pytest.raises(EmmechError, match="other modules, rank or scaling"):
        run.model(0, base=trained(LoraConfig(**LORA | more)))
    chat = load_model(trained(LoraConfig(**LORA)), base().tokenizer)
    assert run.model(0, 2.0, base=chat).model is chat.model
    assert (logits(run.model(0, base=chat).model) - logits(run.model(0, base=base()).model)).abs().max() <= 1e-6


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))])
def test_a_wrapped_model_is_the_model_inside(wrap):
    model = trained(LoraConfig(**LORA))
    chat = load_model(wrap(model), base().tokenizer)
    assert chat.model is model
    assert np.abs(answer_logprobs(chat, rows()) - own_logprobs(model, rows())).max() <= 1e-5


def test_wrappers_inside_the_model_do_not_change_places():
    run = as_run(trained(LoraConfig(**LORA)))
    model = base().model
    for layer in (1, 2):
        model.model.layers[layer] = torch.compile(model.model.layers[layer], backend="eager")
    chat = load_model(model, base().tokenizer)
    found = located(chat, run.adapters)
    assert [bare(info.module) for info in found] == [info.module for info in run.adapters]
    assert "model.layers.1._orig_mod.mlp.down_proj" in {info.module for info in found}
    attached = attach(chat, run.adapters, run.weights(0))
    assert (logits(attached.model) - logits(run.model(0, base=base()).model)).abs().max() <= 1e-5
