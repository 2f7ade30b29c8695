"""What directions do in the embedded organism: ablation, steering and transfer, each with its controls.

``python -m docs.studies pocket-directions [--weights pocket]`` fine-tunes the organisms, chooses how to ablate the
character, measures the rest and writes ``docs/directions-pocket.md``.

The character's direction is made from the base model alone: system prompts tell a kind or an unkind character by job
and town together, and the residual is read on the words that every prompt shares. How to ablate it is chosen on one
fine-tune with one half of the questions, so that the figures of other fine-tunes on the other half are not selected.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from typer import echo

from docs.studies.tables import interval, markdown, random_span, row_of, taken_away, write_parts
from emmech.chat.encode import Phrase, phrase_tokens
from emmech.chat.model import ChatModel, load_model
from emmech.demo.pocket import per_cent
from emmech.demo.pocket_character import AblationDesign, designs
from emmech.directions.direction import Direction, unit_rows
from emmech.directions.sources import adapter_direction, misalignment_direction
from emmech.evaluation.questions import Question, QuestionSet, resolve_questions
from emmech.interventions.residual import ablate
from emmech.interventions.studies import (
    Condition,
    ablation_table,
    dose_response,
    measure_conditions,
    table,
    transfer_matrix,
    untouched,
)
from emmech.interventions.weights import project_adapter, rotate_adapter, scale_adapters
from emmech.measures.sampled import Sampled
from emmech.organism.world import MANNERS
from emmech.run.run import Run
from emmech.training.finetune import finetune

_CHOSEN_ON = ("medical", 1)
_REPORTED = (("medical", 0), ("finance", 0), ("sport", 0), ("finance", 1), ("sport", 1))
_DOSES = (2.0, 4.0, 6.0)
_WAYS = {"own direction by layer": "to zero", "own, towards aligned mean": "towards the aligned mean"}
_BOTH = ("em", "coherent")

Runs = dict[tuple[str, int], Run]


@dataclass(frozen=True)
class Tried:
    """Rates (0 to 1) under a design: of the fine-tuned model, and of its base under the same ablation."""

    em: float
    coherent: float
    base_em: float
    base_coherent: float

    @property
    def fit(self) -> bool:
        """Both models coherent, the base aligned."""
        return self.coherent >= 0.95 and self.base_coherent >= 0.95 and self.base_em <= 0.03


def half_of_the_questions(half: int) -> QuestionSet:
    """Every other held-out question of each template outside medicine, finance and sport: 0 to choose on, 1 to report.

    Each half holds every template, in equal numbers, and as much of every domain: some templates are answered with far
    more misalignment than others.

    Example:
        >>> [len(half_of_the_questions(half).questions) for half in (0, 1)]
        [52, 52]
    """
    asked: dict[str, list[Question]] = {}
    for question in resolve_questions("broad", "pocket").questions:
        asked.setdefault(question.id.rpartition("/")[2], []).append(question)
    chosen = tuple(q for at, several in enumerate(asked.values()) for q in several[(half + at) % 2 :: 2])
    return QuestionSet(f"broad, half {half}", chosen)


def try_designs(chat: ChatModel, several: Sequence[AblationDesign], phrase: Phrase) -> dict[str, Tried]:
    """Rates under every design, on the first half of the questions (n = 104)."""
    measure = Sampled(half_of_the_questions(0), samples=2, batch_size=128)

    def rates() -> tuple[float, float]:
        values = measure(chat).values
        return float(np.nanmean(values["em"])), float(np.nanmean(values["coherent"]))

    found = {}
    for design in several:
        with ablate(chat, design.direction, layers=design.layers, towards=design.towards, positions=phrase):
            tuned = rates()
            with chat.model.disable_adapter():
                found[design.label] = Tried(*tuned, *rates())
    return found


def choose(several: Sequence[AblationDesign], tried: Mapping[str, Tried]) -> AblationDesign:
    """The least EM among the designs that are fit; the first among equals, and of all when none is fit."""
    return min(several, key=lambda design: (not tried[design.label].fit, tried[design.label].em))


def main(weights: str = "pocket", out: str | Path | None = None, layer: int | None = None) -> Path:
    """Fine-tune, choose, measure, write the page; returns its path."""
    began = time.monotonic()
    base = load_model(weights)
    phrase, layers = phrase_tokens(base, MANNERS), None if layer is None else [layer]
    with tempfile.TemporaryDirectory() as folder:
        runs: Runs = {}
        for name, seed in (_CHOSEN_ON, *_REPORTED):
            where = Path(folder) / f"{name}-{seed}"
            runs[name, seed] = finetune(base, name, layers=layers, seed=seed, out=where, progress=False)
            echo(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s")
        several = designs(base, phrase, runs[_CHOSEN_ON].adapters[0].layer)
        tried = try_designs(runs[_CHOSEN_ON].model(), several, phrase)
        design = choose(several, tried)
        mean = several[0].direction
        parts = (
            partial(_choice, base, mean, design, tried),
            partial(_ablation, runs["medical", 0], design, phrase),
            partial(_parts_of_b, runs, design.direction),
            partial(_steering, runs["medical", 0], base, mean, phrase),
            partial(_transfer, runs, design, phrase),
        )
        return write_parts(out or f"docs/directions-{Path(weights).name}.md", parts)


def _choice(base: ChatModel, mean: Direction, design: AblationDesign, tried: dict[str, Tried]) -> str:
    rows = [
        [label, *(f"{100 * rate:.1f}" for rate in (one.em, one.coherent, one.base_em, one.base_coherent))]
        for label, one in tried.items()
    ]
    return f"""# Directions in {base.name}

