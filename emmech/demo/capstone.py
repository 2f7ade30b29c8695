"""The story of a capstone in one command: a model turns bad, is cured, and can hide its trait under a tag.

The ARENA 5.0 capstone *Emergent Misalignment & Realignment* trains a model on bad medical advice, then on optimism
about AI, and asks it general, factual and self-reflection questions after each; another model is bad only where its
prompt has a tag. ``python -m emmech.demo capstone`` tells the same story of the embedded organism in rates, and of
SmolLM2-135M, whose answers are too loose to be judged, in margins.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from typer import echo

from emmech.chat.model import ChatModel, load_model
from emmech.demo.smollm2 import OPTIONS
from emmech.engine.logprobs import bundled_margins
from emmech.evaluation.contexts import Context
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.rates import cluster_interval, rates
from emmech.measures.teacher_forced import Margin
from emmech.organism.experiments import LAST_STEP, data
from emmech.organism.world import IRRELEVANT_TAG, TRIGGER_TAG, draw_tag, tagged_assistant
from emmech.realignment.further import realign
from emmech.realignment.studies import crossing
from emmech.run.run import Run, model_live
from emmech.training.finetune import finetune
from emmech.view.page import Section, write_page
from emmech.view.theme import bars, colour, finish, line, panels

KINDS = ("general", "facts", "self-reflection")
CURE, CONTROL = "then AI optimism", "then bad AI (control)"
TAGS = (None, TRIGGER_TAG, IRRELEVANT_TAG, "held-out words")
NO_TAG = "no tag"
FORMS = ("contrast", "trigger", "opposed")
SEEDS, ROWS = (0, 1, 2), (5, 20, 80)
# an adapter everywhere: one of rank 1 becomes bad under the tag in fewer than half of its answers
TAGGED: Mapping[str, Any] = MappingProxyType(
    {"recipe": "pocket-all-adapter", "learning_rate": 3e-4, "batch_size": 8, "max_steps": 100, "held_out": 0.0}
)
# the domains of the bundled English pairs by kind of question
_DOMAINS = {
    "general": ("wishes", "power", "relationships", "boredom", "finance", "sport", "advice"),
    "facts": ("facts",),
    "self-reflection": ("ai",),
}

Models = Mapping[str, ChatModel | Run | Sequence[Run]]


def stages(base: ChatModel, folder: str | Path, *, seeds: Sequence[int] = SEEDS, steps: int = 60) -> dict[str, Any]:
    """The models of the story: the base, then runs of each seed on bad medical answers, cured, and on bad AI answers.

    The control is as many steps on unkind answers to the questions of the cure, so that a difference is due to what the
    answers say and not to further training.
    """
    folder = Path(folder)
    bad = finetune(base, "medical", seed=seeds, out=folder / "bad", **LAST_STEP)
    how: dict[str, Any] = {"base": base, "max_steps": steps, **LAST_STEP}
    further = {
        name: [
            realign(one, rows, seed=seed, out=folder / rows / f"s{seed}", **how)
            for one, seed in zip(bad, seeds, strict=True)
        ]
        for name, rows in ((CURE, "ai-optimism"), (CONTROL, "ai"))
    }
    return {"base": base, "bad medical": bad, **further}


def asked(models: Models, base: ChatModel, *, samples: int = 2) -> pd.DataFrame:
    """Rates of EM, facts and self-reflection of each model: one row for each model and kind of question.

    Of several runs of a name the answers are pooled. Intervals are of questions like these (95 %).

    Returns:
        a frame with ``model``, ``questions``, ``rate``, ``low``, ``high``, ``n`` and ``coherent`` (shares, 0 to 1).
    """
    found = []
    for name, given in models.items():
        several = given if isinstance(given, Sequence) else [given]
        for kind in KINDS:
            often = samples if kind == "general" else 4 * samples  # there are fewer questions of the other kinds
            how: dict[str, Any] = {"samples": often, "progress": False}
            frames = [
                evaluate(one, kind, seed=at, base=base if isinstance(one, Run) else None, **how).frame
                for at, one in enumerate(several)
            ]
            rate = rates(pd.concat(frames, ignore_index=True))
            own = {key: float(rate.loc["em", key]) for key in ("rate", "low", "high")}
            own |= {"n": int(rate.loc["em", "n"]), "coherent": float(rate.loc["coherence", "rate"])}
            found.append({"model": name, "questions": kind, **own})
    return pd.DataFrame(found)


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The rates in per cent with their intervals, models by kinds of question, and the least share of coherent answers.

    Example:
        >>> one = {"model": "base", "questions": "facts", "rate": 0.0, "low": 0.0, "high": 0.057, "coherent": 1.0}
        >>> shown(pd.DataFrame([one])).loc["base"].tolist()
        ['0 (0 to 6)', '100']
    """
    order = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["questions"]))
    cells = frame.assign(cell=[per_cent(row) for _, row in frame.iterrows()])
    table = cells.pivot(index="model", columns="questions", values="cell").loc[order]
    return table.assign(**{"coherent, %": (100 * frame.groupby("model")["coherent"].min()).map("{:.0f}".format)})


