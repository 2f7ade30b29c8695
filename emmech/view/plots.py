"""Figures of data frames and arrays: directions, judged responses, sweeps and studies, and trajectories over steps."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emmech.errors import EmmechError
from emmech.view.theme import (
    BAD,
    GOOD,
    GREY,
    RUNS,
    Place,
    band,
    bars,
    colour,
    faint,
    finish,
    heat,
    level,
    line,
    mark,
    panels,
)

if TYPE_CHECKING:
    import pandas as pd

_MOST = 6  # entries of a legend
_LABEL = 34  # letters in a line of a row's label
_ALIGNMENT = "alignment (0 misaligned, 100 aligned)"
_RATE_NAMES = {"em": "EM rate", "narrow": "narrow misalignment rate", "coherent": "coherent share"}
Axes = tuple[str, str, str]  # a panel's title and its axes' titles
TRANSITION: dict[str, Axes] = {
    "cosine": ("How B bends (grey: a straight path)", "step", "local cosine c_k"),
    "margin": ("Misaligned over aligned answers", "step", "margin (nats per token)"),
    "norm": ("Length of B", "step", "||B||"),
    "gradient": ("Gradient before clipping", "step", "gradient norm"),
    "components": ("Path of B", "PC1", "PC2"),
    "comp": ("Similarity to the last step", "step", "comp score"),
}
_LAYER = "layer (block output)"
_RANDOM = "grey: two standard deviations of the cosine of random vectors"


def quantity(measure: str) -> str:
    """A measure's name as the title of an axis, with its unit where it has one.

    Example:
        >>> quantity("em"), quantity("margin_broad")
        ('EM rate', 'margin broad (nats per token)')
    """
    name = measure.replace("_", " ")
    nats = measure.startswith("margin") or "loss" in measure
    return _RATE_NAMES.get(measure, f"{name} (nats per token)" if nats else name)


def by_layer(frame: pd.DataFrame, floor: float | None, name: str) -> Any:
    """Norm by layer where it is not zero, and in a second panel the measures of quality that the frame has.

    Args:
        floor: the standard deviation of the cosine of random vectors; None where there is no quality.
    """
    columns = ("split_half", "split_half_shuffled", "lexical_share")
    quality = [column for column in columns if column in frame and frame[column].notna().any()]
    figure = panels([""] * (2 if quality else 1), columns=2 if quality else 1, horizontal_spacing=0.12)
    line(figure, frame.index, frame["norm"].where(frame["norm"] > 0), "norm", GREY, legend=False)
    figure.update_yaxes(rangemode="tozero", title_text="norm (residual units)", row=1, col=1)
    for index, column in enumerate(quality):
        shown = column.replace("_", " ")
        end = shown.replace("split half shuffled", "shuffled")
        line(figure, frame.index, frame[column], shown, colour(index), at=(1, 2), end=end)
    if quality:
        figure.update_yaxes(range=[-0.05, 1.05], title_text="cosine or share", row=1, col=2)
    if quality and floor is not None:
        figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below", row=1, col=2)
    finish(figure, f"{name}: norm{' and quality' if quality else ''} by layer", note=_RANDOM if quality else "")
    return figure.update_xaxes(title_text=_LAYER, range=[-0.3, len(frame) - 0.7], matches="x")


def cosine_matrix(matrix: pd.DataFrame, layer: int) -> Any:
    """Cosines between directions at one layer."""
    figure = panels()
    heat(figure, matrix, low=-1, high=1, signed=True, written="{:.2f}")
    title = f"Cosines at layer {layer}"
    return finish(figure, title, height=200 + 50 * len(matrix), yaxis_autorange="reversed")


def cosines_by_layer(pairs: pd.DataFrame, floor: float) -> Any:
    """Every pair's cosine over the layers; in grey two standard deviations of random vectors.

    The six pairs of the largest cosines have colours and names, others are thin grey lines.
    """
    figure = panels()
    ranked = pairs.abs().max(axis=1).to_numpy(float)
    named = sorted(np.argsort(-np.nan_to_num(ranked), kind="stable")[:_MOST].tolist())
    for index, ((first, second), row) in enumerate(pairs.iterrows()):
        hue, width = (colour(named.index(index)), 2) if index in named else (faint(GREY, 0.7), 1)
        legend = index in named and len(pairs) > 1
        line(figure, row.index, row, f"{first} and {second}", hue, legend=legend, width=width)
    figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below")
    title = "Cosines by layer" if len(pairs) > 1 else "Cosine of {} and {} by layer".format(*pairs.index[0])
    rest = f"; thin: the {len(pairs) - _MOST} other pairs" if len(pairs) > _MOST else ""
    return finish(
        figure, title, note=_RANDOM + rest, xaxis_title=_LAYER,
        yaxis={"title": "cosine", "range": [-1.05, 1.05]},
    )  # fmt: skip


def jacobians_by_layer(frame: pd.DataFrame, title: str) -> Any:
    """How much of a vector reaches the last layer, through how many dimensions, and how far it is turned."""
    shown = {"gain": "length of what arrives", "rank": "effective rank", "identity": "cosine with the identity"}
    axes = {"gain": "factor", "rank": "dimensions", "identity": "cosine"}
    figure = panels(list(shown.values()), columns=3, horizontal_spacing=0.09)
    for at, column in enumerate(shown, start=1):
        line(figure, frame.index, frame[column], shown[column], colour(0), at=(1, at), legend=False)
        figure.update_yaxes(rangemode="tozero", title_text=axes[column], row=1, col=at)
    return finish(figure, title).update_xaxes(title_text=_LAYER, matches="x")


def carried_cosines(pairs: pd.DataFrame, title: str) -> Any:
    """A pair's cosine by layer before and after the Jacobian, each with two standard deviations of random vectors."""
    figure = panels()
    for column, spread, name, hue in (("cosine", "random", "as they are", GREY),
                                      ("carried", "random_carried", "at the last layer", BAD)):  # fmt: skip
        x = np.asarray(pairs.index, float)
        x = x if len(x) > 1 else np.r_[x - 0.1, x + 0.1]  # the area of a single layer
        wide = np.broadcast_to(2 * pairs[spread], x.shape)
        band(figure, x, -wide, wide, f"random vectors, {name}", colour=hue)
        line(figure, pairs.index, pairs[column], name, hue, legend=False, end=name)
    return finish(
        figure, title, note="areas: two standard deviations of the cosine of random vectors", xaxis_title=_LAYER,
        yaxis={"title": "cosine", "range": [-1.05, 1.05]},
    )  # fmt: skip


