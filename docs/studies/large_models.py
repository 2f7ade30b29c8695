"""The tables of the page on large models, made by the planner."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import emmech
from emmech.planning import ResourcePlan

PAGE = Path("docs/howto/large-models.md")
MODELS = ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct")
RECIPES = ("single-rank1", "phase-transition", "all-adapter", "full")
_GIB = 2**30


def _filled(table: str, found: re.Match[str]) -> str:
    return f"{found[1]}{table}\n{found[2]}"


def main(page: Path = PAGE) -> Path:
    """Write the tables between the page's marks."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables().items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(partial(_filled, table), text)
    page.write_text(text, encoding="utf-8")
    return page


def tables() -> dict[str, str]:
    """The page's tables by name."""
    plans = {(model, recipe): emmech.plan(model, recipe) for model in MODELS for recipe in RECIPES}
    return {
        "memory": _written(("", *(f"{model.split('-')[1]} `{recipe}`" for model, recipe in plans)), _memory(plans)),
        "disk": _written(("model", "recipe", "steps", "the run", "kept states while training"), _disk(plans)),
        "cards": _written(("14B", *plans[MODELS[1], RECIPES[0]].frame.index), _cards(plans)),
    }


def _memory(plans: dict[tuple[str, str], ResourcePlan]) -> list[list[str]]:
    found = list(plans.values())
    rows = [["trained numbers", *(f"{int(one.numbers['trained']):,}" for one in found)]]
    for part in found[0].memory.index.drop("total"):
        rows.append([f"{part}, GiB", *(_gib(one.memory.loc[part, "kept"]) for one in found)])
    rows.append(["activations, checkpointed", *(_gib(one.memory.loc["activations", "checkpointed"]) for one in found)])
    for column, name in (("kept", "**total**, GiB"), ("checkpointed", "**total**, checkpointed")):
        rows.append([name, *(f"**{_gib(one.memory.loc['total', column])}**" for one in found)])
    return rows


def _disk(plans: dict[tuple[str, str], ResourcePlan]) -> list[list[str]]:
    return [
        [model.split("-")[1], f"`{recipe}`", f"{int(one.numbers['steps'])}", _gb(one.numbers["run_bytes"]),
         _gb(one.numbers["scratch_bytes"]) if one.numbers["scratch_bytes"] else "none"]
        for (model, recipe), one in plans.items()
    ]  # fmt: skip


def _cards(plans: dict[tuple[str, str], ResourcePlan]) -> list[list[str]]:
    rows = []
    for recipe in RECIPES:
        frame = plans[MODELS[1], recipe].frame
        fits = ["yes" if row.fits else "checkpointed" if row.fits_checkpointed else "no" for row in frame.itertuples()]
        rows.append([f"`{recipe}` fits", *fits])
        times = [f"{row.train_low / 60:.0f} to {row.train_high / 60:.0f} min" if fit != "no" else ""
                 for row, fit in zip(frame.itertuples(), fits, strict=True)]  # fmt: skip
        rows.append([f"`{recipe}` trains in", *times])
    frame = plans[MODELS[1], RECIPES[0]].frame
    rows.append(["answers sampled together", *(str(int(one)) if one else "" for one in frame["answers_together"])])
    rows.append(["400 answers of 600 tokens", *(f"{row.evaluate_low / 60:.1f} to {row.evaluate_high / 60:.1f} min"
                 if row.answers_together else "" for row in frame.itertuples())])  # fmt: skip
    return rows


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g}" if size >= 0.005 * _GIB else "< 0.01"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _written(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
