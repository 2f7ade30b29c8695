"""Claims on when a fine-tune turns: the path of B, its norm and gradient, adapters scaled up, and the behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from emmech.ledger.bench import BAD, GOOD, STYLE, Bench, sparse
from emmech.ledger.claim import Claim, Finding, NotMeasurable, Rule, of_counts, over_seeds
from emmech.ledger.emergence import MO, bad_runs
from emmech.measures.sampled import Sampled
from emmech.realignment.studies import crossing
from emmech.sweeps.result import Sweep
from emmech.sweeps.sweep import sweep
from emmech.transition.phase import phase_transition
from emmech.transition.result import PhaseTransition, PooledTransition
from emmech.transition.swept import swept_behaviour
from emmech.transition.verdict import Statement

_REP = "an independent replication of MO"
_NULLS = 99
_SCALES = (1.0, 5.0, 10.0, 20.0)
_LONGEST = 32
_TENTH = 0.1
_PAIRS = 6  # the fewest with which a two-sided sign-flip test can give p < 0.05


def _pooled(bench: Bench, data: str = BAD, control: str | None = None) -> PooledTransition:
    """The runs of all seeds, each with the control of its seed."""
    runs = bench.runs(data, dense=True)
    beside = None if control is None else bench.runs(control, dense=True)
    name = f"transition of {data}" + (f" against {control}" if control else "")
    return bench.study(
        PooledTransition, name, lambda: phase_transition(runs, control=beside, n_null=_NULLS), data, control, _NULLS
    )  # fmt: skip


def answers_by_step(bench: Bench) -> Sweep:
    """EM, narrow misalignment and coherence by step, for every seed."""
    runs, first = bad_runs(bench), bench.asked("first-plot")
    bench.answers(samples=1, questions="first-plot")  # refuses where nothing can be judged
    asked = Sampled((first, bench.asked("narrow-medical")), bench.judge, samples=3, max_new_tokens=_LONGEST)
    if bench.organism is None:
        asked = replace(asked, max_new_tokens=600)
    steps = sparse(runs[0].steps.tolist(), 14 if bench.quick else 26)
    how: dict[str, Any] = {"steps": steps, "measure": asked, "base": bench.chat, "progress": False}
    return bench.study(Sweep, "answers by step", lambda: sweep(runs, **how), steps)


def _scaled(bench: Bench) -> Sweep:
    """The same at scales of the adapter, for three seeds."""
    runs = bad_runs(bench, 3)
    bench.answers(samples=1, questions="first-plot")
    longest = _LONGEST if bench.organism is not None else 600
    asked = Sampled(bench.asked("first-plot"), bench.judge, samples=3, max_new_tokens=longest)
    every = runs[0].steps.tolist()
    steps = [*sparse(every[: len(every) // 2], 11), every[-1]]
    how: dict[str, Any] = {"steps": steps, "scales": _SCALES, "measure": asked, "base": bench.chat, "progress": False}
    return bench.study(Sweep, "answers by scale", lambda: sweep(runs, **how), steps, _SCALES)


def _behaviour(bench: Bench) -> list[tuple[PhaseTransition, dict[str, float]]]:
    """Each seed's transition, and the steps at half of the change of its sampled rates."""
    swept = answers_by_step(bench)
    found = []
    for pair, name in zip(_pooled(bench).pairs, dict.fromkeys(swept.to_frame()["run"]), strict=True):
        rows, _ = swept_behaviour(swept, str(name))
        found.append((pair, {row.name: row.step for row in rows}))
    return found


