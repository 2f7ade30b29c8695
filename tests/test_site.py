"""The site builds without a warning, asks no other server for anything, and its search finds what newcomers type."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from tests.serving import serve

pytest.importorskip("myst_nb")
pytest.importorskip("sphinx_design")

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_and_every_notebook_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {f"tutorials/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(pages) > 40
    assert not [page for page in pages if not (site / f"{page}.html").is_file()]


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"'](?:https?:)?//[^\"']+")
    found = {path.name: loads.findall(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 40 and not {name: tags for name, tags in found.items() if tags}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not [
        url for style in styles for url in re.findall(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//[^)\s]+", style)
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("finetune", "emmech.finetune"),
        ("phase_transition", "emmech.phase_transition"),
        ("from_peft", "emmech.Run.from_peft"),
        ("gguf", "Load a GGUF file"),
    ],
)
def test_the_search_finds_it_among_the_first_results(site, typed, wanted):
    sync_api = pytest.importorskip("playwright.sync_api")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = serve(partial(Quiet, directory=str(site)))
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"{address}search.html?q={typed}")
            page.wait_for_selector("#search-results ul.search li a", timeout=60_000)
            page.wait_for_timeout(1000)
            first = page.eval_on_selector_all(
                "#search-results ul.search li", "all => all.slice(0, 3).map(li => li.innerText)"
            )
            browser.close()
    finally:
        server.shutdown()
    assert any(wanted in text.split("\n")[0] for text in first), first
    assert not [url for url in asked if not url.startswith((address, "data:"))]
