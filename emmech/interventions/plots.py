"""Figures of intervention studies."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from emmech.interventions.studies import Study

__all__ = ["study_figure"]

_COLOURS = ("#b3261e", "#1f6f8b", "#7a5195", "#c98a00", "#3b7a57", "#8c564b")
_GREY = "#9aa0a6"


def study_figure(study: Study, outcome: str) -> Any:
    """Lines over the coefficient, a matrix of organisms by directions, or bars, whichever the study is."""
    frame = study.frame[study.frame["outcome"] == outcome]
    if "organism" in frame:
        return _matrix(study, frame, outcome)
    if "coefficient" in frame and frame["coefficient"].notna().any():
        return _doses(study, frame, outcome)
    return _bars(study, frame, outcome)


def _doses(study: Study, frame: pd.DataFrame, outcome: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    frame = frame[frame["model"] == frame["model"].iloc[0]]
    plain = frame[frame["kind"] == "untouched"]
    layers = sorted(frame["layer"].dropna().unique())
    for index, layer in enumerate(layers):
        colour = _COLOURS[index % len(_COLOURS)]
        own = frame[(frame["layer"] == layer) & (frame["kind"] == "direction")].sort_values("coefficient")
        figure.add_scatter(
            x=own["coefficient"],
            y=own["value"],
            error_y={"array": own["high"] - own["value"], "arrayminus": own["value"] - own["low"]},
            name=f"layer {layer:.0f}",
            mode="lines+markers",
            line={"color": colour},
        )
        random = frame[(frame["layer"] == layer) & (frame["kind"] == "random")]
        if len(random):
            mean = random.groupby("coefficient")["value"].mean()
            figure.add_scatter(
                x=mean.index,
                y=mean,
                name=f"random, layer {layer:.0f}",
                mode="lines",
                line={"color": colour, "dash": "dot"},
            )
    if len(plain):
        figure.add_hline(
            y=float(plain["value"].iloc[0]),
            line_color=_GREY,
            annotation_text="untouched",
            annotation_position="bottom right",
        )
    return _laid_out(figure, study, "coefficient", outcome)


def _bars(study: Study, frame: pd.DataFrame, outcome: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for model, colour in (("tuned", _COLOURS[0]), ("base", _COLOURS[1])):
        mine = frame[frame["model"] == model]
        own = mine[mine["kind"] != "random"]
        if own.empty:
            continue
        figure.add_bar(
            x=own["condition"],
            y=own["value"],
            error_y={"array": own["high"] - own["value"], "arrayminus": own["value"] - own["low"]},
            name="fine-tuned" if model == "tuned" else "base (adapter off)",
            marker_color=colour,
        )
        random = mine[mine["kind"] == "random"]
        if len(random) and model == "tuned":
            figure.add_scatter(
                x=random["condition"],
                y=random["value"],
                mode="markers",
                name="random directions",
                marker={"color": "black", "symbol": "line-ew-open", "size": 14},
            )
    return _laid_out(figure, study, "", outcome).update_layout(barmode="group")


def _matrix(study: Study, frame: pd.DataFrame, outcome: str) -> Any:
    import plotly.graph_objects as go

    frame = frame[(frame["model"] == "tuned") & frame["kind"].isin(["untouched", "direction"])]
    organisms, columns = list(dict.fromkeys(frame["organism"])), list(dict.fromkeys(frame["condition"]))
    grid = frame.pivot_table(index="organism", columns="condition", values="value").loc[organisms, columns]
    values = grid.to_numpy(float)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=columns,
            y=organisms,
            text=np.vectorize(lambda v: f"{v:.3g}")(values),
            texttemplate="%{text}",
            colorscale="Reds",
            zmin=min(0.0, float(np.nanmin(values))),
            colorbar={"title": outcome},
        )
    )
    figure.update_yaxes(title="organism", autorange="reversed")
    return _laid_out(figure, study, "ablated direction", "organism")


def _laid_out(figure: Any, study: Study, x: str, y: str) -> Any:
    return figure.update_layout(
        title={"text": "<br>".join(wrap(study.title, 72)), "font": {"size": 15}, "y": 0.97},
        margin={"t": 100},
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
