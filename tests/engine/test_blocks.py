"""Some of a decoder's blocks by themselves: values and gradients of the model's own, written out or by its modules."""

from __future__ import annotations

import pytest
import torch

from emmech.chat.model import load_model
from emmech.engine.adapters import RowAdapter, VariantWeights
from emmech.engine.attention import Cache
from emmech.engine.blocks import Blocks, Places
from emmech.engine.logprobs import target_logprobs, unembed
from emmech.engine.modules import hooked
from emmech.engine.packing import Reading, stack, tree, tree_mask
from tests.conftest import FAMILIES, make_tiny

EXACT = 1e-5  # what the project calls equal in float32; the worst of these is 2.1e-6 or 5.3e-6, by processor

STEM, TOKENS = 11, 13  # together beyond pocket's sliding window of 8, and Gemma's of 16


def chat_of(name):
    chat = load_model("pocket") if name == "pocket" else make_tiny(name)
    chat.model.requires_grad_(False)
    return chat


def by_modules(blocks):
    """The same blocks, by the model's own modules."""
    blocks.written = False
    return blocks


def off(mine, theirs):
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("name", ["pocket", *FAMILIES])
@pytest.mark.parametrize("stem", [0, STEM])
def test_values_and_gradients_are_the_models_own(name, stem, written):
    chat = chat_of(name)
    torch.manual_seed(0)
    before = torch.randn(2, STEM, chat.d_model)  # two stems, of which three rows follow the second, the first, ...
    rows, follows = torch.randn(3, TOKENS, chat.d_model), torch.tensor([1, 0, 1])
    read = torch.zeros(3, TOKENS, dtype=torch.bool)
    read[0, 4:9], read[1, 7:], read[2, [2, 5]] = True, True, True
    wanted = torch.randn(int(read.sum()), chat.d_model)
    upper = Blocks(chat, 1)
    assert upper.written
    upper.written = written

    def gradients(run):
        inputs = [before.clone().requires_grad_(), rows.clone().requires_grad_()]
        found = run(*inputs)
        (found * wanted).sum().backward()
        return found.detach(), *(x.grad for x in inputs)

    def mine(stems, own):
        past = upper.stem(stems) if stem else None
        return upper(own, Places(reads=read.flatten().nonzero()[:, 0], stems=past, of_stem=follows))

    def plain(stems, own):
        hidden = torch.cat([stems[follows], own], dim=1) if stem else own
        for layer in range(1, chat.n_layers):  # block by block, as the model's own forward does
            kept = []
            with hooked((chat.block(layer), lambda module, inputs, out: kept.append(out))):  # noqa: B023
                skip = hooked(*((chat.block(i), lambda m, i, out, h=hidden: h) for i in range(layer)))
                with skip:
                    chat.trunk(inputs_embeds=hidden, use_cache=False)
            hidden = kept[0]
        return chat.final_norm(hidden)[:, stem:][read]

    for one, other in zip(gradients(mine), gradients(plain), strict=True):
        if other is not None:
            assert off(one, other) < EXACT
        else:
            assert one is None


@pytest.mark.parametrize("name", ["pocket", *FAMILIES])
def test_a_tree_with_adapters_gives_the_same_either_way(name):
    chat = chat_of(name)
    generator = torch.Generator().manual_seed(0)
    start = tuple(range(5, 25))
    packs = [
        tree([Reading((*start, *range(30 + i, 41 + 3 * i)), (20, 25)) for i in range(n)], range(n)) for n in (4, 7)
    ]
    ids, positions = stack(packs, chat.device)
    mask = tree_mask(packs, chat.dtype, chat.device)
    window = getattr(chat.config, "sliding_window", None)
    if window:
        mask = {"full_attention": mask, "sliding_attention": tree_mask(packs, chat.dtype, chat.device, window=window)}
    rows, edits = VariantWeights(), {}
    for layer, path in ((1, "self_attn.q_proj"), (2, "mlp.down_proj"), (chat.n_layers - 1, "mlp.up_proj")):
        d_out, d_in = chat.block(layer).get_submodule(path).weight.shape
        rows.A[path] = torch.randn(2, d_in, 3, generator=generator) / d_in**0.5
        rows.B[path] = torch.randn(2, 3, d_out, generator=generator) * 0.1
        edits[f"{layer}.{path}"] = lambda module, path=path: RowAdapter(module, rows, path)
    reads = torch.tensor([3, 9, 20, ids.shape[1] + 1, ids.shape[1] + 30])
    found = []
    for blocks in (Blocks(chat, edits=edits), by_modules(Blocks(chat, edits=edits))):
        cache = Cache()
        with torch.no_grad():
            found.append((blocks(ids, Places(positions, mask, reads), cache), cache))
            assert off(blocks(ids, Places(positions, mask)).flatten(0, 1)[reads], found[-1][0]) < EXACT
    (mine, kept), (theirs, own) = found
    assert mine.shape == (5, chat.d_model) and off(mine, theirs) < EXACT
    for layer in range(chat.n_layers):
        for one, other in zip(kept.layers[layer], own.layers[layer], strict=True):
            assert off(one, other) < EXACT


