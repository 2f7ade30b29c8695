"""How fast the panel answers a move: in CPU time of its computation, and in a real browser.

``python -m docs.studies panel-speed`` fills both tables of ``docs/panel.md``, in at most three minutes.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer import echo

from docs.studies.panel_picture import OPEN, OPEN_SMOLLM2, ROOT, moved, notebook, run_all
from docs.studies.tables import markdown

PAGE = ROOT / "docs" / "panel.md"
MOVES = 6  # of each kind
SECONDS = 45.0  # for the moves of one model in the browser: on a busy machine fewer of them are made, at least one


class _Enough(Exception):
    """The first words are there."""


def _stop(new: Any) -> None:
    raise _Enough


def _cpu(session: Any, settings: Any, told: Callable[[Any], None] = _stop) -> float:
    """Milliseconds of CPU time of the first words, or of all of them."""
    began = time.process_time()
    with contextlib.suppress(_Enough):
        session.answers(settings, told)
    return 1000 * (time.process_time() - began)


def _load() -> str:
    return f"{os.getloadavg()[0] / (os.cpu_count() or 1):.1f}"


def computing() -> list[list[str]]:
    """Single moves of the coefficient, with and without what is kept between moves: a row for each model."""
    import numpy as np
    import torch

    import emmech
    from emmech.widget.answers import BaseAnswer
    from emmech.widget.session import Session

    torch.set_num_threads(1)
    small = emmech.load_model("smollm2-135m")
    vectors = np.random.default_rng(0).standard_normal((small.n_layers, small.d_model))
    opened: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "pocket": (emmech.load_run(ROOT / "checkpoints" / "pocket-medical"), None, {"direction": "adapter's B"}),
        "SmolLM2-135M": (small, emmech.Direction(vectors, "any"), {"layer": 15, "coefficient": 0.1}),
    }
    rows = []
    for name, (model, direction, state) in opened.items():
        keeps, forgets = Session(model, direction), Session(model, direction)
        settings = keeps.start(state)
        for session in (keeps, forgets):
            _cpu(session, settings, lambda new: None)
        pairs = []
        for number in range(MOVES):  # in turn, so that a change of the machine's speed meets both
            move = replace(settings, coefficient=0.2 + number / 50)
            forgets._kept.forget()
            forgets._base = BaseAnswer()
            pairs.append((_cpu(forgets, move), _cpu(keeps, move)))
        cells = [f"{min(one):.0f} to {max(one):.0f}" for one in zip(*pairs, strict=True)]
        whole = _cpu(keeps, replace(settings, coefficient=0.15), lambda new: None)
        rows.append([name, *cells, f"{whole:.0f}", _load()])
    return rows


def in_browser() -> list[list[str]]:
    """Moves in JupyterLab, single ones and ones that cancel an answer: a row for each model."""
    rows = []
    for name, cell in (("pocket", OPEN), ("SmolLM2-135M", OPEN_SMOLLM2)):
        firsts, done, cancelling = list[float](), list[float](), list[float]()
        with notebook([cell]) as (page, _):
            run_all(page)
            page.wait_for_selector(".emmech-panel .word")
            moved(page, "coefficient", [0.2])
            end = time.monotonic() + SECONDS
            while not firsts or (len(firsts) < MOVES and time.monotonic() < end):
                (first,), whole = moved(page, "coefficient", [0.4])
                firsts.append(first)
                done.append(whole)
                cancelling += moved(page, "coefficient", [0.6, 0.8, 0.2])[0][1:]
        cells = [f"{statistics.median(one):.0f} ({min(one):.0f})" for one in (firsts, cancelling, done)]
        rows.append([name, *cells, str(len(firsts)), _load()])
    return rows


def main(page: Path = PAGE, *, browser: bool = True) -> None:
    """Measure, print the tables, and write them into the page."""
    header = ["CPU ms", "first words, all computed", "first words, only what changed", "all words", "load per core"]
    tables = {"computing": markdown(header, computing())}
    if browser:
        header = [
            "ms, median (fastest)",
            "first words",
            "after a cancelled answer",
            "all words",
            "moves",
            "load a core",
        ]
        tables["browser"] = markdown(header, in_browser())
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        echo(table)
        head, rest = text.split(f"<!-- {name} -->")
        tail = rest.split(f"<!-- end of {name} -->")[1]
        text = f"{head}<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->{tail}"
    page.write_text(text, encoding="utf-8")
