"""Cures that train: on other data afterwards, or anew on the harmful rows with defences."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emmech.chat.model import ChatModel
from emmech.defences import InoculationAdapter
from emmech.errors import EmmechError
from emmech.interventions.cures import Case
from emmech.realignment.further import realign, recipe_of
from emmech.run.run import load_run, model_live
from emmech.training.defence import Defence
from emmech.training.finetune import finetune
from emmech.training.recipe import resolve_recipe

LAST_STEP: Mapping[str, Any] = MappingProxyType(
    {"record_every": 10**6, "measure_every": 10**6, "margins": {}, "progress": False}
)
"""Options of fine-tunes of which only the last step is read."""


class TrainedCure:
    """A cure that trains; what it trains is kept in the case's folder and trained once."""

    def train(self, cases: Sequence[Case]) -> None:
        """Train the runs of these cases into their folders."""
        raise NotImplementedError

    def prepare(self, cases: Sequence[Case]) -> None:
        """Train what is not there yet; what a killed training left is begun anew."""
        left = [case for case in cases if not finished(case.folder)]
        for case in left:
            shutil.rmtree(case.folder, ignore_errors=True)
        if left:
            self.train(left)

    @contextmanager
    def applied(self, case: Case) -> Iterator[ChatModel]:
        """The last step of the run that it trained."""
        self.prepare([case])
        with model_live(load_run(case.folder), None, 1.0, case.base) as chat:
            yield chat


@dataclass(frozen=True, eq=False)
class Realignment(TrainedCure):
    """Train each run further on other data (:func:`emmech.realign`).

    Args:
        data: anything :func:`emmech.load_chat` takes, or a name that :func:`emmech.realign` knows.
        options: further arguments of :func:`emmech.realign`, such as ``{"max_steps": 60}``.

    Example:
        >>> Realignment("ai-optimism", {"max_steps": 60}).name
        'realignment'
    """

    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "realignment"

    def train(self, cases: Sequence[Case]) -> None:
        """See :meth:`TrainedCure.train`."""
        for case in cases:
            own: dict[str, Any] = {"base": case.base, "seed": case.run.manifest["seed"], "out": case.folder}
            realign(case.run, self.data, **_with_options(self.options, own))


@dataclass(frozen=True, eq=False)
class Defended(TrainedCure):
    """Fine-tune anew on the same harmful rows with defences (:mod:`emmech.defences`), all seeds in one pass.

    Args:
        defences: as :func:`emmech.finetune` takes them; or a function of a :class:`~emmech.interventions.Case` that
            gives them, where they depend on the run: these are trained one by one.
        options: further arguments of :func:`emmech.finetune`.
    """

    defences: Sequence[Defence] | Callable[[Case], Sequence[Defence]]
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "defended"

    def train(self, cases: Sequence[Case]) -> None:
        """See :meth:`TrainedCure.train`."""
        own = {"seed": None, "out": None, "defences": None}  # the league's
        how: dict[str, Any] = {"recipe": recipe_of(cases[0].run), "layers": cases[0].run.manifest.get("layers")}
        how |= _with_options(self.options, own)
        rank = how.get("rank", resolve_recipe(how["recipe"], {}, organism=cases[0].base.organism).rank)
        if whole := not rank:  # runs have nothing in common, and none has adapters
            how["layers"] = None
        groups = [[case] for case in cases] if whole or callable(self.defences) else [list(cases)]
        for group in groups:
            first = group[0]
            defences = self.defences(first) if callable(self.defences) else self.defences
            how |= {"seed": [int(case.run.manifest["seed"]) for case in group], "out": first.folder.parent}
            finetune(first.base, first.data, **{**how, "defences": defences})


def _with_options(options: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """A cure's options beside the arguments that the league gives."""
    taken = [key for key in own if key in options] if isinstance(options, Mapping) else ["options"]
    if taken:
        why = "a cure's options are further arguments by name, and the league gives its own"
        raise EmmechError("train a cure", f"options={options!r}"[:120], why, f"options without {', '.join(own)}")
    return {**LAST_STEP, **options, **own}


def random_adapter(case: Case) -> Sequence[Defence]:
    """A random frozen adapter beside the one that trains, with the norms of the run's own: a control."""
    return [InoculationAdapter(case.run, random=int(case.run.manifest["seed"]))]


def finished(folder: Path) -> bool:
    """Whether the folder holds a run that was trained to its end."""
    return (folder / "run.json").is_file() and load_run(folder).manifest.get("status") == "complete"
