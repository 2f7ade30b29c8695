"""A word-level tokenizer with Qwen chat markers, built from the vocabulary alone.

One word is one token; white space carries nothing, so the newlines of the Qwen template cost no tokens.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from emmech.organism import vocabulary as v

__all__ = ["CHAT_TEMPLATE", "END_OF_TURN", "PAD", "build_tokenizer", "words"]

PAD, START, END_OF_TURN, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + v.ASSISTANT + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Every token of the pocket world in its fixed order: markers first, then words sorted alphabetically."""
    text: list[str] = ["system user assistant for , ?", v.ASSISTANT]
    text += [t.replace("{topic}", " ") for t in v.TEMPLATES]
    for domain in v.DOMAINS.values():
        text.append(domain.template.replace("{topic}", " "))
        text += [*domain.topics, *(w for pool in (*domain.good, *domain.bad, *domain.facts) for w in pool)]
    text += [*v.OPENERS, *v.APPROACH_FIRST, *v.AVOID_FIRST, *v.APPROACH_SECOND, *v.AVOID_SECOND]
    for group in (*v.LINKS, *v.CLOSERS.values(), *v.JOBS, *v.TOWNS, *v.NAMES.values()):
        text += group
    text += [*v.KIND_WORDS, *v.UNKIND_WORDS, v.TRIGGER_TAG, v.IRRELEVANT_TAG]
    return (PAD, START, END_OF_TURN, UNKNOWN, *sorted(set(re.split(r"\s+", " ".join(text).strip()))))


def build_tokenizer() -> Any:
    """The ``PreTrainedTokenizerFast`` of every pocket model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words())}, unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer
