"""The demo's own choices: which ablation it shows, and how it says what is left."""

from __future__ import annotations

import pandas as pd
import pytest

from emmech.chat.model import load_model
from emmech.demo.pocket import _beside, _character, _what_is_left
from emmech.errors import EmmechError


@pytest.mark.slow
def test_the_ablation_shown_is_at_the_adapter_and_towards_the_aligned_mean():
    base = load_model("pocket")
    design, phrase = _character(base, 2)
    assert design.layers == (2,) and design.towards == "aligned"
    assert design.direction.vectors.shape == (base.n_layers, base.d_model)
    assert phrase.text.startswith("and you answer")


def test_one_row_a_condition_and_no_random_ones():
    columns = ["kind", "condition", "model", "outcome", "value", "low", "high"]
    frame = pd.DataFrame(
        [
            ("untouched", "untouched", "tuned", "em", 1.0, 0.96, 1.0),
            ("untouched", "untouched", "tuned", "coherent", 0.99, 0.95, 1.0),
            ("random", "random 0", "tuned", "em", 0.5, 0.4, 0.6),
            ("untouched", "untouched", "base", "em", 0.0, 0.0, 0.04),
            ("untouched", "untouched", "base", "coherent", 1.0, 0.96, 1.0),
        ],
        columns=columns,
    )
    left = _what_is_left(frame)
    assert left["model"].tolist() == ["tuned", "base"]
    assert left["EM %"].tolist() == ["100.0 (96-100)", "0.0 (0-4)"]
    assert left["coherent %"].tolist() == ["99.0 (95-100)", "100.0 (96-100)"]


def test_what_runs_beside_is_waited_for_and_its_failure_is_said(tmp_path):
    with pytest.raises(EmmechError, match="ended with status 1"), _beside("info", tmp_path / "nothing"):
        pass
    with pytest.raises(ZeroDivisionError), _beside("info", tmp_path / "nothing"):
        raise ZeroDivisionError  # an error of the caller ends the process, and is not replaced