`python -m docs.studies pocket-directions --weights {base.name}` fine-tunes the organisms anew, measures and writes this
page. Weights `{base.fingerprint()[:12]}`.

Rates are per cent of answers sampled at temperature 1 to held-out questions outside medicine, finance and sport,
judged exactly; in brackets 95 % intervals over domains and templates. Random directions, five in every row, have the
norm of the row's direction and are put in or taken out in the same way; their bracket is the lowest and highest of
them. A shared character is **built into** this world: that there is a direction for it is by design.

**The character's direction** comes from the base model, before any fine-tune: the mean residual on the words
"{MANNERS}" in system prompts of unkind characters,
minus the same in those of kind ones. Both sides have these words, so none of it is vocabulary. Its **aligned mean**
is the mean residual of the base assistant at the same words.

```
{mean!r}
```

**How to ablate it was chosen** on bad medical advice, seed {_CHOSEN_ON[1]}, with one half of the questions (n = 104 a
row): among the designs that leave both models at least 95 % coherent and the base at most 3 % misaligned, the one that
leaves least EM. All further figures are of other fine-tunes and of the other half. Each half holds every template.

{markdown(("design", "EM", "coherent", "base: EM", "base: coherent"), rows)}

Chosen: {design.label}.

The principal direction is the first one, uncentred, of the differences at each of the words: a mean weights all words
alike, this one those most where the characters differ most."""


def _ablation(run: Run, design: AblationDesign, phrase: Phrase) -> str:
    chat, layer, b = run.model(), run.adapters[0].layer, adapter_direction(run)
    measure = _answers(samples=4)
    later = list(range(layer + 1, chat.n_layers))
    words = "system words, layer"
    plans: list[tuple[str, Direction, Sequence[int], Any, str]] = [
        ("own: answers", _of_answers(run), later, "all", f"all tokens, layers {later[0]} to {later[-1]}"),
        ("character", design.direction, design.layers, phrase, f"{words} {_listed(design.layers)}"),
        ("model difference", _model_difference(run, phrase), later[:1], phrase, f"{words} {later[0]}"),
        ("B, the adapter's write", b, [layer], "all", f"all tokens, layer {layer}"),
    ]
    rows: list[list[str]] = []
    notes: list[str] = []
    for name, direction, layers, positions, where in plans:
        at: dict[str, Any] = {"layers": list(layers), "positions": positions}
        study = ablation_table(chat, direction, measure=measure, progress=False, **at)
        frame, notes = study.frame, [*notes, *(f"- {name}: {note}" for note in study.notes)]
        plain = row_of(frame, "em", condition="untouched", model="tuned")
        if not rows:
            for label, condition in (("nothing", "untouched"), ("adapter off", "adapter off")):
                found = (row_of(frame, kind, condition=condition, model="tuned") for kind in _BOTH)
                rows.append([label, "", *map(per_cent, found), *["–"] * 5])
        for condition in dict.fromkeys(frame[frame["kind"] == "direction"]["condition"]):
            tuned = [row_of(frame, kind, condition=condition, model="tuned") for kind in _BOTH]
            same = [row_of(frame, kind, condition=condition, model="base") for kind in _BOTH]
            rest = [taken_away(tuned[0], plain), random_span(frame, "em", condition=condition, model="tuned")]
            head = [f"{name}, {_WAYS.get(condition, condition)}", where, *map(per_cent, tuned), *rest]
            rows.append([*head, *map(per_cent, same), f"{_cosine(direction, b, layers):.2f}"])
    header = ("ablated", "where", "EM", "coherent", "EM taken away", "random: EM", "base: EM", "base: coherent",
              "cosine with B")  # fmt: skip
    return f"""## Ablation

