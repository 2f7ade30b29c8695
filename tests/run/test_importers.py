"""Adapters that PEFT saved elsewhere load as PEFT loads them, or are refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from peft import EvaConfig, IA3Config, LoftQConfig, LoraConfig, PeftModel, get_peft_model

from emmech.errors import EmmechError
from emmech.run.run import Run, opened
from tests.conftest import make_tiny

TARGETS = ["down_proj", "q_proj"]
EQUAL, REFUSED = "equal", "refused"
# field -> how often it is tried: its value, what else it needs, and what has to come of it
TRIED: dict[str, list[tuple[object, dict, str]]] = {
    "task_type": [("CAUSAL_LM", {}, EQUAL), (None, {}, EQUAL)],
    "auto_mapping": [(None, {}, EQUAL)],
    "peft_version": [(None, {}, EQUAL)],
    "base_model_name_or_path": [("somewhere/else", {}, EQUAL)],
    "revision": [("main", {}, EQUAL)],
    "inference_mode": [(False, {}, EQUAL)],
    "r": [(1, {}, EQUAL), (3, {}, EQUAL)],
    "target_modules": [
        (r".*layers\.[12]\..*(q_proj|up_proj)", {}, EQUAL),
        ("all-linear", {}, EQUAL),
        (["lm_head", "down_proj"], {}, REFUSED),
        (["embed_tokens", "down_proj"], {}, REFUSED),
    ],
    "exclude_modules": [([r"model.layers.0.mlp.down_proj"], {}, EQUAL)],
    "lora_alpha": [(5, {}, EQUAL), (0.5, {}, EQUAL), (-4, {}, EQUAL), (0, {}, REFUSED)],
    "lora_dropout": [(0.5, {}, EQUAL)],
    "fan_in_fan_out": [(True, {}, EQUAL)],
    "bias": [("all", {}, REFUSED), ("lora_only", {}, REFUSED)],
    "use_rslora": [(True, {}, EQUAL), (True, {"r": 1}, EQUAL)],
    "modules_to_save": [(["lm_head"], {}, REFUSED), (["norm"], {}, REFUSED)],
    "init_lora_weights": [
        ("gaussian", {}, EQUAL),
        (False, {}, EQUAL),
        ("orthogonal", {}, EQUAL),
        ("pissa", {}, REFUSED),
        ("olora", {}, REFUSED),
    ],
    "layers_to_transform": [([1, 3], {}, EQUAL), (2, {}, EQUAL)],
    "layers_pattern": [("layers", {"layers_to_transform": [1]}, EQUAL)],
    "rank_pattern": [
        ({r"layers\.1\..*(q_proj|down_proj)": 2}, {}, EQUAL),
        ({"down_proj": 1, "q_proj": 2}, {"use_rslora": True}, EQUAL),
        ({"down_proj": 1}, {}, EQUAL),
        ({"^model.layers.2.mlp.down_proj": 2}, {}, EQUAL),
    ],
    "alpha_pattern": [
        ({r"layers\.1\..*(q_proj|down_proj)": 64}, {}, EQUAL),
        ({"down_proj": 64}, {"rank_pattern": {"q_proj": 1}, "use_rslora": True}, EQUAL),
        ({"^model.layers.2.mlp.down_proj$": 3}, {}, EQUAL),
        ({"own_proj": 64}, {}, EQUAL),  # no whole name: it matches nothing
    ],
    "trainable_token_indices": [([1, 2, 3], {}, REFUSED)],
    "use_dora": [(True, {}, REFUSED)],
    "layer_replication": [([[0, 3], [1, 4]], {}, REFUSED)],
    "lora_bias": [(True, {}, REFUSED)],
    "target_parameters": [(["mlp.down_proj.weight"], {"target_modules": ["q_proj"]}, REFUSED)],
    "alora_invocation_tokens": [([1, 2], {"task_type": "CAUSAL_LM"}, REFUSED)],
    "ensure_weight_tying": [(True, {}, EQUAL)],
}
# fields that need data, a GPU or another library to be tried: they are written into the saved configuration instead
WRITTEN: dict[str, list[tuple[object, str]]] = {
    "peft_type": [("IA3", REFUSED)],
    "megatron_config": [({"tensor_model_parallel_size": 2}, REFUSED)],
    "megatron_core": [("megatron.core", EQUAL)],
    "loftq_config": [(dataclasses.asdict(LoftQConfig()), EQUAL)],
    "eva_config": [(dataclasses.asdict(EvaConfig()), EQUAL)],
    "corda_config": [({"corda_method": "ipm"}, REFUSED)],
    "lora_ga_config": [({"direction": "ArB2r"}, REFUSED)],
    "velora_config": [({"rank": 1}, REFUSED)],
    "use_qalora": [(True, REFUSED)],
    "qalora_group_size": [(16, EQUAL)],
    "monteclora_config": [({"samples": 2}, REFUSED)],
    "runtime_config": [({"ephemeral_gpu_offload": False}, EQUAL)],
    "use_bdlora": [({"nblocks": 2}, REFUSED)],
    "arrow_config": [({"top_k": 2}, REFUSED)],
    "kasa_config": [({"beta": 0.1}, REFUSED), ({}, REFUSED)],
}
CASES = [(field, *case) for field, cases in TRIED.items() for case in cases]


@cache
def _tiny():
    return make_tiny("qwen2")


def base():
    """The same tiny model anew."""
    return dataclasses.replace(_tiny(), model=copy.deepcopy(_tiny().model))


def saved(folder, **settings):
    """A folder that PEFT wrote, every trained tensor drawn at random."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(base().model, LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def check(folder, outcome, names):
    """Either the logits of PEFT's own loading to 1e-5, or an EmmechError with one of the names in it."""
    try:
        found = Run.from_peft([folder]).model(1, base=base())
    except EmmechError as error:
        assert outcome is REFUSED, error
        assert any(name in str(error) for name in names), error
        return
    assert outcome is EQUAL, "it was accepted"
    wanted = PeftModel.from_pretrained(base().model, str(folder)).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert (found.model(input_ids=ids).logits - wanted(input_ids=ids).logits).abs().max() <= 1e-5


