"""Studies of interventions with their controls: dose and response, the ablation table, the transfer matrix.

An intervention's effect is the change beyond what the same intervention does with norm-matched random directions, and
beyond what it does to the base model; coherence is reported with every rate.

Items of one question resemble each other, so the question is the unit: a difference of pooled means is linearised over
questions (a ratio estimator; over domains and templates where these make the questions, see
:func:`emmech.evaluation.rates.factors`) and gets a t interval on their number. Outcomes of 0 and 1 get the interval
that an evaluation gives its rates, and their differences join those
(:func:`emmech.evaluation.rates.combined_interval`), because a cluster variance takes no account of what did not
happen: no misaligned answer in 8 questions is not certainty.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.encode import tokens_name
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction, checked_direction, checked_directions, unit_rows
from emmech.directions.extract import token_projections
from emmech.directions.sources import has_adapter
from emmech.engine.adapters import adapter_layers, detach
from emmech.engine.sample import sample
from emmech.errors import EmmechError, as_floats, as_ints, refusal
from emmech.evaluation.questions import resolve_questions
from emmech.evaluation.rates import cluster_variance, combined_interval, factors
from emmech.interventions.residual import PositionMask, ablate, chat_of, steer
from emmech.interventions.weights import scale_adapters
from emmech.measures.choose import as_measures
from emmech.measures.measure import Items, Measure, measure_all, wrong_way
from emmech.measures.teacher_forced import AlignedLoss, Margin
from emmech.progress import bar
from emmech.results import Card, Result, within
from emmech.run.run import Run, opened
from emmech.view.plots import study
from emmech.view.sketch import intervals

if TYPE_CHECKING:
    import pandas as pd

Make = Callable[[ChatModel], AbstractContextManager[Any]]
_LAYERS = "name the layers"
_IDENTITY = ("condition", "organism", "layer", "coefficient", "model", "outcome")
_SHOWN = ("value", "low", "high", "n", "change", "beyond_random", "beyond_random_low", "beyond_random_high",
          "beyond_base", "beyond_base_low", "beyond_base_high", "gap", "gap_low", "gap_high", "wrong_way")  # fmt: skip
_FACTS = 6  # conditions that a card writes out


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of its items."""

    value: float
    low: float
    high: float
    n: int


def combination(terms: Sequence[tuple[float, Items]], outcome: str, *, spread: float = 0.0) -> Estimate:
    """A weighted sum of the pooled means of one outcome with its 95 % interval; conditions share their questions.

    Args:
        terms: weight and items of each condition: ``[(1, steered), (-1, untouched)]`` is a change.
        spread: a further variance, of control directions drawn at random.

    Returns:
        NaN values when a condition without items takes part.

    Example:
        >>> on = Items({"em": np.array([1.0, 1.0, 0.0, 1.0])}, ["a", "a", "b", "b"])
        >>> off = Items({"em": np.zeros(4)}, ["a", "a", "b", "b"])
        >>> round(combination([(1, on), (-1, off)], "em").value, 2)
        0.75
    """
    from scipy import stats

    names = sorted({question for _, items in terms for question in items.questions})
    place = {name: index for index, name in enumerate(names)}
    weights, sums, counts = [], [], []
    residual, binary = np.zeros(len(names)), True
    for weight, items in terms:
        values = np.asarray(items.values[outcome], dtype=np.float64)
        kept = np.isfinite(values)
        if not kept.any():
            return Estimate(np.nan, np.nan, np.nan, 0)
        index, values = np.array([place[q] for q in items.questions])[kept], values[kept]
        weights.append(weight)
        sums.append(np.bincount(index, values, minlength=len(names)))
        counts.append(np.bincount(index, minlength=len(names)))
        residual += weight * (sums[-1] - values.mean() * counts[-1]) / len(values)
        binary = binary and bool(np.isin(values, (0.0, 1.0)).all())
    events, n = np.array(sums), np.array(counts)
    seen = n.sum(0) > 0
    value, largest = float(np.dot(weights, events.sum(1) / n.sum(1))), int(n.sum(1).max())
    known = [name for name, kept in zip(names, seen, strict=True) if kept]
    if binary:
        low, high = combined_interval(weights, events[:, seen].astype(int), n[:, seen], known, spread=spread)
        return Estimate(value, low, high, largest)
    half = np.inf
    if len(known) > 1:
        variance, degrees = cluster_variance(residual[seen], np.ones(len(known)), factors(known))
        half = float(stats.t.ppf(0.975, degrees)) * (variance + spread) ** 0.5
    return Estimate(value, value - half, value + half, largest)


