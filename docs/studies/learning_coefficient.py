"""The local learning coefficient along two shipped runs, beside the turn: the section of ``docs/transition.md``.

``python -m docs.studies learning-coefficient`` estimates it at the default size (the extra ``llc``, a quarter of an
hour of one core), and writes the table and the figure.
"""

from __future__ import annotations

from pathlib import Path

from docs.studies.real_model import picture
from docs.studies.tables import markdown
from emmech.run.run import load_run
from emmech.transition.degeneracy import LearningCoefficient, learning_coefficient
from emmech.transition.phase import phase_transition
from tests.tables import write

RUNS = {"medical": "bad", "style-medical": "style control"}


def estimated(name: str, folder: Path) -> LearningCoefficient:
    """The estimate for one shipped run, made once."""
    if not folder.exists():
        run = load_run(f"checkpoints/pocket-{name}")
        learning_coefficient(run, transition=phase_transition(run)).save(folder)
    return LearningCoefficient.load(folder)


def table(found: dict[str, LearningCoefficient]) -> str:
    """The coefficient with two standard errors and the loss, by step and run."""
    frames = {name: one.frame.set_index("step") for name, one in found.items()}
    header = ["step", *(f"{RUNS[name]}: {what}" for name in found for what in ("coefficient", "loss, nats"))]
    rows = []
    for step in next(iter(frames.values())).index:
        at = [frame.loc[step] for frame in frames.values()]
        cells = ((f"{one['llc']:.2f} ± {2 * one['error']:.2f}", f"{one['loss']:.3f}") for one in at)
        rows.append([str(step), *(cell for pair in cells for cell in pair)])
    return markdown(header, rows)


def main(folder: Path, page: Path = Path("docs/transition.md")) -> Path:
    """Estimate what is missing in the folder, and write the table and the figure."""
    found = {name: estimated(name, folder / name) for name in RUNS}
    picture(found["medical"].plot(), page.parent / "figures" / "learning-coefficient.png", folder)
    write(page, "learning coefficient", table(found))
    return page
