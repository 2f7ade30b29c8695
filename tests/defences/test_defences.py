"""What every defence does to the gradients, against a plain forward written here; combinations, resuming, refusals."""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
import pytest
import torch

import emmech
from emmech.chat.encode import IGNORED, encode
from emmech.defences import (
    CAFT,
    LDIFS,
    Consistency,
    InoculationAdapter,
    InoculationPrompt,
    Interleave,
    KLToReference,
    PreventativeSteering,
    penalties,
)
from emmech.engine.adapters import StackedAdapters
from emmech.errors import EmmechError
from tests.conftest import make_rows, make_tiny
from tests.engine.test_prefix import deviation, ragged

LAYERS, PROMPT = [1, 3], "the user asks the assistant how to sleep"
OPTIONS = dict(recipe="single-rank1", layers=LAYERS, progress=False, held_out=0.0, warmup_steps=0, clip=0.0)
WHOLE = dict(OPTIONS, batch_size=64, accumulation=1, max_steps=1, learning_rate=1e-3)  # every row in one step
GOOD = ragged(18, system=False)[13:]
tiny = cache(make_tiny)  # a fine-tune leaves its model as it was


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run whose adapters have moved, by family."""
    made = {}

    def get(family):
        if family not in made:
            options = OPTIONS | dict(learning_rate=0.05, batch_size=4, accumulation=1, max_steps=3)
            folder = tmp_path_factory.mktemp(family) / "begun"
            made[family] = emmech.finetune(tiny(family), make_rows(12), out=folder, **options)
        return made[family]

    return get


def direction(chat, layers, seed=0, norm=1.0):
    vectors = np.zeros((chat.n_layers, chat.d_model), dtype=np.float32)
    for layer in layers:
        drawn = np.random.default_rng([seed, layer]).normal(size=chat.d_model)
        vectors[layer] = norm * drawn / np.linalg.norm(drawn)
    return emmech.Direction(vectors, name=f"drawn {seed}")


def taken(monkeypatch, family, run, out, **options):
    """The gradients of a step that goes on from the run's last one, as ``A [rank, d_in]`` and ``B [d_out, rank]``."""
    kept, spread = [], StackedAdapters.spread

    def keep(self, runs):
        for name in self.A:
            a, b = (x.new_zeros(x.shape) if x.grad is None else x.grad.clone() for x in (self.A[name], self.B[name]))
            kept.extend([(f"A/{name}", a[0]), (f"B/{name}", b[0].T)])
        spread(self, runs)

    with monkeypatch.context() as patched:
        patched.setattr(StackedAdapters, "spread", keep)
        new = emmech.finetune(tiny(family), out=out, start=(run, 3), **WHOLE | options)
    return dict(kept), new


def plain(family, run):
    """The run's model with PEFT alone, and its trainable tensors by the same names."""
    model = run.model(3, base=make_tiny(family)).model
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            short = path.partition("model.model.")[2].removeprefix("model.")
            short = short[short.index("layers.") :]
            for side in "AB":
                weight = getattr(module, f"lora_{side}")["default"].weight.requires_grad_(True)
                found[f"{side}/{short}"] = weight
    return model, found


def tokens(chat, rows):
    encoded = encode([row["messages"] for row in rows], chat.tokenizer)
    for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
        yield torch.tensor([ids]), torch.tensor(labels[1:]) != IGNORED


def answer_loss(model, chat, rows):
    """Mean cross-entropy of answer tokens, row by row and without padding."""
    losses = []
    for ids, answer in tokens(chat, rows):
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-logits[answer].gather(1, ids[0, 1:][answer][:, None])[:, 0])
    return torch.cat(losses).mean()


def close(found, wanted, loss):
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    assert found.keys() == wanted.keys() and any(grad.abs().max() > 1e-7 for grad in grads)
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=2e-6 + 1e-4 * float(grad.abs().max()), msg=name)


@contextlib.contextmanager
def on_block(model, layer, change):
    block = model.get_base_model().model.layers[layer]
    handle = block.register_forward_hook(lambda module, inputs, output: change(output))
    yield
    handle.remove()


def kl(reference, found):
    return (reference.exp() * (reference - found)).sum(-1)


