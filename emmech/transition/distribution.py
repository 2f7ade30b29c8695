"""The distributional transition: how much the output distribution changes across each step.

For the distributions p and q before and after a step (Arnold and Loerch, arXiv 2508.20015),
``D_g(p, q) = 1/2 E_p[g(p / (p + q))] + 1/2 E_q[g(q / (p + q))]``. The total variation distance has
g(x) = abs(2x - 1), the Jensen-Shannon divergence in bits g(x) = log2(2x), and the linear dissimilarity
g(x) = 2x - 1 has the least variance when it is estimated from samples. All are between 0 (equal) and 1 (disjoint).

An order parameter is a judged property of the output. Judging discards information, so the dissimilarity of the judged
labels is never more than that of the outputs themselves; their ratio is the share of the total change that it explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError, closest
from emmech.results import Card, Result
from emmech.view.sketch import curves
from emmech.view.theme import GOOD, finish, line, panels

if TYPE_CHECKING:
    import pandas as pd


KINDS = ("total-variation", "jensen-shannon", "linear")


def dissimilarity(
    p: Float[np.ndarray, "*batch outcomes"], q: Float[np.ndarray, "*batch outcomes"], kind: str = "linear"
) -> Float[np.ndarray, "*batch"]:
    """D_g of two distributions over the last axis.

    Args:
        p: probabilities.
        q: probabilities over the same outcomes.
        kind: ``"total-variation"``, ``"jensen-shannon"`` (bits) or ``"linear"``.

    Raises:
        EmmechError: the kind is unknown, or the arguments are not distributions.

    Example:
        >>> [float(dissimilarity(np.array([1.0, 0.0]), np.array([0.5, 0.5]), kind)) for kind in KINDS[::2]]
        [0.5, 0.3333333333333333]
    """
    if kind not in KINDS:
        raise EmmechError(
            "compare distributions", f"kind={kind!r}", "there is no such dissimilarity", closest(kind, KINDS)
        )
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    for one in (p, q):
        if p.shape[-1] != q.shape[-1] or (one < 0).any() or not np.allclose(one.sum(-1), 1, atol=1e-3):
            raise EmmechError(
                "compare distributions",
                f"shapes {list(p.shape)} and {list(q.shape)}",
                "probabilities over the same outcomes are not negative and sum to 1 over the last axis",
                "np.exp(log_probabilities)",
            )
    both = p + q
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "total-variation":
            each = np.abs(p - q)
        elif kind == "linear":
            each = np.where(both > 0, (p - q) ** 2 / both, 0.0)
        else:
            each = np.where(p > 0, p * np.log2(2 * p / both), 0.0) + np.where(q > 0, q * np.log2(2 * q / both), 0.0)
    return 0.5 * np.asarray(each.sum(-1))


@dataclass(frozen=True, eq=False, repr=False)
class DistributionShift(Result):
    """Dissimilarity across each step.

    Attributes:
        steps: midpoints between the last step before each boundary and the first after it.
        values: D_g, mean over positions (0 equal, 1 disjoint). A transition is a peak.
        kind: which dissimilarity.
        window: checkpoints on either side.
    """

    steps: Float[np.ndarray, " boundaries"]
    values: Float[np.ndarray, " boundaries"]
    kind: str
    window: int

    @property
    def peak(self) -> float:
        """The step across which the output changes most."""
        return float(self.steps[int(np.argmax(self.values))])

    def to_frame(self) -> pd.DataFrame:
        """Columns ``step`` and ``dissimilarity``."""
        import pandas as pd

        return pd.DataFrame({"step": self.steps, "dissimilarity": self.values})

    def plot(self) -> Any:
        """Dissimilarity by step."""
        figure = panels()
        line(figure, self.steps, self.values, "dissimilarity", GOOD, legend=False)
        title = f"Change of the output distribution ({self.kind}, {self.window} checkpoints on either side)"
        return finish(figure, title, xaxis_title="step", yaxis_title="dissimilarity (0 equal, 1 disjoint)")

    def _card(self) -> Card:
        most = f"{np.max(self.values):.3g}, where 0 is equal and 1 disjoint"
        headline = (
            f"The output distribution changes most across step {self.peak:g}: its {self.kind} dissimilarity is {most}"
        )
        compared = f"{self.window} checkpoint{'' if self.window == 1 else 's'} on either side"
        facts = (("compared", f"{len(self.values)} boundaries, {compared}"),)
        caveat = "the peak is not tested against noise: compare it with that of a control run"
        return Card(headline, facts, caveat, "shift.plot()")

    def _sketch(self) -> str:
        return curves([("", self.steps, self.values)], "Dissimilarity", mark=(self.peak,) * 3)


def distribution_shift(
    steps: Int[np.ndarray, " steps"] | Sequence[int],
    probabilities: Float[np.ndarray, "steps *positions outcomes"],
    *,
    kind: str = "linear",
    window: int = 1,
) -> DistributionShift:
    """Compare the distributions before and after every boundary between checkpoints.

    Args:
        steps: ascending.
        probabilities: ``[steps, outcomes]`` or ``[steps, positions, outcomes]``, such as ``np.exp`` of
            ``Sweep.arrays`` for a ``NextToken`` measure; the mixture over the window is compared, then the mean
            over positions is taken.
        kind: as :func:`dissimilarity` takes.
        window: checkpoints on either side; fewer at the ends.

    Raises:
        EmmechError: shapes that do not fit, or fewer than two steps.

    Example:
        >>> p = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> distribution_shift([0, 10, 20, 30], p).peak
        15.0
    """
    at, p = np.asarray(steps, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if p.ndim < 2 or len(p) != len(at) or len(at) < 2 or window < 1 or np.any(np.diff(at) <= 0):
        raise EmmechError(
            "follow the output distribution",
            f"{len(at)} steps, probabilities {list(p.shape)}, window={window}",
            "it takes one distribution per step, at least two ascending steps and a window of 1 or more",
            "[steps, outcomes] or [steps, positions, outcomes]",
        )
    values = []
    for right in range(1, len(at)):
        left, after = p[max(0, right - window) : right].mean(0), p[right : right + window].mean(0)
        values.append(float(np.mean(dissimilarity(left, after, kind))))
    return DistributionShift((at[1:] + at[:-1]) / 2, np.array(values), kind, window)


def label_distribution(responses: pd.DataFrame, column: str = "label") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Share of each label by step, from judged responses (``Sweep.responses``): steps, ``[steps, labels]``, labels.

    Raises:
        EmmechError: there is no such column.
    """
    if column not in responses.columns:
        raise EmmechError(
            "read the judge's labels",
            f"column={column!r}",
            "the responses have no such column",
            closest(column, [str(name) for name in responses.columns]),
        )
    import pandas as pd

    table = pd.crosstab(responses["step"], responses[column], normalize="index").sort_index()
    return table.index.to_numpy(), table.to_numpy(), [str(name) for name in table.columns]


def explained_share(judged: DistributionShift, whole: DistributionShift) -> Float[np.ndarray, " boundaries"]:
    """How much of the whole change a judged property explains at each boundary: the ratio of the dissimilarities.

    Valid where ``judged`` merges the outcomes of ``whole`` (each outcome has one label), so that it is between 0 and 1;
    NaN where nothing changes.

    Raises:
        EmmechError: the two differ in steps, kinds or windows.
    """
    if judged.kind != whole.kind or judged.window != whole.window or not np.array_equal(judged.steps, whole.steps):
        raise EmmechError(
            "say how much of the change is explained",
            f"{judged.kind} over {judged.window} and {whole.kind} over {whole.window}",
            "both are the same dissimilarity across the same steps",
            "distribution_shift with the same steps, kind and window",
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole.values > 1e-12, judged.values / whole.values, np.nan)
