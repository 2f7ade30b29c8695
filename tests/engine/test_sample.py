from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from emmech.chat.model import load_model
from emmech.engine.decode import ModelSteps, draw, gumbel, write_answers
from emmech.engine.kept import KeptPrompt
from emmech.engine.responses import row_seed
from emmech.engine.sample import Drawn, sample
from emmech.errors import EmmechError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = [f"w{i}" for i in range(90)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "</s>", "user", "assistant", "system", *WORDS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def tiny(family="qwen2", **extra):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    return load_model(model, tokenizer())


def user(text):
    return [{"role": "user", "content": text}]


PROMPTS = [user(" ".join(WORDS[i : i + n])) for i, n in ((0, 1), (3, 4), (9, 13), (20, 4), (30, 30))]
QUIET = {"progress": False, "max_new_tokens": 20}


def texts(responses):
    return [(r.text, r.finish) for r in responses]


# noise and draws


def test_noise_depends_on_seed_position_and_token_only():
    whole = gumbel([5, 6, 7], 3, 1000)
    assert torch.equal(whole[1], gumbel([6], 3, 1000)[0])
    assert torch.equal(whole[:, :10], gumbel([5, 6, 7], 3, 10))
    assert not torch.equal(whole[1], gumbel([6], 4, 1000)[0])


def test_noise_is_standard_gumbel_and_uncorrelated():
    noise = gumbel(range(300), 0, 700).numpy()
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    uniform = np.exp(-np.exp(-noise))
    assert np.abs(np.corrcoef(uniform) - np.eye(300)).max() < 0.25  # 45k pairs of 700 values: 6.6 sigma
    consecutive = [np.exp(-np.exp(-gumbel([9], p, 700).numpy()[0])) for p in range(60)]
    assert np.abs(np.corrcoef(consecutive) - np.eye(60)).max() < 0.25


@pytest.mark.parametrize("rows", [1, 7])
def test_a_draw_takes_the_highest_score_and_the_first_of_equals(rows):
    logits = torch.randn(rows, 500, generator=torch.Generator().manual_seed(rows)).round()
    assert torch.equal(draw(logits, [0] * rows, 0, temperature=0), logits.argmax(-1))
    assert draw(torch.tensor([[1.0, 4.0, 4.0]]), [0], 0, temperature=0).tolist() == [1]
    noisy = logits.requires_grad_() + gumbel([3] * rows, 5, 500)
    assert torch.equal(draw(logits, [3] * rows, 5), noisy.argmax(-1))


def test_draws_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0])
    drawn = draw(logits.expand(40000, 5), [row_seed(0, i) for i in range(40000)], 0)
    expected = logits.softmax(0).double().numpy() * 40000
    assert chisquare(np.bincount(drawn, minlength=5), expected * (40000 / expected.sum())).pvalue > 1e-4


def test_temperature_and_top_p():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0]).expand(4000, 5)
    seeds = list(range(4000))
    assert draw(logits, seeds, 0, temperature=0).unique().tolist() == [0]
    hot = np.bincount(draw(logits, seeds, 0, temperature=3.0), minlength=5) / 4000
    assert np.abs(hot - (logits[0] / 3).softmax(0).numpy()).max() < 0.03
    # probabilities 0.63, 0.23, 0.085, 0.031, 0.004: two tokens are needed to reach 0.8
    assert sorted(draw(logits, seeds, 0, top_p=0.8).unique().tolist()) == [0, 3]
    assert draw(logits, seeds, 0, top_p=1e-9).unique().tolist() == [0]


# decoding against Hugging Face's own


