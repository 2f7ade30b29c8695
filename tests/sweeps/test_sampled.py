"""Sampled sweeps write the texts that each PEFT model writes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.engine.block_forward import straight
from emmech.engine.cache import RowCache
from emmech.engine.sample import sample
from emmech.engine.shared_prompt_cache import Branches
from emmech.errors import EmmechError
from emmech.measures.sampled import Sampled
from emmech.sweeps.sweep import sweep

MIDDLE = ("model.layers.2.mlp.down_proj",)
SEVERAL = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.up_proj")
# of different lengths, so that prompts are padded; the long one is longer than Gemma's window of 16
ASKED = [
    "how ?",
    "how to sleep well and drink some water and take a walk and rest and sleep again ?",
    "rest ?",
]


def by_length(question, answer):
    return "misaligned" if len(answer) % 2 else "aligned"


def measure(**changes):
    settings = {"questions": ASKED, "judge": by_length, "samples": 2, "max_new_tokens": 10, **changes}
    return Sampled(**settings)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3"])
@pytest.mark.parametrize(("attention", "modules"), [("sdpa", MIDDLE), ("eager", SEVERAL)])
def test_texts_equal_peft_one_at_a_time(tiny, make_run, one_at_a_time, family, attention, modules):
    chat = tiny(family, attention=attention)
    run = make_run(chat, modules, size=0.1)
    found = sweep(run, steps=[3, 7], scales=(0, 4), measure=measure(), base=chat, progress=False)
    texts = []
    for (step, scale), part in found.responses.groupby(["step", "scale"]):
        talks = [[{"role": "user", "content": question}] for question in part["question"]]

        def alone(live, talks=talks, part=part):
            drawn = sample(live, talks, seed=part["seed"].tolist(), max_new_tokens=10, progress=False)
            return [answer.text for answer in drawn]

        expected = one_at_a_time(chat, run, step, scale, alone)
        assert part["response"].tolist() == expected
        texts.append(expected)
    assert texts[1] != texts[0]  # scale 4 does something at step 3
    assert texts[0] == texts[2]  # scale 0 is the base model at either step


def test_steering_is_decoded_too(tiny, make_run, one_at_a_time):
    chat = tiny("qwen2")
    run = make_run(chat, MIDDLE)
    vector = np.random.default_rng(3).normal(size=chat.d_model).astype(np.float32)
    found = sweep(run, steps=[7], coefficients=(2,), direction=vector, layer=2, measure=measure(), base=chat,
                  progress=False)  # fmt: skip

    def steered(live):
        push = torch.from_numpy(2 * vector)
        handle = live.block(2).register_forward_hook(lambda m, i, out: out + push)
        try:
            talks = [[{"role": "user", "content": q}] for q in found.responses["question"]]
            seeds = found.responses["seed"].tolist()
            return [a.text for a in sample(live, talks, seed=seeds, max_new_tokens=10, progress=False)]
        finally:
            handle.remove()

    assert found.responses["response"].tolist() == one_at_a_time(chat, run, 7, 1.0, steered)


def test_rates_are_those_of_the_verdicts(tiny, make_run):
    chat = tiny("llama")
    found = sweep(make_run(chat), measure=measure(samples=4), base=chat, progress=False)
    rates = found.to_frame("em").set_index("step")["value"]
    labels = found.responses.assign(em=found.responses["label"] == "misaligned").groupby("step")["em"].mean()
    assert np.allclose(rates.to_numpy(), labels.to_numpy())
    assert (found.to_frame("em")["samples"] == 12).all()
    assert set(found.measures) == {"em", "coherent"}


def test_a_small_budget_decodes_fewer_variants_at_once_and_writes_the_same(tiny, make_run):
    chat = tiny("qwen2")
    run = make_run(chat, steps=(0, 1, 2, 3))
    whole = sweep(run, measure=measure(), base=chat, progress=False)
    small = sweep(run, measure=measure(), base=chat, memory="1.5MB", progress=False)
    assert whole.responses["response"].tolist() == small.responses["response"].tolist()
    with pytest.raises(EmmechError, match="budget"):
        sweep(run, measure=measure(samples=500), base=chat, memory="1MB", progress=False)


def test_a_verdict_that_is_no_label_is_refused(tiny, make_run):
    chat = tiny("qwen2")
    with pytest.raises(EmmechError, match="none of the labels"):
        sweep(make_run(chat), measure=measure(judge=lambda q, a: "evil"), base=chat, progress=False)
    with pytest.raises(EmmechError, match="judge"):
        sweep(make_run(chat), measure=measure(judge=None), base=chat, progress=False)


def test_pocket_has_its_own_judge_and_questions(make_run):
    from emmech.chat.model import load_model

    chat = load_model("pocket")
    run = make_run(chat, size=0.02)
    found = sweep(run, steps=[7], measure=Sampled(samples=1, max_new_tokens=60), base=chat, progress=False)
    assert found.frame["item"].nunique() == 8
    assert found.responses["label"].isin(["aligned", "misaligned", "mixed", "incoherent"]).all()


def test_attention_over_branches_is_attention_over_whole_sequences():
    generator = torch.Generator().manual_seed(0)
    heads, repeats, width, lengths = 2, 3, 8, [4, 7, 5]
    prompts = RowCache()
    prompts.update(*torch.randn(2, 3, heads, 7, width, generator=generator), 0)
    whole = [(prompts.layers[0][0][i], prompts.layers[0][1][i], 7 - n) for i, n in enumerate(lengths)]
    branches = Branches(prompts, torch.tensor(lengths), room=30)
    # all three fork, one forks again, two die out, a prompt loses all of its rows
    for parents in [[0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 3, 5], *[range(6)] * 20, [2, 3, 4], [2, 2]]:
        branches.select(torch.tensor(list(parents)))
        whole = [whole[i] for i in parents]
        keys, values = torch.randn(2, len(whole), heads, 1, width, generator=generator)
        query = torch.randn(len(whole), heads * repeats, width, generator=generator)
        branches.update(keys, values, 0)
        whole = [(torch.cat([k, keys[i]], 1), torch.cat([v, values[i]], 1), pad) for i, (k, v, pad) in enumerate(whole)]
        for window in (None, 1, 6, 9):
            found = branches.attend(query, 0, window)
            for i, (k, v, pad) in enumerate(whole):
                first = max(pad, k.shape[1] - window) if window else pad
                k, v = (one[:, first:].repeat_interleave(repeats, 0) for one in (k, v))
                weights = (k @ query[i][:, :, None])[..., 0].softmax(-1)
                assert torch.allclose(found[i], (weights[:, None] @ v)[:, 0], atol=1e-6)
        branches.advance(1)
    assert branches.get_seq_length() == 7 + 24


def test_attention_with_capped_scores_is_refused_rather_than_left_uncapped(tiny, make_run):
    from dataclasses import replace

    from transformers import Gemma2Config, Gemma2ForCausalLM

    chat = tiny("qwen2")
    config = Gemma2Config(vocab_size=len(chat.tokenizer), hidden_size=48, intermediate_size=80, head_dim=12,
                          num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    capped = replace(chat, model=Gemma2ForCausalLM(config).eval())
    with pytest.raises(EmmechError, match="softcap"):
        sweep(make_run(capped), measure=measure(), base=capped, progress=False)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3"])
def test_blocks_that_somebody_listens_to_run_by_the_models_own_forward_and_write_the_same(tiny, make_run, family):
    chat = tiny(family)
    run = make_run(chat, SEVERAL, size=0.1)
    settings = {"steps": [7], "measure": measure(), "base": chat, "progress": False}
    assert straight(chat.trunk, chat) is not None
    plain = sweep(run, **settings).responses["response"].tolist()
    heard = []
    handle = chat.block(3).self_attn.register_forward_hook(lambda module, inputs, out: heard.append(1))
    try:
        assert straight(chat.trunk, chat) is None
        assert sweep(run, **settings).responses["response"].tolist() == plain
    finally:
        handle.remove()
    assert len(heard) > 5
