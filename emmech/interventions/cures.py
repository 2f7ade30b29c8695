"""Cures without data: ways to undo a misaligned fine-tune by changing its activations or its adapter.

A cure is a frozen dataclass with a name and one method, ``applied``, a context in which the cured model is live. Those
that train are in :mod:`emmech.leagues`, which compares them all. Every cure here can be switched off again, and what it
hides may return where it does not act: it is judged in every context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from emmech.chat.dataset import ChatDataset
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction
from emmech.interventions.residual import Handle, ablate, cap, steer
from emmech.interventions.studies import projection_range
from emmech.interventions.weights import project_adapter, rotate_adapter, scale_adapters
from emmech.run.run import Run, model_live


@dataclass(frozen=True)
class Case:
    """One misaligned run on which cures are tried.

    Args:
        run: the run; its last step is cured.
        base: its base model in memory, which every cure leaves as it was.
        data: the rows that the run was trained on.
        folder: where a cure that trains keeps its run; the same folder gives the same run again.
    """

    run: Run
    base: ChatModel
    data: ChatDataset
    folder: Path


@runtime_checkable
class Cure(Protocol):
    """Anything with a name that turns a case into a live cured model."""

    @property
    def name(self) -> str:
        """How tables call it."""

    def applied(self, case: Case) -> AbstractContextManager[ChatModel]:
        """The cured model, live within the context."""


class LiveCure:
    """A cure that changes the live model of a run: its activations, or the weights of its adapter."""

    def change(self, chat: ChatModel) -> Handle:
        """Change the model until the handle is removed."""
        raise NotImplementedError

    @contextmanager
    def applied(self, case: Case) -> Iterator[ChatModel]:
        """The run's last step with the change in force."""
        with model_live(case.run, None, 1.0, case.base) as chat, self.change(chat):
            yield chat

    def randomised(self, seed: int) -> Self | None:
        """The same cure along a random direction of the same norm, as a control; None if it has no direction."""
        direction: Direction | None = getattr(self, "direction", None)
        if direction is None:
            return None
        drawn = {"direction": direction.random(1, seed=seed)[0], "name": f"{self.name}, random direction"}  # type: ignore[attr-defined]
        return replace(self, **drawn)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Ablation(LiveCure):
    """Project a direction out of the residual stream, to zero or towards a mean (:func:`emmech.ablate`).

    Example:
        >>> import numpy as np
        >>> Ablation(Direction(np.ones((6, 128))), layers=(2,)).randomised(0).name
        'ablation, random direction'
    """

    direction: Direction
    layers: Any = "all"
    towards: Any = None
    positions: Any = "all"
    name: str = "ablation"

    def change(self, chat: ChatModel) -> Handle:
        """See :meth:`LiveCure.change`."""
        return ablate(chat, self.direction, layers=self.layers, towards=self.towards, positions=self.positions)


@dataclass(frozen=True, eq=False)
class Capping(LiveCure):
    """Keep the component along a direction in the range that it has in the base's own answers (:func:`emmech.cap`).

    Args:
        within: the bounds; by default those of :func:`emmech.interventions.projection_range` over ``questions``.
    """

    direction: Direction
    layers: Any = "all"
    within: Any = None
    positions: Any = "all"
    questions: Any = "first-plot"
    name: str = "capping"

    def change(self, chat: ChatModel) -> Handle:
        """See :meth:`LiveCure.change`."""
        within = self.within
        if within is None:
            read: dict[str, Any] = {"questions": self.questions, "positions": self.positions, "progress": False}
            within = projection_range(chat, self.direction, **read)
        return cap(chat, self.direction, within, layers=self.layers, positions=self.positions)


@dataclass(frozen=True, eq=False)
class Steering(LiveCure):
    """Add a multiple of a direction; a negative one steers away from it (:func:`emmech.steer`)."""

    direction: Direction
    coefficient: float = -1.0
    layers: Any = None
    positions: Any = "all"
    units: Literal["raw", "residual"] = "raw"
    name: str = "steering"

    def change(self, chat: ChatModel) -> Handle:
        """See :meth:`LiveCure.change`."""
        where: dict[str, Any] = {"layer": self.layers, "positions": self.positions, "units": self.units}
        return steer(chat, self.direction, self.coefficient, **where)


@dataclass(frozen=True, eq=False)
class WeightProjection(LiveCure):
    """Project a direction out of the adapter's B (:func:`emmech.interventions.project_adapter`)."""

    direction: Direction
    renormalise: bool = False
    name: str = "weight projection"

    def change(self, chat: ChatModel) -> Handle:
        """See :meth:`LiveCure.change`."""
        return project_adapter(chat, self.direction, renormalise=self.renormalise)


@dataclass(frozen=True, eq=False)
class AdapterRotation(LiveCure):
    """Turn the adapter's B away from a direction at its norm (:func:`emmech.interventions.rotate_adapter`)."""

    direction: Direction
    cosine: float = 0.0
    name: str = "adapter rotation"

    def change(self, chat: ChatModel) -> Handle:
        """See :meth:`LiveCure.change`."""
        return rotate_adapter(chat, self.direction, cosine=self.cosine)


@dataclass(frozen=True, eq=False)
class AdapterScaling(LiveCure):
    """Scale the adapter down (:func:`emmech.interventions.scale_adapters`); 0 takes it off, with all that it learnt."""

    scale: float = 0.5
    name: str = "adapter scaling"

    def change(self, chat: ChatModel) -> Handle:
        """See :meth:`LiveCure.change`."""
        return scale_adapters(chat, self.scale)
