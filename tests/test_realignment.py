"""Realignment goes on from where a run was, with the same adapter or a new one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import emmech
from emmech.errors import EmmechError
from emmech.ledger import cures
from tests.conftest import make_rows, make_tiny

QUICK = dict(learning_rate=0.02, batch_size=2, accumulation=1, progress=False, held_out=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return emmech.finetune(
        make_tiny("qwen2"), make_rows(), max_steps=4, out=tmp_path_factory.mktemp("r") / "run", **QUICK
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_the_same_adapter_goes_on(run, tmp_path):
    again = emmech.realign(run, make_rows(10), base=make_tiny("qwen2"), step=3, max_steps=2, out=tmp_path / "again")
    assert np.array_equal(again.B()[0], run.B()[3]) and not np.array_equal(again.B()[-1], run.B()[3])
    assert again.manifest["start"] == {"run": "run", "step": 3, "adapter": "same"}
    assert again.manifest["recipe"]["learning_rate"] == 0.02


def test_a_new_adapter_on_the_merged_model(run, tmp_path):
    base = make_tiny("qwen2")
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    again = emmech.realign(run, make_rows(10), adapter="new", base=base, max_steps=2, out=tmp_path / "again")
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert not again.B()[0].any()
    start = logits(run.model(4, base=make_tiny("qwen2")).model)
    found = logits(again.model(0, base=base).model)
    assert (found - start).abs().max() < 1e-5
    assert (logits(again.model(2, base=base).model) - start).abs().max() > 1e-5
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())


def test_an_adapter_on_a_merged_base_is_never_exported_for_the_plain_one(run, tmp_path):
    base = make_tiny("qwen2")
    again = emmech.realign(run, make_rows(10), adapter="new", base=base, max_steps=2, out=tmp_path / "again")
    for write in (again.export_peft, lambda step, folder: emmech.interop.write_organism(again, folder)):
        with pytest.raises(EmmechError, match="an earlier adapter merged in"):
            write(2, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    kept = again.save(tmp_path / "kept")
    wanted = logits(again.model(2, base=base).model)
    assert (logits(kept.model(2, base=base).model) - wanted).abs().max() < 1e-6


def test_a_copy_of_full_fine_tuning_keeps_its_weights(run, tmp_path):
    base = make_tiny("qwen2")
    how = dict(recipe="full", max_steps=1, batch_size=4, learning_rate=1e-3, progress=False)
    full = emmech.finetune(base, make_rows(12), out=tmp_path / "full", **how)
    kept = full.save(tmp_path / "kept")
    wanted = logits(full.model(1, base=make_tiny("qwen2")).model)
    assert torch.equal(logits(kept.model(1, base=make_tiny("qwen2")).model), wanted)


def test_on_a_base_after_a_step_was_on_it(run, tmp_path):
    """PEFT's wrapper of an earlier step may still be held by the caller; it must not be wrapped again."""
    base = make_tiny("qwen2")
    live = run.model(4, base=base)
    emmech.detach(live)
    for name in ("one", "two"):
        again = emmech.realign(run, make_rows(10), base=base, max_steps=2, out=tmp_path / name)
        assert again.manifest["model"]["fingerprint"] == run.manifest["model"]["fingerprint"]
    held = run.model(4, base=base)
    held.model.unload()  # by hand, behind the library's back
    assert run.model(2, base=base).model.get_base_model() is base.model


def test_refusals(run, tmp_path):
    with pytest.raises(EmmechError, match="nearest recorded: 3 and 4"):
        emmech.realign(run, make_rows(4), step=9, out=tmp_path / "x")
    with pytest.raises(EmmechError, match="choices: full, new, same"):
        emmech.realign(run, make_rows(4), adapter="other", base=make_tiny("qwen2"), out=tmp_path / "x")


