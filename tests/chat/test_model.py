"""One place knows the anatomy, for four families."""

from __future__ import annotations

import copy

import pytest
import torch

import emmech
from emmech.chat.model import Anatomy, load_model
from emmech.errors import EmmechError


def test_anatomy_of_every_family(any_tiny):
    chat = any_tiny
    assert (chat.n_layers, chat.d_model, chat.d_mlp) == (4, 48, 80)
    assert tuple(chat.down_proj(2).weight.shape) == (48, 80)
    assert chat.unembedding.weight.shape[0] == len(chat.tokenizer)
    ids = torch.tensor([chat.token_ids([{"role": "user", "content": "the user"}])])
    hidden = chat.trunk(input_ids=ids).last_hidden_state
    assert torch.allclose(chat.unembedding(hidden), chat.model(input_ids=ids).logits, atol=1e-6)


def test_block_output_is_a_tensor_of_the_whole_batch(any_tiny):
    """Reading ``output[0]`` off a block would silently be row 0 of the batch."""
    seen = []
    handle = any_tiny.block(1).register_forward_hook(lambda m, i, o: seen.append(o))
    ids = torch.arange(12).reshape(3, 4)
    any_tiny.model(input_ids=ids)
    handle.remove()
    assert isinstance(seen[0], torch.Tensor) and seen[0].shape == (3, 4, 48)


def test_stop_ids_hold_the_end_of_turn(any_tiny):
    turn = {
        "qwen2": "<|im_end|>",
        "qwen3": "<|im_end|>",
        "llama": "<|eot_id|>",
        "gemma3_text": "<end_of_turn>",
    }
    expected = any_tiny.tokenizer.convert_tokens_to_ids(turn[any_tiny.config.model_type])
    assert expected in any_tiny.stop_ids and any_tiny.tokenizer.eos_token_id in any_tiny.stop_ids


def test_a_model_in_memory_is_used_not_copied(tiny):
    chat = tiny("qwen2")
    again = load_model(chat.model, chat.tokenizer)
    assert again.model is chat.model
    assert load_model(chat) is chat


def test_fingerprint_ignores_adapters_and_dtype_but_not_weights(tiny):
    from peft import LoraConfig, get_peft_model

    chat = tiny("qwen2")
    before = chat.fingerprint()
    assert load_model(copy.deepcopy(chat.model).to(torch.bfloat16), chat.tokenizer).fingerprint() == before
    peft_model = get_peft_model(copy.deepcopy(chat.model), LoraConfig(r=1, target_modules=["down_proj"]))
    assert load_model(peft_model, chat.tokenizer).fingerprint() == before
    assert tiny("qwen2", seed=1).fingerprint() != before
    assert tiny("llama").fingerprint() != before


def test_from_a_folder(tiny, tmp_path):
    chat = tiny("llama")
    chat.model.save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.fingerprint() == chat.fingerprint()
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("layer", [4, -1, 1.0, True])
def test_a_layer_that_is_not_there(tiny, layer):
    with pytest.raises(EmmechError, match=r"4 layers, numbered 0 to 3"):
        tiny("qwen2").block(layer)


def test_an_unknown_name_says_what_is_near():
    with pytest.raises(EmmechError, match="did you mean 'smollm2-135m'"):
        load_model("smolm2-135m")


def test_an_unknown_architecture_names_the_override():
    import transformers

    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(EmmechError, match=r"anatomy=emmech\.chat\.Anatomy"):
        load_model(model, object())
    parts = Anatomy(trunk="transformer", blocks="h", down_proj="mlp.c_proj", final_norm="ln_f")
    assert load_model(model, object(), anatomy=parts).n_layers == 2
    with pytest.raises(EmmechError, match="no such part"):
        load_model(model, object(), anatomy=Anatomy(trunk="transformer"))


def test_no_tokenizer(tiny):
    with pytest.raises(EmmechError, match=r"load_model\(model, tokenizer\)"):
        load_model(tiny("qwen2").model)


def test_not_a_model():
    with pytest.raises(EmmechError, match="neither a name, a folder nor a model"):
        emmech.load_model(7)


def test_the_real_model_answers(smollm2):
    ids = smollm2.token_ids([{"role": "user", "content": "What is the capital of France?"}])
    out = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(out[0, len(ids) :])
    assert int(out[0, -1]) in smollm2.stop_ids