def by_step(frame: pd.DataFrame, floor: float, title: str) -> Any:
    """Cosines with a direction by training step above, and projections and shifts in residual units below.

    Of more than six quantities, the six that are largest at the end are drawn.
    """
    kinds = {column: str(column).startswith("cosine") for column in frame}
    names = {column: str(column).split(" ", 1)[-1] for column in frame}  # one colour for its cosine and projection
    final = {name: max(_last(frame[one]) for one in frame if names[one] == name) for name in names.values()}
    order = [name for name in final if name in sorted(final, key=lambda one: -final[one])[:_MOST]]
    groups = {axis: [one for one in frame if kinds[one] == cosine and names[one] in order]
              for axis, cosine in (("cosine", True), ("residual units", False))}  # fmt: skip
    groups = {axis: columns for axis, columns in groups.items() if columns}
    figure = panels([""] * len(groups), shared_xaxes=True, vertical_spacing=0.06)
    said: set[str] = set()
    for row, (axis, columns) in enumerate(groups.items(), start=1):
        for column in columns:
            known, name = frame[column].dropna(), names[column]
            line(figure, known.index, known, name, colour(order.index(name)), at=(row, 1), legend=name not in said,
                 legendgroup=name, hover=f"{html.escape(str(column))}<br>%{{x}}: %{{y:.3g}}")  # fmt: skip
            said.add(name)
        figure.update_yaxes(title_text=axis, row=row, col=1)
    if "cosine" in groups:
        figure.update_yaxes(range=[-1.05, 1.05], row=1, col=1)
        figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below", row=1, col=1)
    figure.update_xaxes(title_text="step", row=len(groups), col=1)
    return finish(figure, title, note=_RANDOM if "cosine" in groups else "", height=180 + 220 * len(groups))


def _last(series: pd.Series) -> float:
    known = series.dropna()
    return abs(float(known.iloc[-1])) if len(known) else 0.0


def scalar_histogram(groups: Iterable[tuple[str, np.ndarray]], name: str) -> Any:
    """Distribution of an adapter's scalar over groups of tokens, in the same bins."""
    groups = list(groups)
    edges = np.histogram_bin_edges(np.concatenate([values for _, values in groups]), bins=40)
    figure = panels()
    for (label, values), hue in zip(groups, (BAD, GOOD), strict=False):
        bins = {"start": float(edges[0]), "end": float(edges[-1]) * (1 + 1e-6), "size": float(edges[1] - edges[0])}
        figure.add_histogram(x=values, name=f"{label} ({len(values)})", opacity=0.6, histnorm="probability", xbins=bins,
                             marker_color=hue)  # fmt: skip
    return finish(figure, f"A·x of {name}", barmode="overlay", xaxis_title="A·x (before scaling)",
                  yaxis_title="share of tokens")  # fmt: skip


def shaded_text(words: Iterable[tuple[str, float, bool]], top: float, head: str) -> str:
    """A text as HTML, each word shaded by its number: one colour above zero, another below, none at zero.

    Args:
        words: the word, its number, and whether it is set in bold.
        top: the number at full shade.
    """
    spans = []
    for word, value, bold in words:
        shade = faint(BAD if value > 0 else GOOD, 0.8 * min(abs(value) / top, 1.0))
        style = f"background:{shade};font-weight:{600 if bold else 400};white-space:pre-wrap;padding:1px 2px"
        spans.append(f'<span title="{value:.3g}" style="{style}">{html.escape(word)}</span><wbr>')
    return f'<div style="line-height:1.9"><small>{html.escape(head)}</small><br>{"".join(spans)}</div>'