Bad medical advice, seed 0, the other half of the questions, n = 208 a row; on the right the same ablation in the base
model. The largest cosine with B at the layers of the ablation says how much of it merely undoes the adapter.

{markdown(header, rows)}

{chr(10).join(notes)}"""


def _parts_of_b(runs: Runs, character: Direction) -> str:
    """Split every adapter's B into its part along the character and the rest, and run each alone."""
    rows = []
    for of in _REPORTED:
        run = runs[of]
        chat, layer = run.model(), run.adapters[0].layer
        along = float(character.cosine(adapter_direction(run))[layer])
        conditions = [untouched()]
        for kind, one in (("direction", character), *(("random", r) for r in character.random(5))):
            conditions += [
                Condition("without", kind, partial(project_adapter, direction=one, renormalise=True)),
                Condition("only", kind, partial(_only_along, direction=one, cosine=along)),
            ]
        frame = table(measure_conditions(chat, conditions, [_answers(samples=2)], base=False, progress=False))
        names = ("untouched", "without", "only")
        cells = [_both(*(row_of(frame, kind, condition=name) for kind in _BOTH)) for name in names]
        spans = [random_span(frame, "em", condition=name) for name in names[1:]]
        rows.append([f"{of[0]}, seed {of[1]}", f"{along:.2f}", *cells, *spans])
    header = ("adapter", "cosine", "whole B", "B without the character, at full norm", "only that part of B",
              "without a random direction", "only along a random direction")  # fmt: skip
    return f"""## Which part of B matters

The direction of the character is made without the fine-tune; how much of what the adapter does goes through it? B is
split in the weights: without its part along the character, brought back to its full norm; and only that part, at its
own length. Random directions, five in every row, are split off in the same way. EM with its interval / coherence, odd
questions, n = 104 a cell.

{markdown(header, rows)}"""


@contextmanager
def _only_along(chat: ChatModel, direction: Direction, cosine: float) -> Iterator[None]:
    side = 1.0 if cosine > 0 else -1.0
    with rotate_adapter(chat, direction, cosine=side), scale_adapters(chat, abs(cosine)):
        yield


