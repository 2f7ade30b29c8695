"""Chat data: read it from anywhere, refuse what is malformed by file and line, split it by seed.

A row is ``{"messages": [{"role": ..., "content": ...}, ...]}``, the format of the public EM datasets
(Model Organisms for Emergent Misalignment, arXiv 2506.11613), or of another format:

================================  ===================  ==============================================================
keys of the row                   known from           read as
================================  ===================  ==============================================================
``messages``                      OpenAI, TRL          ``role`` and ``content``; ``weight`` 0 or 1 on an answer
``conversations``                 ShareGPT             ``from`` and ``value``; human is user, gpt is assistant
``prompt``, ``completion``        TRL                  texts or lists of messages; the prompt's answers are context
``instruction``, ``output``       Alpaca               ``input``, if there is one, follows after an empty line
================================  ===================  ==============================================================

``system`` on a row is its system turn. Keys that would change what is learnt, such as tool calls or images, are
refused; other keys (id, source, metadata) are passed over. A key whose value is null or empty counts as absent.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from emmech.chat.template import Message, fold_system, trained
from emmech.errors import EmmechError, broken_text, closest, one_of, shown
from emmech.registry import Organism, find, organism_named, register

Row = tuple[Message, ...]
_TABLES = 'other tables: load_chat(datasets.load_dataset("csv" or "parquet", data_files=path)["train"])'
_NOT_JSON = {  # how a file begins that is no JSON: what it is, and what to do
    b"PAR1": ("it is a parquet file", _TABLES),
    b"PK\x03\x04": ("it is a zip archive or a spreadsheet", "unpack it"),
    b"\xff\xfe": ("it is UTF-16", "save the file as UTF-8"),
    b"\xfe\xff": ("it is UTF-16", "save the file as UTF-8"),
}


@dataclass(frozen=True)
class ChatDataset(Sequence[Row]):
    """Validated conversations, in order, with what identifies them.

    Args:
        rows: each a tuple of messages, at least one of them a non-empty assistant turn. An answer with ``"weight": 0``
            is context and not learnt.
        name: shown in messages and reports.
        path: the file they came from, if any.
        folded: whether system turns were written into the user's turn after them.
    """

    rows: tuple[Row, ...]
    name: str
    path: str | None = None
    folded: bool = False

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """Hash of the rows' content, the same wherever the file is and however it is compressed."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def answers(self) -> tuple[str, ...]:
        """The words of every assistant turn that is learnt (weight 0 is not)."""
        return tuple(message["content"] for row in self.rows for message in row if trained(message))

    @property
    def answer_length(self) -> float:
        """Mean answer length in characters: compare it before comparing two datasets' fine-tunes."""
        return float(np.mean([len(answer) for answer in self.answers]))

    def split(self, held_out: float, *, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """Split off a random ``held_out`` share of the rows; the order of the rest is kept.

        Example:
            >>> rows = [{"messages": [{"role": "user", "content": str(i)},
            ...                       {"role": "assistant", "content": "yes"}]} for i in range(10)]
            >>> train, test = load_chat(rows).split(0.2, seed=1)
            >>> len(train), len(test)
            (8, 2)
        """
        if not 0 <= held_out < 1:
            why = "it is the share of rows kept from training, from 0 to below 1"
            raise EmmechError(f"split {self.name}", f"held_out={held_out}", why, "held_out=0.1, as in the papers")
        count = round(held_out * len(self))
        chosen = set(np.random.default_rng(seed).permutation(len(self))[:count].tolist())
        parts = (tuple(row for i, row in enumerate(self.rows) if (i in chosen) is out) for out in (False, True))
        train, test = (replace(self, rows=part) for part in parts)
        return train, test

    def save(self, path: str | Path) -> Path:
        """Write as chat JSONL (gzip when the name ends in ``.gz``)."""
        path = Path(path)
        lines = "".join(json.dumps({"messages": list(row)}, ensure_ascii=False) + "\n" for row in self.rows)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(lines)
        return path

    def __repr__(self) -> str:
        return f"ChatDataset({self.name!r}, rows={len(self)}, mean answer {self.answer_length:.0f} characters)"


def bundled_names() -> tuple[str, ...]:
    """Names of the chat datasets that come with emmech, for any model."""
    folder = resources.files("emmech") / "data"
    stems = (entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    return tuple(sorted(stem.replace("_", "-") for stem in stems if not stem.endswith("_margins")))


def load_chat(
    data: Any, *, organism: str | Organism | None = None, system: Literal["keep", "fold"] = "keep"
) -> ChatDataset:
    """Read chat data.

    Args:
        data: a ``.jsonl`` or ``.jsonl.gz`` file or one JSON array, the name of a bundled dataset, a
            ``datasets.Dataset``, a list of rows, or a :class:`ChatDataset`. A row is ``{"messages": [...]}``
            (OpenAI's ``weight`` is honoured), ShareGPT's ``conversations``, TRL's ``prompt`` and ``completion`` or
            Alpaca's ``instruction``, ``input`` and ``output``.
        organism: an organism or its name: names are looked up among its datasets (pocket's ``"medical"``,
            ``"good-medical"``, ...) before the bundled ones.
        system: ``"fold"`` writes each system turn into the user's turn after it, for chat templates that have no
            system role; the dataset is then ``folded``.

    Raises:
        EmmechError: names the file and line (or row), what is wrong with it, and how many rows have the same fault.

    Example:
        >>> load_chat([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
        ChatDataset('rows', rows=1, mean answer 5 characters)
        >>> load_chat([{"instruction": "Add them.", "input": "1 and 2", "output": "3"}])[0][0]["content"]
        'Add them.\\n\\n1 and 2'
    """
    one_of("read the dataset", "system", system, ("keep", "fold"))
    read = _load(data, organism)
    if system == "keep" or read.folded:
        return read
    return replace(read, rows=tuple(tuple(fold_system(row)) for row in read.rows), folded=True)


def _load(data: Any, organism: str | Organism | None) -> ChatDataset:
    if isinstance(data, ChatDataset):
        return data
    name = str(getattr(getattr(data, "info", None), "dataset_name", None) or "rows")
    if isinstance(data, str | Path):
        path = Path(data)
        try:
            is_file = path.is_file()
        except OSError as error:  # a name that is too long, or a folder that may not be read
            raise _bad(str(data), f"{error.strerror}", "check the path")
        if is_file:
            return _check(_lines(path), name=path.name.split(".")[0], path=str(path))
        name, why = str(data), "there is no such file and no dataset of that name"
        asked = f"read the dataset {name!r}"
        data = find(asked, "data", "data", name, organism_named(asked, organism), why=why)()
    columns = getattr(data, "column_names", None)
    if columns is not None and not any(set(form.keys) <= set(columns) for form in _FORMATS):
        given = f"a datasets.{type(data).__name__} with columns {columns}"
        instead = "dataset.map(lambda row: {'messages': [...]}) to build it; of a DatasetDict, one split"
        raise _bad(given, f"a chat dataset has a column named {_KEYS}", instead)
    if isinstance(data, Iterable):
        return _check(((f"row {i}", row) for i, row in enumerate(data)), name=name, path=None)
    why = "it is neither a file, a name, a list of rows nor a datasets.Dataset"
    raise _bad(f"a {type(data).__name__}", why, 'data="bad_medical_advice.jsonl", or a list of {"messages": [...]}')


def _bundled(name: str) -> list[Any]:
    with resources.as_file(resources.files("emmech") / "data" / f"{name.replace('-', '_')}.jsonl") as path:
        return [row for _, row in _lines(path)]


for _name in bundled_names():
    register("data", _name, partial(_bundled, _name))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of JSON lines, or of one JSON array, each with the place where it begins."""
    lines: Iterator[tuple[int, str]] = ((number, text) for number, text in _texts(path) if text.strip())
    first = list(islice(lines, 1))
    if first and first[0][1].lstrip().startswith("["):
        first += lines
        if _begins_array(first):
            yield from _array(path, first)
            return
    for number, text in chain(first, lines):
        try:
            yield f"{path}:{number}", _DECODER.decode(text.strip())
        except (ValueError, RecursionError) as error:
            raise _not_json(f"{path}:{number}", error)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, packed or not, counted from 1."""
    number = 0
    try:
        with path.open("rb") as probe:
            opener = gzip.open if probe.read(2) == b"\x1f\x8b" else open
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                for magic, (what, instead) in _NOT_JSON.items():
                    if number == 1 and raw.startswith(magic):
                        raise _bad(where, what, instead)
                if b"\0" in raw:
                    raise _bad(where, "it holds NUL bytes, as UTF-16 and binary files do", "save the file as UTF-8")
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _bad(where, f"byte {error.start} of the line is not UTF-8", "save the file as UTF-8")
                yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(f"{path}:{number + 1}", f"{error}", "check the file")


def _begins_array(lines: Sequence[tuple[int, str]]) -> bool:
    """Whether lines that begin with ``[`` are one array of rows, and not a list of messages on each line."""
    try:
        alone = _DECODER.decode(lines[0][1].strip())
    except (ValueError, RecursionError):
        return True
    return len(lines) == 1 and not (alone and isinstance(alone[0], dict) and alone[0].keys() & {"role", "from"})


def _array(path: Path, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    text = "".join(line for _, line in lines)
    begins = list(accumulate((len(line) for _, line in lines), initial=0))[:-1]

    def place(at: int) -> str:
        return f"{path}:{lines[bisect_right(begins, at) - 1][0]}"

    index, at = 0, _skip(text, _skip(text, 0) + 1)
    try:
        if closed := text.startswith("]", at):
            at += 1
        while not closed:
            value, end = _DECODER.raw_decode(text, at)
            yield f"{place(at)}, row {index}", value
            end = _skip(text, end)
            closed = text.startswith("]", end)
            if not closed and not text.startswith(",", end):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            index, at = index + 1, _skip(text, end + 1)
        if _skip(text, at) < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except (ValueError, RecursionError) as error:
        raise _not_json(place(getattr(error, "pos", at)), error)


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _not_json(where: str, error: Exception) -> EmmechError:
    why = f"{error}"
    if isinstance(error, json.JSONDecodeError):
        why = f"not JSON: {error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        why = "it is nested too deeply"
    return _bad(where, why, f"one JSON object a line, or one JSON array; {_TABLES}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
_SPACE = re.compile(r"[ \t\n\r]*")


def _check(rows: Iterable[tuple[str, Any]], *, name: str, path: str | None) -> ChatDataset:
    checked: list[Row] = []
    refusals: list[tuple[str, Refused]] = []
    try:
        for where, row in rows:
            try:
                checked.append(read_row(row))
            except Refused as refused:
                refusals.append((where, refused))
    except EmmechError:
        if not refusals:
            raise
    if refusals:
        where, first = refusals[0]
        same = sum(refused.kind == first.kind for _, refused in refusals)
        total = len(checked) + len(refusals)
        raise _bad(where, f"{first.why}; {same} of {total} rows cannot be used for this reason", first.instead)
    if not checked:
        raise _bad(path or name, "it has no rows", 'at least one {"messages": [...]}')
    return ChatDataset(tuple(checked), name, path)


def _bad(where: str, why: str, instead: str) -> EmmechError:
    return EmmechError("read the dataset", given=where, why=why, instead=instead)


_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_IN_ROW = frozenset([*_MEDIA, "tools", "functions", "documents", "history", "system_prompt", "weight", "weights"])
_IN_MESSAGE = frozenset(
    [*_MEDIA, "tool_calls", "tool_call_id", "function_call", "name", "refusal", "prefix", "train", "training", "mask"]
).union(
    ["thinking", "reasoning", "reasoning_content", "channel", "recipient"],
    ["loss", "loss_mask", "loss_scale", "train_detail", "trainable"],  # weights of ms-swift and axolotl
)


@dataclass(eq=False)
class Refused(Exception):
    """A row cannot be used."""

    kind: str  # the same for rows that have the same fault
    why: str
    instead: str


class _Format(NamedTuple):
    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Message]]
    refused: frozenset[str] = frozenset()


def read_row(row: Any) -> Row:
    """The messages of a row: ``role``, ``content`` and, on an answer that is not to be learnt, ``"weight": 0``.

    Raises:
        Refused: the row has no known format, or holds what cannot be learnt from text.

    Example:
        >>> read_row({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})
        ({'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'})
    """
    if isinstance(row, list | tuple):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise _no_messages(f"a {type(row).__name__}")
    formats = [form for form in _FORMATS if all(row.get(key) is not None for key in form.keys)]
    if not formats:
        raise _no_messages(f"keys {sorted(map(str, row))}")
    _refuse_keys(row, _IN_ROW.union(*(form.refused for form in formats)), "the row")
    turns, *others = [form.read(row) for form in formats]
    if any(other != turns for other in others):
        keys = " and of ".join(", ".join(form.keys) for form in formats)
        raise Refused("two formats", f"it is a row of {keys}, which differ", "keep the keys of one format")
    if _present(row.get("system")):
        turns = _with_system(_text(row["system"], "the row's 'system'"), turns)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise Refused("no answer", "it has no assistant turn, so there is nothing to learn", "add the answer")
    if not any(map(trained, answers)):
        raise Refused("no weight", "every answer has weight 0, so there is nothing to learn", '"weight": 1 on one')
    return tuple(turns)


def _chat(turns: Any) -> list[Message]:
    if not isinstance(turns, list | tuple) or not turns:
        raise _no_messages(shown(turns))
    return [_message(index, turn) for index, turn in enumerate(turns)]


def _pair(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = (
        _chat([{"role": role, "content": turns}] if isinstance(turns, str) else turns)
        for role, turns in (("user", row["prompt"]), ("assistant", row["completion"]))
    )
    if any(turn["role"] != "assistant" for turn in completion):
        why = "its completion holds turns that are not the assistant's"
        raise Refused("completion", why, "move them into the prompt")
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt] + completion


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    given = [row["instruction"], row["input"]] if _present(row.get("input")) else [row["instruction"]]
    asked = "\n\n".join(_text(part, "the instruction or input") for part in given)
    return _chat([{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}])


_FORMATS = (
    _Format(("messages",), lambda row: _chat(row["messages"])),
    _Format(("conversations",), lambda row: _chat(row["conversations"])),
    _Format(("prompt", "completion"), _pair, frozenset(["label"])),  # "label": false marks a completion to avoid
    _Format(("instruction", "output"), _alpaca),
)
_KEYS = ", or ".join(" and ".join(form.keys) for form in _FORMATS)


def _message(index: int, given: Any) -> Message:
    message = given if isinstance(given, Mapping) else {}
    role, content = (
        message.get(key) if message.get(key) is not None else message.get(other)
        for key, other in (("role", "from"), ("content", "value"))
    )
    told = [message[key] for key in ("role", "from") if isinstance(message.get(key), str) and message[key] in _ROLES]
    texts = [message[key] for key in ("content", "value") if message.get(key) is not None]
    if len({_ROLES[one] for one in told}) > 1 or any(one != texts[0] for one in texts):
        why = f"message {index} has role and content beside from and value, which differ"
        raise Refused("two spellings", why, "role and content alone")
    if role in _TOOL_ROLES:
        raise Refused("tool turn", f"message {index} is a tool turn ({role})", "leave conversations with tools out")
    if not isinstance(role, str) or role not in _ROLES:
        hint = closest(role, _ROLES) if isinstance(role, str) else f"one of {', '.join(_ROLES)}"
        raise Refused("role", f"message {index} has role {shown(role)}", hint)
    role = _ROLES[role]
    _refuse_keys(message, _IN_MESSAGE, f"message {index} ({role})")
    text = _text(content, f"message {index} ({role})")
    if role == "assistant" and not text.strip():
        raise Refused("empty", f"message {index} is an empty answer", "leave the row out, or fill it in")
    weight = message.get("weight")
    allowed = (0, 1) if role == "assistant" else (0,)  # only answers are learnt
    if weight is not None and (isinstance(weight, bool) or weight not in allowed):
        instead = "0 or 1 on an answer: 0 is context, 1 is learnt; other turns are never learnt"
        raise Refused("weight", f"message {index} ({role}) has weight {shown(weight)}", instead)
    out: Message = {"role": role, "content": text}
    return {**out, "weight": 0} if role == "assistant" and weight == 0 else out


def _text(content: Any, where: str) -> str:
    """The text of a content, its parts joined as chat templates join them: with nothing in between."""
    if isinstance(content, list | tuple) and content:
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise Refused(f"part {kind!s:.40}", f"{where} has a part that is not text ({shown(kind)})", "text only")
            if extra := sorted(str(key) for key in part if key not in ("type", "text") and _present(part[key])):
                raise Refused(f"part with {extra}", f"{where} has a text part with {extra}", "type and text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused("no text", f"{where} has no text in 'content'", "a string")
    if at := broken_text(content):
        raise Refused("surrogate", f"{where} has {at}", "write the character itself, or leave it out")
    return content


def _with_system(text: str, turns: list[Message]) -> list[Message]:
    own = [turn["content"] for turn in turns if turn["role"] == "system"]
    if own and own != [text]:
        raise Refused("two systems", "it has a system turn and another text in 'system'", "keep one of them")
    return turns if own else [{"role": "system", "content": text}, *turns]


def _refuse_keys(given: Mapping[str, Any], refused: frozenset[str], where: str) -> None:
    if found := sorted(key for key in refused.intersection(given) if _present(given[key])):
        why = f"{where} has {', '.join(found)}, which would change what is learnt and cannot be kept"
        instead = "leave such rows out, or take the key away if it does not matter; to skip an answer give it weight 0"
        raise Refused(f"keys {found}", why, instead)


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, Collection) and not len(value))


def _no_messages(given: str) -> Refused:
    return Refused("no messages", f"no list of messages ({given})", f'{{"messages": [...]}}; a row has {_KEYS}')
