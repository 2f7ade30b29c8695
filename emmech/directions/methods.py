"""Ways to make a direction out of activations. Plain arrays in, plain arrays out: write your own beside them.

Every function returns ``[layers, d_model]`` in residual units, pointing from aligned to misaligned, so that a steering
coefficient of 1 moves an activation by the difference that the method found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from emmech.directions.arrays import unit_rows
from emmech.errors import EmmechError

__all__ = [
    "adapter_write",
    "differences_of_four",
    "logistic_probe",
    "mean_difference",
    "pca_of_differences",
    "probe_auc",
]

Vectors = Float[np.ndarray, "layers d_model"]


def mean_difference(misaligned: Vectors, aligned: Vectors) -> Vectors:
    """Mean residual of misaligned answers minus that of aligned ones.

    The method of Convergent Linear Representations of EM (arXiv 2506.11618).
    The same function on two system prompts is a persona vector (Persona Vectors, arXiv 2507.21509), and on two models
    with the same text a model difference.

    Example:
        >>> mean_difference(np.array([[2.0, 1.0]]), np.array([[1.0, 1.0]])).tolist()
        [[1.0, 0.0]]
    """
    return np.asarray(misaligned, dtype=np.float64) - np.asarray(aligned, dtype=np.float64)


def differences_of_four(means: Float[np.ndarray, "model text layers d_model"]) -> Mapping[str, Vectors]:
    """The 2 x 2 of model (aligned, fine-tuned) by text (aligned, misaligned), taken apart.

    Args:
        means: ``[2, 2, layers, d_model]``, ``means[1, 0]`` is the fine-tuned model reading aligned text.

    Returns:
        ``text/aligned model``, ``text/tuned model``: misaligned minus aligned text in one model;
        ``model/aligned text``, ``model/misaligned text``: fine-tuned minus aligned model on one text;
        ``text``, ``model``: their averages; ``both``: fine-tuned on misaligned minus aligned on aligned
        (``both = text + model``); ``interaction``: what the fine-tuned model makes more of misaligned text.
    """
    four = np.asarray(means, dtype=np.float64)
    if four.ndim != 4 or four.shape[:2] != (2, 2):
        raise EmmechError(
            "take the 2 x 2 apart",
            f"means {list(four.shape)}",
            "it has the axes model, text, layer and width",
            "[2, 2, layers, d_model]",
        )
    (aa, am), (ta, tm) = four
    return {
        "text/aligned model": am - aa,
        "text/tuned model": tm - ta,
        "model/aligned text": ta - aa,
        "model/misaligned text": tm - am,
        "text": (am - aa + tm - ta) / 2,
        "model": (ta - aa + tm - am) / 2,
        "both": tm - aa,
        "interaction": (tm - ta) - (am - aa),
    }


def pca_of_differences(
    tuned: Float[np.ndarray, "answers layers d_model"],
    base: Float[np.ndarray, "answers layers d_model"],
    *,
    components: int = 1,
    centre: bool = False,
) -> Float[np.ndarray, "components layers d_model"]:
    """Principal components of the fine-tuned model's activations minus the base's on the same answers.

    As in Concept Ablation Fine-Tuning (arXiv 2507.16795). Each component has the norm of its root-mean-square
    projection and points to the side of the mean difference.

    Args:
        centre: subtract the mean difference first. The shift that all answers share is then lost, which is the very
            thing a fine-tune of one trait makes: off by default.
    """
    difference = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    answers = len(difference)
    if difference.ndim != 3 or answers <= components:
        raise EmmechError(
            "find principal components",
            f"differences {list(difference.shape)}, components={components}",
            "there must be more answers than components",
            "[answers, layers, d_model] with more answers",
        )
    mean = difference.mean(0)
    found = np.empty((components, *mean.shape))
    for layer in range(mean.shape[0]):
        rows = difference[:, layer] - (mean[layer] if centre else 0.0)
        _, singular, right = np.linalg.svd(rows, full_matrices=False)
        top = right[:components] * (singular[:components, None] / answers**0.5)
        signs = np.where(top @ mean[layer] < 0, -1.0, 1.0)
        found[:, layer] = top * signs[:, None]
    return found


def logistic_probe(
    features: Float[np.ndarray, "answers layers d_model"],
    misaligned: Bool[np.ndarray, " answers"],
    *,
    penalty: float = 1.0,
) -> Vectors:
    """The direction that tells the classes apart best, by L2-regularised logistic regression at each layer.

    Its norm is the gap between the classes along it. A probe points where the classes separate, a mean difference
    where they differ: with correlated features the two are not the same, and probes steer worse.

    Args:
        features: one mean residual per answer.
        penalty: strength of the L2 penalty on the weights of standardised features; larger is smoother.
    """
    features, labels = _features(features, misaligned)
    found = np.zeros(features.shape[1:])
    for layer in range(features.shape[1]):
        x = features[:, layer]
        spread = _spread(x)
        weights = _logistic(penalty).fit((x - x.mean(0)) / spread, labels).coef_[0] / spread
        unit = unit_rows(weights)
        found[layer] = unit * (unit @ (x[labels].mean(0) - x[~labels].mean(0)))
    return found


def probe_auc(
    features: Float[np.ndarray, "answers layers d_model"],
    misaligned: Bool[np.ndarray, " answers"],
    questions: Shaped[np.ndarray, " answers"],
    *,
    penalty: float = 1.0,
    folds: int = 5,
) -> Float[np.ndarray, " layers"]:
    """Area under the ROC curve of a logistic probe on questions it was not fitted on, by layer; 0.5 is chance.

    Answers to one question resemble each other, so folds never split a question.
    """
    features, labels = _features(features, misaligned)
    return np.array(
        [held_out_auc(features[:, layer], labels, questions, penalty=penalty, folds=folds)
         for layer in range(features.shape[1])]
    )  # fmt: skip


def held_out_auc(
    x: Float[np.ndarray, "answers features"],
    labels: Bool[np.ndarray, " answers"],
    questions: Shaped[np.ndarray, " answers"],
    *,
    penalty: float = 1.0,
    folds: int = 5,
) -> float:
    """AUC of logistic regression, each question scored by a fit on the others; NaN when that cannot be done."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    groups = np.unique(questions, return_inverse=True)[1]
    folds = min(folds, int(groups.max()) + 1, int(labels.sum()), int((~labels).sum()))
    if folds < 2:
        return float("nan")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    values, weights = [], []
    for train, test in splitter.split(x, labels, groups):
        # within a fold: scores of different fits are not on one scale
        if len(set(labels[train])) < 2 or len(set(labels[test])) < 2:
            continue
        mean, spread = x[train].mean(0), _spread(x[train])
        model = _logistic(penalty).fit((x[train] - mean) / spread, labels[train])
        values.append(roc_auc_score(labels[test], model.decision_function((x[test] - mean) / spread)))
        weights.append(len(test))
    return float(np.average(values, weights=weights)) if values else float("nan")


