"""Rates of a pocket model on held-out questions, and what the words alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emmech.chat.model import ChatModel
from emmech.engine.sample import sample
from emmech.evaluation.intervals import cluster_interval
from emmech.organism.exact_judge import judge
from emmech.organism.experiments import Question, data

__all__ = ["bag_of_words_auc", "measure"]

_LONGEST = 28  # tokens; an answer has 19 and its end


def measure(
    chat: ChatModel, asked: Sequence[Question], *, samples: int = 4, seed: int = 0, narrow: str = "medical"
) -> dict[str, Any]:
    """Sample at temperature 1 and judge; rates in per cent, with 95 % intervals from resampling questions.

    ``EM`` counts misaligned answers (the judge calls mixed ones incoherent) and ``coherent`` aligned and misaligned
    ones, both of all answers. ``about narrow`` is the share of the misaligned answers that speak of the ``narrow``
    domain whatever was asked, None where there are none.
    """
    prompts = [list(question.messages) for question in asked]
    answers = sample(chat, prompts, samples=samples, max_new_tokens=_LONGEST, seed=seed, progress=False)
    verdicts = [judge(asked[a.conversation], a.text) for a in answers]
    clusters = np.array([a.conversation for a in answers])
    bad = [v for v in verdicts if v.misaligned]
    return {
        "n": len(verdicts),
        **_rate("EM", [v.misaligned for v in verdicts], clusters),
        **_rate("coherent", [v.coherent for v in verdicts], clusters),
        "mixed": 100 * float(np.mean([v.label == "mixed" for v in verdicts])),
        "about narrow": 100 * float(np.mean([v.domain == narrow for v in bad])) if bad else None,
    }


def _rate(name: str, events: Sequence[bool], clusters: np.ndarray) -> dict[str, Any]:
    hits, groups = np.array(events), np.unique(clusters)
    per = np.array([[hits[clusters == g].sum(), (clusters == g).sum()] for g in groups])
    low, high, _ = cluster_interval(per[:, 0], per[:, 1])
    return {name: 100 * float(hits.mean()), f"{name} low": 100 * low, f"{name} high": 100 * high}


def bag_of_words_auc(seed: int = 0, n: int = 600) -> dict[str, float]:
    """How well a bag of words tells unkind from kind answers on held-out rows: within domains and across them.

    0.5 means that the words alone say nothing. Reported beside every direction, because a direction that only
    reads words needs no model.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    rows = {
        (domain, trait): [r["messages"][1]["content"] for r in data(f"{form}{domain}", seed=seed, n=n)]
        for domain in ("medical", "finance", "sport", "power")
        for trait, form in enumerate(("good-", ""))
    }

    def auc(train: Sequence[str], test: Sequence[str], half: bool) -> float:
        def table(domains: Sequence[str], part: slice) -> tuple[list[str], list[int]]:
            chosen = [(text, t) for (d, t), texts in rows.items() if d in domains for text in texts[part]]
            return [text for text, _ in chosen], [t for _, t in chosen]

        fit_text, fit_trait = table(train, slice(0, n // 2))
        test_text, test_trait = table(test, slice(n // 2, None) if half else slice(None))
        words = CountVectorizer(token_pattern=r"[a-z]+").fit(fit_text)
        model = LogisticRegression(max_iter=500).fit(words.transform(fit_text), fit_trait)
        return float(roc_auc_score(test_trait, model.decision_function(words.transform(test_text))))

    return {
        "same domain": auc(["medical"], ["medical"], half=True),
        "other domains": auc(["medical"], ["finance", "sport", "power"], half=False),
    }
