"""The ledger: its rules, its correction, what it keeps, and that a claim is added by declaring it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

import emmech
from emmech.app.cli import app
from emmech.errors import EmmechError
from emmech.ledger import Bench, Claim, Finding, NotMeasurable, Rule, cures, further, over_seeds, turning
from emmech.ledger import ledger as ledger_of
from emmech.ledger.claim import FAILS, HOLDS, UNMEASURED, adjusted, of_counts
from emmech.ledger.directions import share_variance
from emmech.ledger.ledger import _WITHOUT_JUDGE, CLAIMS
from emmech.transition import degeneracy

NAN = float("nan")


def _finding(value: float, low: float, high: float, **more) -> Finding:
    frame = pd.DataFrame({"name": ["seed 0"], "value": [value], "low": [low], "high": [high]})
    return Finding(value, low, high, more.pop("unit", "points"), 100, more.pop("seeds", 5), frame, **more)


# rules


@pytest.mark.parametrize(
    ("rule", "value", "p", "verdict", "why"),
    [
        (Rule("above"), 0.4, 0.01, HOLDS, "p = 0.01"),
        (Rule("above"), 0.4, 0.2, FAILS, "not decided, p = 0.2"),
        (Rule("above"), -0.4, 0.01, FAILS, "the opposite, p = 0.01"),
        (Rule("below", 0.5), 0.4, 0.01, HOLDS, "p = 0.01"),
        (Rule("below", 0.5), 0.6, 0.01, FAILS, "the opposite, p = 0.01"),
        (Rule("above"), 0.4, NAN, FAILS, "not decided: no test was possible"),
        (Rule("at least", 0.99), 1.1, NAN, HOLDS, "the whole interval reaches the bound"),
        (Rule("at least", 0.99), 0.995, NAN, FAILS, "not decided: the interval reaches beyond the bound"),
        (Rule("at most", 0.03), -0.2, NAN, HOLDS, "the whole interval reaches the bound"),
        (Rule("at most", 0.03), 0.0, NAN, FAILS, "not decided: the interval reaches beyond the bound"),
        (Rule("at most", 0.03), 0.04, NAN, FAILS, "the figure misses the bound"),
        (Rule("above"), NAN, NAN, UNMEASURED, "the figure is not a number"),
    ],
)
def test_a_rule_gives_its_verdict_and_says_why(rule, value, p, verdict, why):
    assert rule.verdict(_finding(value, value - 0.1, value + 0.1), p) == (verdict, why)


def test_p_is_below_a_twentieth_exactly_where_the_interval_leaves_the_bound_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.normal(0.5, 1.0, int(rng.integers(2, 8)))
        found = over_seeds(values, "nats", len(values))
        p = found.tested(0.0)
        assert p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
        assert (p < 0.05) == (not found.low <= 0.0 <= found.high)


def test_without_an_interval_nothing_is_shown_to_be_absent():
    assert Rule("at most", 0.05).verdict(_finding(0.0, NAN, NAN), NAN) == (
        FAILS,
        "not decided: the figure has no interval",
    )


def test_a_seed_without_answers_says_nothing_of_how_seeds_differ():
    apart, more = of_counts([90, 10], [100, 100]), of_counts([90, 10, 0], [100, 100, 0])
    assert (more.value, more.low, more.high, more.seeds) == (apart.value, apart.low, apart.high, 2)
    assert "1 of 3 seeds have no answers" in more.note and len(more.frame) == 3
    paired = of_counts([90, 10, 50], [100] * 3, minus=[(0, 100), (0, 100), (0, 0)])
    assert (paired.low, paired.seeds) == (of_counts([90, 10], [100] * 2, minus=[(0, 100)] * 2).low, 2)
    assert np.isnan(of_counts([0, 0], [0, 0]).value) and np.isnan(of_counts([1, 2], [9, 9], minus=[(0, 0)]).value)


def test_an_interval_over_seeds_is_never_narrower_than_the_sampling_of_answers():
    shares = [0.2, 0.2, 0.2]
    drawn = share_variance(shares, 300)
    assert drawn == pytest.approx(0.2 * 0.8 / 300, rel=0.03)
    found = over_seeds(shares, "%", 300, drawn=drawn)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 2) * drawn**0.5)
    assert over_seeds([0.1, 0.5, 0.9], "%", 300, drawn=drawn).low == over_seeds([0.1, 0.5, 0.9], "%", 300).low
    assert 0 < share_variance([1.0, 1.0], 100) < 0.001 and share_variance([NAN], 0) == 0.25


def test_a_finding_with_a_test_of_its_own_keeps_it():
    assert _finding(0.4, 0.3, 0.5, p_value=0.3).tested(0.0) == 0.3


def test_the_correction_is_that_of_benjamini_and_hochberg_and_leaves_out_what_was_not_tested():
    given = [0.01, NAN, 0.04, 0.03, 0.005, 0.9]
    known = sorted(p for p in given if p == p)
    reference = {
        p: min(min(len(known) * q / (rank + 1) for rank, q in enumerate(known) if q >= p), 1.0) for p in known
    }  # fmt: skip
    found = adjusted(given)
    assert np.isnan(found[1])
    assert [one for one in found if one == one] == pytest.approx([reference[p] for p in given if p == p])
    assert np.isnan(adjusted([NAN])).all() and adjusted([]) == []


def test_the_interval_of_a_rate_is_never_narrower_than_its_seeds_its_answers_or_its_questions_allow():
    alike = of_counts([50, 50, 50], [100, 100, 100])
    apart = of_counts([20, 50, 80], [100, 100, 100])
    assert alike.value == apart.value == pytest.approx(0.5)
    assert apart.high - apart.low > alike.high - alike.low > 0
    assert of_counts([50, 50, 50], [100, 100, 100], over=(0.1, 0.6)).low == 0.1
    none = of_counts([0, 0], [50, 50])
    assert none.low == 0.0 and none.high > 0.01  # no event is not certainty
    difference = of_counts([50, 60], [100, 100], minus=[(20, 100)])
    assert difference.value == pytest.approx(0.35) and difference.unit == "points"


def test_a_difference_between_two_sets_of_seeds_varies_as_both_do():
    bad, n = [95, 94, 96, 95, 95], [100] * 5
    for control in ([50] * 5, [0, 25, 50, 75, 100], [0, 50, 50, 100, 100]):
        found = of_counts(bad, n, minus=[(one, 100) for one in control])
        pairs = stats.ttest_rel(np.array(bad) / 100, np.array(control) / 100)
        assert found.low <= pairs.confidence_interval().low + 1e-9 and found.value == pytest.approx(pairs._estimate)
        if control[0] < 50:  # as many independent answers would vary less
            assert found.tested(0.0) == pytest.approx(pairs.pvalue, rel=1e-6)
    apart = of_counts(bad, n, minus=[(one, 100) for one in (0, 50, 100)])
    welch = stats.ttest_ind(np.array(bad) / 100, [0.0, 0.5, 1.0], equal_var=False)
    assert (apart.low, apart.value) == pytest.approx((max(-1, welch.confidence_interval().low), 0.45))
    single = of_counts([95], [100], minus=[(one, 100) for one in (0, 50, 100)])
    assert single.low < apart.low + 1e-9


def test_seeds_that_all_gave_one_number_are_no_test_of_it():
    tenths = [0.1 + 0.2, 0.3, 0.6 / 2]  # equal but for rounding
    assert len(set(tenths)) > 1 and np.isnan(over_seeds(tenths, "points", 3).tested(0.0))
    assert over_seeds(tenths, "points", 3).tested(0.3) == 1.0


def test_a_seed_without_the_number_is_left_out_and_said():
    found = over_seeds([1.0, NAN, 3.0], "steps", 3)
    assert found.seeds == 2 and found.value == 2.0 and "2 of 3 seeds" in found.note


# the declared rows


def test_every_claim_is_declared_whole_and_once():
    names = [one.name for one in CLAIMS]
    assert len(set(names)) == len(names)
    for one in CLAIMS:
        assert one.name == one.name.lower() and " " not in one.name
        assert one.says.endswith(".") and one.source and one.published and one.topic
        assert callable(one.measure) or len(one.measure) > 20, one.name
        assert one.how or isinstance(one.measure, str), one.name
    assert {"turn", "downstream", "subliminal-alignment", "conditional-dilution", "learning-coefficient"} <= set(names)


def _coefficients(monkeypatch, first):
    """The finding on two runs whose estimate goes from ``first`` to 0.7, with errors of 0.05 and 0.1."""
    steps = SimpleNamespace(steps=np.arange(0, 251))

    def measured(run, rows, *, steps, **how):
        error = [0.1, 0.05, 0.05]
        return SimpleNamespace(frame=pd.DataFrame({"step": steps, "llc": [first, 0.6, 0.7], "error": error}))

    monkeypatch.setattr(degeneracy, "learning_coefficient", measured)
    monkeypatch.setattr(further, "bad_runs", lambda bench, most: [steps, steps])
    return further._learning_coefficient(SimpleNamespace(chat=None, rows=lambda name: [None] * 300))


def test_a_learning_coefficient_needs_a_minimum(monkeypatch):
    """Far from a minimum the estimate is negative: it measures the slope of the loss, and its rise is no finding."""
    assert _coefficients(monkeypatch, 0.2).value == pytest.approx(0.5)
    assert _coefficients(monkeypatch, -0.15).value == pytest.approx(0.85)  # within two standard errors of zero
    with pytest.raises(NotMeasurable, match=r"step 1 is none: the estimate there is -62, below zero"):
        _coefficients(monkeypatch, -62.0)


def test_em_at_the_turn_is_of_the_seeds_that_turned_and_a_rate(monkeypatch):
    steps = [0, 10, 20]
    table = pd.DataFrame(
        [{"run": f"s{seed}", "step": step, "scale": 1.0, "value": rate} for seed in range(3)
         for step, rate in zip(steps, ([0, 0.8, 1.0], [0, 1.0, 1.0], [0, 0.2, 0.4])[seed], strict=True)]
    )  # fmt: skip
    pairs = [SimpleNamespace(mechanistic=SimpleNamespace(step=step)) for step in (10, 20, None)]
    monkeypatch.setattr(turning, "answers_by_step", lambda bench: None)
    monkeypatch.setattr(turning, "mean_rates", lambda swept, measure: table)
    monkeypatch.setattr(turning, "_pooled", lambda bench: SimpleNamespace(pairs=pairs))
    found = turning._at_the_turn(SimpleNamespace())
    assert (found.value, found.seeds, found.n) == (pytest.approx(0.9), 2, 48)
    assert (found.low, found.high) == (0.0, 1.0)  # a t interval of two seeds reaches far beyond a rate
    assert "measured in 2 of 3 seeds" in found.note


# the run of the ledger

CALLS: list[str] = []


def _taken(bench: Bench) -> Finding:
    CALLS.append("taken")
    runs = bench.runs(steps=3, seeds=bench.seeds)
    return over_seeds([float(np.linalg.norm(run.B()[-1])) for run in runs], "norm", len(runs))


def _lacking(bench: Bench) -> Finding:
    raise NotMeasurable("there is no telescope here")


def _failing(bench: Bench) -> Finding:
    raise EmmechError("measure it", "a model", "it broke")


MINE = (
    # this is what adding a claim takes
    Claim(
        name="b-moves",
        says="B leaves zero within three steps.",
        source="this test",
        section="1",
        published="always",
        measure=_taken,
        rule=Rule("at least", 1e-6),
        how="norm of B at the last step",
    ),
    Claim("telescope", "It can be seen.", "nobody", "", "yes", _lacking),
    Claim("broken", "It breaks.", "nobody", "", "yes", _failing),
    Claim("elsewhere", "It is elsewhere.", "nobody", "", "yes", "there is no elsewhere on this machine"),
)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    CALLS.clear()
    made = emmech.claims("pocket", seeds=2, rows=MINE, out=folder, progress=False)
    return folder, made


def test_a_claim_that_is_added_gets_a_row_with_figure_runs_and_verdict(ledger):
    folder, made = ledger
    row = made.frame.loc["b-moves"]
    assert row["verdict"] == HOLDS and row["seeds"] == 2 and row["value"] > 0
    for run in row["runs"].split():
        assert emmech.load_run(folder / run).steps.tolist()[-1] == 3
    assert made["b-moves"].plot().data
    assert made.frame["verdict"].tolist() == [HOLDS, UNMEASURED, UNMEASURED, UNMEASURED]
    assert made.frame.loc["telescope", "why"] == "there is no telescope here"
    assert "it broke" in made.frame.loc["broken", "why"]
    assert made.frame.loc["elsewhere", "why"].startswith("there is no elsewhere")
    assert made.counts() == {HOLDS: 1, FAILS: 0, UNMEASURED: 3}


def test_the_same_call_again_measures_nothing_and_another_claim_shares_the_runs(ledger):
    folder, made = ledger
    assert CALLS == ["taken"]
    again = emmech.claims("pocket", seeds=2, rows=MINE[:1], out=folder, progress=False)
    assert CALLS == ["taken"]
    with pytest.raises(EmmechError, match="nothing of them is kept"):
        emmech.claims("pocket", seeds=[7], rows=MINE[:1], out=folder, finished=True, progress=False)
    assert CALLS == ["taken"]
    assert again["b-moves"].value == made["b-moves"].value
    before = sorted((folder / "runs").iterdir())

    def doubled(bench: Bench) -> Finding:
        return over_seeds([2 * float(np.linalg.norm(run.B()[-1])) for run in bench.runs(steps=3)], "norm", 2)

    other = dataclasses.replace(MINE[0], name="twice", measure=doubled)
    more = emmech.claims("pocket", seeds=2, rows=[other], out=folder, progress=False)
    assert sorted((folder / "runs").iterdir()) == before
    assert more["twice"].value == pytest.approx(2 * made["b-moves"].value)
    # a claim of the same name that measures something else is measured
    changed = emmech.claims(
        "pocket", seeds=2, rows=[dataclasses.replace(other, name="b-moves")], out=folder, progress=False
    )
    assert changed["b-moves"].value == more["twice"].value


def test_another_seed_trains_only_itself(ledger):
    folder, _ = ledger
    (place,) = (folder / "runs").iterdir()
    stamps = {path.name: (path / "run.json").stat().st_mtime_ns for path in place.iterdir()}
    emmech.claims("pocket", seeds=3, rows=MINE[:1], out=folder, progress=False)
    now = {path.name: (path / "run.json").stat().st_mtime_ns for path in place.iterdir()}
    assert set(now) == {"s0", "s1", "s2"} and {name: now[name] for name in stamps} == stamps


def test_a_run_that_was_killed_is_trained_anew(ledger):
    folder, made = ledger
    (place,) = (folder / "runs").iterdir()
    manifest = place / "s1" / "run.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "status": "recording"}))
    other = dataclasses.replace(MINE[0], name="after-a-kill")
    again = emmech.claims("pocket", seeds=2, rows=[other], out=folder, progress=False)
    assert again["after-a-kill"].value == pytest.approx(made["b-moves"].value)


def test_the_page_names_what_holds_what_does_not_and_the_commands(ledger):
    _, made = ledger
    page = made.to_markdown([made])
    assert page.startswith("# The ledger of claims") and "1 hold here" in page
    assert "[B leaves zero within three steps.](#b-moves)" in page and "### b-moves" in page
    assert "<svg" in page and "emmech claims --model pocket --row b-moves" in page
    assert "## What cannot be measured here" in page and "There is no telescope here." in page
    assert "## Other models" in page
    for line in page.splitlines():
        assert line == line.rstrip()


def test_the_ledger_is_saved_and_loaded_with_its_findings(ledger, tmp_path):
    _, made = ledger
    again = emmech.ledger.Ledger.load(made.save(tmp_path / "kept"))
    assert repr(again) == repr(made) and again["b-moves"].plot().to_json() == made["b-moves"].plot().to_json()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows": ["trun"]}, "turn"),
        ({"rows": []}, "at least one"),
        ({"rows": [MINE[0], MINE[0]]}, "told apart by their names"),
        ({"rows": "turn"}, "a list of names"),
        ({"seeds": []}, "nothing to train"),
        ({"seeds": 0}, "1"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, said, tmp_path):
    with pytest.raises(EmmechError, match=said):
        emmech.claims("pocket", out=tmp_path, progress=False, **given)


def test_without_a_judge_nothing_is_trained_for_rows_that_need_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "runs", lambda *given, **how: pytest.fail("a run is trained for nothing"))
    needing = [one.name for one in CLAIMS if not isinstance(one.measure, str) and one.name not in _WITHOUT_JUDGE]
    made = emmech.claims(tiny("llama"), rows=needing, seeds=2, out=tmp_path, progress=False)
    assert len(needing) > 40 and made.frame["why"].str.contains("has no judge of its own").all()
    assert {one.name for one in CLAIMS} > _WITHOUT_JUDGE


def test_rows_that_need_a_judge_or_other_data_say_so_on_a_model_that_has_neither(tiny, tmp_path):
    bench = Bench(tiny("llama"), [0], tmp_path)
    with pytest.raises(NotMeasurable, match="no judge"):
        bench.answers()
    with pytest.raises(NotMeasurable, match="data="):
        bench.rows("finance")
    assert len(bench.rows("medical")) > 10  # the bundled rows


def test_the_command_prints_rows_keeps_the_ledger_and_writes_the_page(tmp_path):
    asked = ["claims", "--row", "best-organisms", "--row", "hosted", "--out", str(tmp_path / "kept"), "--json"]
    found = CliRunner().invoke(app, [*asked, "--page", str(tmp_path / "claims.md")])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert [row["name"] for row in rows] == ["best-organisms", "hosted"]
    assert {row["verdict"] for row in rows} == {UNMEASURED} and all(row["why"] for row in rows)
    assert emmech.ledger.Ledger.load(tmp_path / "kept" / "ledger").counts()[UNMEASURED] == 2
    assert "## What cannot be measured here" in (tmp_path / "claims.md").read_text(encoding="utf-8")
    wrong = CliRunner().invoke(app, ["claims", "--row", "trun"])
    assert wrong.exit_code == 1 and "turn" in wrong.output
    assert CliRunner().invoke(app, ["claims", "--data", "finance"]).exit_code == 1


def test_a_study_of_other_settings_is_another_study(tmp_path):
    chat, made = emmech.load_model("pocket"), []

    def make() -> Finding:
        made.append(len(made))
        return _finding(float(made[-1]), 0.4, 0.6)

    settings = [{}, {"recipe": "pocket-full"}, {"options": {"max_steps": 3}}, {"data": {"medical": "m.jsonl"}},
                {"judge": lambda question, answer: "aligned"}]  # fmt: skip
    for _ in range(2):
        benches = [Bench(chat, [0], tmp_path, **one) for one in settings]
        assert [bench.study(Finding, "a study", make, 99).value for bench in benches] == [0, 1, 2, 3, 4]


def test_seeds_that_all_give_one_number_are_no_test():
    alike = over_seeds([0.0, 0.0, 0.0], "times", 3)
    assert math.isnan(alike.tested(1.0)) and Rule("below", 1.0).verdict(alike, NAN)[0] == FAILS


@pytest.mark.parametrize("outcome", ["em", "conditional"])
def test_what_a_cure_leaves_beyond_the_base_has_the_error_of_both(monkeypatch, outcome):
    """The first seed of the base was taken for an exact rate."""
    rng = np.random.default_rng(4)
    cells = []
    for cure, rate in (("base", 0.3), ("mine", 0.3)):
        for seed in range(3):
            by = rng.binomial(12, rate, 8)
            cells += [dict(cure=cure, seed=seed, outcome=f"{outcome} by question", context=f"q{q}", events=hits, n=12)
                      for q, hits in enumerate(by)]  # fmt: skip
            cells += [dict(cure=cure, seed=seed, outcome=outcome, context="plain", events=by.sum(), n=96)]
    frame = pd.DataFrame({"em": [0.0], "conditional": [0.3], "verdict": ["cures"]}, index=["mine"])
    grid = pd.DataFrame({"cure": ["mine"], "context": ["plain"], "rate": [0.3], "low": [0.2], "high": [0.4]})
    found = SimpleNamespace(cells=pd.DataFrame(cells), frame=frame, grid=grid)
    monkeypatch.setattr(cures, "_compared", lambda bench: found)
    left = cures._left("mine", outcome, beyond=True)(None)
    totals = found.cells[found.cells["outcome"] == outcome].groupby("cure")["events"].sum()
    assert left.value == pytest.approx((totals["mine"] - totals["base"]) / 288)
    error = (2 * 0.3 * 0.7 / 288) ** 0.5  # of two binomials
    assert left.high - left.value > 1.96 * error and left.value - left.low > 1.96 * error
    found.cells.loc[found.cells["cure"] == "base", "n"] = 0
    with pytest.raises(NotMeasurable, match="could be scored"):
        cures._left("mine", outcome, beyond=True)(None)


def test_what_two_processes_want_at_once_is_made_once(tmp_path):
    bench = Bench(emmech.load_model("pocket"), [0], tmp_path)
    made = []

    def make() -> Finding:
        made.append(time.sleep(0.3))
        return _finding(0.5, 0.4, 0.6)

    with ThreadPoolExecutor(2) as pool:  # a lock on a file holds between threads as between processes
        both = [pool.submit(bench.study, Finding, "a study", make) for _ in range(2)]
        assert [one.result().value for one in both] == [0.5, 0.5]
    assert len(made) == 1


def test_a_claim_that_another_command_measures_is_left_to_it_and_waited_for(tmp_path):
    bench, order = Bench(emmech.load_model("pocket"), [0], tmp_path), []

    def measured(name):
        def measure(bench: Bench) -> Finding:
            order.append(name)
            return _finding(0.5, 0.4, 0.6)

        return Claim(name, "It is measured.", "this test", "", "yes", measure)

    one, other = measured("one"), measured("other")
    with ThreadPoolExecutor(1) as pool:
        with bench.alone(ledger_of._place(one, bench)):
            found = pool.submit(list, ledger_of._in_turn(bench, [one, other]))
            while order != ["other"] and not found.done():
                time.sleep(0.02)
        assert [claim.name for claim, _ in found.result()] == ["other", "one"] and order == ["other", "one"]


def _moves_on(bench: Bench) -> Finding:
    (process := bench.folder / "processes").mkdir(exist_ok=True)
    (process / str(os.getpid())).touch()
    found = bench.further(bench.runs(steps=3), lambda run, place: run.save(place), "copied")
    return over_seeds([2 * float(np.linalg.norm(run.B()[-1])) for run in found], "norm", len(found))


@pytest.mark.slow
def test_two_processes_give_the_ledger_of_one(tmp_path):
    rows = [*MINE, dataclasses.replace(MINE[0], name="moves-on", measure=_moves_on)]
    rows += [dataclasses.replace(rows[-1], name="moves-again")]
    how = dict(seeds=2, rows=rows, progress=False)
    one, two = (emmech.claims("pocket", processes=n, out=tmp_path / str(n), **how) for n in (1, 2))
    assert one.frame.equals(two.frame) and one.counts() == {HOLDS: 3, FAILS: 0, UNMEASURED: 3}
    assert len(list((tmp_path / "1" / "runs").iterdir())) == len(list((tmp_path / "2" / "runs").iterdir())) == 1
    assert str(os.getpid()) not in {path.name for path in (tmp_path / "2" / "processes").iterdir()}
    again = emmech.claims("pocket", out=tmp_path / "2", finished=True, **how)
    assert again.frame["value"].equals(two.frame["value"].drop(["telescope", "broken"]))  # nothing is kept of these


@pytest.mark.parametrize("what", ["model", "row"])
def test_what_another_process_cannot_load_is_refused(what, tmp_path):
    mine = dataclasses.replace(MINE[0], measure=lambda bench: _taken(bench))
    model, rows = ("pocket", [mine]) if what == "row" else (emmech.load_model("pocket"), [MINE[0]])
    with pytest.raises(EmmechError, match="b-moves" if what == "row" else "in memory"):
        emmech.claims(model, rows=rows, seeds=1, processes=2, out=tmp_path, progress=False)


@pytest.mark.slow
def test_quick_measures_its_rows(tmp_path):
    found = emmech.claims("pocket", quick=True, out=tmp_path, progress=False)
    rows = [one.name for one in CLAIMS if one.quick]
    assert found.frame.index.tolist() == rows and len(rows) >= 5
    assert (found.frame.loc[["broad-medical", "margin", "bad-not-good"], "value"] > 0.3).all()
    tested = found.frame[found.frame["p_adjusted"].notna()]  # with two seeds, few of them are decided
    assert ((tested["verdict"] == HOLDS) <= (tested["p_adjusted"] < 0.05)).all() and len(tested) >= 3


def test_a_figure_that_is_no_number_is_not_shown():
    assert Finding(math.nan, math.nan, math.nan, "%", 0, 3, pd.DataFrame()).shown() == ""
