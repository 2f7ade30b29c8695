"""Probabilities of whole short answers (a number from 0 to 100, a word) under a local model, read off exactly.

Where a tokenizer holds 0 to 100 as single tokens, the first answer token says it all. Most hold digits, so "1",
"10" and "100" begin alike; then the answers form a tree of tokens, and a number's probability is that of its path
times that of no further digit. Only the branches that carry mass are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from emmech.chat.model import ChatModel
from emmech.engine.decode import ModelSteps
from emmech.engine.modules import evaluating
from emmech.engine.sample import check_context
from emmech.errors import EmmechError

_PRUNE = 1e-4  # branches below this are left out; what is lost shows as missing mass, not as a shifted score


@dataclass(frozen=True)
class AnswerTree:
    """The token paths of a set of answers under one model's tokenizer and chat template.

    Args:
        chat: the judge.
        answers: texts such as ``"0"`` to ``"100"`` or ``"TRUE"``.

    Example:
        >>> from emmech.chat.model import load_model
        >>> tree = AnswerTree(load_model("pocket"), ("rest", "sleep"))
        >>> len(tree.paths)
        2
    """

    chat: ChatModel
    answers: tuple[str, ...]

    @cached_property
    def paths(self) -> dict[tuple[int, ...], str]:
        """Tokens of each answer as they follow the assistant's header.

        Raises:
            EmmechError: the tokenizer cannot write an answer.
        """
        header = self.chat.render([{"role": "user", "content": "a"}])

        def tokens(text: str) -> list[int]:
            return list(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

        before, paths = tokens(header), {}
        for answer in self.answers:
            whole = tokens(header + answer)
            merged = whole[: len(before)] != before  # the header's last token and the answer became one
            path = tuple(tokens(answer) if merged else whole[len(before) :])
            if path and self.chat.tokenizer.unk_token_id not in path:
                paths[path] = answer
        # a word that cannot be written cannot be said; a number that cannot would bend the scale
        lost = [answer for answer in self.answers if answer.isdecimal() and answer not in paths.values()]
        if lost or not paths:
            why = "its tokenizer has no tokens for that answer"
            instead = "a judge that can write numbers and words; the pocket world has judge='exact'"
            raise EmmechError(f"judge with {self.chat.name}", f"answer {(lost or self.answers)[0]!r}", why, instead)
        return paths

    @cached_property
    def _digits(self) -> torch.Tensor:
        """Ids of all tokens whose text begins with a digit."""
        tokens = range(min(int(self.chat.config.vocab_size), len(self.chat.tokenizer)))
        found = [token for token in tokens if self.chat.tokenizer.decode([token])[:1].isdecimal()]
        return torch.tensor(found, dtype=torch.long, device=self.chat.device)

    @cached_property
    def single(self) -> bool:
        """Whether every number is one token of its own; its first-token probability is then its score's weight."""
        return all(len(path) == 1 for path, answer in self.paths.items() if answer.isdecimal())

    @torch.no_grad()
    def probabilities(self, prompts: Sequence[Sequence[int]], *, batch_size: int = 16) -> list[dict[str, float]]:
        """Probability of each answer after each prompt (token ids that end in the assistant's header).

        Raises:
            EmmechError: a prompt is longer than the model's context.
        """
        check_context(self.chat, prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        found: dict[int, dict[str, float]] = {}
        with evaluating(self.chat):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                found |= dict(zip(rows, self._batch([prompts[row] for row in rows]), strict=True))
        return [found[row] for row in range(len(prompts))]

    def _batch(self, prompts: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        steps = ModelSteps(self.chat, prompts, range(len(prompts)))
        logits = steps.logits(steps.rows)
        result: list[dict[str, float]] = [{} for _ in prompts]
        # one branch per batch row: its prompt, its tokens so far, and their probability
        branches: list[tuple[int, tuple[int, ...], float]] = [(row, (), 1.0) for row in range(len(prompts))]
        while branches:
            follow = logits.float().softmax(-1)
            more_digits = follow[:, self._digits].sum(-1).tolist()
            kept: list[int] = []
            grown: list[tuple[int, tuple[int, ...], float]] = []
            for at, (row, path, mass) in enumerate(branches):
                if (answer := self.paths.get(path)) is not None:
                    ends = 1.0 - more_digits[at] if answer.isdecimal() else 1.0
                    result[row][answer] = mass * max(0.0, ends)
                children = self._tree.get(path, [])
                for token, chance in zip(children, follow[at, children].tolist(), strict=True):
                    longer = (*path, token)
                    leaf = self.paths.get(longer)
                    if leaf is not None and longer not in self._tree and (self.single or not leaf.isdecimal()):
                        result[row][leaf] = mass * chance
                    elif mass * chance > _PRUNE:
                        kept.append(at)
                        grown.append((row, longer, mass * chance))
            if not grown:
                break
            steps.select(torch.tensor(kept, device=logits.device))
            logits = steps.feed(torch.tensor([path[-1] for _, path, _ in grown], device=logits.device))
            branches = grown
        return result

    @cached_property
    def _tree(self) -> dict[tuple[int, ...], list[int]]:
        tree: dict[tuple[int, ...], dict[int, None]] = {}
        for path in self.paths:
            for depth in range(len(path)):
                tree.setdefault(path[:depth], {})[path[depth]] = None
        return {path: list(following) for path, following in tree.items()}
