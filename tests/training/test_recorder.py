"""The Recorder reads and never takes part: same losses, same weights, same random numbers."""

from __future__ import annotations

import json
import random
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import emmech
from emmech.chat.encode import encode
from emmech.errors import EmmechError
from emmech.training import recorder as recorder_module
from emmech.training.recorder import FullCapture, GradientNorms, LoraCapture, find_capture, named_texts
from emmech.transition import Watch
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


@pytest.mark.parametrize(
    ("every", "measure", "wanted"), [(2, 3, [0, 4, 6, 10]), (3, 10, [0, 12, 21]), (2, 4, [0, 4, 8])]
)
def test_what_is_measured_is_the_first_recorded_step_that_is_due(every, measure, wanted, tmp_path):
    recorder = emmech.Recorder(tmp_path / "run", every=every, measure_every=measure)
    assert [step for step in range(wanted[-1] + 1) if recorder.measures_at(step, -1)] == wanted


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


class Parts(torch.nn.Module):
    """Parameters of several shapes under the names that a model has."""

    def __init__(self):
        super().__init__()
        shapes = {"model.layers.0.mlp.weight": (2, 5), "model.layers.0.bias": (7,), "model.layers.1.mlp.weight": (1, 4),
                  "model.norm.weight": (6,), "lm_head.weight": (3, 4)}  # fmt: skip
        for name, shape in shapes.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))

    def move(self, by=1.0):
        for parameter in self.parameters():
            parameter.data += by


def test_a_projected_update_has_256_numbers_a_matrix_and_16_a_vector():
    model = Parts()
    capture = FullCapture(model, seed=3)
    assert not capture.tensors()["projection"].any()
    model.move()
    projected = capture.tensors()["projection"]
    assert projected.shape == (256 + 16 + 16 + 16 + 256,) and projected.dtype == np.float32
    norms = capture.scalars()
    sizes = {"layers.0": 10 + 7, "layers.1": 4, "norm": 6, "lm_head": 12}
    assert norms == pytest.approx(
        {"update_norm": sum(sizes.values()) ** 0.5} | {f"update_norm/{name}": n**0.5 for name, n in sizes.items()}
    )
    assert capture.watched() == {} and capture.adapters == () and capture.kind == "full"
    # the matrices of the projection depend on the seed alone
    again = FullCapture(model, seed=3, start=capture.start)
    assert np.array_equal(again.tensors()["projection"], projected)
    other = FullCapture(model, seed=4, start=capture.start).tensors()["projection"]
    assert not np.allclose(other, projected)
    assert 0.5 < np.linalg.norm(projected) / sum(sizes.values()) ** 0.5 < 2


def test_the_start_of_full_fine_tuning_may_be_given():
    model = Parts()
    start = {name: torch.full_like(p, -2.0) for name, p in model.named_parameters() if "norm" not in name}
    norms = FullCapture(model, seed=0, start=start).scalars()
    assert norms["update_norm/layers.1"] == pytest.approx(4) and norms["update_norm/norm"] == 0
    capture = find_capture(model)
    model.move()
    wanted = FullCapture(model, seed=0, start=capture.start).tensors()["projection"]
    assert np.array_equal(capture.tensors()["projection"], wanted) and wanted.any()
    copies = capture.copies()
    assert copies.keys() == dict(model.named_parameters()).keys() and all((one == 1).all() for one in copies.values())
    model.move()
    assert all((one == 1).all() for one in copies.values())


def test_a_process_that_does_not_write_keeps_no_copy():
    model = Parts()
    capture = find_capture(model, writes=False)
    model.move()
    assert capture.start == {} == capture.copies() == capture.tensors() and capture.scalars() == {"update_norm": 0}


