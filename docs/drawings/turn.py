"""Draw the path of B in the shipped runs, in the two principal components of the misaligned one.

``python docs/drawings/turn.py`` writes ``docs/drawings/turn.svg`` from ``checkpoints/``.
"""

from pathlib import Path

import numpy as np

import emmech

folder = Path(__file__).resolve().parents[2] / "checkpoints"
run, control = (emmech.load_run(folder / name) for name in ("pocket-medical", "pocket-good-medical"))
b = run.B()
axes = np.linalg.svd(b - b.mean(0), full_matrices=False)[2][:2]
paths = {"run": (b - b[0]) @ axes.T, "control": (control.B() - b[0]) @ axes.T}
if paths["run"][-1, 0] < 0:
    paths = {name: path * [-1, 1] for name, path in paths.items()}
if paths["run"][61, 1] < paths["run"][-1, 1]:
    paths = {name: path * [1, -1] for name, path in paths.items()}
turn = emmech.phase_transition(run).mechanistic
every = np.concatenate(list(paths.values()))
low, high = every.min(0), every.max(0)
scale = min(620 / (high[0] - low[0]), 230 / (high[1] - low[1]))


def place(point: np.ndarray) -> tuple[float, float]:
    """Where a point of the plane is drawn."""
    return 60 + scale * (point[0] - low[0]), 60 + scale * (high[1] - point[1])


def line(path: np.ndarray) -> str:
    """A path as SVG draws it."""
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, path))


parts = ['<svg viewBox="0 0 780 320" role="img" aria-label="The path of B: straight at first, then it turns.">']
parts.append(f'<path class="blue dashed" d="{line(paths["control"])}"/><path class="orange" d="{line(paths["run"])}"/>')
at = {int(step): index for index, step in enumerate(run.steps)}
for step in (0, 30, turn.step, 100, 150, 250):
    x, y = place(paths["run"][at[step]])
    big = step == turn.step
    said = f"it turns: step {step} ({turn.low} to {turn.high})" if big else f"step {step}"
    parts.append(f'<circle class="on-orange" cx="{x:.1f}" cy="{y:.1f}" r="{8 if big else 4}"/>')
    down = -10 if big else 5 if step > 60 else 20
    parts.append(f'<text class="{"strong" if big else "small"}" x="{x + 14:.1f}" y="{y + down:.1f}">{said}</text>')
x, y = place(paths["control"][-1])
parts.append(f'<text class="small" x="{x + 10:.1f}" y="{y + 22:.1f}">the control, good answers</text>')
parts.append("</svg>\n")
Path(__file__).with_suffix(".svg").write_text("\n".join(parts), encoding="utf-8")
print(turn, {name: path.shape for name, path in paths.items()}, scale)  # noqa: T201
