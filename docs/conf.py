"""Sphinx: the guides are Markdown, the reference is the docstrings."""

import os
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["EMMECH_PROGRESS"] = "0"

project = "emmech"
author = "The emmech authors"
version = release = metadata.version("emmech")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "none"  # shapes and types stand in the docstrings; jaxtyping strings do not parse as names
autodoc_member_order = "bysource"
autodoc_mock_imports: list[str] = []
napoleon_google_docstring = True
napoleon_numpy_docstring = False
html_theme = "furo"
html_title = "emmech"
html_static_path: list[str] = []