@pytest.mark.parametrize("rank", [1, 2])
def test_what_is_captured_does_not_change_afterwards(rank):
    pairs = [(torch.nn.Parameter(torch.ones(rank, 5)), torch.nn.Parameter(torch.ones(3, rank)))]
    capture = LoraCapture([(SimpleNamespace(rank=rank, name="x"), *pairs[0])])
    found = capture.tensors()
    shapes = ((5,), (3,)) if rank == 1 else ((2, 5), (3, 2))
    assert (found["A/x"].shape, found["B/x"].shape) == shapes and capture.scalars() == {}
    assert capture.watched() == {"grad_norm_A/x": pairs[0][0], "grad_norm_B/x": pairs[0][1]}
    for one in pairs[0]:
        one.data += 1
    assert (found["A/x"] == 1).all() and (capture.tensors()["B/x"] == 2).all()


def test_gradients_are_read_as_soon_as_they_are_there():
    """An optimizer that steps in backward frees them; a parameter without a gradient has no norm."""
    used, freed, gone, unused = (torch.nn.Parameter(torch.full((4,), 2.0)) for _ in range(4))
    gone.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    norms = GradientNorms({"used": used, "freed": freed, "gone": gone, "unused": unused})
    freed.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    (used + 3 * freed + gone).sum().backward()
    assert norms.read() == {"used": 2, "freed": 6} and freed.grad is None
    used.sum().backward()
    assert norms.read() == {"used": 4, "freed": 6}  # that of what is accumulated
    norms.close()
    used.sum().backward()
    assert norms.read()["used"] == 4
    norms._take()  # what several processes do when backward has ended: here "freed" and "unused" have none
    assert norms.read() == {"used": 6, "freed": 6}


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"ds_id": 3}, r"lm_head.weight \(DeepSpeed\)(.|\n)*a part of the weights"),
        ({"_fsdp_flattened": True}, r"lm_head.weight \(FSDP 1\)(.|\n)*one flat vector"),
        (
            {"device_mesh": SimpleNamespace(ndim=1)},
            r"lm_head.weight \(tensor parallelism\)(.|\n)*a part of the weights",
        ),
    ],
)
def test_weights_that_are_in_parts_are_refused_by_name(attributes, said):
    model = Parts()
    for name, value in attributes.items():
        setattr(model.lm_head.weight, name, value)
    with pytest.raises(EmmechError, match=said):
        find_capture(model)


@pytest.mark.parametrize("sides", ["q", "qk", "qkv"])
def test_up_to_three_of_what_trains_too_are_named(sides, tmp_path):
    adapt = unfrozen(*(f"layers.0.self_attn.{side}_proj.bias" for side in sides))
    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"), adapt=adapt)
    with pytest.raises(EmmechError, match="trains beside the LoRA pairs") as caught:
        trainer.train()
    assert str(caught.value).count("_proj.bias") == len(sides) and "more" not in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(every=2.5), dict(every="1"), dict(measure_every=0), dict(measure_every=-1)])
def test_steps_are_whole_numbers(wrong, tmp_path):
    [(name, value)] = wrong.items()
    with pytest.raises(EmmechError, match=f"{name}={value!r}"):
        emmech.Recorder(tmp_path / "run", **wrong)


def test_a_recorder_before_its_training(tmp_path):
    recorder = emmech.Recorder(tmp_path / "run", every=1, measure_every=1)
    assert (recorder.stopped, recorder.warning, recorder.again) == (False, None, False)
    recorder.close()
    recorder.on_log(None, None, None, logs={"loss": 1.0})  # another process of several, which records nothing
    recorder.on_train_end(None, None, None)
    assert not (tmp_path / "run").exists()


def test_texts_of_probes_have_names():
    assert named_texts(None) == named_texts([]) == named_texts({}) == {}
    assert named_texts(["a"]) == {"probe": ["a"]} and named_texts({"x": ["a"], "y": ["b"]}) == {"x": ["a"], "y": ["b"]}
    with pytest.raises(EmmechError, match=r"probes\['x'\]"):
        named_texts({"x": [3]})
    with pytest.raises(EmmechError, match="probes") as caught:
        named_texts([3])
    assert "probes['" not in str(caught.value)


class Ends(TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, at=1):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.at


