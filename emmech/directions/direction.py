"""A direction in the residual stream, as a value: one vector per layer, in raw units, with where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float

from emmech.directions.arrays import checked_array, checked_matrix, unit_rows
from emmech.directions.files import fetch_file, push_file, read_file, write_own
from emmech.directions.quality import Quality
from emmech.errors import EmmechError, as_int
from emmech.results import Card, Result
from emmech.view.directions import by_layer

if TYPE_CHECKING:
    import pandas as pd

    from emmech.chat.model import ChatModel

__all__ = ["Direction", "checked_direction", "checked_directions"]


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Result):
    """One vector per layer of the residual stream: row ``l`` is in the output of block ``l``.

    The vectors keep their norm (a mean difference of 0.7 stays 0.7), so that a steering coefficient of 1 means
    the difference that was measured. A row of zeros means that nothing is known at that layer. The value never
    changes: every operation returns a new one.

    Args:
        vectors: ``[layers, d_model]``, array or tensor.
        name: for people, tables and legends.
        source: provenance, as JSON has it: method, model, dataset, counts, seed; ``"fingerprints"`` lists the models
            (:meth:`ChatModel.fingerprint`) in whose residual stream it lives.
        aligned_mean: ``[layers, d_model]``, the mean residual of aligned answers, for ablation towards it.
        quality: how sure one can be of it (:class:`Quality`), when it was extracted.

    Raises:
        EmmechError: not two-dimensional, not numbers, or not finite.

    Example:
        >>> import numpy as np
        >>> d = Direction(np.array([[3.0, 4.0], [0.0, 2.0]]), name="toy")
        >>> d
        Direction('toy', layers=2, d_model=2, norms 5 to 2)
        >>> (d - d / 2).norms.tolist(), d.cosine(2 * d).tolist()
        ([2.5, 1.0], [1.0, 1.0])
    """

    vectors: Float[np.ndarray, "layers d_model"]
    name: str = "direction"
    source: Mapping[str, Any] = field(default_factory=dict)
    aligned_mean: Float[np.ndarray, "layers d_model"] | None = None
    quality: Quality | None = None

    def __post_init__(self) -> None:
        vectors = checked_matrix(self.vectors, "vectors")
        object.__setattr__(self, "vectors", vectors)
        if self.aligned_mean is not None:
            mean = checked_matrix(self.aligned_mean, "aligned_mean")
            if mean.shape != vectors.shape:
                raise EmmechError(
                    "make a Direction",
                    f"aligned_mean {list(mean.shape)}, vectors {list(vectors.shape)}",
                    "both have one row per layer and one column per residual dimension",
                    "leave aligned_mean out",
                )
            object.__setattr__(self, "aligned_mean", mean)
        object.__setattr__(self, "source", dict(self.source))

    @classmethod
    def single(cls, vector: Float[np.ndarray, " d_model"], layer: int, n_layers: int, **kwargs: Any) -> Direction:
        """A direction known at one layer only; the other rows are zero.

        Example:
            >>> Direction.single([0.0, 1.0], layer=2, n_layers=4).layers
            (2,)
        """
        row = checked_array(vector, "vector")
        if row.ndim != 1 or not 0 <= layer < n_layers:
            raise EmmechError(
                "make a Direction at one layer",
                f"vector {list(row.shape)}, layer={layer}, n_layers={n_layers}",
                "it takes one vector [d_model] and a layer from 0 to n_layers - 1",
                "Direction(vectors) for one vector per layer",
            )
        vectors = np.zeros((n_layers, row.size), dtype=np.float32)
        vectors[layer] = row
        return cls(vectors, **kwargs)

    # what it is

    @property
    def n_layers(self) -> int:
        """Number of layers, known or not."""
        return int(self.vectors.shape[0])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.vectors.shape[1])

    @property
    def norms(self) -> Float[np.ndarray, " layers"]:
        """Euclidean norm by layer, in the residual stream's own units."""
        return np.linalg.norm(self.vectors.astype(np.float64), axis=1)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at which it is known (not zero)."""
        return tuple(np.flatnonzero(self.norms).tolist())

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Models in whose residual stream it lives; empty when unknown."""
        return tuple(self.source.get("fingerprints", ()))

    def at(self, layer: int) -> Float[np.ndarray, " d_model"]:
        """The vector at one layer.

        Raises:
            EmmechError: no such layer, or the direction is zero there.
        """
        if not isinstance(layer, int | np.integer) or not 0 <= layer < self.n_layers:
            raise EmmechError(
                f"read {self.name} at a layer",
                f"layer={layer!r}",
                f"it has {self.n_layers} layers, numbered 0 to {self.n_layers - 1}",
                f"one of {_listed(self.layers)}",
            )
        if not self.vectors[layer].any():
            raise EmmechError(
                f"read {self.name} at a layer",
                f"layer={layer}",
                "it is zero there: nothing was extracted at that layer",
                f"one of {_listed(self.layers)}" if self.layers else "another direction",
            )
        return self.vectors[layer]

    # algebra

    def unit(self) -> Direction:
        """Every known row scaled to norm 1.

        Raises:
            EmmechError: it is zero at all layers.
        """
        if not self.layers:
            given, why, instead = (
                "a direction of norm 0",
                "zero points nowhere",
                "a direction from two different groups",
            )
            raise EmmechError(f"normalise {self.name}", given, why, instead)
        return self._with(unit_rows(self.vectors), f"unit({self.name})")

    def cosine(self, other: Direction) -> Float[np.ndarray, " layers"]:
        """Cosine by layer; NaN where either is zero. Two random ones have 0 +- 1/sqrt(d_model).

        Raises:
            EmmechError: the shapes differ.
        """
        self._check_same(other, "compare")
        with np.errstate(invalid="ignore", divide="ignore"):
            inner = np.einsum("ld,ld->l", self.vectors.astype(np.float64), other.vectors.astype(np.float64))
            return np.clip(inner / (self.norms * other.norms), -1.0, 1.0)

    def orthogonal_to(self, other: Direction) -> Direction:
        """What is left after the projection on ``other`` is taken out at every layer."""
        self._check_same(other, "project")
        unit = unit_rows(other.vectors)
        inner = np.einsum("ld,ld->l", self.vectors, unit)
        return self._with(self.vectors - inner[:, None] * unit, f"{self.name} without {other.name}")

    def random(self, n: int = 5, *, seed: int = 0) -> tuple[Direction, ...]:
        """Random directions with the same norm at every layer: the control of every intervention.

        Gaussian vectors are normalised before they get the norm (without that they are sqrt(d_model) too long).
        """
        n = as_int("draw random directions", "n", n, least=0)
        seed = as_int("draw random directions", "seed", seed, least=0)
        draws = np.random.default_rng(seed).standard_normal((n, *self.vectors.shape))
        source = {"method": "random, norm-matched", "matched_to": self.name, "seed": seed}
        if self.fingerprints:
            source["fingerprints"] = list(self.fingerprints)
        return tuple(
            Direction(unit_rows(draw) * self.norms[:, None], f"random {index}", source, self.aligned_mean)
            for index, draw in enumerate(draws)
        )

    def __add__(self, other: Direction) -> Direction:
        self._check_same(other, "add")
        return self._with(self.vectors + other.vectors, f"({self.name} + {other.name})", other)

    def __sub__(self, other: Direction) -> Direction:
        self._check_same(other, "subtract")
        return self._with(self.vectors - other.vectors, f"({self.name} - {other.name})", other)

    def __mul__(self, factor: float | Float[np.ndarray, " layers"]) -> Direction:
        """Scale by a number, or by one number per layer."""
        try:
            factors = np.asarray(factor, dtype=np.float64)
        except (TypeError, ValueError):
            factors = np.empty((0, 0))
        if factors.shape not in ((), (self.n_layers,)):
            raise EmmechError(
                f"scale {self.name}",
                f"factor of shape {list(factors.shape)}" if factors.size else f"{factor!r}"[:120],
                "a direction is scaled by a number or by one number per layer",
                f"a float, or an array [{self.n_layers}]",
            )
        label = f"{float(factor):g} {self.name}" if factors.ndim == 0 else f"scaled {self.name}"
        return self._with(self.vectors * (factors[:, None] if factors.ndim else factors), label)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if np.any(np.asarray(divisor) == 0):
            raise EmmechError(f"divide {self.name}", "0", "it would be infinite")
        return self._with((self * (1.0 / np.asarray(divisor))).vectors, f"{self.name} / {divisor}")

    def __neg__(self) -> Direction:
        return self._with(-self.vectors, f"-{self.name}")

    def _with(self, vectors: np.ndarray, name: str, other: Direction | None = None) -> Direction:
        prints = [p for p in self.fingerprints if other is None or p in other.fingerprints]
        source: dict[str, Any] = {"method": "algebra", "of": name}
        if prints:
            source["fingerprints"] = prints
        return Direction(vectors, name, source, self.aligned_mean)

    def _check_same(self, other: Direction, verb: str) -> None:
        if not isinstance(other, Direction) or other.vectors.shape != self.vectors.shape:
            given = f"{list(other.vectors.shape)}" if isinstance(other, Direction) else type(other).__name__
            raise EmmechError(
                f"{verb} two directions",
                f"{list(self.vectors.shape)} and {given}",
                "both must be Directions over the same layers and width",
                "directions of the same base model",
            )
        if self.fingerprints and other.fingerprints and not set(self.fingerprints) & set(other.fingerprints):
            raise EmmechError(
                f"{verb} two directions",
                f"{self.name} and {other.name}",
                "they come from different base models, whose residual streams share no axes",
                "Direction(vectors) without source, to drop the provenance knowingly",
            )

    # where it fits

    def check_fits(self, chat: ChatModel, *, force: bool = False) -> None:
        """Refuse a model of other shape, or another base model than the direction's.

        Args:
            force: accept another base model of the same shape.

        Raises:
            EmmechError: width, layers or fingerprint differ.
        """
        if (self.n_layers, self.d_model) != (chat.n_layers, chat.d_model):
            raise EmmechError(
                f"use {self.name} on {chat.name}",
                f"direction [{self.n_layers}, {self.d_model}] on a model [{chat.n_layers}, {chat.d_model}]",
                "layers or widths differ",
                "a direction extracted from this model",
            )
        if force or not self.fingerprints:
            return
        fingerprint = chat.fingerprint()
        if fingerprint not in self.fingerprints:
            made = ", ".join(print_[:12] for print_ in self.fingerprints)
            raise EmmechError(
                f"use {self.name} on {chat.name}",
                f"a model with fingerprint {fingerprint[:12]}; the direction is of {made}",
                "a direction has no meaning in the residual stream of another base model",
                "force=True if the weights differ for a reason you know (full fine-tuning, quantisation)",
            )

    # on disk

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: vectors, aligned mean, quality, and the provenance in its metadata."""
        tensors = {"vectors": self.vectors}
        if self.aligned_mean is not None:
            tensors["aligned_mean"] = self.aligned_mean
        rest = None
        if self.quality is not None:
            arrays, rest = self.quality.pack()
            tensors |= {f"quality/{key}": value for key, value in arrays.items()}
        return write_own(path, tensors, self.name, self.source, rest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a direction: emmech's own file, a repeng GGUF, a steering-vectors file, or ``hub:owner/name``.

        Raises:
            EmmechError: no such file, damaged, or of another kind; or the hub does not give it.
        """
        if isinstance(path, str) and path.startswith("hub:"):
            path = fetch_file(path.removeprefix("hub:"))
        tensors, name, source, rest = read_file(Path(path))
        arrays = {key.removeprefix("quality/"): value for key, value in tensors.items() if key.startswith("quality/")}
        quality = None if rest is None else Quality.unpack(arrays, rest)
        return cls(tensors["vectors"], name, source, tensors.get("aligned_mean"), quality)

    def push_to_hub(self, repo: str, *, private: bool = True) -> str:
        """Upload as ``direction.safetensors``; :meth:`load` reads it back from ``hub:owner/name``.

        Raises:
            EmmechError: the hub cannot be reached, or refuses.
        """
        return push_file(self.save, repo, private=private)

    # for people

    def renamed(self, name: str) -> Direction:
        """The same direction under another name."""
        return replace(self, name=name)

    def to_frame(self) -> pd.DataFrame:
        """Norm, and quality where known, by layer."""
        import pandas as pd

        columns: dict[str, Any] = {"norm": self.norms}
        if self.quality is not None:
            columns |= self.quality.by_layer()
        return pd.DataFrame(columns, index=pd.RangeIndex(self.n_layers, name="layer"))

    def plot(self) -> Any:
        """Norm by layer, with the quality measures where known; returns a plotly figure."""
        return by_layer(self.to_frame(), None if self.quality is None else self.quality.random_floor, self.name)

    def _card(self) -> Card:
        norms = self.norms[list(self.layers)] if self.layers else np.zeros(1)
        span = f"norm {norms[0]:.3g}" if len(norms) == 1 else f"norms {norms[0]:.3g} to {norms[-1]:.3g}"
        where = f", known at {_listed(self.layers)}" if 0 < len(self.layers) < self.n_layers else ""
        first = f"Direction({self.name!r}, layers={self.n_layers}, d_model={self.d_model}, {span}{where})"
        return Card(first, "" if self.quality is None else str(self.quality))


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return f"layers {shown}" + (f" ... {layers[-1]}" if len(layers) > 6 else "")


def checked_direction(asked: str, given: Any, *, name: str = "direction") -> Direction:
    """One Direction.

    Raises:
        EmmechError: something else.
    """
    if isinstance(given, Direction):
        return given
    raise EmmechError(
        asked,
        f"{name}={given!r}"[:120],
        "it is not a Direction",
        "emmech.misalignment_direction(run), or Direction(vectors) of an array [layers, d_model]",
    )


def checked_directions(asked: str, name: str, given: Any) -> Mapping[str, Direction]:
    """Directions by name.

    Raises:
        EmmechError: no mapping, or something in it that is not a Direction.

    Example:
        >>> list(checked_directions("compare", "directions", {"toy": Direction.single([1.0], layer=0, n_layers=1)}))
        ['toy']
    """
    if isinstance(given, Mapping):
        return {key: checked_direction(asked, one, name=f"{name}[{key!r}]") for key, one in given.items()}
    raise EmmechError(
        asked,
        f"{name}={given!r}"[:120],
        "it is not a mapping from names to Directions",
        f'{name}={{"mine": emmech.misalignment_direction(run)}}',
    )
