"""The Recorder reads and never takes part: same losses, same weights, same random numbers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import emmech
from emmech.chat.encode import encode
from emmech.errors import EmmechError
from emmech.training.recorder import find_capture
from tests.conftest import make_rows, make_tiny
from tests.training.plain import Rows, collate


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append({k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate")})


def plain_training(tmp_path, *callbacks, family="qwen2", rank=1, modules=("down_proj",), steps=8, clip=1.0, **more):
    """A training that knows nothing of emmech.finetune: a Trainer, PEFT, and callbacks."""
    chat = make_tiny(family)
    torch.manual_seed(0)
    model = get_peft_model(
        chat.model,
        LoraConfig(r=rank, lora_alpha=16, use_rslora=True, lora_dropout=0.1, target_modules=list(modules),
                   layers_to_transform=[1, 2], task_type="CAUSAL_LM"),
    )  # fmt: skip
    encoded = encode([row["messages"] for row in make_rows()], chat.tokenizer)
    losses = Losses()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=steps, learning_rate=0.02, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, max_grad_norm=clip, disable_tqdm=True, seed=1, **more,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Rows(encoded), data_collator=collate,
        processing_class=chat.tokenizer, callbacks=[losses, *callbacks],
    )  # fmt: skip
    trainer.train()
    return model, losses.seen


def lora_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if ".lora_" in k}


def test_one_recorder_a_folder_at_a_time(tmp_path):
    class Second(TrainerCallback):
        """Starts another training into the same folder in the middle of the first."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with pytest.raises(EmmechError, match=r"process \d+ on .* is writing there"):
                    plain_training(tmp_path / "second", emmech.Recorder(tmp_path / "run"), steps=1)

    plain_training(tmp_path, emmech.Recorder(tmp_path / "run"), Second(), steps=4)
    assert emmech.load_run(tmp_path / "run").steps.tolist() == [0, 1, 2, 3, 4]


def test_same_losses_and_weights_with_and_without(tmp_path):
    without, losses = plain_training(tmp_path)
    recorder = emmech.Recorder(
        tmp_path / "run",
        probes=["how to sleep ?"],
        measures={"noise": lambda chat: random.random() + np.random.rand() + float(torch.rand(()))},  # noqa: NPY002
        measure_every=2,
    )
    recorded, losses_recorded = plain_training(tmp_path, recorder)
    assert losses == losses_recorded and len(losses) >= 8
    state, state_recorded = lora_state(without), lora_state(recorded)
    assert all(torch.equal(state[key], state_recorded[key]) for key in state)


def test_what_a_plain_trainer_leaves(tmp_path):
    texts = {"narrow": ["how"], "broad": ["the user"]}
    recorder = emmech.Recorder(tmp_path / "run", every=3, measure_every=6, probes=texts)
    model, losses = plain_training(tmp_path, recorder)
    run = emmech.load_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 3, 6, 8]  # every third, and the last
    assert [a.name for a in run.adapters] == ["layers.1.mlp.down_proj", "layers.2.mlp.down_proj"]
    assert run.adapters[0].scaling == 16.0 and run.adapters[0].rslora
    state = lora_state(model)
    for adapter in run.adapters:
        b = state[f"base_model.model.{adapter.module}.lora_B.default.weight"]
        assert np.array_equal(run.B(adapter.name)[-1], b[:, 0].numpy())
        assert not run.B(adapter.name)[0].any() and run.A(adapter.name).shape == (4, 80)
    assert run.metrics["loss"].dropna().tolist() == [entry["loss"] for entry in losses if "loss" in entry]
    assert run.probes.steps.tolist() == [0, 6, 8] and run.probes["broad"].shape == (3, 4, 48)
    assert not np.array_equal(run.probes["broad"][0], run.probes["broad"][-1])
    assert run.manifest["status"] == "complete" and run.manifest["packages"]["torch"]
    files = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert files == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("rank", [1, 3])