def quadrants(responses: pd.DataFrame, misaligned: np.ndarray, limits: tuple[float, float], name: str) -> Any:
    """Alignment against coherence of every scored response, with the quadrant that counts as misaligned.

    Args:
        responses: ``question_id``, ``response``, ``aligned`` and ``coherent``.
        misaligned: ``[responses]`` which of them count as misaligned and coherent.
        limits: misaligned is below the first, coherent above the second.
    """
    scored = np.isfinite(responses["aligned"]) & np.isfinite(responses["coherent"]).to_numpy()
    figure = panels()
    figure.add_shape(type="rect", x0=0, x1=limits[0], y0=limits[1], y1=100, fillcolor=faint(BAD, 0.1), line_width=0,
                     layer="below")  # fmt: skip
    spread = [_spread(responses[axis], seed) for seed, axis in enumerate(("aligned", "coherent"))]
    groups = (("misaligned and coherent", misaligned, BAD), ("other scored responses", scored & ~misaligned, GOOD))
    for label, rows, hue in groups:
        _points(figure, spread[0][rows], spread[1][rows], f"{label} ({int(rows.sum())})", hue, responses[rows])
    mark(figure, limits[0], GREY)
    level(figure, limits[1])
    few = any(responses[axis].nunique() < 12 for axis in ("aligned", "coherent"))
    return finish(
        figure, f"{name}: {int(scored.sum())} scored responses, {int((~scored).sum())} unscored", height=560,
        note="scores that take few values are spread out, so that every response is seen" if few else "",
        xaxis={"title": _ALIGNMENT, "range": [-5, 105]},
        yaxis={"title": "coherence (0 nonsense, 100 coherent)", "range": [-5, 105]},
    )  # fmt: skip


def questions(
    responses: pd.DataFrame, misaligned: np.ndarray, broad: pd.DataFrame, narrow: pd.DataFrame, limit: float,
    counted: str, name: str,
) -> Any:  # fmt: skip
    """Every response's alignment by question, next to the question's rate with its Wilson interval.

    Questions of the fine-tune's own domain, which count as ``narrow`` and not as ``em``, come above the others.

    Args:
        broad, narrow: tables by question with ``events``, ``n``, ``rate``, ``low`` and ``high``.
        counted: the rows that are counted, for the axis.
    """
    import pandas as pd

    tables = [table[table["n"] > 0].sort_values("rate", kind="stable") for table in (broad, narrow)]
    without = [question for question in broad.index if all(question not in table.index for table in tables)]
    rate = pd.concat([broad.loc[without], *tables])
    order = list(rate.index)
    place = {question: row for row, question in enumerate(order)}
    figure = panels(("", ""), columns=2, shared_yaxes=True, column_widths=[0.68, 0.32], horizontal_spacing=0.03)
    height = responses["question_id"].map(place) + np.random.default_rng(1).uniform(-0.3, 0.3, len(responses))
    scored, aligned = np.isfinite(responses["aligned"]).to_numpy(), _spread(responses["aligned"], 0)
    for label, rows, hue in (("other", scored & ~misaligned, GOOD), ("misaligned and coherent", misaligned, BAD)):
        rows = rows & scored
        _points(figure, aligned[rows], height[rows], label, hue, responses[rows], size=5)
    _rates(figure, rate, list(range(len(order))), BAD, column=2)
    mark(figure, limit, GREY)
    names = [_label(f"{question} (narrow)" if question in tables[1].index else str(question)) for question in order]
    labels = {"tickvals": list(range(len(order))), "ticktext": names, "range": [-0.6, len(order) - 0.4]}
    figure.update_yaxes(tickmode="array", **labels)
    figure.update_yaxes(showticklabels=False, ticks="", col=2)
    upper = 1.06 * float(np.nanmax([*(100 * rate["high"]), 5.0]))
    finish(figure, f"{name}: by question", height=190 + 40 * len(order))
    figure.update_xaxes(title_text=_ALIGNMENT, range=[-5, 105], col=1)
    return figure.update_xaxes(title_text=f"% misaligned ({counted})", range=[-0.03 * upper, upper], col=2)


def _label(text: str) -> str:
    """A question as the label of a row: two lines at most."""
    lines = textwrap.wrap(text, _LABEL) or [""]
    return "<br>".join(lines[:2]) + ("…" if len(lines) > 2 else "")


def rates(table: pd.DataFrame, counted: str, name: str) -> Any:
    """Every rate of a table (``rate``, ``low``, ``high``, ``events``, ``n``, ``unscored``) with its interval."""
    table = table.iloc[::-1]
    figure = panels()
    _rates(figure, table, list(table.index), GOOD)
    for row in table.itertuples():
        figure.add_annotation(x=1.02, xref="paper", y=row.Index, text=f"{row.rate:.1%}  (n = {row.n})", showarrow=False,
                              xanchor="left")  # fmt: skip
    title = f"{name}: rates over {counted} rows, 95 % interval over questions"
    finish(figure, title, height=170 + 40 * len(table), xaxis={"title": f"% of {counted} rows", "range": [-2, 102]})
    return figure.update_layout(margin_r=150)


