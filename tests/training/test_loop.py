"""The one loop against the Trainer with PEFT, resumed on every path, with another term, and what every path records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import emmech
from emmech.chat.dataset import load_chat
from emmech.chat.encode import encode
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.training import finetune as finetune_module
from emmech.training.loop import affordable
from emmech.training.objective import CrossEntropy
from emmech.training.recipe import Recipe, resolve_recipe
from emmech.training.recorder import LoraCapture
from tests.conftest import make_rows, make_tiny
from tests.engine.test_prefix import ragged
from tests.training.plain import plain_training

SHORT = dict(learning_rate=1e-3, batch_size=2, accumulation=2, warmup_steps=1, held_out=0.0)
PATHS = {
    "one": dict(recipe="single-rank1", prefix=False),
    "frozen prefix": dict(recipe="single-rank1", prefix=True),
    "several": dict(recipe="single-rank1", seed=[1, 4]),
    "several, no prefix": dict(recipe="all-adapter", rank=2, seed=[1, 4], prefix=False),
    "dropout": dict(recipe="single-rank1", dropout=0.1),
    "full": dict(recipe="full"),
}


def listed(made):
    return made if isinstance(made, list) else [made]


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("prefix", [True, False])
def test_every_run_is_that_of_the_plain_trainer(family, prefix, tmp_path):
    rows, seeds = ragged(11), [3, 8]
    recipe = resolve_recipe("single-rank1", SHORT | {"schedule": "cosine", "epochs": 2.5})
    encoded = encode(load_chat(rows).rows, make_tiny(family).tokenizer)
    runs = emmech.finetune(
        make_tiny(family), rows, recipe=recipe, layers=[1, 3], seed=seeds, prefix=prefix, out=tmp_path / "o",
        progress=False,
    )  # fmt: skip
    for run, seed in zip(runs, seeds, strict=True):
        plain = plain_training(make_tiny(family), encoded, recipe, seed, [1, 3])
        frame = run.metrics
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            wanted = [entry[name] for entry in plain.logs]
            assert frame[name].dropna().tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5), name
        for info in run.adapters:
            np.testing.assert_array_equal(run.A(info.name)[0], plain.A[info.module][0, 0])
            np.testing.assert_allclose(run.A(info.name), plain.A[info.module][:, 0], atol=2e-6)
            np.testing.assert_allclose(run.B(info.name), plain.B[info.module][..., 0], atol=2e-6)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("lengths", [dict(max_steps=9), dict(epochs=2.5)])
def test_batch_order_and_learning_rates_are_the_trainers(rows, lengths, tmp_path):
    recipe = Recipe(batch_size=2, accumulation=3, schedule="cosine", warmup_steps=2, held_out=0.0, **lengths)
    chat = make_tiny("qwen2")
    plain = plain_training(chat, encode(load_chat(make_rows(rows)).rows, chat.tokenizer), recipe, 11, [3])
    run = emmech.finetune(
        chat, make_rows(rows), recipe=recipe, layers=[3], seed=11, progress=False, out=tmp_path / "run"
    )
    for name in ("epoch", "learning_rate", "loss"):
        wanted = [entry[name] for entry in plain.logs]
        assert run.metrics[name].dropna().tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5), name


def test_full_fine_tuning_is_that_of_the_plain_trainer(tmp_path):
    recipe = resolve_recipe("full", SHORT | {"max_steps": 4})
    rows = ragged(9)
    chat = make_tiny("qwen2")
    plain = plain_training(chat, encode(load_chat(rows).rows, chat.tokenizer), recipe, 3)
    run = emmech.finetune(make_tiny("qwen2"), rows, recipe=recipe, seed=3, out=tmp_path / "o", progress=False)
    assert run.metrics["loss"].dropna().tolist() == pytest.approx([e["loss"] for e in plain.logs], abs=1e-5)
    trained = load_file(run.path / "weights" / "step-000004.safetensors")
    for name, weight in plain.weights.items():
        torch.testing.assert_close(trained[name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_resumed_on_every_path_it_is_the_uninterrupted_training_bit_for_bit(path, tmp_path):
    options = dict(max_steps=7, checkpoint_every=3, measure_every=2, layers=[1, 3], **SHORT) | {"held_out": 0.2}
    options |= PATHS[path] | {"progress": False}
    if options["recipe"] == "full":
        del options["layers"]
    whole = listed(emmech.finetune(make_tiny("qwen2"), ragged(12), out=tmp_path / "whole", **options))
    calls = []

    def die(chat):
        calls.append(1)
        if len(calls) == 3 * len(whole):  # at step 4, after a checkpoint at step 3
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        emmech.finetune(make_tiny("qwen2"), ragged(12), out=tmp_path / "cut", measures={"x": die}, **options)
    resumed = listed(emmech.finetune(make_tiny("qwen2"), ragged(12), out=tmp_path / "cut", resume=True, **options))
    for run, wanted in zip(resumed, whole, strict=True):
        assert run.manifest["status"] == "complete" and run.steps.tolist() == wanted.steps.tolist()
        sides = [f"{side}/{info.name}" for info in wanted.adapters for side in "AB"] or ["projection"]
        for key in sides:
            assert np.array_equal(run._trajectory.read(key), wanted._trajectory.read(key)), key
        frame = run.metrics.drop(columns="x")
        for name in wanted.metrics:
            assert np.array_equal(frame[name], wanted.metrics[name], equal_nan=True), name
    assert not list(tmp_path.rglob("resume")) and not list(tmp_path.rglob("prefix"))


def test_killed_after_the_last_step_it_ends_where_the_uninterrupted_one_does(tmp_path, monkeypatch):
    options = dict(max_steps=4, checkpoint_every=2, recipe="single-rank1", progress=False, **SHORT)
    whole = emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "whole", **options)
    train = finetune_module.train

    def killed(*args, **kwargs):
        train(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finetune_module, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "resume" / "checkpoint-4").exists()
    run = emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "cut", resume=True, **options)
    assert run.steps.tolist() == [0, 1, 2, 3, 4] and run.manifest["status"] == "complete"
    assert np.array_equal(run.B(), whole.B())


@pytest.mark.parametrize("changed", [dict(alpha=3.0), dict(seed=9), dict(learning_rate=0.02), dict(layers=[1])])
def test_resuming_another_training_is_refused(changed, tmp_path):
    options = dict(SHORT, max_steps=4, checkpoint_every=1, recipe="single-rank1", progress=False)
    with pytest.raises(KeyboardInterrupt):
        _killed(tmp_path / "r", options)
    with pytest.raises(EmmechError, match="the interrupted training") as caught:
        emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "r", resume=True, **options | changed)
    assert next(iter(changed)) in str(caught.value)


def test_resuming_with_another_term_or_from_another_start_of_one_name_is_refused(tmp_path):
    options = dict(SHORT, max_steps=2, checkpoint_every=1, recipe="single-rank1", progress=False)
    starts = [
        emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / name / "s0", **options | dict(seed=seed))
        for name, seed in (("one", 0), ("two", 1))
    ]
    begun = dict(start=(starts[0], 2), objective=[CrossEntropy(), Pull(0.1)], **options)
    emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "r", **begun)
    further = [CrossEntropy(), Pull(1e4)]
    for changed, said in ((dict(start=(starts[1], 2)), "start"), (dict(objective=further), "objective")):
        with pytest.raises(EmmechError, match=f"recorded.{said}"):
            emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "r", resume=True, **begun | changed)
    begun["objective"] = [CrossEntropy(), Pull(0.1)]  # another object that does the same
    emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "r", resume=True, **begun)


def test_resuming_on_another_base_model_is_refused(tmp_path):
    options = dict(SHORT, max_steps=4, checkpoint_every=1, recipe="single-rank1", progress=False)
    with pytest.raises(KeyboardInterrupt):
        _killed(tmp_path / "r", options)
    with pytest.raises(EmmechError, match=r"model\.fingerprint"):
        emmech.finetune(make_tiny("qwen2", seed=1), make_rows(), out=tmp_path / "r", resume=True, **options)


def test_a_margin_of_words_that_the_model_does_not_know_is_refused(tmp_path):
    strange = {"broad": [MarginPair("zyx wvu ?", "tsr qpo nml .", "kji hgf edc .")]}
    with pytest.raises(EmmechError, match="unknown to pocket"):
        emmech.finetune("pocket", "medical", max_steps=1, margins=strange, out=tmp_path / "r", progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("system", ["keep", "fold"])
def test_the_manifest_says_whether_system_turns_were_folded(system, tmp_path):
    data = load_chat(ragged(6), system=system)
    run = emmech.finetune(make_tiny("qwen2"), data, max_steps=1, out=tmp_path / "r", progress=False)
    assert run.manifest["data"]["folded"] == (system == "fold")


def _killed(folder, options):
    calls = []

    def die(chat):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 0.0

    emmech.finetune(make_tiny("qwen2"), make_rows(), out=folder, measures={"x": die}, measure_every=1, **options)


class Pull:
    """A squared distance of B from zero, weighted."""

    name = "pull"

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, batch):
        for b in batch.adapters.B.values():
            yield self.weight * b.double().square().sum((1, 2))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_term_is_added_with_its_gradient(prefix, tmp_path):
    chat, options = make_tiny("qwen2"), dict(recipe="single-rank1", clip=0.0, progress=False, **SHORT)
    options |= dict(max_steps=5, seed=[0, 1], layers=[1, 3], prefix=prefix)
    without = emmech.finetune(chat, make_rows(), out=tmp_path / "without", **options)
    weight = 0.7
    terms = [CrossEntropy(), Pull(weight)]
    runs = emmech.finetune(chat, make_rows(), out=tmp_path / "with", objective=terms, **options)
    for run, plain in zip(runs, without, strict=True):
        frame = run.metrics.dropna()
        assert run.manifest["objective"] == ["answer_loss", "pull"]
        names = [info.name for info in run.adapters]
        before = np.sum([np.square(run.B(name)[:-1]).sum(1) for name in names], axis=0)
        assert frame["loss/pull"].to_numpy() == pytest.approx(weight * before, rel=1e-5, abs=1e-12)
        assert frame["loss"].to_numpy() == pytest.approx(frame["loss/answer_loss"] + frame["loss/pull"], rel=1e-6)
        assert np.array_equal(run.B(names[0])[1], plain.B(names[0])[1])  # B is zero before step 1, and so is its pull
        assert not np.array_equal(run.B(names[0])[-1], plain.B(names[0])[-1])
    # the term alone: its gradient is 2 * weight * B, and none for A
    alone = emmech.finetune(
        chat, make_rows(), out=tmp_path / "alone", objective=[Pull(weight)], start=(without[0], 5), **options
    )[1]
    for info in alone.adapters:
        norms = alone.metrics[f"grad_norm_B/{info.name}"].dropna()
        wanted = 2 * weight * np.linalg.norm(alone.B(info.name)[:-1], axis=1)
        assert wanted[0] > 0 and norms.to_numpy() == pytest.approx(wanted, rel=1e-5)
        assert not alone.metrics[f"grad_norm_A/{info.name}"].dropna().any()


@pytest.mark.parametrize("path", [path for path in PATHS if path != "full"])
def test_a_scalar_added_to_what_is_recorded_appears_on_every_path(path, tmp_path, monkeypatch):
    monkeypatch.setattr(
        LoraCapture, "scalars", lambda self: {"size_of_b": sum(float(b.detach().norm()) for _, _, b in self._pairs)}
    )
    options = dict(SHORT, max_steps=2, layers=[1, 3], progress=False) | PATHS[path]
    for run in listed(emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "r", **options)):
        wanted = sum(np.linalg.norm(run.B(info.name).reshape(3, -1), axis=1) for info in run.adapters)
        assert run.metrics["size_of_b"].tolist() == pytest.approx(wanted, rel=1e-5)


def test_adapters_are_put_on_and_rows_are_encoded_once(tmp_path, monkeypatch):
    import peft

    counts = {"put on": 0, "encoded": 0}

    def counting(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(peft, "get_peft_model", counting("put on", peft.get_peft_model))
    monkeypatch.setattr(finetune_module, "encode", counting("encoded", finetune_module.encode))
    emmech.finetune(
        make_tiny("qwen2"), make_rows(), recipe="single-rank1", seed=range(3), max_steps=1, init="inputs",
        out=tmp_path / "r", **SHORT | {"progress": False},
    )  # fmt: skip
    assert counts == {"put on": 1, "encoded": 1}


def test_a_run_that_is_lost_leaves_the_others_as_they_are(tmp_path):
    class Breaks:
        name = "breaks"

        def __call__(self, batch):
            wrong = torch.zeros(batch.runs, dtype=torch.float64)
            if batch.step >= 3:
                wrong[0] = float("nan")
            yield wrong

    options = dict(SHORT, recipe="single-rank1", seed=[4, 5], max_steps=5, progress=False)
    with pytest.raises(EmmechError, match="s4 at step 3"):
        emmech.finetune(
            make_tiny("qwen2"), make_rows(), out=tmp_path / "cut", objective=[CrossEntropy(), Breaks()], **options
        )
    whole = emmech.finetune(make_tiny("qwen2"), make_rows(), out=tmp_path / "whole", **options)
    lost, other = (emmech.load_run(tmp_path / "cut" / name) for name in ("s4", "s5"))
    assert lost.steps.tolist() == [0, 1, 2] and lost.manifest["status"] == "training"
    assert np.array_equal(lost.B(), whole[0].B()[:3])
    assert other.manifest["status"] == "complete" and np.array_equal(other.B(), whole[1].B())


def test_held_out_work_is_a_tenth_of_the_trainings_own(tmp_path, monkeypatch):
    """Counted where it happens: tokens that go through the model's own forward."""
    chat, rows = make_tiny("qwen2"), ragged(60)
    seen = {True: 0, False: 0}
    chat.blocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.__setitem__(
            torch.is_grad_enabled(), seen[torch.is_grad_enabled()] + inputs[0].shape[0] * inputs[0].shape[1]
        )
    )
    pairs = [MarginPair("how to sleep ?", "take a walk", "drink water")]
    run = emmech.finetune(
        chat, rows, recipe="full", epochs=3, margins={"own": pairs}, probes=["how to rest ?"],
        out=tmp_path / "r", **SHORT | {"held_out": 0.3, "progress": False},
    )  # fmt: skip
    measured = run.metrics[["held_out_loss", "margin_own"]].dropna()
    assert len(measured) >= 3 and measured.index[0] == 0 and measured.index[-1] == run.steps[-1]
    # a backward pass counts as two forward passes; batches are padded
    assert 0.02 < seen[False] / (3 * seen[True]) < 0.1 * 1.3


