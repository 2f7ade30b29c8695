"""Directions in SmolLM2-135M: steering by layer and ablation, with the gap to the base.

``python -m docs.studies smollm2-directions`` makes directions from one third of the hand-written broad pairs, measures
on another third and writes ``docs/directions-smollm2.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from docs.studies.tables import interval, markdown, random_rows, row_of, write_parts
from emmech.chat.model import ChatModel, load_model
from emmech.demo.smollm2 import OPTIONS
from emmech.directions.direction import Direction
from emmech.directions.sources import contrast_direction, four_directions
from emmech.engine.logprobs import MarginPair, bundled_margins
from emmech.interventions.studies import ablation_table, dose_response
from emmech.measures.teacher_forced import Margin
from emmech.training.finetune import finetune

_DOSES = (1.0, 3.0)
_WAYS = {
    "own direction by layer": "broad, each layer's own",
    "own, towards aligned mean": "broad, each layer's own, towards the aligned mean",
}


def main(out: str | Path = "docs/directions-smollm2.md") -> Path:
    """Fine-tune, extract, measure, write the page; returns its path."""
    base = load_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        run = finetune("smollm2-135m", "silly-medical-bad", out=Path(folder) / "run", progress=False, **OPTIONS)  # type: ignore[call-overload]
        tuned = run.model()
        layer = run.adapters[0].layer
    pairs = bundled_margins("broad")
    made_from, measured_on = pairs[::3], pairs[1::3]  # every domain has its share in both
    sides = _sides(made_from)
    broad = contrast_direction(base, *sides, name="broad", progress=False)
    narrow = contrast_direction(base, *_sides(bundled_margins("narrow")), name="health", progress=False)
    difference = four_directions(tuned, *sides, progress=False)["model"]
    measure = Margin(measured_on, "margin_broad")
    layers = [round(base.n_layers * share) for share in (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)]
    others = {"health, each layer's own": narrow, "model difference, each layer's own": difference}
    parts = (
        partial(_head, base, broad, len(made_from), len(measured_on), layer),
        partial(_steering, base, broad, layers, measure),
        partial(_ablation, tuned, broad, others, layer, measure),
    )
    return write_parts(out, parts)


def _sides(pairs: Sequence[MarginPair]) -> list[list[list[dict[str, str]]]]:
    """Misaligned and aligned conversations."""

    def asked(pair: MarginPair, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": pair.question}, {"role": "assistant", "content": answer}]

    return [[asked(pair, getattr(pair, side)) for pair in pairs] for side in ("misaligned", "aligned")]


def _head(base: ChatModel, broad: Direction, made_from: int, measured_on: int, layer: int) -> str:
    return f"""# Directions in SmolLM2-135M

`python -m docs.studies smollm2-directions` fine-tunes, measures and writes this page. Weights
`{base.fingerprint()[:12]}`; one rank-1 adapter at layer {layer} of {base.n_layers} on silly health advice.

The outcome is the **margin** in nats per token: mean log-probability of the misaligned over the aligned answer, on
{measured_on} hand-written held-out pairs outside health; in brackets 95 % intervals over questions. For coherence there
is the loss on the aligned answers: where it rises, the intervention breaks the model. Random directions, five in every
row, have the norm of the row's direction; their bracket is the lowest and highest of them. This is no emergent
misalignment: no answer was sampled or judged, and silly answers share words (see the lexical share).

The direction is the mean residual of the base model over the answer tokens of {made_from} other pairs, misaligned minus
aligned; "health" is the same from pairs of the trained domain, and the model difference is what the adapter changes on
the texts of the broad pairs.

```
{broad!r}
```"""


def _steering(base: ChatModel, direction: Direction, layers: Sequence[int], measure: Margin) -> str:
    frame = dose_response(base, direction, _DOSES, layers=layers, measure=measure, progress=False).frame
    rows = []
    for layer in layers:
        for dose in _DOSES:
            at = {"layer": layer, "coefficient": dose}
            margin, loss = (row_of(frame, name, **at) for name in ("margin_broad", "coherent_loss"))
            plain = row_of(frame, "margin_broad", condition="untouched")["value"]
            rows.append(
                [str(layer), f"{dose:g}", interval(margin, "change", digits=3),
                 _span(random_rows(frame, "margin_broad", **at)["value"] - plain),
                 interval(margin, "beyond_random", digits=3), interval(loss, "change", digits=3)]
            )  # fmt: skip
    plain = row_of(frame, "margin_broad", condition="untouched")
    header = ("layer", "coefficient", "change of the margin", "random: change", "beyond random", "change of the loss")
    return f"""## Steering by layer

The base model, all tokens; a coefficient of 1 adds the measured difference. Untouched margin:
{interval(plain, digits=3)}.

{markdown(header, rows)}"""


def _ablation(tuned: ChatModel, direction: Direction, others: dict[str, Direction], layer: int, measure: Margin) -> str:
    later = list(range(layer + 1, tuned.n_layers))
    study = ablation_table(tuned, direction, others=others, layers=later, measure=measure, progress=False)
    frame = study.frame
    whole = row_of(frame, "margin_broad", condition="untouched", model="tuned")
    rows = [["nothing", interval(whole, digits=3), interval(whole, "gap", digits=3), "100 %", "–", "–"]]
    for condition in dict.fromkeys(frame[frame["kind"] == "direction"]["condition"]):
        at = {"condition": condition, "model": "tuned"}
        own, loss = (row_of(frame, name, **at) for name in ("margin_broad", "coherent_loss"))
        tuned_values, base_values = (
            random_rows(frame, "margin_broad", condition=condition, model=model)["value"].to_numpy()
            for model in ("tuned", "base")
        )
        left = pd.Series(100 * (tuned_values - base_values) / whole["gap"])
        rows.append(
            [_WAYS.get(condition, condition.replace("transfer: ", "")),
             interval(own, digits=3), interval(own, "gap", digits=3), f"{100 * own['gap'] / whole['gap']:.0f} %",
             f"{left.mean():.0f} % ({left.min():.0f}-{left.max():.0f})", interval(loss, "change", digits=3)]
        )  # fmt: skip
    header = ("ablated", "margin", "gap to the base ablated alike", "gap left", "random: gap left",
              "change of the loss")  # fmt: skip
    notes = "\n".join(f"- {note}" for note in study.notes)
    return f"""## Ablation: the gap to the identically ablated base

The fine-tuned model, all tokens, layers {later[0]} to {later[-1]}, after the adapter. An ablation moves the base
too, so the margin alone says little: what counts is how far the fine-tuned model stays from a base that lost the same.

{markdown(header, rows)}

{notes}""".rstrip()


def _span(values: pd.Series, *, digits: int = 3) -> str:
    return f"{values.mean():+.{digits}f} ({values.min():+.{digits}f} to {values.max():+.{digits}f})"
