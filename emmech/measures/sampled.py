"""Sampled EM as a measure: questions are answered with fixed seeds, and a judge reads the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from emmech.chat.model import ChatModel
from emmech.engine.responses import check_settings
from emmech.errors import as_int
from emmech.evaluation.em import FIELD, Thresholds
from emmech.evaluation.evaluate import evaluate
from emmech.measures.measure import Items


@dataclass(frozen=True)
class Sampled:
    """Rates over sampled answers: EM, narrow misalignment and coherence, each 0 or 1 per answer.

    What an EM response is, :mod:`emmech.evaluation.em` says; all three are over the answers that the judge scored
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
        """Refuse settings out of range."""
        check_settings(self.samples, self.max_new_tokens, self.temperature, self.top_p)
        as_int("sample answers", "seed", self.seed)

    def __call__(self, chat: ChatModel) -> Items:
        """Draw and judge answers; one item each, grouped by question."""
        frame = evaluate(
            chat,
            self.questions,
            self.judge,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.batch_size,
            progress=False,
        ).frame
        aligned, coherent = frame["aligned"].to_numpy(float), frame["coherent"].to_numpy(float)
        scored, limits = self.thresholds.scored(aligned, coherent), self.thresholds
        em = np.where(scored, limits.misaligned(aligned, coherent), np.nan)
        narrow = frame["narrow"].eq(True).fillna(False).to_numpy(bool)
        values = {
            self.name: np.where(narrow, np.nan, em),
            "coherent": np.where(scored, limits.coherent(coherent), np.nan),
        }
        if narrow.any():
            values["narrow"] = np.where(narrow, em, np.nan)
        return Items(values, frame["question_id"].astype(str).tolist())
