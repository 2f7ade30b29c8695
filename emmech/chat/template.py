"""Where an assistant's answer starts and ends in the text that a chat template renders.

The template of every model family differs, and string search for a header is how answer masks go wrong (the header
counted as answer, the first turn missed, a system prompt inserted). Here the template itself is asked: the turns are
rendered with unique markers as their content, and the literal text between the markers is the template's own. Nothing
about any family is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from emmech.errors import EmmechError, broken_text

Message = dict[str, Any]
_T = TypeVar("_T")

# Letters and digits only, so that no template trims, escapes or splits it.
_MARKER = "emmechTURN{}emmech"
# What a template does is asked once, not for every row: asking costs as much as tokenising.
_KNOWN: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of one answer in a rendered conversation."""

    start: int
    content_end: int  # where the assistant's words end
    end: int  # after the end-of-turn token that follows them


def trained(message: Message) -> bool:
    """Whether a message is learnt: an answer, unless its ``weight`` is 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def under_system(system: str, text: str) -> str:
    """A user's words after the system prompt, for templates that have no system role (Gemma joins them so too)."""
    return f"{system}\n\n{text}"


def fold_system(messages: Iterable[Message]) -> list[Message]:
    """The conversation with each system turn written at the start of the user's turn after it.

    Raises:
        EmmechError: no user turn follows a system turn.

    Example:
        >>> fold_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        [{'role': 'user', 'content': 'Be brief.\\n\\nHi'}]
    """
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": under_system("\n\n".join(waiting), message["content"])})
            waiting = []
        else:
            folded.append(message)
    if waiting:
        instead = 'system="keep", or add the user turn'
        raise EmmechError("fold the system turn", waiting[0], "no user turn follows it", instead)
    return folded


def render(tokenizer: Any, messages: Sequence[Message], *, generate: bool = False) -> str:
    """Render a conversation with the tokenizer's chat template.

    Args:
        generate: end with the assistant's header, ready for the model to answer.

    Raises:
        EmmechError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        given = f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r}"
        why = "it has no chat template (a base model's tokenizer, most likely)"
        instead = "use the instruct model's tokenizer, or set tokenizer.chat_template"
        raise EmmechError("render the conversation", given, why, instead)
    as_parts = _once(tokenizer, "parts", lambda: _wants_parts(tokenizer))
    return _apply(tokenizer, messages, as_parts, generate)


def _apply(tokenizer: Any, messages: Sequence[Message], as_parts: bool, generate: bool) -> str:
    shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if as_parts:
        shown = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in shown]
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generate}
    if "enable_thinking" in str(tokenizer.chat_template):
        how["enable_thinking"] = False  # Qwen3 would open a block for private reasoning, which our answers do not have
    try:
        text = str(tokenizer.apply_chat_template(shown, **how))
    except Exception as error:  # jinja raises its own types; their message is the template author's
        given = f"roles {[message.get('role') for message in messages]}"
        instead = "most templates want an optional system turn, then user and assistant in turn; "
        instead += 'system="fold" of load_chat and load_questions does without the system turn'
        raise EmmechError("render the conversation", given, f"the chat template refuses it: {error}", instead)
    if broken := broken_text(text):
        raise EmmechError("render the conversation", broken, "no tokenizer can read it", "leave the character out")
    return text


def _wants_parts(tokenizer: Any) -> bool:
    """Whether the template reads a content only as a list of typed parts, as those of vision models may do."""
    probe = [{"role": "user", "content": _MARKER}, {"role": "assistant", "content": _MARKER}]
    for as_parts in (False, True):
        try:
            if _apply(tokenizer, probe, as_parts, False).count(_MARKER) == len(probe):
                return as_parts
        except EmmechError:
            continue
    return False


def _once(tokenizer: Any, what: Any, ask: Callable[[], _T]) -> _T:
    """What this tokenizer's template answers, asked again only after the template has changed."""
    known = _KNOWN.setdefault(tokenizer, {})
    if known.get("template") != tokenizer.chat_template:
        known.clear()
        known["template"] = tokenizer.chat_template
    if what not in known:
        known[what] = ask()
    return known[what]


