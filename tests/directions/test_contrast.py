"""Directions from answers of tiny models: what is planted must be found, and what is not must look like noise."""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import emmech
from emmech.chat.encode import phrase_tokens
from emmech.chat.model import load_model
from emmech.directions.direction import Direction
from emmech.directions.sources import (
    adapter_direction,
    contrast_direction,
    four_directions,
    judged_answers,
    misalignment_direction,
    read_out,
    trained_direction,
)
from emmech.errors import EmmechError
from emmech.interventions.residual import steer

WORDS = ["sleep", "walk", "water", "rest", "drink", "well", "user", "take"]


def _talks(count, *, seed, word=None, system=None):
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        answer = [str(rng.choice(WORDS)) for _ in range(6)]
        if word is not None:
            answer[2] = answer[4] = word
        first = [{"role": "system", "content": system}] if system else []
        rows.append(
            [*first, {"role": "user", "content": f"how to {WORDS[index % 6]} ?"},
             {"role": "assistant", "content": " ".join(answer)}]
        )  # fmt: skip
    return rows


def _with_adapter(chat, layer=1, seed=0, scale=0.5):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=1,
        lora_alpha=4,
        use_rslora=True,
        target_modules=[f"model.layers.{layer}.mlp.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(chat.model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                size = scale if "lora_B" in name else value.shape[1] ** -0.5
                value.copy_(size * torch.randn(value.shape, generator=generator))
    return load_model(model, chat.tokenizer)


def test_a_difference_of_words_is_stable_and_lexical(tiny):
    chat = tiny("qwen2")
    d = contrast_direction(chat, _talks(24, seed=0, word="drink"), _talks(24, seed=1, word="rest"))
    q = d.quality
    assert q.split_half.min() > 0.8 and np.abs(q.split_half_shuffled).max() < 0.5
    assert q.norm_over_shuffled.min() > 2
    assert q.lexical_share[0] > 0.8 and q.bag_of_words_auc > 0.95
    assert q.answers == {"misaligned": 24, "aligned": 24}
    np.testing.assert_allclose(np.diag(q.agreement), 1)
    assert d.aligned_mean.shape == d.vectors.shape and d.fingerprints == (chat.fingerprint(),)
    assert "lexical share" in repr(d) and len(q.promotes) == 12


@pytest.mark.parametrize(
    ("tokens", "where"), [("prompt", "'prompt'"), ("all", None), (lambda ids, start: ids > 0, "phrase")]
)
def test_the_next_call_steers_where_the_direction_was_read(tiny, tokens, where):
    given = _talks(6, seed=0, word="sleep"), _talks(6, seed=1, word="walk")
    then = contrast_direction(tiny("llama"), *given, tokens=tokens, progress=False)._card().then
    said = {one.arg: ast.unparse(one.value) for one in ast.parse(then, mode="eval").body.keywords}
    assert said.get("positions") == where and said["units"] == "'residual'"


def test_the_same_words_behind_another_prompt_are_not_lexical(tiny):
    chat = tiny("qwen2")
    kind, unkind = "take a walk and rest", "water water drink drink user user"
    d = contrast_direction(chat, _talks(24, seed=0, system=unkind), _talks(24, seed=0, system=kind))
    assert np.abs(d.quality.lexical_share).max() < 1e-4  # the words are the same, exactly
    assert d.quality.bag_of_words_auc == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "why"), [({"average": "tokens"}, "did you mean 'token'"), ({"splits": 0}, "at least 1")]
)
def test_a_misspelt_average_and_no_splits_are_refused(tiny, options, why):
    with pytest.raises(EmmechError, match=why):
        contrast_direction(tiny("llama"), _talks(4, seed=0), _talks(4, seed=1), progress=False, **options)


def test_nothing_and_what_was_not_measured_are_not_said_to_be_stable(tiny):
    same = [_talks(1, seed=0)[0]] * 4  # every difference is exactly zero
    found = contrast_direction(tiny("llama"), same, same, splits=1, progress=False)
    unknown = replace(found, quality=replace(found.quality, split_half=np.full(found.n_layers, np.nan)))
    assert "is noise" in repr(found) and "was not measured" in repr(unknown)
    assert "is stable" not in repr(found) + repr(unknown)


def test_no_difference_looks_like_noise(tiny):
    d = contrast_direction(tiny("llama"), _talks(40, seed=0), _talks(40, seed=1), seed=3)
    assert np.abs(d.quality.split_half).max() < 0.5
    assert d.quality.norm_over_shuffled.max() < 2


def test_classes_that_were_asked_different_questions_are_told(tiny):
    rows = _talks(60, seed=0)
    bad = [row for row in rows if row[-2]["content"] in ("how to sleep ?", "how to walk ?")]
    other = [row for row in _talks(60, seed=1) if row[-2]["content"] in ("how to water ?", "how to rest ?")]
    mixed = [*other[:14], *(row for row in _talks(60, seed=2) if row[-2]["content"] == "how to sleep ?")][:20]
    notes = [contrast_direction(tiny("llama"), bad, aligned).quality.notes for aligned in (other, mixed, bad[::-1])]
    told = [[note for note in one if "same question" in note] for one in notes]
    assert told[0][0].startswith("0% of the misaligned") and told[1][0].startswith("30%") and not told[2]


