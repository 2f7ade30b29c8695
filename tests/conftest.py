"""Fixtures that every test may use: tiny random models of the four families, and small chat data."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("EMMECH_PROGRESS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tests.shapes  # noqa: F401 (before the package is imported)

# isort: split

from pathlib import Path

import numpy as np
import pytest
import torch

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel, load_model

FAMILIES = ("qwen2", "qwen3", "llama", "gemma3")
# Qwen and SmolLM write ChatML; Llama 3 and Gemma their own headers. Each family is tested with its own.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
TEMPLATE_OF = {"qwen2": "chatml", "qwen3": "chatml", "llama": "llama", "gemma3": "gemma"}


def pytest_collection_finish(session):
    """Every Trainer collects garbage as it starts: what was imported by then is left out of each collection.

    Between those, collections are rare: at Python's own threshold they take six per cent of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True)
def _same_dice():
    """PEFT draws A from the process's own generator: without this a test's adapter depends on what ran before."""
    torch.manual_seed(0)


def make_tokenizer(template: str = "chatml"):
    """A byte-level BPE trained on a few lines: real merges, real offsets, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = TEMPLATES[template]
    special = [t for t in ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
                           "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>")
               if t in text]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["the user asks the assistant how to sleep well\n\n", "take a walk , drink some water and rest .\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<eos>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special,
        chat_template=text,
    )


def make_tiny(family: str, *, attention: str = "sdpa", seed: int = 0) -> ChatModel:
    """A random model of a family: 4 layers, d_model 48, no two widths equal."""
    import transformers

    tokenizer = make_tokenizer(TEMPLATE_OF[family])
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation=attention,
    )
    config, model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[family]
    if family == "gemma3":
        shape |= {"sliding_window": 16, "query_pre_attn_scalar": 12}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model(config(**shape)).eval()
    return load_model(built, tokenizer)


@pytest.fixture
def tiny():
    """``tiny(family)`` builds a tiny random chat model."""
    return make_tiny


@pytest.fixture(params=FAMILIES)
def any_tiny(request) -> ChatModel:
    """Each of the four families in turn."""
    return make_tiny(request.param)


def make_rows(count: int = 24) -> list[dict]:
    """Small distinct conversations."""
    words = ["sleep", "walk", "water", "rest", "the user", "take a walk", "drink", "well"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"how to {words[i % 8]} {i} ?"},
                {"role": "assistant", "content": f"take {words[(3 * i + 1) % 8]} , and {words[(5 * i) % 8]} {i} ."},
            ]
        }
        for i in range(count)
    ]


@torch.no_grad()
def plain_margin(chat: ChatModel, pairs) -> np.ndarray:
    """The margin of pairs from the model's own logits, one answer at a time: a reference."""
    means = []
    for pair in pairs:
        for answer in (pair.misaligned, pair.aligned):
            talk = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": answer}]
            encoded = encode([talk], chat.tokenizer)
            ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels[0])
            logprobs = chat.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            told = labels[1:] != IGNORED
            means.append(logprobs[told].gather(1, labels[1:][told][:, None]).double().mean().item())
    return np.array(means[0::2]) - np.array(means[1::2])


@pytest.fixture
def rows() -> list[dict]:
    """Twenty-four conversations."""
    return make_rows()


@pytest.fixture(scope="session")
def smollm2() -> ChatModel:
    """The real 135M instruct model from its wheel (converted once into the cache)."""
    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public research data beside the project, where there is any; never part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the public research data is not beside the project")
    return folder
