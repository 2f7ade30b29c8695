"""The Recorder reads and never takes part: same losses, same weights, same random numbers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import emmech
from emmech.chat.encode import encode
from emmech.errors import EmmechError
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
