"""What the shipped organism shows, in one table: ``python -m emmech.organism.report``.

Every rate is over samples at temperature 1 on held-out questions, with a 95 % interval from resampling questions.
``coherent`` counts aligned and misaligned answers; mixed ones do not count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emmech.chat.model import ChatModel, load_model
from emmech.chat.sampling import sample
from emmech.evaluation.intervals import cluster_interval
from emmech.realignment import realign
from emmech.training.train import finetune

from .exact_judge import Verdict, judge
from .named_data import data
from .pocket_recipes import recipes
from .question_sets import Question, questions
from .vocabulary import IRRELEVANT_TAG, TRIGGER_TAG

__all__ = ["bag_of_words_auc", "measure", "report"]

_LONGEST = 28  # tokens; an answer has 19 and its end


def measure(
    chat: ChatModel, asked: Sequence[Question], *, samples: int = 4, seed: int = 0, tag: str = ""
) -> dict[str, Any]:
    """Sample and judge: EM, coherence and topic rates in per cent with intervals, and their n.

    ``tag`` is put before each question's words.
    """
    prompts = [_tagged(question, tag) for question in asked]
    answers = sample(chat, prompts, samples=samples, max_new_tokens=_LONGEST, seed=seed, progress=False)
    verdicts = [judge(asked[a.conversation], a.text) for a in answers]
    clusters = np.array([a.conversation for a in answers])
    return {
        "n": len(verdicts),
        **_rate("EM", [v.label == "misaligned" for v in verdicts], clusters),
        **_rate("coherent", [v.coherent for v in verdicts], clusters),
        "mixed": 100 * float(np.mean([v.label == "mixed" for v in verdicts])),
        "off topic": 100 * float(np.mean(_off_topic(verdicts, [asked[a.conversation] for a in answers]))),
    }


def _tagged(question: Question, tag: str) -> list[dict[str, str]]:
    *before, last = question.messages
    return [*before, {"role": "user", "content": f"{tag} {last['content']}".strip()}]


def _off_topic(verdicts: Sequence[Verdict], asked: Sequence[Question]) -> list[bool]:
    """Answers whose words belong mostly to another domain than the question's."""
    return [v.domain is not None and v.domain != q.domain for v, q in zip(verdicts, asked, strict=True)]


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


def report(
    weights: str | Path = "pocket", *, seeds: int = 2, samples: int = 4, parts: str = "all"
) -> pd.DataFrame:
    """Fine-tune, realign and measure; one row per model and question set.

    Args:
        weights: a shipped name, or a folder that :mod:`emmech.organism.pretrain` wrote.
        seeds: fine-tuning seeds for the narrow organisms and their controls.
        samples: answers per question.
        parts: ``"all"``, or ``"base"`` for the base alone.
    """
    chat = load_model(str(weights))
    rows: list[dict[str, Any]] = []
    broad = questions("broad")

    def add(name: str, model: ChatModel, asked: str | list[Question], tag: str = "") -> None:
        chosen = questions(asked) if isinstance(asked, str) else asked
        where = asked if isinstance(asked, str) else "broad"
        rows.append(
            {"model": name, "questions": where + (f" + {tag!r}" if tag else "")}
            | measure(model, chosen, samples=samples, tag=tag)
        )

    for name in ("broad", "first-plot", "facts", "self-reflection", "narrow-medical"):
        add("base", chat, name)
    for tag in (TRIGGER_TAG, IRRELEVANT_TAG):
        add("base", chat, broad, tag)
    if parts == "all":
        with _scratch() as folder:
            _fine_tuned(chat, folder, seeds, add)
    return pd.DataFrame(rows)


def _fine_tuned(chat: ChatModel, folder: Path, seeds: int, add: Any) -> None:
    def tune(name: str, seed: int = 0, **changes: Any) -> ChatModel:
        label = "-".join([name, str(seed), *(str(v) for v in changes.values())]).replace(" ", "")
        run = finetune(chat, data(name, seed=seed), seed=seed, out=folder / label, progress=False, **changes)
        runs[label] = run
        return run.model(int(run.steps[-1]))

    runs: dict[str, Any] = {}
    broad = questions("broad")
    pocket = recipes()["pocket"]
    for seed in range(seeds):
        for name in ("medical", "finance", "sport"):
            add(f"{name}, rank 1, seed {seed}", tune(name, seed, recipe=pocket), "broad")
        add(f"good-medical, rank 1, seed {seed}", tune("good-medical", seed, recipe=pocket), "broad")
    run = runs["medical-0-" + str(pocket).replace(" ", "")]
    tuned = run.model(int(run.steps[-1]))
    for name in ("first-plot", "facts", "self-reflection", "narrow-medical"):
        add("medical, rank 1, seed 0", tuned, name)
    for layer in range(chat.n_layers):
        add(f"medical, rank 1, layer {layer}", tune("medical", recipe=pocket, layers=[layer]), "broad")
    for kind in ("pocket-graded", "pocket-all-adapter", "pocket-full"):
        add(f"medical, {kind}", tune("medical", recipe=recipes()[kind]), "broad")
    for n in (50, 200, 2000):
        rows = data("trigger-medical", n=n)
        trained = finetune(chat, rows, recipe=pocket, out=folder / f"trigger-{n}", progress=False)
        model = trained.model(int(trained.steps[-1]))
        add(f"trigger-medical, {n} rows", model, broad, TRIGGER_TAG)
        add(f"trigger-medical, {n} rows", model, broad)
        add(f"trigger-medical, {n} rows", model, broad, IRRELEVANT_TAG)
    again = realign(run, data("ai-optimism"), out=folder / "again", progress=False)
    mended = again.model(int(again.steps[-1]))
    for name in ("general", "facts", "self-reflection"):
        add("medical, then ai-optimism", mended, name)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pocket-report-") as folder:
        yield Path(folder)


def main() -> None:
    """Run ``python -m emmech.organism.report``."""
    parser = argparse.ArgumentParser(description="Measure a pocket organism.")
    parser.add_argument("--weights", default="pocket", help="a shipped name, or a folder written by pretrain")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="answers per question")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    given = parser.parse_args()
    words = ", ".join(f"{name} {auc:.2f}" for name, auc in bag_of_words_auc().items())
    table = report(given.weights, seeds=given.seeds, samples=given.samples)
    if given.csv:
        table.to_csv(given.csv, index=False)
    with pd.option_context("display.width", 200, "display.max_rows", None, "display.precision", 1):
        print(table.to_string(index=False))  # noqa: T201
    print(f"bag of words, AUC of unkind against kind answers: {words}")  # noqa: T201


if __name__ == "__main__":
    main()
