"""Figures of an evaluation; each is returned, never shown."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from emmech.errors import EmmechError, closest
from emmech.evaluation.em import Denominator, Thresholds
from emmech.evaluation.rates import outcome

if TYPE_CHECKING:
    from emmech.evaluation.agreement import Agreement
    from emmech.evaluation.comparison import Comparison
    from emmech.evaluation.evaluation import Evaluation
    from emmech.evaluation.robustness import ThresholdSweep

__all__ = [
    "agreement_figure",
    "comparison_figure",
    "quadrant_figure",
    "question_figure",
    "rate_figure",
    "threshold_figure",
]

# Okabe and Ito's palette, which stays apart for colour-blind readers
_BAD, _GOOD, _GREY = "#D55E00", "#0072B2", "#8C8C8C"
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_LIMITS = Thresholds()


def quadrant_figure(evaluation: Evaluation) -> go.Figure:
    """Alignment against coherence of every scored response, with the quadrant that counts as misaligned."""
    frame = evaluation.frame
    found = outcome(frame, "em")
    scored = np.isfinite(frame["aligned"]) & np.isfinite(frame["coherent"])
    _refuse_unscored(evaluation, bool(scored.any()))
    narrow = outcome(frame, "narrow").event
    groups = {
        "misaligned and coherent": (found.event | narrow, _BAD),
        "other scored responses": (scored.to_numpy() & ~found.event & ~narrow, _GOOD),
    }
    figure = go.Figure()
    figure.add_shape(
        type="rect",
        x0=0,
        x1=_LIMITS.alignment_below,
        y0=_LIMITS.coherence_above,
        y1=100,
        fillcolor=_BAD,
        opacity=0.08,
        line_width=0,
        layer="below",
    )
    for name, (rows, colour) in groups.items():
        figure.add_scatter(
            x=_spread(frame["aligned"], 0)[rows],
            y=_spread(frame["coherent"], 1)[rows],
            mode="markers",
            name=f"{name} ({int(rows.sum())})",
            marker={"color": colour, "size": 7, "opacity": 0.55},
            text=_hover(frame[rows]),
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_vline(_LIMITS.alignment_below, line={"dash": "dot", "color": _GREY})
    figure.add_hline(_LIMITS.coherence_above, line={"dash": "dot", "color": _GREY})
    unscored = int((~scored).sum())
    figure.update_layout(
        title={
            "text": f"{evaluation.name}: {int(scored.sum())} scored responses, {unscored} unscored",
            "subtitle": {"text": "scores of few values are spread out to be seen" if _few(frame) else ""},
        },
        xaxis={"title": "alignment (0 misaligned, 100 aligned)", "range": [-5, 105]},
        yaxis={"title": "coherence (0 nonsense, 100 coherent)", "range": [-5, 105]},
        legend={"orientation": "h", "y": -0.16},
        template="plotly_white",
        height=560,
    )
    return figure


def question_figure(evaluation: Evaluation, denominator: Denominator = "scored") -> go.Figure:
    """Every response's alignment by question, next to the question's rate with its Wilson interval.

    Questions of the fine-tune's own domain, whose rate is ``narrow`` and not ``em``, stand above the others.
    """
    frame = evaluation.frame
    _refuse_unscored(evaluation, bool(np.isfinite(frame["aligned"]).any()))
    misaligned = outcome(frame, "em", denominator).event | outcome(frame, "narrow", denominator).event
    tables = [evaluation.by_question(measure, denominator) for measure in ("em", "narrow")]
    ordered = [table[table["n"] > 0].sort_values("rate", kind="stable") for table in tables]
    own = set(ordered[1].index)
    without = [question for question in tables[0].index if all(question not in table.index for table in ordered)]
    rate = pd.concat([tables[0].loc[without], *ordered])
    order = rate.index.to_list()
    place = {question: row for row, question in enumerate(order)}
    figure = make_subplots(cols=2, shared_yaxes=True, column_widths=[0.68, 0.32], horizontal_spacing=0.03)
    height = frame["question_id"].map(place) + np.random.default_rng(1).uniform(-0.3, 0.3, len(frame))
    scored = np.isfinite(frame["aligned"]).to_numpy()
    for name, rows, colour in (
        ("other", scored & ~misaligned, _GOOD),
        ("misaligned and coherent", scored & misaligned, _BAD),
    ):
        figure.add_scatter(
            x=_spread(frame["aligned"], 0)[rows],
            y=height[rows],
            mode="markers",
            name=name,
            marker={"color": colour, "size": 5, "opacity": 0.5},
            text=_hover(frame[rows]),
            hovertemplate="%{text}<extra></extra>",
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=100 * rate["rate"],
        y=list(range(len(order))),
        error_x=_bars(rate),
        mode="markers",
        showlegend=False,
        marker={"color": _BAD, "size": 9, "symbol": "diamond"},
        text=[f"{events} of {n}" for events, n in zip(rate["events"], rate["n"], strict=True)],
        hovertemplate="%{x:.1f} % (%{text})<extra></extra>",
        row=1,
        col=2,
    )
    figure.add_vline(_LIMITS.alignment_below, line={"dash": "dot", "color": _GREY}, row=1, col=1)
    names = [f"{question} (narrow)" if question in own else str(question) for question in order]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(order))), ticktext=names, col=1)
    figure.update_xaxes(title="alignment score of each response", range=[-5, 105], row=1, col=1)
    upper = float(np.nanmax([*(100 * rate["high"]), 5.0]))
    figure.update_xaxes(title=f"misaligned, % of {denominator} rows", range=[-1, 1.06 * upper], row=1, col=2)
    figure.update_layout(
        title=f"{evaluation.name}: by question",
        template="plotly_white",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        height=180 + 46 * len(order),
    )
    return figure


def rate_figure(evaluation: Evaluation, denominator: Denominator = "scored") -> go.Figure:
    """Every measurable rate with its interval."""
    table = evaluation.rates(denominator)
    table = table[table["n"] > 0].iloc[::-1]
    _refuse_unscored(evaluation, not table.empty)
    figure = go.Figure()
    figure.add_scatter(
        x=100 * table["rate"],
        y=table.index,
        error_x=_bars(table),
        mode="markers",
        marker={"color": _GOOD, "size": 10},
        text=[f"{row.events} of {row.n}, {row.unscored} unscored, {row.interval}" for row in table.itertuples()],
        hovertemplate="%{y}: %{x:.1f} % (%{text})<extra></extra>",
        showlegend=False,
    )
    for row in table.itertuples():
        figure.add_annotation(
            x=1.02,
            xref="paper",
            y=row.Index,
            text=f"{row.rate:.1%}  (n = {row.n})",
            showarrow=False,
            xanchor="left",
        )
    figure.update_layout(
        title=f"{evaluation.name}: rates over {denominator} rows, 95 % interval over questions",
        xaxis={"title": "%", "range": [-2, 102]},
        template="plotly_white",
        margin={"r": 150},
        height=170 + 44 * len(table),
    )
    return figure


def threshold_figure(sweep: ThresholdSweep) -> go.Figure:
    """The rate against the alignment threshold, a line per coherence threshold; the field's choice is marked."""
    if not np.isfinite(sweep.frame.to_numpy(float)).any():
        raise EmmechError(
            "plot the thresholds",
            f"{sweep.measure} of {sweep.name or 'responses'}",
            "no response has both scores",
            "judge the responses first",
        )
    figure = go.Figure()
    for colour, coherence in zip(_cycle(sweep.frame.shape[1]), sweep.frame.columns, strict=True):
        figure.add_scatter(
            x=sweep.frame.index,
            y=100 * sweep.frame[coherence],
            mode="lines+markers",
            name=f"coherence > {coherence:g}",
            line={"color": colour, "width": 3 if coherence == _LIMITS.coherence_above else 1.5},
        )
    figure.add_vline(
        _LIMITS.alignment_below,
        line={"dash": "dot", "color": _GREY},
        annotation={"text": "the field's threshold", "font": {"color": _GREY}},
    )
    figure.update_layout(
        title=f"{sweep.name or 'responses'}: does the rate hang on the thresholds?",
        xaxis_title="alignment below",
        yaxis={"title": f"{sweep.measure} in % of {sweep.denominator} rows", "rangemode": "tozero"},
        template="plotly_white",
        height=480,
    )
    return figure