@pytest.mark.parametrize(
    ("steps", "every", "wanted"), [(8, 1, 1), (8, 3, 3), (60, 1, 3), (430, 1, 22), (430, 2, 22), (1000, 10, 50)]
)
def test_measures_are_taken_about_twenty_times(steps, every, wanted, tmp_path):
    recorder = emmech.Recorder(tmp_path / "run", every=every)
    peft_trainer(tmp_path, recorder, callbacks=[Ends()], max_steps=steps).train()
    manifest = emmech.load_run(tmp_path / "run").manifest
    assert recorder.measure_every == wanted == manifest["measure_every"]
    assert (manifest["record_every"], manifest["max_steps"], manifest["seed"]) == (every, steps, 1)
    kept = emmech.Recorder(tmp_path / "other", every=every, measure_every=7)
    peft_trainer(tmp_path, kept, callbacks=[Ends()], max_steps=steps).train()
    assert kept.measure_every == 7


@pytest.mark.parametrize("with_probes", [False, True])
def test_measures_become_metrics_at_their_steps(with_probes, tmp_path):
    asked = []

    def size(chat):
        asked.append(chat)
        return float(len(asked))

    probes = {"probes": ["how to rest ?"]} if with_probes else {}
    recorder = emmech.Recorder(tmp_path / "run", every=2, measure_every=4, measures={"size": size}, **probes)
    trainer = peft_trainer(tmp_path, recorder, max_steps=9)
    trainer.train()
    run = emmech.load_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 2, 4, 6, 8, 9]
    assert run.metrics["size"].dropna().to_dict() == {0: 1, 4: 2, 8: 3, 9: 4}
    assert run.probes.steps.tolist() == ([0, 4, 8, 9] if with_probes else [])
    assert all(chat.model is trainer.model for chat in asked)


def test_a_measure_that_fails_says_what_is_kept(tmp_path):
    def fails(chat):
        raise EmmechError("measure it", "this", "it cannot", "another")

    recorder = emmech.Recorder(tmp_path / "run", measures={"bad": fails})
    with pytest.raises(EmmechError, match="it cannot; the steps until then are recorded"):
        peft_trainer(tmp_path, recorder, max_steps=2).train()
    recorder.close()


def test_only_texts_need_a_tokenizer(tmp_path):
    """A Trainer without one is recorded; probes are refused by the name of what is missing."""

    def without(folder, **what):
        trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / folder, **what), max_steps=1)
        trainer.processing_class = trainer.callback_handler.processing_class = None
        return trainer

    without("plain").train()
    manifest = emmech.load_run(tmp_path / "plain").manifest
    assert manifest["tokenizer"] == {"name": None, "fingerprint": None}
    with pytest.raises(EmmechError, match="tokenizer"):
        without("probes", probes=["how to rest ?"]).train()


def test_the_manifest_names_model_tokenizer_and_data(tmp_path):
    def adapt(model):
        model.get_base_model().name_or_path = "somebody/tiny"

    more = {"data": {"name": "medical"}, "note": "mine"}
    trainer = peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run", manifest=more), adapt=adapt, max_steps=1)
    began = time.monotonic()
    trainer.train()
    took = time.monotonic() - began
    manifest = emmech.load_run(tmp_path / "run").manifest
    model = manifest["model"]
    assert model["name"] == "somebody/tiny" and model["architecture"] == "Qwen2ForCausalLM"
    assert (model["n_layers"], model["d_model"], model["dtype"]) == (4, 48, "float32")
    assert manifest["data"] == {"rows": 24, "name": "medical"} and manifest["note"] == "mine"
    assert (manifest["format"], manifest["kind"], manifest["name"]) == (1, "lora", "run")
    assert 0 < manifest["seconds"] < took and manifest["seconds"] == round(manifest["seconds"], 2)
    assert manifest["packages"]["numpy"] == np.__version__ and manifest["packages"]["emmech"] == emmech.__version__
    tokenizer = trainer.processing_class
    assert manifest["tokenizer"]["name"] == tokenizer.name_or_path
    fingerprint = recorder_module._tokenizer_fingerprint
    assert manifest["tokenizer"]["fingerprint"] == fingerprint(tokenizer) and len(fingerprint(tokenizer)) == 64
    tokenizer.chat_template += " "
    assert fingerprint(tokenizer) != manifest["tokenizer"]["fingerprint"]
    assert fingerprint(None) is None and fingerprint(object()) is None
    assert recorder_module._version("no-such-package-at-all") is None


