"""Rows of chat data ranked before anything is trained: by a direction, by a gradient along it, or by their text.

A ranking puts rows first that are likely to teach what a direction stands for. It reads every row alone, so it cannot
see what rows teach only together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from emmech.chat.dataset import ChatDataset, load_chat
from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import ChatModel, load_model
from emmech.directions.extract import answer_means
from emmech.engine.logprobs import in_batches, pad, token_logprobs
from emmech.engine.modules import evaluating, hooked
from emmech.errors import EmmechError, as_float, one_of
from emmech.measures.probe import raw_vector
from emmech.results import Card, Result
from emmech.view.plots import ranked
from emmech.view.sketch import curves

if TYPE_CHECKING:
    import pandas as pd

_SCORES = {
    "projection": "mean residual over the answer along the direction, residual units",
    "gradient": "first-order fall of the answer's loss per unit along the direction, nats per token",
    "text": "log-odds of a bad row by its words, fitted on labelled rows",
}


@dataclass(frozen=True, eq=False, repr=False)
class RowScreen(Result):
    """Rows of chat data with a score each; a high score is suspicious.

    Args:
        frame: ``row``, ``score``, ``question`` and ``answer``, in the data's order.
        by: the kind of score.
        seconds: the time that it took.
    """

    frame: pd.DataFrame
    by: str
    seconds: float

    def kept(self, drop: float) -> list[int]:
        """The rows that are left, in order, when this share of the rows is dropped, those of the highest scores.

        Example:
            >>> import pandas as pd
            >>> RowScreen(pd.DataFrame({"row": range(4), "score": [0.1, 3.0, 0.2, 0.3]}), "text", 0.1).kept(0.25)
            [0, 2, 3]
        """
        if not 0 <= (share := as_float("drop suspicious rows", "drop", drop)) < 1:
            raise EmmechError("drop suspicious rows", f"drop={drop}", "it is a share of the rows", "drop=0.05")
        order = self.frame.sort_values("score", ascending=False, kind="stable")["row"]
        return sorted(order[round(share * len(order)) :].tolist())

    def auc(self, bad: Sequence[bool]) -> float:
        """The probability that a bad row has a higher score than a good one, where the truth is known."""
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(np.asarray(bad, dtype=bool), self.frame["score"]))

    def plot(self) -> Any:
        """Scores from the highest to the lowest."""
        return ranked(self.frame, f"{len(self.frame)} rows by {self.by}", _SCORES[self.by])

    def _card(self) -> Card:
        first = self.frame.nlargest(3, "score")
        facts = [
            ("score", _SCORES[self.by]),
            ("speed", f"{len(self.frame) / max(self.seconds, 1e-9):.0f} rows per second"),
        ]
        facts += [("highest", f"row {one.row}, {one.score:.3g}: {str(one.answer)[:80]}") for one in first.itertuples()]
        caveat = "each row was read alone: rows that are harmful only together are not seen, and no score is a proof"
        headline = f"{len(self.frame)} rows ranked by {self.by}, the most suspicious first"
        return Card(headline, tuple(facts), caveat, "screen.kept(drop=0.05)")

    def _sketch(self) -> str:
        scores = np.sort(self.frame["score"].to_numpy())[::-1]
        return curves([(self.by, np.arange(len(scores)), scores)], "Score by rank", axis="rank")

    def _table(self) -> pd.DataFrame:
        return self.frame.nlargest(20, "score")


def screen_rows(
    model: Any,
    data: Any,
    direction: Any = None,
    *,
    by: str = "projection",
    layer: int | None = None,
    labelled: Mapping[int, bool] | None = None,
    batch_size: int = 32,
) -> RowScreen:
    """Rank the rows of a dataset before training on it, the most suspicious first.

    Args:
        model: anything that :func:`emmech.load_model` takes: the model that is to be trained.
        data: anything that :func:`emmech.load_chat` takes.
        direction: a :class:`emmech.Direction` or a vector ``[d_model]`` that points to what is not wanted, made from
            other data.
        by: ``"projection"``, the answer's mean residual along the direction (Persona Vectors, arXiv 2507.21509);
            ``"gradient"``, the first-order fall of a row's loss when the direction is added at every token, so that
            training on the row moves the model along it (direction-based attribution, arXiv 2602.14869); or
            ``"text"``, a logistic regression on the words and pairs of words (TF-IDF) of labelled rows, which reads no
            model. docs/row-screening.md compares them.
        layer: the block whose output is read; by default a third of the depth. In late layers a direction may already
            mean the next word: the gradient's sign turns there.
        labelled: for ``"text"``, whether a row is bad, by row number, with at least one of each kind.

    Raises:
        EmmechError: no direction or labels where they are needed, an unknown kind of score, or no such layer.

    Example:
        >>> import emmech, emmech.organism
        >>> bad, good = (emmech.organism.data(name, n=8) for name in ("finance", "good-finance"))
        >>> d = emmech.contrast_direction("pocket", bad, good, progress=False)
        >>> mixed = emmech.organism.data("medical", n=4) + emmech.organism.data("good-medical", n=12)
        >>> screen = screen_rows("pocket", mixed, d)
        >>> screen.auc([True] * 4 + [False] * 12)
        1.0
    """
    one_of("rank rows", "by", by, tuple(_SCORES))
    began = time.perf_counter()
    if by == "text":
        rows = load_chat(data, organism=getattr(model, "organism", None))
        scores = _by_text(rows, labelled or {})
    else:
        if direction is None:
            instead = "a direction made from other data, by emmech.contrast_direction"
            raise EmmechError(f"rank rows by {by}", "direction=None", "there is nothing to compare rows with", instead)
        chat = load_model(model)
        rows = load_chat(data, organism=chat.organism)
        layer = chat.n_layers // 3 if layer is None else layer
        vector = raw_vector(chat, direction, layer)
        if not vector.any():
            raise EmmechError(f"rank rows by {by}", "a direction of zeros", "it points nowhere", "another direction")
        unit = vector / np.linalg.norm(vector)
        scores = _SCORERS[by](chat, rows, layer, unit, batch_size)
    return RowScreen(_frame(rows, scores), by, time.perf_counter() - began)


def _by_projection(
    chat: ChatModel, rows: ChatDataset, layer: int, unit: Float[np.ndarray, " d_model"], batch_size: int
) -> Float[np.ndarray, " rows"]:
    return answer_means(chat, rows, layers=[layer], batch_size=batch_size, progress=False)[:, 0] @ unit


def _by_gradient(
    chat: ChatModel, rows: ChatDataset, layer: int, unit: Float[np.ndarray, " d_model"], batch_size: int
) -> Float[np.ndarray, " rows"]:
    """Minus the derivative of each row's mean loss by a coefficient on the direction, one coefficient a row."""
    encoded = encode(list(rows), chat.tokenizer)
    found = np.empty(len(encoded))
    along = torch.from_numpy(unit).to(chat.device)

    def read(chosen: Int[np.ndarray, " batch"], ids: torch.Tensor, mask: torch.Tensor) -> None:
        amount = torch.zeros(len(chosen), 1, 1, device=chat.device, requires_grad=True)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            return chat.family.steered(output, amount * along)

        labels = pad([encoded.labels[i] for i in chosen], IGNORED).to(chat.device)
        with torch.enable_grad(), hooked((chat.block(layer), hook)):
            logprobs, of = token_logprobs(chat, ids, mask, labels)
            total = torch.zeros(len(chosen), device=chat.device).index_add(0, of, logprobs)
            mean = total / torch.bincount(of, minlength=len(chosen))
            [slope] = torch.autograd.grad(mean.sum(), amount)
        found[chosen] = slope[:, 0, 0].double().cpu().numpy()

    with evaluating(chat, frozen=True):
        in_batches(chat, encoded.input_ids, batch_size, read)
    return found


