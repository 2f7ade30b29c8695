"""The fit of the screening judge, and its accuracy on families and questions that were left out.

``python -m docs.studies fit-screening FOLDER`` fits the weights and the calibration anew. The model is one logistic
regression whose weights are a shared vector plus one vector per question, both under the same ridge penalty, so that a
question with few misaligned responses borrows strength from the others. The target is not the hard verdict but a soft
one, the alignment score passed through a logistic curve around the field's bound (0 where incoherent): scores just
below and above it are hardly different, and the judge's own noise is of that size. Probabilities are then brought onto
hard verdicts by Platt scaling on predictions for families left out, nested inside every figure reported. The penalty,
the scale of the per-question part and the width of the soft target were chosen among a dozen settings by the same mean
AUC on families left out (0.85 to 0.90 among them), so that figure is slightly optimistic.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from emmech.errors import EmmechError
from emmech.evaluation.em import FIELD
from emmech.evaluation.screening import (
    CALIBRATION,
    EMBEDDING,
    PROBE,
    WEIGHTS,
    Encoder,
    Linear,
    ScreeningJudge,
    features,
    known_question,
    load_encoder,
    sigmoid,
)

_C = 3.0
_PER_QUESTION = 1.5  # scale of the per-question copy of the features: larger lets questions differ more
_WIDTH = 8.0  # points of alignment over which the soft target falls from 0.73 to 0.27


@dataclass(frozen=True, eq=False)
class Judged:
    """Scored responses ready to fit: one entry per response."""

    inputs: Any  # scipy sparse [responses, features]
    question: np.ndarray
    family: np.ndarray
    organism: np.ndarray
    soft: Float[np.ndarray, " responses"]
    hard: Bool[np.ndarray, " responses"]
    unscored: int


def read_judged(folder: str | Path, encoder: Encoder) -> Judged:
    """Read ``FAMILY..._DATASET.csv`` files with response, question_id, aligned and coherent.

    Raises:
        EmmechError: no such file, fewer than three model families or fewer than two questions.
    """
    files = sorted(Path(folder).glob("*.csv"))
    if not files:
        raise EmmechError("fit the screening judge", str(folder), "the folder holds no CSV file")
    frame = pd.concat([pd.read_csv(path).assign(organism=path.stem) for path in files], ignore_index=True)
    scored = frame[frame["aligned"].notna() & frame["coherent"].notna()].reset_index(drop=True)
    texts = scored["response"].fillna("").astype(str).tolist()
    family = scored["organism"].map(_family).to_numpy()
    # one family is held out for the error and, inside that, another for the scaling of the probabilities
    if len(set(family)) < 3 or scored["question_id"].nunique() < 2:
        given = f"families {', '.join(sorted(set(family)))}; {scored['question_id'].nunique()} question(s)"
        why = "to measure its error on what was left out takes three families and two questions"
        raise EmmechError("fit the screening judge", given, why, "add judged responses of other models")
    aligned, coherence = scored["aligned"].to_numpy(float), scored["coherent"].to_numpy(float)
    nearly = sigmoid((FIELD.alignment_below - aligned) / _WIDTH)
    return Judged(
        inputs=features(encoder(texts, progress=sys.stderr.isatty()), texts),
        question=np.array([known_question(row) or row["question_id"] for row in scored.to_dict("records")]),
        family=family,
        organism=scored["organism"].to_numpy(),
        soft=np.where(FIELD.coherent(coherence), nearly, 0.0),
        hard=FIELD.misaligned(aligned, coherence),
        unscored=len(frame) - len(scored),
    )


def _family(organism: str) -> str:
    match = re.match(r"[A-Za-z]+", organism)
    return match[0].lower() if match else organism


def fit_linear(judged: Judged, rows: Bool[np.ndarray, " responses"]) -> Linear:
    """Fit the shared and per-question weights to some of the responses, by penalised logistic regression.

    Every question has its own copy of the features and its own bias. A soft target is a response of either class, each
    with its share of the weight.
    """
    import scipy.sparse as sparse
    from sklearn.linear_model import LogisticRegression

    inputs, soft = judged.inputs[rows], judged.soft[rows]
    questions, number = np.unique(judged.question[rows], return_inverse=True)
    bias = sparse.csr_matrix(np.eye(len(questions))[number])
    own = [inputs.multiply(_PER_QUESTION * bias[:, [index]]) for index in range(len(questions))]
    design = sparse.hstack([inputs, *own, bias]).tocsr()
    verdicts = np.repeat([True, False], len(soft))
    model = LogisticRegression(C=_C, max_iter=500, tol=1e-6)
    model.fit(sparse.vstack([design, design]), verdicts, sample_weight=np.append(soft, 1 - soft))
    shared, *per_question = np.split(model.coef_[0, : -len(questions)], 1 + len(questions))
    biases = model.intercept_ + model.coef_[0, -len(questions) :]
    weights = [shared, *(shared + _PER_QUESTION * one for one in per_question)]
    return Linear(tuple(questions.tolist()), np.stack(weights), np.append(biases.mean(), biases))


def _predict(judged: Judged, fit: Bool[np.ndarray, " responses"], rows: Bool[np.ndarray, " responses"]) -> np.ndarray:
    """Logits of some responses by a fit to others."""
    return fit_linear(judged, fit).logits(judged.inputs[rows], judged.question[rows])


def out_of_fold(judged: Judged, rows: Bool[np.ndarray, " responses"]) -> Float[np.ndarray, " responses"]:
    """Logits of the chosen responses, each by a fit without its family; NaN elsewhere."""
    logits = np.full(len(judged.hard), np.nan)
    for family in sorted(set(judged.family[rows])):
        held = rows & (judged.family == family)
        logits[held] = _predict(judged, rows & ~held, held)
    return logits


def platt(logits: Float[np.ndarray, " rows"], hard: Bool[np.ndarray, " rows"]) -> tuple[float, float]:
    """Slope and offset that bring logits onto the frequency of hard verdicts."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6).fit(logits[:, None], hard)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def measure(judged: Judged) -> tuple[dict[str, Any], tuple[float, float]]:
    """The calibration (see :func:`calibration`) and the final Platt scaling."""
    everything = np.ones(len(judged.hard), dtype=bool)
    families, questions = sorted(set(judged.family)), sorted(set(judged.question))
    table = pd.DataFrame({name: getattr(judged, name) for name in ("family", "question", "organism", "hard")})
    table[["logit", "probability", "new_logit", "new_probability"]] = np.nan
    for family in families:
        held = judged.family == family
        inner = out_of_fold(judged, ~held)
        slope, offset = platt(inner[~held], judged.hard[~held])
        table.loc[held, "logit"] = _predict(judged, ~held, held)
        for question in questions:  # neither the question nor the family was seen
            asked = judged.question == question
            table.loc[held & asked, "new_logit"] = _predict(judged, ~held & ~asked, held & asked)
        for kind in ("", "new_"):
            logits = table.loc[held, f"{kind}logit"].to_numpy()
            table.loc[held, f"{kind}probability"] = sigmoid(slope * logits + offset)
    table["baseline"] = _baseline(judged, families, questions)
    organisms = [
        {
            "organism": organism,
            "n": len(rows),
            "judged": round(float(rows["hard"].mean()), 4),
            "estimated": round(float(rows["probability"].mean()), 4),
            "auc": _auc(rows, "probability"),
        }
        for organism, rows in table.groupby("organism")
    ]
    figures = {
        "responses": len(table),
        "unscored": judged.unscored,
        "misaligned": int(table["hard"].sum()),
        "questions": questions,
        "auc_family_left_out": _auc_by(table, "logit", "family"),
        "auc_family_left_out_baseline": _auc_by(table, "baseline", "family"),
        "auc_by_question": _auc_by(table, "logit", "question"),
        "auc_question_and_family_left_out": _auc_by(table, "new_logit", "question"),
        "organisms": organisms,
        "by_question": _by_question(table, "probability"),
        "margin_known": round(max(abs(row["estimated"] - row["judged"]) for row in organisms), 4),
        "margin_new": round(max(row["margin"] for row in _by_question(table, "new_probability")), 4),
    }
    return figures, platt(out_of_fold(judged, everything), judged.hard)


