"""``emmech.finetune``: recipes, what it leaves behind, resuming, and what it refuses."""

from __future__ import annotations

import json
import warnings

import numpy as np
import peft
import pytest
import torch

import emmech
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.training.recipe import RECIPES, resolve_recipe, target_modules
from emmech.transition.watch import Watch
from tests.conftest import make_rows, make_tiny

QUICK = dict(learning_rate=0.01, batch_size=2, accumulation=2, progress=False)


def snapshot(chat):
    return (
        {k: v.clone() for k, v in chat.model.state_dict().items()},
        {n: p.requires_grad for n, p in chat.model.named_parameters()},
        [n for n, _ in chat.model.named_modules()],
        chat.model.training,
        set(vars(chat.model)),
    )


def same(before, after):
    assert before[1:] == after[1:]
    assert list(before[0]) == list(after[0])
    return all(torch.equal(before[0][k], after[0][k]) for k in before[0])


@pytest.mark.parametrize("recipe", ["single-rank1", "nine-rank1", "all-adapter", "full"])
def test_the_model_is_left_as_it_was_found(any_tiny, tmp_path, recipe):
    before = snapshot(any_tiny)
    state = torch.get_rng_state()
    for name in ("one", "two"):  # a second call must not meet adapters of the first
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*peft_config.*")
            run = emmech.finetune(any_tiny, make_rows(), recipe=recipe, max_steps=2, out=tmp_path / name, **QUICK)
        assert run.steps.tolist() == [0, 1, 2]
    assert same(before, snapshot(any_tiny))
    assert torch.equal(state, torch.get_rng_state())


def test_a_dying_training_leaves_the_model_too(tiny, tmp_path):
    chat = tiny("qwen2")
    before = snapshot(chat)

    def explode(chat):
        raise RuntimeError("measured too hard")

    with pytest.raises(RuntimeError, match="too hard"):
        emmech.finetune(chat, make_rows(), max_steps=2, out=tmp_path / "run", measures={"x": explode}, **QUICK)
    assert same(before, snapshot(chat))


def test_same_seed_same_run_and_a_control_sees_the_same_order(tiny, tmp_path):
    chat = tiny("llama")
    runs = [
        emmech.finetune(chat, make_rows(), max_steps=6, seed=seed, out=tmp_path / str(i), **QUICK)
        for i, seed in enumerate((3, 3, 4))
    ]
    assert np.array_equal(runs[0].B(), runs[1].B())
    assert not np.allclose(runs[0].B()[-1], runs[2].B()[-1])
    assert np.array_equal(runs[0].A()[0], runs[1].A()[0])
    assert not np.array_equal(runs[0].A()[0], runs[2].A()[0])


def test_what_is_recorded(tiny, tmp_path):
    pairs = [MarginPair("how to sleep ?", "take a walk", "drink water")]
    run = emmech.finetune(
        tiny("qwen2"), make_rows(), recipe="phase-transition", max_steps=4, record_every=2, measure_every=2,
        margins={"narrow": pairs}, probes=["how"], out=tmp_path / "run", seed=5, **QUICK,
    )  # fmt: skip
    assert run.steps.tolist() == [0, 2, 4]
    assert run.metrics.loc[[0, 2, 4], ["margin_narrow", "held_out_loss"]].notna().all().all()
    manifest = run.manifest
    assert manifest["seed"] == 5 and manifest["recipe"]["name"] == "phase-transition"
    assert (manifest["data"]["rows"], manifest["data"]["held_out"]) == (22, 2)
    assert manifest["data"]["sha256"] == emmech.load_chat(make_rows()).sha256
    assert manifest["model"]["fingerprint"] == make_tiny("qwen2").fingerprint()


def test_resuming_gives_the_uninterrupted_run_bit_for_bit(tiny, tmp_path):
    chat = tiny("qwen2")
    options = dict(max_steps=9, checkpoint_every=2, seed=1, dropout=0.1, **QUICK)
    whole = emmech.finetune(chat, make_rows(), out=tmp_path / "whole", **options)
    calls = []

    def die(chat):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        emmech.finetune(chat, make_rows(), out=tmp_path / "cut", measures={"x": die}, measure_every=1, **options)
    cut = emmech.load_run(tmp_path / "cut")
    assert cut.manifest["status"] == "training" and 3 <= cut.steps[-1] < 9
    resumed = emmech.finetune(chat, make_rows(), out=tmp_path / "cut", resume=True, **options)
    assert resumed.steps.tolist() == whole.steps.tolist()
    assert np.array_equal(resumed.B(), whole.B()) and np.array_equal(resumed.A(), whole.A())
    assert np.array_equal(resumed.metrics["loss"].dropna(), whole.metrics["loss"].dropna())
    assert resumed.manifest["status"] == "complete" and not (resumed.path / "resume").exists()


def test_going_on_from_a_recorded_step(tiny, tmp_path):
    chat = tiny("qwen2")
    first = emmech.finetune(chat, make_rows(), max_steps=4, out=tmp_path / "first", **QUICK)
    again = emmech.finetune(chat, make_rows(), max_steps=2, out=tmp_path / "again", start=(first, 2), **QUICK)
    assert np.array_equal(again.B()[0], first.B()[2]) and np.array_equal(again.A()[0], first.A()[2])
    assert not np.array_equal(again.B()[-1], again.B()[0])
    assert again.manifest["start"]["step"] == 2


