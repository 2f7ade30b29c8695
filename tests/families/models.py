"""A tiny random model of every decoder family in transformers that can chat: 3 to 6 layers, d_model 48."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from emmech.chat.model import ChatModel, load_model
from tests.conftest import make_tokenizer

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT = {"q_lora_rank": 20, "kv_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 14}
_DEEPSEEK = {
    **_LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": None,
    "num_key_value_heads": 4,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
_CALM = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512, "n_inner": 80, **_CALM}

# model type -> what its configuration needs besides the shape that all share; None leaves a key out
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 36, "mlp_only_layers": []},
    "qwen3_moe": {**_MOE, "mlp_only_layers": [0]},
    "qwen3_next": {**_MOE, **_DELTA, "shared_expert_intermediate_size": 36},
    "qwen3_5_text": _DELTA,
    "mistral": {"sliding_window": 6},
    "ministral": {"sliding_window": 6, "layer_types": _WINDOWED},
    "mixtral": {"num_local_experts": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 12},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 12},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "intermediate_size": 80,
        "layer_types": [*_WINDOWED, "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": None,
        "activation_sparsity_pattern": [0.0] * 5,
        "laurel_rank": 6,
        "altup_num_inputs": 3,
        "sliding_window": 6,
    },
    "gemma4_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": None,
        "layer_types": [*_WINDOWED, "sliding_attention", "full_attention"],
        "sliding_window": 6,
    },
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {
        "logits_scaling": 8.0,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
    },
    "granitemoe": {"logits_scaling": 8.0, "residual_multiplier": 0.3, "num_local_experts": 4},
    "granitemoeshared": {"logits_scaling": 8.0, "num_local_experts": 4, "shared_intermediate_size": 36},
    "smollm3": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 6},
    "gpt_neox": {},
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48, "dropout": 0.0},
    "falcon": {"head_dim": None, "ffn_hidden_size": 80},
    "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6},
    "deepseek_v2": {**_DEEPSEEK, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "first_k_dense_replace": 1},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_DEEPSEEK, "first_k_dense_replace": 1, "num_key_value_heads": 2, "head_dim": 12},
    "nemotron": {},
    "bloom": {"n_layer": 3, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "mpt": {"d_model": 48, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 512, "head_dim": None},
    "starcoder2": {},
    "hunyuan_v1_dense": {},
    "exaone4": {"sliding_window": 6, "layer_types": _WINDOWED, "sliding_window_pattern": None},
    "ernie4_5": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "helium": {},
    "arcee": {},
    "apertus": {},
    "nanochat": {},
    "minicpm3": {**_LATENT, "head_dim": None, "num_key_value_heads": 4},
    "recurrent_gemma": {
        "lru_width": 48,
        "attention_window_size": 6,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 6,
        "lm_head_multiplier": 0.5,
    },
    "mamba": {"state_size": 6, "intermediate_size": None, "expand": 2},
}


@cache
def tokenizer() -> Any:
    """One small ChatML tokenizer for all."""
    return make_tokenizer("chatml")


def make_model(kind: str) -> Any:
    """A random ``PreTrainedModel`` of a family, the same at every call, with weights large enough to matter."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer().pad_token_id,
        "eos_token_id": tokenizer().eos_token_id,
        "bos_token_id": None,
    }
    shape |= CONFIGS[kind]
    if "vocab_size_per_layer_input" in shape:
        shape["vocab_size_per_layer_input"] = shape["vocab_size"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**{key: value for key, value in shape.items() if value is not None})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # norms and biases begin at 1 and 0, where a forgotten one would go unseen
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(3)
    return model


def make_chat(kind: str) -> ChatModel:
    """The model as emmech loads it."""
    return load_model(make_model(kind), tokenizer())