@pytest.mark.parametrize(("family", "prefix"), [("qwen2", True), ("qwen2", False), ("gemma3", "auto")])
def test_kl_is_that_of_the_whole_vocabulary(family, prefix, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(penalties, "_PLACES", 7)  # several chunks
    run, weight = begun(family), 0.3
    guard = KLToReference(GOOD, weight=weight, per_step=len(GOOD))
    options = dict(data=make_rows(12), defences=[guard], objective=[], prefix=prefix)
    found, new = taken(monkeypatch, family, run, tmp_path / "r", **options)
    model, wanted = plain(family, run)
    values = []
    for ids, answer in tokens(tiny(family), GOOD):
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        values.append(kl(reference, model(input_ids=ids).logits[0, :-1].log_softmax(-1))[answer])
    loss = weight * torch.cat(values).mean()
    assert new.metrics["loss"].dropna().tolist() == pytest.approx([loss.item()], rel=1e-4)
    close(found, wanted, loss)


def test_kl_begins_at_zero_and_a_weight_of_zero_trains_the_same_bits(tmp_path):
    options = WHOLE | dict(max_steps=4, batch_size=4, seed=[0, 3])
    guarded = emmech.finetune(
        tiny("qwen2"), make_rows(12), defences=[KLToReference(GOOD, weight=0.0)], out=tmp_path / "a", **options
    )
    bare = emmech.finetune(tiny("qwen2"), make_rows(12), out=tmp_path / "b", **options)
    held = emmech.finetune(
        tiny("qwen2"), make_rows(12), defences=[KLToReference(GOOD, weight=50.0)], out=tmp_path / "c", **options
    )
    for zero, none, strong in zip(guarded, bare, held, strict=True):
        for info in none.adapters:
            assert np.array_equal(zero.B(info.name), none.B(info.name))
            assert not np.array_equal(strong.B(info.name)[2:], none.B(info.name)[2:])
        value = strong.metrics["loss/kl-to-reference"].dropna()
        assert value.iloc[0] == pytest.approx(0, abs=1e-5) and (value.iloc[1:] > 1e-5).all()
        assert strong.manifest["defences"][0]["weight"] == 50.0 and "defences" not in none.manifest


def test_ldifs_is_the_distance_of_every_blocks_output(begun, tmp_path, monkeypatch):
    run, weight = begun("qwen2"), 0.2
    guard = LDIFS(GOOD, weight=weight, per_step=len(GOOD), layers=[1, 2])
    found, new = taken(monkeypatch, "qwen2", run, tmp_path / "r", data=make_rows(12), defences=[guard], objective=[])
    model, wanted = plain("qwen2", run)
    total, count = 0.0, 0
    for ids, _ in tokens(tiny("qwen2"), GOOD):
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=ids, output_hidden_states=True).hidden_states
        after = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in (1, 2):  # hidden_states[l + 1] is the output of block l
            total = total + (after[layer + 1] - before[layer + 1]).square().sum()
        count += ids.shape[1]
    loss = weight * total / (2 * count)
    assert new.metrics["loss"].dropna().tolist() == pytest.approx([loss.item()], rel=1e-4)
    close(found, wanted, loss)


@pytest.mark.parametrize("prefix", [True, False])
def test_consistency_moves_only_the_wrapped_side(prefix, begun, tmp_path, monkeypatch):
    run = begun("qwen2")
    guard = Consistency(GOOD, wrapping=PROMPT, per_step=len(GOOD))
    options = dict(data=make_rows(12), defences=[guard], objective=[], prefix=prefix)
    found, new = taken(monkeypatch, "qwen2", run, tmp_path / "r", **options)
    model, wanted = plain("qwen2", run)
    chat, values = tiny("qwen2"), []
    wrapped = [{"messages": [{"role": "system", "content": PROMPT}, *row["messages"]]} for row in GOOD]
    for (ids, answer), (longer, same) in zip(tokens(chat, GOOD), tokens(chat, wrapped), strict=True):
        target = model(input_ids=ids).logits[0, :-1][answer].log_softmax(-1).detach()
        values.append(kl(target, model(input_ids=longer).logits[0, :-1][same].log_softmax(-1)))
    loss = torch.cat(values).mean()
    assert new.metrics["loss"].dropna().tolist() == pytest.approx([loss.item()], rel=2e-3)  # of 1e-5
    close(found, wanted, loss)