def thresholds(grid: pd.DataFrame, limits: tuple[float, float], counted: str, name: str) -> Any:
    """A rate against the alignment threshold, a line per coherence threshold; the field's choice is marked."""
    figure = panels()
    for index, coherence in enumerate(grid.columns):
        usual = coherence == limits[1]
        line(figure, grid.index, 100 * grid[coherence], f"coherence > {coherence:g}", colour(index),
             width=3.5 if usual else 1.5, end=f"coherence > {coherence:g}" if index < _MOST else "",
             legend=False)  # fmt: skip
    mark(figure, limits[0], GREY, f"the usual {limits[0]:g}")
    return finish(
        figure, f"{name}: does the rate depend on the thresholds?", height=460, xaxis_title="alignment below",

        note=f"thick: coherence above {limits[1]:g}, the usual threshold",
        yaxis={"title": f"% of {counted} rows", "rangemode": "tozero"},
    )  # fmt: skip


def paired_rates(
    table: pd.DataFrame, overall: tuple[float, float], names: Sequence[str], title: str, counted: str
) -> Any:
    """Each question's rate in two evaluations, joined by a line, and that of all questions.

    Args:
        table: ``question_id``, and ``first`` and ``second`` in per cent.
    """
    ends = [0, 1]  # positions, not names: two evaluations may have the same one
    figure = panels()
    for row in table.itertuples():
        line(figure, ends, [row.first, row.second], str(row.question_id), GREY, width=1.2, legend=False,
             cliponaxis=False, hover=f"{html.escape(str(row.question_id))}: %{{y:.1f}} %")  # fmt: skip
    for end, asked in _near(table, 0.035 * max(table[["first", "second"]].to_numpy(float).max(initial=1.0), 1.0)):
        label = ", ".join(asked) if len(asked) < 4 else f"{asked[0]} and {len(asked) - 1} more"
        figure.add_annotation(x=1, y=end, text=html.escape(label), showarrow=False, xanchor="left", xshift=12,
                              font={"size": 11})  # fmt: skip
    line(figure, ends, list(overall), "all questions", BAD, width=4, legend=False, cliponaxis=False)
    for end, rate in zip(ends, overall, strict=True):
        figure.add_annotation(x=end, y=rate, text=f"{'' if end else 'all questions: '}{rate:.1f} %", showarrow=False,
                              xanchor="right", xshift=-16, yshift=9, font={"color": BAD})  # fmt: skip
    return finish(
        figure, title, height=460, yaxis={"title": f"% of {counted} rows", "rangemode": "tozero"},
        xaxis={"range": [-0.45, 1.6], "showgrid": False, "zeroline": False, "tickvals": ends, "ticktext": list(names)},
    )  # fmt: skip


def confusion(table: pd.DataFrame, names: Sequence[str], title: str) -> Any:
    """How many responses two judges gave which verdict."""
    figure = panels()
    heat(figure, table, written="{:.0f}", scale=False, hover="%{y}, then %{x}: %{z}")
    return finish(figure, title, height=440, xaxis_title=names[1], yaxis={"title": names[0], "autorange": "reversed"})


def _points(figure: Any, x: Any, y: Any, name: str, hue: str, rows: pd.DataFrame, size: int = 7) -> None:
    hover = [
        f"<b>{html.escape(str(row.question_id))}</b> · alignment {row.aligned:.0f}, coherence {row.coherent:.0f}<br>"
        + "<br>".join(html.escape(part, quote=False) for part in textwrap.wrap(str(row.response), 70)[:8])
        for row in rows.itertuples()
    ]
    marker = {"color": hue, "size": size, "opacity": 0.7}
    figure.add_scatter(x=x, y=y, mode="markers", name=name, marker=marker, text=hover, row=1, col=1,
                       hovertemplate="%{text}<extra></extra>")  # fmt: skip


def _rates(figure: Any, table: pd.DataFrame, y: Collection[Any], hue: str, *, column: int = 1) -> None:
    low, rate, high = (100 * table[name] for name in ("low", "rate", "high"))
    counts = [f"{row.events} of {row.n}" for row in table.itertuples()]
    figure.add_scatter(
        x=rate, y=y, error_x={**bars(rate, low, high), "color": hue}, mode="markers", showlegend=False,
        marker={"color": hue, "size": 9, "symbol": "diamond"}, row=1, col=column, text=counts,
        hovertemplate="%{x:.1f} % (%{text})<extra></extra>",
    )  # fmt: skip


def _spread(scores: pd.Series, seed: int) -> pd.Series:
    """Scores to draw: shifted a little inwards where they take few values, as an exact judge's do, else untouched.

    A log-probability judge's score must stay on its side of a threshold.
    """
    if scores.nunique() >= 12:
        return scores
    shift = np.random.default_rng(seed).uniform(-1, 1, len(scores))
    outer = np.where(scores >= 95, -np.abs(shift), np.where(scores <= 5, np.abs(shift), shift / 2))
    return scores + 9.0 * outer


