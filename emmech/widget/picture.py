"""What the panel shows, without JavaScript: the dose-response as SVG, and the whole panel as static HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from emmech.view.page import card
from emmech.view.theme import BAD, GOOD, GREY, faint
from emmech.widget.session import RANDOMS, Dose
from emmech.widget.settings import Settings

TITLES = {"base": "Base model", "changed": "As you set it", "random": "Control (a random direction)"}
_ROWS = "the rows “{}” of panel.result()"
_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BELOW = 560, 190, 46, 128, 12, 40
_KEYS = ("further along the direction than the base model's answer; blue: less far.",
         "A·x of {} is above zero; blue: below.")  # fmt: skip
_UNITS = {"add": "coefficient (share of the residual's norm)", "ablate": "strength of the ablation",
          "cap": "strength of the cap"}  # fmt: skip


def dose_picture(dose: Dose, settings: Settings) -> str:
    """The dose-response as SVG: the outcome, coherence, random directions as a band, broken stretches shaded.

    The elements that a front end moves carry the scale of the horizontal axis in ``data-`` attributes.
    """
    first, last = dose.doses[0], dose.doses[-1]
    values = np.concatenate([dose.value[None], dose.random]) if not dose.judged else np.array([0.0, 1.0])
    low, high = (0.0, 1.0) if dose.judged else (float(np.nanmin(values)) - 0.2, float(np.nanmax(values)) + 0.2)
    low = max(low, high - 8.0)  # at lower values everything is equally broken

    def x(at: float) -> float:
        return _LEFT + (at - first) / (last - first) * (_WIDE - _LEFT - _RIGHT)

    def y(at: float) -> float:
        return _TOP + (high - min(max(at, low), high)) / (high - low) * (_HIGH - _TOP - _BELOW)

    def points(line: Sequence[float] | np.ndarray) -> str:
        pairs = zip(dose.doses, line, strict=True)
        return " ".join(f"{x(a):.1f},{y(float(b)):.1f}" for a, b in pairs if np.isfinite(b))

    def last_of(line: np.ndarray) -> float:
        known = line[np.isfinite(line)]
        return float(known[-1]) if len(known) else low

    band = f"{points(dose.random.max(0))} " + " ".join(reversed(points(dose.random.min(0)).split()))
    floor = _HIGH - _BELOW
    parts = [
        f'<rect x="{x(a):.1f}" y="{_TOP}" width="{x(b) - x(a):.1f}" height="{floor - _TOP}" fill="{faint(BAD, 0.12)}"/>'
        for a, b in dose.broken
    ]
    if dose.broken:
        a, b = max(dose.broken, key=lambda span: span[1] - span[0])
        parts.append(f'<text x="{x((a + b) / 2):.1f}" y="{_TOP + 12}" text-anchor="middle" opacity="0.8">breaks</text>')
    ticks = (0.0, 0.5, 1.0) if dose.judged else (low, (low + high) / 2, high)
    for tick in ticks:
        shown = f"{100 * tick:.0f} %" if dose.judged else f"{tick:.1f}"
        parts.append(f'<line x1="{_LEFT}" x2="{x(last):.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
                     f'stroke="{faint(GREY, 0.3)}"/>')  # fmt: skip
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" opacity="0.8">{shown}</text>')
    for at in dose.doses[:: 2 if len(dose.doses) > 5 else 1]:
        parts.append(f'<text x="{x(at):.1f}" y="{floor + 15}" text-anchor="middle" opacity="0.8">{at:g}</text>')
    middle = x((first + last) / 2)
    parts.append(f'<text x="{middle:.1f}" y="{_HIGH - 5}" text-anchor="middle">{_UNITS[settings.change]}</text>')
    parts.append(f'<polygon points="{band}" fill="{faint(GREY, 0.35)}"/>')
    lines = [("misaligned" if dose.judged else "your direction", dose.value, f"var(--bad, {BAD})", "")]
    lines += [("coherent", dose.coherence, f"var(--good, {GOOD})", ' stroke-dasharray="5 3"')] if dose.judged else []
    labels = [(y(last_of(line)), name, colour) for name, line, colour, _ in lines]
    labels.append((y(last_of(dose.random.mean(0))), "random directions", GREY))
    for name, line, colour, dash in lines:
        parts.append(f'<polyline points="{points(line)}" style="fill: none; stroke: {colour}; stroke-width: 2.2"{dash}>'
                     f"<title>{name}</title></polyline>")  # fmt: skip
    at = -99.0
    for place, name, colour in sorted(labels):  # labels at the ends of their lines, without overlap
        at = max(place, at + 14)
        parts.append(
            f'<text x="{x(last) + 6:.1f}" y="{at + 4:.1f}" style="fill: {colour}; font-weight: 600">{name}</text>'
        )
    marker = x(min(max(settings.coefficient, first), last))
    parts.append(f'<line class="emmech-now" x1="{marker:.1f}" x2="{marker:.1f}" y1="{_TOP}" y2="{floor}" '
                 'stroke="currentColor" stroke-dasharray="2 3"/>')  # fmt: skip
    what = "misaligned share" if dose.judged else "log-probability of the base model's answers, nats a token"
    label = f"Dose-response: {what} at {first:g} to {last:g}, {counted(dose.items, 'answer')} a point"
    data = f'data-x0="{x(first):.1f}" data-x1="{x(last):.1f}" data-first="{first:g}" data-last="{last:g}"'
    return (
        f'<svg class="emmech-dose" viewBox="0 0 {_WIDE} {_HIGH}" width="100%" role="img" aria-label="{label}" {data} '
        f'font-size="11.5" fill="currentColor" style="max-width: {_WIDE}px">{"".join(parts)}</svg>'
    )


def dose_note(dose: Dose, asked: str) -> str:
    """What the dose-response is made of, in words.

    Args:
        asked: the questions, as the panel names them.
    """
    note = ("Without a judge: how likely the base model's answers still are, in nats a token; a fall by one nat counts "
            "as broken.")  # fmt: skip
    if dose.judged:
        note = (f"EM and coherence of the model as set, over {asked}, {counted(dose.items, 'answer')} a point; grey: "
                f"{RANDOMS} random directions of the same norm.")  # fmt: skip
    return f"{note} {against_text(dose)}".strip()


def counted(n: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "answer"), counted(8, "answer")
        ('1 answer', '8 answers')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def against_text(dose: Dose) -> str:
    """How many answers the steering moves against their mean, at the coefficient where it is most of them."""
    shares = dose.wrong_way
    if not np.isfinite(shares).any():
        return ""
    at = int(np.nanargmax(shares))
    if not shares[at]:
        return "At every coefficient all answers move the same way."
    return f"At {dose.doses[at]:g}, {shares[at]:.0%} of the answers move the other way than most."


def rate_text(rate: dict[str, Any] | None) -> str:
    """A verdict in words.

    Example:
        >>> rate_text({"em": 0.25, "low": 0.1, "high": 0.5, "coherent": 1.0, "n": 16})
        'misaligned 25 % (10 to 50 %), coherent 100 %, 16 answers'
    """
    if not rate or not rate["n"]:
        return "no verdict yet"
    em, low, high, coherent = (100 * float(rate[key]) for key in ("em", "low", "high", "coherent"))
    return (
        f"misaligned {em:.0f} % ({low:.0f} to {high:.0f} %), coherent {coherent:.0f} %, {counted(rate['n'], 'answer')}"
    )


def sentence(settings: dict[str, Any]) -> str:
    """What is done to the model, in one sentence.

    Example:
        >>> sentence(dict(change="add", coefficient=0.5, layer=2, direction="B", positions="answer", step=None))
        'At layer 2, 0.5 of the residual norm is added along the direction “B”, at the answer.'
    """
    s = settings
    where = {"all": "at every token", "prompt": "at the prompt", "answer": "at the answer"}.get(s["positions"])
    where = where or f"at the words \u201c{s['phrase']}\u201d"
    share = "" if s["coefficient"] == 1 else f" {100 * s['coefficient']:.0f} % of"
    goal = "set to the aligned mean" if s.get("towards") == "aligned" else "taken out"
    done = {
        "add": f"{s['coefficient']:g} of the residual norm is added along the direction “{s['direction']}”",
        "ablate": f"{share} the component along the direction “{s['direction']}” is {goal}".strip(),
        "cap": f"{share} what of the direction “{s['direction']}” is outside the base model's range is cut off".strip(),
    }[s["change"]]
    of = "" if s.get("step") is None else f" Model: step {s['step']}, adapter × {s['scale']:g}."
    return f"At layer {s['layer']}, {done}, {where}.{of}"


def twin(about: dict[str, Any], seen: dict[str, Any]) -> str:
    """What the panel shows now, as HTML that needs nothing else; the live widget hides it where that runs."""
    if not seen:
        return card(f"Panel: {about['name']}", caveat="Nothing has been answered yet.")
    settings = seen["settings"]
    colour = about["colours"].index(settings["colour"])
    base = [token[2][colour] for token in seen["columns"][0]] or [0.0]
    centre = 0.0 if colour else float(np.mean(base))
    every = [abs(token[2][colour] - centre) for column in seen["columns"] for token in column]
    widest = max(every, default=1.0) or 1.0
    columns = []
    for number, (name, title) in enumerate(TITLES.items()):
        words = []
        for text, _, readings, *_ in seen["columns"][number]:
            share = (readings[colour] - centre) / widest
            shade = faint(BAD if share > 0 else GOOD, 0.45 * abs(share))
            words.append(f'<span style="background: {shade}; white-space: pre-wrap">{escape(text)}</span>')
        verdict = rate_text(seen["verdict"][number]) if seen["verdict"] else "" if about["judge"] else "no judge"
        title = title if about["adapted"] or name != "base" else "Unchanged model"
        columns.append(
            f'<div style="flex: 1 1 200px; min-width: 0"><b title="{_ROWS.format(name)}">{title}</b>'
            f'<div style="margin: 4px 0">{"".join(words)}</div>'
            f'<div style="color: {GREY}">{verdict}</div></div>'
        )
    code = f"<details><summary>Code of this state</summary><pre>{escape(seen['code'])}</pre></details>"
    asked = f'<div style="margin: 6px 0">\u201c{escape(settings["question"])}\u201d</div>'
    key = _KEYS[bool(colour)].format(settings["colour"])
    key = f'<div style="margin: 6px 0; color: {GREY}">Orange words: {key}</div>'
    body = f'{asked}<div style="display: flex; flex-wrap: wrap; gap: 16px">{"".join(columns)}</div>{key}'
    body += seen["dose"] + f'<div style="color: {GREY}">{escape(seen["note"])}</div>' + code
    shown = card(f"Panel: {about['name']}", caveat=sentence(settings), body=body)
    return f'<div class="emmech-twin emmech-twin-{about["twin"]}">{shown}</div>'
