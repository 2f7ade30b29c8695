"""Results as HTML: the card that a notebook shows, and one self-contained page of words, tables and figures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emmech.store import write_text
from emmech.view.theme import CYCLE, FONT, GREY, PAGE, faint

if TYPE_CHECKING:
    import pandas as pd

_EDGE = f"1px solid {faint(GREY, 0.5)}"
_CARD = f"font: 14px/1.5 {html.escape(FONT)}; border: {_EDGE}; border-radius: 6px; padding: 12px 14px; max-width: 900px"
_FACT = "display: grid; grid-template-columns: minmax(90px, 24%) 1fr; gap: 0 12px; margin-bottom: 3px"
_ROW = "display: flex; flex-wrap: wrap; gap: 8px; margin-top: 8px"
_NAME = "opacity: 0.75; overflow-wrap: anywhere"
_CAVEAT = f"border-left: 3px solid {CYCLE[4]}; padding-left: 10px; margin-top: 8px; white-space: pre-wrap"
_TEXT = "font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; margin: 8px 0"
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; font-size: 16px; line-height: 1.55; background: var(--paper); color: var(--ink); }
main { max-width: 1060px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 46px 0 8px; padding-top: 18px; border-top: 1px solid var(--line); }
p, li { max-width: 78ch; }
.lead { color: var(--soft); font-size: 17px; margin: 0 0 20px; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 6px; padding: 12px 16px;
      overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 12px 0; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 5px 14px 5px 0; vertical-align: top; }
tbody th, td { border-bottom: 1px solid var(--line); }
tbody th { border-bottom-width: 1px; white-space: nowrap; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 15px; }
a { color: inherit; text-underline-offset: 3px; }
.made { color: var(--soft); font-size: 13px; margin: 4px 0 22px; white-space: pre-wrap; overflow-wrap: anywhere; }
td { white-space: pre-wrap; overflow-wrap: break-word; }
.plotly-graph-div { margin-top: 14px; }
@media print { nav { display: none } h2, h3 { break-after: avoid } pre, tr, .plotly-graph-div { break-inside: avoid }
  main { max-width: none; padding: 0 } }
footer { margin-top: 60px; color: var(--soft); font-size: 13px; border-top: 1px solid var(--line); padding-top: 14px; }
"""


def card(
    headline: str,
    facts: Sequence[tuple[str, str]] = (),
    caveat: str = "",
    then: str = "",
    details: str = "",
    *,
    sketch: str = "",
    table: pd.DataFrame | None = None,
    body: str = "",
) -> str:
    """One result as HTML for a notebook, in the page's own ink; every string is escaped.

    Args:
        headline: what was found, one sentence.
        facts: the numbers with their intervals, each with its name.
        caveat: what else a reader must know.
        then: the line of code that would be called next.
        details: more text, collapsed until it is opened.
        sketch: a drawing of :mod:`emmech.view.sketch`.
        table: collapsed with the details.
        body: more HTML, which the caller has escaped.
    """
    parts = [f'<div style="font-size: 15px; font-weight: 600">{_escaped(headline)}</div>']
    named = [("" if at and facts[at - 1][0] == name else name, text) for at, (name, text) in enumerate(facts)]
    rows = "".join(
        f'<div style="{_FACT}"><div style="{_NAME}">{_escaped(name)}</div><div>{_escaped(text)}</div></div>'
        for name, text in named
    )
    parts += [f'<div style="margin-top: 8px">{rows}</div>'] if rows else []
    parts += [body] if body else []
    parts += [f'<div style="{_ROW}">{sketch}</div>'] if sketch else []
    parts += [f'<div style="{_CAVEAT}">{_escaped(caveat)}</div>'] if caveat else []
    parts += [f'<div style="margin-top: 8px">Next: <code>{html.escape(then)}</code></div>'] if then else []
    folded = f'<pre style="{_TEXT}">{html.escape(details)}</pre>' if details else ""
    summary = "Details"
    if table is not None:
        shown = table.to_html(border=0, float_format="{:.4g}".format, max_rows=40)
        folded += f'<div style="overflow-x: auto">{shown}</div>'
        summary += f": {len(table)} row{'' if len(table) == 1 else 's'}"
    if folded:
        summary = f'<summary style="cursor: pointer; opacity: 0.75">{summary}</summary>'
        parts.append(f'<details style="margin-top: 8px">{summary}{folded}</details>')
    return f'<div style="{_CARD}">{"".join(parts)}</div>'


def _escaped(text: str) -> str:
    """A text as HTML in which no line begins with a per cent sign."""
    return html.escape(text).replace(" %", "&nbsp;%")


@dataclass(frozen=True)
class Section:
    """One part of a page; without a heading it continues the part before it."""

    heading: str
    words: str = ""  # paragraphs of plain text, separated by blank lines
    table: pd.DataFrame | None = None  # shown with its index
    figure: Any = None  # of plotly
    code: str = ""
    shown: Any = None  # a result, of which the card is shown
    command: str = ""  # what makes the section, shown below its figure


def write_page(
    path: str | Path, title: str, lead: str, sections: Sequence[Section], *, footer: str = "", light: bool = False
) -> Path:
    """Write the page; plotly's script is put in once, so that it opens without a network.

    Args:
        light: leave plotly's figures and its script (5 MB) out; results are then drawn by the sketches of their cards.

    Returns:
        the path written.
    """
    parts, places, scripted = [], [], False
    for at, given in enumerate(sections):
        section = replace(given, figure=None) if light else given
        if section.heading:
            parts.append(f'<h2 id="part-{at}">{html.escape(section.heading)}</h2>')
            places.append(f'<a href="#part-{at}">{html.escape(section.heading)}</a>')
        parts += [f"<p>{html.escape(text)}</p>" for text in section.words.split("\n\n") if text.strip()]
        if section.code:
            parts.append(f"<pre>{html.escape(section.code)}</pre>")
        if section.shown is not None:
            parts.append(section.shown._repr_html_(sketch=section.figure is None))
        if section.table is not None:
            table = section.table
            if table.index.nlevels == 1:
                table = table.rename_axis(index=None)  # a named index would take a header row of its own
            shown = table.to_html(border=0, float_format=lambda value: f"{value:.3g}", na_rep="")
            parts.append(f'<div class="wide">{shown}</div>')
        if section.figure is not None:
            how: dict[str, Any] = {"config": {"displaylogo": False, "responsive": True}, "full_html": False}
            parts.append(section.figure.to_html(include_plotlyjs=not scripted, **how))
            scripted = True
        if section.command:
            parts.append(f'<div class="made">Made by <code>{html.escape(section.command)}</code></div>')
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{PAGE}{_STYLE}body {{ font-family: {FONT} }}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p><nav>{"".join(places)}</nav>'
        f"{''.join(parts)}<footer>{html.escape(footer)}</footer></main></body></html>\n"
    )
    path = Path(path)
    write_text(path, page)
    return path