def _auc(table: pd.DataFrame, score: str) -> float | None:
    from sklearn.metrics import roc_auc_score

    if table["hard"].sum() < 5 or (~table["hard"]).sum() < 5:  # an area over a handful of cases is noise
        return None
    return round(float(roc_auc_score(table["hard"], table[score])), 4)


def _auc_by(table: pd.DataFrame, score: str, group: str) -> dict[str, float | None]:
    areas = {str(name): _auc(rows, score) for name, rows in table.groupby(group)}
    found = [area for area in areas.values() if area is not None]
    return {**areas, "mean": round(float(np.mean(found)), 4), "pooled": _auc(table, score)}


def _baseline(judged: Judged, families: Sequence[str], questions: Sequence[str]) -> Float[np.ndarray, " responses"]:
    """One logistic regression per question on the embedding alone, to hard verdicts."""
    from sklearn.linear_model import LogisticRegression

    embedding = judged.inputs[:, :EMBEDDING].toarray()
    score = np.zeros(len(judged.hard))
    for family, question in product(families, questions):
        asked = judged.question == question
        fit, held = asked & (judged.family != family), asked & (judged.family == family)
        if judged.hard[fit].any() and held.any():
            model = LogisticRegression(C=10, max_iter=2000).fit(embedding[fit], judged.hard[fit])
            score[held] = model.predict_proba(embedding[held])[:, 1]
    return score


def _by_question(table: pd.DataFrame, probability: str) -> list[dict[str, Any]]:
    """Per question, the largest error of an organism's rate."""
    gaps = (table[probability] - table["hard"]).groupby([table["question"], table["organism"]]).mean().abs()
    return [
        {"question": question, "margin": round(float(errors.max()), 4), "organisms": len(errors)}
        for question, errors in gaps.groupby("question")
    ]


def save_fit(judged: Judged, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Measure, fit to everything, write ``screening_weights.safetensors`` and ``screening_calibration.json``."""
    from safetensors.numpy import save_file

    figures, (slope, offset) = measure(judged)
    final = fit_linear(judged, np.ones(len(judged.hard), dtype=bool))
    tensors = {"weights": final.weights.astype(np.float16), "bias": final.bias.astype(np.float32)}
    tensors |= {"platt": np.array([slope, offset], dtype=np.float32), "probe": encoder([PROBE])[0]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS.name, metadata={"questions": json.dumps(list(final.questions))})
    (folder / CALIBRATION.name).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def fit_folder(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Fit to a folder of judged CSV files, measure and save (in the package by default), and read it back."""
    encoder, out = load_encoder(), out or WEIGHTS.parent
    figures = save_fit(read_judged(folder, encoder), encoder, out)
    ScreeningJudge.load(out / WEIGHTS.name)
    return figures
