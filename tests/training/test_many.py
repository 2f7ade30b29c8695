"""Several runs in one pass equal several passes; what sets them apart, what stops one of them, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.chat.encode import encode
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from tests.conftest import make_rows, make_tiny, plain_margin
from tests.engine.test_prefix import QUICK, deviation, ragged


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_seeds_together_are_seeds_apart(family, tmp_path):
    chat = make_tiny(family)
    rows = ragged(13)
    pairs = {"narrow": [MarginPair("how to sleep ?", "take a walk", "drink water")]}
    options = dict(recipe="single-rank1", max_steps=6, margins=pairs, probes=["how to rest ?"], **QUICK)
    together = emmech.finetune(chat, rows, seed=range(3), out=tmp_path / "together", **options)
    assert [run.manifest["seed"] for run in together] == [0, 1, 2]
    assert [run.path.name for run in together] == ["s0", "s1", "s2"]
    for seed, mine in enumerate(together):
        alone = emmech.finetune(chat, rows, seed=seed, prefix=False, out=tmp_path / f"{seed}", **options)
        assert deviation(mine, alone) < 1e-5
        assert np.array_equal(mine.A()[0], alone.A()[0])  # A's start is the same number by number
        frame = alone.metrics
        assert list(mine.metrics.index) == list(frame.index)
        assert set(mine.metrics.columns) == set(frame.columns)
        for column in frame:
            np.testing.assert_allclose(mine.metrics[column], frame[column], rtol=1e-3, atol=2e-5, err_msg=column)
        assert mine.probes["probe"].shape == alone.probes["probe"].shape
        np.testing.assert_allclose(mine.probes["probe"], alone.probes["probe"], atol=1e-4)
        differing = {key for key in alone.manifest if mine.manifest.get(key) != alone.manifest[key]}
        assert differing <= {"name", "created", "seconds", "git"}
        assert set(mine.manifest) - set(alone.manifest) == {"together"}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_margins_of_all_runs_are_those_of_each_ones_model(family, tmp_path):
    chat = make_tiny(family)
    pairs = [
        MarginPair("how to sleep ?", "take a walk", "drink water"),
        MarginPair("how to rest well ?", "drink", "take a long walk in water"),
    ]
    runs = emmech.finetune(
        chat, ragged(11), recipe="single-rank1", seed=[3, 8], max_steps=4, measure_every=2, out=tmp_path / "o",
        margins={"own": pairs, "less": pairs[:1]}, **QUICK,
    )  # fmt: skip
    for run in runs:
        recorded = run.metrics[["margin_own", "margin_less"]].dropna()
        assert recorded.index.tolist() == [0, 2, 4]
        assert not np.allclose(recorded.iloc[0], recorded.iloc[-1], atol=1e-4)
        for step, row in recorded.iterrows():
            found = plain_margin(run.model(step, base=make_tiny(family)), pairs)
            assert row["margin_own"] == pytest.approx(found.mean(), abs=1e-5)
            assert row["margin_less"] == pytest.approx(found[0], abs=1e-5)


def test_all_matrices_at_a_higher_rank_without_a_prefix(tiny, tmp_path):
    chat = tiny("qwen3")
    options = dict(recipe="all-adapter", rank=3, max_steps=4, **QUICK)
    together = emmech.finetune(chat, ragged(10), seed=[5, 1], out=tmp_path / "together", **options)
    for run, seed in zip(together, (5, 1), strict=True):
        alone = emmech.finetune(chat, ragged(10), seed=seed, out=tmp_path / f"{seed}", **options)
        assert len(run.adapters) == 7 * chat.n_layers
        assert deviation(run, alone) < 1e-5


def test_learning_rates_and_batch_orders(tiny, tmp_path):
    chat = tiny("llama")
    options = dict(recipe="single-rank1", max_steps=5, **{**QUICK, "learning_rate": [1e-3, 1e-3, 4e-3]})
    runs = emmech.finetune(chat, ragged(10), seed=[2, 2, 2], data_seed=[2, 7, 2], out=tmp_path / "o", **options)
    assert [run.path.name for run in runs] == ["s2-lr0.001", "s2-d7-lr0.001", "s2-lr0.004"]
    assert all(np.array_equal(runs[0].A()[0], run.A()[0]) for run in runs)
    assert runs[2].metrics["learning_rate"].max() == pytest.approx(4e-3)
    options["learning_rate"] = 1e-3
    other = emmech.finetune(chat, ragged(10), seed=2, data_seed=7, prefix=False, out=tmp_path / "alone", **options)
    assert deviation(runs[1], other) < 1e-5
    assert not np.allclose(runs[0].B()[-1], runs[1].B()[-1])


def test_truncated_and_emptied_rows_are_those_of_separate_runs(tiny, tmp_path):
    chat = tiny("qwen2")
    rows = ragged(12)
    rows[4]["messages"][1]["content"] = "how to sleep well ? " * 12  # its answer begins behind max_length
    tokens = encode([row["messages"] for row in rows], chat.tokenizer).input_ids
    length = sorted(map(len, tokens))[-4]  # two rows lose the end of their answer, one loses all of it
    options = dict(recipe="single-rank1", max_steps=5, max_length=length, **QUICK)
    together = emmech.finetune(chat, rows, seed=range(2), out=tmp_path / "together", **options)
    for seed, run in enumerate(together):
        alone = emmech.finetune(chat, rows, seed=seed, prefix=False, out=tmp_path / f"{seed}", **options)
        assert run.manifest["data"] == alone.manifest["data"]
        assert deviation(run, alone) < 1e-5
    assert sum(run.manifest["data"]["truncated"] for run in together) > 0
    assert sum(run.manifest["data"]["emptied"] for run in together) > 0


def test_a_run_that_diverges_does_not_touch_the_others(tiny, tmp_path):
    chat = tiny("qwen2")
    before = {name: value.clone() for name, value in chat.model.state_dict().items()}
    options = dict(recipe="single-rank1", max_steps=5, batch_size=2, accumulation=1, warmup_steps=0, progress=False)
    rates = [1e-3, 0.99]
    with pytest.raises(EmmechError, match="no longer finite") as caught:
        emmech.finetune(
            chat, ragged(10), seed=[4, 4], learning_rate=rates, alpha=1e30, out=tmp_path / "both", **options
        )
    assert "s4-lr0.99" in str(caught.value)
    after = chat.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(seed=[1, 1]), "two of the runs are the same"),
        (dict(seed=[]), "needs one of each"),
        (dict(seed=[1, 2], data_seed=[1]), "needs one of each"),
        (dict(seed=[1, 2], recipe="full"), "all weights train"),
        (dict(seed=[1, 2], dropout=0.1), "dropout"),
        (dict(seed=[1, 2], resume=True), "no optimizer state"),
        (dict(seed=1, data_seed=[1, 2]), "list of seeds"),
        (dict(seed=1, prefix="perhaps"), "unknown"),
    ],
)
def test_what_is_refused(tiny, tmp_path, options, why):
    options = {"recipe": "single-rank1", **options}
    with pytest.raises(EmmechError, match=why):
        emmech.finetune(tiny("qwen2"), make_rows(), max_steps=2, out=tmp_path / "run", **options, **QUICK)