def test_log_probabilities_are_cross_entropy_with_and_without_gradients(monkeypatch):
    monkeypatch.setattr("emmech.engine.logprobs.WORDS", 100)
    chat = chat_of("qwen2")
    torch.manual_seed(1)
    hidden, targets = torch.randn(7, chat.d_model), torch.randint(chat.config.vocab_size, (7,))
    wanted = -torch.nn.functional.cross_entropy(unembed(chat, hidden), targets, reduction="none")
    torch.testing.assert_close(target_logprobs(chat, hidden, targets[:, None])[:, 0], wanted)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weights = torch.rand(7)
    (target_logprobs(chat, mine, targets[:, None])[:, 0] * weights).sum().backward()
    (unembed(chat, theirs).log_softmax(-1)[torch.arange(7), targets] * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("part", ["", "self_attn", "mlp"])
def test_where_a_block_has_hooks_the_modules_run(part):
    chat = chat_of("qwen2")
    heard = []
    with hooked((chat.block(3).get_submodule(part), lambda module, inputs, output: heard.append(1))):
        assert not Blocks(chat, 1).written
        Blocks(chat, 1)(torch.randn(1, 3, chat.d_model))
    assert heard and Blocks(chat, 1).written


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"])
def test_hooks_on_what_a_block_is_made_of_are_called(part):
    chat = chat_of("qwen2")
    x = torch.randn(2, 5, chat.d_model)
    with hooked((chat.block(3).get_submodule(part), lambda module, inputs, output: output * 1.5)):
        changed = Blocks(chat, 1)
        assert changed.written
        mine, theirs = changed(x), by_modules(Blocks(chat, 1))(x)
    assert off(mine, theirs) < EXACT
    assert off(mine, changed(x)) > 2e-5


def test_views_share_weights_and_leave_the_model_alone(any_tiny):
    chat = any_tiny
    ids = torch.arange(5, 17)[None]
    before = chat.trunk(input_ids=ids, use_cache=False).last_hidden_state
    for written in (True, False):
        lower, upper = Blocks(chat, 0, 2), Blocks(chat, 2)
        lower.written = upper.written = written
        with torch.no_grad():
            torch.testing.assert_close(upper(lower(ids)), before, atol=EXACT, rtol=0)
        assert upper.blocks[1] is chat.block(3)
    assert len(chat.blocks) == 4
    assert torch.equal(chat.trunk(input_ids=ids, use_cache=False).last_hidden_state, before)


OTHERS = {
    "mistral": {"sliding_window": 8},
    "gemma": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_that_are_written_out(kind):
    """Not tried at run time: their windows, scales and offsets are compared here with the model's own forward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(vocab_size=90, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=12, pad_token_id=0)  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **OTHERS[kind])).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # norms whose weights are not all the same
    chat = load_model(model)
    ids = torch.randint(90, (2, STEM + TOKENS))
    ids[1, :STEM] = ids[0, :STEM]
    with torch.no_grad():
        own = chat.trunk(input_ids=ids, use_cache=False).last_hidden_state
        whole, lower, upper = Blocks(chat), Blocks(chat, 0, 2), Blocks(chat, 2)
        assert whole.written and lower.written and upper.written
        assert off(whole(ids), own) < EXACT
        assert off(upper(lower(ids)), own) < EXACT
        followed = Places(stems=whole.stem(ids[:1, :STEM]), of_stem=torch.zeros(2, dtype=torch.long))
        assert off(whole(ids[:, STEM:], followed), own[:, STEM:]) < EXACT
        for blocks in (whole, lower, upper):
            blocks.written = False
        assert off(upper(lower(ids)), own) < EXACT