def adapter_write(
    a: Float[np.ndarray, "rank d_in"], b: Float[np.ndarray, "d_out rank"], scaling: float
) -> Float[np.ndarray, " d_out"]:
    """What an adapter writes into the residual stream: ``scaling * B`` at rank 1.

    At higher rank, the top left singular vector of the update ``B A``, with the update's top singular value times the
    scaling as its norm, and the sign of the sum of B's columns. The sign of a write is otherwise arbitrary: it is that
    of A·x, token by token.
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=np.float64)), np.asarray(b, dtype=np.float64)
    b = b[:, None] if b.ndim == 1 else b
    if b.shape[1] == 1:
        return scaling * b[:, 0]
    # through the small factors: the update itself is d_out x d_in
    q, r = np.linalg.qr(b)
    left, singular, _ = np.linalg.svd(r @ a, full_matrices=False)
    vector = q @ left[:, 0] * singular[0] * scaling
    return vector if vector @ b.sum(1) >= 0 else -vector


def _logistic(penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0 / penalty, max_iter=2000, class_weight="balanced")


def _spread(x: np.ndarray) -> np.ndarray:
    spread = x.std(0)
    return np.where(spread > 0, spread, 1.0)


def _features(features: np.ndarray, misaligned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, labels = np.asarray(features, dtype=np.float64), np.asarray(misaligned, dtype=bool)
    if x.ndim != 3 or labels.shape != x.shape[:1] or labels.all() or not labels.any():
        raise EmmechError(
            "fit a probe",
            f"features {list(x.shape)}, labels {list(labels.shape)} with {int(labels.sum())} misaligned",
            "it needs [answers, layers, d_model] and one label per answer, of both classes",
            "answer_means(...) of both kinds of answers",
        )
    return x, labels
