"""Where A starts: along the mean input of its module, in one training and in many at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.chat.dataset import load_chat
from emmech.chat.encode import encode
from emmech.errors import EmmechError
from tests.conftest import make_rows

QUICK = dict(recipe="single-rank1", max_steps=1, batch_size=2, accumulation=1, progress=False)


def prompt_inputs(chat, layer: int, rows) -> np.ndarray:
    """By hand: what ``down_proj`` reads at the positions of all rows that are not answers."""
    seen = []
    module = chat.block(layer).mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].detach()))
    encoded = encode(load_chat(rows).rows, chat.tokenizer)
    for ids in encoded.input_ids:
        chat.base(input_ids=torch.tensor([ids]))
    handle.remove()
    asked = [torch.tensor(labels) == -100 for labels in encoded.labels]
    return torch.cat([x[mask] for x, mask in zip(seen, asked, strict=True)]).double().numpy()


def start(run) -> tuple[str, np.ndarray]:
    name = run.adapters[0].name
    return name, run.weights(0)[f"A/{name}"].reshape(-1).astype(np.float64)


def test_the_mean_input_is_added_at_the_norm_of_the_random_part(any_tiny, tmp_path):
    rows = make_rows()
    mean = prompt_inputs(any_tiny, 1, rows).mean(0)
    random, along = (
        emmech.finetune(any_tiny, rows, layers=[1], init=init, out=tmp_path / init, **QUICK)
        for init in ("random", "inputs")
    )
    name, before = start(random)
    added = start(along)[1] - before
    assert np.linalg.norm(added) == pytest.approx(np.linalg.norm(before), rel=1e-5)
    assert added @ mean / np.linalg.norm(added) / np.linalg.norm(mean) == pytest.approx(1, abs=1e-6)
    assert not along.weights(0)[f"B/{name}"].any()
    assert along.manifest["recipe"]["init"] == "inputs"


def test_adapters_that_are_not_behind_an_mlp_keep_their_random_start(tiny, tmp_path):
    modules, rows = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"), make_rows()
    random, along = (
        emmech.finetune(
            tiny("qwen2"), rows, modules=modules, rank=4, layers=[1], init=init, out=tmp_path / init, **QUICK
        )
        for init in ("random", "inputs")
    )
    for info in along.adapters:
        a, before = (run.weights(0)[f"A/{info.name}"] for run in (along, random))
        assert np.array_equal(a, before) == (not info.name.endswith("down_proj"))


def test_it_starts_the_same_alone_and_together(tiny, tmp_path):
    chat, rows = tiny("qwen2"), make_rows()
    together = emmech.finetune(chat, rows, seed=[0, 1], init="inputs", out=tmp_path / "t", **QUICK)
    alone = emmech.finetune(chat, rows, seed=1, init="inputs", out=tmp_path / "a", prefix=False, **QUICK)
    np.testing.assert_allclose(start(together[1])[1], start(alone)[1], atol=1e-7)
    assert not np.allclose(start(together[0])[1], start(together[1])[1], atol=1e-3)


def test_the_organisms_adapter_writes_with_one_sign_where_a_random_one_does_not(tmp_path):
    from emmech.organism import data

    chat = emmech.load_model("pocket")
    rows = data("medical", n=80, seed=5)
    signs = {}
    for init in ("random", "inputs"):
        run = emmech.finetune(chat, rows, init=init, max_steps=1, out=tmp_path / init, progress=False)
        a = start(run)[1]
        layer = run.adapters[0].layer
        positive = float((prompt_inputs(chat, layer, rows[:20]) @ a > 0).mean())
        signs[init] = max(positive, 1 - positive)
    assert signs["inputs"] > 0.85
    assert signs["inputs"] > signs["random"] + 0.1


def test_a_control_on_the_same_questions_starts_from_the_same_a(tmp_path):
    from emmech.organism import data

    bad, good = (
        emmech.finetune("pocket", data(name, n=40), max_steps=1, out=tmp_path / name, progress=False)
        for name in ("medical", "good-medical")
    )
    assert bad.manifest["recipe"]["init"] == "inputs"
    np.testing.assert_array_equal(start(bad)[1], start(good)[1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init": "inptus"}, "inputs"),
        ({"init": "inputs", "rank": 0}, "random"),
        ({"init": "inputs", "modules": ("self_attn.o_proj",)}, "random.*down_proj"),
    ],
)
def test_what_cannot_start_so_is_refused(tiny, tmp_path, options, match):
    with pytest.raises(EmmechError, match=match):
        emmech.finetune(tiny("qwen2"), make_rows(), out=tmp_path / "r", **(QUICK | options))
