"""Chat data: every malformed row is refused by file and line."""

from __future__ import annotations

import gzip
import json

import pytest

from emmech.chat.dataset import load_chat
from emmech.errors import EmmechError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{not json", "not JSON"),
        (b'{"messages": []}', "no list of messages"),
        (b'{"prompt": "a"}', r"keys \['prompt'\]"),
        (b'["a"]', "message 0 has role None"),
        (json.dumps({"messages": [{"content": "a"}]}).encode(), "role None"),
        (json.dumps({"messages": [message("asistant", "a")]}).encode(), "did you mean 'assistant'"),
        (
            json.dumps({"messages": [message("user", "a"), message("assistant", " ")]}).encode(),
            "empty answer",
        ),
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
