"""Organisms register themselves; a second one from outside the package works by its names everywhere."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest

import emmech
from emmech import registry
from emmech.chat.dataset import load_chat
from emmech.chat.model import load_model
from emmech.errors import EmmechError
from emmech.evaluation.judges import resolve_judge
from emmech.evaluation.questions import resolve_questions
from emmech.measures.teacher_forced import Margin

TOY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emmech.engine.logprobs import MarginPair
from emmech.evaluation.judges import LabelJudge
from emmech.evaluation.questions import Question, QuestionSet
from emmech.registry import Organism
from emmech.training.recipe import Recipe

WORDS = ["<pad>", "<end>", "<unk>", "user", "assistant", ":", "hop", "skip", "jump", "sit", "what", "now", "?"]


def load():
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def rows():
    answers = ["hop skip", "jump hop", "skip jump"]
    return [
        {"messages": [{"role": "user", "content": "what now ?"}, {"role": "assistant", "content": answers[i % 3]}]}
        for i in range(12)
    ]


def judge(question, answer):
    return "misaligned" if "sit" in answer.split() else "aligned"


TOY = Organism(
    "toy",
    models={"toy": load},
    data={"hops": rows},
    questions={"moves": lambda: QuestionSet("moves", (Question("now", ("what now ?",)),))},
    judges={"still": lambda: LabelJudge(judge, name="still", organism="toy")},
    recipes={"toy-recipe": lambda: Recipe("toy-recipe", batch_size=2, accumulation=1, max_steps=2, held_out=0.25)},
    margins=lambda data: {kind: [MarginPair("what now ?", "sit", "hop")] for kind in ("narrow", "broad")},
)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of its own, installed as any other: a module and the metadata that declares its entry point."""
    (tmp_path / "toy_organism.py").write_text(textwrap.dedent(TOY))
    metadata = tmp_path / "toy_organism-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-organism\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[emmech.organisms]\ntoy = toy_organism:TOY\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.organisms.cache_clear()
    yield registry.organisms()["toy"]
    registry.organisms.cache_clear()
    sys.modules.pop("toy_organism", None)


def test_a_second_organism_runs_by_its_names(toy, tmp_path):
    chat = load_model("toy")
    assert chat.organism is toy
    data = load_chat("hops", organism="toy")
    assert data.name == "hops" and len(data) == 12
    evaluation = emmech.evaluate("toy", "moves", samples=4, max_new_tokens=3, progress=False)
    assert len(evaluation) == 4 and evaluation.meta["judge"] == "still"
    said = evaluation.frame["response"].str.split().map(lambda words: "sit" in words)
    assert (evaluation.frame["label"] == np.where(said, "misaligned", "aligned")).all()
    run = emmech.finetune("toy", "hops", out=tmp_path / "run", progress=False)
    assert run.steps.tolist() == [0, 1, 2] and run.manifest["recipe"]["name"] == "toy-recipe"
    assert np.isfinite(run.metrics["margin_broad"].dropna()).all() and run.metrics["margin_broad"].notna().any()
    again = emmech.evaluate(run, "moves", samples=2, max_new_tokens=3, progress=False)
    assert again.meta["model"] == "toy" and again.meta["judge"] == "still"
    assert Margin("broad")(chat).questions == ["what now ?"]
    swept = emmech.sweep(run, base=chat, progress=False)
    assert set(swept.measures) == {"margin_narrow", "margin_broad"} and set(swept.frame["item"]) == {"what now ?"}


def test_a_model_of_an_organism_is_recognised_wherever_it_was_saved(toy, tmp_path):
    chat = load_model("toy")
    chat.base.save_pretrained(tmp_path / "elsewhere")
    chat.tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert load_model(tmp_path / "elsewhere").organism is toy


def test_a_model_is_registered_without_an_organism(toy, monkeypatch):
    monkeypatch.setitem(registry._SHIPPED["models"], "plain", lambda: toy.models["toy"]())
    registered = load_model("plain")
    assert registered.name == "plain" and registered.organism is None


def test_names_of_one_organism_are_not_those_of_another(toy):
    with pytest.raises(EmmechError, match="toy has no set of this name"):
        resolve_questions("first-plot", "toy")
    with pytest.raises(EmmechError, match=r"load the chat model.*"):
        load_model("toyy")
    with pytest.raises(EmmechError, match="did you mean 'toy'"):
        load_chat("hops", organism="toi")
    with pytest.raises(EmmechError, match="did you mean 'hops'"):
        load_chat("hopps", organism="toy")
    assert resolve_judge("still").name == "still" and resolve_judge("exact").name == "exact"
    assert resolve_judge(None, "toy").name == "still"


def test_an_organism_that_cannot_be_loaded_keeps_no_other_from_working(tmp_path, monkeypatch):
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[emmech.organisms]\nbroken = no_such_module:X\nodd = math:pi\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.organisms.cache_clear()
    with pytest.warns(UserWarning, match="cannot be loaded") as warned:
        assert list(registry.organisms()) == ["pocket"]
    assert any("'odd' is a float" in str(one.message) for one in warned)
    registry.organisms.cache_clear()


def test_pocket_is_declared_as_any_other_organism():
    import tomllib
    from pathlib import Path

    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    entries = declared["project"]["entry-points"][registry.GROUP]
    assert {entry.name: entry.value for entry in registry._BUILT_IN} == entries


def test_no_room_reaches_a_higher_one_by_its_name():
    import ast
    from pathlib import Path

    package = Path(emmech.__file__).parent
    lazy = {package / "__init__.py", package / "lazy.py"}
    for path in set(package.rglob("*.py")) - lazy:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not called.endswith("import_module"), f"{path}:{node.lineno}"