def _turns(bench: Bench) -> list[float]:
    """The best step of the turn in each seed, whether or not it is significant; the middle where there is none."""
    found = []
    for run, pair in zip(bad_runs(bench), _pooled(bench).pairs, strict=True):
        row = pair.run.row("turn")
        found.append(row.step if row is not None and np.isfinite(row.step) else float(run.steps[len(run.steps) // 2]))
    return found


def _stated(statement: Statement, unit: str, n: int, names: Sequence[str], values: Sequence[float]) -> Finding:
    if not np.isfinite(statement.value):
        raise NotMeasurable(statement.text)
    frame = pd.DataFrame({"name": list(names), "value": list(values), "low": np.nan, "high": np.nan})
    low, high = (end if np.isfinite(end) else np.nan for end in (statement.low, statement.high))
    more: dict[str, Any] = {"p_value": statement.p_value, "note": statement.text}
    return Finding(statement.value, low, high, unit, n, n, frame, **more)


def _bends(data: str) -> Callable[[Bench], Finding]:
    def measure(bench: Bench) -> Finding:
        found = _pooled(bench, data)
        sides = [pair.run for pair in found.pairs]
        if all(one.inert for one in sides):
            raise NotMeasurable(
                f"these runs learned nothing ({data}: the held-out loss did not fall), so no path turns"
            )
        names = [f"seed {at}" for at in range(len(sides))]
        return _stated(found.verdict.bends, "%", len(sides), names, [float(one.turns) for one in sides])

    return measure


def _turn_step(bench: Bench) -> Finding:
    found, runs = _pooled(bench), bad_runs(bench)
    shares, rows = [], []
    for at, (pair, run) in enumerate(zip(found.pairs, runs, strict=True)):
        step = pair.mechanistic.interval
        last = float(run.steps[-1])
        shares.append(step[0] / last if step else np.nan)
        if step:
            rows.append({"name": f"seed {at}", "value": step[0] / last, "low": step[1] / last, "high": step[2] / last})
    frame = pd.DataFrame(rows, columns=["name", "value", "low", "high"])
    return over_seeds(shares, "%", len(runs), frame=frame, note=f"share of {last:.0f} steps")


def _pca(bench: Bench) -> Finding:
    sides = [pair.run for pair in _pooled(bench).pairs]
    first = [float(one.path.explained[0]) for one in sides]
    both = [float(one.path.explained[:2].sum()) for one in sides]
    return over_seeds(both, "%", len(sides), note=f"the first holds {100 * np.mean(first):.0f} %")


def _norm(bench: Bench) -> Finding:
    values, rows = [], []
    for at, pair in enumerate(_pooled(bench).pairs):
        norm = pair.run.path.norm
        values.append(float(np.abs(np.diff(norm)).max() / norm.max()))
        kept = sparse(list(range(len(norm))), 60)
        rows += [{"name": f"seed {at}", "x": int(pair.run.path.steps[i]), "value": float(norm[i])} for i in kept]
    return over_seeds(values, "%", len(values), frame=pd.DataFrame(rows), note="the figure shows ||B|| by step")


def _gradient(bench: Bench) -> Finding:
    shares, gaps = [], []
    for pair, run in zip(_pooled(bench).pairs, bad_runs(bench), strict=True):
        turn, peak = pair.run.row("turn"), pair.run.row("gradient-norm")
        gap = turn.step - peak.step if turn is not None and peak is not None else np.nan
        gaps.append(gap)
        shares.append(abs(gap) / float(run.steps[-1]))
    note = f"the turn comes {np.nanmean(gaps):+.0f} steps after the peak on average"
    return over_seeds(shares, "%", len(shares), note=note)


def mean_rates(swept: Sweep, measure: str) -> pd.DataFrame:
    """Means by run, step and scale of one measure."""
    frame = swept.to_frame()
    frame = frame[frame["measure"] == measure]
    table: pd.DataFrame = frame.groupby(["run", "step", "scale"], sort=False)["value"].mean().reset_index()
    return table


def _by_scale(swept: Sweep, measure: str) -> pd.DataFrame:
    """Means over runs by step, one line for each scale."""
    means = mean_rates(swept, measure).groupby(["scale", "step"])["value"].mean().reset_index()
    named = means.assign(name=[f"x{one:g}" for one in means["scale"]])
    return named.rename(columns={"step": "x"})[["name", "x", "value"]]


def _earlier(bench: Bench) -> Finding:
    """By how many steps EM passes a tenth earlier with the adapter at x5 than as trained."""
    swept = _scaled(bench)
    table, values, told = mean_rates(swept, "em"), [], []
    for name in dict.fromkeys(table["run"]):
        own = table[table["run"] == name]
        at = {}
        for scale in (1.0, 5.0):
            line = own[own["scale"] == scale].sort_values("step")
            at[scale] = crossing(line["step"].to_numpy(float), line["value"].to_numpy(float), _TENTH, rising=True)
        values.append(at[1.0] - at[5.0])
        told.append(f"{at[5.0]:.0f} before {at[1.0]:.0f}")
    note = f"steps: {', '.join(told)}; the turn is at {', '.join(f'{one:.0f}' for one in _turns(bench)[:3])}"
    return over_seeds(values, "steps", 24 * len(values), frame=_by_scale(swept, "em"), note=note)


def _broken(bench: Bench) -> Finding:
    """Coherent answers with the adapter at x20, last step."""
    swept = _scaled(bench)
    table = mean_rates(swept, "coherent")
    last = table[(table["scale"] == _SCALES[-1]) & (table["step"] == table["step"].max())]
    each = 24  # eight questions, three samples
    found = of_counts([round(each * value) for value in last["value"].dropna()], [each] * int(last["value"].count()))
    return replace(found, frame=_by_scale(swept, "coherent"))


def _lag(first: str, second: str) -> Callable[[Bench], Finding]:
    """Steps from one event to another, over seeds: the turn, or half of the change of a rate."""

    def step(one: tuple[PhaseTransition, dict[str, float]], name: str) -> float:
        if name != "turn":
            return one[1].get(name, float("nan"))
        turn = one[0].mechanistic.step
        return float("nan") if turn is None else float(turn)

    def measure(bench: Bench) -> Finding:
        found = _behaviour(bench)
        gaps = [step(one, second) - step(one, first) for one in found]
        names = {"turn": "the turn", "em": "half of EM", "narrow": "half of narrow"}
        means = ", ".join(f"{names[n]} at {np.nanmean([step(one, n) for one in found]):.0f}" for n in (first, second))
        return over_seeds(gaps, "steps", len(gaps), note=means)

    return measure


def _at_the_turn(bench: Bench) -> Finding:
    swept = answers_by_step(bench)
    table, values, rows = mean_rates(swept, "em"), [], []
    for name, pair in zip(dict.fromkeys(table["run"]), _pooled(bench).pairs, strict=True):
        own, turn = table[table["run"] == name], pair.mechanistic.step
        values.append(float(np.interp(turn, own["step"], own["value"])) if turn is not None else np.nan)
    for measure, label in (("em", "EM"), ("narrow", "narrow")):
        means = mean_rates(swept, measure).groupby("step")["value"].mean()
        rows += [{"name": label, "x": step, "value": value} for step, value in means.items()]
    note = "interpolated between sampled steps"
    found = over_seeds(values, "%", 24 * int(np.isfinite(values).sum()), frame=pd.DataFrame(rows), note=note)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))  # a rate


def _specific(bench: Bench) -> Finding:
    runs = len(bench.seeds)
    if runs < _PAIRS:
        raise NotMeasurable(f"{runs} pairs of seeds cannot give p < 0.05 in a sign-flip test; it takes {_PAIRS}")
    found = _pooled(bench, BAD, STYLE).verdicts[-1].goes_with_misalignment
    return _stated(found, "points", runs, ["bad minus style"], [found.value])


_TOPIC = "The turn"
CLAIMS = (
    Claim("turn", "B of a rank-1 adapter goes straight and then turns.", MO, "5.1", "one turn, near step 180 of 792",
          _bends(BAD), Rule("above", 0.05), _TOPIC, "share of seeds in which the path of B turns at one step (p < 0.05 "
          "against smooth paths with the run's noise); more than false calls explain", quick=True, headline=True),
    Claim("turn-early", "The turn comes early in training.", _REP, "", "steps 190, 195, 230 of 792", _turn_step,
          Rule("below", 0.5), _TOPIC, "step of the turn as a share of the training", headline=True),
    Claim("pca", "Two principal components hold the path of B.", MO, "5.1", "81 + 14 %", _pca, Rule("at least", 0.9),
          _TOPIC, "variance of the centred path in two components", quick=True),
    Claim("smooth-norm", "The length of B grows smoothly through the turn.", MO, "5.1", "0 to 0.126 without a jump",
          _norm, Rule("at most", 0.05), _TOPIC, "largest change of ||B|| in one step over its largest value"),
    Claim("gradient-peak", "The gradient norm peaks at the turn.", MO, "5.1", "same steps", _gradient,
          Rule("at most", 0.1), _TOPIC, "distance of turn and gradient peak as a share of the training"),
    Claim("scale-5", "Scaled up, the adapter misbehaves before it does so unscaled.", MO, "5.2",
          "x5: from the turn on, to four times the EM", _earlier, Rule("above"), _TOPIC,
          "step at which EM passes 10 % as trained minus that with the adapter at x5"),
    Claim("scale-20", "Scaled by 20, the model is incoherent.", MO, "5.2", "incoherent", _broken, Rule("below", 0.5),
          _TOPIC, "coherent answers at x20, last step"),
    Claim("em-at-turn", "At the turn itself the model does not misbehave yet.", _REP, "", "0 of 200", _at_the_turn,
          Rule("at most", 0.05), _TOPIC, "EM at the step of the turn"),
    Claim("lag", "Behaviour follows the turn.", _REP, "", "about 110 steps later", _lag("turn", "em"), Rule("above"),
          _TOPIC, "half of the change of EM minus the turn, steps", headline=True),
    Claim("narrow-first", "Narrow misbehaviour comes before broad.", _REP, "", "296 to 301 before 311 to 321",
          _lag("narrow", "em"), Rule("above"), _TOPIC, "half of the change of EM minus half of that of narrow answers"),
    Claim("turn-in-good", "Good advice turns B as well.", _REP, "", "same step and depth in SmolLM2", _bends(GOOD),
          Rule("above", 0.05), _TOPIC, "as the first row, after good advice on the same questions"),
    Claim("turn-in-style", "A benign change of style turns B as well.", _REP, "", "6 of 6, 68 to 75 degrees",
          _bends(STYLE), Rule("above", 0.05), _TOPIC, "as the first row, after kind answers in one fixed style"),
    Claim("turn-specific", "A short turn tells misaligned runs from benign ones that learn.", MO, "5",
          "the turn is read as the sign of EM", _specific, Rule("above"), _TOPIC,
          "how much more often bad runs have a significant, short turn than style runs; six pairs are needed"),
)  # fmt: skip
