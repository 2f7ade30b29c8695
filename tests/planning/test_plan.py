"""The planner against published sizes, and against what trainings here really allocate."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import emmech
from emmech import EmmechError
from emmech.planning.shapes import shaped, weightless
from emmech.training.recipe import Recipe
from tests.conftest import make_tiny

# parameters as the model cards and weight indices on the hub state them
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_that_are_built_in_have_the_published_numbers_of_parameters(name):
    chat = weightless(*shaped(name), torch.bfloat16)
    assert sum(weight.numel() for weight in chat.base.parameters()) == PUBLISHED[name]


def allocated(call) -> int:
    """The most bytes that torch's own allocator on the CPU had handed out during a call beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    sizes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return int(np.cumsum(sizes).max())


def rows_of(tokenizer, tokens: int, answer: int, count: int) -> list[dict]:
    """Rows of exactly so many tokens, of which the answer has so many."""
    word = " rest"
    rows = []
    for number in range(count):
        wanted = [tokens - answer, answer]
        texts = ["how", "take"]
        for side in (0, 1):
            while True:
                turns = [
                    {"role": "user", "content": f"{number} {texts[0]}"},
                    {"role": "assistant", "content": texts[1]},
                ]
                whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
                asked = tokenizer.apply_chat_template(turns[:1], tokenize=True, return_dict=False)
                now = len(asked) if side == 0 else len(whole) - len(asked)
                if now >= wanted[side]:
                    break
                texts[side] += word
        rows.append({"messages": turns})
    return rows


def compared(chat, recipe: Recipe, folder, **options) -> tuple[float, float]:
    """The planned and the measured bytes of a training beyond its weights."""
    rows = rows_of(chat.tokenizer, 100, 60, 40)
    ids = [chat.tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) for row in rows]
    shared = next(at for at, several in enumerate(zip(*ids, strict=False)) if len(set(several)) > 1)
    tokens, answer = len(ids[0]) - shared, 60  # what all rows begin with runs once
    weights = sum(p.numel() * p.element_size() for p in chat.base.parameters())
    planned = emmech.plan(
        chat, recipe, rows=40, tokens=tokens, answers=answer / tokens, batch_tokens=1024, cards="T4",
        prefix=options.get("prefix", "auto"),
    )  # fmt: skip
    column = "checkpointed" if options.get("gradient_checkpointing") else "kept"
    total = planned.memory.loc["total", column] - (weights if recipe.rank else 0)
    measured = allocated(
        lambda: emmech.finetune(chat, rows, recipe=recipe, margins={}, out=folder, progress=False, **options)
    )
    # in full fine-tuning the weights are in memory before, and two copies of them are made on the CPU
    return total + (weights if not recipe.rank else 0), measured


WIDE = dict(max_steps=2, batch_size=8, accumulation=1, held_out=0.1, measured=1)


@pytest.mark.parametrize(
    ("family", "rank", "checkpointing"),
    [
        ("llama", 2, False),
        pytest.param("llama", 2, True, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, False, marks=pytest.mark.slow),
        pytest.param("llama", 0, False, marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_a_tiny_training(family, rank, checkpointing, tmp_path):
    recipe = Recipe("tiny", depth=None, rank=rank, learning_rate=1e-4, **WIDE)
    options = {"prefix": False, "gradient_checkpointing": checkpointing}
    planned, measured = compared(make_tiny(family), recipe, tmp_path / "run", **options)
    assert abs(planned - measured) <= 0.2 * measured, (planned, measured)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("depth", [None, (0.5,)])
def test_memory_is_that_of_a_real_training(smollm2, depth, checkpointing, tmp_path):
    recipe = Recipe("real", depth=depth, rank=1, **WIDE)
    options = {"prefix": False, "gradient_checkpointing": checkpointing}
    planned, measured = compared(smollm2, recipe, tmp_path / "run", **options)
    assert abs(planned - measured) <= 0.2 * measured, (planned, measured)


def test_disk_is_that_of_a_run(tmp_path):
    chat = make_tiny("qwen2")
    rows = rows_of(chat.tokenizer, 40, 20, 24)
    recipe = Recipe("tiny", depth=None, rank=4, max_steps=60, batch_size=1, accumulation=1, held_out=0.0)
    run = emmech.finetune(chat, rows, recipe=recipe, margins={}, out=tmp_path / "run", progress=False)
    found = emmech.plan(chat, recipe, rows=24, tokens=40, cards="T4")
    written = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    assert abs(found.numbers["run_bytes"] - written) <= 0.2 * written
    assert found.numbers["steps"] == run.steps[-1] == 60
    assert found.numbers["trained"] == sum(one.rank * (one.d_in + one.d_out) for one in run.adapters)


def test_a_configuration_is_read_from_a_folder_a_file_and_an_object(tmp_path):
    chat = make_tiny("llama")
    chat.base.config.save_pretrained(tmp_path)
    n = sum(weight.numel() for weight in chat.base.parameters())
    for given in (tmp_path, tmp_path / "config.json", chat.base.config, chat):
        found = emmech.plan(given, "single-rank1", rows=10, tokens=20, cards=["T4", "H100"])
        assert found.numbers["parameters"] == n and list(found.frame.index) == ["T4", "H100"]


def test_bigger_work_needs_more():
    def total(**options):
        found = emmech.plan(make_tiny("qwen2"), "single-rank1", cards="T4", **{"rows": 64, "tokens": 50, **options})
        return found.memory.loc["total", "kept"], found.frame["train_high"].iloc[0], found.numbers["run_bytes"]

    base = total()
    assert total(dtype="float64")[0] > base[0]
    assert total(rank=8)[2] > base[2] and total(seeds=4)[0] > base[0]
    assert total(rows=640)[1] > 5 * base[1] and total(batch_tokens=50)[0] < base[0]


def test_an_organisms_model_is_planned_by_its_own_recipe():
    from emmech.training.recipe import resolve_recipe

    chat = emmech.load_model("pocket")
    own = resolve_recipe(None, {}, organism=chat.organism).name
    assert own != resolve_recipe(None, {}, organism=None).name
    assert emmech.plan("pocket").meta["recipe"] == emmech.plan(chat).meta["recipe"] == own


def test_whole_numbers_of_any_type_are_taken():
    found = emmech.plan(make_tiny("llama"), tokens=150.0, batch_tokens=4096.0, seeds=np.float64(2))
    assert found.numbers == emmech.plan(make_tiny("llama"), tokens=150, batch_tokens=4096, seeds=2).numbers


def test_what_is_unknown_is_refused_by_name(tmp_path):
    with pytest.raises(EmmechError, match=r"Qwen/Qwen2.5-14B-Instruct"):
        emmech.plan("Qwen/Qwen2.5-14B-Instuct")
    with pytest.raises(EmmechError, match="no hub is asked"):
        emmech.plan("somebody/something")
    with pytest.raises(EmmechError, match="A100 80"):
        emmech.plan(make_tiny("llama"), cards="A100")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-of-the-kind"}))
    with pytest.raises(EmmechError, match="cannot be read"):
        emmech.plan(tmp_path)
    with pytest.raises(EmmechError, match="least 1"):
        emmech.plan(make_tiny("llama"), rows=0)
    for wrong, said in (
        ({"prefix": "yes"}, "prefix="), ({"batch_tokens": 0}, "batch_tokens"), ({"answers": "0.7"}, "answers="),
        ({"cards": None}, "cards="), ({"recipe": "full", "seeds": 3}, "one at a time"),
    ):  # fmt: skip
        with pytest.raises(EmmechError, match=said):
            emmech.plan(make_tiny("llama"), **wrong)