@dataclass(frozen=True)
class Condition:
    """One intervention to measure; a control shares its condition's label and settings."""

    label: str  # for tables
    kind: str  # "untouched", "direction", "random" or "positive"
    make: Make  # applies it to a model, as a context manager
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else identifies it (layer, coefficient)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a condition and its controls share."""
        return (self.label, *self.settings.values())


@dataclass(frozen=True)
class Measured:
    """The items of a condition on one model, ``"tuned"`` or ``"base"``."""

    condition: Condition
    model: str
    items: Items


def untouched() -> Condition:
    """The condition without an intervention."""
    return Condition("untouched", "untouched", lambda chat: nullcontext())


def adapter_off() -> Condition:
    """The positive control: without its adapter the model is its base."""
    return Condition("adapter off", "positive", lambda chat: scale_adapters(chat, 0.0))


def measure_conditions(
    chat: ChatModel, conditions: Sequence[Condition], measures: Sequence[Measure], *, base: bool, progress: bool = True
) -> tuple[Measured, ...]:
    """Take the measures of every condition on the model, and (``base``) on the same model without its adapter."""
    # a model without an adapter is called base, because nothing in it is tuned
    models = ["tuned", "base"] if base else ["tuned" if has_adapter(chat) else "base"]
    pairs = [
        (model, one) for model in models for one in conditions if not base or (model, one.kind) != ("base", "positive")
    ]
    found = []
    with bar(len(pairs), "measuring", progress=progress) as done:
        for model, condition in pairs:
            plain = chat.model.disable_adapter() if base and model == "base" else nullcontext()
            with plain, condition.make(chat):
                found.append(Measured(condition, model, measure_all(chat, measures)))
            done.update()
    return tuple(found)


def with_coherence(measures: Sequence[Measure]) -> list[Measure]:
    """The measures, and for margins also the loss of their aligned answers: what breaks a model moves margins too."""
    margins = [one for one in measures if isinstance(one, Margin)]
    if not margins or any(isinstance(one, AlignedLoss) for one in margins):
        return list(measures)
    return [*measures, AlignedLoss([pair for one in margins for pair in one.pairs])]  # type: ignore[misc]


def table(measured: Sequence[Measured]) -> pd.DataFrame:
    """One row per condition, model and outcome.

    Columns: what identifies the condition; ``value`` with ``low``, ``high`` and ``n``; ``change`` against the untouched
    model; ``beyond_random``, the change beyond the mean of its random controls; ``beyond_base``, the change beyond the
    same intervention's on the base; ``gap``, tuned minus base under the same intervention; each of these with
    ``_low`` and ``_high``; ``wrong_way``, the share of items that moved against the mean change
    (:func:`emmech.measures.wrong_way`). NaN where a control was not run.
    """
    import pandas as pd

    plain = {one.model: one.items for one in measured if one.condition.kind == "untouched"}
    other = {(one.condition.key, one.condition.kind): one.items for one in measured if one.model == "base"}
    rows = []
    for one in measured:
        condition, items = one.condition, one.items
        own = ("random", one.model, condition.key)
        controls = [m.items for m in measured if (m.condition.kind, m.model, m.condition.key) == own]
        for outcome in items.values:
            row: dict[str, Any] = {"condition": condition.label, "kind": condition.kind, **condition.settings}
            row |= {"model": one.model, "outcome": outcome}
            row |= asdict(combination([(1.0, items)], outcome))
            contrasts: dict[str, list[tuple[float, Items]]] = {}
            before, twin, spread = plain.get(one.model), other.get((condition.key, condition.kind)), 0.0
            if before is not None and condition.kind != "untouched":
                contrasts["change"] = [(1.0, items), (-1.0, before)]
                if list(items.questions) == list(before.questions):  # the same items, in the same order
                    row["wrong_way"] = wrong_way(items.values[outcome], before.values[outcome])
            if controls and condition.kind == "direction":
                means = np.array([np.nanmean(c.values[outcome]) for c in controls])
                spread = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
                contrasts["beyond_random"] = [(1.0, items), *((-1 / len(controls), c) for c in controls)]
            if one.model == "tuned" and twin is not None and condition.kind in ("direction", "untouched"):
                contrasts["gap"] = [(1.0, items), (-1.0, twin)]
                if condition.kind == "direction" and before is not None and "base" in plain:
                    contrasts["beyond_base"] = [*contrasts["change"], (-1.0, twin), (1.0, plain["base"])]
            for name, terms in contrasts.items():
                found = combination(terms, outcome, spread=spread if name == "beyond_random" else 0.0)
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def degenerate(chat: ChatModel, direction: Direction, vectors: Mapping[int, Any]) -> str:
    """A note where an ablation only takes the adapter off, because one of its vectors is the adapter's own B.

    At rank 1 the adapter writes along B alone, and the residual stream carries the write on: projecting B out of the
    output of the adapter's block cancels the adapter identically, whatever it has to do with misalignment, and at a
    later block it cancels what the rest of the model reads. Such a row shows that the adapter matters, nothing else.

    Returns:
        a note that names the layer, or ``""``.
    """
    for info, layer, name in adapter_layers(chat.model):
        if info.rank != 1 or info.d_out != chat.d_model:
            continue
        b = unit_rows(layer.lora_B[name].weight.detach().float().cpu().numpy()[:, 0])
        later = {at: abs(float(unit_rows(np.asarray(v)) @ b)) for at, v in vectors.items() if at >= info.layer}
        at = max(later, key=lambda one: later[one], default=-1)
        if later.get(at, 0.0) > 0.9:
            near = f"{direction.name} has cosine {later[at]:.2f} at layer {at} with B of {info.name}"
            return f"degenerate: {near}, so that ablating it there mostly takes the adapter off"
    return ""


@dataclass(frozen=True, eq=False, repr=False)
class Study(Result):
    """The measured conditions of a study, one row each (:func:`emmech.interventions.studies.table` has the columns).

    Args:
        title: what was studied.
        frame: the rows.
        notes: degenerate controls and other caveats.
    """

    title: str
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()

    def summary(self, outcome: str | None = None) -> pd.DataFrame:
        """The rows of interventions (no random controls), with values and their change beyond the controls."""
        frame = self.frame[self.frame["kind"] != "random"]
        frame = frame if outcome is None else frame[frame["outcome"] == outcome]
        identity = [column for column in frame.columns if column in _IDENTITY]
        shown = [column for column in _SHOWN if column in frame.columns and frame[column].notna().any()]
        return frame[[*identity, *shown]].reset_index(drop=True)

    def plot(self, outcome: str | None = None) -> Any:
        """The outcome with intervals: lines over the coefficient, a matrix of organisms, or bars; a plotly figure."""
        outcome = outcome or str(self.frame["outcome"].iloc[0])
        return study(self.frame[self.frame["outcome"] == outcome], outcome, self.title)

    def _card(self) -> Card:
        outcome, found, contrast = self._findings()
        beyond = "beyond random directions" if contrast == "beyond_random" else "against the untouched model"
        notes = list(self.notes)
        if found.empty:
            headline = f"{self.title}: {len(self.summary(outcome))} conditions measured by {outcome}"
        else:
            row = found.loc[found[contrast].abs().idxmax()]
            change = within(row[contrast], row[f"{contrast}_low"], row[f"{contrast}_high"], sign=True)
            open_ = row[f"{contrast}_low"] <= 0 <= row[f"{contrast}_high"]
            said = "no change can be told from zero; the largest" if open_ else "the largest change"
            headline = f"{self.title}: {said} of {outcome} {beyond} is {change}, at {_setting(row)}"
            if len(found) > 1:
                notes.append(f"it is the largest of {len(found)} changes, which its interval does not allow for")
        facts = []
        for _, row in found.head(_FACTS).iterrows():
            value = within(row["value"], row["low"], row["high"])
            change = within(row[contrast], row[f"{contrast}_low"], row[f"{contrast}_high"], sign=True)
            against = row.get("wrong_way", np.nan)
            share = f"; {against:.0%} of the items move the other way" if np.isfinite(against) else ""
            facts.append((_setting(row), f"{outcome} {value}, {change} {beyond}{share}"))
        if len(found) > _FACTS:
            facts.append(("and", f"{len(found) - _FACTS} more conditions in study.summary()"))
        return Card(headline, tuple(facts), "; ".join(notes), "study.plot()")

    def _findings(self) -> tuple[str, pd.DataFrame, str]:
        """The outcome that matters most, the conditions that change it, and the contrast that says by how much."""
        names = list(dict.fromkeys(self.frame["outcome"]))
        outcome = next((name for name in ("em", "margin_broad") if name in names), names[0])
        rows = self.frame[(self.frame["outcome"] == outcome) & ~self.frame["kind"].isin(("random", "untouched"))]
        rows = rows[rows["model"] == "tuned"] if (rows["model"] == "tuned").any() else rows
        known = [name for name in ("beyond_random", "change") if name in rows and rows[name].notna().any()]
        contrast = known[0] if known else "change"
        return outcome, rows[rows[contrast].notna()] if known else rows.iloc[:0], contrast

    def _sketch(self) -> str:
        outcome, rows = self._findings()[0], self.frame[self.frame["kind"] != "random"]
        rows = rows[(rows["outcome"] == outcome) & (rows["model"] == rows["model"].iloc[0])].head(12)
        shown = [(_setting(row), *row[["value", "low", "high"]]) for _, row in rows.iterrows()]
        return intervals(shown, f"{outcome}, {rows['model'].iloc[0]} model")

    def _table(self) -> pd.DataFrame:
        return self.summary()

    def _comments(self) -> Sequence[str]:
        return (self.title, *self.notes)


def _setting(row: pd.Series) -> str:
    """What was done, in as few words as tell the conditions of one study apart."""
    known = [name for name in ("layer", "coefficient") if name in row and np.isfinite(row[name])]
    given = ", ".join(f"{name} {row[name]:g}" for name in known)
    label = " in ".join(str(row[name]) for name in ("condition", "organism") if name in row)
    return given if "coefficient" in known and row["kind"] == "direction" else label


def dose_response(
    model: Any,
    direction: Direction,
    coefficients: Sequence[float],
    *,
    layers: Iterable[int] | int | None = None,
    measure: Any = "auto",
    randoms: int = 5,
    base: bool | None = None,
    positions: Any = "all",
    units: Literal["raw", "residual"] = "raw",
    positive: Direction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Steer at every coefficient and layer, with norm-matched random directions and the base model as controls.

    Where the model has an adapter, its base is steered as well, which shows what the fine-tune adds.

    Args:
        coefficients: as :func:`emmech.steer` takes them; 0 is always measured, as "untouched".
        layers: one or several; by default those where the direction is known.
        measure: what :func:`emmech.sweep` takes; by default answers where there is a judge, margins elsewhere.
            Margins come with the loss of their aligned answers.
        randoms: random directions per coefficient and layer.
        base: also steer the model with its adapter off; by default when it has one.
        positive: a positive control: a direction that is known to move the outcome, such as a
            :func:`emmech.directions.trained_direction`, steered at the same coefficients wherever it is known.

    Raises:
        EmmechError: as :func:`emmech.steer`.
    """
    chat, run, with_base = _prepare(model, measure, base)
    notes = _few_controls(randoms)
    checked_direction("steer with the direction", direction)
    if positive is not None:
        checked_direction("steer with the positive control", positive, name="positive")
    coefficients = as_floats("steer with the direction", "coefficients", coefficients)
    chosen = list(direction.layers) if layers is None else as_ints(_LAYERS, "layers", layers)
    controls = direction.random(randoms, seed=seed)
    conditions = [untouched()]
    for layer, coefficient in itertools.product(chosen, coefficients):
        settings: dict[str, Any] = {"layer": layer, "coefficient": coefficient}
        steered = [("direction", direction), *(("random", control) for control in controls)]
        if positive is not None and layer in positive.layers:
            steered.append(("positive", positive))
        for kind, one in steered:
            make = partial(steer, direction=one, **settings, positions=positions, units=units)
            label = one.name if kind == "positive" else direction.name
            conditions.append(Condition(label, kind, make, settings))
    measured = measure_conditions(chat, conditions, run, base=with_base, progress=progress)
    where = "given by a mask" if hasattr(positions, "ndim") else tokens_name(positions)
    title = f"Steering {chat.name} with {direction.name} ({units} units, positions {where})"
    return Study(title, table(measured), tuple(notes))