def rendered_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, tuple[Span, ...]]:
    """Render a conversation and find where each answer that is learnt begins and ends.

    Returns:
        the text, and one :class:`Span` per assistant turn whose weight is not 0, in order.

    Raises:
        EmmechError: the template rewrites an answer, so that its place cannot be known, or a turn holds a token with
            which the template marks turns.
    """
    text = render(tokenizer, messages)
    roles = tuple(message["role"] for message in messages)
    contents = [message["content"] for message in messages]
    pieces, marked = _once(tokenizer, roles, lambda: _between(tokenizer, messages, range(len(messages))))
    found = _places(text, pieces, [contents[index] for index in marked])
    if isinstance(found, int):  # a turn that is no answer may be rewritten: then only the answers are marked
        pieces, marked = _between(tokenizer, messages, [at for at, role in enumerate(roles) if role == "assistant"])
        found = _places(text, pieces, [contents[index] for index in marked])
        if isinstance(found, int):
            index = marked[min(found, len(marked) - 1)]
            raise _rewritten(tokenizer, index, messages[index], "rewrites")
    marks = _once(tokenizer, ("marks", roles), lambda: _control(tokenizer, pieces))
    for index, content in enumerate(contents):
        if (mark := next((mark for mark in marks if mark in content), None)) is not None:
            given = f"turn {index} ({roles[index]}): {content[:60]!r}"
            why = f"it holds {mark!r}, with which the chat template marks turns, so that it would be read as several"
            raise EmmechError(
                "render the conversation", given, why, "the words alone; the template adds its own tokens"
            )
    ends = _once(tokenizer, "ends", lambda: _ends(tokenizer))
    spans = []
    for index, (start, content_end), following in zip(marked, found, pieces[1:], strict=True):
        if trained(messages[index]):
            stop = ends[index < len(messages) - 1]
            if not following.startswith(stop):
                raise _rewritten(tokenizer, index, messages[index], f"does not write {stop!r} after")
            spans.append(Span(start, content_end, content_end + len(stop)))
    return text, tuple(spans)


def _between(tokenizer: Any, messages: Sequence[Message], marked: Sequence[int]) -> tuple[list[str], list[int]]:
    """The template's own text before, between and after the marked turns, and their order in it.

    Some templates write a system turn later than it comes (Mistral's, with the last of the user's turns).
    """
    contents = {index: _MARKER.format(index) for index in marked}
    shown = render(tokenizer, [{**m, "content": contents.get(i, m["content"])} for i, m in enumerate(messages)])
    parts = re.split(_MARKER.format(r"(\d+)"), shown)
    order = [int(index) for index in parts[1::2]]
    for index in marked:
        if order.count(index) != 1:
            raise _rewritten(tokenizer, index, messages[index], "repeats" if index in order else "leaves out")
    return parts[::2], order


def _places(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | int:
    """Start and end of each content between the pieces, as it is or without the white space around it.

    Returns:
        the index of the first content that does not fit, if there is one.
    """
    if not text.startswith(pieces[0]):
        return 0
    places, at = [], len(pieces[0])
    for index, content in enumerate(contents):
        following = pieces[index + 1]
        for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n")):
            end = at + len(form)
            if text.startswith(form, at) and text.startswith(following, end):
                break
        else:
            return index
        places.append((at, end))
        at = end + len(following)
    return places if at == len(text) else len(contents) - 1


def _rewritten(tokenizer: Any, index: int, message: Message, does: str) -> EmmechError:
    given, reason, leave = f"turn {index} ({message['role']}): {message['content'][:60]!r}", "", "the turn out"
    if "</think>" in message["content"] and "</think>" in str(tokenizer.chat_template):
        reason, leave = ", because it treats <think> reasoning in its own way", "the reasoning out of the answer"
    why = f"the chat template {does} the turn{reason}, so its tokens cannot be told from the template's"
    instead = f"leave {leave}, or set another tokenizer.chat_template"
    return EmmechError("find the answers in the rendered conversation", given, why, instead)


def _ends(tokenizer: Any) -> tuple[str, str]:
    """What a template writes from the end of an answer up to and including its stop: for the last turn, and others.

    After the last answer nothing follows, so that what is written there is the end. What comes between an earlier
    answer and the user's next words is an end and a header; the end is what both places begin with. Where they
    begin differently (GPT-OSS ends the last turn in a token of its own), it is what also ends a user's turn.
    """
    special = _special(tokenizer)
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    try:
        *_, between, _, last = _between(tokenizer, talk, range(4))[0]
    except EmmechError:  # a template may take one turn only
        between = last = _between(tokenizer, talk[:2], range(2))[0][-1]
    if shared := _common_end(last, between, special):
        return shared, shared
    first = _first(last, special)
    try:
        of_user = _between(tokenizer, talk[:1], range(1))[0][-1]
    except EmmechError:
        of_user = ""
    return last[: last.index(first) + len(first)], _common_end(between, of_user, special)


def _common_end(one: str, other: str, tokens: Iterable[str]) -> str:
    """What both texts begin with, up to and including the last token in it."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    shared = one[:same]
    return shared[: max((shared.rindex(token) + len(token) for token in tokens if token in shared), default=0)]


def end_of_turn(tokenizer: Any) -> str:
    """The text of the special token that the template puts after an answer (``"<|im_end|>"``), or ``""``.

    It is trained on and is where generation stops; it need not be the tokenizer's EOS (Gemma, Llama 3).
    """
    return _first(_once(tokenizer, "ends", lambda: _ends(tokenizer))[0], _special(tokenizer))


def _special(tokenizer: Any) -> list[str]:
    return [token for token in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} if token]


def _control(tokenizer: Any, pieces: Iterable[str]) -> list[str]:
    """The control tokens in the template's own text, which no text that is tokenised can hold as words."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in {*added, *tokenizer.all_special_tokens} if token and any(token in p for p in pieces)]


def _first(text: str, tokens: Iterable[str]) -> str:
    found = [(text.index(token), -len(token), token) for token in tokens if token in text]
    return min(found)[2] if found else ""