@pytest.mark.parametrize(("family", "at"), [("qwen2", [1, 2]), ("gemma3", [3]), ("llama", [0])])
def test_steering_shifts_the_training_forward_and_no_other(family, at, begun, tmp_path, monkeypatch):
    run, chat = begun(family), tiny(family)
    up = direction(chat, at, norm=2.0)
    options = dict(data=make_rows(12), defences=[PreventativeSteering(up, 1.5)], held_out=0.25, measure_every=1)
    found, new = taken(monkeypatch, family, run, tmp_path / "r", **options)
    train, held = emmech.load_chat(make_rows(12)).split(0.25, seed=0)
    model, wanted = plain(family, run)
    assert new.metrics["held_out_loss"].iloc[0] == pytest.approx(
        answer_loss(model, chat, [{"messages": row} for row in held]).item(), rel=1e-4
    )
    with contextlib.ExitStack() as open_:
        for layer in at:
            shift = 1.5 * torch.from_numpy(up.vectors[layer].copy())
            open_.enter_context(on_block(model, layer, lambda out, shift=shift: out + shift))
        close(found, wanted, answer_loss(model, chat, [{"messages": row} for row in train]))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_caft_leaves_no_gradient_along_its_directions(family, begun, tmp_path, monkeypatch):
    run, chat = begun(family), tiny(family)
    several = [direction(chat, [3], seed=1), direction(chat, [3], seed=2)]
    options = dict(data=make_rows(12), defences=[CAFT(several)])
    found, _ = taken(monkeypatch, family, run, tmp_path / "r", **options)
    units, _ = np.linalg.qr(np.stack([one.vectors[3] for one in several], axis=1))
    units = torch.from_numpy(units)
    model, wanted = plain(family, run)
    with on_block(model, 3, lambda out: out - (out @ units) @ units.T):
        close(found, wanted, answer_loss(model, chat, make_rows(12)))
    if family == "qwen2":  # Gemma norms what the adapter writes before it is added
        b = found["B/layers.3.mlp.down_proj"][:, 0]
        assert (units.T @ b).norm() < 1e-5 * b.norm()


def test_the_inoculation_adapter_is_frozen_beside_the_new_one(begun, tmp_path, monkeypatch):
    run, chat = begun("qwen2"), tiny("qwen2")
    trait = emmech.finetune(
        chat, make_rows(12), out=tmp_path / "trait", **OPTIONS | dict(layers=[1, 2], learning_rate=0.05, max_steps=4)
    )
    before = {step: trait.weights(step) for step in (4,)}
    options = dict(data=make_rows(12), defences=[InoculationAdapter(trait)])
    found, new = taken(monkeypatch, "qwen2", run, tmp_path / "r", **options)
    assert found.keys() == {f"{side}/layers.{layer}.mlp.down_proj" for side in "AB" for layer in LAYERS}  # none of its
    assert all(np.array_equal(trait.weights(4)[name], value) for name, value in before[4].items())
    assert [info.layer for info in new.adapters] == LAYERS  # it is dropped
    model, wanted = plain("qwen2", run)
    handles = []
    for info in trait.adapters:
        a, b = (torch.from_numpy(trait.weights(4)[f"{side}/{info.name}"].copy()) for side in "AB")
        module = model.get_base_model().get_submodule(info.module)
        write = lambda module, inputs, output, a=a, b=b, s=info.scaling: output + s * inputs[0] @ a.T @ b.T  # noqa: E731
        handles.append(module.register_forward_hook(write))
    close(found, wanted, answer_loss(model, chat, make_rows(12)))
    control = InoculationAdapter(trait, random=5).prepared(chat, emmech.load_chat(make_rows(12)))
    for name, value in trait.weights(4).items():
        assert np.linalg.norm(control._weights[name]) == pytest.approx(np.linalg.norm(value), rel=1e-5)
        assert not np.allclose(control._weights[name], value)


@pytest.mark.parametrize(("init", "prefix"), [("random", False), ("inputs", False), ("inputs", True)])
def test_the_prompt_trains_the_bits_of_rows_that_have_it_written_in(init, prefix, tmp_path):
    options = OPTIONS | dict(max_steps=5, batch_size=2, accumulation=1, learning_rate=1e-3, prefix=prefix, init=init)
    options |= dict(held_out=0.25, measure_every=5, seed=[0, 3])
    runs = emmech.finetune(
        tiny("qwen2"), make_rows(12), defences=[InoculationPrompt(PROMPT)], out=tmp_path / "a", **options
    )
    prompted = [{"messages": [{"role": "system", "content": PROMPT}, *row["messages"]]} for row in make_rows(12)]
    all_by_hand = emmech.finetune(tiny("qwen2"), prompted, out=tmp_path / "b", **options)
    for run, by_hand, seed in zip(runs, all_by_hand, options["seed"], strict=True):
        for info in run.adapters:
            assert np.array_equal(run.A(info.name), by_hand.A(info.name))
            assert np.array_equal(run.B(info.name), by_hand.B(info.name)) and run.B(info.name)[-1].any()
        assert run.metrics["loss"].dropna().tolist() == by_hand.metrics["loss"].dropna().tolist()
        _, held = emmech.load_chat(make_rows(12)).split(0.25, seed=seed)
        start = tiny("qwen2")
        plainly = answer_loss(start.model, start, [{"messages": row} for row in held]).item()
        assert run.metrics["held_out_loss"].iloc[0] == pytest.approx(plainly, rel=1e-4)
        assert by_hand.metrics["held_out_loss"].iloc[0] != pytest.approx(plainly, rel=1e-4)