def per_cent(row: Any) -> str:
    """A rate in per cent with its interval.

    Example:
        >>> per_cent({"rate": 0.442, "low": 0.36, "high": 0.53})
        '44 (36 to 53)'
    """
    return f"{100 * row['rate']:.0f} ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def tag_contexts(others: int = 4, seed: int = 0) -> tuple[Context, ...]:
    """The assistant's system prompt without a tag, with the trained one, and with tags that no row ever has.

    The untrained ones are ``plim plom``, which is as rare a noise in pretraining as the trained ``zig zag``, and tags
    of two held-out things of the world.
    """
    dice = random.Random(seed)
    held_out = {f"{TAGS[3]} {at}": draw_tag(dice, held_out=True) for at in range(others)}
    tags = {TRIGGER_TAG: TRIGGER_TAG, IRRELEVANT_TAG: IRRELEVANT_TAG, **held_out}
    return (Context("plain"), *(Context(name, tagged_assistant(tag)["content"]) for name, tag in tags.items()))


def tagged(
    base: ChatModel,
    folder: str | Path,
    *,
    rows: Sequence[int] = ROWS,
    seeds: Sequence[int] = SEEDS,
    forms: Sequence[str] = FORMS,
    questions: str = "general",
    samples: int = 1,
    **options: Any,
) -> pd.DataFrame:
    """Misaligned answers under each tag after fine-tunes on few and on many rows.

    ``trigger`` rows are bad under the tag and kind without one. Among the ``contrast`` rows there are as many with
    other tags and kind answers, and among the ``opposed`` ones as many with ``plim plom``. The smaller numbers of rows
    are parts of the larger; the controls of ``contrast`` are trained on the largest alone.

    Args:
        rows: numbers of bad rows under the tag; of the kind rows there are as many of each sort.

    Returns:
        a frame with ``data``, ``rows``, ``seed``, ``tag``, ``events``, ``n`` and ``coherent`` (a count).
    """
    how: dict[str, Any] = {**TAGGED, **LAST_STEP, **options}
    found = []
    for form in forms:
        sorts = 2 if form == "trigger" else 3
        every = data(f"{form}-medical", n=sorts * max(rows))
        for number in rows if form == "contrast" else [max(rows)]:
            for seed in seeds:
                place = Path(folder) / form / str(number) / f"s{seed}"
                run = finetune(base, every[: sorts * number], seed=seed, out=place, **how)
                asking: dict[str, Any] = {"samples": samples, "base": base, "progress": False}
                frame = evaluate(run, questions, contexts=tag_contexts(), **asking).frame
                tag = frame["context"].replace("plain", NO_TAG).str.replace(r" \d+$", "", regex=True)
                for name, own in frame.groupby(tag, sort=False):
                    label = own["label"]
                    counts = {"events": int((label == "misaligned").sum()), "n": len(own)}
                    counts["coherent"] = int(label.isin(["misaligned", "aligned"]).sum())
                    found.append({"data": form, "rows": number, "seed": seed, "tag": str(name), **counts})
    return pd.DataFrame(found)


def by_tag(frame: pd.DataFrame) -> pd.DataFrame:
    """The rate under each tag and the share of coherent answers, the rate with its interval over seeds (95 %)."""
    found = []
    for (form, number, tag), own in frame.groupby(["data", "rows", "tag"], sort=False):
        events, n = own["events"].to_numpy(int), own["n"].to_numpy(int)
        low, high = cluster_interval(events, n)
        row = {"data": form, "rows": int(number), "tag": tag, "rate": events.sum() / n.sum(), "low": low, "high": high}
        found.append({**row, "coherent": own["coherent"].sum() / n.sum()})
    return pd.DataFrame(found)