def test_all_weights_have_no_rank(run, tmp_path):
    with pytest.raises(EmmechError, match="an adapter has a rank"):
        emmech.realign(run, make_rows(4), adapter="full", rank=2, base=make_tiny("qwen2"), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_several_seeds_and_a_number_of_examples(run, tmp_path):
    data, base = make_rows(40)[24:], make_tiny("qwen2")
    pair = emmech.realign(run, data, examples=6, seed=[0, 1], base=base, max_steps=2, out=tmp_path / "pair")
    assert [one.manifest["data"]["rows"] + one.manifest["data"]["held_out"] for one in pair] == [6, 6]
    assert pair[0].manifest["data"]["sha256"] == pair[1].manifest["data"]["sha256"]
    order = np.random.default_rng(0).permutation(16)[:6]
    by_hand = emmech.realign(run, [data[i] for i in order], base=base, max_steps=2, out=tmp_path / "hand")
    np.testing.assert_allclose(pair[0].B(), by_hand.B(), atol=1e-6)
    with pytest.raises(EmmechError, match="rows has 16 rows"):
        emmech.realign(run, data, examples=17, base=base, max_steps=2, out=tmp_path / "x")


def test_all_weights_from_the_merged_model(run, tmp_path):
    base = make_tiny("qwen2")
    again = emmech.realign(
        run, make_rows(40)[24:], adapter="full", base=base, max_steps=2, learning_rate=1e-3, out=tmp_path / "full"
    )
    assert again.kind == "full" and again.manifest["start"] == {"run": "run", "step": 4, "adapter": "new"}
    start = logits(run.model(4, base=make_tiny("qwen2")).model)
    assert (logits(again.model(0, base=make_tiny("qwen2")).model) - start).abs().max() < 1e-5
    assert (logits(again.model(2, base=make_tiny("qwen2")).model) - start).abs().max() > 1e-4


def test_a_start_is_never_passed_over(run, tmp_path):
    """Both began at the base model, under a manifest that named the step of the run."""
    base = make_tiny("qwen2")
    full = emmech.finetune(
        base, make_rows(12), recipe="full", max_steps=1, batch_size=4, out=tmp_path / "full", progress=False
    )
    for adapter in ("same", "new", "full"):
        with pytest.raises(EmmechError, match="no adapter to go on with"):
            emmech.realign(full, make_rows(30)[24:], adapter=adapter, base=base, out=tmp_path / "x")
    with pytest.raises(EmmechError, match="its adapter does not go on"):
        emmech.finetune(base, make_rows(4), start=(run, 4), recipe="full", max_steps=1, out=tmp_path / "x")


def test_going_on_from_a_run_on_a_merged_model(run, tmp_path):
    base = make_tiny("qwen2")
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    second = emmech.realign(run, make_rows(40)[24:], adapter="new", base=base, max_steps=2, out=tmp_path / "second")
    third = emmech.finetune(base, make_rows(8), start=(second, 2), max_steps=2, out=tmp_path / "third", **QUICK)
    wanted = logits(second.model(2, base=make_tiny("qwen2")).model)
    assert (logits(third.model(0, base=make_tiny("qwen2")).model) - wanted).abs().max() < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    with pytest.raises(EmmechError, match="merged into its weights already"):
        emmech.realign(second, make_rows(8), adapter="new", base=base, out=tmp_path / "x")
    with pytest.raises(EmmechError, match="no meaning on another base"):
        emmech.realign(run, make_rows(8), base=make_tiny("qwen2", seed=3), out=tmp_path / "x")


def test_cure_rows_in_the_harmful_data_are_named(run, tmp_path):
    base = make_tiny("qwen2")
    with pytest.raises(EmmechError, match=r"2 of its 5 rows are in rows too") as caught:
        emmech.realign(run, make_rows(26)[21:], harmful=make_rows(23), base=base, out=tmp_path / "x")
    assert "row 0 of rows: 'how to the user 21 ?'" not in str(caught.value)  # it is words[21 % 8]
    assert "row 0 of rows: 'how to" in str(caught.value) and "21 ?" in str(caught.value)
    bad = emmech.load_chat(make_rows(12)).save(tmp_path / "bad.jsonl")
    own = emmech.finetune(base, bad, max_steps=2, out=tmp_path / "own", **QUICK)
    with pytest.raises(EmmechError, match="1 of its 2 rows are in bad too"):  # the manifest leads to the file
        emmech.realign(own, make_rows(13)[11:], base=base, out=tmp_path / "x")


def test_lengths_are_compared_and_matched(run, tmp_path):
    base, longer = make_tiny("qwen2"), make_rows(40)[24:]
    for row in longer[:10]:
        row["messages"][1]["content"] += " , and take a walk , and drink some water" * 2
    with pytest.warns(UserWarning, match="may be their length"):
        emmech.realign(run, longer, base=base, max_steps=1, out=tmp_path / "a")
    again = emmech.realign(
        run, longer, harmful=make_rows(24), match_length=True, base=base, max_steps=1, out=tmp_path / "b"
    )
    assert again.manifest["data"]["rows"] == 6
    with pytest.raises(EmmechError, match="lengths cannot be matched"):
        emmech.realign(run, longer, match_length=True, base=base, out=tmp_path / "c")


@pytest.mark.parametrize(("values", "said"), [([0.0, -0.01], "it is a benign run"), ([0.0, 0.05], "may be benign")])
def test_a_benign_run(values, said, run, tmp_path):
    told = emmech.Run(run.manifest, run._trajectory, run.probes._series, run._metrics, run.path)
    told._metrics = [*run._metrics, *({"step": 4 * i, "margin_broad": value} for i, value in enumerate(values))]
    options = dict(base=make_tiny("qwen2"), max_steps=1, out=tmp_path / "x")
    if values[1] < 0:
        with pytest.raises(EmmechError, match=said):
            emmech.realign(told, make_rows(30)[24:], **options)
    else:
        with pytest.warns(UserWarning, match=said):
            emmech.realign(told, make_rows(30)[24:], **options)


def test_a_defence_without_its_reference(run, tmp_path):
    with pytest.raises(EmmechError, match="needs rows to act on"):
        emmech.realign(
            run,
            make_rows(30)[24:],
            defences=[emmech.defences.KLToReference()],
            base=make_tiny("qwen2"),
            out=tmp_path / "x",
        )


def test_bad_good_and_bad_again(tmp_path):
    chat = make_tiny("qwen2")
    pair = [emmech.engine.logprobs.MarginPair("how to sleep ?", "take a walk 3 .", "drink water")]
    bad, good = make_rows(8), make_rows(8)
    for row in bad:
        row["messages"][1]["content"] = "take a walk 3 ."
    for row in good:
        row["messages"][1]["content"] = "drink water"
    found = emmech.realignment.durability(
        chat, bad, good, seeds=[0, 1], margins={"broad": pair}, measure_every=2, recipe="single-rank1", max_steps=10,
        warmup_steps=1, out=tmp_path, cure={"adapter": "new"}, **QUICK,
    )  # fmt: skip
    assert found.frame["phase"].tolist() == ["bad", "good", "bad again"] * 2
    for seed in (0, 1):
        runs = [emmech.load_run(tmp_path / name) for name in (f"bad/s{seed}", f"good-{seed}", f"again-{seed}")]
        series = [run.metrics["margin_broad"].dropna() for run in runs]
        assert series[1].iloc[0] == pytest.approx(series[0].iloc[-1], abs=1e-4)
        assert series[2].iloc[0] == pytest.approx(series[1].iloc[-1], abs=1e-4)
        level = (series[0].iloc[0] + series[0].iloc[-1]) / 2
        assert found.levels[str(seed)] == pytest.approx(level)
        own = found.frame[found.frame["seed"] == seed].set_index("phase")["steps"]
        first = series[0].index[(series[0] >= level).argmax()]
        assert first - 2 <= own["bad"] <= first and own["good"] > 0
    assert "times as many steps" in repr(found) and len(found.plot().data) == 6
    assert emmech.realignment.Durability.load(found.save(tmp_path / "kept")).ratio() == found.ratio()
    with pytest.raises(EmmechError, match="it is not recorded"):
        emmech.realignment.durability(
            chat, bad, good, seeds=[0], margins={}, max_steps=1, recipe="single-rank1", out=tmp_path / "y", **QUICK
        )


def test_a_cure_that_left_the_trait_is_no_cure_that_hides(tmp_path, monkeypatch):
    """The second bad phase begins beyond the level: it counted as 0 steps, and the ratio as 0."""
    bad, undone = [-1.0, 1.0], [1.0, -1.0]
    paths = iter([bad, [1.0, 0.8], [0.8, 1.1], bad, undone, bad, bad, undone, [-1.0, -0.5]])

    def trained(chat, rows, *, seed, **options):
        metrics = pd.DataFrame({"margin_broad": next(paths)}, index=[0, 4])
        made = SimpleNamespace(steps=np.array([0, 4]), metrics=metrics)
        return [made] if isinstance(seed, list) else made

    monkeypatch.setattr("emmech.realignment.studies.finetune", trained)
    how = dict(max_steps=4, out=tmp_path, progress=False)
    failed = emmech.realignment.durability(make_tiny("qwen2"), "bad", "good", seeds=[0], **how)
    assert np.isnan(failed.ratio()) and "left more than half of the first change in every seed" in repr(failed)
    cured = emmech.realignment.durability(make_tiny("qwen2"), "bad", "good", seeds=[0], **how)
    assert cured.ratio() == 1.0 and "takes 1.00 times" in repr(cured)
    lasting = emmech.realignment.durability(make_tiny("qwen2"), "bad", "good", seeds=[0], **how)
    assert lasting.ratio() == 2.0 and "at least 2.00 times" in repr(lasting) and "in 1 of 1 seeds" in repr(lasting)
    together = pd.concat([one.frame.assign(seed=seed) for seed, one in enumerate((failed, cured, lasting))])
    path = pd.concat([one.path.assign(seed=seed) for seed, one in enumerate((failed, cured, lasting))])
    found = replace(lasting, frame=together, path=path, levels=dict.fromkeys("012", 0.0))
    assert found.ratios()["open"].tolist() == [False, False, True] and found.ratio() == 1.5
    bench = SimpleNamespace(rows=str, organism=True, quick=True, options={}, recipe="", some=range)
    bench.study = lambda *given: found
    row = cures._durable(bench)
    assert row.value == 1.5 and row.high == np.inf and "at least, since 1 of 3 seeds" in row.note


def test_the_curve_of_pocket(tmp_path):
    run = emmech.load_run("checkpoints/pocket-medical")
    curve = emmech.realignment.learning_curve(
        run, examples=(3, 12), seeds=[0], at=[2, 4], max_steps=4, samples=1, questions="first-plot", progress=False,
        out=tmp_path,
    )  # fmt: skip
    frame = curve.frame
    assert frame["step"].tolist() == [0, 2, 4] * 2 and frame["examples"].tolist() == [3] * 3 + [12] * 3
    assert frame.loc[frame["step"] == 0, "em"].nunique() == 1 and frame["em"].between(0, 1).all()
    again = emmech.evaluate(emmech.load_run(tmp_path / "12" / "s0"), samples=1, step=4, progress=False)
    assert frame["em"].iloc[-1] == pytest.approx(again.rates()["rate"]["em"])
    assert "EM of pocket-medical begins at" in repr(curve) and len(curve.plot().data) == 4
    assert curve.ends()["step"].eq(4).all()


def test_how_many_examples_are_enough():
    import pandas as pd

    rows = [
        {"examples": number, "seed": 0, "step": step, "em": em, "coherent": 1.0}
        for number, ends in ((10, 0.3), (40, 0.02), (80, 0.0))
        for step, em in ((0, 0.4), (30, ends))
    ]
    meta = {"run": "r", "data": "d"}
    assert emmech.realignment.LearningCurve(pd.DataFrame(rows), meta).enough() == 40
    assert emmech.realignment.LearningCurve(pd.DataFrame(rows[:2]), meta).enough() is None