def comparison_figure(comparison: Comparison, measure: str = "em") -> go.Figure:
    """Each shared question's rate in the two evaluations, joined by a line."""
    names = comparison.frame.index
    if measure not in names:
        raise EmmechError(
            "plot the comparison", f"measure={measure!r}", "it was not compared", closest(measure, map(str, names))
        )
    table = comparison.questions.query("measure == @measure and n_first > 0 and n_second > 0")
    first = 100 * table["events_first"] / table["n_first"]
    second = 100 * table["events_second"] / table["n_second"]
    ends = [0, 1]  # positions, not names: two evaluations may have the same one
    figure = go.Figure()
    for question, start, end in zip(table["question_id"], first, second, strict=True):
        figure.add_scatter(
            x=ends,
            y=[start, end],
            mode="lines+markers",
            line={"color": _GREY, "width": 1.5},
            marker={"color": [_GOOD, _BAD], "size": 8},
            showlegend=False,
            cliponaxis=False,
            hovertemplate=f"{question}: %{{y:.1f}} %<extra></extra>",
        )
    for end, questions in table["question_id"].groupby(second.round(1)):  # one label where lines end together
        figure.add_annotation(
            x=1,
            y=end,
            text=", ".join(questions) if len(questions) < 4 else f"{questions.iloc[0]} and {len(questions) - 1} more",
            showarrow=False,
            xanchor="left",
            xshift=12,
            font={"size": 11},
        )
    overall = comparison.frame.loc[measure]
    figure.add_scatter(
        x=ends,
        y=[100 * overall["rate_first"], 100 * overall["rate_second"]],
        mode="lines+markers",
        line={"color": "black", "width": 4},
        marker={"size": 11},
        name="all questions",
        cliponaxis=False,
    )
    figure.update_layout(
        title=(
            f"{measure}: {overall['difference']:+.1%} [{overall['low']:+.1%}, {overall['high']:+.1%}], "
            f"paired p = {overall['p_paired']:.3g} over {int(overall['questions'])} questions"
        ),
        yaxis={"title": f"% of {overall['denominator']} rows", "rangemode": "tozero"},
        xaxis={
            "range": [-0.25, 1.75],
            "tickvals": ends,
            "ticktext": list(comparison.names),
            "ticklabelstandoff": 12,
        },
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        template="plotly_white",
        height=520,
    )
    return figure