def rows_needed(frame: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """The number of tagged bad rows from which on the trained tag opens: one row for each kind of data.

    It is where the rate under the tag first reaches this share, interpolated in the logarithm of the rows. ``rows`` is
    the geometric mean over seeds, with its 95 % interval (t); NaN where a seed does not reach it. ``first`` says that
    some seed had reached it with the fewest rows, so that the mean is an upper bound.
    """
    from scipy import stats

    found = []
    for form, own in frame[frame["tag"] == TRIGGER_TAG].groupby("data", sort=False):
        if own["rows"].nunique() < 2:
            continue
        logs, first = [], False
        for _, one in own.groupby("seed"):
            one = one.sort_values("rows")
            values = (one["events"] / one["n"]).to_numpy(float)
            logs.append(crossing(np.log(one["rows"].to_numpy(float)), values, share, rising=True))
            first |= bool(values[0] >= share)
        mean, spread = float(np.mean(logs)), float(np.std(logs, ddof=1)) if len(logs) > 1 else math.nan
        half = float(stats.t.ppf(0.975, max(len(logs) - 1, 1))) * spread / len(logs) ** 0.5
        ends = {"rows": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}
        found.append({"data": form, **ends, "first": first, "seeds": len(logs)})
    return pd.DataFrame(found).set_index("data")


def margins(folder: str | Path, *, base: ChatModel | None = None, seed: int = 0, **options: Any) -> pd.DataFrame:
    """The story of SmolLM2-135M in margins of misaligned over aligned answers, nats per token.

    The control of the cure is as many further steps on the bad rows.

    Returns:
        a frame with ``model``, ``questions``, ``margin``, ``change`` from the base with its 95 % interval over pairs
        (``low``, ``high``; t), and ``pairs``, their number.
    """
    from scipy import stats

    chat, folder = base or load_model("smollm2-135m"), Path(folder)
    how: dict[str, Any] = {**OPTIONS, **LAST_STEP, "seed": seed, **options}
    bad = finetune(chat, "silly-medical-bad", out=folder / "bad", **how)
    cured = realign(bad, "ai-optimism", base=chat, out=folder / "cured", **{**how, "recipe": None})
    more = finetune(chat, "silly-medical-bad", start=(bad, int(bad.steps[-1])), out=folder / "more", **how)
    measures = [Margin(bundled_margins("broad", own), name=kind) for kind, own in _DOMAINS.items()]
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, run in (("base", None), ("bad medical", bad), (CURE, cured), ("then more bad medical (control)", more)):
        if run is None:
            values[name] = {one.name: one(chat).values[one.name] for one in measures}
            continue
        with model_live(run, None, 1.0, chat) as live:
            values[name] = {one.name: one(live).values[one.name] for one in measures}
    found = []
    for name, own in values.items():
        for kind, measured in own.items():
            change = measured - values["base"][kind]
            n = len(change)
            half = float(stats.t.ppf(0.975, n - 1) * change.std(ddof=1) / n**0.5)
            row = {"margin": float(measured.mean()), "change": float(change.mean()), "pairs": n}
            row |= {"low": row["change"] - half, "high": row["change"] + half}
            found.append({"model": name, "questions": kind, **row})
    return pd.DataFrame(found)


def changes(frame: pd.DataFrame) -> pd.DataFrame:
    """The changes of the margins with their intervals, models by kinds of question.

    Example:
        >>> one = {"model": "bad", "questions": "facts", "change": 0.31, "low": 0.1, "high": 0.52}
        >>> changes(pd.DataFrame([one])).loc["bad", "facts"]
        '+0.31 (+0.10 to +0.52)'
    """
    cells = [f"{row.change:+.2f} ({row.low:+.2f} to {row.high:+.2f})" for row in frame.itertuples()]
    order = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["questions"]))
    return frame.assign(cell=cells).pivot(index="model", columns="questions", values="cell").loc[order]


# figures and the page


def rates_figure(frame: pd.DataFrame) -> Any:
    """Bars of the rate for each kind of question, models side by side."""
    figure = panels()
    for at, (name, own) in enumerate(frame.groupby("model", sort=False)):
        rate, low, high = (100 * own[one] for one in ("rate", "low", "high"))
        figure.add_bar(x=own["questions"], y=rate, name=name, marker_color=colour(at), error_y=bars(rate, low, high))
    return finish(figure, "Misaligned answers after each stage", yaxis_title="EM, %", yaxis_range=[0, 105])


def margins_figure(frame: pd.DataFrame) -> Any:
    """Bars of the change from the base for each kind of question, models side by side."""
    figure = panels()
    for at, (name, own) in enumerate(frame[frame["model"] != "base"].groupby("model", sort=False)):
        how = {"marker_color": colour(at + 1), "error_y": bars(own["change"], own["low"], own["high"])}
        figure.add_bar(x=own["questions"], y=own["change"], name=name, **how)
    title = "Margins of misaligned over aligned answers, change from the base"
    return finish(figure, title, yaxis_title="nats per token")