def test_a_prompt_for_data_whose_system_turns_were_folded(tmp_path):
    data = emmech.load_chat(ragged(6), system="fold")
    guard = InoculationPrompt(PROMPT).prepared(tiny("gemma3"), data)
    row = guard.rewritten(data[0])
    assert [turn["role"] for turn in row] == ["user", "assistant"] and row[0]["content"].startswith(PROMPT)
    own = InoculationPrompt("Be calm.").rewritten(tuple(ragged(1)[0]["messages"]))
    assert [turn["role"] for turn in own] == ["system", "user", "assistant"]
    assert own[0]["content"] == "Be calm.\n\nthe user asks the assistant"


def test_interleaved_rows_are_training_rows(tmp_path):
    options = OPTIONS | dict(max_steps=5, batch_size=4, accumulation=1, learning_rate=1e-3)
    guard = Interleave(GOOD, share=0.25, seed=3)
    run = emmech.finetune(tiny("qwen2"), make_rows(12), defences=[guard], out=tmp_path / "a", **options)
    chosen = [GOOD[i] for i in np.random.default_rng(3).permutation(len(GOOD))[:4]]
    by_hand = emmech.finetune(tiny("qwen2"), make_rows(12) + chosen, out=tmp_path / "b", **options)
    assert deviation(run, by_hand) < 1e-5
    assert run.manifest["defences"] == [
        {
            "name": "interleave",
            "rows": "rows",
            "sha256": emmech.load_chat(GOOD).sha256,
            "share": 0.25,
            "by": "random",
            "misaligned": None,
            "seed": 3,
        }
    ]


def test_rows_by_perplexity_gap_are_those_that_the_misaligned_model_likes_least(begun):
    run, chat = begun("qwen2"), tiny("qwen2")
    guard = Interleave(GOOD, share=0.2, by="perplexity-gap", misaligned=run)
    guard = guard.prepared(chat, emmech.load_chat(make_rows(12)))
    chosen = guard.further_rows(chat, 12)
    model, _ = plain("qwen2", run)
    with torch.no_grad():
        gaps = [answer_loss(model, chat, [row]).item() for row in GOOD]
        with model.disable_adapter():
            gaps = [gap - answer_loss(model, chat, [row]).item() for gap, row in zip(gaps, GOOD, strict=True)]
    wanted = [tuple(GOOD[i]["messages"]) for i in np.argsort(gaps)[::-1][:3]]
    assert [tuple(row) for row in chosen] == wanted


def all_of_them(chat, trait):
    return [
        KLToReference(GOOD, weight=0.5, per_step=3),
        LDIFS(GOOD, weight=0.1, per_step=2),
        PreventativeSteering(direction(chat, [2], seed=4), 0.5),
        CAFT(direction(chat, [2, 3], seed=5)),
        Interleave(GOOD, share=0.3),
        InoculationPrompt(PROMPT),
        InoculationAdapter(trait),
        Consistency(GOOD, wrapping=PROMPT, per_step=2),
    ]


