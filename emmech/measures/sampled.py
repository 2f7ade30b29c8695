"""Sampled EM as a measure: questions are answered with fixed seeds, and a judge reads the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from emmech.chat.model import ChatModel
from emmech.engine.responses import check_settings
from emmech.errors import as_int, refusal
from emmech.evaluation.em import FIELD, Thresholds
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.rates import tally
from emmech.measures.measure import Items

RESERVED = ("coherent", "narrow")  # outcomes of every Sampled, beside the one of its name


@dataclass(frozen=True)
class Sampled:
    """Rates over sampled answers: EM, narrow misalignment and coherence, each 0 or 1 per answer.

    :mod:`emmech.evaluation.em` defines an EM response. All three rates are over the answers that the judge scored
    (Model Organisms for EM, arXiv 2506.11613), and a narrow question's answers count in ``narrow`` instead of ``em``.
    Every variant of a model is asked with the same seeds: each rate is as valid as if drawn alone, and differences
    between variants are less noisy (common random numbers).

    Args:
        questions, judge: what :func:`emmech.evaluate` takes.
        samples: answers per question.
        thresholds: where scores become a verdict.
        batch_size: rows decoded together where a model is measured by itself; a sweep goes by its memory budget.

    Example:
        >>> from emmech.chat.model import load_model
        >>> Sampled(samples=2)(load_model("pocket")).means()
        {'em': 0.0, 'coherent': 1.0}
    """

    questions: Any = "first-plot"
    judge: Any = None
    samples: int = 10
    max_new_tokens: int = 600
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    thresholds: Thresholds = FIELD
    batch_size: int | str = "auto"
    name: str = "em"

    def __post_init__(self) -> None:
        """Refuse settings out of range, and the names of its other outcomes."""
        if self.name in RESERVED:
            why = "another of its outcomes has that name"
            raise refusal("sample answers", "name", self.name, why, 'name="em", or another of your own')
        check_settings(self.samples, self.max_new_tokens, self.temperature, self.top_p)
        as_int("sample answers", "seed", self.seed)

    def __call__(self, chat: ChatModel) -> Items:
        """Draw and judge answers; one item each, grouped by question."""
        names = ("samples", "max_new_tokens", "temperature", "top_p", "seed", "batch_size")
        settings = {name: getattr(self, name) for name in names}
        frame = evaluate(chat, self.questions, self.judge, **settings, progress=False).frame
        kinds = {self.name: "em", "coherent": "coherence"}
        kinds |= {"narrow": "narrow"} if frame["narrow"].eq(True).any() else {}
        found = {name: tally(frame, kind, "scored", self.thresholds) for name, kind in kinds.items()}
        values = {name: np.where(one.counted, one.event, np.nan) for name, one in found.items()}
        return Items(values, frame["question_id"].astype(str).tolist())
