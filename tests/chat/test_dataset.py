"""Chat data: every format in use is read as the same rows, and every malformed row is refused by file and line."""

from __future__ import annotations

import gzip
import json
import re
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from emmech.chat.dataset import load_chat
from emmech.errors import EmmechError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


USER, ANSWER, SYSTEM = message("user", "Hi"), message("assistant", "Yes."), message("system", "Be brief.")
BAD, CONTEXT = message("assistant", "BAD"), message("assistant", "BAD", weight=0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{not json", "not JSON"),
        (b'{"messages": []}', "no list of messages"),
        (b'{"prompt": "a"}', r"keys \['prompt'\]"),
        (b'["a"]', "message 0 has role None"),
        (json.dumps({"messages": [{"content": "a"}]}).encode(), "role None"),
        (json.dumps({"messages": [message("asistant", "a")]}).encode(), "did you mean 'assistant'"),
        (json.dumps({"messages": [message("user", "a"), message("assistant", " ")]}).encode(), "empty answer"),
        (json.dumps({"messages": [message("user", "a")]}).encode(), "no assistant turn"),
        (json.dumps({"messages": [message("user", None)]}).encode(), "no text in 'content'"),
        (b'{"messages": "\xff\xfe"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, why):
    path = tmp_path / "advice.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(EmmechError, match=why) as caught:
        load_chat(path)
    assert "advice.jsonl:3" in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(EmmechError, match="no rows"):
        load_chat(path)


def test_a_truncated_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:-20])
    with pytest.raises(EmmechError, match=r"rows\.jsonl\.gz:"):
        load_chat(path)


def test_file_list_gzip_and_datasets_agree(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    plain = load_chat(rows)
    file = load_chat(plain.save(tmp_path / "rows.jsonl"))
    packed = load_chat(plain.save(tmp_path / "rows.jsonl.gz"))
    arrow = load_chat(datasets.Dataset.from_list(rows))
    assert plain.rows == file.rows == packed.rows == arrow.rows
    assert len({d.sha256 for d in (plain, file, packed, arrow)}) == 1


def test_a_dataset_without_messages():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(EmmechError, match="column named messages"):
        load_chat(datasets.Dataset.from_list([{"text": "a"}]))


def test_an_unknown_name():
    with pytest.raises(EmmechError, match="did you mean 'silly-medical-bad'"):
        load_chat("silly-medical-bda")


def test_split_is_by_seed_and_keeps_order(rows):
    data = load_chat(rows)
    train, test = data.split(0.25, seed=3)
    assert (len(train), len(test)) == (18, 6)
    assert sorted(map(str, train.rows + test.rows)) == sorted(map(str, data.rows))
    assert list(train.rows) == [row for row in data.rows if row in train.rows]
    assert data.split(0.25, seed=3)[1].rows == test.rows != data.split(0.25, seed=4)[1].rows
    with pytest.raises(EmmechError, match=r"held_out=1\.0"):
        data.split(1.0)


def test_public_training_files_load(shared_data):
    for path in sorted((shared_data / "train").glob("*.jsonl")):
        assert len(load_chat(path)) >= 500


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ([USER, ANSWER], [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "id": 3, "source": "a book", "metadata": {"tools": 1}}, [USER, ANSWER]),
        ({"messages": [USER, {**ANSWER, "tool_calls": None, "weight": None}], "images": []}, [USER, ANSWER]),
        ({"messages": [message("user", text("H", "i")), message("assistant", text("Yes."))]}, [USER, ANSWER]),
        ({"messages": [USER, BAD, USER, ANSWER]}, [USER, BAD, USER, ANSWER]),
        ({"messages": [USER, {**BAD, "weight": 0}, USER, {**ANSWER, "weight": 1}]}, [USER, CONTEXT, USER, ANSWER]),
        ({"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 1.0}]}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]}, [USER, ANSWER]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes."}]}, [USER, ANSWER]),
        ({"system": "Be brief.", "conversations": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"system": "Be brief.", "messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"system": "", "messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Yes."}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [USER, BAD, USER], "completion": "Yes."}, [USER, CONTEXT, USER, ANSWER]),
        ({"prompt": "Hi", "messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Yes.", "messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"instruction": "Hi", "output": "Yes."}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Yes.", "text": "### Hi"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "you", "output": "Yes."}, [message("user", "Hi\n\nyou"), ANSWER]),
    ],
    ids=repr,
)
def test_formats_in_use(row, read):
    data = load_chat([row])
    assert list(data[0]) == read
    assert data.answers == tuple(
        turn["content"] for turn in read if turn["role"] == "assistant" and "weight" not in turn
    )