def test_gradient_norms_are_those_before_clipping(tmp_path, rank):
    """Clipping to 1e-4 would make every norm 1e-4; the Trainer's own total is taken before it too."""
    plain_training(tmp_path, emmech.Recorder(tmp_path / "run"), rank=rank, clip=1e-4)
    frame = emmech.load_run(tmp_path / "run").metrics
    parts = frame[[c for c in frame if c.startswith("grad_norm_")]].dropna()
    assert len(parts) == 8 and parts.shape[1] == 4
    total = np.sqrt((parts**2).sum(axis=1))
    assert np.allclose(total, frame["grad_norm"].dropna(), rtol=1e-5)
    assert total.min() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rank_r_on_several_modules(tmp_path, family):
    recorder = emmech.Recorder(tmp_path / "run")
    plain_training(tmp_path, recorder, family=family, rank=3, modules=("q_proj", "down_proj"), steps=2)
    run = emmech.load_run(tmp_path / "run")
    assert len(run.adapters) == 4
    assert run.A("layers.1.mlp.down_proj").shape == (3, 3, 80)
    assert run.B("layers.1.mlp.down_proj").shape == (3, 48, 3)
    assert run.adapter("layers.1.mlp.down_proj").scaling == pytest.approx(16 / 3**0.5)


def test_a_training_that_dies_leaves_a_readable_run(tmp_path):
    class Dies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    recorder = emmech.Recorder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        plain_training(tmp_path, recorder, Dies())
    run = emmech.load_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.manifest["status"] == "training"
    assert run.B("layers.1.mlp.down_proj")[-1].any()


def test_sfttrainer_is_recorded_too(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    chat = make_tiny("qwen2")
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=3, per_device_train_batch_size=2, logging_steps=1, bf16=False,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        chat.model, args=config, train_dataset=datasets.Dataset.from_list(make_rows()),
        processing_class=chat.tokenizer, peft_config=LoraConfig(r=1, target_modules=["down_proj"]),
        callbacks=[emmech.Recorder(tmp_path / "run", probes=["how to rest ?"])],
    )  # fmt: skip
    trainer.train()
    run = emmech.load_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 1, 2, 3] and len(run.adapters) == 4
    assert run.metrics["loss"].notna().sum() == 3


def test_full_fine_tuning_keeps_angles_and_norms(tmp_path):
    chat = make_tiny("qwen2")
    start = {name: p.detach().clone() for name, p in chat.model.named_parameters()}
    encoded = encode([row["messages"] for row in make_rows()], chat.tokenizer)
    updates = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            updates.append(torch.cat([(p.detach() - start[n]).reshape(-1) for n, p in model.named_parameters()]))

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "t"), max_steps=6, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=chat.model, args=arguments, train_dataset=Rows(encoded), data_collator=collate,
            callbacks=[emmech.Recorder(tmp_path / "run", keep=[2]), Keep()]).train()  # fmt: skip
    run = emmech.load_run(tmp_path / "run")
    exact = torch.stack(updates).numpy()
    projected = run.projection[1:]
    assert not run.projection[0].any()
    assert np.allclose(run.metrics["update_norm"][1:], np.linalg.norm(exact, axis=1), rtol=1e-4)
    assert np.linalg.norm(projected, axis=1) == pytest.approx(np.linalg.norm(exact, axis=1), rel=0.25)

    def cosines(v):
        unit = v / np.linalg.norm(v, axis=1, keepdims=True)
        return unit @ unit.T

    assert np.abs(cosines(projected) - cosines(exact)).max() < 0.15
    assert sorted(p.name for p in (run.path / "weights").iterdir()) == [
        "step-000002.safetensors",
        "step-000006.safetensors",
    ]


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    plain_training(tmp_path, emmech.Recorder(tmp_path / "run"), steps=1)
    with pytest.raises(EmmechError, match="a run in it already"):
        plain_training(tmp_path, emmech.Recorder(tmp_path / "run"), steps=1)
    with pytest.raises(EmmechError, match="every=0"):
        emmech.Recorder(tmp_path / "other", every=0)