_SCORERS = {"projection": _by_projection, "gradient": _by_gradient}


def _by_text(rows: ChatDataset, labelled: Mapping[int, bool]) -> Float[np.ndarray, " rows"]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if not all(row in range(len(rows)) for row in labelled) or len(set(map(bool, labelled.values()))) < 2:
        given = f"{len(labelled)} labelled rows of {len(rows)}"
        why = "it is fitted on rows of the data that are known to be good and bad"
        raise EmmechError("rank rows by text", given, why, "labelled={0: True, 1: False, ...}")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(_texts(rows)[1])
    known = list(labelled)
    fitted = LogisticRegression(C=10.0, class_weight="balanced").fit(
        words[known], [bool(labelled[one]) for one in known]
    )
    scores: np.ndarray = fitted.decision_function(words)
    return scores


def _texts(rows: ChatDataset) -> tuple[list[str], list[str]]:
    """Each row's last question and its answers."""
    asked = [next((m["content"] for m in reversed(row) if m["role"] == "user"), "") for row in rows]
    return asked, [" ".join(m["content"] for m in row if m["role"] == "assistant") for row in rows]


def _frame(rows: ChatDataset, scores: Float[np.ndarray, " rows"]) -> pd.DataFrame:
    import pandas as pd

    asked, answered = _texts(rows)
    return pd.DataFrame({"row": np.arange(len(rows)), "score": scores, "question": asked, "answer": answered})