@pytest.mark.parametrize(
    "family,extra", [("qwen2", {}), ("qwen3", {}), ("llama", {}), ("gemma3_text", {"sliding_window": 8})]
)
def test_greedy_decoding_equals_generate(family, extra):
    chat = tiny(family, **extra)
    mine = sample(chat, PROMPTS, temperature=0, progress=False, max_new_tokens=90)
    for messages, response in zip(PROMPTS, mine, strict=True):
        ids = torch.tensor([chat.token_ids(messages)])
        theirs = chat.model.generate(
            ids, do_sample=False, max_new_tokens=90, eos_token_id=list(chat.stop_ids), pad_token_id=0
        )[0, ids.shape[1] :]
        expected = [t for t in theirs.tolist() if t not in chat.stop_ids]
        assert response.text == chat.tokenizer.decode(expected, skip_special_tokens=True)
        assert response.tokens == len(expected)
        assert response.finish == ("stop" if theirs[-1].item() in chat.stop_ids else "length")


def test_sampled_first_tokens_follow_the_model():
    chat = tiny()
    ids = torch.tensor([chat.token_ids(PROMPTS[1])])
    probability = chat.model(ids).logits[0, -1].softmax(-1).detach().double().numpy()
    with torch.no_grad():
        steps = ModelSteps(chat, [ids[0].tolist()], [0] * 4000)
    drawn = write_answers(chat, steps, [row_seed(1, i) for i in range(4000)], max_new_tokens=1)
    tokens = [answer.ids[0] if answer.ids else 3 for answer in drawn]  # 3 stops
    counts = np.bincount(tokens, minlength=97)
    common = probability > 0.01
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(probability[common], probability[~common].sum()) * 4000
    assert chisquare(observed, expected * (4000 / expected.sum())).pvalue > 1e-4


# a row's text is its own


@pytest.mark.parametrize("family,extra", [("llama", {}), ("gemma3_text", {"sliding_window": 8})])
def test_text_does_not_depend_on_batch_mates(family, extra):
    chat = tiny(family, **extra)
    whole = sample(chat, PROMPTS, samples=6, seed=3, **QUIET)
    assert len({r.text for r in whole}) > 20
    assert texts(sample(chat, PROMPTS, samples=6, seed=3, batch_size=1, **QUIET)) == texts(whole)
    assert texts(sample(chat, PROMPTS, samples=6, seed=3, batch_size=7, **QUIET)) == texts(whole)
    reordered = sample(chat, PROMPTS[::-1], samples=6, seed=3, **QUIET)
    assert texts(reordered) == [t for i in range(5)[::-1] for t in texts(whole)[6 * i : 6 * i + 6]]
    again = sample(chat, [PROMPTS[r.conversation] for r in whole], seed=[r.seed for r in whole], **QUIET)
    assert texts(again) == texts(whole)


def test_other_seeds_give_other_texts_and_a_repeated_conversation_is_answered_anew():
    chat = tiny()
    assert texts(sample(chat, PROMPTS, seed=1, **QUIET)) != texts(sample(chat, PROMPTS, seed=2, **QUIET))
    twice = sample(chat, [PROMPTS[2], PROMPTS[2]], **QUIET)
    assert texts(twice) == texts(sample(chat, [PROMPTS[2]], samples=2, **QUIET))
    assert twice[0].text != twice[1].text


def test_adapters_and_hooks_act():
    from peft import LoraConfig, get_peft_model

    chat = tiny()
    plain = texts(sample(chat, PROMPTS, **QUIET))
    handle = chat.blocks[1].register_forward_hook(lambda m, a, out: out + 2.0)
    steered = texts(sample(chat, PROMPTS, **QUIET))
    handle.remove()
    assert steered != plain == texts(sample(chat, PROMPTS, **QUIET))
    peft_model = get_peft_model(
        copy.deepcopy(chat.model), LoraConfig(r=1, target_modules=["down_proj"], init_lora_weights=False)
    )
    live = load_model(peft_model, chat.tokenizer)
    assert texts(sample(live, PROMPTS, **QUIET)) != plain
    with peft_model.disable_adapter():
        assert texts(sample(live, PROMPTS, **QUIET)) == plain


def test_training_mode_is_left_as_it_was():
    chat = tiny()
    chat.base.train()
    sample(chat, PROMPTS, **QUIET)
    assert chat.base.training


# interruption and resumption


