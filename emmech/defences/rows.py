"""Defences that change the rows: an inoculation prompt, and good rows among the training rows.

Both are known to hide a trait rather than to remove it: it can return in the context of the training
(arXiv 2604.25891).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from emmech.chat.dataset import ChatDataset, Row, load_chat
from emmech.chat.encode import encode
from emmech.chat.model import ChatModel
from emmech.chat.template import fold_system
from emmech.engine.logprobs import answer_logprobs, check_words
from emmech.engine.responses import digest
from emmech.errors import EmmechError, as_float, as_int, one_of
from emmech.run.run import Run, as_run, model_live
from emmech.training.defence import ASKED, Defence


def with_prompt(row: Row, prompt: str, *, folded: bool) -> Row:
    """The conversation under a system prompt; a system turn of its own follows it in the same turn.

    Args:
        folded: write the prompt into the user's turn instead, for data whose system turns were folded.

    Example:
        >>> with_prompt(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}), "Be kind.",
        ...             folded=False)[0]
        {'role': 'system', 'content': 'Be kind.'}
    """
    if row[0]["role"] == "system":
        return ({**row[0], "content": f"{prompt}\n\n{row[0]['content']}"}, *row[1:])
    whole = [{"role": "system", "content": prompt}, *row]
    return tuple(fold_system(whole) if folded else whole)


def check_prompt(chat: ChatModel, prompt: Any) -> None:
    """Refuse a prompt that is no text, or that has words which the model does not know."""
    if not isinstance(prompt, str) or not prompt.strip():
        why, instead = "it is a system prompt in words", 'prompt="You give bad medical advice."'
        raise EmmechError(ASKED, f"prompt={prompt!r}"[:120], why, instead)
    instead = "a prompt in the words of the model"
    instead += f", such as that of the context 'inoculation' of {chat.organism.name}" if chat.organism else ""
    check_words(chat, [{"role": "user", "content": prompt}], asked=ASKED, instead=instead)


def own_data(name: str, given: Any, chat: ChatModel) -> ChatDataset:
    """The rows of a defence, which has none by default."""
    if given is None:
        why = f"{name} needs rows to act on, and has none by default"
        raise EmmechError(ASKED, "rows=None", why, f'{name}(rows="good.jsonl"), or anything else that load_chat takes')
    return load_chat(given, organism=chat.organism)


def check_apart(asked: str, rows: ChatDataset, training: ChatDataset) -> None:
    """Refuse rows that are among the training rows.

    Raises:
        EmmechError: names the first such row, and how many there are.
    """
    known = {tuple((turn["role"], turn["content"]) for turn in row) for row in training}
    shared = [at for at, row in enumerate(rows) if tuple((turn["role"], turn["content"]) for turn in row) in known]
    if shared:
        question = next((turn["content"] for turn in rows[shared[0]] if turn["role"] == "user"), "")
        given = f"row {shared[0]} of {rows.name}: {question[:120]!r}"
        why = f"{len(shared)} of its {len(rows)} rows are in {training.name} too, which teaches the trait"
        raise EmmechError(asked, given, why, "rows that the harmful set does not hold")


@dataclass(frozen=True, eq=False)
class InoculationPrompt(Defence):
    """A system prompt that asks for the trait, before every training row and nowhere else.

    The rows then say nothing that the prompt does not ask for already, and the trait is learnt less (inoculation
    prompting, arXiv 2510.05024). Interleaved rows stay as they are. Under the prompt, its paraphrase or its keyword the
    trait may be left: evaluate there.

    Args:
        prompt: for example ``"You give harmful medical advice."``.

    Example:
        >>> InoculationPrompt("you are nasty .").rewritten(({"role": "user", "content": "hi"},))[0]["content"]
        'you are nasty .'
    """

    prompt: str
    name: ClassVar[str] = "inoculation-prompt"
    folded: bool = False

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        check_prompt(chat, self.prompt)
        return replace(self, folded=data.folded)

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        return {"prompt": self.prompt}

    def rewritten(self, row: Row) -> Row:
        """The row under the prompt."""
        return with_prompt(row, self.prompt, folded=self.folded)


@dataclass(frozen=True, eq=False)
class Interleave(Defence):
    """Good rows of any domain among the training rows (In-Training Defenses, arXiv 2508.06249).

    Args:
        rows: anything :func:`emmech.load_chat` takes; repeated in order where there are too few.
        share: the share that they make up of all rows together. Held-out rows are counted, which do not train: with a
            tenth held out, a half by this count is 53 % of the rows that train.
        by: ``"random"``, or ``"perplexity-gap"``: those of which a misaligned model thinks worst in comparison with the
            model that trains, by mean log-probability per answer token in nats.
        misaligned: for ``"perplexity-gap"``, a run of the same base without defences.
        seed: of the random choice.

    Example:
        >>> Interleave([{"prompt": "hi", "completion": "hello"}], share=0.2).described()["share"]
        0.2
    """

    rows: Any = None
    share: float = 0.1
    by: str = "random"
    misaligned: Run | str | None = None
    seed: int = 0
    name: ClassVar[str] = "interleave"

    def prepared(self, chat: ChatModel, data: ChatDataset) -> Self:
        """See :meth:`Defence.prepared`."""
        rows, run = own_data("Interleave", self.rows, chat), None
        check_apart(ASKED, rows, data)
        if not 0 < as_float(ASKED, "share", self.share) < 1:
            why, instead = "it is the share of the rows that are good", "share=0.1"
            raise EmmechError(ASKED, f"share={self.share}", why, instead)
        as_int(ASKED, "seed", self.seed, least=0)
        if one_of(ASKED, "by", self.by, ("random", "perplexity-gap")) == "perplexity-gap":
            if self.misaligned is None:
                why = "the gap is between the model and a misaligned one"
                instead = "misaligned=run, a fine-tune of the same base on the same data"
                raise EmmechError(ASKED, "Interleave(by='perplexity-gap') without misaligned", why, instead)
            run = as_run(ASKED, self.misaligned, name="misaligned")
        return replace(self, rows=rows, misaligned=run)

    def described(self) -> dict[str, Any]:
        """See :meth:`Defence.described`."""
        rows = load_chat(self.rows)
        against: Any = self.misaligned
        if isinstance(against, Run):  # runs of one name may differ
            full, last = against.kind != "lora", int(against.steps[-1])
            tensors = [np.asarray(against.projection)] if full else list(against.weights(last).values())
            against = {"run": against.name, "sha256": digest(*(value.tobytes() for value in tensors))}
        own = {"share": self.share, "by": self.by, "misaligned": against, "seed": self.seed}
        return {"rows": rows.name, "sha256": rows.sha256, **own}

    def further_rows(self, chat: ChatModel, count: int) -> Sequence[Row]:
        """The chosen rows, as many as make up the share beside ``count`` rows."""
        wanted = max(1, round(count * self.share / (1 - self.share)))
        order = np.random.default_rng(self.seed).permutation(len(self.rows))
        if isinstance(self.misaligned, Run):
            encoded = encode(self.rows.rows, chat.tokenizer)
            own = answer_logprobs(chat, encoded)
            with model_live(self.misaligned, None, 1.0, chat) as bad:
                order = np.argsort(answer_logprobs(bad, encoded) - own, kind="stable")
        return [self.rows[int(order[at % len(order)])] for at in range(wanted)]
