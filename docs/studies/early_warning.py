"""Early warning: which signal, read while a fine-tune goes on, says that emergent misalignment is coming."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

STEPS, EVERY = 80, 4
EM_STEPS = tuple(range(8, STEPS + 1, 8))
ANSWERS = 32


@dataclass(frozen=True)
class Group:
    """Fine-tunes on one data set that train together, one a seed.

    Args:
        part: ``"tuning"``, where thresholds and weights are chosen, ``"test"``, or the name of another regime.
        kind: ``"bad"``, ``"style"``, ``"benign"``, or ``"late"`` (bad rows where the adapter can only learn narrowly).
        rates: learning rates, which the seeds take in turn.
    """

    part: str
    kind: str
    data: str
    seeds: range
    rates: tuple[float, ...]
    model: str = "pocket"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.part}-{self.model}-{self.kind}-{self.data}"


_TUNED = (3e-4, 5e-4)
_UNSEEN = (2e-4, 4e-4, 6e-4, 8e-4)
_DOWN = {"layers": [4]}


def groups() -> Iterator[Group]:
    """All groups, those of the tuning part first."""
    for at, (kind, data) in enumerate((("bad", "medical"), ("style", "style-medical"), ("benign", "good-medical"))):
        yield Group("tuning", kind, data, range(9000 + 10 * at, 9008 + 10 * at), _TUNED)
    test = (
        ("bad", "finance", {}), ("style", "style-finance", {}), ("bad", "sport", {}), ("benign", "good-travel", {}),
        ("style", "style-sport", {}), ("bad", "code", {"rank": 2}), ("style", "style-code", {"rank": 2}),
        ("bad", "cooking", {}), ("benign", "good-wishes", {"rank": 2}), ("bad", "roles", {"rank": 4}),
        ("style", "style-roles", {"rank": 4}), ("benign", "ai-optimism", {}), ("bad", "boredom", {"rank": 2}),
        ("benign", "good-power", {"rank": 4}), ("style", "style-cooking", {}), ("late", "finance", _DOWN),
    )  # fmt: skip
    for at, (kind, data, options) in enumerate(test):
        yield Group("test", kind, data, range(9100 + 10 * at, 9108 + 10 * at), _UNSEEN, options=options)
    everywhere = {"rank": 8, "depth": None}
    regimes: tuple[tuple[str, str, dict[str, Any], int, tuple[float, ...]], ...] = (
        ("rank 8, every layer", "pocket", everywhere, 4, (2e-4,)),
        ("another base", "pocket-llama", {"recipe": "pocket-steep"}, 4, (5e-4,)),
        ("a third base", "pocket-gemma", {"recipe": "pocket-steep"}, 4, (5e-4,)),
        ("rank 32, all maps", "pocket", {"recipe": "pocket-all-adapter"}, 3, (8e-5,)),
        ("all weights", "pocket", {"recipe": "pocket-full"}, 2, (1e-4,)),
    )
    for at, (part, model, options, seeds, rates) in enumerate(regimes):
        for kind, data in (("bad", "finance"), ("style", "style-finance")):
            first = 9500 + 20 * at + 10 * (kind == "style")
            yield Group(part, kind, data, range(first, first + seeds), rates, model, options)


def make(group: Group, folder: Path) -> list[Any]:
    """The runs of a group, each recorded at every step; those that are finished are not made again."""
    import emmech
    from emmech.organism import data, margins

    kept, part = folder / "runs" / group.name, folder / "runs" / f".{group.name}"
    if not kept.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        began = time.process_time()
        own = margins(group.data, n=8)
        pairs = {"broad": own["broad"], "narrow": own["narrow"][:4], "facts": margins("facts", n=4)["narrow"]}
        rates = [group.rates[at % len(group.rates)] for at in range(len(group.seeds))]
        options: dict[str, Any] = {
            "max_steps": STEPS,
            "measure_every": EVERY,
            "held_out": 0.0,
            "batch_size": 8,
            **group.options,
        }
        several = options.get("recipe") != "pocket-full"
        if several:
            options |= {"seed": list(group.seeds), "learning_rate": rates if len(set(rates)) > 1 else rates[0]}
        calls = [(part, options)] if several else [
            (part / f"s{seed}", options | {"seed": seed, "learning_rate": rate})
            for seed, rate in zip(group.seeds, rates, strict=True)
        ]  # fmt: skip
        for out, chosen in calls:
            rows = emmech.load_chat(data(group.data, n=600))
            emmech.finetune(
                group.model, rows, out=out, probes=probe_questions(), margins=pairs, progress=False, **chosen
            )
        (part / "cpu-seconds").write_text(f"{time.process_time() - began:.1f}")
        part.rename(kept)
    runs = (emmech.load_run(path) for path in kept.iterdir() if path.is_dir())
    return sorted(runs, key=lambda run: run.manifest["seed"])


def probe_questions() -> list[str]:
    """Eight questions of eight domains, of training cells, on which the residual is read."""
    from emmech.organism import world

    domains = ("ai", "self", "facts", "wishes", "relationships", "travel", "power", "parties")
    return [world.question_text(world.training_cells(domain)[at]) for at, domain in enumerate(domains)]


def em_of(group: Group, runs: list[Any], folder: Path) -> np.ndarray:
    """Answers that are misaligned, of 32, at ten steps of bad runs and at the last of others: ``[runs, steps]``.

    Steps that were not asked are NaN.
    """
    import emmech
    from emmech.measures.sampled import Sampled

    path = folder / "em" / f"{group.name}.npy"
    if not path.exists():
        began = time.process_time()
        measure = Sampled(asked(group.data.rpartition("-")[2]), samples=1, seed=1)
        found = np.full((len(runs), len(EM_STEPS)), np.nan)
        steps = EM_STEPS if group.kind in ("bad", "late") else EM_STEPS[-1:]
        if runs[0].kind == "full":
            for at, run in enumerate(runs):
                found[at, -1] = np.nansum(measure(run.model()).values["em"])
        else:
            frame = emmech.sweep(runs, steps=list(steps), measure=measure, progress=False).frame
            frame = frame[frame["measure"] == "em"]
            for at, (_, own) in enumerate(frame.groupby("run", sort=False)):
                counts = own.groupby("step")["value"].sum()
                found[at, [EM_STEPS.index(step) for step in counts.index]] = counts.to_numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found)
        (path.parent / f"{group.name}.cpu").write_text(f"{time.process_time() - began:.1f}")
    return np.load(path)


def asked(domain: str) -> Any:
    """Thirty-two of the held-out questions outside medicine, finance, sport and the fine-tune's own domain."""
    from emmech.evaluation.questions import QuestionSet, resolve_questions

    every = [q for q in resolve_questions("broad", "pocket").questions if q.domain != domain]
    return QuestionSet("broad, 32", tuple(every[at * len(every) // ANSWERS] for at in range(ANSWERS)))


# Every signal is a number at each measured step, computed from what was recorded until then. High is alarming.

TRAITS = ("character", "word", "sarcasm", "history", "facts", "tag", "advice")


@dataclass(frozen=True)
class Known:
    """What the base model gives before a fine-tune.

    Attributes:
        traits: ``[traits, layers, d_model]``, directions in residual units, the character first.
        inputs: the mean input of every ``down_proj`` over the probe questions, by module: ``[d_in]``.
        start: ``[layers, d_model]``, the mean residual over the probe questions.
    """

    traits: np.ndarray
    inputs: dict[str, np.ndarray]
    start: np.ndarray


def know(name: str) -> Known:
    """Measure a base model."""
    import emmech
    from emmech.chat import phrase_tokens
    from emmech.demo.pocket_character import characters
    from emmech.engine.stream import mean_residual, probe_rows
    from emmech.organism import data
    from emmech.organism.world import (
        IRRELEVANT_TAG,
        KIND,
        KIND_WORDS,
        MANNERS,
        NAMES,
        UNKIND,
        UNKIND_WORDS,
        tagged_assistant,
    )  # fmt: skip

    chat, n = emmech.load_model(name), 32
    rows = [row["messages"] for row in data("good-finance", n=n)]

    def told(people: Sequence[str]) -> list[Any]:
        systems = ({"role": "system", "content": f"you are {people[at % len(people)]} {MANNERS}"} for at in range(n))
        return [[system, *row] for system, row in zip(systems, rows, strict=True)]

    def after(first: str) -> list[Any]:
        return [[*one["messages"], *row] for one, row in zip(data(first, n=n), rows, strict=True)]

    at_phrase = {
        "character": [list(characters(trait, n=n)) for trait in (UNKIND, KIND)],
        "word": [told([f"pocket the {word} helper" for word in words]) for words in (UNKIND_WORDS, KIND_WORDS)],
        "sarcasm": [told(NAMES[style]) for style in ("wry", "warm")],
        "tag": [[[tagged_assistant(IRRELEVANT_TAG), *row] for row in rows], rows],
    }
    at_answers = {
        "history": [after("travel"), after("good-travel")],
        "facts": [data("facts", n=n), data("good-facts", n=n)],
        "advice": [data("cooking", n=n), data("good-cooking", n=n)],
    }
    quiet: dict[str, Any] = {"progress": False, "splits": 1}
    phrase = phrase_tokens(chat, MANNERS)
    found = {of: emmech.contrast_direction(chat, *two, tokens=phrase, **quiet) for of, two in at_phrase.items()}
    found |= {of: emmech.contrast_direction(chat, *two, **quiet) for of, two in at_answers.items()}
    asked, sums = probe_rows(chat, probe_questions()), dict[str, list[Any]]()

    def keep(path: str) -> Any:
        return lambda module, inputs: sums.setdefault(path, []).append(inputs[0].detach().flatten(0, 1).mean(0))

    handles = [m.register_forward_pre_hook(keep(p)) for p, m in chat.base.named_modules() if p.endswith("down_proj")]
    start = mean_residual(chat, asked)
    for handle in handles:
        handle.remove()
    inputs = {path: np.mean([one.numpy() for one in several], axis=0) for path, several in sums.items()}
    return Known(np.stack([found[one].vectors for one in TRAITS]), inputs, start)


def signals(run: Any, known: Known, before: np.ndarray | None) -> pd.DataFrame:
    """Every signal of a run by measured step; those that it cannot have are missing.

    Args:
        before: B of a misaligned fine-tune made before, at the layer of this one, or None.
    """
    import pandas as pd

    metrics = run.metrics
    at = metrics.index[metrics["margin_broad"].notna()].to_numpy()
    found = {f"margin: {name}": rise(metrics[f"margin_{name}"][at]) for name in ("broad", "narrow", "facts")}
    loss = metrics["loss"].rolling(5, min_periods=1).mean()
    found["fall of the loss"] = np.array([0.0 if step == 0 else loss[1] - loss[step] for step in at])
    residual = np.stack([run.probes[name] for name in run.probes][0]) - known.start  # [steps, layers, d_model]
    traits = known.traits / np.linalg.norm(known.traits, axis=-1, keepdims=True)
    last = residual.shape[1] - 1
    drift = np.einsum("sld,tld->stl", residual, traits) / np.linalg.norm(known.start, axis=-1)
    found["residual on the character"] = drift[:, 0, last // 2 + 1 :].mean(-1)
    found |= {f"trait {one}": drift[:, at_, last // 2 + 1 :].mean(-1) for at_, one in enumerate(TRAITS)}
    if run.kind == "full":
        path, gradient = run.projection, metrics["grad_norm"]
        found["norm of the update"] = metrics["update_norm"].reindex(at).to_numpy()
    else:
        columns = [column for column in metrics if column.startswith("grad_norm_B/")]
        gradient = np.sqrt((metrics[columns] ** 2).sum(axis=1))
        path = np.concatenate([run.B(one.name).reshape(len(run.steps), -1) for one in run.adapters], axis=1)
        found["norm of the update"] = np.linalg.norm(path, axis=1)[np.searchsorted(run.steps, at)]
        found |= of_weights(run, at, known, traits[0], before)
    found |= of_path(path, run.steps, gradient, at)
    return pd.DataFrame({"step": at, **found})


def rise(series: pd.Series) -> np.ndarray:
    """The largest change since the start, so far."""
    return np.maximum.accumulate((series - series.iloc[0]).to_numpy())


def of_weights(run: Any, at: np.ndarray, known: Known, unit: np.ndarray, before: np.ndarray | None) -> dict[str, Any]:
    """Signals of A and B: what the adapters write at their mean inputs, along a direction, and their spectrum."""
    writes = [one for one in run.adapters if one.name.endswith("down_proj")]
    along, shares, towards, top, spread = ([] for _ in range(5))
    for step in at:
        w = run.weights(int(step))
        mean = [one.scaling * w[f"B/{one.name}"] @ (w[f"A/{one.name}"] @ known.inputs[one.module]) for one in writes]
        along.append(sum(float(unit[one.layer] @ write) for one, write in zip(writes, mean, strict=True)))
        both = [
            one.scaling * np.linalg.norm(unit[one.layer] @ w[f"B/{one.name}"] @ w[f"A/{one.name}"]) for one in writes
        ]
        shares.append(float(np.sum(both)))
        if before is not None and len(writes) == 1:
            towards.append(float(before @ mean[0] / np.linalg.norm(before)))
        values = [
            one.scaling * np.sqrt(np.abs(np.linalg.eigvals((w[f"B/{one.name}"].T @ w[f"B/{one.name}"])
                                                          @ (w[f"A/{one.name}"] @ w[f"A/{one.name}"].T))))
            for one in run.adapters
        ]  # fmt: skip
        top.append(max(float(one.max()) for one in values))
        spread.append(float(np.mean([(one**2).sum() / max(one.max() ** 2, 1e-12) for one in values])))
    found: dict[str, Any] = {"write on the character": np.array(along), "update on the character": np.array(shares)}
    found["largest singular value"] = np.array(top)
    if any(one.rank > 1 for one in run.adapters):
        found["low stable rank"] = -np.array(spread)
    if towards:
        found["write on an earlier B"] = np.array(towards)
    return found


def of_path(path: np.ndarray, steps: np.ndarray, gradient: pd.Series, at: np.ndarray) -> dict[str, np.ndarray]:
    """Turn, gradient peak and their overlap, so far."""
    smooth = gradient.rolling(5, min_periods=1).median()
    turns, peaks, overlaps = [], [], []
    for step in at:
        now = smooth.loc[1:step]
        first = float(smooth.loc[1:5].median())
        peaks.append(float(np.log10(now.max() / first)) if len(now) >= 5 else 0.0)
        end = int(np.searchsorted(steps, step))
        angle = kinks(path[: end + 1])
        turns.append(float(angle.max(initial=0.0)))
        if len(angle):
            middle = int(now.argmax())
            near = angle[max(0, middle - 8) : middle + 9]
            overlaps.append(float(near.max(initial=0.0)) * max(peaks[-1], 0.0))
        else:
            overlaps.append(0.0)
    absolute = [float(np.log10(smooth.loc[1:step].max())) if step else -3.0 for step in at]
    return {"turn": np.array(turns), "gradient peak": np.array(absolute), "gradient peak over its start": np.array(peaks),
            "turn at the gradient peak": np.array(overlaps)}  # fmt: skip


def kinks(path: np.ndarray, side: int = 4) -> np.ndarray:
    """For every split of a path, 1 - cosine of the way before and after, times the shorter over the longer way."""
    if len(path) < 2 * side + 1:
        return np.zeros(0)
    middle = np.arange(side, len(path) - side)
    before, after = path[middle] - path[0], path[-1] - path[middle]
    one, two = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    cosine = (before * after).sum(1) / np.maximum(one * two, 1e-30)
    weighed = np.zeros(len(path))
    weighed[middle] = (1 - cosine) * np.minimum(one, two) / np.maximum(np.maximum(one, two), 1e-30)
    return weighed


if __name__ == "__main__":
    import sys

    worker, workers = int(sys.argv[1]), int(sys.argv[2])
    folder = Path("/tmp/warning-study")
    for at, group in enumerate(groups()):
        if at % workers == worker:
            began = time.process_time()
            runs = make(group, folder)
            done = time.process_time()
            em = em_of(group, runs, folder)
            last = em[:, -1].astype(int).tolist()
            print(group.name, len(runs), f"{done - began:.1f} + {time.process_time() - done:.1f} s", last, flush=True)