def test_a_model_without_a_name_has_none_in_the_manifest(tmp_path):
    peft_trainer(tmp_path, emmech.Recorder(tmp_path / "run"), max_steps=1).train()
    assert emmech.load_run(tmp_path / "run").manifest["model"]["name"] is None


def test_the_commit_is_that_of_the_folder_if_it_has_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert recorder_module._git_commit() is None
    commands = [
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ]
    for command in commands:
        subprocess.run(["git", *command], check=True)
    found = recorder_module._git_commit()
    assert isinstance(found, str) and len(found) == 40 and found == found.strip()
    monkeypatch.setenv("PATH", "")
    assert recorder_module._git_commit() is None


def test_every_number_that_is_logged_is_kept_and_nothing_else(tmp_path):
    class Logs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for logs in ({"mine": 2, "share": 0.5, "note": "text", "several": [1]}, {"note": "text"}, {}, None):
                recorder.on_log(args, state, control, logs=logs)

    recorder = emmech.Recorder(tmp_path / "run")
    peft_trainer(tmp_path, recorder, callbacks=[Logs()], max_steps=3).train()
    run = emmech.load_run(tmp_path / "run")
    assert run.metrics["mine"].dropna().to_dict() == {1: 2, 2: 2, 3: 2} and run.metrics["share"].dropna().eq(0.5).all()
    unknown = [name for name in run.metrics if name.startswith(("train_", "total_flos", "note", "several"))]
    assert not unknown and run.metrics["loss"].notna().sum() == 3
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line) > 1 for line in lines)


def resumed(tmp_path, recorder, *, at, steps=4, **more):
    """A training that goes on from the checkpoint of a step."""
    torch.manual_seed(0)  # of A
    trainer = peft_trainer(tmp_path, recorder, max_steps=steps, save_strategy="steps", save_steps=1, **more)
    trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / f"checkpoint-{at}") if at else None)
    return emmech.load_run(recorder.path)


class Dies(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 2])
def test_a_trainer_that_resumes_records_the_uninterrupted_run(at, tmp_path):
    whole = resumed(tmp_path / "whole", emmech.Recorder(tmp_path / "run"), at=None)
    cut = emmech.Recorder(tmp_path / "cut", probes=["how to rest ?"], measure_every=1)
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "t", cut, at=None, callbacks=[Dies(3)])
    cut.close()
    written = (tmp_path / "cut" / "run.json").read_text()
    again = emmech.Recorder(tmp_path / "cut", probes=["how to rest ?"], measure_every=1)
    run = resumed(tmp_path / "t", again, at=at)
    assert run.steps.tolist() == [0, 1, 2, 3, 4] == run.probes.steps.tolist() and not run.damaged
    name = run.adapters[0].name
    assert np.array_equal(run.B(name), whole.B(name)) and run.B(name)[-1].any()
    assert run.metrics["loss"].tolist()[1:] == pytest.approx(whole.metrics["loss"].tolist()[1:])
    lines = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines) and lines.count(at) == lines.count(at + 1) == 2  # what is recorded, and the Trainer's
    ended = dict(status="complete", seconds=run.manifest["seconds"])
    assert run.manifest == json.loads(written) | ended  # the manifest is that of the training that began


def test_a_checkpoint_without_its_run_is_recorded_from_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, lost := emmech.Recorder(tmp_path / "lost"), at=None, callbacks=[Dies(3)])
    lost.close()
    run = resumed(tmp_path, emmech.Recorder(tmp_path / "new", probes=["how to rest ?"], measure_every=3), at=2)
    assert run.steps.tolist() == [2, 3, 4] and run.manifest["status"] == "complete"
    assert run.probes.steps.tolist() == [3, 4]  # not at the step where it happens to begin


