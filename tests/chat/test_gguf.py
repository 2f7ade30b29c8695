"""A GGUF file, and a model that transformers read from one, are chat models like any other."""

from __future__ import annotations

import json

import pytest
import torch

import emmech
from tests.conftest import make_rows, make_tiny

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(chat, path):
    """A tiny Qwen2 as llama.cpp keeps it, in float32."""
    import gguf

    config, tokenizer = chat.config, chat.tokenizer
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, value in chat.model.state_dict().items():
        if name not in _WHOLE:
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            module, _, kind = part.rpartition(".")
            name = f"blk.{layer}.{_PARTS[module]}.{kind}"
        writer.add_tensor(_WHOLE.get(name, name), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny chat model, and the GGUF file that holds it."""
    pytest.importorskip("gguf")
    chat, path = make_tiny("qwen2"), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(chat, path)
    return chat, path


def test_a_file_is_loaded(written):
    chat, path = written
    loaded = emmech.load_model(path)
    talk = [{"role": "user", "content": "how to sleep ?"}]
    assert loaded.token_ids(talk) == chat.token_ids(talk)
    ids = torch.tensor([chat.token_ids(talk)])
    assert torch.equal(loaded(ids).logits, chat(ids).logits)
    assert (loaded.dtype, loaded.stop_ids) == (torch.float32, chat.stop_ids)


def test_a_model_that_transformers_read_from_it_is_fine_tuned_and_saved(written, tmp_path):
    from transformers import AutoModelForCausalLM

    chat, path = written
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    loaded = emmech.load_model(model, chat.tokenizer)
    runs = [
        emmech.finetune(one, make_rows(8), max_steps=1, layers=[2], out=tmp_path / name, progress=False)
        for name, one in (("plain", chat), ("gguf", loaded))
    ]
    weights = [run.weights(1) for run in runs]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(torch.from_numpy(value), torch.from_numpy(weights[1][key]))
    model.save_pretrained(tmp_path / "saved")
    chat.tokenizer.save_pretrained(tmp_path / "saved")
    assert emmech.load_model(tmp_path / "saved").fingerprint() == chat.fingerprint()
