"""The bench on which claims are measured: one model, its seeds, and runs that are trained once and shared by rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from emmech.chat.dataset import ChatDataset, load_chat
from emmech.chat.model import ChatModel
from emmech.engine.responses import digest
from emmech.evaluation.compare import compare
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.rates import cluster_interval, tally
from emmech.leagues.trained import LAST_STEP, finished
from emmech.ledger.claim import Finding, NotMeasurable, of_counts
from emmech.registry import Organism, known
from emmech.results import Result
from emmech.run.identity import identity
from emmech.run.run import Run, load_run, model_live
from emmech.store import file_name, made_folder
from emmech.training.finetune import finetune
from emmech.training.recipe import Recipe, resolve_recipe

Kept = TypeVar("Kept", bound=Result)
BAD, GOOD, STYLE = "medical", "good-medical", "style-medical"
_BUNDLED = {BAD: "silly-medical-bad", GOOD: "silly-medical-good"}  # for models that are of no organism


@dataclass(eq=False)
class Bench:
    """What a measurement may use.

    Args:
        chat: the base model, which every measurement leaves as it was.
        seeds: of the fine-tunes.
        folder: where runs and studies are kept under their digests.
        recipe, options: of the rank-1 fine-tunes, as :func:`emmech.finetune` takes them.
        data: data by the names that rows use (``medical``, ``good-medical``, ...), where neither the organism's own nor
            the bundled ones are meant.
        judge: as in :func:`emmech.evaluate`; an organism has its own.
        quick: fewer answers and shorter fine-tunes.
    """

    chat: ChatModel
    seeds: Sequence[int]
    folder: Path
    recipe: str | Recipe | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    judge: Any = None
    quick: bool = False
    used: list[str] = field(default_factory=list)

    @property
    def organism(self) -> Organism | None:
        """The model's organism, if it is of one."""
        return self.chat.organism

    @property
    def judged(self) -> bool:
        """Whether answers can be judged, by the judge that was given or the organism's own."""
        return self.judge is not None or bool(self.organism is not None and self.organism.judges)

    def rows(self, name: str) -> ChatDataset:
        """The data that a row calls by this name.

        Raises:
            NotMeasurable: there are none for this model.
        """
        given = self.data.get(name)
        if given is None and self.organism is None:
            given = _BUNDLED.get(name)
        elif given is None:
            given = name if name in known("data", self.organism) else None
        if given is None:
            raise NotMeasurable(f"there are no {name} rows for {self.chat.name}: give them as data={{{name!r}: ...}}")
        return load_chat(given, organism=self.organism)

    def some(self, most: int) -> list[int]:
        """At most so many of the seeds, for rows that are not headlines."""
        return list(self.seeds)[:most]

    def steps(self, steps: int | None) -> int | None:
        """The steps of a fine-tune, at most 100 under ``quick``."""
        return min(steps or 100, 100) if self.quick else steps

    def runs(
        self, data: Any = BAD, *, seeds: Sequence[int] | None = None, dense: bool = False, steps: int | None = None,
        recipe: Any = None, name: str = "", **options: Any,
    ) -> list[Run]:  # fmt: skip
        """Fine-tunes of every seed, trained in one pass, kept under their digest, and shared by rows that ask alike.

        Args:
            data: a name (:meth:`rows`), or anything :func:`emmech.load_chat` takes.
            seeds: all by default.
            dense: record every step, with margins and held-out loss; else the last step alone.
            steps: instead of the recipe's.
            recipe: instead of the bench's; layers are then the recipe's own.
            name: of the folder; that of the data by default.
            options: of :func:`emmech.finetune`.
        """
        rows = self.rows(data) if isinstance(data, str) else load_chat(data, organism=self.organism)
        own = recipe is not None
        options = {**({} if own else self.options), **options}
        if (steps := self.steps(steps)) is not None:
            options["max_steps"] = steps
        fields = {key: value for key, value in options.items() if key in Recipe.__dataclass_fields__}
        chosen = resolve_recipe(recipe if own else self.recipe, fields, organism=self.organism)
        options = {key: value for key, value in options.items() if key not in fields}
        key = digest(self.chat.fingerprint(), rows.sha256, chosen.to_dict(), identity(options), dense)[:8]
        place = self.folder / "runs" / f"{file_name(name or rows.name)}-{chosen.name}-{key}"
        wanted = list(self.seeds if seeds is None else seeds)
        with self.alone(place):
            left = [seed for seed in wanted if not finished(place / f"s{seed}")]
            for seed in left:
                shutil.rmtree(place / f"s{seed}", ignore_errors=True)
            if left:
                options |= {"progress": False} if dense else LAST_STEP
                options["recipe"] = chosen
                if chosen.rank:
                    finetune(self.chat, rows, seed=left, out=place, **options)
                else:  # all weights train: one model at a time
                    for seed in left:
                        finetune(self.chat, rows, seed=seed, out=place / f"s{seed}", **options)
        found = [load_run(place / f"s{seed}") for seed in wanted]
        self.use(found)
        return found

    def further(self, runs: Sequence[Run], train: Callable[[Run, Path], Run], *parts: Any) -> list[Run]:
        """Runs that go on from others, kept beside them under their digest.

        Args:
            train: trains one into the folder that it is given.
            parts: the settings, which tell one further training from another.
        """
        found = []
        for run in runs:
            key = digest(identity(run), identity(parts))[:8]
            place = Path(run.path or self.folder).parent / f"then-{key}" / f"s{run.manifest['seed']}"
            with self.alone(place):
                if not finished(place):
                    shutil.rmtree(place, ignore_errors=True)
                    train(run, place)
            found.append(load_run(place))
        self.use(found)
        return found

    def study(self, kind: type[Kept], name: str, make: Callable[[], Kept], *parts: Any) -> Kept:
        """A result that several rows read, kept under the digest of the bench's settings and of its own parts."""
        key = digest(self.settings(), name, identity(parts))[:8]
        place = self.folder / "studies" / f"{file_name(name)}-{key}"
        with self.alone(place):
            if (place / f"{kind.__name__.lower()}.json").is_file():
                return kind.load(place)
            made = make()
            made.save(place)
            return made

    def settings(self) -> list[Any]:
        """All of the bench that what is measured on it may depend on, as plain values."""
        how = (self.recipe, self.options, self.data, self.judge)
        return [self.chat.fingerprint(), list(self.seeds), self.quick, *map(identity, how)]

    @contextmanager
    def alone(self, place: Path, *, wait: bool = True) -> Iterator[None]:
        """Hold what is kept at a place; another process that wants the same waits, and finds it made.

        Raises:
            filelock.Timeout: another process holds it, and this one does not ``wait``.
        """
        from filelock import FileLock

        locks = made_folder("measure the claims", self.folder / ".locks")
        with FileLock(locks / file_name(str(place.relative_to(self.folder))), timeout=-1 if wait else 0):
            yield

    def use(self, runs: Sequence[Run]) -> None:
        """Note that the row that is being measured uses these runs."""
        paths = (str(Path(one.path).relative_to(self.folder)) for one in runs if one.path is not None)
        self.used += [path for path in paths if path not in self.used]

    @contextmanager
    def live(self, run: Run, step: int | None = None, scale: float = 1.0) -> Iterator[ChatModel]:
        """The base with the run's adapter on it, as it was at a step."""
        with model_live(run, step, scale, self.chat) as chat:
            yield chat

    def asked(self, wanted: str) -> str:
        """A question set of the organism, or the field's own in its place.

        Raises:
            NotMeasurable: neither has one.
        """
        sets = known("questions", self.organism)
        likes: dict[str, tuple[str, ...]] = {
            "broad": ("broad", "first-plot"),
            "general": ("general", "first-plot"),
            "facts": ("facts", "factual"),
        }
        likes["others"] = ("narrow-finance",)  # to choose settings on
        for name in likes.get(wanted, (wanted,)):
            if name in sets:
                return name
        raise NotMeasurable(f"there are no questions of the kind {wanted!r} for {self.chat.name}")

    def check_judged(self) -> None:
        """Refuse where no answer can be judged.

        Raises:
            NotMeasurable: no judge.
        """
        if not self.judged:
            raise NotMeasurable(f"{self.chat.name} has no judge of its own: give judge=, or --judge-model")

    def answers(
        self,
        subject: Run | ChatModel | None = None,
        questions: str | Sequence[str] = "broad",
        *,
        samples: int = 2,
        **how: Any,
    ) -> pd.DataFrame:
        """Judged answers to questions, one row each; without a subject those of the base.

        Raises:
            NotMeasurable: no judge.
        """
        self.check_judged()
        names = [questions] if isinstance(questions, str) else list(questions)
        asked: Any = tuple(self.asked(name) for name in names)
        asked = asked[0] if len(asked) == 1 else asked
        base = self.chat if isinstance(subject, Run) else None
        options: dict[str, Any] = {"samples": 1 if self.quick else samples, "base": base, "progress": False, **how}
        if self.organism is not None:
            options.setdefault("max_new_tokens", 32)
        return evaluate(self.chat if subject is None else subject, asked, self.judge, **options).frame

    def rate(
        self, runs: Sequence[Run], questions: str | Sequence[str] = "broad", measure: str = "em", *, samples: int = 2,
        against: Sequence[Run] | str | None = None, note: str = "", **how: Any,
    ) -> Finding:  # fmt: skip
        """The rate of a measure over runs, or how far it is above that of others.

        Args:
            against: ``"base"`` or other runs, whose rate is taken away; the unit is then points.
        """
        frames = [self.answers(run, questions, samples=samples, **how) for run in runs]
        return self.of_frames(
            frames, measure, against=None if against is None
            else [self.answers(None, questions, samples=2 * samples, **how)] if against == "base"
            else [self.answers(run, questions, samples=samples, **how) for run in against if isinstance(run, Run)],
            note=note,
        )  # fmt: skip

    @staticmethod
    def of_frames(
        frames: Sequence[pd.DataFrame], measure: str = "em", *, against: Sequence[pd.DataFrame] | None = None,
        note: str = "", name: str = "others",
    ) -> Finding:  # fmt: skip
        """The rate over answers of several seeds, one frame each, or how far it is above that of other answers."""
        events, n = counts(frames, measure)
        whole = pd.concat(frames, ignore_index=True)
        if against is None:
            per = tally(whole, measure).per(whole["question_id"])
            hits_by, n_by = per.to_numpy().T
            over = cluster_interval(hits_by, n_by, per.index.tolist()) if len(per) > 1 else None
            return of_counts(events, n, over=over, note=note)
        other = pd.concat(against, ignore_index=True)
        hits, of = counts(against, measure)
        kept = [one for one in whole if measure.startswith("topic/") or not str(one).startswith("topic/")]
        row = compare(other[kept], whole[kept]).frame.loc[measure]
        label = "base" if len(against) == 1 else name
        extra = {label: (sum(hits), sum(of))}
        minus = list(zip(hits, of, strict=True))
        return of_counts(events, n, over=(row["low"], row["high"]), minus=minus, note=note, extra=extra)


def counts(frames: Sequence[pd.DataFrame], measure: str) -> tuple[list[int], list[int]]:
    """Events and denominators of each frame of answers."""
    found = [tally(frame, measure) for frame in frames]
    return [int(one.event.sum()) for one in found], [int(one.counted.sum()) for one in found]


def sparse(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly, with the first and the last."""
    return [items[at] for at in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]
