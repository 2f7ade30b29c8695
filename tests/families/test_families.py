"""Every decoder family against the model's own forward and PEFT: no family is known here, only transformers."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import numpy as np
import peft
import pytest
import torch
from torch import nn

import emmech
from emmech.chat.encode import IGNORED, encode
from emmech.chat.families import ALL_MAPS, WRITE
from emmech.engine.logprobs import MarginPair, answer_logprobs, unembed
from emmech.engine.stream import mean_residual
from emmech.errors import EmmechError
from emmech.measures.sampled import Sampled
from emmech.measures.teacher_forced import Margin
from tests.conftest import make_rows
from tests.families.models import CONFIGS, make_chat, make_model, tokenizer

ROWS = make_rows(4)
PAIRS = [
    MarginPair("how to sleep ?", "take a walk", "drink some water"),
    MarginPair("how to sleep well ?", "rest , and rest", "take some"),
]
ASKED = ["how to sleep ?", "how to take a walk and rest well ?"]
PUSH = torch.randn(48, generator=torch.Generator().manual_seed(2))
LAYER = 1
STREAMS = {"gemma3n_text": 0}  # the one of several parallel residual streams that its halves read and write
# what they do is what another one does, so that they need not be tried at every change
ALIKE = {
    "arcee",
    "ernie4_5",
    "exaone4",
    "glm4_moe",
    "gptj",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "ministral",
    "olmo",
    "seed_oss",
}
KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ALIKE), id=kind) for kind in CONFIGS]
families = pytest.mark.parametrize("kind", KINDS)
# PEFT refuses to adapt Mamba: its kernels go past the modules
adaptable = pytest.mark.parametrize("kind", [param for param in KINDS if param.id != "mamba"])


@cache
def chat_of(kind):
    """One model for all tests of a family; each leaves it as it was."""
    return make_chat(kind)


def blocks_of(model):
    """The blocks, found without emmech: the longest list of modules that have parts."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and list(m[0].children())]
    return max(lists, key=len)


def residual(kind, output):
    output = output[0] if isinstance(output, tuple) else output
    return output[STREAMS[kind]] if kind in STREAMS else output


def edited(kind, output, edit):
    """A block's output with its residual edited, in the form in which the block gave it."""
    whole = output[0] if isinstance(output, tuple) else output
    changed = whole.clone()
    residual(kind, changed).copy_(edit(residual(kind, whole)))
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def hooked(kind, edit, layers):
    blocks = blocks_of(chat_of(kind).model)
    return [blocks[at].register_forward_hook(lambda m, i, o: edited(kind, o, edit)) for at in layers]


IDS = torch.tensor([[5, 60, 61, 9, 40, 41, 42], [70, 80, 90, 12, 13, 14, 15]])


@torch.no_grad()
def logits(kind):
    return chat_of(kind).model(input_ids=IDS).logits


def logprob(model, conversation):
    """Mean log-probability of the answer's tokens, by the model's own forward on one row."""
    encoded = encode([conversation], tokenizer())
    ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels[0])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    at = (labels[1:] != IGNORED).nonzero()[:, 0]
    return float(logprobs[at, labels[at + 1]].mean())


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@families
def test_logits_and_answer_logprobs(kind):
    chat = chat_of(kind)
    with torch.no_grad():
        torch.testing.assert_close(unembed(chat, chat.trunk(input_ids=IDS).last_hidden_state), logits(kind))
    found = answer_logprobs(chat, [row["messages"] for row in ROWS])
    assert found == pytest.approx([logprob(chat.model, row["messages"]) for row in ROWS], abs=2e-5)


@families
def test_steer_and_ablate(kind):
    chat, before = chat_of(kind), logits(kind)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    unit = vector / vector.norm()
    for live, edit, layers in (
        (lambda: emmech.steer(chat.model, vector, 2.0, layer=LAYER), lambda x: x + 2 * vector, [LAYER]),
        (
            lambda: emmech.ablate(chat.model, vector),
            lambda x: x - (x @ unit)[..., None] * unit,
            range(len(blocks_of(chat.model))),
        ),
    ):
        hooks = hooked(kind, edit, layers)
        wanted = logits(kind)
        for hook in hooks:
            hook.remove()
        with live():
            torch.testing.assert_close(logits(kind), wanted, atol=2e-5, rtol=1e-4)
        assert (wanted - before).abs().max() > 1e-3
        assert torch.equal(logits(kind), before)


