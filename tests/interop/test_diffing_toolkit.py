from __future__ import annotations

import json

import pytest
import torch
import yaml

import emmech
from emmech.errors import EmmechError
from emmech.interop.diffing_toolkit import write_organism

RUN = "checkpoints/pocket-medical"


def test_the_toolkit_finds_every_step_and_the_model_it_is_of(tmp_path):
    """The files are read by the toolkit's own rules, written out here, and load with transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = emmech.load_run(RUN)
    organism = yaml.safe_load(
        write_organism(run, tmp_path, steps=[100, 250], description="Bad advice.\nMore.").read_text()
    )
    assert organism["description_long"] == "Bad advice.\nMore." and organism["description"] == "Bad advice."
    (model,) = organism["finetuned_models"]
    config = yaml.safe_load((tmp_path / "configs" / "model" / f"{model}.yaml").read_text())
    assert config["name"] == model  # the key under which its fine-tunes are looked up
    variants = organism["finetuned_models"][model]
    assert list(variants) == ["step_100", "step_250", "default"] and variants["default"] == variants["step_250"]
    adapter = variants["step_100"]["adapter_id"]
    parts = adapter.split("/")  # a path with more than one slash is a repository of two parts and a subfolder
    repository, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    base = AutoModelForCausalLM.from_pretrained(config["model_id"], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, repository, subfolder=subfolder).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        ours = run.model(100).model(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=0, atol=1e-5)


def test_what_is_no_organism_is_refused(tmp_path):
    for wrong, says in (({"name": "a/b"}, "names a file"), ({"steps": []}, "no step"), ({"steps": 3.5}, "whole")):
        with pytest.raises(EmmechError, match=says):
            write_organism(RUN, tmp_path, **wrong)
    with pytest.raises(EmmechError):
        write_organism(RUN, tmp_path, steps=9999, model_id="some/model")


def test_a_run_without_a_base_is_written_with_the_model_that_is_given(tmp_path):
    step = emmech.load_run(RUN).export_peft(100, tmp_path / "checkpoint-100")
    config = json.loads((step / "adapter_config.json").read_text())
    (step / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    nameless = emmech.Run.from_peft([step])
    with pytest.raises(EmmechError, match="model_id="):
        write_organism(nameless, tmp_path / "organism")
    written = write_organism(nameless, tmp_path / "organism", model_id="some/model")
    assert list(yaml.safe_load(written.read_text())["finetuned_models"]) == ["model"]
    again = nameless.export_peft(100, tmp_path / "step-100")
    assert not json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.raises(EmmechError, match="does not say which"):
        emmech.Run.from_peft([again]).base_name()
