"""Numbers and texts are refused by the name of their argument, never from inside numpy or torch."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emmech.errors import EmmechError, as_float, as_floats, as_int, as_ints, broken_text, check_texts, shown

NO_NUMBERS = ["a", None, 1j, [1], {}, True, np.bool_(True), object()]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5, float("nan"), float("inf"), -0.5])
def test_whole_refuses_by_name(value):
    with pytest.raises(EmmechError, match="seed is a whole number") as caught:
        as_int("train", "seed", value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("value", [*NO_NUMBERS, float("nan"), float("inf"), np.float32("nan")])
def test_finite_refuses_by_name(value):
    with pytest.raises(EmmechError, match="scale is a finite number"):
        as_float("scan", "scale", value)


@given(st.integers(-(2**53), 2**53))
def test_whole_takes_every_library_s_numbers(value):
    for given_as in (value, float(value), np.int64(value), np.float64(value)):
        found = as_int("train", "seed", given_as)
        assert found == value
        assert type(found) is int


def test_whole_numbers_of_any_size():
    assert as_int("train", "seed", 10**400) == 10**400


def test_least_is_kept_to():
    assert as_int("train", "steps", 1, least=1) == 1
    with pytest.raises(EmmechError, match="at least 1"):
        as_int("train", "steps", 0, least=1)


@pytest.mark.parametrize(
    "values", [[0, 5], (0, 5), range(0, 10, 5), np.array([0, 5]), pd.Series([0.0, 5.0]), iter([0, 5])]
)
def test_lists_of_any_kind(values):
    assert as_ints("sweep", "steps", values) == [0, 5]


def test_one_number_is_a_list_of_one():
    assert as_ints("sweep", "steps", 5) == [5]
    assert as_floats("sweep", "scales", 2) == [2.0]


@pytest.mark.parametrize("values", ["12", None, [1, "2"], [1.5], [None]])
def test_wholes_refuse(values):
    with pytest.raises(EmmechError, match="steps are whole numbers"):
        as_ints("sweep", "steps", values)


@pytest.mark.parametrize("values", ["12", None, [], [1, "2"], [float("inf")], [1j]])
def test_finites_refuse(values):
    with pytest.raises(EmmechError, match="scales are finite numbers, at least one"):
        as_floats("sweep", "scales", values)


TURN = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    "texts", [["Hello"], [[TURN]], [{"messages": [TURN]}, "Hello"], ("a", "b"), np.array(["a", "b"])]
)
def test_texts_pass(texts):
    check_texts("read", "prompts", texts)


@pytest.mark.parametrize(
    "texts", ["Hello", [], 3, None, TURN, [TURN], [3], [[]], [["Hello"]], [{"messages": "Hello"}], [[{"role": "user"}]]]
)
def test_texts_are_refused(texts):
    with pytest.raises(EmmechError, match="prompts are a list of strings or conversations"):
        check_texts("read", "prompts", texts)


def test_words_are_refused_where_conversations_are_wanted():
    with pytest.raises(EmmechError, match=r"rows\[1\]='Hello'"):
        check_texts("read", "rows", [[TURN], "Hello"], strings=False)


def test_no_part_of_a_message_grows_with_what_was_given():
    bomb = ["ha"] * 9
    for _ in range(7):
        bomb = [bomb] * 9  # its representation has 30 million characters
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, {"a": bomb}, "x" * 10**6):
        error = EmmechError("read " + "y" * 10**6, value, "z" * 10**6, "w" * 10**6)
        assert len(str(error)) < 2600 and "... (1000005 characters)" in str(error)
        assert len(shown(value)) < 20_000
    short = EmmechError("read it", {"a": [1, "b"]}, "no", "yes")
    assert str(short).splitlines()[1] == "  given:   {'a': [1, 'b']}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_cannot_be_printed_is_escaped():
    error = EmmechError("read \ud83d", "a\ud83d", "no", "\udfff")
    assert str(error).encode() and "a\\ud83d" in str(error)
    assert broken_text("fine \U0001f600") == ""