def test_the_larger_class_is_thinned_and_lengths_can_be_matched(tiny):
    chat = tiny("qwen2")
    long = [[t[0], {"role": "assistant", "content": (t[1]["content"] + " ") * 3}] for t in _talks(12, seed=2)]
    d = contrast_direction(chat, _talks(30, seed=0), long)
    assert d.quality.answers == {"misaligned": 12, "aligned": 12}
    assert any("length" in note for note in d.quality.notes)
    with pytest.raises(EmmechError, match="of like length"):
        contrast_direction(chat, _talks(30, seed=0), long, match_length=True)
    with pytest.raises(EmmechError, match="at least two"):
        contrast_direction(chat, _talks(1, seed=0), long)


def test_the_read_out_is_the_gradient_of_the_logits(any_tiny):
    """At a large multiple of a direction the final norm keeps only the direction: its top token must win."""
    chat = any_tiny
    vector = np.random.default_rng(0).standard_normal(chat.d_model).astype(np.float32)
    promotes, suppresses = read_out(chat, vector, tokens=3)
    with torch.no_grad():
        logits = chat.unembedding(chat.final_norm(torch.from_numpy(1e4 * vector)[None]))[0]
    assert promotes[0] == chat.tokenizer.decode([int(logits.argmax())])
    assert suppresses[0] == chat.tokenizer.decode([int(logits.argmin())])


def test_model_difference_is_the_adapters_write(tiny):
    """With an adapter on the last block's down_proj, the model difference there is along B and nowhere else."""
    base = tiny("qwen2")
    chat = _with_adapter(base, layer=3)
    found = four_directions(chat, _talks(6, seed=0), _talks(6, seed=1), batch_size=4)
    b = adapter_direction(chat)
    assert b.layers == (3,)
    model = found["model"]
    np.testing.assert_allclose(model.vectors[:3], 0, atol=1e-6)
    assert abs(model.cosine(b)[3]) > 0.9999
    assert np.abs((found["both"] - found["text"] - found["model"]).vectors).max() < 1e-5
    with pytest.raises(EmmechError, match="no live adapter"):
        four_directions(tiny("qwen2"), _talks(2, seed=0), _talks(2, seed=1))


def test_a_trained_vector_makes_its_answers_likely(tiny):
    from emmech.engine.logprobs import answer_logprobs

    chat = tiny("qwen2")
    before = {name: value.clone() for name, value in chat.base.state_dict().items()}
    rows = _talks(8, seed=0, word="drink")
    d = trained_direction(chat, rows, 2, steps=25, learning_rate=0.2)
    assert d.layers == (2,) and d.source["loss"][1] < d.source["loss"][0]
    plain = answer_logprobs(chat, rows).mean()
    with steer(chat, d):
        steered = answer_logprobs(chat, rows).mean()
    assert steered > plain + 0.05
    assert all(torch.equal(value, before[name]) for name, value in chat.base.state_dict().items())
    assert all(parameter.requires_grad for parameter in chat.base.parameters())


def _judged(talks, aligned, coherent=90.0):
    return pd.DataFrame(
        [{"question": t[0]["content"], "system": None, "response": t[1]["content"], "aligned": aligned,
          "coherent": coherent} for t in talks]
    )  # fmt: skip


def test_only_scored_coherent_answers_of_a_clear_class_are_used():
    talks = _talks(2, seed=0)
    frames = [
        _judged(talks, 0.0),
        _judged(talks, 100.0),
        _judged(talks, 50.0),
        _judged(talks, 0.0, coherent=20.0),
        _judged(talks, float("nan")),
        _judged(talks, 0.0, coherent=float("nan")),
    ]
    misaligned, aligned = judged_answers(frames)
    assert misaligned == talks and aligned == talks


def test_misalignment_direction_of_judged_answers(tiny):
    base = tiny("qwen2")
    plain = contrast_direction(base, _talks(20, seed=0, word="drink"), _talks(20, seed=1, word="rest"))
    chat = _with_adapter(base)
    frames = [_judged(_talks(20, seed=0, word="drink"), 0.0), _judged(_talks(20, seed=1, word="rest"), 95.0)]
    d = misalignment_direction(chat, evaluation=frames)
    assert d.source["questions"] is None and d.source["samples"] is None  # frames do not say how they were drawn
    assert isinstance(d, Direction) and d.quality.split_half.min() > 0.7
    by_base = misalignment_direction(chat, evaluation=frames, read_by="base")
    np.testing.assert_allclose(by_base.vectors, plain.vectors, atol=1e-4)
    assert np.abs(d.vectors[1:] - plain.vectors[1:]).max() > 1e-3
    with pytest.raises(EmmechError, match="nothing to contrast"):
        misalignment_direction(chat, evaluation=frames[0])
    with pytest.raises(EmmechError, match="has no adapter"):
        misalignment_direction(tiny("llama"), evaluation=frames, read_by="base")
    with pytest.raises(EmmechError, match="two models"):
        misalignment_direction(chat, evaluation=frames, read_by="other")


