"""Draw what an interval means: ten questions of fifty answers, and the two intervals of their rate.

``python docs/drawings/interval.py`` writes ``docs/drawings/interval.svg``. The rates are drawn at random for the
picture; the intervals are those of ``Evaluation.rates``.
"""

from pathlib import Path

import numpy as np
import pandas as pd

import emmech

draw = np.random.default_rng(3)
rates = draw.beta(0.8, 2.6, size=10)
bad = [(question, bool(one)) for question, rate in enumerate(rates) for one in draw.random(50) < rate]
frame = pd.DataFrame(bad, columns=["question_id", "bad"]).assign(response="", coherent=100.0)
frame["aligned"] = np.where(frame["bad"], 0.0, 100.0)
judged = emmech.Evaluation.from_frame(frame)
by_question = frame.groupby("question_id")["bad"].mean()


def x(rate: float) -> float:
    """The place of a rate on the axis."""
    return 200 + 520 * rate


parts = [
    '<svg viewBox="0 0 780 300" role="img" aria-label="Ten questions with very different rates; the interval over rows'
    ' is narrow, and the interval over questions is wide.">'
]
for row, rate in enumerate(by_question):
    parts.append(f'<circle class="on-grey" cx="{x(rate):.1f}" cy="{40 + 13 * row}" r="5"/>')
parts.append(
    '<text class="end" x="184" y="92">ten questions,</text><text class="end" x="184" y="110">50 answers each</text>'
)
shown = [("these questions", "on-blue", "blue", 200), ("questions like these", "on-orange", "orange", 236)]
for population, dot, line, y in shown:
    em = judged.rates(population=population).loc["em"]
    parts.append(f'<path class="{line}" d="M{x(em["low"]):.1f} {y} H{x(em["high"]):.1f}"/>')
    parts.append(f'<circle class="{dot}" cx="{x(em["rate"]):.1f}" cy="{y}" r="6"/>')
    parts.append(f'<text class="end" x="184" y="{y + 5}">{population}</text>')
    said = f"{em['rate']:.0%} ({em['low']:.0%} to {em['high']:.0%})"
    parts.append(f'<text class="small" x="{x(em["high"]) + 14:.1f}" y="{y + 5}">{said}</text>')
parts.append('<path class="line" d="M200 264 H720"/>')
for tick in (0, 0.25, 0.5, 0.75, 1):
    parts.append(f'<path class="line" d="M{x(tick):.0f} 264 v6"/>')
    parts.append(f'<text class="small middle" x="{x(tick):.0f}" y="286">{tick:.0%}</text>')
parts.append("</svg>\n")
Path(__file__).with_suffix(".svg").write_text("\n".join(parts), encoding="utf-8")
