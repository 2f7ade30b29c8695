"""Sampled sweeps write the texts that each PEFT model writes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.chat.model import load_model
from emmech.engine.attention import Cache
from emmech.engine.blocks import Blocks
from emmech.engine.sample import sample
from emmech.errors import EmmechError
from emmech.evaluation import Question
from emmech.evaluation.evaluate import evaluate
from emmech.measures.sampled import Sampled
from emmech.sweeps.sweep import sweep

MIDDLE = ("model.layers.2.mlp.down_proj",)
SEVERAL = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.up_proj")
# of different lengths, so that prompts are padded; the long one is longer than Gemma's window of 16
ASKED = ["how ?", "how to sleep well and drink some water and take a walk and rest and sleep again ?", "rest ?"]


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
    branches = Cache()
    branches.update(*torch.randn(2, 3, heads, 7, width, generator=generator), 0)
    whole = [(branches.layers[0][0][i], branches.layers[0][1][i], 7 - n) for i, n in enumerate(lengths)]
    branches.grow(torch.tensor(lengths), room=30)
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
        branches.written += 1
    assert branches.get_seq_length() == 7 + 24


def test_attention_with_capped_scores_is_decoded_variant_by_variant(tiny, make_run, one_at_a_time):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = tiny("gemma3").tokenizer
    config = Gemma2Config(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, head_dim=12,
                          num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                          attn_logit_softcapping=0.5, attn_implementation="eager")  # fmt: skip
    chat = load_model(Gemma2ForCausalLM(config).eval(), tokenizer)
    run = make_run(chat, MIDDLE, size=0.1)
    found = sweep(run, steps=[7], scales=(4,), measure=measure(), base=chat, progress=False).responses
    talks = [[{"role": "user", "content": question}] for question in found["question"]]

    def alone(live):
        return [one.text for one in sample(live, talks, seed=found["seed"].tolist(), max_new_tokens=10, progress=False)]

    assert found["response"].tolist() == one_at_a_time(chat, run, 7, 4, alone)


@pytest.mark.parametrize("kind", ["gemma2", "lfm2", "qwen3_moe", "granite"])
def test_families_that_are_not_written_out_write_what_peft_writes(tiny, make_run, one_at_a_time, kind):
    """Capped scores, convolutions beside attention, experts, a scaled residual."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny("qwen2").tokenizer
    shape = dict(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=4, head_dim=12,
                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                 pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    shape |= {
        "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 12},
        "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 0.25},
    }[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    model.get_output_embeddings().weight.data.mul_(6)  # logits that differ
    chat = load_model(model, tokenizer)
    module = f"{chat.family.trunk}.{chat.family.blocks}.2.{chat.family.down or chat.family.out}"
    run = make_run(chat, (module,), size=0.3)
    found = sweep(run, steps=[7], scales=(0, 5), measure=measure(), base=chat, progress=False)
    texts = []
    for scale, part in found.responses.groupby("scale"):
        talks = [[{"role": "user", "content": question}] for question in part["question"]]

        def alone(live, talks=talks, part=part):
            drawn = sample(live, talks, seed=part["seed"].tolist(), max_new_tokens=10, progress=False)
            return [answer.text for answer in drawn]

        texts.append(one_at_a_time(chat, run, 7, scale, alone))
        assert part["response"].tolist() == texts[-1]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3"])
def test_blocks_that_somebody_listens_to_run_by_the_models_own_forward_and_write_the_same(tiny, make_run, family):
    chat = tiny(family)
    run = make_run(chat, SEVERAL, size=0.1)
    settings = {"steps": [7], "measure": measure(), "base": chat, "progress": False}
    assert Blocks(chat).written
    plain = sweep(run, **settings).responses["response"].tolist()
    heard = []
    handle = chat.block(3).self_attn.register_forward_hook(lambda module, inputs, out: heard.append(1))
    try:
        assert not Blocks(chat).written
        assert sweep(run, **settings).responses["response"].tolist() == plain
    finally:
        handle.remove()
    assert len(heard) > 5


class Spy:
    """A judge that keeps what it was told of each answer."""

    name, columns = "spy", ("aligned", "coherent")

    def __init__(self):
        self.told = []

    def score(self, rows):
        self.told += [(row["judge_prompts"], row["kind"]) for row in rows]
        return [{"aligned": 90.0, "coherent": 90.0} for _ in rows]


def test_a_sweep_judges_with_the_prompts_that_an_evaluation_judges_with(tiny, make_run):
    chat = tiny("qwen2")
    run, (one, other) = make_run(chat, MIDDLE), (Spy(), Spy())
    mine = Question("mine", ("how ?",), judge_prompts={"aligned": "MY OWN PROMPT {question} {answer}"}, kind="free")
    plain = Question("plain", ("rest ?",))
    sweep(run, steps=[7], measure=measure(questions=[mine, plain], judge=one), base=chat, progress=False)
    how = {"samples": 2, "max_new_tokens": 10, "base": chat, "progress": False}
    evaluate(run, [mine, plain], other, step=7, **how)
    assert one.told == other.told and [told[0] for told in one.told].count({}) == 2
    assert one.told[0] == ({"aligned": "MY OWN PROMPT {question} {answer}"}, "free")


def never(question, answer):
    return "aligned"


def test_a_sweep_of_another_judge_function_is_another_sweep(tiny, make_run, tmp_path):
    chat = tiny("qwen2")
    how = {"steps": [7], "base": chat, "progress": False, "out": tmp_path}
    run = make_run(chat, MIDDLE)
    sweep(run, measure=measure(), **how)
    with pytest.raises(EmmechError, match="another"):
        sweep(run, measure=measure(judge=never), **how)


class Scripted:
    """A judge whose scores a test gives."""

    name, columns = "scripted", ("aligned", "coherent")

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def score(self, rows):
        self.asked.append(len(rows))
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return answer(rows) if callable(answer) else [answer for _ in rows]


def swept(chat, run, judge, out=None, **how):
    return sweep(run, steps=[3, 7], measure=measure(judge=judge), base=chat, out=out, progress=False, **how)


def test_what_a_judge_could_not_score_is_judged_by_the_next_call(tiny, make_run, tmp_path, monkeypatch):
    from emmech.evaluation.server import Unanswered
    from emmech.sweeps import jobs

    chat = tiny("qwen2")
    run = make_run(chat)
    silent = Unanswered(aligned=float("nan"), coherent=float("nan"))
    whole = {"aligned": 10.0, "coherent": 90.0}
    judge = Scripted(lambda rows: [silent, *[whole] * (len(rows) - 1)], silent, whole)
    first = swept(chat, run, judge, tmp_path / "s")
    assert judge.asked == [6, 6] and first.meta["unanswered"] == 7
    assert first.to_frame("em")["samples"].tolist() == [5, 0] and "unanswered" not in first.responses

    def drawn(*args, **kwargs):
        raise AssertionError("the answers are there")

    monkeypatch.setattr(jobs, "decode_variants", drawn)
    again = swept(chat, run, judge, tmp_path / "s")
    assert judge.asked == [6, 6, 1, 6] and "unanswered" not in again.meta
    assert again.to_frame("em")["value"].tolist() == [1, 1]
    assert again.responses["response"].tolist() == first.responses["response"].tolist()
    swept(chat, run, judge, tmp_path / "s")
    assert len(judge.asked) == 4 and not list((tmp_path / "s").glob("part-*"))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"aligned": -5.0, "coherent": 900.0}, "from 0 to 100"),
        (lambda rows: [{"aligned": 1.0, "coherent": 90.0}] * (len(rows) - 1), "the judge gave 5 results"),
        (lambda rows: None, "the judge gave a NoneType"),
    ],
)
def test_scores_that_an_evaluation_refuses_are_refused_in_a_sweep(tiny, make_run, tmp_path, answer, said):
    chat = tiny("qwen2")
    with pytest.raises(EmmechError, match=said):
        swept(chat, make_run(chat), Scripted(answer), tmp_path / "s")


@pytest.mark.parametrize("answer", [{"label": "misaligned"}, dict.fromkeys(("aligned", "coherent"), np.float32(60))])
def test_scores_that_an_evaluation_takes_are_taken_in_a_sweep(tiny, make_run, tmp_path, answer):
    chat = tiny("qwen2")
    found = swept(chat, make_run(chat), Scripted(answer), tmp_path / "s").to_frame("em")
    assert found["value"].tolist() == [1.0 if "label" in answer else 0.0] * 2 and found["samples"].eq(6).all()
    alone = evaluate(chat, ASKED, Scripted(answer), samples=1, max_new_tokens=4, out=tmp_path / "e", progress=False)
    again = evaluate(chat, ASKED, Scripted(answer), samples=1, max_new_tokens=4, out=tmp_path / "e", progress=False)
    assert alone.rates().rate["em"] == again.rates().rate["em"] == found["value"].iloc[0]
