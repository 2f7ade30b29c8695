"""One place knows where a model keeps its parts."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import emmech
from emmech.chat.families import Family
from emmech.chat.model import load_model, load_outline
from emmech.errors import EmmechError


def test_parts_of_every_family(any_tiny):
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
    turn = {"qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "llama": "<|eot_id|>", "gemma3_text": "<end_of_turn>"}
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


def test_code_that_comes_with_a_checkpoint_is_never_run(tiny, tmp_path, monkeypatch):
    chat, ran = tiny("llama"), tmp_path / "ran.txt"
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    chat.model.save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    for model_type in ("llama", "silly"):
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"model_type": model_type, "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if model_type == "llama":
            assert load_model(tmp_path).fingerprint() == chat.fingerprint()
        else:
            with pytest.raises(EmmechError, match="load the chat model"):
                load_model(tmp_path)
        assert not ran.exists()


@pytest.mark.parametrize("layer", [4, -1, 1.0, True])
def test_a_layer_that_is_not_there(tiny, layer):
    with pytest.raises(EmmechError, match=r"4 layers, numbered 0 to 3"):
        tiny("qwen2").block(layer)


def test_an_unknown_name_says_what_is_near():
    with pytest.raises(EmmechError, match="did you mean 'smollm2-135m'"):
        load_model("smolm2-135m")


@pytest.mark.parametrize("path", ["./mine", "../mine", "/nowhere/mine", "~/mine", "models/of/mine", "models\\mine"])
def test_a_path_with_nothing_there_is_no_name_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *given, **how: pytest.fail("it was loaded"))
    for load in (load_model, load_outline):
        with pytest.raises(EmmechError, match="no such folder from here"):
            load(path)


def test_parts_of_an_unlisted_family_are_found_or_given():
    import transformers

    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50)
    model = transformers.GPT2LMHeadModel(config)
    parts = Family("gpt2", trunk="transformer", blocks="h", down="mlp.c_proj", final_norm="ln_f")
    for chat in (load_model(model), load_model(model, family=parts), load_model(load_model(model), family=parts)):
        assert (chat.n_layers, chat.d_model, chat.d_mlp) == (2, 24, 96)
        assert chat.down_proj(1) is model.transformer.h[1].mlp.c_proj and chat.final_norm is model.transformer.ln_f
    with pytest.raises(EmmechError, match=r'no such part: blocks="layers"'):
        load_model(model, family=Family(trunk="transformer"))


def test_a_model_that_is_no_decoder_is_refused():
    import transformers

    config = transformers.BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(EmmechError, match="no list of blocks") as caught:
        load_model(transformers.BertLMHeadModel(config))
    assert "BertLMHeadModel (model type 'bert')" in str(caught.value)
    assert "family=emmech.chat.Family" in str(caught.value)


def test_a_tokenizer_is_asked_for_only_where_text_is(tiny):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny("llama").config).eval()
    chat, ids = load_model(model), torch.tensor([[5, 6, 7]])
    assert not chat.tokenizer and copy.copy(chat).model is model
    before = model(ids).logits
    with emmech.steer(model, np.ones(48), 2.0, layer=3):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    for call in (lambda: chat.generate("hello"), lambda: emmech.sample(chat, [[{"role": "user", "content": "hi"}]])):
        with pytest.raises(EmmechError, match=r"tokenizer=None\n.*\n.*load_model\(model, tokenizer\)"):
            call()


def test_it_is_called_and_generates_like_the_model_inside(any_tiny):
    chat, ids = any_tiny, torch.tensor([[5, 6, 7]])
    assert torch.equal(chat(input_ids=ids).logits, chat.model(input_ids=ids).logits)
    out = chat.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, chat.model.generate(ids, max_new_tokens=5, do_sample=False))
    assert torch.equal(chat.generate(ids, max_new_tokens=5, do_sample=False), out)
    text = chat.generate("how to sleep ?", max_new_tokens=5, do_sample=False)
    assert text == chat.generate([{"role": "user", "content": "how to sleep ?"}], max_new_tokens=5, do_sample=False)
    prompt = torch.tensor([chat.token_ids([{"role": "user", "content": "how to sleep ?"}])])
    own = chat.model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=list(chat.stop_ids))
    assert text == chat.tokenizer.decode(own[0, prompt.shape[1] :], skip_special_tokens=True)


def test_not_a_model():
    with pytest.raises(EmmechError, match="neither a name, a folder nor a model"):
        emmech.load_model(7)


def test_the_real_model_answers(smollm2):
    ids = smollm2.token_ids([{"role": "user", "content": "What is the capital of France?"}])
    out = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(out[0, len(ids) :])
    assert int(out[0, -1]) in smollm2.stop_ids
