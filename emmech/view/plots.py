"""Figures of data frames and arrays: directions, judged responses, sweeps and studies, and trajectories over steps."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emmech.errors import EmmechError
from emmech.view.theme import BAD, GOOD, GREY, Place, band, bars, colour, faint, finish, heat, level, line, mark, panels

if TYPE_CHECKING:
    import pandas as pd

_DASHES = ("solid", "dot", "dash", "dashdot")
_ALIGNMENT = "alignment (0 misaligned, 100 aligned)"
_RATE_NAMES = {"em": "EM rate", "narrow": "narrow misalignment rate", "coherent": "coherent share"}
Axes = tuple[str, str, str]  # a panel's title and its axes' titles
TRANSITION: dict[str, Axes] = {
    "cosine": ("Local cosine (-1 straight, +1 reversal; grey: straight)", "step", "c_k"),
    "components": ("Principal components of B", "PC1", "PC2"),
    "norm": ("Norm of B", "step", "||B||"),
    "gradient": ("Gradient norm before clipping", "step", "gradient norm"),
    "margin": ("Misaligned over aligned answers", "step", "nats per token"),
    "comp": ("Similarity to the last step", "step", "comp score"),
}
_LAYER = "layer (block output)"


def by_layer(frame: pd.DataFrame, floor: float | None, name: str) -> Any:
    """Norm by layer, and in a second panel the measures of quality that the frame has.

    Args:
        floor: the standard deviation of the cosine of random vectors; None where there is no quality.
    """
    quality = [column for column in ("split_half", "split_half_shuffled", "lexical_share") if column in frame]
    figure = panels(("Norm (residual units)", "Cosine or share")[: 2 if quality else 1], columns=2 if quality else 1)
    line(figure, frame.index, frame["norm"], "norm", GREY, legend=False)
    for index, column in enumerate(quality):
        line(figure, frame.index, frame[column], column.replace("_", " "), colour(index), at=(1, 2))
    if quality and floor is not None:
        level(figure, floor, "cosine of random vectors", at=(1, 2))
        figure.update_yaxes(range=[-0.05, 1.05], row=1, col=2)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    return finish(figure, f"{name}: norm{' and quality' if quality else ''} by layer").update_xaxes(title_text=_LAYER)


def cosine_matrix(matrix: pd.DataFrame, layer: int) -> Any:
    """Cosines between directions at one layer."""
    figure = panels()
    heat(figure, matrix, "cosine", low=-1, high=1, signed=True, written="{:.2f}")
    title = f"Cosines at layer {layer}"
    return finish(figure, title, height=200 + 50 * len(matrix), yaxis_autorange="reversed")


def cosines_by_layer(pairs: pd.DataFrame, floor: float) -> Any:
    """Every pair's cosine over the layers; in grey two standard deviations of random vectors."""
    figure = panels()
    for index, ((first, second), row) in enumerate(pairs.iterrows()):
        line(figure, row.index, row, f"{first} and {second}", colour(index), dash=_DASHES[index // 6 % len(_DASHES)])
    figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below")
    return finish(
        figure, "Cosines by layer", note="grey: two standard deviations of random vectors", xaxis_title=_LAYER,
        yaxis={"title": "cosine", "range": [-1.05, 1.05]},
    )  # fmt: skip


def by_step(frame: pd.DataFrame, floor: float, title: str) -> Any:
    """Cosines with a direction by training step above, and projections and shifts in residual units below."""
    cosine = [column for column in frame if str(column).startswith("cosine")]
    groups = {"cosine": cosine, "residual units": [column for column in frame if column not in cosine]}
    groups = {axis: columns for axis, columns in groups.items() if columns}
    figure = panels([""] * len(groups), shared_xaxes=True, vertical_spacing=0.06)
    quantity = {column: str(column).split(" ", 1)[-1] for column in frame}  # one colour for its cosine and projection
    order = list(dict.fromkeys(quantity.values()))
    for row, (axis, columns) in enumerate(groups.items(), start=1):
        for column in columns:
            known, hue = frame[column].dropna(), colour(order.index(quantity[column]))
            line(figure, known.index, known, str(column), hue, at=(row, 1), dash="solid" if row == 1 else "dot")
        figure.update_yaxes(title_text=axis, row=row, col=1)
    if cosine:
        figure.update_yaxes(range=[-1.05, 1.05], row=1, col=1)
        figure.add_hrect(-2 * floor, 2 * floor, fillcolor=faint(GREY, 0.25), line_width=0, layer="below", row=1, col=1)
    figure.update_xaxes(title_text="step", row=len(groups), col=1)
    return finish(figure, title, height=160 + 240 * len(groups))


def scalar_histogram(groups: Iterable[tuple[str, np.ndarray]], name: str) -> Any:
    """Distribution of an adapter's scalar over groups of tokens."""
    figure = panels()
    for (label, values), hue in zip(groups, (BAD, GOOD), strict=False):
        figure.add_histogram(x=values, name=label, opacity=0.6, histnorm="probability", marker_color=hue)
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
    names = [f"{question} (narrow)" if question in tables[1].index else str(question) for question in order]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(order))), ticktext=names, col=1)
    upper = 1.06 * float(np.nanmax([*(100 * rate["high"]), 5.0]))
    finish(figure, f"{name}: by question", height=190 + 40 * len(order))
    figure.update_xaxes(title_text="alignment of each response", range=[-5, 105], col=1)
    return figure.update_xaxes(title_text=f"misaligned, % of {counted} rows", range=[-0.03 * upper, upper], col=2)