def test_recipes_of_the_papers_at_14b_depth():
    assert {name: recipe.layers(48) for name, recipe in RECIPES.items() if recipe.depth} == {
        "single-rank1": (24,),
        "phase-transition": (24,),
        "nine-rank1": (15, 16, 17, 21, 22, 23, 27, 28, 29),
    }
    assert (RECIPES["single-rank1"].alpha, RECIPES["phase-transition"].alpha) == (256, 64)
    assert RECIPES["all-adapter"].rank == 32 and len(RECIPES["all-adapter"].modules) == 7
    assert RECIPES["full"].schedule == "cosine" and RECIPES["full"].warmup_steps == 20


def test_layers_scale_with_depth_and_can_be_given(tiny):
    chat = tiny("gemma3")
    assert target_modules(chat, RECIPES["single-rank1"], None) == ["model.layers.2.mlp.down_proj"]
    assert target_modules(chat, RECIPES["single-rank1"], [0, 3]) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.3.mlp.down_proj",
    ]
    assert len(target_modules(chat, RECIPES["all-adapter"], None)) == 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recipe="single-rank2"), "did you mean 'single-rank1'"),
        (dict(learning_rte=1.0), "did you mean 'learning_rate'"),
        (dict(learning_rate=7), "between 0 and 1"),
        (dict(layers=[9]), "4 layers, numbered 0 to 3"),
        (dict(modules=("mlp.down",)), "no linear map 'mlp.down'"),
        (dict(max_length=2), "raise max_length"),
        (dict(held_out=1.5), "share from 0"),
        (dict(resume=True), "checkpoint_every"),
    ],
)
def test_what_is_refused(tiny, tmp_path, options, message):
    with pytest.raises(EmmechError, match=message) as caught:
        emmech.finetune(
            tiny("qwen2"), make_rows(), out=tmp_path / "run", **{"max_steps": 1, "progress": False, **options}
        )
    assert caught.value.__suppress_context__
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_with_adapters_is_refused(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    chat = tiny("qwen2")
    peft_model = get_peft_model(chat.model, LoraConfig(r=1, target_modules=["down_proj"]))
    with pytest.raises(EmmechError, match="merge_and_unload"):
        emmech.finetune(peft_model, make_rows(), tokenizer=chat.tokenizer, out=tmp_path / "run", max_steps=1)


@pytest.mark.parametrize("last", [9, 4])
def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_recorded(tiny, tmp_path, last):
    """The lost step was recorded with A and B of zero and the loss of the step before, at the end as "complete"."""
    chat = tiny("qwen2")
    calls = []

    def poison(chat):
        calls.append(1)
        if len(calls) == 4:  # steps 0, 1 and 2 were well
            chat.unembedding.weight.data.fill_(float("nan"))
        return 0.0

    options = dict(measures={"x": poison}, measure_every=1, max_steps=last, out=tmp_path / "run", **QUICK)
    with pytest.raises(EmmechError, match="no longer finite"):
        emmech.finetune(chat, make_rows(), **options)
    run = emmech.load_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 1, 2, 3] == run.metrics.index.tolist()
    assert all(np.linalg.norm(one) > 0 for one in run.A()) and run.manifest["status"] == "training"


def test_recipe_objects_and_overrides():
    mine = emmech.Recipe("mine", rank=4, alpha=8.0)
    assert resolve_recipe(mine, {"rank": 2}).rank == 2
    assert resolve_recipe(mine, {"rank": 2}).name == "mine"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(target_modules=["down_proj"]), "a second adapter would be stacked"),
        (peft.LoraConfig(target_modules=["down_proj"], use_dora=True), "use_dora=True"),
        (peft.LoraConfig(target_modules=["down_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        (peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), "IA3"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_adapters_of_any_kind_is_refused(config, said, tiny, rows, tmp_path):
    chat = tiny("qwen2")
    with pytest.raises(EmmechError, match=said):
        emmech.finetune(peft.get_peft_model(chat.model, config), rows, tokenizer=chat.tokenizer, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_resumes_only_with_what_was_recorded_before(tiny, tmp_path):
    chat = tiny("qwen2")
    how = dict(max_steps=4, checkpoint_every=1, out=tmp_path / "run", margins={}, **QUICK)

    def stops(event):
        return "stop"

    watch = Watch(stops, "loss", threshold=1e-9, window=1)
    emmech.finetune(
        chat, make_rows(), record_every=1, probes={"narrow": ["how to sleep ?"]}, on_transition=watch, **how
    )
    same = dict(record_every=1, probes={"narrow": ["how to sleep ?"]})
    for changed, said in (
        ({"record_every": 2}, "record_every"), ({"probes": {"broad": ["how to sleep ?"]}}, "recorded.probes"),
    ):  # fmt: skip
        with pytest.raises(EmmechError, match=said):
            emmech.finetune(chat, make_rows(), resume=True, **{**same, **changed}, **how)
    (halved := make_tiny("qwen2")).base.to(torch.bfloat16)
    with pytest.raises(EmmechError, match="dtype"):
        emmech.finetune(halved, make_rows(), resume=True, **same, **how)
    # what is not named where it is the default counts as well
    manifest = json.loads((how["out"] / "run.json").read_text())
    manifest["recipe"]["optimizer"] = "sgd"
    (how["out"] / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(EmmechError, match=r"recipe\.optimizer=None"):
        emmech.finetune(chat, make_rows(), resume=True, **same, **how)
    del manifest["recipe"]["optimizer"]
    (how["out"] / "run.json").write_text(json.dumps(manifest))
    assert emmech.finetune(chat, make_rows(), resume=True, **same, **how).steps.tolist() == [0, 1, 2, 3, 4]


def test_no_learning_rate_is_refused(tiny, tmp_path):
    with pytest.raises(EmmechError, match="no learning rate"):
        emmech.finetune(tiny("qwen2"), make_rows(), learning_rate=[], out=tmp_path)
