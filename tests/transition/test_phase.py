"""phase_transition as a user meets it: results, controls, odd trajectories and errors."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import make_path

import emmech
from emmech import EmmechError, Run, phase_transition
from emmech.transition.detectors import Detector, Trajectory
from emmech.transition.result import Lag, PhaseTransition, PooledTransition, Side, _order
from emmech.transition.turn import Location
from emmech.transition.verdict import flip_interval, pooled, sign_flip_p, verdict

COLUMNS = {"kind", "step", "low", "high", "strength", "p_value", "high_means", "null_model"}


def run_of(path: np.ndarray, steps: Any = None, metrics: Any = None, name: str = "made") -> Run:
    steps = np.arange(len(path)) if steps is None else steps
    return Run.from_arrays(steps, B=path.astype(np.float32), metrics=metrics, name=name)


def several(paths: list[np.ndarray]) -> Any:
    """A run of several adapters, as far as phase_transition looks at one."""
    names = [f"layers.{i}.mlp.down_proj" for i in range(len(paths))]
    return SimpleNamespace(
        name="several",
        steps=np.arange(len(paths[0])),
        adapters=tuple(SimpleNamespace(name=name) for name in names),
        B=lambda name: paths[names.index(name)],
        metrics=None,
        projection=None,
    )


def test_a_turn_is_reported_in_every_form() -> None:
    path, turn = make_path("turn", 800_001)
    t = phase_transition(run_of(path))
    assert t.mechanistic.step == turn and t.mechanistic.low <= turn <= t.mechanistic.high
    assert set(t.detectors.columns) >= COLUMNS
    assert list(t.detectors.index) == ["turn", "local-cosine", "gradient-norm"]
    row = t.detectors.loc["turn"]
    assert row.p_value < 0.05 and row.strength == pytest.approx(60, abs=8)
    assert t.detectors.strength["local-cosine"] > -0.75 and np.isnan(t.detectors.p_value["local-cosine"])
    assert "a picture" in t.detectors.null_model["local-cosine"]
    for text in (t.summary(), repr(t), t._repr_html_()):
        assert f"step {turn}" in text
    assert "180 a reversal" in t.detectors.high_means["turn"]
    assert not t.behavioural and "no margins" in t.behavioural.reason and not t.lag
    assert t.verdict.control is None and t.verdict.bends and t.verdict.learns_more.holds is None
    assert "without a control" in t.summary()


def test_the_same_seed_gives_the_same_numbers() -> None:
    run = run_of(make_path("turn", 800_002)[0])
    first, second = (phase_transition(run, seed=3, n_null=39).detectors for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_optimiser_steps_need_not_be_evenly_recorded() -> None:
    rng = np.random.default_rng(800_003)
    steps = np.cumsum(rng.integers(1, 20, 120))
    gap = np.diff(steps)
    u = np.zeros((119, 64))
    u[:50, 0], u[50:, 0], u[50:, 1] = 1, 0.5, np.sqrt(0.75)
    noise = 3 * np.sqrt(gap)[:, None] * rng.standard_normal((119, 64)) / 8
    path = np.vstack([np.zeros(64), np.cumsum(gap[:, None] * u + noise, axis=0)])
    assert abs(np.searchsorted(steps, phase_transition(run_of(path, steps)).mechanistic.step) - 50) <= 1


@pytest.mark.parametrize("kind", ["straight", "walk"])
def test_without_a_turn_the_answer_is_not_measurable(kind: str) -> None:
    t = phase_transition(run_of(make_path(kind, 800_004)[0]))
    assert t.mechanistic.step is None and str(t.mechanistic).startswith("not measurable")
    assert t.detectors.p_value["turn"] > 0.05


def with_losses(path: np.ndarray, fall: float, name: str, peak: int = 54) -> Run:
    """A run whose held-out loss falls by so much, with a peak of the gradient norm."""
    s = np.arange(len(path))
    noise = np.random.default_rng(peak).standard_normal(len(path))
    gradient = np.exp(0.1 * noise + 1.5 * np.exp(-(((s - peak) / 10) ** 2)))
    metrics = pd.DataFrame({"grad_norm": gradient, "held_out_loss": 1 - fall * s / len(s)}, index=s)
    return run_of(path, metrics=metrics, name=name)


def test_a_control_that_turns_as_well_is_said_to() -> None:
    run, control = (run_of(make_path("turn", s)[0], name=n) for s, n in ((800_005, "bad"), (800_006, "good")))
    t = phase_transition(run, control)
    assert t.verdict.bends and t.verdict.learns_more.holds is False and not t.verdict.goes_with_misalignment
    assert t.verdict.learns_more.low <= 0 <= t.verdict.learns_more.high
    assert "of the control: it bends" in t.summary() and "no held-out loss was recorded" in t.summary()
    assert set(t.to_frame().role) == {"run", "control"}


def test_the_three_statements_are_apart() -> None:
    bad, good = with_losses(make_path("turn", 800_007)[0], 0.4, "bad"), run_of(make_path("straight", 800_008)[0] / 10)
    t = phase_transition(bad, {"good": with_losses(make_path("straight", 800_008)[0] / 10, 0.0, "g"), "style": good})
    inert, learns = t.verdicts
    assert (inert.control, learns.control) == ("good", "style") and t.verdict is learns
    assert inert.inert is True and "good is inert" in inert.note and learns.inert is None
    assert inert.bends and inert.learns_more and inert.goes_with_misalignment
    # six records on either side of a turn of 60 degrees, less a tenth of twelve straight on
    assert inert.learns_more.value == pytest.approx(6 * 3**0.5 - 1.2, abs=0.7)
    elsewhere = phase_transition(with_losses(make_path("turn", 800_007)[0], 0.4, "bad", peak=100), good).verdict
    assert elsewhere.goes_with_misalignment and elsewhere.goes_with_misalignment.high < 0, "the peak decides nothing"


def test_a_run_that_learned_nothing_does_not_bend() -> None:
    path = make_path("turn", 800_007)[0]
    t = phase_transition(with_losses(path, 0.019, "inert"), with_losses(path, 0.0, "control"))
    assert t.detectors.p_value["turn"] < 0.05 and t.run.inert and not t.run.turns
    assert t.verdict.bends.holds is None and t.verdict.goes_with_misalignment.holds is False
    assert "never fell by 2%" in t.verdict.bends.text and "never fell by 2%" in str(t.mechanistic)
    assert "of the control: it bends" not in t.verdict.note and t.verdict.inert is True
    several = phase_transition([with_losses(path, fall, f"r{fall}") for fall in (0.0, 0.4)], n_null=39).verdict
    assert several.bends.value == 0.5


def test_a_loss_that_fell_and_rose_again_was_learned() -> None:
    run = with_losses(make_path("turn", 800_007)[0], 0.4, "overfitted")
    losses = run.metrics["held_out_loss"]
    risen = run_of(
        np.asarray(run.B(run.adapters[0].name)),
        name="r",
        metrics=run.metrics.assign(
            held_out_loss=[
                *losses[: len(losses) // 2],
                *np.linspace(losses.iloc[len(losses) // 2], 1.2, len(losses) - len(losses) // 2),
            ]
        ),
    )
    t = phase_transition(risen)
    assert t.run.fall < 0 and t.run.learned == pytest.approx(0.2, abs=0.01) and t.verdict.bends


def test_a_run_without_a_turn_has_nothing_to_go_with() -> None:
    t = phase_transition(run_of(make_path("straight", 800_009)[0]), run_of(make_path("turn", 800_010)[0]))
    assert t.verdict.bends.holds is False and "of the control: it bends" in t.verdict.note
    assert not t.verdict.goes_with_misalignment


def test_seeds_are_the_unit() -> None:
    runs = [with_losses(make_path("turn", 803_000 + i)[0], 0.4, f"bad {i}") for i in range(6)]
    controls = [with_losses(make_path("straight", 804_200 + i)[0] / 3, 0.3, f"good {i}", peak=90) for i in range(6)]
    t = phase_transition(runs, control=controls, n_null=39)
    found = t.verdict
    assert found.pairs == 6 and found.inert is False and all(found.statements)
    assert found.learns_more.p_value == found.goes_with_misalignment.p_value == pytest.approx(2 / 2**6)
    assert found.learns_more.low > 0 and len(t.to_frame()) == 18 and "over 6 pairs" in repr(t)
    few = phase_transition(runs[:4], control=controls[:4], n_null=39).verdict
    assert few.learns_more.p_value == 0.125 and few.learns_more.holds is False
    assert "6 pairs would be needed" in few.learns_more.text and "not decided" in few.learns_more.text
    again = PooledTransition.load(t.save(tmp := Path(tempfile.mkdtemp()) / "kept"))
    assert str(again.verdict) == str(found) and tmp.exists()


@pytest.mark.parametrize("control", [[1], "list", {"good": "list"}])
def test_runs_and_controls_that_do_not_pair_are_refused(control: Any) -> None:
    run = run_of(make_path("turn", 1)[0])
    given = [run] if control == "list" else {"good": [run]} if isinstance(control, dict) else [run, run, run]
    with pytest.raises(EmmechError, match="in pairs"):
        phase_transition([run, run], control=given)
    with pytest.raises(EmmechError, match="in pairs"):
        phase_transition(run, control=[run, run])


P = st.floats(0, 1, allow_nan=False)
NUMBER = st.floats(-1e3, 1e3, allow_nan=False)


def a_side(name: str, p: float, numbers: list[float], width: float) -> Side:
    """What a run could have measured, whatever the numbers."""
    step, low, high, peak, before, after, reach, error, fall = numbers
    turn = Detector("turn", "direction", step, min(low, step), max(high, step), 60.0, p, "", "")
    gradient = Detector("gradient-norm", "gradient", peak, peak - abs(before), peak + abs(after), 2.0, np.nan, "", "")
    path = Trajectory(
        np.arange(3), np.ones(3), np.ones((3, 1)), np.ones(1), location=Location(1, 0, 2, 0, 60.0, 50.0, 70.0),
        width_share=width, reach=(abs(reach), abs(error)),
    )  # fmt: skip
    return Side(name, path, (turn, gradient), None, {}, None, fall)


@pytest.mark.parametrize(
    ("p", "width", "holds"), [(0.01, 0.2, True), (0.01, 0.25, True), (0.01, 0.3, False), (0.06, 0.2, False)]
)
def test_a_bend_goes_with_misalignment_where_it_is_significant_and_short(p: float, width: float, holds: bool) -> None:
    run, control = a_side("bad", p, [50.0] * 9, width), a_side("style", 0.01, [50.0] * 9, 0.4)
    assert verdict(run, control).goes_with_misalignment.holds is holds
    assert not verdict(control, run).goes_with_misalignment


@given(P, st.floats(0, 1), st.lists(NUMBER, min_size=18, max_size=18), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_first_sentences_contradict_nothing(
    p: float, width: float, numbers: list[float], wanders: bool, controlled: bool
) -> None:
    run, control = a_side("bad", p, numbers[:9], width), a_side("good", 1 - p, numbers[9:], 1 - width)
    if wanders:
        run = replace(run, rows=(replace(run.rows[0], note="it wanders"), *run.rows[1:]))
    t = PhaseTransition(run, (control,) if controlled else ())
    text = repr(t)
    headline = text.splitlines()[0]
    assert headline.startswith("Yes, ") == (p < 0.05 and width <= 0.5) == bool(t.mechanistic)
    assert headline.startswith("No turn ") == (p >= 0.05)
    assert f"p = {p:.2g}" in headline
    if t.mechanistic:
        assert f"step {t.mechanistic.step} (95 % interval {t.mechanistic.low} to {t.mechanistic.high}" in headline
    assert ("without a control" in t.summary()) == (not controlled)
    assert ("compare with a control" in text + t.summary()) == (not controlled)
    assert ("3 records are few" in text) == (p >= 0.05)
    assert ("drifts slowly" in text + t.summary()) == (wanders and bool(t.mechanistic))
    if controlled:
        assert t.verdict.of_control is not None and t.verdict.of_control.text in text
        assert ("learned nothing" in text) == (t.verdict.inert is True)
        assert ("takes six pairs" in t.summary()) and all(one.text in text for one in t.verdict.statements[1:])
    assert headline in unescape(t._repr_html_()).replace("\xa0", " ")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(2, 9, "turn before the behaviour"), (-9, -2, "behaviour changes before"), (-2, 9, "is not decided")],
)
def test_which_comes_first_is_said_where_the_interval_tells(low: float, high: float, said: str) -> None:
    assert said in _order(Lag((low + high) / 2, low, high, ""))


@given(st.lists(st.tuples(P, P, st.lists(NUMBER, min_size=18, max_size=18), P), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_no_sentence_contradicts_its_p_value(drawn: list[tuple[float, float, list[float], float]]) -> None:
    runs = [a_side("bad", p, numbers[:9], width) for p, _, numbers, width in drawn]
    controls = [a_side("good", p, numbers[9:], 1 - width) for _, p, numbers, width in drawn]
    single = [(verdict(*pair), pair[1]) for pair in zip(runs, controls, strict=True)]
    rest = (pooled(runs, controls), pooled(runs, None), verdict(runs[0], None))
    for found, control in (*single, *((one, None) for one in rest)):
        for one in found.statements:
            open_ = any(words in one.text for words in ("not decided", "no bend", "not measurable", "not tested"))
            if np.isfinite(one.p_value):
                assert open_ == (one.p_value >= 0.05), one
                assert f"p = {one.p_value:.2g}" in one.text
                assert one.holds is False if one.p_value >= 0.05 else one.holds is (one.value > 0)
            else:
                assert open_, one
            if one.name == "learns more" and np.isfinite(one.p_value) and one.p_value < 0.05:
                assert ("less far" in one.text) == (one.value < 0)
            if np.isfinite(one.p_value) and one.name != "bends" and one.low < one.high:
                assert (one.p_value < 0.05) == (one.low > 0 or one.high < 0), one
        if control is not None:
            assert ("of the control: it bends" in found.note) == (control.rows[0].p_value < 0.05)
        assert ("is inert" in found.note) == (found.inert is True)


def test_an_interval_excludes_zero_where_the_test_does() -> None:
    values = np.array([0.5, 1.0, 1.0, 1.0, 59.0, 5e-5])  # the smallest is below the accuracy of the interval's ends
    for side in (1, -1):
        low, high = flip_interval(side * values)
        assert sign_flip_p(side * values) < 0.05 and (low > 0 if side > 0 else high < 0)


def test_metrics_give_gradient_peak_behaviour_and_lag() -> None:
    path, turn = make_path("turn", 800_011)
    rng = np.random.default_rng(800_011)
    s = np.arange(120)
    metrics = pd.DataFrame(
        {
            "grad_norm": np.exp(0.15 * rng.standard_normal(120) + 1.5 * np.exp(-(((s - 45) / 14) ** 2))),
            "margin_narrow": 1 / (1 + np.exp(-(s - 70) / 5)) + 0.02 * rng.standard_normal(120),
            "margin_broad": 0.4 / (1 + np.exp(-(s - 85) / 5)) + 0.02 * rng.standard_normal(120),
        },
        index=s,
    )
    metrics.loc[s % 4 != 0, ["margin_narrow", "margin_broad"]] = np.nan
    t = phase_transition(run_of(path, metrics=metrics))
    assert abs(t.detectors.step["gradient-norm"] - 45) <= 8 and t.detectors.strength["gradient-norm"] > 2
    assert np.isnan(t.detectors.p_value["gradient-norm"])
    assert "all trained parameters" in t.detectors.note["gradient-norm"]
    assert t.behavioural.step == pytest.approx(85, abs=3)
    assert t.detectors.step["margin-narrow"] == pytest.approx(70, abs=3)
    assert t.lag.steps == pytest.approx(85 - turn, abs=4) and t.lag.low < t.lag.steps < t.lag.high


def test_rank_above_one_turns_as_one_path_of_all_columns() -> None:
    columns = [make_path("turn", 800_012 + i, angle=45.0)[0] for i in range(4)]
    b = np.stack([column[:, np.random.default_rng(i).permutation(64)] for i, column in enumerate(columns)], axis=-1)
    t = phase_transition(run_of(b))
    assert abs(t.mechanistic.step - 54) <= 1 and t.detectors.p_value["turn"] < 0.05


@pytest.mark.parametrize("kind", ["straight", "walk"])
def test_paths_of_rank_four_without_a_turn_are_rarely_called(kind: str) -> None:
    called = 0
    for i in range(20):
        columns = [make_path(kind, 801_000 + 4 * i + j, steps=80)[0] for j in range(4)]
        b = np.stack([columns[0], columns[1][:, ::-1], *columns[2:]], axis=-1)
        called += phase_transition(run_of(b), n_null=39).detectors.p_value["turn"] < 0.05
    assert called <= 3


def test_adapters_that_rearrange_raise_comp_and_parallel_ones_do_not() -> None:
    rng = np.random.default_rng(800_020)
    one, two = np.eye(64)[:2]
    early, late = np.stack([one, one, two]), np.stack([one, two, two])  # another pair agrees
    steps = np.where(np.arange(120)[None, :, None] < 50, early[:, None], 3 * late[:, None])
    rearranged = np.cumsum(steps + 0.5 * rng.standard_normal(steps.shape) / 8, axis=1)
    t = phase_transition(several(list(rearranged)))
    assert t.detectors.low["comp"] <= 60 and t.detectors.high["comp"] >= 50
    straight = [make_path("straight", 800_021 + i)[0][:, rng.permutation(64)] for i in range(3)]
    parallel = phase_transition(several(straight)).detectors
    assert parallel.strength["comp"] < 0.5 * t.detectors.strength["comp"] and np.isnan(parallel.p_value["comp"])
    steps_centred = phase_transition(several(straight), centre="steps", n_null=39)
    assert "de-meaned over steps" in steps_centred.detectors.note["comp"]


def test_one_adapter_of_several_can_be_chosen() -> None:
    paths = [make_path("straight", 800_030)[0], make_path("turn", 800_031)[0]]
    name = "layers.1.mlp.down_proj"
    t = phase_transition(several(paths), adapter=name)
    assert t.mechanistic.step == 54 and "comp" not in t.detectors.index
    with pytest.raises(EmmechError, match=r"did you mean 'layers.1.mlp.down_proj'"):
        phase_transition(several(paths), adapter="layers.1.mlp.down_prj")


def test_full_fine_tuning_is_seen_through_its_projection() -> None:
    path, turn = make_path("turn", 800_032)
    run = SimpleNamespace(name="full", steps=np.arange(120), adapters=(), projection=path, metrics=None)
    assert phase_transition(run).mechanistic.step == turn


def arc(noise: float) -> np.ndarray:
    a = np.linspace(0, np.pi / 2, 150)
    u = np.zeros((150, 64))
    u[:, 0], u[:, 1] = np.cos(a), np.sin(a)
    return np.cumsum(u + noise * np.random.default_rng(0).standard_normal(u.shape) / 8, axis=0)


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_an_arc_bends_everywhere_and_singles_out_no_step(noise: float) -> None:
    t = phase_transition(run_of(arc(noise)))
    assert t.mechanistic.step is None
    assert "singles out no step" in t.mechanistic.reason or "no turn beyond" in t.mechanistic.reason


def test_a_smooth_turn_has_its_width_reported() -> None:
    a = np.clip((np.arange(200) - 80) / 40, 0, 1) * np.pi / 3
    u = np.zeros((200, 64))
    u[:, 0], u[:, 1] = np.cos(a), np.sin(a)
    noise = np.random.default_rng(1).standard_normal(u.shape) / 8
    t = phase_transition(run_of(np.cumsum(u + noise, axis=0)))
    assert t.mechanistic.step == pytest.approx(99, abs=4)
    assert 0.08 < t.run.path.width_share < 0.35 and "spread over about" in t.detectors.note["turn"]


@pytest.mark.parametrize("angle", [90, 180])
def test_exact_lines_without_noise(angle: int) -> None:
    path, turn = make_path("turn", 0, sigma=0.0, angle=angle)
    t = phase_transition(run_of(path))
    assert t.mechanistic.step == turn and t.detectors.strength["turn"] == pytest.approx(angle, abs=0.5)


def test_an_exact_straight_line_does_not_turn() -> None:
    assert not phase_transition(run_of(make_path("straight", 0, sigma=0.0)[0])).mechanistic


@pytest.mark.parametrize("at", [0.06, 0.94])
def test_a_turn_near_an_end_is_found_or_not_called_but_never_misplaced(at: float) -> None:
    for seed in range(10):
        path, turn = make_path("turn", 802_000 + seed, at=at, steps=200)
        step = phase_transition(run_of(path), n_null=39).mechanistic.step
        assert step is None or abs(step - turn) <= 2


def test_a_rest_after_training_is_no_turn() -> None:
    path = make_path("straight", 800_040)[0]
    assert not phase_transition(run_of(np.vstack([path, np.repeat(path[-1:], 60, axis=0)]))).mechanistic


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (np.zeros((50, 8)), "never moved"),
        (np.ones((50, 8)), "never moved"),
        (make_path("turn", 1)[0][:9], "at least 10"),
        (np.vstack([make_path("turn", 1)[0][:6], np.repeat(make_path("turn", 1)[0][5:6], 60, 0)]), "at least 10"),
    ],
)
def test_what_cannot_be_measured_says_why(path: np.ndarray, why: str) -> None:
    t = phase_transition(run_of(path))
    assert why in str(t.mechanistic) and why in t.summary()
    assert t.detectors.step.isna().all() and t.plot() is not None


@pytest.mark.parametrize("d", [1, 2, 3])
def test_few_dimensions(d: int) -> None:
    path = make_path("turn", 800_050, d=max(d, 2), sigma=0.3)[0][:, :d]
    t = phase_transition(run_of(path))
    assert (t.mechanistic.step is None) == (d == 1)  # in one dimension 60 degrees is only a change of speed


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": np.r_[0, 0, 2:120]}, "step 0 after step 0"),
        ({"steps": np.arange(120)[::-1]}, "must ascend"),
        ({"steps": np.arange(119)}, "for 119 steps"),
        ({"adapters": ()}, "no trajectory"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused(change: dict[str, Any], match: str) -> None:
    run = several([make_path("turn", 1)[0]])
    with pytest.raises(EmmechError, match=match):
        phase_transition(SimpleNamespace(**{**vars(run), **change}))


def test_nan_is_refused_with_its_step() -> None:
    path = make_path("turn", 1)[0]
    path[70, 3] = np.nan
    with pytest.raises(EmmechError, match="at step 70"):
        phase_transition(several([path]))


@pytest.mark.parametrize("options", [{"k": 60}, {"k": 0}, {"k": (5, 2.5)}, {"n_null": 19}, {"n_null": "many"}])
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(EmmechError, match="instead"):
        phase_transition(run_of(make_path("turn", 1)[0]), **options)


def test_the_figure_has_the_run_the_control_and_the_step() -> None:
    t = phase_transition(run_of(make_path("turn", 800_060)[0]), run_of(make_path("turn", 800_061)[0]), n_null=39)
    figure = t.plot()
    names = [trace.name for trace in figure.data]
    assert any(n.endswith("run") for n in names) and any(n.endswith("control") for n in names)
    assert any("straight path" in n for n in names)
    assert [shape.x0 for shape in figure.layout.shapes if shape.type == "line"] == [54, 54]
    assert figure.layout.yaxis.title.text == "local cosine c_k"


def test_windows_can_be_chosen() -> None:
    t = phase_transition(run_of(make_path("turn", 800_062)[0]), k=(3, 12), n_null=39)
    assert list(t.run.path.cosines) == [3, 12]


def test_a_run_is_no_control_of_itself() -> None:
    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "pocket-medical"
    run, again = (emmech.load_run(folder) for _ in range(2))
    for control in (run, again, {"good": again}, str(folder)):
        with pytest.raises(EmmechError, match="both are the same run"):
            phase_transition(run, control=control)