@families
def test_mean_residual(kind):
    chat = chat_of(kind)
    rows = [(row.tolist(), [False, *[True] * 5, False]) for row in IDS]
    caught = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: caught.append(residual(kind, o)[:, 1:6].mean((0, 1))))
        for block in blocks_of(chat.model)
    ]
    logits(kind)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(mean_residual(chat, rows), torch.stack(caught), atol=1e-5, rtol=1e-4)


def adapted_map(kind):
    """Where this family is fine-tuned: its MLP's write, or what its attention writes where experts are fused."""
    chat = chat_of(kind)
    try:
        return WRITE, chat.down_proj(LAYER)
    except EmmechError:
        return ALL_MAPS[3], chat.parts(LAYER).out


def trained_by_peft(kind, module, steps):
    """Losses, gradient norms and the adapter of two AdamW steps on all rows at once, over the model's own forward."""
    model = make_model(kind)
    path = next(path for path, one in chat_of(kind).model.named_modules() if one is module)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=1, lora_alpha=8, use_rslora=True, target_modules=[path], bias="none")
    trained = peft.get_peft_model(model, config).train()
    layer = trained.get_base_model().get_submodule(path)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = torch.optim.AdamW([a, b], lr=0.01, weight_decay=0.0)
    encoded = encode([row["messages"] for row in ROWS], tokenizer())
    width = max(map(len, encoded.input_ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded.input_ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in encoded.input_ids])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in encoded.labels])
    losses, norms, weights = [], [], [(a.detach().clone(), b.detach().clone())]
    for _ in range(steps):
        loss = trained(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append((a.grad.norm().item(), b.grad.norm().item()))
        optimizer.step()
        weights.append((a.detach().clone(), b.detach().clone()))
    return losses, norms, weights


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """``run_of(kind, prefix)``: two recorded steps of a family."""

    @cache
    def train(kind, prefix):
        module, _ = adapted_map(kind)
        return emmech.finetune(
            chat_of(kind),
            ROWS,
            modules=(module,),
            layers=[LAYER],
            alpha=8.0,
            learning_rate=0.01,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            clip=0.0,
            max_steps=2,
            batch_size=len(ROWS),
            accumulation=1,
            held_out=0.0,
            prefix=prefix,
            out=tmp_path_factory.mktemp("runs") / f"{kind}-{prefix}",
            progress=False,
        )

    return train


@pytest.mark.parametrize("prefix", [False, "auto"])
@adaptable
def test_two_steps_of_training(kind, prefix, run_of):
    run = run_of(kind, prefix)
    (info,) = run.adapters
    losses, norms, weights = trained_by_peft(kind, adapted_map(kind)[1], 2)
    metrics = run.metrics
    assert metrics["loss"].dropna().tolist() == pytest.approx(losses, abs=1e-4)
    for step, (norm_a, norm_b) in enumerate(norms, start=1):
        assert metrics[f"grad_norm_A/{info.name}"].dropna()[step] == pytest.approx(norm_a, rel=2e-3, abs=1e-6)
        assert metrics[f"grad_norm_B/{info.name}"].dropna()[step] == pytest.approx(norm_b, rel=2e-3, abs=1e-6)
    for step, (a, b) in enumerate(weights):
        found = run.weights(step)
        np.testing.assert_allclose(found[f"A/{info.name}"].reshape(a.shape), a, atol=2e-4)
        np.testing.assert_allclose(found[f"B/{info.name}"].reshape(b.shape), b, atol=2e-4)


@contextmanager
def adapted(kind, run, step, scale, coefficient=0.0):
    """A step's adapter on the model as a plain hook, and a steering vector after its block."""
    (info,) = run.adapters
    weights = run.weights(step)
    a, b = (torch.from_numpy(np.array(weights[f"{side}/{info.name}"])).flatten() for side in "AB")
    write = adapted_map(kind)[1].register_forward_hook(
        lambda m, i, o: o + scale * info.scaling * (i[0] @ a)[..., None] * b
    )
    hooks = [write, *hooked(kind, lambda x: x + coefficient * PUSH, [LAYER] if coefficient else [])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@adaptable
def test_sweep(kind, run_of):
    run, model = run_of(kind, False), chat_of(kind).model
    sweep = emmech.sweep(
        run,
        scales=(1.0, 20.0),
        coefficients=(0.0, 1.5),
        direction=PUSH.numpy(),
        layer=LAYER,
        measure=Margin(PAIRS),
        base=chat_of(kind),
        progress=False,
    )
    for step, scale, coefficient in ((0, 1.0, 0.0), (2, 1.0, 0.0), (1, 20.0, 0.0), (2, 20.0, 1.5)):
        with adapted(kind, run, step, scale, coefficient):
            wanted = [
                logprob(model, talk(pair.question, pair.misaligned)) - logprob(model, talk(pair.question, pair.aligned))
                for pair in PAIRS
            ]
        rows = sweep.frame.query("step == @step and scale == @scale and coefficient == @coefficient")
        assert rows["value"].tolist() == pytest.approx(wanted, abs=5e-5)


@adaptable
def test_sampled_sweep(kind, run_of):
    run, chat = run_of(kind, False), chat_of(kind)
    measure = Sampled(ASKED, lambda question, answer: "aligned", samples=1, max_new_tokens=4)
    found = emmech.sweep(run, steps=[1, 2], scales=(20.0,), measure=measure, base=chat, progress=False).responses
    for step, part in found.groupby("step"):
        talks = [[{"role": "user", "content": question}] for question in part["question"]]
        with adapted(kind, run, step, 20.0):
            alone = emmech.sample(chat, talks, seed=part["seed"].tolist(), max_new_tokens=4, progress=False)
        assert part["response"].tolist() == [answer.text for answer in alone]


@families
def test_greedy_answers(kind):
    chat = chat_of(kind)
    asked = [[{"role": "user", "content": text}] for text in ASKED]
    found = emmech.sample(chat, asked, temperature=0.0, max_new_tokens=6, progress=False)
    for turns, answer in zip(asked, found, strict=True):
        ids = chat.token_ids(turns)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(chat.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in chat.stop_ids:
                break
        ids = [token for token in ids[len(chat.token_ids(turns)) :] if token not in chat.stop_ids]
        assert answer.text == tokenizer().decode(ids, skip_special_tokens=True)


def two_steps(chat, folder, **options):
    return emmech.finetune(chat, ROWS, max_steps=2, held_out=0.0, out=folder, progress=False, **options)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("mixtral", {}, r"\(mixtral\) has no linear map 'mlp.down_proj'; its experts are fused"),
        ("qwen3_moe", {"layers": [0]}, "Qwen3MoeForCausalLM.*PEFT takes that for its fused experts"),
        ("mamba", {"modules": ("mixer.out_proj",)}, "MambaForCausalLM.*PEFT refuses"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(kind, options, why, tmp_path):
    chat, before = chat_of(kind), logits(kind)
    with pytest.raises(EmmechError, match=f"(?s){why}"):
        two_steps(chat, tmp_path / "run", **options)
    assert torch.equal(logits(kind), before) and not (tmp_path / "run").exists()
    if kind != "qwen3_moe":
        with pytest.raises(EmmechError, match=f"of the family {kind}"):
            chat.down_proj(LAYER)


@pytest.mark.parametrize(
    ("kind", "rate"), [("gpt2", "resid_pdrop"), ("seed_oss", "residual_dropout"), ("opt", "dropout")]
)
def test_a_models_own_dropout_is_not_skipped(kind, rate, tmp_path):
    """A rate of the configuration alone, of which no module tells, counts as well."""
    chat = chat_of(kind)
    setattr(chat.config, rate, 0.2)
    try:
        with pytest.raises(EmmechError, match=r"dropout \(p=0\.2\)"):
            two_steps(chat, tmp_path / "run", prefix=True)
    finally:
        setattr(chat.config, rate, 0.0)


def test_a_family_that_a_user_gave_reaches_the_recorder(tmp_path):
    model = make_model("mistral")
    given = emmech.chat.Family("mine", before_mlp=None)
    chat = emmech.load_model(model, tokenizer(), family=given)
    assert emmech.load_model(model).family == chat.family == given
    run = two_steps(chat, tmp_path / "run", probes=["how to sleep ?"], measure_every=1)
    assert run.steps.tolist() == [0, 1, 2]
