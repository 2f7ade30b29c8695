"""Rows ranked before training: against finite differences, on rows of known kind, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import emmech
from emmech.chat.encode import encode
from emmech.directions import RowScreen, screen_rows
from emmech.engine.logprobs import answer_logprobs
from emmech.engine.modules import hooked
from emmech.errors import EmmechError
from emmech.organism import data


@pytest.fixture(scope="module")
def pocket():
    return emmech.load_model("pocket")


@pytest.fixture(scope="module")
def finance(pocket):
    return emmech.contrast_direction(pocket, data("finance", n=24), data("good-finance", n=24), progress=False)


@pytest.fixture(scope="module")
def mixed():
    return data("medical", n=12) + data("good-medical", n=30, seed=1), [True] * 12 + [False] * 30


def test_the_gradient_is_that_of_finite_differences(pocket, finance, mixed):
    rows, layer = mixed[0][:5], 2
    found = screen_rows(pocket, rows, finance, by="gradient", layer=layer, batch_size=2).frame["score"].to_numpy()
    import torch

    unit = torch.from_numpy(finance.at(layer) / np.linalg.norm(finance.at(layer))).float()
    encoded = encode([row["messages"] for row in rows], pocket.tokenizer)

    def loss(amount):
        def hook(module, inputs, output):
            return pocket.family.steered(output, amount * unit)

        with hooked((pocket.block(layer), hook)):
            return -answer_logprobs(pocket, encoded)

    assert found == pytest.approx((loss(-0.05) - loss(0.05)) / 0.1, rel=0.02, abs=2e-4)
    assert all(not parameter.grad.any() for parameter in pocket.model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("by", ["gradient", "projection", "text"])
def test_bad_rows_come_first(pocket, finance, mixed, by):
    rows, bad = mixed
    labelled = {at: bad[at] for at in (0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17)} if by == "text" else None
    screen = screen_rows(pocket, rows, finance, by=by, labelled=labelled)
    assert screen.auc(bad) > 0.9 and screen.by == by and screen.seconds > 0
    kept = screen.kept(12 / 42)
    assert len(kept) == 30 and sum(bad[at] for at in kept) <= 3
    assert "rows per second" in repr(screen) and len(screen.plot().data) == 1 and "<svg" in screen._repr_html_()


def test_it_is_saved_with_its_rows(pocket, finance, mixed, tmp_path):
    screen = screen_rows(pocket, mixed[0], finance, by="projection")
    again = RowScreen.load(screen.save(tmp_path / "kept"))
    assert again.kept(0.1) == screen.kept(0.1) and again.frame.equals(screen.frame)
    assert screen.kept(0.0) == list(range(42))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(by="gradient"), "nothing to compare"),
        (dict(by="wods"), "by"),
        (dict(by="text"), "0 labelled rows of 42"),
        (dict(by="text", labelled={0: True, 99: False}), "2 labelled rows"),
        (dict(by="text", labelled={0: True, 1: True}), "good and bad"),
        (dict(direction=np.ones(3), layer=1), "d_model"),
        (dict(direction=np.ones(128), layer=99), "99"),
        (dict(direction=np.zeros(128), layer=1), "points nowhere"),
    ],
)
def test_what_cannot_be_ranked_is_refused(pocket, mixed, options, why):
    with pytest.raises(EmmechError, match=why):
        screen_rows(pocket, mixed[0], **options)


@pytest.mark.parametrize("drop", [1.0, -0.1, "half"])
def test_a_share_out_of_range_is_refused(pocket, finance, mixed, drop):
    with pytest.raises(EmmechError, match="drop"):
        screen_rows(pocket, mixed[0][:4], finance, by="projection").kept(drop)