def rates(table: pd.DataFrame, counted: str, name: str) -> Any:
    """Every rate of a table (``rate``, ``low``, ``high``, ``events``, ``n``, ``unscored``) with its interval."""
    table = table.iloc[::-1]
    figure = panels()
    _rates(figure, table, list(table.index), GOOD)
    for row in table.itertuples():
        figure.add_annotation(x=1.02, xref="paper", y=row.Index, text=f"{row.rate:.1%}  (n = {row.n})", showarrow=False,
                              xanchor="left")  # fmt: skip
    title = f"{name}: rates over {counted} rows, 95 % interval over questions"
    finish(figure, title, height=170 + 40 * len(table), xaxis={"title": "%", "range": [-2, 102]})
    return figure.update_layout(margin_r=150)


def thresholds(grid: pd.DataFrame, limits: tuple[float, float], counted: str, name: str) -> Any:
    """A rate against the alignment threshold, a line per coherence threshold; the field's choice is marked."""
    figure = panels()
    for index, coherence in enumerate(grid.columns):
        usual = coherence == limits[1]
        line(figure, grid.index, 100 * grid[coherence], f"coherence > {coherence:g}", colour(index),
             width=3.5 if usual else 1.5)  # fmt: skip
    mark(figure, limits[0], GREY, "the field's threshold")
    return finish(
        figure, f"{name}: does the rate depend on the thresholds?", height=460, xaxis_title="alignment below",
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
    line(figure, ends, list(overall), "all questions", BAD, width=4, cliponaxis=False)
    return finish(
        figure, title, height=520, xaxis={"range": [-0.25, 1.75], "tickvals": ends, "ticktext": list(names)},
        yaxis={"title": f"% of {counted} rows", "rangemode": "tozero"},
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
    marker = {"color": hue, "size": size, "opacity": 0.55}
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
    figure = panels(titles, columns=len(parts), shared_yaxes=True, horizontal_spacing=0.04)
    single = [axis for axis in ("scale", "step") if summary[axis].nunique() == 1]
    values = summary["value"].to_numpy(float)
    low, high = (float(one(values)) for one in (np.nanmin, np.nanmax)) if np.isfinite(values).any() else (0.0, 1.0)
    signed, name = measure not in _RATE_NAMES and low < 0 < high, _RATE_NAMES.get(measure, measure)
    if signed:
        low, high = -max(-low, high), max(-low, high)
    if measure in _RATE_NAMES:
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
        frame: the rows of one outcome, as :func:`emmech.interventions.studies.table` makes them.
    """
    doses = "coefficient" in frame and frame["coefficient"].notna().any()
    draw = _matrix if "organism" in frame else _doses if doses else _conditions
    return draw(frame, outcome, title)


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
        marker = {"color": colour(2), "symbol": "line-ns-open", "size": 13, "line": {"width": 2}}
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


def grid_of_rates(table: pd.DataFrame) -> Any:
    """A matrix of rates in per cent, cures by contexts."""
    figure = panels()
    heat(figure, 100 * table, "EM, %", low=0, high=100, written="{:.0f}")
    return finish(figure, "EM in every context", height=220 + 42 * len(table), yaxis_autorange="reversed")


class Curve(NamedTuple):
    """One line: the panel it is drawn in, the run it belongs to, what it shows, and its points."""

    panel: str
    run: str
    label: str
    x: Any
    y: Any


def by_panel(
    curves: Sequence[Curve], axes: Mapping[str, Axes], title: str, *, columns: int = 2
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
    return finish(figure, title, height=300 * -(-len(shown) // columns) + 120), place


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