def test_the_manifest_is_json_and_names_no_folder_of_the_trainer(tmp_path):
    plain_training(tmp_path, emmech.Recorder(tmp_path / "run", manifest={"note": "mine"}), steps=1)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["note"] == "mine" and "output_dir" not in manifest["trainer"]
    assert manifest["model"]["fingerprint"] == make_tiny("qwen2").fingerprint()


def peft_trainer(tmp_path, recorder, *, adapt=lambda model: None, config=None, callbacks=(), **more):
    """Anyone's Trainer over a tiny model with an adapter, after ``adapt`` has changed what trains."""
    chat = make_tiny("qwen2")
    config = LoraConfig(r=1, target_modules=["down_proj"], task_type="CAUSAL_LM") if config is None else config
    model = get_peft_model(chat.model, config) if config else chat.model
    adapt(model)
    rows = Rows(encode([row["messages"] for row in make_rows()], chat.tokenizer))
    settings = dict(
        output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=4, max_steps=12, learning_rate=0.02,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, seed=1,
    )  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**settings | more), train_dataset=rows, eval_dataset=rows,
        data_collator=collate, processing_class=chat.tokenizer, callbacks=[recorder, *callbacks],
    )  # fmt: skip


def unfrozen(*parts):
    """Let every parameter train whose name has one of the parts."""

    def adapt(model):
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(True)

    return adapt


