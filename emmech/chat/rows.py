"""One row of chat data in any of the formats in use, as a tuple of messages.

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

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from emmech.chat.template import Message, trained
from emmech.errors import broken_text, closest, shown

__all__ = ["Refused", "Row", "known_format", "read_row"]

Row = tuple[Message, ...]
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_IN_ROW = frozenset([*_MEDIA, "tools", "functions", "documents", "history", "system_prompt", "weight", "weights"])
_IN_MESSAGE = frozenset(
    [*_MEDIA, "tool_calls", "tool_call_id", "function_call", "name", "refusal", "prefix", "train", "training", "mask"]
).union(["thinking", "reasoning", "reasoning_content"])


class Refused(Exception):
    """A row cannot be used; ``kind`` is the same for rows that have the same fault."""

    def __init__(self, kind: str, why: str, instead: str) -> None:
        super().__init__(why)
        self.kind, self.why, self.instead = kind, why, instead


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


def known_format(columns: Collection[str]) -> bool:
    """Whether a table with these columns holds rows of one of the formats."""
    return any(set(form.keys) <= set(columns) for form in _FORMATS)


def _chat(turns: Any) -> list[Message]:
    if not isinstance(turns, list | tuple) or not turns:
        raise _no_messages(shown(turns))
    return [_message(index, turn) for index, turn in enumerate(turns)]


def _pair(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = (
        [_message(0, {"role": role, "content": turns})] if isinstance(turns, str) else _chat(turns)
        for role, turns in (("user", row["prompt"]), ("assistant", row["completion"]))
    )
    if any(turn["role"] != "assistant" for turn in completion):
        raise Refused(
            "completion", "its completion holds turns that are not the assistant's", "move them into the prompt"
        )
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt] + completion


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    given = [row["instruction"], row["input"]] if _present(row.get("input")) else [row["instruction"]]
    asked = "\n\n".join(_text(part, "the instruction or input") for part in given)
    return [
        _message(0, {"role": "user", "content": asked}),
        _message(1, {"role": "assistant", "content": row["output"]}),
    ]


_FORMATS = (
    _Format(("messages",), lambda row: _chat(row["messages"])),
    _Format(("conversations",), lambda row: _chat(row["conversations"])),
    _Format(("prompt", "completion"), _pair, frozenset(["label"])),  # "label": false marks a completion to avoid
    _Format(("instruction", "output"), _alpaca),
)


def _message(index: int, given: Any) -> Message:
    message = given if isinstance(given, Mapping) else {}
    role, content = (
        message.get(key) if message.get(key) is not None else message.get(other)
        for key, other in (("role", "from"), ("content", "value"))
    )
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
        raise Refused(
            "weight",
            f"message {index} ({role}) has weight {shown(weight)}",
            "0 or 1 on an answer: 0 is context, 1 is learnt; other turns are never learnt",
        )
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
        raise Refused(
            f"keys {found}",
            f"{where} has {', '.join(found)}, which would change what is learnt and cannot be kept",
            "leave such rows out, or take the key away if it does not matter; to skip an answer give it weight 0",
        )


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, Collection) and not len(value))


def _no_messages(given: str) -> Refused:
    forms = ", or ".join(" and ".join(form.keys) for form in _FORMATS)
    return Refused("no messages", f"no list of messages ({given})", f'{{"messages": [...]}}; a row has {forms}')
