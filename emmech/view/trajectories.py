"""Figures over training steps: one panel per quantity, one colour per quantity or run, the control dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from emmech.errors import EmmechError
from emmech.view.figures import Place, band, bars, level, line, mark, panels
from emmech.view.theme import BAD, GREY, colour, finish

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Curve", "by_panel", "metrics_by_step", "rates_by_step", "transition"]


class Curve(NamedTuple):
    """One line: the panel it is drawn in, whose it is, what it shows, and its points."""

    panel: str
    run: str
    label: str
    x: Any
    y: Any


Axes = tuple[str, str, str]  # a panel's title and its axes' titles
TRANSITION: dict[str, Axes] = {
    "cosine": ("Local cosine (-1 straight, +1 reversal; grey: straight)", "step", "c_k"),
    "components": ("Principal components of B", "PC1", "PC2"),
    "norm": ("Norm of B", "step", "||B||"),
    "gradient": ("Gradient norm before clipping", "step", "gradient norm"),
    "margin": ("Misaligned over aligned answers", "step", "nats per token"),
    "comp": ("Similarity to the last step", "step", "comp score"),
}


def by_panel(
    curves: Sequence[Curve], axes: Mapping[str, Axes], title: str, *, columns: int = 2, height: int = 300
) -> tuple[Any, dict[str, Place]]:
    """Draw curves into the panels that have any, in the order of ``axes``.

    A panel's curves differ in colour by label where it has several labels, else by run; every run but the first is
    dashed. The legend names the labels once and, where labels have the colours, leaves the runs to the title.

    Returns:
        the figure, and the row and column of every panel.
    """
    shown = [name for name in axes if any(curve.panel == name for curve in curves)]
    runs = list(dict.fromkeys(curve.run for curve in curves))
    figure = panels([axes[name][0] for name in shown], columns=columns, horizontal_spacing=0.1)
    place = {name: (1 + index // columns, 1 + index % columns) for index, name in enumerate(shown)}
    several = {name: len({curve.label for curve in curves if curve.panel == name}) > 1 for name in shown}
    named: set[str] = set()
    for curve in curves:
        labels = list(dict.fromkeys(one.label for one in curves if one.panel == curve.panel))
        at_run, split = runs.index(curve.run), several[curve.panel]
        role = "run" if at_run == 0 else "control" if len(runs) == 2 else curve.run
        entry = curve.label if split else curve.run
        name = curve.label if split and at_run == 0 else f"{curve.label}, {role}"
        in_legend = entry not in named and (at_run == 0 if split else not any(several.values()) and len(runs) > 1)
        if in_legend:
            named.add(entry)
        dash, hover = "dash" if at_run else "solid", f"{curve.run}, {curve.label}<br>%{{x}}: %{{y:.4g}}"
        hue = colour(labels.index(curve.label) if split else at_run)
        line(
            figure, curve.x, curve.y, entry if in_legend else name, hue, at=place[curve.panel], legend=in_legend,
            dash=dash, legendgroup=entry, hover=hover,
        )  # fmt: skip
    for name, (row, column) in place.items():
        figure.update_xaxes(title_text=axes[name][1], row=row, col=column)
        figure.update_yaxes(title_text=axes[name][2], row=row, col=column)
    return finish(figure, title, height=height * -(-len(shown) // columns) + 120), place


def transition(
    curves: Sequence[Curve],
    title: str,
    *,
    explained: Any = (),
    straight: tuple[Any, Any, Any, str] | None = None,
    turns: Sequence[tuple[float, float, str]] = (),
    step: tuple[float, float, float] | None = None,
) -> Any:
    """The panels of a phase transition.

    Args:
        explained: shares of variance of the run's two principal components.
        straight: steps, low, high and name of what a straight path would give.
        turns: ``(PC1, PC2, name)`` of the step at which each run turns.
        step: the mechanistic step with its interval, marked in every panel over steps.
    """
    figure, place = by_panel(curves, TRANSITION, title)
    if straight is not None:
        band(figure, *straight, at=place["cosine"])
        figure.data[-1].showlegend = False
        figure.data = (figure.data[-1], *figure.data[:-1])  # below the curves
    if "components" in place and len(explained) > 1:
        where = dict(zip(("row", "col"), place["components"], strict=True))
        figure.update_xaxes(title_text=f"PC1 ({explained[0]:.0%})", **where)
        figure.update_yaxes(title_text=f"PC2 ({explained[1]:.0%})", **where)
    for index, (x, y, name) in enumerate(turns):
        line(figure, [x], [y], name, (BAD, GREY)[index % 2], at=place["components"], mode="markers", legend=False,
             marker_size=11, hover=name)  # fmt: skip
    if step is not None:
        for at in (at for panel, at in place.items() if panel != "components"):
            mark(figure, step[0], BAD, low=step[1], high=step[2], at=at)
    return figure


def metrics_by_step(
    metrics: Mapping[str, pd.DataFrame], columns: Mapping[str, str], title: str = "", *, zero: Sequence[str] = ()
) -> Any:
    """Metrics by step, one panel per metric, one line per run.

    Args:
        metrics: by the run's name in the legend; indexed by step.
        columns: metric name to the panel's title.
        zero: metrics that get a line at zero.

    Raises:
        EmmechError: no run recorded one of the metrics.
    """
    curves = []
    for column in columns:
        found = [(run, frame[column].dropna()) for run, frame in metrics.items() if column in frame]
        if not any(len(series) for _, series in found):
            why, instead = "none of them recorded it", "run.metrics.columns lists what was recorded"
            raise EmmechError(f"plot {column!r}", f"runs {list(metrics)}", why, instead)
        curves += [Curve(column, run, column, series.index, series) for run, series in found]
    axes = {column: (name, "step", "") for column, name in columns.items()}
    figure, place = by_panel(curves, axes, title, columns=len(columns))
    for column in zero:
        level(figure, 0.0, at=place[column])
    return figure


def rates_by_step(rates: pd.DataFrame, names: Mapping[str, str], title: str, *, step: float | None = None) -> Any:
    """Rates with intervals by step, one line per measure.

    Args:
        rates: ``step``, ``measure``, ``rate``, ``low`` and ``high``.
        names: measure to its name in the legend.
        step: the step at which B turns, marked.
    """
    figure = panels()
    for index, (measure, name) in enumerate(names.items()):
        part = rates[rates["measure"] == measure]
        low, rate, high = (100 * part[column] for column in ("low", "rate", "high"))
        line(figure, part["step"], rate, name, colour((1, 4, 0)[index % 3]), error=bars(rate, low, high))
    if step is not None:
        mark(figure, step, GREY, "turn of B")
    return finish(figure, title, height=400, xaxis_title="step", yaxis_title="answers, %")