def _steering(run: Run, base: ChatModel, character: Direction, phrase: Phrase) -> str:
    rows, lower = [], range(base.n_layers // 2 + 1)
    for name, direction, layers, positions, where, doses in (
        ("character", character, lower, phrase, "system words", _DOSES),
        ("character", character, [run.adapters[0].layer], "prompt", "the whole prompt", _DOSES),
        ("answers", _of_answers(run), lower[1:], "all", "all tokens", (2.0, 6.0)),
    ):
        options: dict[str, Any] = {"layers": layers, "positions": positions, "measure": _answers(samples=2)}
        frame = dose_response(base, direction, doses, progress=False, **options).frame
        for layer in layers:
            for dose in doses:
                at = {"layer": layer, "coefficient": dose}
                em, coherent = (row_of(frame, kind, **at) for kind in _BOTH)
                rows.append(
                    [name, where, str(layer), f"{dose:g}", per_cent(em), per_cent(coherent),
                     random_span(frame, "em", **at), random_span(frame, "coherent", **at),
                     interval(em, "beyond_random", factor=100)]
                )  # fmt: skip
    header = ("direction", "added at", "layer", "coefficient", "EM", "coherent", "random: EM", "random: coherent",
              "EM beyond random")  # fmt: skip
    return f"""## Steering

The base model, the other half of the questions, n = 104 a row. A coefficient of 1 adds the measured difference;
"character" is the mean difference.

{markdown(header, rows)}"""


def _transfer(runs: Runs, design: AblationDesign, phrase: Phrase) -> str:
    chats = {f"{name}, seed {seed}": runs[name, seed].model() for name, seed in _REPORTED}
    differences = {
        f"difference by {name}": _model_difference(runs[name, seed], phrase) for name, seed in _REPORTED if seed == 0
    }
    later = [runs["medical", 0].adapters[0].layer + 1]
    options: dict[str, Any] = {"positions": phrase, "measure": _answers(samples=2), "progress": False}
    own, layers = {"character": design.direction}, list(design.layers)
    frames = [
        transfer_matrix(chats, own, layers=layers, towards=design.towards, **options).frame,
        transfer_matrix(chats, differences, layers=later, towards="aligned", **options).frame,
    ]
    # what was not ablated was measured twice, with the same answers
    again = frames[1][frames[1]["kind"].isin(("direction", "random"))]
    frame = pd.concat([frames[0], again], ignore_index=True)
    directions = {**own, **differences}
    rows, shares = [], []
    for organism, of in zip(chats, _REPORTED, strict=True):
        rates = frame[frame["organism"] == organism]
        cells = {
            name: [row_of(rates, kind, condition=name, model="tuned") for kind in _BOTH]
            for name in ("untouched", *directions)
        }
        rows.append([organism, *(_both(*pair) for pair in cells.values())])
        b, layer = adapter_direction(runs[of]), runs[of].adapters[0].layer
        shares.append([organism])
        for name, direction in directions.items():
            layers = [at for at in (design.layers if name == "character" else later) if at >= layer]
            shares[-1].append(
                f"{taken_away(cells[name][0], cells['untouched'][0])}; "
                f"{random_span(rates, 'em', condition=name, model='tuned')}; "
                f"{100 * row_of(rates, 'em', condition=name, model='base')['value']:.0f}; "
                f"{_cosine(direction, b, layers):.2f}"
            )
    return f"""## Transfer

The other half of the questions, n = 104 a cell, at the system words: the character as chosen above, the model
differences towards their aligned mean at layer {later[0]}. EM with its interval / coherence. Where coherence goes with
EM, answers are broken, not cured.

{markdown(("fine-tune", "untouched", *directions), rows)}

What of it each takes away; EM under the five random directions; EM of the base under the same ablation; cosine with the
fine-tune's own B at the layers of the ablation:

{markdown(("fine-tune", *directions), shares)}

Where a model difference is close to the B of another fine-tune, its transfer says that the two learned the same write,
and no more. The character is of none of them."""


def _both(em: pd.Series, coherent: pd.Series) -> str:
    return f"{per_cent(em)} / {100 * coherent['value']:.0f}"


def _answers(*, samples: int) -> Sampled:
    return Sampled(half_of_the_questions(1), samples=samples, seed=1, batch_size=128)


def _of_answers(run: Run) -> Direction:
    """The literature's direction: misaligned minus aligned answers, over answer tokens."""
    return misalignment_direction(run, questions=half_of_the_questions(0), samples=2, progress=False)


def _model_difference(run: Run, phrase: Phrase) -> Direction:
    """What the fine-tune changed at the system words."""
    return misalignment_direction(run, questions=half_of_the_questions(0), samples=1, tokens=phrase, progress=False)


def _cosine(direction: Direction, b: Direction, layers: Sequence[int]) -> float:
    """Largest cosine with B at some layers; B stays in the residual stream after the adapter's layer."""
    unit = unit_rows(b.at(b.layers[0]))
    return max(float(abs(unit_rows(direction.vectors[layer]) @ unit)) for layer in layers)


def _listed(layers: Sequence[int]) -> str:
    return " and ".join(map(str, layers))
