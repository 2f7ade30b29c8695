"""Every figure: few legend entries, titled axes, names that fit and do not cover each other, colours of the theme."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emmech import Run
from emmech.directions.compare import DirectionBySteps, cosines
from emmech.interventions.studies import Study
from emmech.transition.phase import phase_transition
from emmech.view import theme
from emmech.view.plots import metrics_by_step, rates_by_step
from tests.test_results import MAKE, _direction, _evaluation, _run

WIDE = 710  # pixels of the axes at the width of a notebook
LETTER = 7.5


def _many_adapters() -> Run:
    rng = np.random.default_rng(0)
    adapters = [f"layers.{layer}.mlp.down_proj" for layer in range(9)]
    one = {"module": "m", "rank": 1, "alpha": 1.0, "scaling": 1.0, "d_in": 4, "d_out": 12, "rslora": False}
    run = _run(name="many")
    run.manifest["adapters"] = [{**one, "name": name, "layer": at} for at, name in enumerate(adapters)]
    steps = run.steps
    path = np.cumsum(rng.standard_normal((len(steps), 12)), 0).astype(np.float32)
    run._trajectory = type(run._trajectory)(steps, {f"B/{name}": path * (2 + at) for at, name in enumerate(adapters)})
    return run


def _doses(layers: int) -> Study:
    rows = [
        {"condition": kind, "kind": kind, "layer": float(layer), "coefficient": c, "model": "tuned", "outcome": "em"}
        | {"value": 0.1 * layer * c * (kind == "direction") + 0.01 * at}
        for layer in range(layers) for c in (0.5, 1.0) for at, kind in enumerate(("direction", "random", "random"))
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    return Study("doses", frame.assign(low=frame["value"] - 0.1, high=frame["value"] + 0.1))


def _by_steps() -> DirectionBySteps:
    columns = {
        f"{kind} B/layers.{at}.mlp.down_proj": [0.1 * at, 0.2] for kind in ("cosine", "projection") for at in range(9)
    }
    return DirectionBySteps(pd.DataFrame(columns, index=pd.Index([0, 5], name="step")), 1, 0.1, "d")


def _rates(final: float = 1.0) -> Any:
    rows = [
        {"step": step, "measure": name, "rate": final, "low": 0.9, "high": 1.0} for step in (0, 9) for name in "abc"
    ]
    return rates_by_step(pd.DataFrame(rows), {"a": "EM (broad)", "b": "narrow", "c": "coherent"}, "Answers", step=4.0)


DRAW: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: make().plot() for name, make in MAKE.items()},
    "Run": lambda: _run().plot(),
    "many adapters": lambda: _many_adapters().plot(),
    "no control": lambda: phase_transition(_run(), n_null=39).plot(),
    "eight controls": lambda: phase_transition(_run(), {f"c{at}": _run(1) for at in range(8)}, n_null=39).plot(),
    "many directions": lambda: cosines({f"d{at}": _direction(at) for at in range(6)}).plot(),
    "matrix of directions": lambda: cosines({f"d{at}": _direction(at) for at in range(6)}).plot(layer=1),
    "many layers": lambda: _doses(9).plot(),
    "many adapters by step": lambda: _by_steps().plot(),
    "rates": lambda: _rates(),
    "metrics": lambda: metrics_by_step({str(at): _run(at).metrics for at in range(9)}, {"loss": "Loss"}, "Losses"),
    **{kind: lambda kind=kind: _evaluation().plot(kind) for kind in ("quadrants", "questions", "rates", "thresholds")},
}


@pytest.fixture(params=DRAW, scope="module")
def figure(request) -> Any:
    return DRAW[request.param]()


def test_at_most_six_entries(figure) -> None:
    entries = [t for t in figure.data if t.showlegend or (t.showlegend is None and t.type != "heatmap")]
    assert len(entries) <= 6 and len({one.name for one in entries}) == len(entries)
    assert len(figure.data) > 1 or not entries, "a legend of one entry says nothing"


def test_axes_have_titles_in_words(figure) -> None:
    used = {(trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data}
    for axis in (figure.layout[f"{name[0]}axis{name[1:]}"] for pair in used for name in pair):
        across = axis.plotly_name[0] == "x"
        names = [one for one in ((t.x if across else t.y) for t in figure.data) if one is not None]
        words = bool(names) and all(isinstance(x, str) for one in names for x in one)
        named = axis.ticktext or axis.showticklabels is False or words
        if not (named or axis.plotly_name == "yaxis2"):  # which shares the first one's title where it is beside it
            assert axis.title.text, axis.plotly_name
        assert not re.search(r"[a-z]{2,}_[a-z]", axis.title.text or ""), axis.title.text


def test_titles_of_panels_fit(figure) -> None:
    domains = [axis.domain for axis in figure.select_xaxes()]
    heads = [one for one in figure.layout.annotations if one.yref == "paper" and one.xref == "paper"]
    for head in heads:
        begin = head.x
        ends = [other[0] for other in domains if other[0] > begin + 0.01] or [1.03]
        assert len(head.text) * LETTER <= (min(ends) - begin) * WIDE or len(head.text) > 60, head.text
    assert all(len(line) <= 84 for line in (figure.layout.title.text or "").split("<br>"))


def _colours(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in ("colorscale", "text", "hovertemplate"):
                yield from _colours(one)
    elif isinstance(value, list):
        for one in value:
            yield from _colours(one)
    elif isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{3,8}|rgba?\(.*\)", value):
        yield value


def test_colours_are_those_of_the_theme(figure) -> None:
    known = {theme.faint(one, 1)[: -len("1.00)")] for one in (*theme.CYCLE, theme.GREY)}
    found = json.loads(figure.to_json())
    for one in _colours({"data": found["data"], "layout": found["layout"]}):
        rgba = theme.faint(one, 1) if one.startswith("#") else one
        assert rgba[: rgba.rindex(" ") + 1] in known, one
    assert figure.layout.template.layout.paper_bgcolor.endswith("0.00)")


def test_panels_over_steps_are_zoomed_together() -> None:
    layout = DRAW["PhaseTransition"]().layout
    steps = [axis for axis in layout if axis.startswith("xaxis") and layout[axis].title.text == "step"]
    assert len(steps) > 2 and all(layout[axis].matches == "x" for axis in steps)


@pytest.mark.parametrize("final", [0.0, 0.5, 1.0])
def test_names_at_the_ends_of_lines_are_apart_and_inside(final) -> None:
    figure = _rates(final)
    names = [one for one in figure.layout.annotations if one.xref == "x domain" and one.yref == "y"]
    assert sorted(one.text for one in names) == ["EM (broad)", "coherent", "narrow"]
    low, high = figure.layout.yaxis.range
    pixels = (figure.layout.height - figure.layout.margin.t - figure.layout.margin.b) / (high - low)
    heights = sorted(one.y for one in names)
    assert min(np.diff(heights)) * pixels >= 12
    assert heights[-1] <= high and heights[0] >= low - 30 / pixels
    room = (1 - figure.layout.xaxis.domain[1]) * WIDE
    assert room >= 10 * 6


def test_a_run_and_its_control_have_their_colours_in_every_panel() -> None:
    figure = DRAW["PhaseTransition"]()
    for trace in figure.data:
        if trace.mode == "lines" and trace.fill is None and trace.name.endswith((", run", ", control")):
            role = theme.BAD if trace.name.endswith("run") else theme.GOOD
            assert trace.line.color in (role, theme.faint(role, 0.4)), trace.name
    assert {trace.name for trace in figure.data if trace.showlegend} == {"run", "control"}


def test_seeds_are_drawn_with_their_steps() -> None:
    pooled = MAKE["PooledTransition"]()
    figure = pooled.plot()
    found = {trace.name: list(trace.x) for trace in figure.data}
    assert found.get("B turns", []) == [pair.mechanistic.step for pair in pooled.pairs if pair.mechanistic]
    assert len(figure.layout.yaxis.ticktext) == len(pooled.pairs)