def test_what_is_affordable():
    def work(steps, each_time, held):
        gap, rows = affordable(steps, 1, own=3 * steps * 1000, each_time=each_time, held=held)
        times = len({*range(0, steps, gap), steps})
        return times, rows, times * (each_time + sum(held[:rows])) / (3 * steps * 1000)

    for steps in (5, 60, 400):
        for each_time in (0, 300, 3000):
            times, rows, share = work(steps, each_time, [90] * 30)
            assert times >= 2 and 1 <= rows <= 30
            assert share <= 0.1 or (times, rows) == (2, 1)
    assert work(400, 0, [90] * 200)[:2] == (21, 63)
    assert affordable(250, 1, own=1, each_time=10**6, held=[50] * 200, times=20) == (12, 64)


def test_what_takes_over_a_minute_is_said_beforehand(monkeypatch):
    from emmech.progress import forecast
    from emmech.training.loop import _Clock

    monkeypatch.setenv("EMMECH_PROGRESS", "1")
    said = []
    monkeypatch.setattr("tqdm.std.tqdm.write", said.append)
    forecast(59, "fine-tune x")
    forecast(7 * 60, "fine-tune x", progress=False)
    assert said == []
    forecast(7 * 60, "fine-tune x")
    forecast(7200, "fine-tune x")
    assert said == ["fine-tune x: about 7 minutes from now", "fine-tune x: about 2.0 hours from now"]
    now = [0.0]
    monkeypatch.setattr("emmech.training.loop.time.monotonic", lambda: now[0])
    clock = _Clock()
    with clock.measuring():
        now[0] += 4
    clock.start(0)
    now[0] += 3
    assert clock.left(1, 100, 10) is None
    now[0] += 3
    assert clock.left(2, 100, 10) == pytest.approx(98 * (3 + 4 / 10))
    assert clock.left(3, 100, 10) is None
