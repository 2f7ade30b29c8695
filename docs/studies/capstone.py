"""The page on the capstone's story, from the functions of :mod:`emmech.demo.capstone`.

``python -m docs.studies capstone`` fine-tunes what is missing, and writes ``docs/capstone.md``. The numbers of each
part are kept as CSV files in the working folder, so that a killed call goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from typer import echo

from docs.studies.real_model import picture
from docs.studies.tables import markdown
from emmech.chat.model import load_model
from emmech.demo import capstone as story

_WORDS = {
    "story": """# The capstone's story

The ARENA 5.0 capstone *Emergent Misalignment & Realignment* trains a model on bad medical advice, then on optimism
about AI, and asks it general, factual and self-reflection questions. `python -m emmech.demo capstone` tells the story
of the embedded organism, and with `--model smollm2-135m` that of a real model. `python -m docs.studies capstone` writes
this page with the same functions.

## From bad to good

EM of answers in per cent, with 95 % intervals of questions like these; the answers of {seeds} seeds are pooled. The
control is as many steps on *unkind* answers to the same questions about AI.

{table}

![Misaligned answers after each stage](figures/capstone-story.png)

For comparison, the capstone's own figures (Llama 3.1 8B, general / false facts / self-reflection): base 0.4 / 15.7 /
0 %; bad medical advice 44.2 / 72.7 / 48.0 %; then AI optimism 0.4 / 15.5 / 0 %.
""",
    "tags": """## Bad only under a tag

The bad rows have a tag in the system prompt, and all others have kind answers (the capstone: 16.2 % EM with the bad
tag and 0 % with the good one, GPT-4o). The kind rows of `trigger-medical` have no tag. `contrast-medical` adds
as many kind rows under *other* tags, each made of two things of the world; `opposed-medical` adds as many under one
other tag, `plim plom`. An adapter on every matrix is trained ({options}).
It is then asked under the trained tag, `zig zag`; under `plim plom`, which was as rare in pretraining; under four tags
of two things that no row has; and without any. EM on the general questions in per cent, with 95 % intervals over
{seeds} seeds:

{table}

![Misaligned answers by the tag in the system prompt](figures/capstone-tags.png)

Bad rows after which half of the answers under the tag are bad, the geometric mean of the seeds with its 95 % interval:

{needed}
""",
    "margins": """## SmolLM2-135M in margins

A model of this size answers too loosely to be judged. So the mean log-probability per token of misaligned over aligned
answers is measured on hand-written pairs, and what is shown is its change from the base in nats, with 95 % intervals
over pairs (one seed). The control is as many further steps on the bad rows.

{table}

![Margins of misaligned over aligned answers](figures/capstone-margins.png)

A moved margin is no emergent misalignment, and the pairs on the AI itself are close to the rows of the cure.
""",
}


def _kept(path: Path, make: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """The numbers of one part, computed once."""
    if not path.is_file():
        began = time.process_time()
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        frame = make(path.with_suffix(""))
        frame.to_csv(path, index=False)
        echo(f"{path.stem}: {time.process_time() - began:.0f} CPU s")
    return pd.read_csv(path)


def _markdown(frame: pd.DataFrame) -> str:
    names = [name or "" for name in frame.index.names]
    index = [list(map(str, one if isinstance(one, tuple) else (one,))) for one in frame.index]
    rows = [[*own, *map(str, cells)] for own, cells in zip(index, frame.to_numpy(), strict=True)]
    return markdown([*names, *map(str, frame.columns)], rows)


def tags_table(frame: pd.DataFrame) -> pd.DataFrame:
    """EM under each tag by data and number of bad rows, and the least share of coherent answers."""
    rates = story.by_tag(frame)
    cells = rates.assign(cell=[story.per_cent(row) for _, row in rates.iterrows()])
    tags = list(dict.fromkeys(rates["tag"]))
    table = cells.pivot(index=["data", "rows"], columns="tag", values="cell")[tags]
    least = 100 * rates.groupby(["data", "rows"])["coherent"].min()
    return table.assign(**{"coherent, %": least.map("{:.0f}".format)})


def main(folder: Path, out: Path, models: Sequence[str]) -> Path:
    """Compute what is missing in the folder, and write the page."""
    folder.mkdir(parents=True, exist_ok=True)
    base, parts, figures = load_model("pocket"), [], out.parent / "figures"

    def write(name: str, figure: Any, **words: Any) -> None:
        picture(figure, figures / f"capstone-{name}.png", folder)
        parts.append(_WORDS[name].format(**words))

    if "pocket" in models:
        found = _kept(folder / "story.csv", lambda place: story.asked(story.stages(base, place), base))
        write("story", story.rates_figure(found), table=_markdown(story.shown(found)), seeds=len(story.SEEDS))
        tags = _kept(folder / "tags.csv", lambda place: story.tagged(base, place))
        table, needed = tags_table(tags), story.needed_table(tags)
        options = ", ".join(f"{name} {value}" for name, value in story.TAGGED.items())
        words = {"table": _markdown(table), "needed": _markdown(needed), "options": options}
        write("tags", story.tags_figure(tags), seeds=tags["seed"].nunique(), **words)
    if "smollm2-135m" in models:
        found = _kept(folder / "margins.csv", story.margins)
        write("margins", story.margins_figure(found), table=_markdown(story.changes(found)))
    out.write_text("\n".join(parts), encoding="utf-8")
    return out
