"""The notebooks with their outputs: each is executed from top to bottom, and every figure gets a still picture.

``python -m docs.studies notebooks`` writes them in place, and copies the pictures that pages show to ``docs/figures/``.
A kernel draws a plotly figure as data for a live figure; the picture beside it, drawn by Chromium, is for readers that
show no live figures (GitHub, a converted notebook).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typer import echo

from docs.studies.panel_picture import CHROMIUM, ROOT

FOLDER = ROOT / "notebooks"
LIVE, STILL = "application/vnd.plotly.v1+json", "image/svg+xml"
WIDGET = "application/vnd.jupyter.widget-view+json"
# pictures that pages of the documentation show: the notebook and the cell that draws each
PICTURES = {
    "pocket-by-step.svg": ("02-transition", "cell-18"),
    "pocket-phase-diagram.svg": ("02-transition", "cell-21"),
}
QUIET = {"EMMECH_PROGRESS": "0", "PLOTLY_RENDERER": "plotly_mimetype", "HF_HUB_OFFLINE": "1"}


def execute(path: Path, replaced: Mapping[str, str] | None = None, *, timeout: int = 900) -> Any:
    """The executed notebook; what it records goes into a temporary folder.

    Args:
        replaced: the source of cells, by their id, that is executed in place of their own.
        timeout: seconds for one cell.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, 4)
    for cell in book.cells:
        cell.source = (replaced or {}).get(cell.id, cell.source)
    before = {name: os.environ.get(name) for name in (*QUIET, "PYTHONPATH")}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "notebooks"
        shutil.copytree(ROOT / "checkpoints", Path(home) / "checkpoints", ignore=shutil.ignore_patterns("evaluations"))
        shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("runs", ".*", "*.ipynb"))
        os.environ |= {**QUIET, "PYTHONPATH": str(ROOT)}
        try:
            NotebookClient(
                book, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                record_timing=False, store_widget_state=False, coalesce_streams=True,
            ).execute()  # fmt: skip
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return book


def stills(figures: Sequence[Mapping[str, Any]], *, width: int = 860) -> list[str]:
    """An SVG of each plotly figure, drawn on a page that is as wide as a notebook."""
    import plotly
    from playwright.sync_api import sync_playwright

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    draw = """async ([figure, width]) => {
        const height = figure.layout.height || 420;
        const layout = {...figure.layout, width, height, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff"};
        const url = await Plotly.toImage({data: figure.data, layout}, {format: "svg", width, height});
        return decodeURIComponent(url.slice(url.indexOf(",") + 1));
    }"""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=script)
        drawn = [page.evaluate(draw, [figure, width]) for figure in figures]
        browser.close()
    return drawn


def pictures(folder: Path = ROOT / "docs" / "figures") -> list[Path]:
    """Write the pictures of pages, as the notebooks keep them."""
    written = []
    for name, (stem, cell) in PICTURES.items():
        book = json.loads((FOLDER / f"{stem}.ipynb").read_text(encoding="utf-8"))
        outputs = next(one["outputs"] for one in book["cells"] if one["id"] == cell)
        still = next(one["data"][STILL] for one in outputs if STILL in one.get("data", {}))
        written.append(folder / name)
        written[-1].write_text("".join(still), encoding="utf-8")
    return written


def main(names: Sequence[str] = ()) -> None:
    """Execute the notebooks of these stems, or all of them, and write them in place."""
    import nbformat

    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        began = time.monotonic()
        book = execute(path)
        seconds = time.monotonic() - began
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        for cell in cells:  # a widget is dead without its kernel; what it displays beside itself stays
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]
        data = [output.data for cell in cells for output in cell.outputs if "data" in output]
        live = [one for one in data if LIVE in one]
        for one, picture in zip(live, stills([one[LIVE] for one in live]), strict=True):
            one[STILL] = picture
            one.pop("text/html", None)
        for one in data:
            if "text/plain" in one:  # an address in memory would change with every execution
                one["text/plain"] = re.sub(r" at 0x[0-9a-f]+>", ">", one["text/plain"])
        book.metadata = {name: book.metadata[name] for name in ("kernelspec", "language_info") if name in book.metadata}
        book.metadata["language_info"] = {"name": "python"}
        nbformat.write(book, path)
        echo(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB, {len(live)} figures")
    for made in pictures():
        echo(made)
