"""Which tokens of a conversation a direction is read at, and an intervention may act at.

``"answer"``: the tokens of assistant turns after their header, end-of-turn token included; ``"prompt"``: every other
one; ``"all"``. Or a function ``(ids [batch, seq], start) -> mask [batch, seq]``, where ``start`` counts the tokens that
a key-value cache holds before these; the same function serves as ``tokens`` of an extraction and as ``positions`` of an
intervention. :func:`phrase_tokens` makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int

from emmech.chat.model import ChatModel, load_model
from emmech.errors import EmmechError

__all__ = ["Phrase", "Tokens", "phrase_tokens", "token_mask", "tokens_name"]

Tokens = Literal["answer", "prompt", "all"] | Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Phrase:
    """The tokens of a phrase, wherever it is in a row; see :func:`phrase_tokens`.

    Args:
        text: the phrase.
        spellings: its token ids, at the start of a text and after a blank, where those differ.
    """

    text: str
    spellings: tuple[tuple[int, ...], ...]

    def __call__(self, ids: Int[torch.Tensor, "batch seq"], start: int = 0) -> Bool[torch.Tensor, "batch seq"]:
        """Mask of the phrase's tokens; nothing after a cache, which holds the phrase already.

        Raises:
            EmmechError: a row does not have the phrase.
        """
        found = torch.zeros_like(ids, dtype=torch.bool)
        if start:
            return found
        for spelling in self.spellings:
            size = len(spelling)
            if ids.shape[1] < size:
                continue
            wanted = torch.tensor(spelling, device=ids.device)
            for row, first in (ids.unfold(1, size, 1) == wanted).all(-1).nonzero().tolist():
                found[row, first : first + size] = True
        if without := (~found.any(1)).nonzero().flatten().tolist():
            given, why = f"{self.text!r} in row {without[0]} of {len(ids)}", "the row does not have it"
            instead = "words that every prompt has, as it has them (a chat template may add a system prompt)"
            raise EmmechError("find the tokens of a phrase", given, f"{why}: nothing would be read or changed", instead)
        return found

    def __str__(self) -> str:
        return repr(self.text)


def phrase_tokens(model: Any, text: str) -> Phrase:
    """The tokens of a phrase that every prompt has: read a direction there, or steer and ablate there.

    Words that both sides of a contrast share are read with the same token ids on both, so that nothing of the
    direction is vocabulary.

    Args:
        model: whose tokenizer spells it.
        text: whole words, as the prompt has them.

    Raises:
        EmmechError: the text is empty, or has a word that the tokenizer does not know.

    Example:
        >>> chat = load_model("pocket")
        >>> asked = torch.tensor([chat.token_ids([{"role": "user", "content": "any advice on cash ?"}])])
        >>> int(phrase_tokens(chat, "advice on cash")(asked).sum())
        3
    """
    chat: ChatModel = load_model(model)
    spelt = {tuple(chat.tokenizer(own, add_special_tokens=False)["input_ids"]) for own in (text, f" {text}")}
    unknown = chat.tokenizer.unk_token_id
    if not text.strip() or any(unknown is not None and unknown in ids for ids in spelt):
        why = "it is empty" if not text.strip() else f"the tokenizer of {chat.name} does not know a word of it"
        raise EmmechError("find the tokens of a phrase", f"{text!r}", why, "words of the prompt")
    return Phrase(text, tuple(sorted(spelt)))


def token_mask(tokens: Tokens, ids: list[int], answer: list[bool]) -> list[bool]:
    """The chosen tokens of one unpadded row.

    Args:
        answer: which of its tokens belong to an answer.

    Raises:
        EmmechError: no such choice.
    """
    if callable(tokens):
        chosen: list[bool] = tokens(torch.tensor([ids]), 0)[0].bool().tolist()
        return chosen
    if tokens not in ("answer", "prompt", "all"):
        why = "three choices have a name"
        instead = '"answer", "prompt", "all", or a function such as phrase_tokens(model, text)'
        raise EmmechError("choose the tokens to average over", f"tokens={tokens!r}", why, instead)
    wanted = {"answer": (True,), "prompt": (False,), "all": (True, False)}[tokens]
    return [own in wanted for own in answer]


def tokens_name(tokens: Tokens) -> str:
    """The choice in words, for provenance.

    Example:
        >>> tokens_name("prompt"), tokens_name(Phrase("in one sentence", ()))
        ('prompt', "'in one sentence'")
    """
    return str(tokens) if isinstance(tokens, str | Phrase) else str(getattr(tokens, "__name__", tokens))
