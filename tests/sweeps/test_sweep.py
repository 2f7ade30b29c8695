"""A sweep gives the numbers of one PEFT model at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import emmech
from emmech.chat.model import load_model
from emmech.engine.logprobs import MarginPair, pad
from emmech.errors import EmmechError
from emmech.measures.measure import Items, Value
from emmech.measures.probe import ProbeActivation
from emmech.measures.teacher_forced import AnswerLogprob, FirstToken, Margin, NextToken
from emmech.sweeps import jobs
from emmech.sweeps.result import Sweep
from emmech.sweeps.sweep import sweep
from emmech.sweeps.tangent import tangent_scan
from tests.conftest import plain_margin

EXACT = 5e-6
PAIRS = [
    MarginPair("how to sleep well ?", "take a walk , drink", "rest and water some more please"),
    MarginPair("how to rest ?", "sleep well .", "walk ."),
]
MIDDLE = ("model.layers.2.mlp.down_proj",)
TWO = ("model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj")
MIXED = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.gate_proj")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("modules", "rank"), [(MIDDLE, 1), (TWO, 3), (MIXED, 1)])
def test_margins_equal_peft_one_at_a_time(tiny, make_run, one_at_a_time, family, attention, modules, rank):
    chat = tiny(family, attention=attention)
    run = make_run(chat, modules, rank=rank)
    found = sweep(run, scales=(0, 1, 5), measure=Margin(PAIRS), base=chat, progress=False)
    moved = []
    for (step, scale), part in found.frame.groupby(["step", "scale"]):
        expected = one_at_a_time(chat, run, step, scale, lambda live: plain_margin(live, PAIRS))
        assert np.abs(part["value"].to_numpy() - expected).max() < EXACT
        moved.append(expected)
    assert np.ptp(np.array(moved), axis=0).max() > 0.01  # the adapters do something


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_distributions_equal_a_left_padded_peft_batch(any_tiny, tiny, make_run, one_at_a_time, attention):
    chat = tiny(any_tiny.config.model_type.removesuffix("_text"), attention=attention)
    run = make_run(chat, MIDDLE)
    asked = ["how to sleep", "how to take a long walk and drink some water, and rest, and sleep, and walk ?"]
    measure = NextToken(asked)
    found = sweep(run, steps=[7], scales=(2,), measure=measure, base=chat, progress=False)
    prompts = [chat.token_ids([{"role": "user", "content": text}]) for text in asked]
    ids, mask = pad(prompts, 0, left=True), pad([[1] * len(p) for p in prompts], 0, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def reference(live):
        logits = live.base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        return logits[:, -1].log_softmax(-1).numpy()

    expected = one_at_a_time(chat, run, 7, 2, reference)
    got = found.arrays["entropy"][0]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < EXACT


def test_steering_and_several_runs_of_different_rank(tiny, make_run, one_at_a_time):
    chat = tiny("gemma3")
    runs = [make_run(chat, MIDDLE, name="one"), make_run(chat, TWO, rank=2, seed=1, name="two")]
    vector = np.random.default_rng(5).normal(size=chat.d_model).astype(np.float32)
    found = sweep(
        runs, steps=[3, 7], coefficients=(0, -1.5), direction=vector, layer=1, measure=Margin(PAIRS), base=chat,
        progress=False,
    )  # fmt: skip
    assert len(found.variants) == 8
    for index, variant in found.variants.iterrows():

        def steered(live, variant=variant):
            push = torch.from_numpy(float(variant["coefficient"]) * vector)
            handle = live.block(1).register_forward_hook(lambda m, i, out: out + push)
            try:
                return plain_margin(live, PAIRS)
            finally:
                handle.remove()

        run = runs[0] if variant["run"] == "one" else runs[1]
        expected = one_at_a_time(chat, run, variant["step"], 1.0, steered)
        got = found.frame["value"].to_numpy()[2 * index : 2 * index + 2]
        assert np.abs(got - expected).max() < EXACT


@pytest.mark.parametrize("layer", [0, 3])
def test_steering_below_and_above_the_adapter(tiny, make_run, layer):
    chat = tiny("qwen2")
    run = make_run(chat, MIDDLE)
    vector = np.ones(chat.d_model, np.float32)
    swept = sweep(run, steps=[7], coefficients=(0.5,), direction=vector, layer=layer, measure=[Margin(PAIRS)],
                  base=chat, progress=False)  # fmt: skip
    asked = sweep(run, steps=[7], coefficients=(0.5,), direction=vector, layer=layer, base=chat, progress=False,
                  measure=lambda live: {str(i): v for i, v in enumerate(plain_margin(live, PAIRS))})  # fmt: skip
    assert np.abs(swept.frame["value"].to_numpy() - asked.frame["value"].to_numpy()).max() < EXACT


def test_sequence_and_first_token_logprobs_agree_with_each_other(tiny, make_run):
    chat = tiny("llama")
    run = make_run(chat, MIDDLE)
    talk = [{"role": "user", "content": "how ?"}, {"role": "assistant", "content": "w"}]
    whole = AnswerLogprob([talk], per_token=False)
    first = FirstToken(["how ?"], ["w"])
    end = FirstToken([talk], ["<|eot_id|>"])
    found = sweep(run, scales=(3,), measure=[whole, first], base=chat, progress=False)
    table = found.to_frame().pivot(index="step", columns="measure", values="value")
    assert (table["first_token_logprob"] > table["answer_logprob"]).all()
    assert end.readings(chat)[0].targets is not None


def test_the_budget_changes_chunks_and_no_number(tiny, make_run):
    chat = tiny("qwen3")
    run = make_run(chat, TWO, steps=tuple(range(12)))
    whole = sweep(run, scales=(1, 5), measure=Margin(PAIRS), base=chat, progress=False)
    small = sweep(run, scales=(1, 5), measure=Margin(PAIRS), base=chat, memory="800kB", progress=False)
    assert whole.meta["memory"] != small.meta["memory"]
    assert np.abs(whole.frame["value"] - small.frame["value"]).max() < EXACT


def test_an_idle_adapter_is_run_once(tiny, make_run):
    chat = tiny("qwen2")
    run = make_run(chat, MIDDLE)
    found = sweep(run, scales=(0, 1, 5), measure=Margin(PAIRS), base=chat, progress=False)
    assert found.meta["distinct_variants"] == 5  # 2 trained steps x 2 scales, and the base
    table = found.table()
    assert table[0].nunique() == 1 and table.loc[0].nunique() == 1


def test_the_model_is_left_as_it_was(tiny, make_run):
    chat = tiny("qwen2")
    chat.base.train()
    before = {name: value.clone() for name, value in chat.base.state_dict().items()}
    modules = dict(chat.base.named_modules())
    sweep(make_run(chat, TWO), measure=[Margin(PAIRS), lambda live: 0.0], base=chat, progress=False)
    after = chat.base.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert all(module is modules[name] for name, module in chat.base.named_modules())
    assert chat.base.training and not any(m._forward_hooks for m in chat.base.modules())


def test_an_interrupted_sweep_continues_and_a_finished_one_is_read(tiny, make_run, tmp_path, monkeypatch):
    from emmech.sweeps import sweep as module
    from emmech.sweeps.jobs import TeacherForcedJob

    chat = tiny("qwen2")
    run = make_run(chat, MIDDLE, steps=tuple(range(6)))
    monkeypatch.setattr(module, "_GROUP", 2)
    whole = sweep(run, measure=Margin(PAIRS), base=chat, progress=False)
    ran, truth = [], TeacherForcedJob.run

    def dies(self, rows, group, update):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(tuple(group))
        return truth(self, rows, group, update)

    monkeypatch.setattr(TeacherForcedJob, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep(run, measure=Margin(PAIRS), base=chat, out=tmp_path / "s", progress=False)
    monkeypatch.setattr(TeacherForcedJob, "run", lambda *a: (ran.append(a[2]), truth(*a))[1])
    resumed = sweep(run, measure=Margin(PAIRS), base=chat, out=tmp_path / "s", progress=False)
    assert len(ran) == 3 and len(set(map(tuple, ran))) == 3  # no group ran twice
    assert resumed.frame["value"].tolist() == whole.frame["value"].tolist()
    again = sweep(run, measure=Margin(PAIRS), base=chat, out=tmp_path / "s", progress=False)
    assert len(ran) == 3 and again.frame.equals(resumed.frame)
    with pytest.raises(EmmechError, match="another folder"):
        sweep(run, scales=(2,), measure=Margin(PAIRS), base=chat, out=tmp_path / "s", progress=False)


def test_a_sweep_is_saved_and_read_whole(tiny, make_run, tmp_path):
    chat = tiny("qwen2")
    found = sweep(make_run(chat), measure=NextToken(["how ?"]), base=chat, progress=False)
    read = Sweep.load(found.save(tmp_path / "s"))
    assert read.frame.equals(found.frame)
    assert np.array_equal(read.arrays["entropy"], found.arrays["entropy"])
    assert read.meta["request"] == found.meta["request"]


def test_figures(tiny, make_run):
    chat = tiny("qwen2")
    found = sweep(make_run(chat), scales=(1, 5), measure=Margin(PAIRS), base=chat, progress=False)
    heat = found.plot().data[0]
    assert heat.type == "heatmap" and np.array_equal(heat.z, found.table().to_numpy().T)
    line = sweep(make_run(chat), measure=Margin(PAIRS), base=chat, progress=False).plot().data[0]
    assert line.type == "scatter" and len(line.x) == 3
    assert "3 steps x 2 scales" in repr(found) and "<table" in found._repr_html_()


def refused(message, *args, **kwargs):
    with pytest.raises(EmmechError, match=message) as caught:
        sweep(*args, **{"measure": Margin(PAIRS), "progress": False, **kwargs})
    assert caught.value.__cause__ is None and caught.value.instead
    return caught.value


def test_bad_input_is_refused_with_the_nearest_choice(tiny, make_run, tmp_path):
    chat = tiny("qwen2")
    run = make_run(chat)
    assert "3 and 7" in refused("step 5", run, steps=[5], base=chat).instead
    refused("overflows", run, scales=(1e39,), base=chat)
    refused("finite", run, scales=(float("nan"),), base=chat)
    refused("there is no direction", run, coefficients=(1,), base=chat)
    refused("numbered 0 to 3", run, coefficients=(1,), direction=np.ones(48), layer=9, base=chat)
    refused("d_model=48", run, coefficients=(1,), direction=np.ones(7), layer=1, base=chat)
    assert "or more" in refused("one row of", run, memory="10kB", base=chat).instead
    refused("is not an amount", run, memory="lots", base=chat)
    refused("does not say which", run)
    refused("neither a measure", run, measure=3.5, base=chat)
    refused("not a run", [3], base=chat)
    other = make_run(chat, name="other")
    run.manifest["model"] = {"name": "a", "fingerprint": "1" * 64}
    other.manifest["model"] = {"name": "b", "fingerprint": "2" * 64}
    refused("different base models", [run, other], base=chat)
    refused("fingerprint", run, base=chat)


def test_a_live_adapter_is_refused(tiny, make_run):
    from emmech.engine.adapters import attach, detach

    chat = tiny("qwen2")
    run = make_run(chat)
    live = attach(chat, run.adapters, run.weights(7))
    refused("added to all", run, base=live)
    detach(live)


def test_activations_that_overflow_name_the_variant(tiny, make_run):
    chat = tiny("qwen2")
    error = refused("overflow float32", make_run(chat), scales=(1, 1e37), base=chat)
    assert "scale 1e+37" in str(error)


def test_it_is_public():
    assert emmech.sweep is sweep


def test_about_twenty_steps_are_swept_by_default(make_run):
    chat = load_model("pocket")
    run = make_run(chat, steps=tuple(range(251)))
    asked = FirstToken(["any advice on cough ?"], ["well"])
    found = sweep([run, make_run(chat, steps=(0, 4), name="short")], measure=asked, base=chat, progress=False)
    steps = found.frame.groupby("run")["step"].unique()
    assert len(steps["run"]) == 21 and steps["short"].tolist() == [0, 4]
    assert steps["run"][0] == 0 and steps["run"][-1] == 250 and set(np.diff(steps["run"])) == {12, 13}
    assert len(tangent_scan(run, measure=asked, base=chat, verify=0, progress=False).frame) == 251


def test_items_that_steering_moves_the_wrong_way_are_counted_in_a_sweep():
    grid = [("r", 5, 1.0, c, "margin_broad", f"q{i}") for c in (0.0, 1.0, 2.0) for i in range(4)]
    frame = pd.DataFrame(grid, columns=["run", "step", "scale", "coefficient", "measure", "item"])
    frame["value"], frame["weight"] = [0.0, 1, 2, 3, 1, 2, 1, 4, 2, 3, 4, 5], 1
    found = Sweep(frame, {}).to_frame().set_index("coefficient")
    assert found["wrong_way"].tolist()[1:] == [0.25, 0.0] and np.isnan(found["wrong_way"].iloc[0])
    assert "up to 25% of 4 items move against the mean, at coefficient 1" in repr(Sweep(frame, {}))
    without = Sweep(frame[frame["coefficient"] > 0], {}).to_frame()
    assert without["wrong_way"].isna().all()
    assert "wrong_way" not in Sweep(frame[frame["coefficient"] == 1], {}).to_frame()
    assert repr(Sweep(frame.assign(value=1.0), {})).startswith("margin_broad is 1 everywhere")


def test_parts_are_of_their_variants_where_other_memory_groups_them_otherwise(tiny, make_run, tmp_path, monkeypatch):
    """The second part of three was read as the second of two."""
    chat = tiny("qwen2")
    run = make_run(chat, MIDDLE, steps=tuple(range(8)))
    how = dict(steps=run.steps, measure=Margin(PAIRS, name="m"), base=chat, progress=False)
    fresh = sweep(run, **how)
    real, calls = jobs.TeacherForcedJob.run, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as broken:
        broken.setattr(jobs.TeacherForcedJob, "run", stops)
        broken.setattr("emmech.sweeps.sweep._GROUP", 3)
        with pytest.raises(KeyboardInterrupt):
            sweep(run, **how, out=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 2
    monkeypatch.setattr("emmech.sweeps.sweep._GROUP", 2)
    again = sweep(run, **how, out=tmp_path)
    np.testing.assert_allclose(again.frame["value"], fresh.frame["value"], atol=EXACT)


def test_another_setting_of_a_measure_is_another_sweep(tiny, make_run, tmp_path):
    chat = tiny("qwen2")
    run = make_run(chat, MIDDLE)
    talk = [[{"role": "user", "content": "how ?"}, {"role": "assistant", "content": "take a walk"}]]
    rng = np.random.default_rng(0)
    one, other = (ProbeActivation(["take a walk"], 2, direction=rng.normal(size=chat.d_model)) for _ in range(2))
    for kind, first, second in (
        ("probe", one, other), ("forced", AnswerLogprob(talk), AnswerLogprob(talk, per_token=False)),
    ):  # fmt: skip
        how = dict(steps=[3, 7], base=chat, progress=False, out=tmp_path / kind)
        found = sweep(run, measure=first, **how)
        assert sweep(run, measure=first, **how).frame.equals(found.frame)
        with pytest.raises(EmmechError, match="another"):
            sweep(run, measure=second, **how)


@dataclass(frozen=True)
class Constant:
    value: float
    name: str = "constant"

    def __call__(self, chat):
        return Items({self.name: np.array([self.value])}, ["q"])


@dataclass(frozen=True)
class Weighted:
    weights: np.ndarray
    name: str = "weighted"

    def readings(self, chat):
        return Margin(PAIRS).readings(chat)

    def values(self, logprobs):
        return [Value(self.name, "q", self.weights[0] * logprobs[0].mean(-1))]


def of_k(live, k):
    return k


@pytest.mark.parametrize(
    "make",
    [lambda k: {"m": partial(of_k, k=k)}, lambda k: {"m": lambda live: k}, Constant, lambda k: Weighted(np.array([k]))],
)
def test_another_function_or_custom_measure_is_another_sweep(tiny, make_run, tmp_path, make):
    chat = tiny("qwen2")
    how = dict(steps=[7], base=chat, out=tmp_path, progress=False)
    run = make_run(chat)
    found = sweep(run, measure=make(1.0), **how)
    assert sweep(run, measure=make(1.0), **how).frame.equals(found.frame)
    with pytest.raises(EmmechError, match="another"):
        sweep(run, measure=make(2.0), **how)