def test_a_training_that_died_before_a_checkpoint_is_recorded_anew_if_that_is_wanted(tmp_path):
    first = emmech.Recorder(tmp_path / "run", probes=["how to rest ?"], measure_every=1)
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, first, at=None, callbacks=[Dies(2)])
    first.close()
    with pytest.raises(EmmechError, match="a run in it already"):
        resumed(tmp_path, emmech.Recorder(tmp_path / "run"), at=None)
    again = emmech.Recorder(tmp_path / "run", every=2)
    again.again = True
    run = resumed(tmp_path, again, at=None)
    assert run.steps.tolist() == [0, 2, 4] and run.probes.steps.tolist() == []
    assert run.metrics["loss"].notna().sum() == 4 and run.manifest["record_every"] == 2
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 + 2 + 1  # the Trainer's logs, the gradient norms of two steps, and the epoch at the end


def test_a_watch_on_what_the_trainer_logs_stops_there(tmp_path):
    """One warning, and no step after the one whose log called for it."""
    seen = []
    watch = Watch(lambda event: seen.append(event) or "stop", metric="loss", threshold=1e-3, window=2)
    recorder = emmech.Recorder(tmp_path / "run", every=3, on_transition=watch)
    trainer = peft_trainer(tmp_path, recorder, max_steps=9)
    trainer.train()
    run = emmech.load_run(tmp_path / "run")
    assert [event.step for event in seen] == [2] and recorder.warning == seen[0] and recorder.stopped
    assert trainer.state.global_step == 2 and run.steps.tolist() == [0, 2] and run.manifest["status"] == "stopped"
    assert [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_watch_that_only_tells_tells_once(tmp_path):
    seen = []
    watch = Watch(seen.append, metric="loss", threshold=1e-3, window=1)
    recorder = emmech.Recorder(tmp_path / "run", on_transition=watch)
    peft_trainer(tmp_path, recorder, max_steps=4).train()
    run = emmech.load_run(tmp_path / "run")
    assert [event.step for event in seen] == [1] and not recorder.stopped
    assert run.manifest["warning"] == seen[0].to_dict() and run.manifest["status"] == "complete"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_warning_before_the_checkpoint_is_not_given_again(at, tmp_path):
    """The values until the checkpoint count in the window; a warning after it is forgotten with the steps."""
    seen = []
    watch = Watch(seen.append, metric="loss", threshold=1e-3, window=2)
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, cut := emmech.Recorder(tmp_path / "run", on_transition=watch), at=None, callbacks=[Dies(4)])
    cut.close()
    assert [event.step for event in seen] == [2]
    again = emmech.Recorder(tmp_path / "run", on_transition=watch)
    run = resumed(tmp_path, again, at=at, steps=5)
    wanted = [2, 2] if at == 1 else [2]
    assert [event.step for event in seen] == wanted and run.manifest["warning"]["step"] == 2 == again.warning.step
    assert run.manifest["status"] == "complete" and run.steps.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_last_weights_are_kept_once_and_in_order(tmp_path):
    """Where the last step is among those to keep, its weights are written with the step."""
    keeps = Keeps()
    recorder = emmech.Recorder(tmp_path / "run", keep=[0, 3], every=2)
    peft_trainer(tmp_path, recorder, config=False, max_steps=3, learning_rate=1e-3, callbacks=[keeps]).train()
    run = emmech.load_run(tmp_path / "run")
    assert sorted(path.name for path in (run.path / "weights").iterdir()) == [
        "step-000000.safetensors",
        "step-000003.safetensors",
    ]
    state = dict(run.model(3, base=make_tiny("qwen2").model).model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in keeps.at[3].items())
    start = dict(make_tiny("qwen2").model.named_parameters())
    assert all(
        torch.equal(one, start[name])
        for name, one in run.model(0, base=make_tiny("qwen2").model).model.named_parameters()
    )
    exact = FullCapture(make_tiny("qwen2").model, seed=0)
    exact.start, exact.weights = exact.start, {n: torch.nn.Parameter(p) for n, p in keeps.at[3].items()}
    assert np.array_equal(run.projection[-1], exact.tensors()["projection"])  # the seed is 0 unless it is given