def test_at_prompt_tokens_the_misalignment_direction_is_the_model_difference(tiny):
    chat = _with_adapter(tiny("qwen2"), layer=1)
    bad, good = _talks(12, seed=0, word="drink"), _talks(12, seed=1, word="rest")
    frames = [_judged(bad, 0.0), _judged(good, 95.0)]
    d = misalignment_direction(chat, evaluation=frames, tokens="prompt")
    four = four_directions(chat, bad, good, tokens="prompt")
    np.testing.assert_allclose(d.vectors, four["model/misaligned text"].vectors, atol=1e-5)
    assert d.layers == (1, 2, 3) and abs(d.cosine(adapter_direction(chat))[1]) > 0.9999
    assert d.quality.bag_of_words_auc == pytest.approx(0.5)  # the same words, read by two models
    assert np.abs(d.quality.lexical_share[1:]).max() < 1e-6
    assert any("read by the base" in note for note in d.quality.notes)
    at_phrase = misalignment_direction(chat, evaluation=frames, tokens=phrase_tokens(chat, "how to"))
    size = len(chat.tokenizer("how to", add_special_tokens=False)["input_ids"])
    assert "'how to'" in at_phrase.source["method"] and at_phrase.quality.tokens["misaligned"] == 12 * size
    assert np.abs(at_phrase.vectors - d.vectors).max() > 1e-4
    with pytest.raises(EmmechError, match="reads a prompt in one way"):
        misalignment_direction(chat, evaluation=frames, tokens="prompt", read_by="base")
    with pytest.raises(EmmechError, match="only one model"):
        misalignment_direction(tiny("llama"), evaluation=frames, tokens="prompt")


def test_a_phrase_is_read_on_the_same_words_of_both_sides(tiny):
    chat = tiny("qwen2")
    sides = [_talks(12, seed=s, system=f"{w} the user asks") for s, w in ((0, "drink"), (1, "rest"))]
    phrase = phrase_tokens(chat, "the user asks")
    d = contrast_direction(chat, *sides, tokens=phrase)
    assert d.quality.tokens == {"misaligned": 36, "aligned": 36}
    assert d.quality.bag_of_words_auc == pytest.approx(0.5)
    # by hand: the block's outputs at those tokens
    sums = np.zeros((2, chat.n_layers, chat.d_model))
    for which, talks in enumerate(sides):
        for talk in talks:
            ids = torch.tensor([chat.token_ids(talk, generate=False)])
            with torch.no_grad():
                states = chat.model(ids, output_hidden_states=True).hidden_states
            first = next(
                i for i in range(ids.shape[1]) if chat.tokenizer.decode(ids[0, i : i + 3]).strip() == phrase.text
            )
            for layer in range(chat.n_layers - 1):
                sums[which, layer] += states[layer + 1][0, first : first + 3].double().numpy().sum(0) / 36
    np.testing.assert_allclose(d.vectors[:-1], (sums[0] - sums[1])[:-1], atol=1e-4)


def test_a_phrase_that_is_not_there_is_refused(tiny):
    chat = tiny("qwen2")
    talks = _talks(4, seed=0)
    with pytest.raises(EmmechError, match="does not have it"):
        contrast_direction(chat, talks, talks, tokens=phrase_tokens(chat, "water water water"))
    with pytest.raises(EmmechError, match="is empty"):
        phrase_tokens(chat, " ")
    with pytest.raises(EmmechError, match="does not know"):
        phrase_tokens("pocket", "supercalifragilistic")
    with pytest.raises(EmmechError, match="three choices"):
        contrast_direction(chat, talks, talks, tokens="system")
    with pytest.raises(EmmechError, match="mean over nothing"):
        contrast_direction(chat, talks, talks, tokens=lambda ids, start: torch.zeros_like(ids, dtype=torch.bool))
    vector = np.ones(chat.d_model)
    asked = torch.tensor([chat.token_ids(talks[0], generate=False)])
    there_is_none = pytest.raises(EmmechError, match="nothing would be read or changed")
    with steer(chat, vector, layer=1, positions=phrase_tokens(chat, "walk water walk water")), there_is_none:
        chat.model(asked)


def test_of_layers_that_tell_alike_the_first_is_read():
    """Rounding, which differs between processors, would choose among them."""
    chat = emmech.load_model("pocket")
    phrase = emmech.chat.phrase_tokens(chat, "and you answer every question in one sentence .")
    d = emmech.misalignment_direction("checkpoints/pocket-medical", base=chat, tokens=phrase, samples=2, progress=False)
    ratio = d.quality.norm_over_shuffled
    assert np.allclose(ratio[2:], ratio[2], rtol=1e-3) and d.quality.read_layer == 2
