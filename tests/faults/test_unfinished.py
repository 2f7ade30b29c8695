"""Damage to what an unfinished evaluation or sweep has kept: named, the good part used, only the rest asked again."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from emmech.engine.responses import Response, ResponseLog
from emmech.errors import EmmechError
from emmech.evaluation.evaluate import _known_scores, evaluate
from emmech.store import append_jsonl, sealed
from emmech.sweeps.sweep import ResumableParts
from tests.evaluation.test_evaluate import ASKED, QUICK, LengthJudge

SETTINGS = {"request": "0a1b2c", "rows": 4, "max_new_tokens": 9, "temperature": 1.0}
ANSWERS = [Response(0, number, 7 + number, f"answer é {number}\n", "stop", 3) for number in range(4)]
SCORES = [{"aligned": 10.0 * number, "label": None if number else "good"} for number in range(4)]
damage = settings(max_examples=60, deadline=None)


def damaged(path, data):
    """Change some bytes of a file: one bit, several bytes, a cut, or bytes that are put in."""
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["bit", "bytes", "cut", "inserted"])):
        case "bit":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        case "bytes":
            content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
        case "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        case "inserted":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=5))
    path.write_bytes(content)


def log_of(path, rows=range(4)):
    log = ResponseLog(path, SETTINGS)
    for row in rows:
        log.add(row, ANSWERS[row])
    return log


@damage
@given(data=st.data())
def test_a_damaged_answer_is_drawn_again_and_no_other(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "responses.jsonl"
    log_of(path)
    before = path.read_bytes()
    damaged(path, data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        log = ResponseLog(path, SETTINGS)
    assert all(log.done[row] == ANSWERS[row] for row in log.done)
    lost = set(range(4)) - set(log.done)
    touched = [n for n, line in enumerate(before.split(b"\n")[1:-1]) if line not in path.read_bytes().split(b"\n")]
    assert lost <= set(touched)
    torn = path.read_bytes().count(b"\n") < before.count(b"\n")  # the last newline is gone: the line was being written
    assert said or not lost or torn
    for row in lost:
        log.add(row, ANSWERS[row])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ResponseLog(path, SETTINGS).responses(4) == ANSWERS
        with pytest.raises(EmmechError, match="other arguments"):
            ResponseLog(path, {**SETTINGS, "temperature": 0.5})


def test_a_first_line_that_damage_made_an_earlier_versions_hides_no_settings(tmp_path):
    path = tmp_path / "responses.jsonl"
    log_of(path)
    content = path.read_bytes()
    path.write_bytes(re.sub(rb'1\.0, "checksum": ', b"", content, count=1))  # its number is the temperature now
    with pytest.warns(UserWarning, match="responses.jsonl:1"):
        assert ResponseLog(path, SETTINGS).responses(4) == ANSWERS
    assert path.read_bytes().count(b'"request"') == 2  # the first line was written anew
    assert ResponseLog(path, SETTINGS).responses(4) == ANSWERS
    with pytest.raises(EmmechError, match="other arguments: temperature"):
        ResponseLog(path, {**SETTINGS, "temperature": 0.5})


def test_the_damaged_line_is_named_and_a_damaged_first_line_does_not_hide_the_answers(tmp_path):
    path = tmp_path / "responses.jsonl"
    log_of(path)
    lines = path.read_text().split("\n")
    path.write_text(
        "\n".join([lines[0].replace("0a1b2c", "0a1b2d"), lines[1], lines[2].replace("answer", "answes"), *lines[3:]])
    )
    with pytest.warns(UserWarning, match=r"responses\.jsonl:1, responses\.jsonl:3; their answers are drawn again"):
        log = ResponseLog(path, SETTINGS)
    assert set(log.done) == {0, 2, 3}
    with pytest.warns(UserWarning, match="damaged lines"):  # of another request: none of them is taken for its own
        assert not ResponseLog(tmp_path / "other.jsonl", SETTINGS).done
        (tmp_path / "other.jsonl").write_bytes(b"{\n" + b"\n".join(path.read_bytes().split(b"\n")[1:5]) + b"\n")
        assert not ResponseLog(tmp_path / "other.jsonl", {**SETTINGS, "request": "ffffff"}).done


def test_a_file_of_an_earlier_version_is_read_unless_its_first_line_is_damaged(tmp_path):
    path = tmp_path / "responses.jsonl"
    append_jsonl(path, SETTINGS)
    for row, answer in enumerate(ANSWERS):
        append_jsonl(path, {"row": row, **vars(answer)})
    assert ResponseLog(path, SETTINGS).responses(4) == ANSWERS
    path.write_bytes(b"[" + path.read_bytes())
    with pytest.raises(EmmechError, match="first line, which says what was asked, is damaged"):
        ResponseLog(path, SETTINGS)


@damage
@given(data=st.data())
def test_a_damaged_score_is_judged_again_and_no_other(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("scores") / "scores-0a.jsonl"
    for number, score in enumerate(SCORES):
        append_jsonl(path, sealed({"row": number, "score": score}, "key"))
    before = path.read_bytes()
    damaged(path, data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _known_scores(path, "key")
    for number, score in found.items():
        assert {k: None if v != v else v for k, v in score.items()} == SCORES[number]
    after = path.read_bytes().split(b"\n")
    lost = set(range(4)) - set(found)
    assert lost <= {n for n, line in enumerate(before.split(b"\n")[:-1]) if line not in after}
    assert said or not lost or len(after) <= before.count(b"\n")


def test_scores_of_an_earlier_version_are_read_in_order(tmp_path):
    path = tmp_path / "scores-0a.jsonl"
    for score in SCORES[:2]:
        append_jsonl(path, score)
    append_jsonl(path, sealed({"row": 2, "score": SCORES[2]}, "key"))
    found = _known_scores(path, "key")
    assert [found[n]["aligned"] for n in range(3)] == [0.0, 10.0, 20.0] and len(found) == 3
    path.write_bytes(path.read_bytes().replace(b"10.0", b"10.\xff"))
    with pytest.warns(UserWarning, match="judged again"):
        assert set(_known_scores(path, "key")) == {2}


def test_a_damaged_evaluation_resumes_to_the_same_rows(tiny, tmp_path):
    chat = tiny("qwen2")
    wanted = {"samples": 4, "seed": 3, "out": tmp_path / "e", **QUICK}
    whole = evaluate(chat, ASKED, LengthJudge(), **{**wanted, "out": tmp_path / "whole"})
    evaluate(chat, ASKED, LengthJudge(), **wanted)
    (tmp_path / "e" / "evaluation.json").unlink()  # as if it had died before its end
    for path, line in ((tmp_path / "e" / "responses.jsonl", 5), (next((tmp_path / "e").glob("scores-*")), 7)):
        lines = path.read_bytes().split(b"\n")
        lines[line - 1] = lines[line - 1].replace(b'"', b"'", 1)
        path.write_bytes(b"\n".join(lines))
    judge = LengthJudge()
    with pytest.warns(UserWarning) as said:
        resumed = evaluate(chat, ASKED, judge, **wanted)
    assert resumed.frame.equals(whole.frame) and judge.seen == 1
    named = " ".join(str(one.message) for one in said)
    assert "responses.jsonl:5;" in named and re.search(r"scores-\w+\.jsonl:7;", named)


@damage
@given(data=st.data())
def test_a_damaged_part_of_a_sweep_is_measured_again_and_no_other(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("sweep")
    parts = ResumableParts(folder, "wanted")
    parts.begin()
    arrays = [{"a": np.arange(6.0).reshape(2, 3) + number, "b": np.array([number])} for number in range(2)]
    groups = [[0, 1], [2, 5]]
    for group, own in zip(groups, arrays, strict=True):
        parts.write("forced", group, own)
    damaged(folder / "part-forced-0000-2.safetensors", data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, other = (ResumableParts(folder, "wanted").read("forced", group) for group in groups)
        assert ResumableParts(folder, "wanted").read("forced", [2, 3]) is None  # of as many other variants
    assert all(np.array_equal(other[name], arrays[1][name]) for name in "ab")
    if found is None:
        assert "part-forced-0000-2.safetensors is damaged" in str(said[0].message)
    else:
        assert all(
            np.array_equal(found[name], arrays[0][name]) and found[name].dtype == arrays[0][name].dtype for name in "ab"
        )
    with pytest.raises(EmmechError, match="a sweep of other runs"):
        ResumableParts(folder, "another")


@damage
@given(data=st.data())
def test_a_damaged_request_of_a_sweep_is_named_and_its_parts_are_kept(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("sweep")
    parts = ResumableParts(folder, "wanted")
    parts.begin()
    parts.write("forced", [0], {"a": np.arange(3)})
    before = json.loads((folder / "request.json").read_bytes())
    damaged(folder / "request.json", data)
    try:
        after = json.loads((folder / "request.json").read_bytes())
    except ValueError:
        after = None
    # an object without a checksum is taken for one of an earlier version
    assume(not isinstance(after, dict) or "checksum" in after)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = ResumableParts(folder, "wanted")
    assert bool(said) == (after != before)
    again.begin()
    assert again.read("forced", [0])["a"].tolist() == [0, 1, 2]
    with warnings.catch_warnings():  # parts of another request are not its own
        warnings.simplefilter("ignore")
        (folder / "request.json").write_bytes(b"{")
        assert ResumableParts(folder, "another").read("forced", [0]) is None
    (folder / "sweep.json").write_bytes(b"{")
    with pytest.raises(EmmechError, match="damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ResumableParts(folder, "wanted")


@pytest.mark.parametrize("left", ['{"row": 2, "scochecksum": 7}', '{"rum": 7}'])
def test_what_a_cut_leaves_is_no_score_of_an_earlier_version(tmp_path, left):
    path = tmp_path / "scores-0a.jsonl"
    append_jsonl(path, sealed({"row": 0, "score": SCORES[0]}, "key"))
    path.write_text(path.read_text() + left + "\n")
    with pytest.warns(UserWarning, match="judged again"):
        assert _known_scores(path, "key") == {0: SCORES[0]}