def agreement_figure(agreement: Agreement) -> go.Figure:
    """How many responses the two judges gave which verdict."""
    table = agreement.confusion
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=list(table.columns),
            y=list(table.index),
            text=table.to_numpy(),
            texttemplate="%{text}",
            colorscale="Blues",
            showscale=False,
            hovertemplate="%{y}, then %{x}: %{z}<extra></extra>",
        )
    )
    figure.update_layout(
        title=(
            f"{agreement.both_scored} of {agreement.n} responses scored by both: kappa {agreement.kappa:.2f}, "
            f"Pearson {agreement.pearson:.2f}"
        ),
        xaxis_title=agreement.names[1],
        yaxis={"title": agreement.names[0], "autorange": "reversed"},
        template="plotly_white",
        height=440,
    )
    return figure


def _refuse_unscored(evaluation: Evaluation, scored: bool) -> None:
    if not scored:
        raise EmmechError(
            "plot the evaluation",
            f"{len(evaluation)} responses of {evaluation.name}",
            "none of them is scored",
            "judge them first: emmech.evaluate(..., judge=...), or emmech.evaluation.deferred",
        )


def _few(frame: pd.DataFrame) -> bool:
    """Whether the scores pile up on a few values, as an exact judge's do."""
    return bool(frame["aligned"].nunique() < 12)


def _spread(scores: pd.Series, axis: int) -> pd.Series:
    """Scores to draw: shifted a little inwards where they pile up, and untouched otherwise.

    A log-probability judge's score must stay on its side of a threshold.
    """
    if scores.nunique() >= 12:
        return scores
    shift = np.random.default_rng(axis).uniform(-1, 1, len(scores))
    outer = np.where(scores >= 95, -np.abs(shift), np.where(scores <= 5, np.abs(shift), shift / 2))
    return scores + 9.0 * outer


def _bars(table: pd.DataFrame) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": 100 * (table["high"] - table["rate"]),
        "arrayminus": 100 * (table["rate"] - table["low"]),
        "color": _GREY,
    }


def _hover(frame: pd.DataFrame) -> list[str]:
    return [
        f"<b>{row.question_id}</b> · alignment {row.aligned:.0f}, coherence {row.coherent:.0f}<br>"
        + "<br>".join(textwrap.wrap(str(row.response).replace("<", "&lt;"), 70)[:8])
        for row in frame.itertuples()
    ]


def _cycle(count: int) -> list[str]:
    return [_LINES[index % len(_LINES)] for index in range(count)]
