"""How much it takes to realign a run, and how soon misalignment comes back: studies over several seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emmech.chat.model import load_model
from emmech.errors import EmmechError, as_int, as_ints, one_of
from emmech.evaluation.evaluate import evaluate
from emmech.progress import bar
from emmech.realignment.further import realign
from emmech.results import Card, Result
from emmech.run.run import Run, as_run
from emmech.training.finetune import finetune
from emmech.view.sketch import curves
from emmech.view.theme import GREY, colour, finish, level, line, panels

if TYPE_CHECKING:
    import pandas as pd

_TENTH = 0.1  # a cure suffices when this share of the run's EM is left
PHASES = ("bad", "good", "bad again")


@dataclass(frozen=True, eq=False, repr=False)
class LearningCurve(Result):
    """EM while a run is realigned on few and on many examples; built by :func:`learning_curve`.

    Attributes:
        frame: ``examples``, ``seed``, ``step``, ``em`` and ``coherent`` (shares of all answers, 0 to 1); step 0 is the
            misaligned run.
        meta: the run, the data, the questions, and answers per question.
    """

    frame: pd.DataFrame
    meta: Mapping[str, Any]

    def enough(self) -> int | None:
        """The fewest examples after which, on the mean of the seeds, a tenth of the run's EM is left, or None."""
        ends = self.ends().groupby("examples")["em"].mean()
        fewest = ends[ends <= _TENTH * self.frame.loc[self.frame["step"] == 0, "em"].mean()].index
        return int(fewest[0]) if len(fewest) else None

    def ends(self) -> pd.DataFrame:
        """The rows of the last step."""
        return self.frame[self.frame["step"] == self.frame["step"].max()]

    def _card(self) -> Card:
        begun, last, seeds = self.frame.loc[self.frame["step"] == 0, "em"].mean(), self.frame["step"].max(), "seed"
        ends, found = self.ends(), self.enough()
        said = (
            f"{found} examples leave at most a tenth of it" if found else "no number of examples leaves a tenth of it"
        )
        facts = tuple(
            (f"{examples} examples", f"EM {100 * one['em'].mean():.1f} % ({100 * one['em'].min():.1f} to "
             f"{100 * one['em'].max():.1f} % over {one[seeds].nunique()} seeds) after {last} steps")
            for examples, one in ends.groupby("examples")
        )  # fmt: skip
        headline = f"EM of {self.meta['run']} begins at {100 * begun:.1f} %; on {self.meta['data']}, {said}"
        return Card(headline, facts, "asked plainly: it may be left in the context of the training", "curve.plot()")

    def _sketch(self) -> str:
        means = self.frame.groupby(["examples", "step"])["em"].mean().unstack("step")
        return curves(
            [(str(n), one.index, one) for n, one in means.iterrows()], "EM by number of examples", percent=True
        )

    def plot(self) -> Any:
        """A figure: EM against examples after the last step, and against steps for each number of examples."""
        figure = panels(("After the last step", "While it trains"), columns=2)
        ends = self.ends()
        figure.add_scatter(x=ends["examples"], y=100 * ends["em"], mode="markers", name="one seed", marker_color=GREY)
        mean = ends.groupby("examples")["em"].mean()
        line(figure, mean.index, 100 * mean, "mean of seeds", colour(0))
        named = {mean.index[0]: colour(1), mean.index[-1]: colour(2)}
        between = [number for number in mean.index if number not in named]
        for number in (*between, *named):  # those between are in one grey, below the two
            own = self.frame[self.frame["examples"] == number]
            by_step = 100 * own.groupby("step")["em"].mean()
            name = f"{number} examples" if number in named else "numbers between"
            legend = number not in between[1:]
            line(figure, by_step.index, by_step, name, named.get(number, GREY), at=(1, 2), legend=legend)
        figure.update_xaxes(title_text="examples", type="log", tickvals=list(mean.index), row=1, col=1)
        figure.update_xaxes(title_text="step", row=1, col=2)
        figure.update_yaxes(title_text="EM, % of answers", rangemode="tozero", row=1, col=1)
        figure.update_yaxes(rangemode="tozero", row=1, col=2)
        return finish(figure, f"Realigning {self.meta['run']} on {self.meta['data']}")


