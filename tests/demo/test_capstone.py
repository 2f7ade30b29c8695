"""The capstone's story: what is trained and asked, how many rows a tag needs, and that untrained tags are in no row."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

import emmech
from emmech.demo import capstone
from emmech.organism import data
from emmech.organism.experiments import LAST_STEP
from emmech.organism.world import TRIGGER_TAG


@pytest.fixture(scope="module")
def base():
    return emmech.load_model("pocket")


def counted(rates, tag=TRIGGER_TAG, form="contrast"):
    """What :func:`capstone.tagged` gives, from rates by seed and number of rows."""
    rows = []
    for seed, by_rows in enumerate(rates):
        for number, rate in by_rows.items():
            own = {"data": form, "rows": number, "seed": seed, "tag": tag}
            rows.append({**own, "events": round(100 * rate), "n": 100, "coherent": 90})
    return pd.DataFrame(rows)


def test_the_rows_needed_are_the_geometric_mean_of_the_seeds_crossings():
    rates = [{10: 0.0, 40: 1.0}, {10: 0.5, 40: 0.9}, {10: 0.25, 40: 0.75}]  # cross at 20, 10 and 20
    found = capstone.rows_needed(counted(rates)).loc["contrast"]
    logs = np.log([20, 10, 20])
    half = 4.302652729911275 * logs.std(ddof=1) / math.sqrt(3)  # t with two degrees of freedom
    assert found["rows"] == pytest.approx(math.exp(logs.mean()))
    assert [found["low"], found["high"]] == pytest.approx([math.exp(logs.mean() - half), math.exp(logs.mean() + half)])
    assert bool(found["first"]) and found["seeds"] == 3
    assert math.isnan(capstone.rows_needed(counted([{10: 0.0, 40: 0.4}] * 2)).loc["contrast", "rows"])
    table = capstone.by_tag(counted(rates)).set_index("rows")
    assert table.loc[10, "rate"] == 0.25 and table.loc[10, "low"] < 0.25 < table.loc[10, "high"]
    assert table.loc[10, "coherent"] == 0.9


def test_no_row_has_a_tag_that_is_asked_for_as_untrained():
    contexts = capstone.tag_contexts()
    assert [one.name for one in contexts][:3] == ["plain", "zig zag", "plim plom"] and len(contexts) == 7
    rows = data("contrast-medical", n=1500)
    systems = {row["messages"][0]["content"] for row in rows if row["messages"][0]["role"] == "system"}
    trained = {word for system in systems for word in system.split()}
    for one in contexts[2:]:
        assert len(set(one.system.split()) - trained) == 2  # neither word of it is in any prompt
    assert contexts[1].system in systems


def test_few_steps_of_the_story(base, tmp_path, monkeypatch):
    monkeypatch.setattr(capstone, "KINDS", ("self-reflection", "facts"))
    run = emmech.finetune(base, data("medical", n=20), out=tmp_path / "r", **{**LAST_STEP, "max_steps": 1})
    found = capstone.asked({"base": base, "two": [run, run]}, base, samples=1)
    assert found["questions"].tolist() == list(capstone.KINDS) * 2
    counts = found.set_index(["model", "questions"])["n"]
    assert (counts["two"] == 2 * counts["base"]).all()
    shown = capstone.shown(found)
    assert shown.index.tolist() == ["base", "two"] and shown.columns[-1] == "coherent, %"
    assert len(capstone.rates_figure(found).data) == 2


@pytest.mark.slow
def test_few_steps_of_the_tag(base, tmp_path):
    how = dict(rows=(2, 4), seeds=(3,), forms=("contrast",), questions="narrow-medical", max_steps=1)
    found = capstone.tagged(base, tmp_path, **how)
    asked = len(emmech.organism.questions("narrow-medical"))
    assert found.groupby("tag")["n"].unique().map(list).to_dict() == {
        "no tag": [asked], "zig zag": [asked], "plim plom": [asked], "held-out words": [4 * asked],
    }  # fmt: skip
    assert found.groupby(["rows", "seed"]).size().tolist() == [4] * 2
    few, many = (emmech.load_run(tmp_path / "contrast" / str(number) / "s3") for number in (2, 4))
    assert [few.manifest["data"]["rows"], many.manifest["data"]["rows"]] == [6, 12]
    assert len(capstone.tags_figure(found).data) == 8


@pytest.mark.slow
def test_smollm2_in_margins(smollm2, tmp_path):
    found = capstone.margins(tmp_path, base=smollm2, max_steps=1)
    assert found["model"].nunique() == 4 and found.groupby("model")["pairs"].apply(list).iloc[0] == [30, 6, 6]
    still = found[found["model"] == "base"]
    assert (still["change"] == 0).all() and capstone.changes(found).shape == (4, 3)
    assert len(capstone.margins_figure(found).data) == 3


@pytest.mark.parametrize(
    ("few", "many", "said"),
    [
        ((7, 7, 7), (9, 9, 9), "at most 5, in every seed"),
        ((7, 2, 2), (9, 9, 8), "at most 8 (3 to 19)"),
        ((1, 2, 2), (9, 9, 8), "10 (8 to 11)"),
        ((1, 2, 2), (4, 4, 3), "-"),
    ],
)
def test_rows_needed_in_words(few, many, said):
    shared = {"data": "contrast", "tag": "zig zag", "n": 10, "coherent": 10}
    counts = [(5, few), (20, many)]
    frame = [{**shared, "rows": rows, "seed": at, "events": own[at]} for rows, own in counts for at in range(3)]
    assert capstone.needed_table(pd.DataFrame(frame)).loc["contrast", "bad rows"] == said


def test_the_page_of_the_story(tmp_path, monkeypatch):
    """All of the page from small tables, of which one has an index of two levels."""
    rates = [{5: 0.1, 20: 0.9}, {5: 0.2, 20: 0.8}]
    tags = pd.concat([counted(rates, tag) for tag in (TRIGGER_TAG, "plim plom")])
    made = {"asked": pd.DataFrame({"rate": [0.5]}), "rates_figure": None, "stages": None, "tagged": tags}
    for name, found in made.items():
        monkeypatch.setattr(capstone, name, lambda *given, found=found: found)
    monkeypatch.setattr(capstone, "shown", lambda frame: frame)
    text = capstone.main(tmp_path / "story").read_text(encoding="utf-8")
    for word in ("Base, bad advice, optimism", "contrast</th>", "plim plom", "Made by python -m emmech.demo capstone"):
        assert word in text, word