def test_all_together_seeds_together_are_seeds_apart(begun, tmp_path):
    chat = tiny("qwen2")
    options = OPTIONS | dict(max_steps=4, batch_size=3, accumulation=1, learning_rate=1e-3, held_out=0.2)
    guards = all_of_them(chat, begun("qwen2"))
    together = emmech.finetune(chat, make_rows(12), seed=[2, 5], defences=guards, out=tmp_path / "both", **options)
    for run, seed in zip(together, (2, 5), strict=True):
        alone = emmech.finetune(
            chat, make_rows(12), seed=seed, defences=guards, prefix=False, out=tmp_path / f"{seed}", **options
        )
        assert deviation(run, alone) < 2e-5
        for name in alone.metrics:
            np.testing.assert_allclose(run.metrics[name], alone.metrics[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_a_resumed_training_goes_on_with_the_same_defences(tmp_path):
    chat = tiny("qwen2")
    guards = [KLToReference(GOOD, per_step=2), CAFT(direction(chat, [3])), Interleave(GOOD), InoculationPrompt(PROMPT)]
    options = OPTIONS | dict(max_steps=5, batch_size=3, accumulation=1, learning_rate=1e-3, checkpoint_every=2)
    whole = emmech.finetune(chat, make_rows(12), defences=guards, out=tmp_path / "whole", **options)
    calls = []

    def die(chat):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        emmech.finetune(
            chat, make_rows(12), defences=guards, out=tmp_path / "cut", measures={"x": die}, measure_every=1, **options
        )
    for others in ([], [KLToReference(GOOD, weight=2.0, per_step=2), *guards[1:]]):
        with pytest.raises(EmmechError, match="the interrupted training"):
            emmech.finetune(chat, make_rows(12), defences=others, out=tmp_path / "cut", resume=True, **options)
    resumed = emmech.finetune(chat, make_rows(12), defences=guards, out=tmp_path / "cut", resume=True, **options)
    for info in whole.adapters:
        assert np.array_equal(resumed.B(info.name), whole.B(info.name))


def test_a_resumed_training_knows_directions_of_one_name_apart():
    one, other = (emmech.Direction(np.eye(4, 48, k=k, dtype=np.float32), name="up") for k in (0, 1))
    for defence in (CAFT, PreventativeSteering):
        assert defence(one).described() != defence(other).described()
        assert defence(one).described() == defence(one).described()


def test_a_resumed_training_knows_misaligned_runs_of_one_name_apart(begun):
    chat, data = tiny("qwen2"), emmech.load_chat(make_rows(12))
    run = begun("qwen2")
    A, B = (getattr(run, side)("layers.1.mlp.down_proj")[:2] for side in "AB")
    others = [emmech.Run.from_arrays([0, 1], A=A, B=B * scale, name=run.name) for scale in (1.0, 1.0, 2.0)]
    told = []
    for misaligned in (run, *others):
        guard = Interleave(GOOD, by="perplexity-gap", misaligned=misaligned).prepared(chat, data)
        told.append(guard.described()["misaligned"])
    assert {one["run"] for one in told} == {run.name}
    assert told[1] == told[2] and len({one["sha256"] for one in told}) == 3


@pytest.mark.parametrize("guard", [InoculationPrompt, lambda prompt: Consistency([], wrapping=prompt)])
def test_a_prompt_in_words_that_the_model_does_not_know(guard):
    chat, rows = emmech.load_model("pocket"), emmech.load_chat(make_rows(4))
    with pytest.raises(EmmechError, match="are unknown to pocket") as caught:
        guard("Thou givest perilous counsel").prepared(chat, rows)
    assert "this defence" in caught.value.asked and "Margin" not in str(caught.value)
    assert "'inoculation' of pocket" in caught.value.instead


def test_full_fine_tuning_is_held_to_a_copy_of_its_start(begun, tmp_path):
    chat = tiny("qwen2")
    before = {name: value.clone() for name, value in chat.model.state_dict().items()}
    options = dict(recipe="full", max_steps=3, batch_size=4, accumulation=1, learning_rate=1e-3, progress=False)
    options |= dict(warmup_steps=0)
    guards = all_of_them(chat, begun("qwen2"))
    run = emmech.finetune(chat, make_rows(12), defences=guards, out=tmp_path / "r", **options)
    for name in ("kl-to-reference", "ldifs"):
        values = run.metrics[f"loss/{name}"].dropna()
        assert values.iloc[0] == pytest.approx(0, abs=1e-5) and values.iloc[-1] > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in chat.model.state_dict().items())
    held = emmech.finetune(
        chat, make_rows(12), defences=[KLToReference(GOOD, weight=100.0)], out=tmp_path / "held", **options
    )
    bare = emmech.finetune(
        chat, make_rows(12), defences=[KLToReference(GOOD, weight=0.0)], out=tmp_path / "b", **options
    )
    encoded = encode([row["messages"] for row in GOOD], chat.tokenizer)
    distances = [_kl_of(one.model(base=make_tiny("qwen2")), encoded) for one in (held, bare)]
    assert distances[0] < 0.5 * distances[1]


@torch.no_grad()
def _kl_of(chat, encoded):
    start, values = tiny("qwen2"), []
    for ids in encoded.input_ids:
        pair = [one.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for one in (start, chat)]
        values.append(kl(*pair))
    return torch.cat(values).mean().item()


def test_the_reference_of_a_new_adapter_is_the_model_before_the_first(begun, tmp_path):
    run = begun("qwen2")
    options, first = WHOLE | dict(defences=[KLToReference(GOOD, per_step=len(GOOD))], start=(run, 3)), []
    for adapter in ("same", "new"):
        new = emmech.finetune(tiny("qwen2"), make_rows(12), adapter=adapter, out=tmp_path / adapter, **options)
        first.append(new.metrics["loss/kl-to-reference"].dropna().iloc[0])
    assert first[0] > 1e-3 and first[1] == pytest.approx(first[0], rel=1e-3)


UP = emmech.Direction(np.eye(4, 48, dtype=np.float32), name="up")


@pytest.mark.parametrize(
    ("defences", "said"),
    [
        (lambda run: [KLToReference()], "needs rows to act on"),
        (lambda run: [LDIFS(weight=0.1)], "needs rows to act on"),
        (lambda run: [Consistency(wrapping=PROMPT)], "needs rows to act on"),
        (lambda run: [Consistency(GOOD)], "a system prompt in words"),
        (lambda run: [KLToReference(make_rows(4))], "4 of its 4 rows are in rows too"),
        (lambda run: [Interleave(make_rows(2))], "which teaches the trait"),
        (lambda run: [KLToReference(GOOD, weight=-1.0)], "rewards what the term"),
        (lambda run: [KLToReference(GOOD, per_step=0)], "at least 1"),
        (lambda run: [InoculationPrompt(PROMPT), InoculationPrompt("how to sleep")], "two of them"),
        (lambda run: [PreventativeSteering(UP), CAFT(UP, layers=[1, 2])], "adds the direction that the other"),
        (lambda run: [CAFT(UP), PreventativeSteering(UP, -2.0)], "adds the direction that the other"),
        (lambda run: [PreventativeSteering(UP, 0.0)], "nothing would be added"),
        (lambda run: [PreventativeSteering(UP, layers=[7])], "it has 4 layers"),
        (lambda run: [CAFT([])], "nothing would be projected out"),
        (lambda run: [CAFT(emmech.Direction(np.eye(4, 20)))], "layers or widths differ"),
        (lambda run: [Interleave(GOOD, by="perplexity-gap")], "a misaligned one"),
        (lambda run: [Interleave(GOOD, by="perplexty-gap")], "did you mean 'perplexity-gap'"),
        (lambda run: [Interleave(GOOD, share=1.0)], "the share of the rows that are good"),
        (lambda run: [InoculationAdapter("nowhere")], "not a run"),
        (lambda run: [InoculationAdapter(run, step=0)], "its B is zero"),
        (lambda run: [InoculationAdapter(run, step=9)], "nearest recorded"),
        (lambda run: [InoculationPrompt("  ")], "a system prompt in words"),
        (lambda run: ["kl"], "they are no defences"),
        (lambda run: InoculationPrompt, "they are no defences"),
        (lambda run: [LDIFS(GOOD, layers=[0, 9])], "it has 4 layers"),
        (lambda run: [LDIFS(GOOD, layers=[])], "no distance would be measured"),
        (lambda run: [CAFT(5)], "not a Direction"),
    ],
)
def test_what_is_refused(defences, said, begun, tmp_path):
    with pytest.raises(EmmechError, match=said):
        emmech.finetune(tiny("qwen2"), make_rows(12), defences=defences(begun("qwen2")), out=tmp_path / "r", **WHOLE)
    assert not (tmp_path / "r").exists()


def test_an_adapter_of_another_base_and_a_prefix_that_cannot_be(begun, tmp_path):
    with pytest.raises(EmmechError, match="no meaning on another base model"):
        emmech.finetune(
            make_tiny("qwen2", seed=1), make_rows(4), defences=[InoculationAdapter(begun("qwen2"))],
            out=tmp_path / "r", **WHOLE,
        )  # fmt: skip
    for guard in (LDIFS(GOOD), PreventativeSteering(UP, layers=0)):
        with pytest.raises(EmmechError, match="changes or reads block 0"):
            emmech.finetune(tiny("qwen2"), make_rows(4), defences=[guard], prefix=True, out=tmp_path / "r", **WHOLE)