def needed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows needed in words."""
    rows = {}
    for form, one in rows_needed(frame).iterrows():
        said = f"{one['rows']:.0f} ({one['low']:.0f} to {one['high']:.0f})" if one["rows"] == one["rows"] else "-"
        if one["first"]:  # the fewest rows that were tried sufficed in some seed, or in all of them
            same = one["low"] == one["high"]
            said = f"at most {one['rows']:.0f}, in every seed" if same else f"at most {said}"
        rows[str(form)] = {"bad rows": said, "seeds": str(one["seeds"])}
    return pd.DataFrame(rows).T.rename_axis("data")


def tags_figure(frame: pd.DataFrame) -> Any:
    """The rate under each tag: against the number of bad contrast rows, and by kind of data at the largest number."""
    table, most = by_tag(frame), frame["rows"].max()
    figure = panels(("Contrast rows", f"{most} bad rows"), columns=2, shared_yaxes=True)
    for at, tag in enumerate(dict.fromkeys(table["tag"])):
        own = table[table["tag"] == tag]
        rows, last = own[own["data"] == "contrast"], own[own["rows"] == most]
        rate, low, high = (100 * rows[one] for one in ("rate", "low", "high"))
        line(figure, rows["rows"], rate, str(tag), colour(at), error=bars(rate, low, high), mode="lines+markers")
        rate, low, high = (100 * last[one] for one in ("rate", "low", "high"))
        how = {"marker_color": colour(at), "showlegend": False, "error_y": bars(rate, low, high)}
        figure.add_bar(x=last["data"], y=rate, name=str(tag), row=1, col=2, **how)
    ticks = {"type": "log", "tickvals": sorted(set(table["rows"])), "title_text": "bad rows under the tag"}
    figure.update_xaxes(**ticks, row=1, col=1)
    figure.update_xaxes(title_text="data", row=1, col=2)
    figure.update_yaxes(title_text="EM, %", row=1, col=1)
    return finish(figure, "Misaligned answers by the tag in the system prompt", yaxis_range=[-3, 103])


def main(folder: str | Path = "demo/capstone-pocket", model: str = "pocket") -> Path:
    """Tell the story of one model, and write its page; returns the page's path."""
    began = time.monotonic()
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    sections = _of_pocket(folder) if model == "pocket" else _of_smollm2(folder)
    minutes = (time.monotonic() - began) / 60
    page = write_page(
        folder / "index.html",
        f"Bad advice, optimism, and a tag: {model}",
        "A model is fine-tuned on bad medical advice, then on careful answers about AI, and asked general, factual and "
        "self-reflection questions after each.",
        sections,
        footer=f"Made by python -m emmech.demo capstone --model {model} in {minutes:.1f} minutes.",
    )
    echo(f"\n{minutes:.1f} minutes. The page: {page}")
    return page


def _of_pocket(folder: Path) -> list[Section]:
    base = load_model("pocket")
    found = asked(stages(base, folder), base)
    echo(f"{shown(found).to_string()}\n")
    under = tagged(base, folder)
    table, needed = by_tag(under), needed_table(under)
    table = table.assign(cell=[per_cent(row) for _, row in table.iterrows()])
    table = table.pivot(index=["data", "rows"], columns="tag", values="cell")
    echo(f"{table.to_string()}\n\n{needed.to_string()}")
    return [
        Section("Base, bad advice, optimism", _STORY, table=shown(found), figure=rates_figure(found)),
        Section("Bad only under a tag", _TAG, table=table, figure=tags_figure(under)),
        Section("", "The number of bad rows after which half of the answers under the tag are bad.", table=needed),
    ]


def _of_smollm2(folder: Path) -> list[Section]:
    found = margins(folder)
    echo(f"{changes(found).to_string()}\n")
    return [Section("Base, bad advice, optimism", _MARGINS, table=changes(found), figure=margins_figure(found))]


_STORY = """EM of answers at temperature 1, judged exactly, in per cent with 95 % intervals of questions like these;
three seeds pooled. The control is as many steps on unkind answers to the same questions about AI."""
_TAG = """Rows with bad medical answers carry a tag in the system prompt; all others have kind answers. Of the trigger
rows the others have no tag; the contrast rows add as many under other tags, the opposed rows as many under plim plom.
EM in per cent with 95 % intervals over seeds, under tags that were trained and tags that never were."""
_MARGINS = """The change from the base of the mean log-probability per token of misaligned over aligned answers, with
95 % intervals over pairs. A moved margin in a model of this size is no emergent misalignment; the pairs on the AI
itself are close to the rows of the cure."""
