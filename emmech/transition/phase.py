"""``phase_transition``: every detector on one run, compared with its benign control.

There is no single transition. The detectors read the path (mechanistic) and the metrics (behavioural); each has its
own step, interval and null model, and the lag between the two kinds is a result of its own. The direction of B
turns in benign fine-tunes as well (Model Organisms for Emergent Misalignment, arXiv 2506.11613, describes the turn;
the control is what says whether a turn has anything to do with misalignment).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from emmech.errors import EmmechError, as_int, closest
from emmech.run.run import as_run, opened
from emmech.transition.arrangement import comp_detector
from emmech.transition.behaviour import fit_sigmoid
from emmech.transition.detectors import PICTURE, Detector, analyse
from emmech.transition.result import PhaseTransition, PooledTransition, Side
from emmech.transition.series import find_peak
from emmech.transition.swept import swept_behaviour

if TYPE_CHECKING:
    import pandas as pd


Array = npt.NDArray[np.float64]

GRADIENT_MEANS = "height of the gradient norm's peak over its base (ratio; 1 = no peak)"
MARGIN_MEANS = "change of the misaligned-over-aligned margin, nats per token; positive means more misaligned"
MARGIN_NULL = "no change, or a gradual approach, with autoregressive noise; the larger p-value"


@overload
def phase_transition(  # type: ignore[overload-overlap]
    run: list[Any], control: Any = ..., *,
    k: Any = ..., adapter: str | None = ..., centre: str = ..., sweep: Any = ..., seed: int = ..., n_null: int = ...
) -> PooledTransition: ...  # fmt: skip
@overload
def phase_transition(
    run: Any, control: Any = ..., *,
    k: Any = ..., adapter: str | None = ..., centre: str = ..., sweep: Any = ..., seed: int = ..., n_null: int = ...
) -> PhaseTransition: ...  # fmt: skip
def phase_transition(
    run: Any,
    control: Any = None,
    *,
    k: int | Sequence[int] | None = None,
    adapter: str | None = None,
    centre: str = "adapters",
    sweep: Any = None,
    seed: int = 0,
    n_null: int = 199,
) -> PhaseTransition | PooledTransition:
    """Find the phase transition of a recorded fine-tune, and say what distinguishes it from its controls.

    The trajectory is B of the adapter (the B of all adapters together if there are several and none is named; the
    random projection of the update for full fine-tuning).

    Args:
        run: a :class:`emmech.Run` or its folder; :meth:`emmech.Run.from_arrays` needs no model. Several runs that
            differ in their seed are pooled: the seeds are then the sample.
        control: a benign run with the same seed and batch order, analysed in the same way; for several runs, a list of
            equal length. Several kinds of control are given by name: good data, and data with something to learn
            (``{"good": ..., "style": ...}``).
        k: half-width or half-widths of the local cosine in recorded steps; default 5, 10, 20, 40 as they fit.
        adapter: analyse this adapter only.
        centre: axis of the comp score's mean, ``"adapters"`` (the paper) or ``"steps"``.
        sweep: what :func:`emmech.sweep` measured on the run (and on its control, in the same sweep): its measures at
            every scale become behavioural detectors, and take the place of recorded margins of the same name.
        seed: of the simulated null paths.
        n_null: null paths per hypothesis; the smallest possible p-value is 1 / (n_null + 1).

    Returns:
        :class:`PhaseTransition`, or for a list of runs :class:`PooledTransition`. With fewer than 10 recorded steps, or
        an adapter that never moved, its rows say "not measurable" and why.

    Raises:
        EmmechError: steps not ascending, fewer than three records, NaN in the trajectory, an unknown adapter, k that
            does not fit, n_null under 20 (no p-value could fall under 0.05), or runs and controls that do not pair.

    Example:
        >>> import numpy as np, emmech
        >>> rng = np.random.default_rng(0)
        >>> along = np.repeat(np.eye(64)[:2], [60, 60], axis=0)  # a right angle after 60 records
        >>> B = np.cumsum(along + rng.standard_normal((120, 64)) / 8, axis=0)
        >>> t = emmech.phase_transition(emmech.Run.from_arrays(np.arange(120), B=B.astype("float32")))
        >>> t.mechanistic.step, bool(t.detectors.p_value["turn"] < 0.05)
        (59, True)
    """
    if not isinstance(n_null, int | np.integer) or n_null < 20:
        raise EmmechError(
            "give p-values",
            f"n_null={n_null!r}",
            "the smallest p-value is 1 / (n_null + 1), so fewer than 20 null paths never fall under 0.05",
            "n_null=199",
        )

    seed = as_int("draw null paths", "seed", seed, least=0)
    if centre not in ("adapters", "steps"):
        raise EmmechError("compare adapters", f"centre={centre!r}", "unknown", '"adapters" or "steps"')
    several = isinstance(run, list | tuple)
    runs = [_opened(one, "run") for one in (run if several else [run])]
    if not runs:
        raise EmmechError("look for a turn", "no run", "there is nothing to look at", "at least one run")
    controls = _paired(runs, control, several)
    if sweep is not None and not hasattr(sweep, "to_frame"):
        raise EmmechError(
            "read the sweep",
            f"sweep={sweep!r}"[:120],
            "it is not a sweep",
            "sweep=emmech.sweep(run, scales=(1, 5, 10, 20))",
        )

    def side(one: Any, beside: Side | None) -> Side:
        found = _analyse(one, beside, k=k, adapter=adapter, centre=centre, seed=seed, n_null=int(n_null))
        return _with_sweep(found, sweep, needed=beside is None)

    pairs = []
    for one, beside in zip(runs, controls, strict=True):
        first = side(one, None)
        found = [side(other, first) for other in beside]
        if isinstance(control, Mapping):
            found = [replace(other, name=str(name)) for name, other in zip(control, found, strict=True)]
        pairs.append(PhaseTransition(first, tuple(found)))
    return PooledTransition(tuple(pairs)) if several else pairs[0]


def _paired(runs: list[Any], control: Any, several: bool) -> list[list[Any]]:
    """The controls of each run, given as one control, one for each run, or either of these by name."""
    kinds = list(control.values()) if isinstance(control, Mapping) else [] if control is None else [control]
    kinds = [list(kind) if several and isinstance(kind, list | tuple) else [kind] for kind in kinds]
    for kind in kinds:
        if len(kind) != len(runs) or any(isinstance(one, list | tuple) for one in kind):
            given = f"{len(runs)} run(s) and {len(kind)} control(s)"
            why = "seeds are compared in pairs: each run with the control of its seed and batch order"
            instead = "control=[one a run]; several kinds of control by name: control={'good': ..., 'style': ...}"
            raise EmmechError("pair runs with controls", given, why, instead)
    controls = [[_opened(kind[at], "control") for kind in kinds] for at in range(len(runs))]
    for one, beside in zip(runs, controls, strict=True):
        place = getattr(one, "path", None)
        if any(other is one or (place and getattr(other, "path", None) == place) for other in beside):
            instead = "a run on harmless data with the same seed and batch order"
            name = getattr(one, "name", "the run")
            raise EmmechError("compare a run with its control", name, "both are the same run", instead)
    return controls


def _opened(run: Any, name: str) -> Any:
    """A run, or an object that has the steps of one."""
    found = opened(run)
    return found if hasattr(found, "steps") else as_run("look for a turn", run, name=name)


def _analyse(
    run: Any,
    beside: Side | None,
    *,
    k: int | Sequence[int] | None,
    adapter: str | None,
    centre: str,
    seed: int,
    n_null: int,
) -> Side:
    name = str(getattr(run, "name", "run"))
    steps, stacks = _trajectories(run, adapter, name)
    steps, stacks = _moving(steps, stacks)
    windows = _windows(k, len(steps))
    vectors = [stack.reshape(len(steps), -1) for stack in stacks.values()]
    rng = np.random.default_rng(seed)
    path = analyse(np.concatenate(vectors, axis=1), steps, windows, n_null, rng, beside.path if beside else None)
    rows = list(path.detectors)
    comp: Array | None = None
    if len(stacks) > 1 and len({v.shape for v in vectors}) == 1:
        row, comp = comp_detector(np.stack(vectors), steps, centre)
        rows.append(row)
    metrics = getattr(run, "metrics", None)
    gradient, gradient_series = _gradient(metrics, list(stacks), rng)
    rows.append(gradient)
    behaviour, curves = _behaviour(metrics)
    return Side(name, path, (*rows, *behaviour), gradient_series, curves, comp, *_falls(metrics))


def _falls(metrics: pd.DataFrame | None) -> tuple[float, float]:
    """How far the held-out loss fell, in nats per token, and its largest fall as a share of its first value."""
    losses = [] if metrics is None or "held_out_loss" not in metrics else metrics["held_out_loss"].dropna().to_list()
    if len(losses) < 2:
        return float("nan"), float("nan")
    return float(losses[0] - losses[-1]), float(1 - min(losses[1:]) / losses[0] if losses[0] > 0 else "nan")


def _with_sweep(side: Side, sweep: Any, *, needed: bool) -> Side:
    """The side with its behaviour as swept; a control may be missing from the sweep, but the run may not."""
    if sweep is None or (not needed and side.name not in set(sweep.to_frame()["run"])):
        return side
    rows, curves = swept_behaviour(sweep, side.name)
    swept = {row.name for row in rows}
    kept = tuple(row for row in side.rows if row.name not in swept)
    return replace(side, rows=(*kept, *rows), margins={**side.margins, **curves})


def _trajectories(run: Any, adapter: str | None, name: str) -> tuple[npt.NDArray[np.int64], dict[str, Array]]:
    """Recorded steps, and the vectors ``[steps, d]`` or matrices ``[steps, d, r]`` by adapter."""
    steps = np.asarray(run.steps, dtype=np.int64)
    if len(steps) < 3:
        raise EmmechError(
            f"look for a turn in {name}",
            f"{len(steps)} recorded steps",
            "a turn needs a point before, a point at and a point after it",
            "record more often (record_every=1)",
        )
    if np.any(np.diff(steps) <= 0):
        at = int(np.flatnonzero(np.diff(steps) <= 0)[0])
        raise EmmechError(
            f"look for a turn in {name}",
            f"step {steps[at + 1]} after step {steps[at]}",
            "recorded steps must ascend without duplicates",
            "sort the records and keep one per step",
        )
    names = [info.name for info in (getattr(run, "adapters", None) or ())]
    if adapter is not None and adapter not in names:
        raise EmmechError(
            f"look for a turn in {name}", f"adapter={adapter!r}", "the run has no such adapter", closest(adapter, names)
        )
    if names:
        chosen = [adapter] if adapter is not None else names
        stacks = {key: np.asarray(run.B(key), dtype=np.float64) for key in chosen}
    elif getattr(run, "projection", None) is not None:
        stacks = {"projection": np.asarray(run.projection, dtype=np.float64)}
    else:
        raise EmmechError(
            f"look for a turn in {name}",
            "a run without adapters and without a projection of the update",
            "there is no trajectory to look at",
            "emmech.finetune records one, and Run.from_arrays takes one",
        )
    for key, stack in stacks.items():
        if stack.ndim not in (2, 3) or len(stack) != len(steps):
            raise EmmechError(
                f"look for a turn in {name}",
                f"B of {key} with shape {stack.shape} for {len(steps)} steps",
                "a trajectory is [steps, d_out] or [steps, d_out, rank]",
                "one record per step",
            )
        bad = ~np.isfinite(stack).reshape(len(steps), -1).all(axis=1)
        if bad.any():
            raise EmmechError(
                f"look for a turn in {name}",
                f"NaN or infinity in B of {key} at step {steps[int(np.argmax(bad))]}",
                f"{int(bad.sum())} of {len(steps)} records are not finite numbers",
                "end the trajectory before training diverged",
            )
        if stack.ndim == 3 and stack.shape[2] == 1:
            stacks[key] = stack[:, :, 0]
    return steps, stacks


def _moving(steps: npt.NDArray[np.int64], stacks: dict[str, Array]) -> tuple[npt.NDArray[np.int64], dict[str, Array]]:
    """The path without the records before the first and after the last movement: at rest it has no direction."""
    moved = np.zeros(len(steps) - 1, dtype=bool)
    for stack in stacks.values():
        moved |= np.any(np.diff(stack, axis=0) != 0, axis=tuple(range(1, stack.ndim)))
    if not moved.any():
        return steps, stacks
    at = np.flatnonzero(moved)
    keep = slice(int(at[0]), int(at[-1]) + 2)
    return steps[keep], {key: stack[keep] for key, stack in stacks.items()}


def _windows(k: int | Sequence[int] | None, n: int) -> tuple[int, ...] | None:
    if k is None:
        return None
    windows = (k,) if isinstance(k, int | np.integer) else tuple(k)
    for window in windows:
        if isinstance(window, bool) or not isinstance(window, int | np.integer) or not 1 <= window <= (n - 1) // 2:
            raise EmmechError(
                "look k recorded steps back and ahead",
                f"k={window!r}",
                f"the run has {n} recorded steps, so k is an integer from 1 to {(n - 1) // 2}",
                "leave k out for windows that fit",
            )
    return tuple(int(window) for window in windows) or None


def _gradient(
    metrics: pd.DataFrame | None, adapters: list[str], rng: np.random.Generator
) -> tuple[Detector, tuple[Array, Array] | None]:
    def unmeasured(note: str) -> Detector:
        return Detector.unmeasured("gradient-norm", "gradient", GRADIENT_MEANS, PICTURE, note)

    columns = [] if metrics is None else list(metrics.columns)
    own = [f"grad_norm_B/{name}" for name in adapters if f"grad_norm_B/{name}" in columns]
    used = own or [c for c in ("grad_norm",) if c in columns]
    if metrics is None or not used:
        return unmeasured("not measurable: the run recorded no gradient norms"), None
    # several adapters: the norm of their gradients taken together
    series = np.sqrt((metrics[used].astype(float) ** 2).sum(axis=1, skipna=False)).dropna()
    steps, values = series.index.to_numpy(dtype=np.float64), series.to_numpy()
    if len(values) < 10 or not np.any(values > 0):
        return unmeasured(f"not measurable: {len(values)} gradient norms, at least 10 above zero are needed"), None
    peak = find_peak(values, rng)
    if peak is None:
        return unmeasured("no peak: the smoothed gradient norm is monotone"), (steps, values)
    row = Detector(
        "gradient-norm",
        "gradient",
        float(steps[peak.index]),
        float(steps[peak.low]),
        float(steps[peak.high]),
        peak.ratio,
        np.nan,
        GRADIENT_MEANS,
        PICTURE,
        "B, before clipping" if own else "all trained parameters, before clipping",
    )
    return row, (steps, values)


def _behaviour(metrics: pd.DataFrame | None) -> tuple[list[Detector], dict[str, tuple[Array, Array]]]:
    rows: list[Detector] = []
    curves: dict[str, tuple[Array, Array]] = {}
    for column in ("margin_narrow", "margin_broad"):
        if metrics is None or column not in metrics.columns:
            continue
        series = metrics[column].astype(float).dropna()
        steps, values = series.index.to_numpy(dtype=np.float64), series.to_numpy()
        name = column.replace("_", "-")
        fit, why = fit_sigmoid(steps, values)
        curves[name] = (steps, values)
        if fit is None:
            rows.append(Detector.unmeasured(name, "behaviour", MARGIN_MEANS, MARGIN_NULL, why))
            continue
        note = f"half of the change; 10 to 90 % in about {fit.duration:.0f} steps"
        change = fit.end - fit.start
        rows.append(
            Detector(
                name, "behaviour", fit.middle, fit.low, fit.high, change, fit.p_value, MARGIN_MEANS, MARGIN_NULL, note
            )
        )
    return rows, curves
