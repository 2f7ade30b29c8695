"""When misalignment emerges in an organism's fine-tune: steps over seeds, and EM by step and adapter scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from emmech.chat.model import ChatModel
from emmech.measures.sampled import Sampled
from emmech.run.run import Run
from emmech.sweeps.sweep import sweep
from emmech.transition.phase import phase_transition

__all__ = ["by_scale", "by_seed"]

_ASKED = ("first-plot", "narrow-medical")
_LONGEST = 28  # tokens
_DETECTORS = {
    "gradient-norm": "gradient-norm peak",
    "turn": "turn of B",
    "narrow": "half of narrow",
    "em": "half of EM",
}


def by_seed(runs: Sequence[Run], controls: Sequence[Run], base: ChatModel) -> pd.DataFrame:
    """Steps of the gradient-norm peak, the turn of B and the sigmoids of narrow and broad EM, one row per seed.

    The last row holds the mean over seeds with a 95 % interval (Student's t over seeds).
    """
    every = runs[0].steps[:: max(1, len(runs[0].steps) // 25)]
    asked = Sampled(questions=_ASKED, samples=6, max_new_tokens=_LONGEST)
    swept = sweep(list(runs), steps=every.tolist(), measure=asked, base=base, progress=False)
    rows: list[dict[str, Any]] = []
    numbers: dict[str, list[float]] = {title: [] for title in _DETECTORS.values()}
    for seed, (run, control) in enumerate(zip(runs, controls, strict=True)):
        found = phase_transition(run, control=control, sweep=swept)
        row: dict[str, Any] = {"seed": str(seed)}
        for name, title in _DETECTORS.items():
            detector = found.run.row(name)
            if detector is None or not np.isfinite(detector.step):
                row[title] = f"none: {detector.note}" if detector is not None else "not measured"
                continue
            numbers[title].append(detector.step)
            row[title] = f"{detector.step:.0f} ({detector.low:.0f} to {detector.high:.0f})"
            if np.isfinite(detector.p_value):  # the gradient norm's peak is a picture without a test
                row[title] += f", p = {detector.p_value:.2g}"
        comparison = found.specific
        row["against the control"] = comparison.verdict if comparison is not None else "-"
        rows.append(row)
    rows.append({"seed": "mean"} | {title: _mean(steps) for title, steps in numbers.items()})
    return pd.DataFrame(rows)


def _mean(steps: Sequence[float]) -> str:
    from scipy import stats

    if len(steps) < 2:
        return f"{len(steps)} measured"
    half = float(stats.t.ppf(0.975, len(steps) - 1) * stats.sem(steps))
    middle = float(np.mean(steps))
    return f"{middle:.0f} ({middle - half:.0f} to {middle + half:.0f}), n = {len(steps)}"


def by_scale(run: Run, base: ChatModel, scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0)) -> pd.DataFrame:
    """EM in per cent at the first-plot questions, by step (rows) and scale of the adapter (columns)."""
    every = run.steps[:: max(1, len(run.steps) // 12)].tolist()
    asked = Sampled(questions="first-plot", samples=10, max_new_tokens=_LONGEST)
    swept = sweep(run, steps=every, scales=scales, measure=asked, base=base, progress=False).to_frame("em")
    table = 100 * swept.pivot_table(index="step", columns="scale", values="value")
    table.columns = [f"EM % at scale {scale:g}" for scale in table.columns]
    return table.reset_index().astype({"step": int})