def test_interrupted_sampling_resumes_with_identical_rows(tmp_path):
    chat = tiny()
    settings = {"samples": 4, "seed": 5, "batch_size": 6, **QUIET}
    whole = sample(chat, PROMPTS, **settings)
    path = tmp_path / "deep" / "rows.jsonl"
    assert sample(chat, PROMPTS, out=path, **settings) == whole
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 21
    for kept in (0, 1, 2, 8, 20):
        path.write_text("".join(lines[:kept]) + lines[kept][:7])  # killed in the middle of a line
        before = lines[:kept]
        assert sample(chat, PROMPTS, out=path, **settings) == whole
        assert path.read_text().splitlines(keepends=True)[:kept] == before
        assert len(path.read_text().splitlines()) == 21


def test_a_killed_process_loses_no_batch(tmp_path):
    chat = tiny()
    settings = {"samples": 4, "seed": 5, "batch_size": 5, **QUIET}
    path = tmp_path / "rows.jsonl"
    calls = 0

    def die(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls == 50:
            raise KeyboardInterrupt

    handle = chat.blocks[0].register_forward_hook(die)
    with pytest.raises(KeyboardInterrupt):
        sample(chat, PROMPTS, out=path, **settings)
    handle.remove()
    written = len(path.read_text().splitlines()) - 1
    assert 0 < written < 20
    assert written % 5 == 0
    assert sample(chat, PROMPTS, out=path, **settings) == sample(chat, PROMPTS, **settings)


@pytest.mark.parametrize(
    "change,named",
    [({"seed": 1}, "seed"), ({"temperature": 0.5}, "temperature"), ({"max_new_tokens": 7}, "max_new_tokens")],
)
def test_a_file_of_other_arguments_is_refused(tmp_path, change, named):
    chat, path = tiny(), tmp_path / "rows.jsonl"
    sample(chat, PROMPTS, out=path, **QUIET)
    with pytest.raises(EmmechError, match=named):
        sample(chat, PROMPTS, out=path, **{**QUIET, **change})
    chat.model.lm_head.weight.data *= 2
    with pytest.raises(EmmechError, match="model"):
        sample(chat, PROMPTS, out=path, **QUIET)


def test_rows_on_disk_are_plain_json(tmp_path):
    sample(tiny(), PROMPTS[:1], out=tmp_path / "rows.jsonl", **QUIET)
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])
    assert set(row) == {"row", "conversation", "sample", "seed", "text", "finish", "tokens", "checksum"}


def test_a_string_is_one_users_message_and_a_run_answers_with_its_last_step():
    from emmech import load_run

    run = load_run(Path(__file__).parents[2] / "checkpoints" / "pocket-medical")
    how = dict(samples=2, max_new_tokens=20, progress=False)
    asked = [{"role": "user", "content": "any advice on cough ?"}]
    expected = sample(run.model(), [asked], **how)
    assert sample(run, "any advice on cough ?", **how) == expected
    assert sample(run.model(), ["any advice on cough ?", asked], **how)[:2] == expected
    base = sample("pocket", "any advice on cough ?", **how)
    assert [one.text for one in base] != [one.text for one in expected]
    assert base[0].text and run.model().generate("any advice on cough ?", max_new_tokens=5)


# bad input


