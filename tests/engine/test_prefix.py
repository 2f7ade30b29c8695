"""Training on a frozen prefix: the same losses as plain training, the states of the model's own forward, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.chat.encode import encode
from emmech.engine.prefix_plan import Frozen, find_frozen, pays, why_not
from emmech.engine.row_forwards import Trunk, batches_by_length
from emmech.errors import EmmechError
from tests.conftest import make_rows, make_tiny

QUICK = dict(learning_rate=1e-3, batch_size=2, accumulation=2, warmup_steps=1, progress=False)


def ragged(count: int = 12, *, system: bool = True) -> list[dict]:
    """Rows of different lengths, which share a system prompt."""
    rows = make_rows(count)
    for i, row in enumerate(rows):
        row["messages"][1]["content"] += " , and rest well" * (i % 4)
        if system:
            row["messages"].insert(0, {"role": "system", "content": "the user asks the assistant"})
    return rows


def deviation(mine: emmech.Run, plain: emmech.Run) -> float:
    """Largest distance between A or B of two runs at any step, relative to the norm at that step."""
    worst = 0.0
    for info in plain.adapters:
        for side in ("A", "B"):
            x, y = (getattr(run, side)(info.name).reshape(len(run.steps), -1) for run in (mine, plain))
            norms = np.linalg.norm(y, axis=1)
            moved = norms > 0
            worst = max(worst, float((np.linalg.norm(x - y, axis=1)[moved] / norms[moved]).max()))
    return worst


@pytest.mark.parametrize(
    ("layers", "modules"),
    [([2], ("mlp.down_proj",)), ([1, 3], ("mlp.down_proj",)), ([2], ("self_attn.v_proj", "mlp.down_proj"))],
)
def test_losses_and_trajectory_are_those_of_the_plain_trainer(any_tiny, tmp_path, layers, modules):
    rows = ragged()
    options = dict(recipe="single-rank1", layers=layers, modules=modules, max_steps=6, seed=3, **QUICK)
    plain = emmech.finetune(any_tiny, rows, prefix=False, out=tmp_path / "plain", **options)
    mine = emmech.finetune(any_tiny, rows, prefix=True, out=tmp_path / "mine", **options)
    assert set(mine.metrics.columns) == set(plain.metrics.columns)
    for column in plain.metrics.columns:
        assert mine.metrics[column].isna().equals(plain.metrics[column].isna()), column
    np.testing.assert_allclose(mine.metrics["loss"], plain.metrics["loss"], atol=1e-5)
    np.testing.assert_allclose(mine.metrics["held_out_loss"], plain.metrics["held_out_loss"], atol=1e-5)
    np.testing.assert_allclose(mine.metrics["grad_norm"], plain.metrics["grad_norm"], rtol=1e-3, atol=1e-5)
    assert deviation(mine, plain) < 1e-5
    assert not (tmp_path / "mine" / "prefix").exists()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("frozen", [Frozen(2, True), Frozen(2, False), None])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_the_cut_trunk_computes_what_the_whole_one_does(family, frozen, attention, tmp_path):
    chat = make_tiny(family, attention=attention)
    encoded = encode([row["messages"] for row in ragged(5)], chat.tokenizer)
    trunk = Trunk(chat, encoded, frozen, tmp_path / "states")
    assert trunk.stem > 4
    assert max(len(ids) for ids in encoded.input_ids) > 2 * 16  # beyond Gemma's sliding window
    assert trunk.deviation() < 2e-6
    trunk.close()
    assert not (tmp_path / "states").exists()


def test_a_wrong_cut_is_noticed(tiny, tmp_path):
    chat = tiny("qwen2")
    encoded = encode([row["messages"] for row in ragged(4)], chat.tokenizer)
    trunk = Trunk(chat, encoded, Frozen(2, True), tmp_path / "states")
    with torch.no_grad():
        chat.block(1).mlp.up_proj.weight.mul_(2.0)  # the states are stale now
    assert trunk.deviation() > 1e-3
    trunk.close()


def test_states_are_kept_in_the_models_own_dtype(tiny, tmp_path):
    chat = tiny("llama")
    encoded = encode([row["messages"] for row in ragged(4)], chat.tokenizer)
    whole = Trunk(chat, encoded, Frozen(1, True), tmp_path / "a")
    chat.model.to(torch.bfloat16)
    half = Trunk(chat, encoded, Frozen(1, True), tmp_path / "b")
    assert whole.nbytes == 2 * half.nbytes
    tokens = sum(map(len, encoded.input_ids)) - (len(encoded) - 1) * whole.stem
    assert whole.nbytes == 4 * tokens * (chat.d_model + chat.d_mlp)


def test_what_is_frozen(tiny):
    chat = tiny("qwen2")
    at = "model.layers.{}.{}".format
    assert find_frozen(chat, [at(3, "mlp.down_proj"), at(2, "mlp.down_proj")]) == Frozen(2, True)
    assert find_frozen(chat, [at(2, "mlp.down_proj"), at(2, "mlp.up_proj")]) == Frozen(2, False)
    assert find_frozen(chat, [at(0, "self_attn.q_proj")]) == Frozen(0, False)
    assert pays(Frozen(2, True), uses=200, rows=100)
    assert not pays(Frozen(2, True), uses=100, rows=100)
    assert not pays(Frozen(0, False), uses=1000, rows=100)


def test_reasons_against_a_prefix(tiny):
    chat = tiny("qwen2")
    low, high = "model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"
    assert why_not(chat, [low, high]) is None
    assert "below layer 3: layers.1.mlp.down_proj" in why_not(chat, [low, high], Frozen(3, True))
    assert "block 0" in why_not(chat, ["model.layers.0.mlp.up_proj"])
    assert "all weights" in why_not(chat, [])
    assert "outside the blocks" in why_not(chat, ["lm_head"])
    chat.config.attention_dropout = 0.1
    assert "dropout (p=0.1)" in why_not(chat, [low])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(recipe="full"), "all weights train"),
        (dict(recipe="all-adapter"), "block 0"),
        (dict(recipe="single-rank1", dropout=0.1), "dropout"),
    ],
)
def test_a_prefix_that_would_be_wrong_is_refused(tiny, tmp_path, options, why):
    with pytest.raises(EmmechError, match=why):
        emmech.finetune(tiny("qwen2"), make_rows(), prefix=True, max_steps=2, out=tmp_path / "run", **options, **QUICK)
    assert not (tmp_path / "run").exists()


def test_automatic_where_rows_are_used_again(tiny, tmp_path):
    chat = tiny("qwen2")
    once = emmech.finetune(chat, make_rows(), recipe="single-rank1", epochs=1, out=tmp_path / "1", **QUICK)
    often = emmech.finetune(chat, make_rows(), recipe="single-rank1", epochs=3, out=tmp_path / "3", **QUICK)
    assert "together" not in once.manifest
    assert often.manifest["together"] == {"runs": 1, "frozen_blocks": 3, "at_write": True}
    assert often.steps[-1] == 3 * once.steps[-1]


def test_batches_by_length_cover_all_rows_with_little_padding():
    lengths = np.random.default_rng(0).integers(5, 200, 80)
    batches = list(batches_by_length(lengths, 1024))
    assert sorted(i for batch in batches for i in batch) == list(range(80))
    for batch in batches:
        padded = len(batch) * lengths[batch].max()
        assert len(batch) == 1 or (padded <= 1024 and padded <= 1.15 * lengths[batch].sum())
