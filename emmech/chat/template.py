"""Where an assistant's answer starts and ends in the text that a chat template renders.

The template of every model family differs, and string search for a header is how answer masks go wrong
(the header counted as answer, the first turn missed, a system prompt inserted). Here the template itself
is asked: the assistant turns are rendered once with unique markers as their content, and the literal text
between the markers is the template's own. Nothing about any family is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from emmech.errors import EmmechError

__all__ = ["Message", "Span", "end_of_turn", "render", "rendered_spans"]

Message = dict[str, str]

# Letters and digits only, so that no template trims, escapes or splits it.
_MARKER = "emmechANSWER{}emmech"
# asked once per row otherwise, which costs as much as tokenising it
_END_OF_TURN: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of one answer in a rendered conversation.

    ``content_end`` is where the assistant's words end; ``end`` is behind the end-of-turn token that follows.
    """

    start: int
    content_end: int
    end: int


def render(tokenizer: Any, messages: Sequence[Message], *, generate: bool = False) -> str:
    """Render a conversation with the tokenizer's chat template.

    Args:
        generate: end with the assistant's header, ready for the model to answer.

    Raises:
        EmmechError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise EmmechError(
            "render the conversation",
            f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r}",
            "it has no chat template (a base model's tokenizer, most likely)",
            "use the instruct model's tokenizer, or set tokenizer.chat_template",
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, **_quiet(tokenizer)
        )
    except Exception as error:  # jinja raises its own types; their message is the template author's
        raise EmmechError(
            "render the conversation",
            f"roles {[message.get('role') for message in messages]}",
            f"the chat template refuses it: {error}",
            "most templates want an optional system turn, then user and assistant in turn",
        )
    return str(text)


def _quiet(tokenizer: Any) -> dict[str, bool]:
    # Qwen3 opens a block for private reasoning unless told not to; our answers have none.
    return {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}


def rendered_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, tuple[Span, ...]]:
    """Render a conversation and say where each assistant answer lies.

    Returns:
        the text, and one :class:`Span` per assistant turn, in order.

    Raises:
        EmmechError: the template rewrites an answer, so that its place cannot be known.
    """
    marked = [dict(message) for message in messages]
    answers: list[str] = []
    for message in marked:
        if message["role"] == "assistant":
            answers.append(message["content"])
            message["content"] = _MARKER.format(len(answers) - 1)
    text = render(tokenizer, messages)
    rest = render(tokenizer, marked)
    pieces: list[str] = []
    for index in range(len(answers)):
        before, found, rest = rest.partition(_MARKER.format(index))
        if not found:
            raise _rewritten(index, "leaves the turn out")
        pieces.append(before)
    pieces.append(rest)

    eot = end_of_turn(tokenizer)
    spans, at = [], 0
    for index, answer in enumerate(answers):
        at += len(pieces[index])
        shown = next((form for form in (answer, answer.strip()) if text.startswith(form, at)), None)
        if shown is None:
            raise _rewritten(index, "changes the words of the turn")
        start, content_end = at, at + len(shown)
        tail = pieces[index + 1]
        end = content_end + (tail.find(eot) + len(eot) if eot and eot in tail else 0)
        spans.append(Span(start, content_end, end))
        at = content_end
    if text[at:] != pieces[-1]:
        raise _rewritten(len(answers) - 1, "depends on the words of the turn")
    return text, tuple(spans)


def _rewritten(index: int, what: str) -> EmmechError:
    return EmmechError(
        "find the answers in the rendered conversation",
        given=f"assistant turn {index}",
        why=f"the chat template {what}, so its tokens cannot be told from the template's",
        instead="split the conversation so that this turn is the last, or set another tokenizer.chat_template",
    )


def end_of_turn(tokenizer: Any) -> str:
    """The text of the special token that the template puts behind an answer (``"<|im_end|>"``), or ``""``.

    It is trained on and is where generation stops; it need not be the tokenizer's EOS (Gemma, Llama 3).
    """
    known = _END_OF_TURN.get(tokenizer)
    if known is not None and known[0] == tokenizer.chat_template:
        return known[1]
    marker = _MARKER.format("")
    shown = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]).partition(
        marker
    )[2]
    special = [token for token in tokenizer.get_added_vocab() if token] + list(tokenizer.all_special_tokens)
    following = [(shown.index(token), -len(token), token) for token in special if token in shown]
    found = min(following)[2] if following else ""
    _END_OF_TURN[tokenizer] = (tokenizer.chat_template, found)
    return found