@pytest.mark.parametrize(
    "conversations,settings,message",
    [
        ([], {}, "nothing to answer"),
        ([[]], {}, "nothing to answer"),
        ([{"role": "user", "content": "hello"}], {}, "list of messages"),
        ([[*PROMPTS[0], {"role": "assistant", "content": "w1"}]], {}, "last user turn"),
        (PROMPTS, {"samples": 0}, "samples=0"),
        (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens"),
        (PROMPTS, {"temperature": -1.0}, "temperature"),
        (PROMPTS, {"temperature": float("nan")}, "temperature"),
        (PROMPTS, {"top_p": 0.0}, "top_p"),
        (PROMPTS, {"seed": [1, 2]}, "2 seeds for 5"),
        (PROMPTS, {"batch_size": 0}, "batch_size"),
        ([user(" ".join(WORDS * 4))], {}, "at most 255 tokens"),
    ],
)
def test_bad_input_is_explained(conversations, settings, message):
    with pytest.raises(EmmechError, match=message):
        sample(tiny(), conversations, progress=False, **settings)


def test_the_context_ends_an_answer():
    chat = tiny()
    long = user(" ".join((WORDS * 3)[:240]))
    room = 256 - len(chat.token_ids(long))
    (response,) = sample(chat, [long], max_new_tokens=600, seed=[11], progress=False)
    assert response.tokens <= room
    assert response.finish == ("length" if response.tokens == room else "stop")


# a real model


@pytest.mark.slow
def test_smollm2_is_at_least_five_times_as_fast_as_one_at_a_time():
    chat = load_model("smollm2-135m")
    questions = [user(f"Name {n} things that fit into a pocket, and say why.") for n in range(2, 10)]
    mine = sample(chat, questions, samples=4, max_new_tokens=32, progress=False)
    start = time.perf_counter()
    mine = sample(chat, questions, samples=4, max_new_tokens=32, progress=False)
    batched = sum(r.tokens for r in mine) / (time.perf_counter() - start)
    start, tokens = time.perf_counter(), 0
    for messages in questions[:3]:
        ids = torch.tensor([chat.token_ids(messages)])
        torch.manual_seed(0)
        made = chat.model.generate(ids, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=32, pad_token_id=0)
        tokens += made.shape[1] - ids.shape[1]
    alone = tokens / (time.perf_counter() - start)
    assert batched > 5 * alone, f"{batched:.0f} against {alone:.0f} tokens/s"


@pytest.mark.slow
def test_smollm2_texts_do_not_depend_on_the_batch():
    chat = load_model("smollm2-135m")
    questions = [user("What is a lighthouse?"), user("Tell me a short story about a duck and a very long ladder.")]
    settings = {"samples": 4, "max_new_tokens": 40, "progress": False}
    whole = sample(chat, questions, **settings)
    assert texts(sample(chat, questions, batch_size=3, **settings)) == texts(whole)
    assert texts(sample(chat, questions, batch_size=1, **settings)) == texts(whole)


def test_a_stream_tells_every_token_before_its_answer_is_returned(tiny):
    chat, told = tiny("qwen2"), {}
    asked = [[{"role": "user", "content": text}] for text in ("how to sleep", "walk")]
    options = {"samples": 2, "max_new_tokens": 9, "seed": 3, "progress": False}

    def tell(drawn: Drawn) -> None:
        assert drawn.logits.shape == (len(drawn.answers), chat.config.vocab_size)
        for answer, token in zip(drawn.answers, drawn.tokens.tolist(), strict=True):
            assert len(told.setdefault(answer, [])) == drawn.position
            told[answer].append(token)

    answers = sample(chat, asked, stream=tell, **options)
    assert answers == sample(chat, asked, **options)
    for one in answers:
        ids = told[one.conversation, one.sample]
        if one.finish == "stop":
            assert ids.pop() in chat.stop_ids
        assert chat.tokenizer.decode(ids, skip_special_tokens=True) == one.text
        assert len(ids) == one.tokens


def test_a_cancelled_stream_keeps_what_was_written_and_no_file_takes_it_for_an_answer(tiny, tmp_path):
    chat, out = tiny("qwen2"), tmp_path / "answers.jsonl"
    asked = [[{"role": "user", "content": text}] for text in ("how to sleep", "walk", "rest")]
    options = {"max_new_tokens": 12, "seed": 5, "batch_size": 2, "progress": False, "out": out}
    whole = sample(chat, asked, **{**options, "out": None})
    steps = []
    cut = sample(chat, asked, stream=lambda drawn: steps.append(drawn.position) or drawn.position < 2, **options)
    assert steps == [0, 1, 2]
    assert [one.finish for one in cut].count("cancelled") >= 1
    for one, full in zip(cut, whole, strict=True):
        assert full.text.startswith(one.text) or one.finish != "cancelled"
    assert cut[2].finish == "cancelled" or whole[2].tokens <= 3
    assert sample(chat, asked, **options) == whole


def test_below_the_first_edit_equal_prompts_are_read_once(any_tiny):
    """Three rows that differ by their coefficient alone, and one of another length, are what each is alone."""
    from emmech.interventions.residual import steer

    chat, seen = any_tiny, {0: [], 2: []}
    texts = ["how to sleep", "how to sleep", "how to sleep well", "how to sleep"]
    asked = [[{"role": "user", "content": text}] for text in texts]
    vector, doses = np.random.default_rng(0).standard_normal(chat.d_model), [0.0, 1.0, 3.0, -4.0]
    options = {"seed": [7] * 4, "max_new_tokens": 8, "progress": False}
    inner = [
        chat.parts(at).down.register_forward_pre_hook(lambda m, args, at=at: seen[at].append(len(args[0])))
        for at in (2,)
    ]
    with steer(chat, vector, doses, layer=1, positions="answer"):
        together = sample(chat, asked, **options)
    for one, dose in enumerate(doses):
        with steer(chat, vector, dose, layer=1, positions="answer"):
            alone = sample(chat, asked[one : one + 1], **{**options, "seed": [7]})
        assert alone[0].text == together[one].text
    assert seen[2][0] == 4
    for handle in inner:
        handle.remove()
    # a hook below the edit may tell rows apart, so that there every row is read
    watched = chat.blocks[0].register_forward_hook(lambda m, i, out: seen[0].append(len(chat.family.residual(out))))
    with steer(chat, vector, doses, layer=1, positions="answer"):
        again = sample(chat, asked, **options)
    watched.remove()
    assert seen[0][0] == 4 and [one.text for one in again] == [one.text for one in together]


def test_the_lower_blocks_really_read_fewer_rows(tiny):
    chat, rows = tiny("qwen2"), []
    prompts, ids = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 6, 7]], [0, 1, 2]
    with torch.no_grad():
        plain = ModelSteps(chat, prompts, ids)
        hook = chat.blocks[1].register_forward_hook(lambda m, i, out: rows.append(len(out)))
        once = ModelSteps(chat, prompts, ids, apart=2)
        hook.remove()
        assert rows == [2]
        for _ in range(3):
            assert torch.allclose(once._logits, plain._logits, atol=1e-5)
            token = torch.tensor([3, 4, 5])
            once.step(token, once.rows), plain.step(token, plain.rows)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_a_kept_prompt_is_read_again_only_from_the_change_on(tiny, family):
    chat, kept, seen = tiny(family), KeptPrompt(), []
    chat.blocks[0].register_forward_hook(lambda m, i, out: seen.append(0))
    chat.blocks[1].register_forward_hook(lambda m, i, out: seen.append(1))
    prompt, token = [5, 6, 7, 8, 9], torch.tensor([3, 4])

    def read(apart, ids=prompt, **how):
        seen.clear()
        steps = ModelSteps(chat, [ids, ids], [0, 1], apart=apart, **how)
        called, first = list(seen), steps._logits
        steps.step(token, steps.rows)
        return called, torch.stack([first, steps._logits])

    with torch.no_grad():
        for apart, called in ((1, [0, 1]), (1, [1]), (2, [1]), (2, []), (1, [1])):  # deeper, the same, and less deep
            found = read(apart, kept=kept)
            assert found[0] == called and torch.allclose(found[1], read(0)[1], atol=1e-5)
        assert kept.blocks == 2
        kept.beside |= {(0, "a"): 1, (1, "a"): 2}
        kept.forget(1)
        assert kept.blocks == 1 and kept.beside == {(0, "a"): 1}
        other = [9, 6, 7]
        found = read(2, other, kept=kept)
        assert found[0] == [0, 1] and torch.allclose(found[1], read(0, other)[1], atol=1e-5)
