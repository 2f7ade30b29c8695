"""Blocks with a backward written by hand: values and gradients of the model's own, and where they stand back."""

from __future__ import annotations

import pytest
import torch

from emmech.chat.model import load_model
from emmech.engine.fused import lean_blocks
from emmech.engine.fused_blocks import AnswerLoss
from emmech.engine.prefix import partial_trunk
from tests.conftest import make_tiny

EXACT = 5e-6  # what the project calls equal in float32; measured: 2.1e-6 on the worst of these

STEM, TOKENS = 11, 13  # together beyond pocket's sliding window of 8


def chat_of(name):
    chat = load_model("pocket") if name == "pocket" else make_tiny(name)
    chat.model.requires_grad_(False)
    return chat


@pytest.mark.parametrize("name", ["pocket", "qwen2", "llama"])
@pytest.mark.parametrize("stem", [0, STEM])
def test_values_and_gradients_are_the_models_own(name, stem):
    chat = chat_of(name)
    torch.manual_seed(0)
    before = torch.randn(2, STEM, chat.d_model)  # two stems, of which three rows follow the second, the first, ...
    rows, follows = torch.randn(3, TOKENS, chat.d_model), torch.tensor([1, 0, 1])
    read = torch.zeros(3, TOKENS, dtype=torch.bool)
    read[0, 4:9], read[1, 7:], read[2, [2, 5]] = True, True, True
    wanted = torch.randn(int(read.sum()), chat.d_model)

    def gradients(run):
        inputs = [before.clone().requires_grad_(), rows.clone().requires_grad_()]
        found = run(*inputs)
        (found * wanted).sum().backward()
        return found.detach(), *(x.grad for x in inputs)

    def lean(stems, own):
        blocks = lean_blocks(chat, 1)
        past = blocks.stem(stems) if stem else None
        return blocks(own, stem, read, past, follows)

    def plain(stems, own):
        whole = torch.cat([stems[follows], own], dim=1) if stem else own
        upper = partial_trunk(chat, 1, chat.n_layers)
        return upper(inputs_embeds=whole, use_cache=False).last_hidden_state[:, stem:][read]

    for mine, theirs in zip(gradients(lean), gradients(plain), strict=True):
        if theirs is not None:
            assert float((mine - theirs).norm() / theirs.norm()) < EXACT
        else:
            assert mine is None


def test_the_loss_is_cross_entropy():
    torch.manual_seed(1)
    unembedding, targets = torch.randn(50, 8), torch.randint(50, (7,))
    weights = torch.rand(7)
    mine, theirs = (torch.randn(7, 8, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "ab")
    first = AnswerLoss.apply(mine, unembedding, targets)
    second = torch.nn.functional.cross_entropy(theirs @ unembedding.T, targets, reduction="none")
    torch.testing.assert_close(first, second)
    (first * weights).sum().backward()
    (second * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_other_architectures_run_as_they_are(family):
    assert lean_blocks(chat_of(family), 1) is None


def test_other_dtypes_trained_weights_and_adapters_in_attention_run_as_they_are():
    chat = chat_of("qwen2")
    assert lean_blocks(chat, 1) is not None
    assert lean_blocks(chat, chat.n_layers) is None
    chat.block(3).self_attn.q_proj.requires_grad_(True)
    assert lean_blocks(chat, 1) is None
    chat.block(3).self_attn.q_proj.requires_grad_(False)
    chat.model.to(torch.bfloat16)
    assert lean_blocks(chat, 1) is None


@pytest.mark.parametrize("part", ["", "self_attn", "self_attn.q_proj", "mlp", "input_layernorm"])
def test_where_somebody_listens_the_modules_run(part):
    chat = chat_of("qwen2")
    module = chat.block(3).get_submodule(part)
    handle = module.register_forward_hook(lambda module, inputs, output: None)
    assert lean_blocks(chat, 1) is None
    handle.remove()
    assert lean_blocks(chat, 1) is not None
    handle = chat.final_norm.register_forward_hook(lambda module, inputs, output: None)
    assert lean_blocks(chat, 1) is None
    handle.remove()