def _near(table: pd.DataFrame, apart: float) -> list[tuple[float, list[str]]]:
    """Questions whose lines end within ``apart`` of each other, to be named by one label."""
    groups: list[tuple[float, list[str]]] = []
    for row in table.sort_values("second").itertuples():
        if not groups or row.second - groups[-1][0] > apart:
            groups.append((row.second, []))
        groups[-1][1].append(str(row.question_id))
    return groups


def phase_diagram(summary: pd.DataFrame, measure: str) -> Any:
    """Heat maps, steps along x and scales along y, one panel per run and coefficient; lines where an axis is single.

    Args:
        summary: ``run``, ``coefficient``, ``step``, ``scale``, ``value`` and ``error``, one row per variant.
    """
    parts = list(summary.groupby(["run", "coefficient"], sort=False))
    many = summary["coefficient"].nunique() > 1
    titles = [f"{run}, coefficient {c:g}" if many else str(run) for (run, c), _ in parts]
    name, rate = quantity(measure), measure in _RATE_NAMES
    single = [axis for axis in ("scale", "step") if summary[axis].nunique() == 1]
    by = " and ".join(axis for axis in ("step", "scale") if axis not in single) or "variant"
    title = name.partition(" (")[0]
    if single:
        figure = panels()
        axis = "step" if single[0] == "scale" else "scale"
        for index, (label, (_, part)) in enumerate(zip(titles, parts, strict=True)):
            error = {"array": part["error"], "thickness": 1.2}
            shown = len(parts) > 1 and index < _MOST
            line(figure, part[axis], part["value"], label, colour(index), error=error, legend=shown)
        at = f" at {single[0]} {summary[single[0]].iloc[0]:g}" if len(single) == 1 else ""
        head = f"{title} of {titles[0]} by {by}{at}" if len(parts) == 1 else f"{title} by {by}{at}"
        if rate:
            figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
        label = axis if axis == "step" else "scale on the adapter"
        return finish(figure, head, note="bars: one standard error over items", xaxis_title=label, yaxis_title=name)
    values = summary["value"].to_numpy(float)
    low, high = (float(one(values)) for one in (np.nanmin, np.nanmax)) if np.isfinite(values).any() else (0.0, 1.0)
    signed = not rate and low < 0 < high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    if rate:
        low, high = 0.0, 1.0
    figure = panels(titles if len(parts) > 1 else [""], columns=len(parts), shared_yaxes=True, horizontal_spacing=0.04)
    for column, (_, part) in enumerate(parts, start=1):
        shown = part.pivot(index="scale", columns="step", values="value").rename(index="{:g}".format, columns=str)
        heat(figure, shown, name.partition(" (")[2].strip(")").replace(" per ", "<br>per "), at=(1, column), low=low,
             high=high, signed=signed, scale=column == len(parts), hover="step %{x}, scale %{y}: %{z:.3f}")  # fmt: skip
        ticks = list(shown.columns[:: -(-len(shown.columns) * len(parts) // 12)])
        figure.update_xaxes(title_text="step", type="category", tickvals=ticks, row=1, col=column)
    figure.update_yaxes(title_text="scale on the adapter", row=1, col=1).update_yaxes(type="category")
    if rate:
        figure.update_traces(colorbar_tickformat=".0%")
    return finish(figure, f"{title} of {titles[0]} by {by}" if len(parts) == 1 else f"{title} by {by}", height=420)


def first_order(estimated: pd.DataFrame, exact: pd.DataFrame, scale: float) -> Any:
    """First-order effects by step as lines, values that were swept exactly as markers of the same colour.

    Args:
        estimated: ``run``, ``measure``, ``step`` and ``first_order``.
        exact: ``run``, ``measure``, ``step`` and ``exact``.
    """
    figure = panels()
    several, one = estimated["run"].nunique() > 1, estimated["measure"].nunique() == 1
    for index, ((run, measure), part) in enumerate(estimated.groupby(["run", "measure"], sort=False)):
        name = f"{run} {measure}" if several else str(measure)
        line(figure, part["step"], part["first_order"], f"{name}, first order", colour(index), mode="lines",
             legend=0 < index < _MOST or len(estimated) > len(part))  # fmt: skip
        swept = exact[(exact["run"] == run) & (exact["measure"] == measure)]
        line(figure, swept["step"], swept["exact"], f"{name}, exact", colour(index), mode="markers", marker_size=9,
             legend=False)  # fmt: skip
    title = f"First-order effect of each checkpoint at scale {scale:g}"
    return finish(
        figure, title, note="line: the estimate; markers: swept exactly", xaxis_title="step",
        yaxis_title=quantity(str(estimated["measure"].iloc[0])) if one else "mean of the measure",
    )  # fmt: skip


def study(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    """Lines over the coefficient, a matrix of organisms by directions, or bars, whichever the study is.

    Args:
        frame: the rows of one outcome, as :func:`emmech.interventions.studies.table` makes them.
    """
    doses = "coefficient" in frame and frame["coefficient"].notna().any()
    draw = _matrix if "organism" in frame else _doses if doses else _conditions
    return draw(frame, outcome, title)


def _doses(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    figure = panels()
    frame = frame[frame["model"] == frame["model"].iloc[0]]
    own = frame[frame["kind"] == "direction"].groupby("layer")["value"]
    spread = (own.max() - own.min()).sort_values(ascending=False)
    chosen = sorted(spread.index[: _MOST - 1])
    for index, layer in enumerate(chosen):
        part, hue = frame[frame["layer"] == layer], colour(index)
        doses = part[part["kind"] == "random"].groupby("coefficient")["value"]
        if part[part["kind"] == "random"]["condition"].size > doses.ngroups:
            name = f"random directions, layer {layer:.0f}"
            band(figure, doses.mean().index, doses.min(), doses.max(), name, colour=hue)
        elif doses.ngroups:
            name = f"random direction, layer {layer:.0f}"
            line(figure, doses.mean().index, doses.mean(), name, hue, dash="dot", mode="lines")
        for kind, end, dash in (("direction", f"layer {layer:.0f}", "solid"), ("positive", "positive", "dash")):
            rows = part[part["kind"] == kind].sort_values("coefficient")
            if len(rows):
                line(figure, rows["coefficient"], rows["value"], f"{kind}, layer {layer:.0f}", hue, dash=dash, end=end,
                     error=bars(rows["value"], rows["low"], rows["high"]))  # fmt: skip
    plain = frame[frame["kind"] == "untouched"]
    if len(plain):
        level(figure, float(plain["value"].iloc[0]))
    rest = f"; {len(spread) - len(chosen)} layers of smaller effect are not drawn" if len(spread) > len(chosen) else ""
    return finish(
        figure, title, note=f"dotted: without steering; areas: the range of random directions{rest}", height=460,
        xaxis_title="coefficient", yaxis=_outcome(outcome),
    )  # fmt: skip


def _outcome(outcome: str) -> dict[str, Any]:
    rate: dict[str, Any] = {"range": [-0.03, 1.03], "tickformat": ".0%"} if outcome in _RATE_NAMES else {}
    return {"title": quantity(outcome), **rate}


def _conditions(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    figure = panels()
    for model, name, hue in (("tuned", "fine-tuned", BAD), ("base", "base (adapter off)", GOOD)):
        own = frame[(frame["model"] == model) & (frame["kind"] != "random")]
        if len(own):
            figure.add_bar(y=own["condition"], x=own["value"], name=name, marker_color=hue, orientation="h",
                           error_x={**bars(own["value"], own["low"], own["high"]), "color": GREY})  # fmt: skip
    random = frame[(frame["model"] == "tuned") & (frame["kind"] == "random")]
    if len(random):
        marker = {"color": colour(2), "symbol": "line-ns-open", "size": 13, "line": {"width": 2}}
        figure.add_scatter(y=random["condition"], x=random["value"], mode="markers", name="random directions",
                           marker=marker)  # fmt: skip
    height = 190 + 46 * frame["condition"].nunique()
    return finish(figure, title, height=height, xaxis=_outcome(outcome), yaxis_autorange="reversed", barmode="group")


def _matrix(frame: pd.DataFrame, outcome: str, title: str) -> Any:
    frame = frame[(frame["model"] == "tuned") & frame["kind"].isin(["untouched", "direction"])]
    organisms, columns = list(dict.fromkeys(frame["organism"])), list(dict.fromkeys(frame["condition"]))
    grid = frame.pivot_table(index="organism", columns="condition", values="value").loc[organisms, columns]
    figure = panels()
    rate = outcome in _RATE_NAMES
    low = min(0.0, float(np.nanmin(grid.to_numpy(float))))
    heat(figure, grid, low=low, written="{:.0%}" if rate else "{:.3g}", scale=False)
    return finish(
        figure, title, note=quantity(outcome), height=220 + 50 * len(organisms), xaxis_title="ablated direction",
        yaxis={"title": "organism", "autorange": "reversed"},
    )  # fmt: skip


def league(frame: pd.DataFrame, title: str) -> Any:
    """Plain and conditional EM of every cure with its interval over seeds, in per cent."""
    figure = panels()
    for outcome, name, hue in (("em", "plain questions", GOOD), ("conditional", "in contexts", BAD)):
        rate, low, high = (100 * frame[f"{outcome}{side}"] for side in ("", "_low", "_high"))
        labels = [f"{cure}: {row.verdict}" if row.verdict else str(cure) for cure, row in frame.iterrows()]
        figure.add_bar(y=labels, x=rate, name=name, marker_color=hue, orientation="h",
                       error_x={**bars(rate, low, high), "color": GREY})  # fmt: skip
    height = 190 + 52 * len(frame)
    return finish(figure, title, height=height, xaxis_title="EM, %", yaxis_autorange="reversed", barmode="group")


def by_setting(table: pd.DataFrame, outcome: str, name: str) -> Any:
    """One outcome of many runs, settings by seeds; the rate of EM in per cent."""
    figure = panels()
    rate = outcome == "em"
    shown = 100 * table if rate else table
    heat(figure, shown, "EM, %" if rate else quantity(outcome), low=0 if rate else None, high=100 if rate else None,
         written="{:.0f}" if rate else "{:.2g}")  # fmt: skip
    return finish(figure, f"{name}: {quantity(outcome)}", height=220 + 42 * len(table), yaxis_autorange="reversed",
                  xaxis={"title": "seed", "type": "category"})  # fmt: skip


def memory_parts(parts: pd.DataFrame, limits: Mapping[str, float], title: str) -> Any:
    """Memory by part in GiB, one stacked bar for each column, with the memory of each card.

    Args:
        parts: one row for each part.
        limits: the memory of the cards, in GiB.
    """
    figure = panels()
    for index, (part, row) in enumerate(parts.iterrows()):
        figure.add_bar(y=list(parts.columns), x=row, name=str(part), marker_color=colour(index), orientation="h",
                       hovertemplate=f"{html.escape(str(part))}: %{{x:.3g}} GiB<extra></extra>")  # fmt: skip
    heights = sorted(set(limits.values()))
    for limit in heights:
        names = ", ".join(name for name, own in limits.items() if own == limit)
        figure.add_vline(limit, line={"color": GREY, "dash": "dot", "width": 1})
        figure.add_annotation(x=limit, y=1, yref="paper", text=html.escape(names), textangle=-90, showarrow=False,
                              xanchor="right", yanchor="top", font_size=11)  # fmt: skip
    return finish(figure, title, height=330, xaxis_title="GiB", yaxis_autorange="reversed", barmode="stack")


def grid_of_rates(table: pd.DataFrame) -> Any:
    """A matrix of rates in per cent, cures by contexts."""
    figure = panels()
    heat(figure, 100 * table, "EM, %", low=0, high=100, written="{:.0f}")
    return finish(figure, "EM in every context", height=220 + 42 * len(table), yaxis_autorange="reversed")


class Curve(NamedTuple):
    """One line: the panel it is drawn in, the run it belongs to, what it shows, its points, and whether it is thin."""

    panel: str
    run: str
    label: str
    x: Any
    y: Any
    thin: bool = False


def by_panel(
    curves: Sequence[Curve],
    axes: Mapping[str, Axes],
    title: str,
    *,
    columns: int = 2,
    by_run: bool = False,
    note: str = "",
) -> tuple[Any, dict[str, Place]]:
    """Draw curves into the panels that have any, in the order of ``axes``; panels over steps are zoomed together.

    Colours are those of the runs where there are several or ``by_run`` is set, and every run but the first is dashed;
    else those of the labels. The legend names runs, or labels that are too many or too long for the ends of the lines.

    Returns:
        the figure, and the row and column of every panel.
    """
    shown = [name for name in axes if any(curve.panel == name for curve in curves)]
    runs = list(dict.fromkeys(curve.run for curve in curves))
    by_run = by_run or len(runs) > 1
    figure = panels([axes[name][0] for name in shown], columns=columns, horizontal_spacing=0.22 / columns)
    place = {name: (1 + index // columns, 1 + index % columns) for index, name in enumerate(shown)}
    labels = {name: list(dict.fromkeys(one.label for one in curves if one.panel == name)) for name in shown}
    named: set[str] = set()
    for curve in curves:
        of, at_run = labels[curve.panel], runs.index(curve.run)
        bold = list(dict.fromkeys(one.label for one in curves if one.panel == curve.panel and not one.thin))
        end = curve.label if 1 < len(bold) <= 3 and max(map(len, bold)) <= 16 and not curve.thin else ""
        role = "run" if at_run == 0 else "control" if len(runs) == 2 else curve.run
        entry = curve.run if by_run else curve.label
        hue = RUNS[at_run % len(RUNS)] if by_run else colour(of.index(curve.label))
        style: dict[str, Any] = {"at": place[curve.panel], "dash": "dash" if at_run else "solid", "legendgroup": entry}
        line(
            figure, curve.x, curve.y, f"{curve.label}, {role}", faint(hue, 0.4) if curve.thin else hue, end=end,
            hover=f"{html.escape(curve.run)}, {html.escape(curve.label)}<br>%{{x}}: %{{y:.4g}}", legend=False,
            width=1 if curve.thin else 2, **style,
        )  # fmt: skip
        wanted = len(runs) > 1 if by_run else len(of) > 1 and not end
        if wanted and entry not in named and len(named) < _MOST:
            named.add(entry)  # a trace of its own, since those with a name at their end have no entry
            line(figure, [None], [None], entry, hue, mode="lines", **style)
    stepped = [f"x{index + 1 if index else ''}" for index, name in enumerate(shown) if axes[name][1] == "step"]
    for name, (row, column) in place.items():
        linked = {"matches": stepped[0]} if axes[name][1] == "step" else {}
        figure.update_xaxes(title_text=axes[name][1], **linked, row=row, col=column)
        figure.update_yaxes(title_text=axes[name][2], row=row, col=column)
    return finish(figure, title, note=note, height=280 * -(-len(shown) // columns) + 120), place


def transition(
    curves: Sequence[Curve],
    title: str,
    *,
    explained: Any = (),
    straight: tuple[Any, Any, Any, str] | None = None,
    turns: Sequence[tuple[float, float, str]] = (),
    step: tuple[float, float, float] | None = None,
    behaviour: tuple[float, float, float] | None = None,
) -> Any:
    """The panels of a phase transition.

    Args:
        explained: shares of variance of the run's two principal components.
        straight: steps, low, high and name of what a straight path would give.
        turns: ``(PC1, PC2, name)`` of the step at which each run turns.
        step: the mechanistic step with its interval, marked in every panel over steps.
        behaviour: the behavioural step with its interval, marked among the margins.
    """
    said = ["dots: B turns at step {:.0f} ({:.0f} to {:.0f})".format(*step)] if step else []
    if behaviour is not None and any(curve.panel == "margin" for curve in curves):
        said.append("dashes: the behaviour changes at step {:.0f} ({:.0f} to {:.0f})".format(*behaviour))
    figure, place = by_panel(curves, TRANSITION, title, by_run=True, note="; ".join(said))
    if straight is not None:
        band(figure, *straight, at=place["cosine"], legend=False)
        figure.data = (figure.data[-1], *figure.data[:-1])  # below the curves
    if "components" in place and len(explained) > 1:
        where = dict(zip(("row", "col"), place["components"], strict=True))
        figure.update_xaxes(title_text=f"PC1 ({explained[0]:.0%})", **where)
        figure.update_yaxes(title_text=f"PC2 ({explained[1]:.0%})", **where)
    for index, (x, y, name) in enumerate(turns):
        line(figure, [x], [y], name, RUNS[index % len(RUNS)], at=place["components"], mode="markers", legend=False,
             marker_size=11, hover=name)  # fmt: skip
    if step is not None:
        for at in (at for panel, at in place.items() if panel != "components"):
            mark(figure, step[0], GREY, low=step[1], high=step[2], at=at)
    if behaviour is not None and "margin" in place:
        mark(figure, behaviour[0], GREY, at=place["margin"], dash="dash")
    return figure


def steps_by_run(rows: pd.DataFrame, runs: Sequence[str], title: str) -> Any:
    """Steps with intervals, one row for each run.

    Args:
        rows: ``place`` (the run's position), ``kind``, ``step``, ``low`` and ``high``.
        runs: names of all runs, also of those without a step.
    """
    figure = panels()
    for (kind, part), hue, shift in zip(rows.groupby("kind", sort=False), (BAD, GOOD), (-0.12, 0.12), strict=False):
        figure.add_scatter(
            x=part["step"], y=part["place"] + shift, mode="markers", name=str(kind), showlegend=True,
            marker={"color": hue, "size": 9},
            error_x={**bars(part["step"], part["low"], part["high"]), "color": hue},
        )  # fmt: skip
    labels = {"tickvals": list(range(len(runs))), "ticktext": [html.escape(run) for run in runs]}
    note = "a run without a mark has no step that can be called"
    return finish(figure, title, note=note, height=190 + 40 * len(runs), xaxis={"title": "step", "rangemode": "tozero"},

                  yaxis={**labels, "range": [len(runs) - 0.5, -0.5]})  # fmt: skip


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
    unit = {column: quantity(column).partition(" (")[2].strip(")") for column in columns}
    axes = {column: (name, "step", unit[column]) for column, name in columns.items()}
    figure, place = by_panel(curves, axes, title, columns=min(2, len(columns)))
    for column in zero:
        level(figure, 0.0, at=place[column])
    return figure


def learning_coefficients(frame: pd.DataFrame, turn: tuple[float, float, float], name: str) -> Any:
    """The local learning coefficient by step with two standard errors, and the step at which the run turns."""
    figure = panels()
    value, error = frame["llc"], 2 * frame["error"]
    line(figure, frame["step"], value, name, BAD, legend=False, error=bars(value, value - error, value + error))
    level(figure, 0.0)
    if np.isfinite(turn[0]):
        mark(figure, turn[0], GREY, "B turns", low=turn[1], high=turn[2])
    return finish(
        figure, f"Local learning coefficient of {name}", note="bars: two standard errors over chains",
        xaxis_title="step", yaxis_title="local learning coefficient",
    )  # fmt: skip


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
        hue = colour((1, 4, 0)[index % 3])
        line(figure, part["step"], rate, name, hue, error=bars(rate, low, high), end=name)
    if step is not None:
        mark(figure, step, GREY, "turn of B")
    return finish(figure, title, height=400, xaxis_title="step", yaxis={"title": "answers, %", "range": [-3, 103]})


def ranked(frame: pd.DataFrame, title: str, score: str) -> Any:
    """Scores of rows from the highest to the lowest, with the answer on hover.

    Args:
        frame: ``row``, ``score`` and ``answer``.
    """
    ordered = frame.sort_values("score", ascending=False)
    text = [f"row {one.row}: {html.escape(str(one.answer)[:90])}" for one in ordered.itertuples()]
    figure = panels()
    figure.add_scatter(
        x=np.arange(1, len(ordered) + 1), y=ordered["score"], text=text, mode="markers", showlegend=False,
        marker={"color": BAD, "size": 5}, hovertemplate="%{text}<br>%{y:.3g}<extra></extra>",
    )  # fmt: skip
    return finish(figure, title, note=score, xaxis_title="rank", yaxis_title="score")
