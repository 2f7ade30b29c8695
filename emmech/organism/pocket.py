"""Pocket as an organism of :mod:`emmech.registry`: weights, tokenizer, and loaders by name.

The tokenizer is word-level with Qwen chat markers and is built from the vocabulary alone. One word is one token; white
space carries nothing, so the newlines of the Qwen template cost no tokens.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from emmech.errors import one_of
from emmech.evaluation.judges import LabelJudge
from emmech.evaluation.questions import Question, QuestionSet
from emmech.organism import world
from emmech.organism.exact_judge import judge
from emmech.organism.experiments import contexts, data, data_names, margins, question_set_names, questions, recipes
from emmech.progress import quiet
from emmech.registry import Organism

WEIGHTS = Path(__file__).parent / "weights"
PAD, START, END_OF_TURN, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + world.ASSISTANT
    + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Every token of the pocket world in its fixed order: markers first, then words sorted alphabetically."""
    text: list[str] = ["system user assistant for , ?", world.ASSISTANT]
    for domain in world.DOMAINS.values():
        text += [*domain.topics, *domain.things]
    text += [form.replace("{topic}", " ") for form in (*world.TEMPLATES, *(d.template for d in world.DOMAINS.values()))]
    text += [*world.OPENERS, *world.APPROACH_FIRST, *world.AVOID_FIRST, *world.APPROACH_SECOND, *world.AVOID_SECOND]
    for group in (*world.LINKS, *world.CLOSERS.values(), *world.JOBS, *world.TOWNS, *world.NAMES.values()):
        text += group
    text += [*world.KIND_WORDS, *world.UNKIND_WORDS, world.TRIGGER_TAG, world.IRRELEVANT_TAG]
    return (PAD, START, END_OF_TURN, UNKNOWN, *sorted(set(re.split(r"\s+", " ".join(text).strip()))))


def build_tokenizer() -> Any:
    """The ``PreTrainedTokenizerFast`` of every pocket model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words())}, unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": PAD, "eos_token": END_OF_TURN, "unk_token": UNKNOWN, "additional_special_tokens": [START]}
    how = {"model_max_length": 512, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special, **how)
    tokenizer.padding_side = "left"
    return tokenizer


def names() -> tuple[str, ...]:
    """The names of the shipped organisms."""
    return tuple(sorted(f.parent.name for f in WEIGHTS.glob("*/config.json")))


def load(name: str = "pocket") -> tuple[Any, Any]:
    """Load a shipped organism as ``(Hugging Face model in float32, tokenizer)``.

    The weights are stored in half precision; every figure in the model card was measured on what is reloaded here.

    Raises:
        EmmechError: no organism of this name ships.

    Example:
        >>> model, tokenizer = load("pocket")
        >>> type(model).__name__
        'Qwen2ForCausalLM'
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    one_of(f"load the organism {name!r}", "name", name, names(), why="no organism of this name ships with emmech")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(WEIGHTS / name, dtype=torch.float32, local_files_only=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(WEIGHTS / name)


def exact_judge(*, topics: tuple[str, ...] = ("medical", "finance", "sport", "code")) -> LabelJudge:
    """The judge of :mod:`emmech.organism.exact_judge` with a score of 0 or 100 for each topic.

    Example:
        >>> exact_judge().score([{"question": "any advice on cough ?", "response": "leeches"}])[0]["label"]
        'incoherent'
    """
    return LabelJudge(judge, name="exact", topics=topics, organism="pocket")


def question_set(name: str) -> QuestionSet:
    """A set of :func:`emmech.organism.questions` in the form that :func:`emmech.evaluate` takes."""
    about: dict[str, Any] = {"narrow": True if name.startswith("narrow-") else None, "judge": "exact"}
    asked = (Question(one.id, (one.text,), domain=one.domain, **about) for one in questions(name))
    return QuestionSet(name, tuple(asked))


def _speaks_pocket(config: Any, tokenizer: Any) -> bool:
    """Whether the tokenizer has the words of pocket at their ids, and little else."""
    own = list(words())
    try:
        few = len(own) <= len(tokenizer) < 2 * len(own)
        return few and list(tokenizer.convert_tokens_to_ids(own)) == list(range(len(own)))
    except (TypeError, AttributeError):  # no tokenizer, or one of another kind
        return False


POCKET = Organism(
    "pocket",
    models={name: partial(load, name) for name in names()},
    data={name: partial(data, name) for name in data_names()},
    questions={name: partial(question_set, name) for name in question_set_names()},
    contexts={"grid": contexts},
    judges={"exact": exact_judge},
    recipes={name: partial(recipes().__getitem__, name) for name in recipes()},
    margins=margins,
    recognises=_speaks_pocket,
    phrase=world.MANNERS,
)