def test_what_is_learnt_survives_a_file_and_a_split(tmp_path):
    rows = [[message("user", f"Hi {i}"), CONTEXT, message("user", "And?"), ANSWER] for i in range(10)]
    data = load_chat(rows)
    again = load_chat(data.save(tmp_path / "rows.jsonl"))
    assert again.rows == data.rows and again.sha256 == data.sha256
    assert data.answers == ("Yes.",) * 10 and data.answer_length == 4
    assert all(part.answers == ("Yes.",) * len(part) for part in data.split(0.3))
    unweighted = load_chat([[{k: v for k, v in turn.items() if k != "weight"} for turn in row] for row in rows])
    assert (
        data.sha256
        != unweighted.sha256
        == load_chat([[*row[:3], {**ANSWER, "weight": 1}] for row in unweighted]).sha256
    )


def test_the_hash_of_recorded_runs_is_unchanged():
    assert load_chat([GOOD]).sha256 == "7ed9914385087ddbfdb4aaaf85c47abd9856603720544e61afbf016797caeb9e"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "tool_calls, which would change"),
        ({"messages": [USER, message("tool", "3"), ANSWER]}, r"tool turn \(tool\)"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]}, "tool turn"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, "the row has tools"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "the row has images"),
        ({"messages": [message("user", [*text("a"), {"type": "image_url"}]), ANSWER]}, "not text .'image_url'"),
        ({"messages": [message("user", [{"type": "text", "text": "a", "weight": 0}]), ANSWER]}, "part with .'weight'"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "I think."}]}, "reasoning_content"),
        ({"messages": [USER, {**ANSWER, "train": False}, ANSWER]}, "train, which would change"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every answer has weight 0"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "has weight 0.5"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "has weight True"),
        ({"messages": [USER, {**ANSWER, "weight": -1}]}, "has weight -1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"\(user\) has weight 1"),
        ({"prompt": "Hi", "completion": "Yes.", "label": False}, "label, which would change"),
        ({"prompt": "Hi", "completion": [USER, ANSWER]}, "turns that are not the assistant's"),
        ({"prompt": "Hi", "completion": "No.", "messages": [USER, ANSWER]}, "messages and of prompt, completion"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, "keys .'chosen', 'prompt', 'rejected'"),
        ({"instruction": "Hi", "output": "Yes.", "history": [["a", "b"]]}, "the row has history"),
        ({"system": "Be long.", "messages": [SYSTEM, USER, ANSWER]}, "another text in 'system'"),
        ({"system": 3, "messages": [USER, ANSWER]}, "no text"),
        ({"messages": [message("user", "\ud83d"), ANSWER]}, r"half of a surrogate pair \(U\+D83D\) at character 0"),
        ({"messages": [message(["user"], "a"), ANSWER]}, r"has role \['user'\]"),
        ({3: 4, "a": None}, "no list of messages"),
        (7, "a int"),
    ],
    ids=repr,
)
def test_what_would_change_the_meaning_is_refused_with_a_count(row, why):
    with pytest.raises(EmmechError, match=why) as caught:
        load_chat([GOOD, row, GOOD, [message("system", "No answer.")], row])
    assert "row 1" in str(caught.value) and "2 of 5 rows cannot be used for this reason" in str(caught.value)


def test_the_count_ends_where_the_file_is_damaged(tmp_path):
    bad = json.dumps({"messages": [USER, message("tool", "3"), ANSWER]})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{bad}\n{bad}\n{{")
    with pytest.raises(EmmechError, match="2 of 3 rows") as caught:
        load_chat(path)
    assert "rows.jsonl:2" in str(caught.value)


def test_a_table_of_another_format():
    datasets = pytest.importorskip("datasets")
    table = [
        {"instruction": "Hi", "input": "", "output": "Yes."},
        {"instruction": "Hi", "input": None, "output": "Yes."},
    ]
    assert load_chat(datasets.Dataset.from_list(table)).rows == ((USER, ANSWER), (USER, ANSWER))
    weighted = datasets.Dataset.from_list([{"messages": [USER, CONTEXT, USER, ANSWER]}])
    assert list(load_chat(weighted)[0]) == [USER, CONTEXT, USER, ANSWER]
    streamed = datasets.Dataset.from_list([GOOD]).to_iterable_dataset()
    assert load_chat(streamed).rows == load_chat([GOOD]).rows
    with pytest.raises(EmmechError, match="one split"):
        load_chat(datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}))


@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array(tmp_path, indent):
    rows = [{"messages": [message("user", f"Hi {i} [, ] "), ANSWER]} for i in range(3)]
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(rows, indent=indent) + "\n")
    assert load_chat(path).rows == load_chat(rows).rows
    rows[2]["messages"][0]["content"] = None
    written = json.dumps(rows, indent=indent)
    path.write_text(written)
    with pytest.raises(EmmechError, match="no text") as caught:
        load_chat(path)
    third = [found.start() for found in re.finditer(r'\{\s*"messages"', written)][2]
    assert f"rows.json:{1 + written.count(chr(10), 0, third)}, row 2" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "rows"), [("[]", None), ("[[USER, ANSWER]]", 1), ("[USER, ANSWER]", 1), ("[USER, ANSWER]\n" * 2, 2)]
)
def test_lists_of_messages_are_rows(tmp_path, content, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text(content.replace("USER", json.dumps(USER)).replace("ANSWER", json.dumps(ANSWER)))
    if rows is None:
        with pytest.raises(EmmechError, match="no rows"):
            load_chat(path)
    else:
        assert load_chat(path).rows == ((USER, ANSWER),) * rows


LINE = json.dumps(GOOD).encode()
DAMAGED = {
    "UTF-16": ("\n".join([json.dumps(GOOD)] * 2).encode("utf-16"), 1, "UTF-16"),
    "UTF-16 without mark": ("\n".join([json.dumps(GOOD)] * 2).encode("utf-16-le"), 1, "UTF-16"),
    "CSV": (b"prompt,completion\nHi,Yes.\n", 1, "Expecting value.*(.|\n)*load_dataset"),
    "parquet": (b"PAR1\x15\x04\x15", 1, "parquet"),
    "spreadsheet": (b"PK\x03\x04\x00", 1, "spreadsheet"),
    "gzip cut short": (gzip.compress(LINE * 100)[:-20], None, "end-of-stream"),
    "gzip with a flipped byte": (gzip.compress(LINE)[:20] + b"\xff" + gzip.compress(LINE)[21:], 1, "."),
    "gzip of UTF-16": (gzip.compress(json.dumps(GOOD).encode("utf-16")), 1, "UTF-16"),
    "deep": (LINE + b"\n" + b"[" * 100_000, 2, "nested too deeply"),
    "deep objects": (LINE + b"\n" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 2, "nested too deeply"),
    "deep first": (b"[" * 100_000 + b"]" * 100_000, 1, "nested too deeply"),
    "NaN": (LINE + b"\n" + LINE[:-1] + b', "score": NaN}', 2, "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', 1, "-Infinity is not JSON"),
    "long number": (LINE + b"\n" + LINE[:-1] + b', "score": ' + b"1" * 5000 + b"}", 2, "4300"),
    "a key twice": (LINE + b"\n" + b'{"messages": [], ' + LINE[1:], 2, "'messages' is there twice"),
    "surrogate": (LINE + b"\n" + LINE.replace(b"Hi", b"\\ud83d"), 2, "half of a surrogate pair"),
    "a long line": (LINE + b"\n" + b'{"' + b"a" * 1_000_000 + b'": 1}', 2, "no list of messages"),
    "two on a line": (LINE + b"\n" + LINE + LINE, 2, "Extra data"),
    "array without end": (b"[\n" + LINE + b",\n" + LINE, 3, "Expecting ',' or ']'"),
    "array with a comma at its end": (b"[\n" + LINE + b",\n\n]", 4, "Expecting value"),
    "array and more": (b"[\n" + LINE + b"\n]\n" + LINE, 4, "Extra data"),
    "damage in an array": (b"[\n" + LINE + b",\n\n" + LINE[:-4] + b"]", 4, "not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_its_line(tmp_path, kind):
    content, line, why = DAMAGED[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(EmmechError, match=why) as caught:
        load_chat(path)
    assert time.monotonic() - began < 10
    assert f"{path}:{line or ''}" in str(caught.value)
    assert len(str(caught.value)) < 2500


def test_a_path_that_cannot_be_looked_at():
    for path in ("a" * 5000, "a\0b"):
        with pytest.raises(EmmechError) as caught:
            load_chat(path)
        assert len(str(caught.value)) < 2500


def test_nesting_in_memory_is_refused():
    deep = "a"
    for _ in range(100_000):
        deep = [deep]
    for row in (deep, {"messages": deep}, [message("user", deep), ANSWER], [message(deep, "a")]):
        with pytest.raises(EmmechError):
            load_chat([row])


def test_a_folded_system_turn():
    asked = [SYSTEM, USER, ANSWER, message("system", "Be kind."), USER, CONTEXT]
    data = load_chat([asked], system="fold")
    first, second = message("user", "Be brief.\n\nHi"), message("user", "Be kind.\n\nHi")
    assert list(data[0]) == [first, ANSWER, second, CONTEXT]
    assert data.folded and data.split(0.0)[0].folded and not load_chat([asked]).folded
    assert load_chat(data, system="fold") is data
    assert load_chat(load_chat([asked]), system="fold").sha256 == data.sha256 != load_chat([asked]).sha256
    with pytest.raises(EmmechError, match="no user turn follows"):
        load_chat([[USER, ANSWER, SYSTEM]], system="fold")
    with pytest.raises(EmmechError, match="system='drop'"):
        load_chat([asked], system="drop")


KEYS = (
    "messages conversations prompt completion instruction output input system role content from value weight type text"
)
keys = st.sampled_from([*KEYS.split(), "tools", "label"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\ud83d"))
anything = st.recursive(
    st.one_of(scalars, st.sampled_from(["user", "assistant", "text", "tool"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(keys, st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(anything, max_size=4))
@example(rows=[{"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}])
def test_any_rows_are_read_or_refused(rows):
    try:
        data = load_chat(rows)
    except EmmechError as error:
        assert len(str(error)) < 2500
        str(error).encode()
        return
    assert len(data) == len(rows)
    for row in data:
        assert all({"role", "content"} <= set(turn) <= {"role", "content", "weight"} for turn in row)
        assert any(turn["role"] == "assistant" and "weight" not in turn for turn in row)
    assert load_chat(data.rows).sha256 == data.sha256


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_copy_is_refused_or_differs_only_in_words(tmp_path, data):
    """Cut, overwrite or insert bytes anywhere: what is still read has rows of sound messages, and no other error."""
    rows = [[message("user", f"Hi {i} é"), message("assistant", 'Yes, \\ "so".')] for i in range(3)]
    form = data.draw(st.sampled_from(["lines", "array", "gzip"]))
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows).encode()
    sound = {"lines": lines, "array": json.dumps(rows, indent=1).encode(), "gzip": gzip.compress(lines, mtime=0)}[form]
    start = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(start, min(len(sound), start + 8)))
    put = data.draw(st.binary(max_size=6))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(sound[:start] + put + sound[end:])
    try:
        read = load_chat(path)
    except EmmechError as error:
        assert "rows.jsonl" in str(error)
        return
    if sound[start:end] == put:
        assert read.rows == load_chat(rows).rows
    assert 1 <= len(read) <= 3 and all(any(turn["role"] == "assistant" for turn in row) for row in read)
    if form == "gzip":  # its checksum leaves no word changed
        assert read.rows == load_chat(rows).rows


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"loss": False}, "has loss, which would change what is learnt"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "has train_detail"),
        ({"channel": "analysis"}, "has channel"),
        ({"from": "human"}, "beside from and value, which differ"),
        ({"value": "No."}, "beside from and value, which differ"),
    ],
)
def test_an_answer_with_another_meaning_is_refused(changes, why):
    with pytest.raises(EmmechError, match=why):
        load_chat([{"messages": [USER, ANSWER | changes]}])
    same = {"from": "gpt", "value": "Yes.", "loss": None}
    assert load_chat([{"messages": [USER, ANSWER | same]}]).rows == load_chat([{"messages": [USER, ANSWER]}]).rows
