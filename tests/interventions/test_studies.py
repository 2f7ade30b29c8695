"""Studies on tiny models: planted effects are found, controls stand beside them, degenerate ones are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.chat.model import load_model
from emmech.directions.direction import Direction
from emmech.directions.sources import adapter_direction
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.evaluation.questions import resolve_questions
from emmech.evaluation.rates import cluster_interval
from emmech.interventions import studies
from emmech.interventions.studies import (
    Condition,
    Measured,
    Study,
    ablation_table,
    adapter_shares,
    combination,
    dose_response,
    projection_range,
    table,
    transfer_matrix,
    untouched,
)
from emmech.measures.choose import as_measures
from emmech.measures.measure import Items, wrong_way
from emmech.measures.sampled import Sampled
from emmech.measures.teacher_forced import Margin
from tests.sweeps.conftest import random_run

WORDS = ["sleep", "walk", "water", "rest", "drink", "well"]
PAIRS = Margin([MarginPair(f"how to {w} ?", "drink drink", "rest rest") for w in WORDS], "margin_broad")


def _adapted(chat, layers=(3,), size=0.6, seed=0):
    from peft import LoraConfig, get_peft_model

    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
    config = LoraConfig(r=1, lora_alpha=4, use_rslora=True, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(chat.model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(size * torch.randn(value.shape, generator=generator))
    return load_model(model, chat.tokenizer)


def _promoting(chat):
    """At every layer the direction from the token of "rest" to that of "drink": steering with it raises the margin."""
    ids = [chat.tokenizer(w, add_special_tokens=False)["input_ids"] for w in (" drink", " rest")]
    rows = chat.unembedding.weight.detach().numpy()
    vector = rows[ids[0]].mean(0) - rows[ids[1]].mean(0)
    return Direction(np.repeat(vector[None], chat.n_layers, 0), name="drink")


def test_dose_response_rises_with_the_dose_and_beyond_random(tiny):
    chat = tiny("qwen2")
    study = dose_response(chat, _promoting(chat), [2.0, 8.0], layers=[3], measure=PAIRS, randoms=5, progress=False)
    frame = study.frame[(study.frame["outcome"] == "margin_broad") & (study.frame["kind"] == "direction")]
    frame = frame.sort_values("coefficient")
    assert frame["value"].is_monotonic_increasing and frame["change"].iloc[-1] > 0
    assert frame["beyond_random_low"].iloc[-1] > 0  # the interval of the change beyond the controls excludes 0
    assert (frame["beyond_random_low"] <= frame["beyond_random"]).all()
    randoms = study.frame[(study.frame["kind"] == "random") & (study.frame["outcome"] == "margin_broad")]
    assert len(randoms) == 10
    assert study.frame["model"].unique().tolist() == ["base"]  # nothing is tuned about it
    assert "coherent_loss" in set(study.frame["outcome"])
    assert len(study.plot("margin_broad").data) == 2 and "beyond random directions" in repr(study)


def test_the_share_of_samples_that_move_the_wrong_way():
    """Known samples: of four, steering raises three by 2 and lowers one by 1; the random control raises and lowers."""
    plain = Items({"em": np.array([0.0, 1.0, 2.0, 3.0])}, ["a", "b", "c", "d"])
    made = {"direction": np.array([2.0, 2.0, -1.0, 2.0]), "random": np.array([1.0, -0.5, 1.0, -0.5])}
    settings = {"layer": 1, "coefficient": 1.0}
    measured = [Measured(untouched(), "tuned", plain)]
    for kind, change in made.items():
        one = Condition("d", kind, lambda chat: None, settings)
        measured.append(Measured(one, "tuned", Items({"em": plain.values["em"] + change}, plain.questions)))
    frame = table(measured).set_index("kind")
    assert frame.loc["direction", "wrong_way"] == 0.25 and frame.loc["random", "wrong_way"] == 0.5
    assert np.isnan(frame.loc["untouched", "wrong_way"])
    study = Study("steering", frame.reset_index())
    assert "25% of the items move the other way" in repr(study) and "wrong_way" in study.summary()
    unscored = np.array([np.nan, 1.0, 3.0, 3.5])
    assert wrong_way(plain.values["em"] + made["direction"], unscored) == pytest.approx(1 / 3)
    assert np.isnan(wrong_way(np.zeros(3), np.zeros(3))) and np.isnan(wrong_way(np.array([1.0, -1.0]), np.zeros(2)))


def test_the_ablation_table_has_its_controls_and_names_the_degenerate_one(tiny):
    chat = _adapted(tiny("qwen2"))
    state = {key: value.clone() for key, value in chat.base.state_dict().items()}
    b = adapter_direction(chat)
    study = ablation_table(chat, b, measure=PAIRS, from_layer=3, layers=[3], progress=False)
    assert any("degenerate" in note and "takes the adapter off" in note for note in study.notes)
    frame = study.frame[study.frame["outcome"] == "margin_broad"].set_index(["condition", "kind", "model"])
    tuned = frame.loc[("own direction by layer", "direction", "tuned")]
    base = frame.loc[("own direction by layer", "direction", "base")]
    assert tuned["value"] == pytest.approx(base["value"], abs=1e-5) and tuned["gap"] == pytest.approx(0, abs=1e-5)
    off = frame.loc[("adapter off", "positive", "tuned")]["value"]
    plain = frame.loc[("untouched", "untouched", "base")]["value"]
    assert off == pytest.approx(plain, abs=1e-5)
    assert set(study.frame["condition"]) == {"untouched", "adapter off", "own direction by layer"}
    assert (study.frame["kind"] == "random").sum() == 5 * 2 * 2  # randoms, models, outcomes
    assert all(torch.equal(value, state[key]) for key, value in chat.base.state_dict().items())
    other = Direction(np.random.default_rng(0).standard_normal((4, 48)), name="other")
    study = ablation_table(chat, other, measure=PAIRS, randoms=1, progress=False)
    assert not any("degenerate" in note for note in study.notes) and any("five" in n for n in study.notes)
    study.plot("margin_broad")
    assert "one direction (layer 2)" in set(
        ablation_table(chat, other, measure=PAIRS, from_layer=2, randoms=0, progress=False).frame["condition"]
    )


def test_a_positive_control_stands_beside_the_doses(tiny):
    chat = tiny("qwen2")
    planted = _promoting(chat).renamed("planted")
    noise = Direction(np.random.default_rng(0).standard_normal((4, 48)), name="noise")
    study = dose_response(chat, noise, [8.0], layers=[3], positive=planted, measure=PAIRS, randoms=5, progress=False)
    broad = study.frame[study.frame["outcome"] == "margin_broad"].set_index("kind")
    assert broad.loc["positive", "condition"] == "planted" and broad.loc["positive", "change_low"] > 0
    assert np.isnan(broad.loc["positive", "beyond_random"])
    assert len(study.summary("margin_broad")) == 3


def test_transfer_matrix_crosses_organisms_and_directions(tiny):
    organisms = {"one": _adapted(tiny("qwen2"), seed=1), "two": _adapted(tiny("qwen2"), seed=2)}
    directions = {name: adapter_direction(chat).renamed(name) for name, chat in organisms.items()}
    for name in directions:  # made by hand: the tiny models are the same base, their fingerprints agree
        assert directions[name].fingerprints == (organisms["one"].fingerprint(),)
    study = transfer_matrix(organisms, directions, layers=[3], measure=PAIRS, randoms=1, progress=False)
    gaps = study.frame[(study.frame["outcome"] == "margin_broad") & (study.frame["model"] == "tuned")]
    assert (gaps[gaps["condition"] == "adapter off"]["kind"] == "positive").sum() == 2
    gaps = gaps.pivot_table(index="organism", columns="condition", values="gap")
    assert abs(gaps.loc["one", "one"]) < 1e-5 < abs(gaps.loc["one", "two"])
    assert len([note for note in study.notes if "degenerate" in note]) == 2
    assert study.plot("margin_broad").data[0].z.shape == (2, 3)
    at_prompt = transfer_matrix(
        organisms, directions, layers=[3], positions="prompt", measure=PAIRS, randoms=0, progress=False
    )
    assert not np.allclose(at_prompt.frame["value"].iloc[:8], study.frame["value"].iloc[:8])
    with pytest.raises(EmmechError, match="at least one"):
        transfer_matrix({}, directions)


def test_adapter_shares(tiny):
    chat = _adapted(tiny("qwen2"), layers=(1, 3))
    study = adapter_shares(chat, measure=PAIRS, progress=False)
    values = study.frame[study.frame["outcome"] == "margin_broad"].set_index("condition")["value"]
    assert set(values.index) >= {"untouched", "adapter off", "without layers.1.mlp.down_proj"}
    assert values["without layers.1.mlp.down_proj"] == pytest.approx(values["only layers.3.mlp.down_proj"], abs=1e-6)
    with pytest.raises(EmmechError, match="no adapter"):
        adapter_shares(tiny("qwen2"), measure=PAIRS)


def test_a_study_saves_with_its_notes(tiny, tmp_path):
    import pandas as pd

    chat = tiny("qwen2")
    study = dose_response(chat, _promoting(chat), [1.0], layers=2, measure=PAIRS, randoms=1, progress=False)
    path = study.save(tmp_path / "study.csv")
    assert path.read_text().startswith("# Steering") and len(pd.read_csv(path, comment="#")) == len(study.frame)


def test_intervals_respect_questions_and_never_collapse():
    rng = np.random.default_rng(0)
    questions = np.repeat([f"q{i}" for i in range(8)], 50).tolist()
    per_question = np.repeat(rng.random(8) < 0.5, 50).astype(float)  # the question decides everything
    clustered = combination([(1.0, Items({"em": per_question}, questions))], "em")
    alone = combination([(1.0, Items({"em": per_question}, [str(i) for i in range(400)]))], "em")
    assert clustered.high - clustered.low > 4 * (alone.high - alone.low)
    none = combination([(1.0, Items({"em": np.zeros(400)}, questions))], "em")
    rates = cluster_interval(np.zeros(8, int), np.full(8, 50))
    assert (none.value, none.low, none.high) == (0, *rates) and 0.03 < none.high < 0.04
    nothing = Items({"em": np.zeros(400)}, questions)
    gap = combination([(1.0, nothing), (-1.0, nothing)], "em")
    assert gap.low == -gap.high == -none.high  # neither side could have been more
    unscored = combination([(1.0, Items({"em": np.full(4, np.nan)}, ["a"] * 4))], "em")
    assert np.isnan(unscored.value) and unscored.n == 0


def test_a_paired_difference_is_sharper_than_two_single_ones_and_covers():
    rng = np.random.default_rng(1)
    questions = np.repeat([f"q{i}" for i in range(20)], 5).tolist()
    covered = 0
    for _ in range(200):
        level = np.repeat(rng.normal(0, 2, 20), 5)
        before = Items({"m": level + rng.normal(0, 0.3, 100)}, questions)
        after = Items({"m": level + 0.5 + np.repeat(rng.normal(0, 0.3, 20), 5) + rng.normal(0, 0.3, 100)}, questions)
        change = combination([(1.0, after), (-1.0, before)], "m")
        covered += change.low <= 0.5 <= change.high
        single = combination([(1.0, before)], "m")
        assert change.high - change.low < single.high - single.low
    assert 180 <= covered <= 200


def test_measures_by_name(tiny):
    chat = tiny("qwen2")
    assert [one.name for one in as_measures("auto", chat)] == ["margin_narrow", "margin_broad"]
    assert all(isinstance(one, Margin) and len(one.pairs) > 9 for one in as_measures("auto", chat))
    assert isinstance(as_measures("answers", chat)[0], Sampled)
    with pytest.raises(EmmechError, match="did you mean 'margin'"):
        as_measures("margn", chat)
    with pytest.raises(EmmechError, match="counts random directions"):
        dose_response(chat, _promoting(chat), [1.0], randoms=-1)
    with pytest.raises(EmmechError, match="no adapter to take off"):
        dose_response(chat, _promoting(chat), [1.0], base=True)


def test_b_is_degenerate_wherever_the_stream_carries_it_and_nowhere_before(tiny):
    from emmech.interventions.studies import degenerate

    chat = _adapted(tiny("qwen2"), layers=(1,))
    b = adapter_direction(chat)
    vector = b.at(1)
    assert "at layer 1" in degenerate(chat, b, {1: vector})
    assert "at layer 3" in degenerate(chat, b, {0: vector, 3: -vector})
    assert degenerate(chat, b, {0: vector}) == ""
    assert degenerate(chat, b, {2: np.roll(vector, 1)}) == ""


@pytest.mark.parametrize("positions", ["all", "answer", "prompt"])
def test_a_cap_to_the_base_models_range_leaves_its_own_answers_alone(positions):
    """The bounds are read where the cap acts, so that the answers they come from are inside them."""
    from emmech.engine.sample import sample

    chat = emmech.load_model("pocket")
    d = Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
    bounds = projection_range(chat, [d, -d], samples=2, positions=positions, progress=False)
    assert np.allclose(bounds[0], -bounds[1, :, ::-1], atol=1e-3)
    asked = [one.messages() for one in resolve_questions("first-plot", "pocket")]
    plain = sample(chat, asked, samples=2, max_new_tokens=200, progress=False)
    # a little slack: a cached forward and a whole one round differently
    with emmech.cap(chat, d, bounds[0] + np.array([-1e-3, 1e-3]), positions=positions):
        assert [one.text for one in sample(chat, asked, samples=2, max_new_tokens=200, progress=False)] == [
            one.text for one in plain
        ]
    with emmech.cap(chat, d, bounds[0] + 30.0, positions=positions):  # outside, so that it is clamped
        assert sample(chat, asked, samples=2, max_new_tokens=200, progress=False) != plain


def test_controls_of_a_transfer_are_ablated_where_the_treatment_is(tiny, monkeypatch):
    chat = _adapted(tiny("qwen2"), seed=1)
    vectors = np.random.default_rng(0).normal(size=(chat.n_layers, chat.d_model))
    everywhere, once = Direction(vectors, "everywhere"), Direction(vectors * (np.arange(4) == 2)[:, None], "once")
    real, seen = studies._ablated, {}

    def kept(label, one, controls, **how):
        seen[label] = (one.layers, {control.layers for control in controls})
        return real(label, one, controls, **how)

    monkeypatch.setattr(studies, "_ablated", kept)
    for direction, other in ((everywhere, once), (once, everywhere)):
        ablation_table(chat, direction, others={"x": other}, measure=PAIRS, randoms=1, progress=False)
        assert seen["transfer: x"] == (other.layers, {other.layers})
        assert seen["own direction by layer"] == (direction.layers, {direction.layers})


def test_a_base_of_a_transfer_matrix_is_left_as_it_was(tiny, monkeypatch):
    base = tiny("qwen2")
    run = random_run(base, ("model.layers.2.mlp.down_proj",), size=0.5)
    ids = torch.tensor([[1, 2, 3]])
    before = base.base(ids).logits
    d = {"x": Direction(np.random.default_rng(0).normal(size=(base.n_layers, base.d_model)), "x")}
    how = dict(measure=PAIRS, randoms=0, progress=False, base_model=base)
    transfer_matrix({"a": run, "b": run}, d, **how)
    assert torch.equal(base.base(ids).logits, before) and not hasattr(base.base, "peft_config")
    monkeypatch.setattr(studies, "measure_conditions", lambda *args, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transfer_matrix({"a": run}, d, **how)
    assert torch.equal(base.base(ids).logits, before)


@pytest.mark.parametrize("towards", [Direction(np.ones((4, 48)), "x"), object()])
def test_a_mean_that_is_no_array_is_refused(tiny, towards):
    with pytest.raises(EmmechError, match="a mean is an array of numbers"):
        emmech.ablate(tiny("qwen2"), np.ones(48), towards=towards)


def test_a_mean_may_be_a_tensor_of_half_precision(tiny):
    with emmech.ablate(tiny("qwen2"), np.ones(48), towards=torch.zeros(48, dtype=torch.bfloat16)):
        pass