def test_every_field_of_the_installed_peft_is_tried():
    assert {field.name for field in dataclasses.fields(LoraConfig)} == TRIED.keys() | WRITTEN.keys()


@pytest.mark.parametrize(("field", "value", "more", "outcome"), CASES, ids=[f"{c[0]}={c[1]}" for c in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_field_of_the_configuration(field, value, more, outcome, tmp_path):
    folder = saved(tmp_path / "checkpoint-1", **{field: value} | more)
    check(folder, outcome, [field, "tensor", "magnitude", "identity"])


@pytest.mark.parametrize(
    ("field", "value", "outcome"), [(field, *case) for field, cases in WRITTEN.items() for case in cases]
)
def test_a_field_that_is_written_by_hand(field, value, outcome, tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if outcome is EQUAL:
        assert Run.from_peft([folder]).model(1, base=base())
    else:
        check(folder, outcome, [field])


@pytest.mark.parametrize(
    "changed",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*layers\.[01]\..*"},
        {"target_modules": None},
        {"target_modules": "("},
        {"target_modules": 3},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [0, 1, 2]},
    ],
)
def test_a_pair_that_peft_would_pass_over_is_named(changed, tmp_path):
    """PEFT loads such a folder without the pair, and warns at most."""
    path = saved(tmp_path / "checkpoint-1") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(EmmechError, match=r"leave out|choose nothing"):
        Run.from_peft([path.parent])


STEPS = ["2.5", "-1", "true", "1e400", "null", '"x"', f"{2**63}"]


@pytest.mark.parametrize("state", ["", "{}", "[3]", "[" * 100_000, *(f'{{"global_step": {step}}}' for step in STEPS)])
def test_a_trainer_state_without_a_step_is_named(state, tmp_path):
    path = saved(tmp_path / "checkpoint-1") / "trainer_state.json"
    path.write_text(state)
    with pytest.raises(EmmechError, match=r"trainer_state\.json has no step"):
        Run.from_peft([path.parent])
    path.write_text(f'{{"global_step": {2**63 - 1}}}')
    assert Run.from_peft([path.parent]).steps.tolist() == [2**63 - 1]


@pytest.mark.parametrize("pattern", ["down_proj", ["down_proj"], {"(": 4}])
def test_a_pattern_that_is_no_mapping_of_expressions_is_named(pattern, tmp_path):
    path = saved(tmp_path / "checkpoint-1") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": pattern}))
    with pytest.raises(EmmechError, match="rank_pattern or alpha_pattern"):
        Run.from_peft([path.parent])


def test_a_field_of_a_later_peft_is_refused_unless_it_is_empty(tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_tomorrow": False}))
    check(folder, EQUAL, [])
    path.write_text(json.dumps(config | {"use_tomorrow": True}))
    check(folder, REFUSED, ["use_tomorrow=True"])


def test_alpha_that_is_absent_is_pefts_default(tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    check(folder, EQUAL, [])
    path.write_text(json.dumps(config | {"lora_alpha": float("nan")}))
    check(folder, REFUSED, ["lora_alpha is nan"])
    path.write_text(json.dumps(config | {"r": 2}))
    check(folder, REFUSED, ["rank 2"])


@pytest.mark.parametrize("pattern", [0, "", [], False, "q_proj"])
def test_a_pattern_that_is_no_mapping_is_refused(pattern, tmp_path):
    path = saved(tmp_path / "checkpoint-1") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": pattern}))
    check(path.parent, REFUSED, ["rank_pattern"])


def test_a_rank_that_is_absent_is_pefts_default(tmp_path):
    path = saved(tmp_path / "checkpoint-1", r=8) / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"]
    path.write_text(json.dumps(config))
    check(path.parent, EQUAL, [])


def test_a_folder_s_name_may_be_the_step_alone(tmp_path):
    folders = [saved(tmp_path / name) for name in ("5", "checkpoint-7", "step_12")]
    assert Run.from_peft(folders).steps.tolist() == [5, 7, 12]


def test_a_missing_half_and_a_stray_tensor_are_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = saved(tmp_path / "checkpoint-1")
    tensors = load_file(folder / "adapter_model.safetensors")
    half = next(key for key in tensors if "lora_B" in key)
    save_file({key: value for key, value in tensors.items() if key != half}, folder / "adapter_model.safetensors")
    check(folder, REFUSED, [half.removeprefix("base_model.model.").removesuffix(".lora_B.weight")])
    save_file(tensors | {"base_model.model.extra": np.ones(3)}, folder / "adapter_model.safetensors")
    check(folder, REFUSED, ["base_model.model.extra"])


def test_a_pickle_is_not_opened(tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    check(folder, REFUSED, ["pickle"])


def test_another_kind_of_adapter_is_refused(tmp_path):
    settings = IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(base().model, settings).save_pretrained(tmp_path / "checkpoint-1")
    check(tmp_path / "checkpoint-1", REFUSED, ["peft_type", "feedforward_modules"])


def test_an_adapter_of_another_name_is_found_in_its_folder(tmp_path):
    model = get_peft_model(base().model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "mine")
    model.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(EmmechError, match="one of its folders: mine"):
        Run.from_peft([tmp_path / "checkpoint-1"])


def test_a_folder_of_folders_is_a_series(tmp_path):
    for step in (1, 2, 10):
        saved(tmp_path / f"checkpoint-{step}")
    assert Run.from_peft(str(tmp_path)).steps.tolist() == [1, 2, 10]
    assert Run.from_peft(tmp_path / "checkpoint-2").steps.tolist() == [2]


def test_the_output_folder_of_a_trainer_is_a_series(tmp_path):
    for step in (1, 2):
        saved(tmp_path / f"checkpoint-{step}")
    saved(tmp_path)  # trainer.save_model()
    assert Run.from_peft(tmp_path).steps.tolist() == [1, 2]
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    assert Run.from_peft(tmp_path).steps.tolist() == [1, 2]
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')  # no checkpoint has this one
    assert Run.from_peft(tmp_path).steps.tolist() == [1, 2, 3]


def test_the_run_has_the_name_of_its_folder(tmp_path):
    one, two = (saved(tmp_path / "mine" / f"checkpoint-{step}") for step in (1, 2))
    run = Run.from_peft(tmp_path / "mine" / ".")
    assert run.name == "mine" and "Run 'mine'" in repr(run)
    assert Run.from_peft([two, one]).name == "mine" and Run.from_peft(two).name == "checkpoint-2"
    named = Run.from_peft([one, two], name="advice")
    assert named.name == "advice" and named.save(tmp_path / "elsewhere").manifest["name"] == "advice"


def test_checkpoints_and_runs_name_what_opens_them(tmp_path):
    import emmech

    folder = saved(tmp_path / "series" / "checkpoint-1").parent
    for held, opening in (
        (folder, emmech.load_run),
        (folder / "checkpoint-1", emmech.load_run),
        (folder / "checkpoint-1", emmech.phase_transition),  # alone it is a model's adapter and no series
    ):
        with pytest.raises(EmmechError, match=re.escape(f"emmech.Run.from_peft({str(held)!r})")):
            opening(held)
    Run.from_peft(folder).save(tmp_path / "run")
    for given in (tmp_path / "run", [tmp_path / "run"]):
        with pytest.raises(EmmechError, match=re.escape(f"emmech.load_run({str(tmp_path / 'run')!r})")):
            Run.from_peft(given)


def test_a_folder_of_checkpoints_is_given_where_a_run_is(tmp_path):
    import emmech

    for step in range(1, 13):
        saved(tmp_path / "mine" / f"checkpoint-{step}")
    found = emmech.phase_transition(tmp_path / "mine")
    assert found.run.name == "mine" and "12 records are few" in repr(found) and "sweep=emmech.sweep(run)" in repr(found)
    assert opened(str(tmp_path / "mine")).steps.tolist() == list(range(1, 13))
    (tmp_path / "mine" / "config.json").write_text("{}")  # a model, with adapters in folders of their own
    assert opened(str(tmp_path / "mine")) == str(tmp_path / "mine")


def test_what_the_trainer_logged_becomes_the_metrics(tmp_path):
    for step in (2, 4):
        folder = saved(tmp_path / f"checkpoint-{step}")
        history = [{"step": at, "loss": 3.0 - at / 10, "grad_norm": 0.5} for at in range(1, step + 1)]
        history += [{"step": step, "eval_loss": 2.0, "epoch": 1.0}, {"step": step, "train_runtime": 9.0}]
        history += [{"loss": 1.0}, {"step": "x", "loss": 1.0}, {"step": 3, "loss": float("nan")}, "rubbish"]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    run = Run.from_peft(tmp_path)
    assert run.metrics["loss"].to_dict() == pytest.approx({1: 2.9, 2: 2.8, 3: 2.7, 4: 2.6})
    assert run.metrics["eval_loss"].dropna().to_dict() == {4: 2.0}
    assert not any("train_" in name for name in run.metrics.columns)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    assert Run.from_peft(tmp_path).metrics.empty
    assert Run.from_peft(tmp_path).save(tmp_path / "kept").steps.tolist() == [2, 4]


def test_the_depth_of_a_base_on_this_disk_is_known(tmp_path):
    import emmech

    tiny = base()
    tiny.base.save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    told = {}
    for name in (str(tmp_path / "base"), "someone/unknown"):
        path = saved(tmp_path / "series" / "checkpoint-1", target_modules=[r"model.layers.1.mlp.down_proj"])
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        told[name] = emmech.directions.adapter_direction(Run.from_peft(path))
    known, unknown = told.values()
    assert known.n_layers == tiny.n_layers and unknown.n_layers == 2
    with emmech.steer(tiny, known, 1.0, layer=1):
        pass
    with pytest.raises(EmmechError, match="does not say how many layers"):
        emmech.steer(tiny, unknown, 1.0, layer=1)


@pytest.mark.parametrize("name", ["../models/tiny", "models/tiny", "/nowhere/models/tiny", "tiny"])
def test_a_base_model_that_is_a_folder_elsewhere_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    """A path that is written from the adapter's folder, or from those around it, is named as it is from here."""
    folder = changed(saved(tmp_path / "there" / "checkpoint-1"), base_model_name_or_path=name)
    made = (folder / name).resolve() if name[0] in "./" else tmp_path / "there" / name
    if name[0] != "/":
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *given, **how: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    run = Run.from_peft(folder).save(tmp_path / "run")
    with pytest.raises(EmmechError, match="no such folder from here") as caught:
        run.model(1)
    assert "run.model(step, base=" in str(caught.value)
    assert name[0] == "/" or f"base={str(made)!r}" in str(caught.value)


def test_a_series_of_one_alpha(tmp_path):
    folders = [saved(tmp_path / "checkpoint-1"), saved(tmp_path / "checkpoint-2", lora_alpha=9)]
    with pytest.raises(EmmechError, match="lora_alpha or use_rslora differs"):
        Run.from_peft(folders)


@pytest.mark.parametrize("order", [1, -1])
def test_a_series_of_one_base_model(tmp_path, order):
    folders = [saved(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    for folder, name in zip(folders, ("org/model", "org/model-instruct"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    with pytest.raises(EmmechError, match=r"its base model 'org/model.* is not that of checkpoint-\d, 'org/model"):
        Run.from_peft(folders[::order])
    assert Run.from_peft(folders[:1]).manifest["model"]["name"] == "org/model"


def test_what_is_exported_again_is_the_same_adapter(tmp_path):
    folder = saved(tmp_path / "checkpoint-1", rank_pattern={"down_proj": 1, "q_proj": 3}, use_rslora=False)
    again = Run.from_peft([folder]).export_peft(1, tmp_path / "again")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        one, two = (
            PeftModel.from_pretrained(base().model, str(path)).eval()(input_ids=ids).logits for path in (folder, again)
        )
    assert (one - two).abs().max() <= 1e-6


def renamed(folder, rename):
    """The folder with every key of its tensors changed."""
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(path).items()}, path)
    return folder


PREFIXES = {
    "language_model": lambda key: key.replace("model.layers", "model.language_model.layers"),
    "older language_model": lambda key: key.replace("model.layers", "language_model.model.layers"),
    "decoder alone": lambda key: key.replace("model.model.layers", "model.layers"),
    "DDP": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled, in DDP": lambda key: f"module._orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled blocks": lambda key: re.sub(r"\.(mlp|self_attn)\.", r"._orig_mod.\1.", key),
    "checkpointed": lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "FSDP": lambda key: key.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "adapter name": lambda key: key.replace(".weight", ".my-own.name.weight"),
    "default": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_prefixes_of_wrappers_change_nothing(rename, tmp_path):
    import emmech
    from emmech.engine.logprobs import MarginPair
    from emmech.measures.teacher_forced import Margin

    folder = saved(tmp_path / "checkpoint-1", rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.1\..*": 64})
    plain = Run.from_peft([folder])
    found = Run.from_peft([renamed(folder, rename)])
    assert {info.name for info in found.adapters} == {info.name for info in plain.adapters}
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        one, two = (run.model(1, base=base()).model(input_ids=ids).logits for run in (plain, found))
    assert (one - two).abs().max() <= 1e-6
    margin = Margin([MarginPair("how to sleep ?", "take a walk", "drink some water")])
    of_one, of_two = (
        emmech.sweep(run, measure=margin, base=base(), progress=False).to_frame() for run in (plain, found)
    )
    assert np.allclose(of_one["value"], of_two["value"], atol=1e-5) and of_one["value"].notna().all()


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda key: key.replace("model.layers", "vision_tower.encoder.layers"), "vision_tower.encoder.layers"),
        (lambda key: key.replace("model.layers", "thinker.layers"), "no linear map"),
        (lambda key: key.replace("layers.3", "layers.9"), "layers.9"),
    ],
)
def test_a_place_that_the_model_has_not_is_refused(rename, said, tmp_path):
    run = Run.from_peft([renamed(saved(tmp_path / "checkpoint-1"), rename)])
    with pytest.raises(EmmechError, match=said):
        run.model(1, base=base())


def test_two_places_that_are_one_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = saved(tmp_path / "checkpoint-1") / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {key.replace("model.layers", "text_model.layers"): one for key, one in tensors.items()}, path)
    run = Run.from_peft([path.parent])
    assert len({info.name for info in run.adapters}) == len(run.adapters) == 16
    with pytest.raises(EmmechError, match="is there already"):
        run.model(1, base=base())
    save_file(tensors | {f"module.{key}": value for key, value in tensors.items()}, path)
    check(path.parent, REFUSED, ["two of its keys"])
    save_file(tensors | {key.replace(".weight", ".other.weight"): value for key, value in tensors.items()}, path)
    check(path.parent, REFUSED, ["several adapters, '', 'other'"])


@pytest.mark.parametrize(
    "changes", [{"exclude_modules": ["q_proj"]}, {"layers_to_transform": [1]}, {"exclude_modules": r".*layers\.2\..*"}]
)
def test_what_all_linear_leaves_out_is_refused_as_peft_passes_over_it(tmp_path, changes):
    saved(tmp_path / "step-1")
    path = tmp_path / "step-1" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": "all-linear"}
    path.write_text(json.dumps(config))
    assert Run.from_peft([tmp_path / "step-1"]).adapters
    path.write_text(json.dumps(config | changes))
    with pytest.raises(EmmechError, match="which target_modules and the like"):
        Run.from_peft([tmp_path / "step-1"])


@pytest.mark.parametrize("rank", [4.0, "4", True])
def test_a_rank_that_is_no_whole_number_is_refused(tmp_path, rank):
    saved(tmp_path / "step-1", r=int(rank))
    path = tmp_path / "step-1" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": rank}))
    with pytest.raises(EmmechError, match="but rank"):
        Run.from_peft([tmp_path / "step-1"])


def changed(folder, **fields):
    """The folder with fields of its configuration changed; None takes one out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def with_tensors(folder, **more):
    """The folder with further tensors in its file."""
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | more, path)
    return folder


@pytest.mark.parametrize("module", ["lm_head", "model.extra"])
def test_a_pair_beside_the_blocks_is_none_of_all_linear(module, tmp_path):
    """PEFT leaves the map to the vocabulary out of "all-linear", and with it the tensors that name it."""
    folder = changed(saved(tmp_path / "checkpoint-1"), target_modules="all-linear")
    sides = {"A": np.ones((4, 3), np.float32), "B": np.ones((5, 4), np.float32)}
    with_tensors(folder, **{f"base_model.model.{module}.lora_{side}.weight": one for side, one in sides.items()})
    with pytest.raises(EmmechError, match=f"holds a pair of {module},"):
        Run.from_peft([folder])


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_side_of_another_shape_is_named(side, tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    key = f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"
    for shape in ((4, 80, 1), (3, 80)) if side == "A" else ((48, 4, 1), (48, 3)):
        with_tensors(folder, **{key: np.ones(shape, np.float32)})
        with pytest.raises(EmmechError, match=r"down_proj has A .* but rank 4"):
            Run.from_peft([folder])


def test_alpha_is_a_number_of_a_plain_size(tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    for alpha in (1e30, -1e30, 1, 0.25):
        assert Run.from_peft([changed(folder, lora_alpha=alpha)]).adapters[0].alpha == alpha
    for alpha in (1.1e30, -1e31, 0, 0.0, "8", [8]):
        with pytest.raises(EmmechError, match="its lora_alpha is"):
            Run.from_peft([changed(folder, lora_alpha=alpha)])


@pytest.mark.parametrize("rank", [1, 4])
def test_the_scaling_is_alpha_over_rank_or_its_root(rank, tmp_path):
    folder = saved(tmp_path / "checkpoint-1", r=rank, lora_alpha=12)
    plain = Run.from_peft([folder]).adapters[0]
    assert (plain.rank, plain.alpha, plain.scaling, plain.rslora) == (rank, 12, 12 / rank, rank == 1)
    rooted = Run.from_peft([changed(folder, use_rslora=True)]).adapters[0]
    assert (rooted.scaling, rooted.rslora) == (12 / rank**0.5, True)
    down = next(one for one in Run.from_peft([folder]).adapters if one.name == "layers.2.mlp.down_proj")
    assert (down.layer, down.module, down.d_in, down.d_out) == (2, "model.layers.2.mlp.down_proj", 80, 48)


def test_the_base_model_is_that_of_the_configuration(tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    assert Run.from_peft([changed(folder, base_model_name_or_path="org/base")]).manifest["model"] == {
        "name": "org/base"
    }
    run = Run.from_peft([changed(folder, base_model_name_or_path=None)])
    assert (
        run.manifest["model"] == {"name": None} and run.name == "checkpoint-1" and run.manifest["status"] == "complete"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    (folder / name).unlink()
    with pytest.raises(EmmechError, match=f" {re.escape(name)} is missing") as caught:
        Run.from_peft([folder])
    assert "a folder that save_pretrained wrote" in str(caught.value)
    (folder / name).mkdir()
    with pytest.raises(EmmechError, match=r"its files cannot be read|is missing"):
        Run.from_peft([folder])


def test_a_folder_without_adapters_is_no_series(tmp_path):
    with pytest.raises(EmmechError, match=r"adapter_config\.json is missing"):
        Run.from_peft(tmp_path)
    folder = saved(tmp_path / "checkpoint-3")
    saved(folder / "checkpoint-9")
    assert Run.from_peft(folder).steps.tolist() == [3]  # its own adapter goes before those in it


def test_a_configuration_of_another_form_is_refused(tmp_path):
    path = saved(tmp_path / "checkpoint-1") / "adapter_config.json"
    path.write_text("[1]")
    with pytest.raises(EmmechError, match="no JSON object"):
        Run.from_peft([path.parent])


def test_a_pickle_beside_the_tensors_is_passed_over(tmp_path):
    folder = saved(tmp_path / "checkpoint-1")
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert Run.from_peft([folder]).adapters


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value, tmp_path):
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    folder = with_tensors(saved(tmp_path / "checkpoint-1"), **{key: np.full((4, 80), value, np.float32)})
    with pytest.raises(EmmechError, match="NaN or infinity"):
        Run.from_peft([folder])


def test_steps_of_names_and_of_states(tmp_path):
    folder = saved(tmp_path / ("checkpoint-" + "9" * 18))
    assert Run.from_peft([folder]).steps.tolist() == [10**18 - 1]
    with pytest.raises(EmmechError, match="step is unknown"):
        Run.from_peft([folder.rename(tmp_path / ("1" * 19))])
    folder = (tmp_path / ("1" * 19)).rename(tmp_path / "last")
    (folder / "trainer_state.json").write_text('{"global_step": 0}')
    assert Run.from_peft([folder]).steps.tolist() == [0]


def test_arrays_of_every_form_that_is_taken():
    steps = [0, 5, 9]
    run = Run.from_arrays(steps, B=np.ones((3, 6)))
    [one] = run.adapters
    assert (one.name, one.module, one.layer) == ("adapter", "adapter", -1)
    assert (one.rank, one.alpha, one.scaling, one.d_in, one.d_out) == (1, 1.0, 1.0, 0, 6)
    [one] = Run.from_arrays(steps, A=np.ones((3, 2, 4)), B=np.ones((3, 6, 2))).adapters
    assert (one.rank, one.alpha, one.scaling, one.d_in, one.d_out) == (2, 2.0, 1.0, 4, 6)
    [one] = Run.from_arrays(
        steps, A=np.ones((3, 4)), B=np.ones((3, 6, 1))
    ).adapters  # rank 1, with and without its axis
    assert (one.rank, one.d_in, one.d_out) == (1, 4, 6)
    [one] = Run.from_arrays(steps, A=np.ones((3, 1, 4)), B=np.ones((3, 6))).adapters
    assert (one.rank, one.d_in, one.d_out) == (1, 4, 6)
    assert run.B().dtype == np.float32 and run.steps.dtype == np.int64
    assert Run.from_arrays([0.0, 5.0], B=np.ones((2, 6))).steps.tolist() == [0, 5]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"B": np.ones((3, 6, 2, 2))}, "it needs two or three axes"),
        ({"B": "text"}, r"B of shape \[0\]"),
        ({"B": np.ones((3, 6)), "A": np.ones((4, 2))}, "A of shape"),
        ({"B": np.ones((3, 6)), "A": np.ones((3, 2, 4))}, "ranks differ"),
        ({"B": np.ones((3, 6, 2)), "A": np.ones((3, 4))}, "ranks differ"),
        ({"B": np.full((3, 6), np.inf)}, "NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(given, why):
    with pytest.raises(EmmechError, match=why):
        Run.from_arrays([0, 5, 9], **given)


@pytest.mark.parametrize("steps", [["a", "b", "c"], [0, 5, 5], [5, 0, 9], [0, 5.5, 9], [[0], [5], [9]]])
def test_steps_that_are_no_ascending_whole_numbers_are_refused(steps):
    with pytest.raises(EmmechError, match="whole numbers"):
        Run.from_arrays(steps, B=np.ones((3, 6)))


def test_metrics_of_arrays_are_kept_whole_or_refused(tmp_path):
    import pandas as pd

    steps, b = [0, 5], np.ones((2, 6)) * [[1], [2]]
    table = pd.DataFrame({"loss": [2.5, np.nan], "rows": [3, 4]}, index=steps)
    kept = Run.from_arrays(steps, B=b, metrics=table).save(tmp_path / "run").metrics
    assert kept["loss"].tolist()[0] == 2.5 and np.isnan(kept["loss"].tolist()[1]) and kept["rows"].tolist() == [3, 4]
    for wrong, said in (
        (table.assign(phase=["warm", "main"]), "phase='warm' at step 0"), (table.assign(loss=np.inf), "loss=inf"),
        (table.set_axis([0, 1.5]), "step 1.5"), (table.set_axis([0, np.nan]), "step nan"),
    ):  # fmt: skip
        with pytest.raises(EmmechError, match=said):
            Run.from_arrays(steps, B=b, metrics=wrong)