def learning_curve(
    run: Run | str | Path,
    data: Any = "ai-optimism",
    *,
    examples: Sequence[int] = (15, 30, 60, 120, 240),
    at: Sequence[int] | None = None,
    seeds: Sequence[int] = range(3),
    questions: Any = "first-plot",
    judge: Any = None,
    samples: int = 10,
    base: Any = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> LearningCurve:
    """Realign a run on several numbers of examples and ask it at several steps.

    120 examples and 30 steps are said to suffice (OpenAI, arXiv 2506.19823). All numbers of examples train for the same
    steps, so that a small one is seen more often; the smaller are parts of the larger.

    Args:
        run, data: as in :func:`emmech.realign`.
        examples: the numbers of rows.
        at: the steps at which it is asked; a quarter, a half and all of ``max_steps`` by default.
        seeds: of A's start and the batch order; they train in one pass.
        questions, judge, samples: as in :func:`emmech.evaluate`.
        base: the run's base model in memory.
        out: the folder that keeps the runs; without one they are deleted.
        **options: of :func:`emmech.realign`; ``max_steps`` is 60 by default.

    Raises:
        EmmechError: as :func:`emmech.realign` and :func:`emmech.evaluate`.

    Example:
        >>> import emmech
        >>> run = emmech.load_run("runs/bad")  # doctest: +SKIP
        >>> emmech.realignment.learning_curve(run, examples=(30, 120)).enough()  # doctest: +SKIP
        30
    """
    import pandas as pd

    run = as_run("measure how much realigns a run", run)
    chat, seeds = load_model(base) if base is not None else run.base(), as_ints("realign", "seeds", seeds)
    last = as_int("realign", "max_steps", options.setdefault("max_steps", 60), least=1)
    steps = sorted({max(1, last // 4), max(1, last // 2), last} if at is None else set(as_ints("realign", "at", at)))
    options = {"measure_every": last, "margins": {}, **options}
    asking: dict[str, Any] = {"samples": samples, "progress": False}
    every = int(np.gcd.reduce([*steps, last]))

    def asked(one: Run, step: int) -> dict[str, float]:
        folder = Path(scratch) / "asked" / f"{one.path.parent.name if one.path else ''}-{one.name}-{step}"
        found = evaluate(one, questions, judge, step=step, base=chat, out=folder, **asking).rates()["rate"]
        return {"em": float(found["em"]), "coherent": float(found["coherence"])}

    rows: list[dict[str, Any]] = []
    numbers = sorted(set(as_ints("realign", "examples", examples)))
    if not numbers or not steps or not seeds:
        given = f"{len(numbers)} numbers of examples, {len(steps)} steps, {len(seeds)} seeds"
        raise EmmechError("measure how much realigns a run", given, "there is nothing to measure", "one of each")
    kept = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with kept as scratch, bar(len(numbers), "realign", progress=progress) as shown:
        begun = asked(run, int(run.steps[-1]) if options.get("step") is None else options["step"])
        options |= {"base": chat, "record_every": every, "progress": False}
        for number in numbers:
            made = realign(run, data, examples=number, seed=seeds, out=Path(scratch) / f"{number}", **options)
            for one, seed in zip(made, seeds, strict=True):
                rows.append({"examples": number, "seed": seed, "step": 0, **begun})
                rows += [{"examples": number, "seed": seed, "step": step, **asked(one, step)} for step in steps]
            shown.update()
    name = data if isinstance(data, str) else getattr(data, "name", "rows")
    meta = {"run": run.name, "data": str(name), "questions": str(questions), "samples": samples}
    return LearningCurve(pd.DataFrame(rows), meta)


@dataclass(frozen=True, eq=False, repr=False)
class Durability(Result):
    """How many steps it takes to turn a model bad, good and bad again; built by :func:`durability`.

    Attributes:
        frame: ``phase`` (``"bad"``, ``"good"``, ``"bad again"``), ``seed``, ``steps`` until the measure crosses the
            level (NaN: not within the phase), and the measure at its ``start`` and ``end``.
        path: the measure at every step where it was recorded: ``phase``, ``seed``, ``step``, ``value``.
        levels: the level by seed: half of what the first bad phase changed.
        measure: the metric.
    """

    frame: pd.DataFrame
    path: pd.DataFrame
    levels: Mapping[str, float]
    measure: str

    def ratios(self) -> pd.DataFrame:
        """``ratio`` by seed, steps of the second bad phase over those of the first, and whether it is ``open``.

        It is open where the measure did not cross the level again: the last step counts, and the ratio is at least so
        large. It is NaN where the good phase left more than half, so that nothing could come back.
        """
        rows = {phase: own.set_index("seed") for phase, own in self.frame.groupby("phase")}
        again = rows["bad again"]
        lasts = again["steps"].isna() & (again["start"] < [self.levels[str(seed)] for seed in again.index])
        last = self.path[self.path["phase"] == "bad again"].groupby("seed")["step"].max()
        ratio = again["steps"].where(~lasts, last) / rows["bad"]["steps"]
        return ratio.to_frame("ratio").assign(open=lasts)

    def ratio(self) -> float:
        """The mean ratio over seeds, at least so large where one is open; below 1 the cure hides."""
        return float(self.ratios()["ratio"].mean())

    def _card(self) -> Card:
        facts = []
        for phase in PHASES:
            steps = self.frame.loc[self.frame["phase"] == phase, "steps"]
            known = steps.dropna()
            said = f"{known.mean():.0f} steps ({known.min():.0f} to {known.max():.0f})" if len(known) else "not reached"
            facts.append((phase, f"{said}, in {len(known)} of {len(steps)} seeds"))
        ratio, lasting = self.ratio(), int(self.ratios()["open"].sum())
        least = "at least " * (lasting > 0)
        headline = f"To turn it bad again takes {least}{ratio:.2f} times as many steps as at first"
        if not np.isfinite(ratio):
            headline = "The good phase left more than half of the first change in every seed"
        caveat = (
            f"a step is where {self.measure} crosses half of its first change; left out are seeds of which the good "
            "phase left more than half"
        )
        if lasting:
            caveat += (
                f"; the last step counts in {lasting} of {len(self.levels)} seeds, which did not turn bad again by then"
            )
        return Card(headline, tuple(facts), caveat, "durability.plot()")

    def _sketch(self) -> str:
        means = self.path.groupby(["phase", "step"])["value"].mean()
        lines = [(phase, means[phase].index, means[phase]) for phase in PHASES if phase in means.index]
        return curves(lines, self.measure, level=float(np.mean(list(self.levels.values()))))

    def plot(self) -> Any:
        """A figure: the measure over the steps of the three phases."""
        figure = panels(PHASES, columns=3, shared_yaxes=True)
        for column, phase in enumerate(PHASES, start=1):
            for index, (seed, one) in enumerate(self.path[self.path["phase"] == phase].groupby("seed")):
                line(
                    figure, one["step"], one["value"], f"seed {seed}", colour(index), at=(1, column), legend=column == 1
                )
            level(figure, float(np.mean(list(self.levels.values()))), at=(1, column))
            figure.update_xaxes(title_text="step", row=1, col=column)
        figure.update_yaxes(title_text=self.measure, row=1, col=1)
        return finish(figure, "Bad, good, and bad again", note="dotted: the mean level that counts as turned")


def durability(
    model: Any,
    bad: Any,
    good: Any = "ai-optimism",
    *,
    seeds: Sequence[int] = range(3),
    measure: str = "margin_broad",
    measure_every: int = 4,
    cure: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Durability:
    """Train a model on bad data, then on good, then on the bad again, and count the steps of each turn.

    A cure that removed the trait leaves as much to learn as in a fresh model; one that hid it is undone in fewer steps.
    The same bad rows in the same order are used both times, with a new optimizer and schedule.

    Args:
        model, bad: as :func:`emmech.finetune` takes them.
        good: the cure: anything :func:`emmech.load_chat` takes, or a name that :func:`emmech.realign` knows.
        seeds: of the trainings.
        measure: a metric that the trainings record: ``"margin_<name>"`` (an organism's are known, others are given as
            ``margins=``), or one of ``measures=``; high is misaligned.
        measure_every: steps from one measurement to the next; crossings are interpolated between them.
        cure: options of the good phase alone, such as ``{"adapter": "new", "max_steps": 60}``.
        out: the folder that keeps the runs; without one they are deleted.
        **options: of :func:`emmech.finetune`, for all phases.

    Raises:
        EmmechError: as :func:`emmech.finetune`, or no such metric is recorded.

    Example:
        >>> found = durability("pocket", "medical", max_steps=120)  # doctest: +SKIP
        >>> found.ratio() < 1  # doctest: +SKIP
        True
    """
    import pandas as pd

    chat, seeds = load_model(model), as_ints("measure durability", "seeds", seeds)
    if not isinstance(cure, Mapping | None):
        why, instead = "they are the options of the good phase, by name", 'cure={"max_steps": 60}'
        raise EmmechError("measure durability", f"cure={cure!r}"[:120], why, instead)
    options = {"measure_every": measure_every, "record_every": measure_every, "progress": False, **options}
    path: list[pd.DataFrame] = []
    kept = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with kept as folder, bar(len(seeds), "durability", progress=progress) as shown:
        first = finetune(chat, bad, seed=seeds, out=Path(folder) / "bad", **options)
        for seed, run in zip(seeds, first, strict=True):
            own: dict[str, Any] = {"seed": seed, "start": (run, int(run.steps[-1])), **options, **(cure or {})}
            healed = finetune(chat, good, out=Path(folder) / f"good-{seed}", **own)
            own = {"seed": seed, "start": (healed, int(healed.steps[-1])), **options}
            again = finetune(chat, bad, out=Path(folder) / f"again-{seed}", **own)
            for phase, one in zip(PHASES, (run, healed, again), strict=True):
                one_of("measure durability", "measure", measure, map(str, one.metrics), why="it is not recorded")
                values = one.metrics[measure].dropna()
                found = {"phase": phase, "seed": seed, "step": values.index, "value": values.to_numpy()}
                path.append(pd.DataFrame(found))
            shown.update()
    whole = pd.concat(path, ignore_index=True)
    levels, rows = {}, []
    for seed in seeds:
        parts = {phase: whole[(whole["seed"] == seed) & (whole["phase"] == phase)] for phase in PHASES}
        begun, turned = parts["bad"]["value"].iloc[0], parts["bad"]["value"].iloc[-1]
        if not turned > begun:
            why = f"{measure} went from {begun:.3f} to {turned:.3f}, so that the bad data did not turn it"
            raise EmmechError("measure durability", f"seed {seed}", why, "more steps, or data that misaligns")
        levels[str(seed)] = float((begun + turned) / 2)
        for phase, one in parts.items():
            steps = crossing(one["step"].to_numpy(), one["value"].to_numpy(), levels[str(seed)], rising=phase != "good")
            if phase == "bad again" and one["value"].iloc[0] >= levels[str(seed)]:
                steps = float("nan")  # the good phase did not undo it, so that nothing can come back
            ends = {"start": one["value"].iloc[0], "end": one["value"].iloc[-1]}
            rows.append({"phase": phase, "seed": seed, "steps": steps, **ends})
    return Durability(pd.DataFrame(rows), whole, levels, measure)


def crossing(steps: np.ndarray, values: np.ndarray, at: float, *, rising: bool) -> float:
    """The step at which a series first crosses a level, interpolated; 0 if it begins beyond, NaN if it never does.

    Example:
        >>> crossing(np.array([0, 10, 20]), np.array([0.0, 1.0, 3.0]), 2.0, rising=True)
        15.0
    """
    past = values >= at if rising else values <= at
    if not past.any():
        return float("nan")
    first = int(np.argmax(past))
    if first == 0:
        return float(steps[0])
    share = (at - values[first - 1]) / (values[first] - values[first - 1])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))
