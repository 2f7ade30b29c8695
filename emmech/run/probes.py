"""What a Run knows of the residual stream: means over probe texts, by layer and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from emmech.errors import EmmechError, closest
from emmech.store import MemorySeries, Series

__all__ = ["Probes"]


class Probes(Mapping[str, Float[np.ndarray, "steps layers d_model"]]):
    """Mean residual of every block's output over named groups of probe texts.

    ``probes.steps`` are the steps at which they were measured, which may be fewer than the run's.
    """

    def __init__(self, series: Series | MemorySeries) -> None:
        self._series = series

    @property
    def steps(self) -> Int[np.ndarray, " steps"]:
        """Steps at which the probes were measured."""
        return self._series.steps

    def __getitem__(self, name: str) -> Float[np.ndarray, "steps layers d_model"]:
        if name not in self._series.keys:
            raise EmmechError(
                f"read the probe {name!r}",
                f"probe {name!r}",
                "the run did not record it",
                closest(name, self._series.keys),
            )
        return self._series.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._series.keys)

    def __len__(self) -> int:
        return len(self._series.keys)

    def __repr__(self) -> str:
        return f"Probes({', '.join(self) or 'none'}; steps={len(self.steps)})"
