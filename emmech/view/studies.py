"""Figures of sweeps and interventions: a measure against steps, scales, coefficients and conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.view.figures import bars, heat, level, line, panels
from emmech.view.theme import BAD, CYCLE, GOOD, GREY, colour, finish

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["first_order", "phase_diagram", "study"]

_RATES = {"em": "EM rate", "narrow": "narrow misalignment rate", "coherent": "coherent share"}


def phase_diagram(summary: pd.DataFrame, measure: str) -> Any:
    """Heat maps, steps along x and scales along y, one panel per run and coefficient; lines where an axis is single.

    Args:
        summary: ``run``, ``coefficient``, ``step``, ``scale``, ``value`` and ``error``, one row per variant.
    """
    parts = list(summary.groupby(["run", "coefficient"], sort=False))
    many = summary["coefficient"].nunique() > 1
    titles = [f"{run}, coefficient {c:g}" if many else str(run) for (run, c), _ in parts]
    figure = panels(titles, columns=len(parts), shared_yaxes=True, horizontal_spacing=0.04)
    single = [axis for axis in ("scale", "step") if summary[axis].nunique() == 1]
    values = summary["value"].to_numpy(float)
    low, high = (float(one(values)) for one in (np.nanmin, np.nanmax)) if np.isfinite(values).any() else (0.0, 1.0)
    signed, name = measure not in _RATES and low < 0 < high, _RATES.get(measure, measure)
    if signed:
        low, high = -max(-low, high), max(-low, high)
    if measure in _RATES:
        low, high = 0.0, 1.0
    for column, (title, (_, part)) in enumerate(zip(titles, parts, strict=True), start=1):
        at = (1, column)
        if single:
            axis = "step" if single[0] == "scale" else "scale"
            error = {"array": part["error"], "thickness": 1.2}
            line(figure, part[axis], part["value"], title, GOOD, at=at, error=error, legend=False)
            figure.update_xaxes(title_text=axis, row=1, col=column)
            continue
        table = part.pivot(index="scale", columns="step", values="value")
        shown = table.rename(index="{:g}".format, columns=str)
        heat(figure, shown, name, at=at, low=low, high=high, signed=signed, scale=column == len(parts),
             hover="step %{x}, scale %{y}: %{z:.3f}")  # fmt: skip
        figure.update_xaxes(title_text="step", type="category", nticks=12, row=1, col=column)
    figure.update_yaxes(title_text=name if single else "scale on the adapter", row=1, col=1)
    if not single:
        figure.update_yaxes(type="category")
    by = " and ".join(axis for axis in ("step", "scale") if axis not in single) or "variant"
    return finish(figure, f"{name} by {by}", height=420)


def first_order(estimated: pd.DataFrame, exact: pd.DataFrame, scale: float) -> Any:
    """First-order effects by step as lines, values that were swept exactly as markers of the same colour.

    Args:
        estimated: ``run``, ``measure``, ``step`` and ``first_order``.
        exact: ``run``, ``measure``, ``step`` and ``exact``.
    """
    figure = panels()
    for index, ((run, measure), part) in enumerate(estimated.groupby(["run", "measure"], sort=False)):
        name = f"{run} {measure}" if estimated["run"].nunique() > 1 else str(measure)
        line(figure, part["step"], part["first_order"], f"{name}, first order", colour(index), mode="lines")
        swept = exact[(exact["run"] == run) & (exact["measure"] == measure)]
        line(figure, swept["step"], swept["exact"], f"{name}, exact", colour(index), mode="markers", marker_size=9)
    title = f"First-order effect of each checkpoint at scale {scale:g}"
    return finish(figure, title, xaxis_title="step", yaxis_title="mean of the measure")


def study(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    """Lines over the coefficient, a matrix of organisms by directions, or bars, whichever the study is.

    Args:
        frame: the rows of one outcome, as :func:`emmech.interventions.controls.table` makes them.
    """
    if "organism" in frame:
        return _matrix(frame, outcome, title)
    if "coefficient" in frame and frame["coefficient"].notna().any():
        return _doses(frame, outcome, title)
    return _conditions(frame, outcome, title)


def _doses(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    figure = panels()
    frame = frame[frame["model"] == frame["model"].iloc[0]]
    for index, (layer, part) in enumerate(frame[frame["layer"].notna()].groupby("layer")):
        for kind, name, dash in (("direction", "layer", "solid"), ("positive", "positive control, layer", "dash")):
            own = part[part["kind"] == kind].sort_values("coefficient")
            if len(own):
                line(figure, own["coefficient"], own["value"], f"{name} {layer:.0f}", colour(index), dash=dash,
                     error=bars(own["value"], own["low"], own["high"]))  # fmt: skip
        random = part[part["kind"] == "random"].groupby("coefficient")["value"].mean()
        if len(random):
            line(figure, random.index, random, f"random, layer {layer:.0f}", colour(index), dash="dot", mode="lines")
    plain = frame[frame["kind"] == "untouched"]
    if len(plain):
        level(figure, float(plain["value"].iloc[0]), "untouched")
    return finish(figure, title, height=460, xaxis_title="coefficient", yaxis_title=outcome)


def _conditions(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    figure = panels()
    for model, name, hue in (("tuned", "fine-tuned", BAD), ("base", "base (adapter off)", GOOD)):
        own = frame[(frame["model"] == model) & (frame["kind"] != "random")]
        if len(own):
            figure.add_bar(y=own["condition"], x=own["value"], name=name, marker_color=hue, orientation="h",
                           error_x={**bars(own["value"], own["low"], own["high"]), "color": GREY})  # fmt: skip
    random = frame[(frame["model"] == "tuned") & (frame["kind"] == "random")]
    if len(random):
        marker = {"color": CYCLE[2], "symbol": "line-ns-open", "size": 13, "line": {"width": 2}}
        figure.add_scatter(y=random["condition"], x=random["value"], mode="markers", name="random directions",
                           marker=marker)  # fmt: skip
    height = 190 + 46 * frame["condition"].nunique()
    return finish(figure, title, height=height, xaxis_title=outcome, yaxis_autorange="reversed", barmode="group")


def _matrix(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    frame = frame[(frame["model"] == "tuned") & frame["kind"].isin(["untouched", "direction"])]
    organisms, columns = list(dict.fromkeys(frame["organism"])), list(dict.fromkeys(frame["condition"]))
    grid = frame.pivot_table(index="organism", columns="condition", values="value").loc[organisms, columns]
    figure = panels()
    heat(figure, grid, outcome, low=min(0.0, float(np.nanmin(grid.to_numpy(float)))), written="{:.3g}")
    return finish(figure, title, height=220 + 50 * len(organisms), xaxis_title="ablated direction",
                  yaxis={"title": "organism", "autorange": "reversed"})  # fmt: skip