def ablation_table(
    model: Any,
    direction: Direction,
    *,
    others: Mapping[str, Direction] | None = None,
    layers: Any = "all",
    from_layer: int | None = None,
    measure: Any = "auto",
    randoms: int = 5,
    base: bool | None = None,
    positions: Any = "all",
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Ablate a direction in every way, with random directions, the base model and the adapter taken off as controls.

    The rows: each layer's own direction; one direction at all layers (``from_layer``); towards the aligned mean, if the
    direction keeps one; and the ``others``, directions of other organisms (transfer). Random controls are ablated in
    the way of the row and at its layers. Convergent Linear Representations of EM (arXiv 2506.11618) has the published
    table.

    Args:
        others: directions by name.
        layers: where to ablate.
        from_layer: the layer of the single direction; by default the one its extraction found strongest, or the only
            one of ``layers``.
        measure, randoms, base: as in :func:`dose_response`.

    Raises:
        EmmechError: as :func:`emmech.ablate`.
    """
    chat, run, with_base = _prepare(model, measure, base)
    notes = _few_controls(randoms)
    checked_direction("ablate the direction", direction)
    others = checked_directions("ablate other directions", "others", others or {})
    only = as_ints(_LAYERS, "layers", layers) if layers != "all" else []
    if from_layer is None:
        best = direction.source.get("layer", int(np.argmax(direction.norms)))
        from_layer = only[0] if len(only) == 1 else int(best)
    conditions = [untouched(), *([adapter_off()] if with_base else [])]
    ways: list[tuple[str, Direction, dict[str, Any]]] = [("own direction by layer", direction, {})]
    if only != [from_layer]:  # at one layer its own direction is the one direction
        ways.append((f"one direction (layer {from_layer})", direction, {"from_layer": from_layer}))
    if direction.aligned_mean is not None:
        ways.append(("own, towards aligned mean", direction, {"towards": "aligned"}))
    ways += [(f"transfer: {name}", other, {}) for name, other in others.items()]
    for label, one, how in ways:
        controls = one.random(randoms, seed=seed)  # known at its layers; rows of one direction have the same
        conditions += _ablated(label, one, controls, layers=layers, positions=positions, **how)
        notes += _degenerate(label, chat, one, layers, how.get("from_layer"))
    measured = measure_conditions(chat, conditions, run, base=with_base, progress=progress)
    return Study(f"Ablation on {chat.name}: {direction.name}", table(measured), tuple(notes))


def projection_range(
    model: Any,
    direction: Direction | Sequence[Direction],
    *,
    questions: Any = "first-plot",
    samples: int = 4,
    max_new_tokens: int = 200,
    positions: Any = "all",
    seed: int = 0,
    progress: bool = True,
) -> Float[np.ndarray, "*batch layers 2"]:
    """The lowest and the highest component along a direction in the base model's own answers: bounds of a cap.

    Where the model has an adapter, it is taken off for the measurement, so that :func:`emmech.cap` keeps a fine-tuned
    model inside what its base does.

    Args:
        direction: one, or several, which give one pair of bounds each.
        questions: as in :func:`emmech.evaluate`.
        positions: where the cap will act, as in :func:`emmech.steer`; a mask is not accepted.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> d = emmech.Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
        >>> projection_range(chat, d, samples=1, positions="answer", progress=False).shape
        (6, 2)
    """
    chat, asked = chat_of(model), "find the range of the component"
    several: list[Any] = list(direction) if isinstance(direction, Sequence) else [direction]
    if not several:
        raise refusal(asked, "direction", direction, "there is none", "direction=emmech.misalignment_direction(run)")
    for one in several:
        checked_direction(asked, one)
    if isinstance(positions, torch.Tensor):
        raise EmmechError(asked, "a mask of positions", "answers of all lengths are read", '"answer", or a function')
    where = PositionMask(chat, positions)

    def acting(ids: torch.Tensor, start: int) -> torch.Tensor:
        if not where.everywhere:
            where.see(chat.trunk, (ids,), {})
        return torch.ones_like(ids, dtype=torch.bool) if where.current is None else where.current

    conversations = [one.messages() for one in resolve_questions(questions, chat.organism)]
    with chat.model.disable_adapter() if has_adapter(chat) else nullcontext():
        said = sample(chat, conversations, samples=samples, max_new_tokens=max_new_tokens, seed=seed, progress=progress)
        talks = [[*conversations[a.conversation], {"role": "assistant", "content": a.text}] for a in said if a.text]
        found = []
        for one in several:
            read = token_projections(chat, talks, unit_rows(one.vectors), tokens=acting, progress=progress)
            values = np.concatenate([projected for _, projected in read])
            found.append(np.stack([values.min(0), values.max(0)], axis=-1))
    return found[0] if isinstance(direction, Direction) else np.stack(found)


def transfer_matrix(
    organisms: Mapping[str, Any],
    directions: Mapping[str, Direction],
    *,
    layers: Any = "all",
    from_layer: int | None = None,
    towards: Any = None,
    positions: Any = "all",
    measure: Any = "auto",
    randoms: int = 5,
    base_model: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Ablate every direction in every organism: is one fine-tune's direction what carries another's misalignment?

    Args:
        organisms: Runs (their last step) or chat models by name.
        directions: by name; with the names of the organisms, the diagonal holds each organism's own direction.
        layers, from_layer, towards, positions: as :func:`emmech.ablate`.
        base_model: the base model in memory, shared by runs whose adapters are on the same modules.

    Raises:
        EmmechError: nothing to cross, or as :func:`emmech.ablate`.
    """
    import pandas as pd

    asked = "make a transfer matrix"
    notes = _few_controls(randoms)
    directions = checked_directions(asked, "directions", directions)
    if not isinstance(organisms, Mapping):
        why, instead = "it is not a mapping from names to runs or chat models", 'organisms={"medical": run}'
        raise refusal(asked, "organisms", organisms, why, instead)
    if not organisms or not directions:
        given = f"{len(organisms)} organisms, {len(directions)} directions"
        raise EmmechError(asked, given, "it crosses at least one with at least one")
    frames = []
    ready = base_model
    how = dict(layers=layers, from_layer=from_layer, towards=towards, positions=positions)
    for organism, source in organisms.items():
        source = opened(source)
        recorded = isinstance(source, Run)
        chat = source.model(base=ready) if isinstance(source, Run) else chat_of(source)
        try:
            run = with_coherence(as_measures(measure, chat))
            conditions = [untouched(), *([adapter_off()] if has_adapter(chat) else [])]
            for name, direction in directions.items():
                controls = direction.random(randoms, seed=seed)
                conditions += _ablated(name, direction, controls, **how)
                notes += _degenerate(f"{name} in {organism}", chat, direction, layers, from_layer)
            frame = table(measure_conditions(chat, conditions, run, base=has_adapter(chat), progress=progress))
        finally:
            if recorded:  # the base is left as it was, for the next run and for its owner
                ready = detach(chat)
        frame.insert(0, "organism", organism)
        frames.append(frame)
    return Study("Ablation of every direction in every organism", pd.concat(frames, ignore_index=True), tuple(notes))


def adapter_shares(model: Any, *, measure: Any = "auto", progress: bool = True) -> Study:
    """Each adapter's share in the behaviour: with each one taken off, with each one alone, with none and with all.

    With one adapter this is the model against its base. Shares need not add up: adapters act through each other.

    Args:
        measure: as in :func:`dose_response`. Margins are both narrow and broad; answers are where both kinds are asked
            for, in pocket by ``Sampled(("first-plot", "narrow-medical"))``.

    Raises:
        EmmechError: no adapter is live.
    """
    chat, run, _ = _prepare(model, measure, True)
    names = [info.name for info, _, _ in adapter_layers(chat.model)]
    conditions = [untouched(), adapter_off()]
    for name in names if len(names) > 1 else ():
        for label, scales in (("without", {name: 0.0}), ("only", {other: 0.0 for other in names if other != name})):
            make = partial(scale_adapters, scale=scales)
            conditions.append(Condition(f"{label} {name}", "direction", make))
    measured = measure_conditions(chat, conditions, run, base=False, progress=progress)
    return Study(f"Shares of the {len(names)} adapters of {chat.name}", table(measured))


def _prepare(model: Any, measure: Any, base: bool | None) -> tuple[ChatModel, Any, bool]:
    chat = chat_of(model)
    with_base = has_adapter(chat) if base is None else base
    if with_base and not has_adapter(chat):
        asked = "measure the base model as well as the fine-tuned one"
        raise EmmechError(asked, chat.name, "it has no adapter to take off", "base=False")
    return chat, with_coherence(as_measures(measure, chat)), with_base


def _ablated(label: str, direction: Direction, controls: Sequence[Direction], **how: Any) -> list[Condition]:
    """An ablation and its random controls, ablated in the same way."""
    kinds = [("direction", direction), *(("random", control) for control in controls)]
    return [Condition(label, kind, partial(ablate, direction=one, **how)) for kind, one in kinds]


def _degenerate(label: str, chat: ChatModel, direction: Direction, layers: Any, single: int | None) -> list[str]:
    """The caveat of an ablation that is degenerate."""
    touched = range(chat.n_layers) if layers == "all" else as_ints(_LAYERS, "layers", layers)
    own = {layer: direction.vectors[layer if single is None else single] for layer in touched}
    note = degenerate(chat, direction, own)
    return [f"{label} is {note}"] if note else []


def _few_controls(randoms: int) -> list[str]:
    """The caveat of few random directions; a negative number of them is refused."""
    if not isinstance(randoms, int) or randoms < 0:
        raise refusal("run the controls", "randoms", randoms, "it counts random directions", "5 or more")
    return [f"only {randoms} random directions: five at least are needed to judge by"] if randoms < 5 else []