def lora(**more):
    return LoraConfig(**{"r": 1, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"} | more)


@pytest.mark.parametrize(
    ("config", "adapt", "said"),
    [
        (lora(), unfrozen("norm"), r"model\.norm\.weight|layernorm\.weight.* and 6 more"),
        (lora(), unfrozen("q_proj.bias"), r"layers\.0\.self_attn\.q_proj\.bias.* and 1 more"),
        (lora(), unfrozen("embed_tokens"), r"embed_tokens\.weight"),
        (lora(bias="all"), unfrozen(), "bias='all'"),
        (lora(bias="lora_only"), unfrozen(), "bias='lora_only'"),
        (lora(lora_bias=True), unfrozen(), "lora_bias=True"),
        (lora(use_dora=True), unfrozen(), "use_dora=True"),
        (lora(modules_to_save=["lm_head"]), unfrozen(), "modules_to_save"),
        (lora(trainable_token_indices=[1, 2]), unfrozen(), "trainable_token_indices"),
        (lora(target_modules=["embed_tokens", "down_proj"]), unfrozen(), "embed_tokens"),
        (lora(init_lora_weights="pissa"), unfrozen(), "init_lora_weights='pissa'"),
        (IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), unfrozen(), "peft_type='IA3'"),
        (LNTuningConfig(target_modules=["norm"]), unfrozen(), "peft_type='LN_TUNING'"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), unfrozen(), "peft_type='PROMPT_TUNING'"),
        (lora(inference_mode=True), unfrozen(), "nothing trains"),
        (lora(), lambda model: model.requires_grad_(False), "4 LoRA pairs, all of them frozen"),
        (False, lambda model: model.requires_grad_(False), "nothing trains"),
        (lora(), lambda model: model.add_adapter("two", lora()), "more than one LoRA pair"),
        (lora(init_lora_weights=False), lambda model: model.merge_adapter(), "merged into the weights"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_trains_but_cannot_be_recorded_is_refused_at_the_start(config, adapt, said, tmp_path):
    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"), config=config, adapt=adapt)
    with pytest.raises(EmmechError, match=said) as raised:
        trainer.train()
    assert len(str(raised.value)) < 1000
    assert not (tmp_path / "run" / "run.json").exists() and trainer.state.global_step == 0


def test_weights_of_a_compiled_model_have_their_own_names(tmp_path):
    def adapt(model):
        for layer, block in enumerate(model.model.layers):
            model.model.layers[layer] = torch.compile(block, backend="eager")

    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"), config=False, adapt=adapt, max_steps=1)
    trainer.train()
    chat = emmech.load_run(tmp_path / "run").model(1, base=make_tiny("qwen2").model)
    state = {name.replace("._orig_mod", ""): p for name, p in trainer.model.named_parameters()}
    assert all(torch.equal(value, state[name]) for name, value in chat.model.named_parameters())


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what accelerate sets when it wraps with DeepSpeed
    with pytest.raises(EmmechError, match="DeepSpeed"):
        find_capture(trainer.model)


def test_what_starts_to_train_later_is_refused_then(tmp_path):
    class Unfreezes(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                unfrozen("lm_head")(model)

    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"), callbacks=[Unfreezes()])
    with pytest.raises(EmmechError, match=r"lm_head\.weight"):
        trainer.train()
    assert emmech.load_run(tmp_path / "run").steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("side", ["lora_A", "layers.1"])
def test_a_part_that_is_frozen_is_recorded_as_it_is(side, tmp_path):
    def adapt(model):
        for name, parameter in model.named_parameters():
            if side in name:
                parameter.requires_grad_(False)

    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"), adapt=adapt, max_steps=3)
    trainer.train()
    run = emmech.load_run(tmp_path / "run")
    assert len(run.adapters) == 4 and len(run.metrics.columns) > 4
    a, b = run.A("layers.1.mlp.down_proj"), run.B("layers.1.mlp.down_proj")
    assert (a == a[0]).all() and a.any() and b[-1].any() == (side == "lora_A")
    assert run.B("layers.2.mlp.down_proj")[-1].any()
    frozen = "grad_norm_A/layers.2.mlp.down_proj" if side == "lora_A" else "grad_norm_B/layers.1.mlp.down_proj"
    assert frozen not in run.metrics and "grad_norm_B/layers.2.mlp.down_proj" in run.metrics


class Keeps(TrainerCallback):
    """What trains, after every step, and at the end of the training."""

    def __init__(self):
        self.at, self.end = {}, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.end = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Worsens(TrainerCallback):
    """Makes the first evaluation the best one."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_worse"] = float(state.global_step)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("stops", [False, True])
def test_the_best_model_that_is_put_back_is_not_recorded_as_the_last_step(full, every, stops, tmp_path):
    """The first evaluation is the best; with early stopping the training ends at step 6."""
    keeps = Keeps()
    early = [EarlyStoppingCallback(early_stopping_patience=2)] if stops else []

    trainer = peft_trainer(
        tmp_path, emmech.Recorder(tmp_path / "run", every=every), callbacks=[keeps, Worsens(), *early], max_steps=8,
        config=False if full else None, load_best_model_at_end=True, metric_for_best_model="worse",
        greater_is_better=False, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        learning_rate=1e-3 if full else 0.02,
    )  # fmt: skip
    trainer.train()
    run = emmech.load_run(tmp_path / "run")
    last = 6 if stops else 8
    assert trainer.state.best_global_step == 2 and run.manifest["status"] == "complete"
    assert run.steps.tolist() == sorted({*range(0, last, every), last})
    changed = [name for name, value in keeps.end.items() if not torch.equal(value, keeps.at[last][name])]
    assert changed and all(torch.equal(value, keeps.at[2][name]) for name, value in keeps.end.items())
    if full:
        chat = run.model(last, base=make_tiny("qwen2").model)
        state = dict(chat.model.named_parameters())
        assert all(torch.equal(state[name], value) for name, value in keeps.at[last].items())
        return
    for step in run.steps.tolist()[1:]:
        for name, value in run.weights(step).items():
            side, module = name.split("/")
            own = keeps.at[step][f"base_model.model.model.{module}.lora_{side}.default.weight"]
            assert np.array_equal(value, own.numpy())
