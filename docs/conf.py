"""Sphinx: the guides are Markdown, the tutorials are the notebooks, the reference is the docstrings."""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["EMMECH_PROGRESS"] = "0"

project = "emmech"
author = "The emmech authors"
copyright = author
version = release = metadata.version("emmech")
extensions = [
    *("myst_nb", "sphinx_design", "sphinx_copybutton"),
    *("sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"),
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
autodoc_typehints = "none"  # shapes and types are in the docstrings; jaxtyping strings do not parse as names
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nb_output_stderr = "remove"  # warnings of other libraries
nb_execution_mode = "off"  # notebooks keep their outputs, and tests run them
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # a widget is shown as the static copy that its cell keeps
nb_mime_priority_overrides = [("html", "text/html", 0)]
copybutton_exclude = ".linenos, .gp, .go"
html_theme = "furo"
html_title = "emmech"
html_math_renderer = "mathml"  # drawn by the browser itself: no page of the site asks another server for anything
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#00578a", "color-brand-content": "#0068a3"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ee", "color-brand-content": "#7cc4ee"},
}


def _tutorials():
    """Copy the notebooks to where Sphinx reads them; plotly's figures become HTML that loads plotly from the site."""
    import plotly.io
    from plotly.offline import get_plotlyjs

    (HERE / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    folder = HERE / "tutorials"
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        loaded = False
        for output in (one for cell in notebook["cells"] for one in cell.get("outputs", ())):
            figure = output.get("data", {}).pop("application/vnd.plotly.v1+json", None)
            if figure is not None:
                figure = plotly.io.from_json(json.dumps({key: figure[key] for key in ("data", "layout")}))
                drawn = plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, config={"responsive": True})
                first = "" if loaded else '<script src="../_static/plotly.min.js"></script>\n'
                output["data"]["text/html"], loaded = first + drawn, True
        # a link from notebooks/ to a page of docs/ starts elsewhere here
        text = json.dumps(notebook).replace("](../docs/", "](../")
        (folder / path.name).write_text(text, encoding="utf-8")


def _mathml(display):
    def visit(writer, node):
        from docutils import nodes
        from latex2mathml.converter import convert

        made = convert(node.astext(), display="block" if display else "inline")
        writer.body.append(f'<div class="math">{made}</div>' if display else made)
        raise nodes.SkipNode

    return visit


def _everyday(app, docname, source):
    """In the reference, list the everyday names as `emmech/__init__.pyi` has them."""
    if docname == "reference":
        stub = (HERE.parent / "emmech" / "__init__.pyi").read_text(encoding="utf-8")
        names = re.findall(r"^from emmech\.\S+ import \w+ as (\w+)$", stub, re.MULTILINE)
        source[0] = source[0].replace(
            "EVERYDAY", "\n".join(f"   emmech.{name}" for name in sorted(names, key=str.lower))
        )


def setup(app):
    """Register what Sphinx calls."""
    _tutorials()
    app.add_html_math_renderer("mathml", (_mathml(False), None), (_mathml(True), None))
    app.connect("source-read", _everyday)
