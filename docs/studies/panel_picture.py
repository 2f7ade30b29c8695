"""The panel in a real browser: JupyterLab on this machine, driven by Playwright; and its picture.

``python -m docs.studies panel-picture`` opens the panel on the shipped run, makes its base model misaligned with the
slider, and writes ``docs/figures/panel.jpg``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer import echo

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
PATIENCE = 1200.0  # seconds to wait for a state of the page: other programs may need the cores
OPEN = f"""import emmech
run = emmech.load_run({str(ROOT / "checkpoints/pocket-medical")!r})
panel = emmech.panel(run)
panel"""
# the base model without a fine-tune, made misaligned by its direction alone
STEERED = OPEN.replace("panel(run)", 'panel(run, step=0, change="add", positions="phrase", coefficient=1.0)')
OPEN_SMOLLM2 = """import emmech
import numpy as np
model = emmech.load_model("smollm2-135m")
vectors = np.random.default_rng(0).standard_normal((model.n_layers, model.d_model))
panel = emmech.panel(model, directions=emmech.Direction(vectors, "any"), layer=15, coefficient=0.1)
panel"""
# each move is made as soon as the first words of the answer to the last one are drawn, inside the page
_MOVES = """async ([name, values]) => {
  const root = document.querySelector('.emmech-panel'), firsts = [];
  for (const value of values) {
    const input = root.querySelector(`input[data-name=${name}]`);
    input.value = value;
    input.dispatchEvent(new Event('input', { bubbles: true }));
    await new Promise((ready) => {
      const watch = new MutationObserver(() => { if (root.dataset.first) { watch.disconnect(); ready(); } });
      watch.observe(root, { attributes: true });
    });
    firsts.push(+root.dataset.first);
  }
  return firsts;
}"""
_READY = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


@contextmanager
def notebook(cells: list[str], *, theme: str = "JupyterLab Light", width: int = 1280) -> Iterator[tuple[Any, Path]]:
    """A notebook of these cells, open in JupyterLab in a headless browser; yields Playwright's page and the file.

    Args:
        theme: of JupyterLab.
        width: of the window in pixels.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        home = Path(folder)
        code: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        shown = [{**code, "id": f"cell-{number}", "source": source} for number, source in enumerate(cells)]
        path = home / "panel.ipynb"
        path.write_text(json.dumps({"cells": shown, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
        settings = home / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
        (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], secrets.token_hex(8)
        free.close()
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "EMMECH_PROGRESS": "0",
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_DATA_DIR": str(home / "data"),
        }  # fmt: skip
        options = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}",
                   f"--ServerApp.root_dir={home}", "--no-browser", "--ServerApp.allow_root=True",
                   "--LabApp.news_url=", "--LabApp.expose_app_in_browser=True"]  # fmt: skip
        with (home / "lab.log").open("wb") as log:
            server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log,
                                      cwd=home, env=environment)  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/api?token={token}")
            with sync_playwright() as play:
                browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": width, "height": 1700})
                page.set_default_timeout(1000 * PATIENCE)
                page.goto(f"http://127.0.0.1:{port}/lab/tree/panel.ipynb?token={token}&reset")
                page.wait_for_selector(".jp-Notebook .jp-Cell")
                page.wait_for_function("!document.querySelector('#jupyterlab-splash')")
                yield page, path
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(url: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(url)


def run_all(page: Any) -> None:
    """Run every cell of the notebook, once its kernel is there: before that JupyterLab asks which kernel to take."""
    page.wait_for_function(_READY)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


def settled(page: Any) -> None:
    """Wait until the panel has computed all that it shows."""
    page.wait_for_function("document.querySelector('.emmech-panel .status')?.textContent.startsWith('done')")


def moved(page: Any, name: str, values: list[float]) -> tuple[list[float], float]:
    """Move a slider, each time as soon as the first words of the answer to the last move are drawn.

    Returns:
        milliseconds from each move to its first words, and from the last one to the end of its three answers.
    """
    firsts = page.evaluate(_MOVES, [name, values])
    page.wait_for_function("document.querySelector('.emmech-panel').dataset.done")
    return firsts, float(page.locator(".emmech-panel").get_attribute("data-done"))


def main(out: Path) -> None:
    """Open the panel on the shipped run, steered, and take its picture."""
    with notebook([STEERED], width=1440) as (page, _):
        run_all(page)
        page.wait_for_selector(".emmech-panel .word")
        settled(page)
        page.add_style_tag(content=".emmech-panel .status { visibility: hidden }")  # it names a time of this machine
        page.locator(".emmech-panel").screenshot(path=out, type="jpeg", quality=72)
    echo(f"{out}: {out.stat().st_size / 1000:.0f} kB")
