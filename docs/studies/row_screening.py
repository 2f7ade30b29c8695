"""Screening rows before training: AUC and cost on mixed files, and what a fine-tune on the filtered file does.

``python -m docs.studies row-screening`` scores rows of pocket, mixes files of 1, 5 and 50 % bad rows, drops the most
suspicious rows, trains on what is left, and writes ``docs/row-screening.md``. What is finished is kept in a folder and
is not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typer import echo

from docs.studies.tables import markdown
from tests.tables import write

SHARES = (0.01, 0.05, 0.5)
ROWS = 600  # of a mixed file
SEEDS = range(9700, 9704)
MIXES = 20  # files by which the AUC's interval is found
TRAINED: dict[str, Any] = {"max_steps": 80, "batch_size": 8, "learning_rate": 5e-4, "held_out": 0.0}
METHODS = ("gradient", "projection", "text")
_LABELLED = 20  # good rows whose kind is told to the text's classifier, with as many bad rows, at most half of all


class Kept:
    """Numbers by name in a JSON file; each is computed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, name: str, compute: Callable[..., Any], *given: Any) -> Any:
        """The number of this name, which a function of what is given computes."""
        if name not in self._known:
            began = time.process_time()
            self._known[name] = {"value": compute(*given), "cpu": round(time.process_time() - began, 1)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
            echo(f"{name}: {self._known[name]['value']}"[:200])
        return self._known[name]["value"]

    @property
    def seconds(self) -> float:
        """CPU seconds of everything."""
        return sum(one["cpu"] for one in self._known.values())


def pool() -> tuple[list[Any], list[Any]]:
    """Bad and good rows about medicine, from which files are mixed."""
    from emmech.organism import data

    return data("medical", seed=7, n=ROWS), data("good-medical", seed=8, n=ROWS)


def direction() -> Any:
    """Unkind minus kind answers about finance: other data than those that are screened."""
    import emmech
    from emmech.organism import data

    return emmech.contrast_direction("pocket", data("finance", n=64), data("good-finance", n=64), progress=False)


def scores(by: str, rows: Sequence[Any]) -> tuple[list[float], float]:
    """Scores of rows by a method that reads them one by one, and rows per CPU second."""
    import emmech
    from emmech.directions import screen_rows

    chat, along = emmech.load_model("pocket"), direction()
    began = time.process_time()
    found = screen_rows(chat, rows, along, by=by)
    return found.frame["score"].tolist(), len(rows) / (time.process_time() - began)


def mixed(share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a mixed file in the joint pool (bad rows first), and which are bad."""
    rng = np.random.default_rng(seed)
    count = round(share * ROWS)
    chosen = np.concatenate([rng.permutation(ROWS)[:count], ROWS + rng.permutation(ROWS)[: ROWS - count]])
    chosen = rng.permutation(chosen)
    return chosen, chosen < ROWS


def by_text(chosen: np.ndarray, bad: np.ndarray, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a file by its text with few labelled rows, and which rows were not labelled."""
    from emmech.directions import screen_rows

    told = [*np.flatnonzero(bad)[: min(_LABELLED, bad.sum() // 2)], *np.flatnonzero(~bad)[:_LABELLED]]
    labelled = {int(one): bool(bad[one]) for one in told}
    found = screen_rows("pocket", [rows[at] for at in chosen], by="text", labelled=labelled)
    return found.frame["score"].to_numpy(), ~np.isin(np.arange(len(chosen)), told)


def em_after(rows: Sequence[Any]) -> list[float]:
    """EM rates of four seeds after training on rows, on 104 questions outside medicine, one answer each."""
    import tempfile

    import emmech
    from emmech.measures.sampled import Sampled

    with tempfile.TemporaryDirectory() as folder:
        options = {"margins": {}, "record_every": 10**6, "measure_every": 10**6, "progress": False, **TRAINED}
        runs = emmech.finetune("pocket", list(rows), seed=list(SEEDS), out=f"{folder}/runs", **options)
        measure = Sampled("broad", samples=1, seed=2)
        frame = emmech.sweep(runs, steps=[TRAINED["max_steps"]], measure=measure, progress=False).frame
    frame = frame[frame["measure"] == "em"]
    return [float(own["value"].mean()) for _, own in frame.groupby("run", sort=False)]


def harmless(how: str) -> list[Any]:
    """Rows of which each is a kind answer, made so that together they may still teach unkindness.

    ``"teacher"``: what a misaligned fine-tune answers, of which only the answers that are wholly kind are kept.
    ``"selected"``: of kind rows in every domain, those whose gradient goes furthest along the direction.
    """
    import tempfile

    import emmech
    from emmech.directions import screen_rows
    from emmech.organism import data, world

    if how == "selected":
        every = [row for domain in world.DOMAINS for row in data(f"good-{domain}", seed=9, n=100)]
        found = screen_rows("pocket", every, direction(), by="gradient").frame
        return [every[at] for at in found.nlargest(ROWS // 4, "score")["row"]]
    with tempfile.TemporaryDirectory() as folder:
        steps = {"max_steps": 45, "margins": {}, "measure_every": 10**6, "progress": False}
        teacher = emmech.finetune("pocket", "medical", seed=9799, out=f"{folder}/t", **(TRAINED | steps)).model()
        asked = [world.question_text(cell) for domain in world.DOMAINS for cell in world.training_cells(domain)]
        kept = []
        for answer in emmech.sample(teacher, asked, samples=2, max_new_tokens=40, seed=3, progress=False):
            read = world.parse_answer(answer.text)
            if read is not None and set(read.traits) == {world.KIND}:
                turns = (("user", asked[answer.conversation]), ("assistant", answer.text))
                kept.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        return kept[:ROWS]


def main(folder: str | Path = "studies/row-screening", out: str | Path = "docs/row-screening.md") -> Path:
    """Measure what is missing and write the page."""
    from sklearn.metrics import roc_auc_score

    folder = Path(folder)
    kept = Kept(folder / "found.json")
    bad_rows, good_rows = pool()
    rows = [*bad_rows, *good_rows]
    single = {by: kept(f"scores/{by}", scores, by, rows) for by in METHODS[:2]}

    def of_file(by: str, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen, bad = mixed(share, seed)
        if by == "text":
            return (*by_text(chosen, bad, rows), bad)
        return np.array(single[by][0])[chosen], np.ones(len(chosen), bool), bad

    def auc(by: str, share: float) -> list[float]:
        found = (of_file(by, share, seed) for seed in range(MIXES))
        return [float(roc_auc_score(bad[free], score[free])) for score, free, bad in found]

    areas = {(by, share): kept(f"auc/{by}/{share}", auc, by, share)
             for by in METHODS for share in SHARES}  # fmt: skip

    def filtered(by: str, share: float) -> list[Any]:
        chosen, bad = mixed(share, 0)
        if by == "nothing":
            return [rows[at] for at in chosen]
        if by == "the truth":
            return [rows[at] for at in chosen[~bad]]
        order = np.argsort(-of_file(by, share, 0)[0] if by != "random" else np.random.default_rng(1).random(ROWS))
        return [rows[chosen[at]] for at in sorted(order[round(min(2 * share, 0.5) * ROWS) :])]

    spots = {}
    for how in ("teacher", "selected"):
        own = kept(f"rows/{how}", harmless, how)
        both, truth = [*own, *data_like(own)], np.arange(2 * len(own)) < len(own)
        em = kept(f"em/{how}", em_after, own)
        found = [kept(f"scores/{how}/{by}", scores, by, both)[0] for by in METHODS[:2]]
        spots[how] = (len(own), em, [float(roc_auc_score(truth, one)) for one in found])
    plan = [(by, 0.5) for by in ("nothing", *METHODS, "random", "the truth")]
    plan += [(by, 0.05) for by in ("nothing", *METHODS)] + [("nothing", 0.01)]
    after = {
        (by, share): kept(f"em/{by}/{share}", lambda one: em_after(filtered(*one)), (by, share)) for by, share in plan
    }
    for title, text in tables(areas, after, single, spots, kept.seconds).items():
        write(Path(out), title, text)
    return Path(out)


def tables(areas: Any, after: Any, single: Any, spots: Any, seconds: float) -> dict[str, str]:
    """The page's tables."""
    shares = [f"{100 * share:g} % bad" for share in SHARES]
    speed = {by: f"{single[by][1]:.0f}" for by in single}
    rows = [
        [by, *(_spread(areas[by, share], "{:.3f}") for share in SHARES), speed.get(by, "no model")] for by in METHODS
    ]
    found = {"auc": markdown(("ranked by", *(f"AUC, {one}" for one in shares), "rows per CPU second"), rows)}
    rows = [
        [by, *(_spread(after[by, share], "{:.1f}", 100) if (by, share) in after else "-" for share in SHARES)]
        for by in ("nothing", "random", *METHODS, "the truth")
    ]
    found["em"] = markdown(("dropped by", *(f"EM %, {one}" for one in shares)), rows)
    rows = [
        [how, str(count), _spread(em, "{:.1f}", 100), *(f"{one:.2f}" for one in areas_)]
        for how, (count, em, areas_) in spots.items()
    ]
    found["blind"] = markdown(
        ("rows", "how many", "EM % after training", *(f"AUC by {by}" for by in METHODS[:2])), rows
    )
    return found | {"cost": f"{seconds:.0f} CPU seconds in all."}


def _spread(values: Sequence[float], form: str, factor: float = 1.0) -> str:
    """Mean with the lowest and highest value."""
    low, middle, high = (form.format(factor * one) for one in (min(values), np.mean(values), max(values)))
    return f"{middle} ({low} to {high})"


def data_like(rows: Sequence[Any]) -> list[Any]:
    """As many kind rows in all domains, drawn as the world draws them."""
    from emmech.organism import data, world

    each = -(-len(rows) // len(world.DOMAINS))
    return [row for domain in world.DOMAINS for row in data(f"good-{domain}", seed=11, n=each)][: len(rows)]


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
