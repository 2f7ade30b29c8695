"""A direction in the residual stream, as a value: one vector per layer, in raw units, with its origin and quality.

emmech writes one safetensors file, with name, source and quality as JSON in its metadata. repeng writes one tensor
``direction.<layer>`` per layer, where layer ``l`` is the output of block ``l`` (as ``hidden_states[l + 1]``), and
llama.cpp reads the same file. steering-vectors keeps ``layer_activations``, a mapping from layer to vector for
``layer_type="decoder_block"``, which is the block's output too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from einops import einsum
from jaxtyping import Float

from emmech.errors import EmmechError, as_floats, as_int, refusal
from emmech.results import Card, Result
from emmech.store import kept, save_tensors, write_bytes
from emmech.view.plots import by_layer
from emmech.view.sketch import curves

if TYPE_CHECKING:
    import pandas as pd

    from emmech.chat.model import ChatModel

_ARRAYS = ("split_half", "split_half_shuffled", "norm_over_shuffled", "agreement", "lexical_share")
FORMAT = "emmech-direction-1"
_REPENG = "direction."
_LAYERS_KEY = "emmech.layer_count"
_ON_HUB = "direction.safetensors"


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows ``[..., d_model]`` to norm 1; rows of zeros stay zero."""
    wide = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)


def _checked_array(value: Any, what: str) -> np.ndarray:
    """A copy of an array or tensor of numbers as finite float32, read-only."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        why, instead = "it is not an array of numbers", "an array or tensor [layers, d_model]"
        raise EmmechError("make a Direction", f"{what}: {type(value).__name__}", why, instead)
    if bad := np.argwhere(~np.isfinite(array)).tolist():
        given = f"{what} with {len(bad)} values that are not finite, first at {bad[0]}"
        why = "NaN or infinity in a direction poisons every activation it touches"
        raise EmmechError("make a Direction", given, why, "look for an empty group, or an overflow in float16")
    array.setflags(write=False)
    return array


def _checked_matrix(value: Any, what: str) -> np.ndarray:
    """The same as ``[layers, d_model]``."""
    array = _checked_array(value, what)
    if array.ndim != 2 or 0 in array.shape:
        why = "a direction has one row per layer: [layers, d_model]"
        instead = "Direction.single(vector, layer, n_layers) for one vector" if array.ndim == 1 else None
        raise EmmechError("make a Direction", f"{what} of shape {list(array.shape)}", why, instead)
    return array


@dataclass(frozen=True, repr=False)
class Quality:
    """Measures of one extracted direction. All arrays are by layer.

    Args:
        split_half: ``[layers]`` mean cosine between the directions of two random halves of the answers.
            High means stable. It is of half the data: the whole direction is more stable still.
        split_half_shuffled: ``[layers]`` the same with the class labels shuffled: what noise gives.
        norm_over_shuffled: ``[layers]`` the direction's norm over that of shuffled labels. 1 means nothing was found.
        random_floor: 1/sqrt(d_model), the standard deviation of the cosine of random vectors.
        agreement: ``[layers, layers]`` cosine between the rows of different layers.
        lexical_share: ``[layers]`` share of the direction that comes from the two classes using different words
            (composition), rather than from the same words having different residuals. 1: all of it is vocabulary.
        bag_of_words_auc: how well word counts alone tell the classes apart, cross-validated by question.
        promotes, suppresses: tokens that the direction pushes up and down through the unembedding, at ``read_layer``.
        answers: number of answers by class. tokens: number of answer tokens by class.
        notes: caveats (length confound, few answers, ...).
    """

    split_half: Float[np.ndarray, " layers"]
    split_half_shuffled: Float[np.ndarray, " layers"]
    norm_over_shuffled: Float[np.ndarray, " layers"]
    random_floor: float
    agreement: Float[np.ndarray, "layers layers"]
    lexical_share: Float[np.ndarray, " layers"]
    bag_of_words_auc: float
    promotes: tuple[str, ...]
    suppresses: tuple[str, ...]
    read_layer: int
    answers: Mapping[str, int]
    tokens: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def noise(self) -> tuple[int, ...]:
        """Layers at which halves of the answers agree no better than with shuffled labels, to two random floors."""
        return tuple(np.flatnonzero(self.split_half < self.split_half_shuffled + 2 * self.random_floor).tolist())

    def facts(self, layers: Sequence[int] | None = None) -> tuple[tuple[str, str], ...]:
        """Each measure in words, with its name; where the direction is known at some layers only, of those."""
        layer = self.read_layer
        halves = self.split_half if layers is None else self.split_half[list(layers)]
        counts = [f"{n} {name} answers ({self.tokens.get(name, 0)} tokens)" for name, n in self.answers.items()]
        neighbours = np.nanmean(np.diagonal(self.agreement, 1)) if len(self.agreement) > 1 else 1.0
        over = f"over layers {np.nanmin(halves):.2f} to {np.nanmax(halves):.2f}"
        return (
            ("made from", ", ".join(counts)),
            ("split-half", f"{self.split_half[layer]:.3f} at layer {layer}, {over}; random {self.random_floor:.3f}"),
            ("norm", f"{self.norm_over_shuffled[layer]:.1f} times that of shuffled labels"),
            ("lexical share", f"{self.lexical_share[layer]:.2f}; word counts have AUC {self.bag_of_words_auc:.2f}"),
            ("layers agree", f"{neighbours:.2f}, the mean cosine of neighbouring layers"),
            ("promotes", " ".join(map(repr, self.promotes[:8]))),
            ("suppresses", " ".join(map(repr, self.suppresses[:8]))),
        )

    def __repr__(self) -> str:
        return "\n".join(f"  {name:<16} {text}" for name, text in (*self.facts(), *(("note", n) for n in self.notes)))


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Result):
    """One vector per layer of the residual stream: row ``l`` is in the output of block ``l``.

    The vectors keep their norm (a mean difference of 0.7 stays 0.7), so that a steering coefficient of 1 means
    the difference that was measured. A row of zeros means that nothing is known at that layer. The value never
    changes: every operation returns a new one.

    Args:
        vectors: ``[layers, d_model]``, array or tensor.
        name: shown in tables and legends.
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
        Direction 'toy': how stable it is was not measured
          vectors  layers=2, d_model=2, norms 5 to 2
          Next: direction.plot()
        >>> (d - d / 2).norms.tolist(), d.cosine(2 * d).tolist()
        ([2.5, 1.0], [1.0, 1.0])
    """

    vectors: Float[np.ndarray, "layers d_model"]
    name: str = "direction"
    source: Mapping[str, Any] = field(default_factory=dict)
    aligned_mean: Float[np.ndarray, "layers d_model"] | None = None
    quality: Quality | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", _checked_matrix(self.vectors, "vectors"))
        if self.aligned_mean is not None:
            mean = _checked_matrix(self.aligned_mean, "aligned_mean")
            if mean.shape != self.vectors.shape:
                given = f"aligned_mean {list(mean.shape)}, vectors {list(self.vectors.shape)}"
                why = "both have one row per layer and one column per residual dimension"
                raise EmmechError("make a Direction", given, why, "leave aligned_mean out")
            object.__setattr__(self, "aligned_mean", mean)
        object.__setattr__(self, "source", dict(self.source))

    @classmethod
    def single(cls, vector: Float[np.ndarray, " d_model"], layer: int, n_layers: int, **kwargs: Any) -> Direction:
        """A direction known at one layer only; the other rows are zero.

        Example:
            >>> Direction.single([0.0, 1.0], layer=2, n_layers=4).layers
            (2,)
        """
        row = _checked_array(vector, "vector")
        if row.ndim != 1 or not 0 <= layer < n_layers:
            given = f"vector {list(row.shape)}, layer={layer}, n_layers={n_layers}"
            why = "it takes one vector [d_model] and a layer from 0 to n_layers - 1"
            raise EmmechError("make a Direction at one layer", given, why, "Direction(vectors) for several layers")
        vectors = np.zeros((n_layers, row.size), dtype=np.float32)
        vectors[layer] = row
        return cls(vectors, **kwargs)

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
        asked = f"read {self.name} at a layer"
        if not isinstance(layer, int | np.integer) or not 0 <= layer < self.n_layers:
            why = f"it has {self.n_layers} layers, numbered 0 to {self.n_layers - 1}"
            raise refusal(asked, "layer", layer, why, f"one of {_listed(self.layers)}")
        if not self.vectors[layer].any():
            instead = (
                f"{'one of ' * (len(self.layers) > 1)}{_listed(self.layers)}" if self.layers else "another direction"
            )
            raise refusal(asked, "layer", layer, "it is zero there: nothing was extracted at that layer", instead)
        return self.vectors[layer]

    def unit(self) -> Direction:
        """Every known row scaled to norm 1.

        Raises:
            EmmechError: it is zero at all layers.
        """
        if not self.layers:
            why, instead = "zero points nowhere", "a direction from two different groups"
            raise EmmechError(f"normalise {self.name}", "a direction of norm 0", why, instead)
        return self._with(unit_rows(self.vectors), f"unit({self.name})", quality=self.quality)

    def cosine(self, other: Direction) -> Float[np.ndarray, " layers"]:
        """Cosine by layer; NaN where either is zero. Two random ones have 0 +- 1/sqrt(d_model).

        Raises:
            EmmechError: the shapes differ.
        """
        self._check_same(other, "compare")
        with np.errstate(invalid="ignore", divide="ignore"):
            wide = self.vectors.astype(np.float64), other.vectors.astype(np.float64)
            inner = einsum(*wide, "layer d, layer d -> layer")
            return np.clip(inner / (self.norms * other.norms), -1.0, 1.0)

    def orthogonal_to(self, other: Direction) -> Direction:
        """The direction without its projection on ``other``, layer by layer."""
        self._check_same(other, "project")
        unit = unit_rows(other.vectors)
        inner = einsum(self.vectors, unit, "layer d, layer d -> layer")
        return self._with(self.vectors - inner[:, None] * unit, f"{self.name} without {other.name}")

    def random(self, n: int = 5, *, seed: int = 0) -> tuple[Direction, ...]:
        """Random directions with the same norm at every layer: the control of every intervention.

        Gaussian vectors are normalised before they get the norm (without that they are sqrt(d_model) too long).
        """
        n = as_int("draw random directions", "n", n, least=0)
        seed = as_int("draw random directions", "seed", seed, least=0)
        draws = np.random.default_rng(seed).standard_normal((n, *self.vectors.shape))
        source = {"method": "random, norm-matched", "matched_to": self.name, "seed": seed}
        source |= {"fingerprints": list(self.fingerprints)} if self.fingerprints else {}
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
        factors = np.array(as_floats(f"scale {self.name}", "factors", factor))
        if len(factors) not in (1, self.n_layers):
            why = "a direction is scaled by a number or by one number per layer"
            raise refusal(f"scale {self.name}", "factor", factor, why, f"a float, or an array [{self.n_layers}]")
        label = f"{factors[0]:g} {self.name}" if len(factors) == 1 else f"scaled {self.name}"
        quality = self.quality if np.all(factors > 0) else None  # the same directions
        return self._with(self.vectors * factors[:, None], label, quality=quality)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if np.any(np.asarray(divisor) == 0):
            raise EmmechError(f"divide {self.name}", "0", "it would be infinite")
        return self._with((self * (1.0 / np.asarray(divisor))).vectors, f"{self.name} / {divisor}")

    def __neg__(self) -> Direction:
        return self._with(-self.vectors, f"-{self.name}")

    def _with(
        self, vectors: np.ndarray, name: str, other: Direction | None = None, quality: Quality | None = None
    ) -> Direction:
        prints = [p for p in self.fingerprints if other is None or p in other.fingerprints]
        source = {"method": "algebra", "of": name, **({"fingerprints": prints} if prints else {})}
        return Direction(vectors, name, source, self.aligned_mean, quality)

    def _check_same(self, other: Direction, verb: str) -> None:
        asked = f"{verb} two directions"
        if not isinstance(other, Direction) or other.vectors.shape != self.vectors.shape:
            given = f"{list(other.vectors.shape)}" if isinstance(other, Direction) else type(other).__name__
            why, instead = "both must be Directions over the same layers and width", "directions of the same base model"
            raise EmmechError(asked, f"{list(self.vectors.shape)} and {given}", why, instead)
        if self.fingerprints and other.fingerprints and not set(self.fingerprints) & set(other.fingerprints):
            why = "they come from different base models, whose residual streams share no axes"
            instead = "Direction(vectors) without source, to drop the provenance knowingly"
            raise EmmechError(asked, f"{self.name} and {other.name}", why, instead)

    def warn_where_noise(self, layers: Iterable[int] | None = None) -> None:
        """Warn of those of some layers (all by default) at which its quality says that it is noise."""
        known = set(self.layers if layers is None else layers)
        if self.quality is None or not (noise := sorted(known & set(self.quality.noise))):
            return
        halves, shuffled = self.quality.split_half[noise[0]], self.quality.split_half_shuffled[noise[0]]
        what = f"{self.name} is noise at {_listed(noise)}: its halves have cosine {halves:.2f} at layer {noise[0]}"
        instead = "What it does there says nothing of misalignment: take more answers, or other layers."
        warnings.warn(f"{what}, and {shuffled:.2f} with shuffled labels. {instead}", stacklevel=3)

    def check_fits(self, chat: ChatModel, *, force: bool = False) -> None:
        """Refuse a model of other shape, or another base model than the direction's.

        Args:
            force: accept another base model of the same shape.

        Raises:
            EmmechError: width, layers or fingerprint differ.
        """
        asked = f"use {self.name} on {chat.name}"
        if (self.n_layers, self.d_model) != (chat.n_layers, chat.d_model):
            given = f"direction [{self.n_layers}, {self.d_model}] on a model [{chat.n_layers}, {chat.d_model}]"
            why, instead = "layers or widths differ", "a direction extracted from this model"
            if self.d_model == chat.d_model and self.source.get("layers") == "unknown":
                why = "it was read from a run that does not say how many layers its model has"
                instead = "adapter_direction(run.model(step, base=model)), which knows"
            raise EmmechError(asked, given, why, instead)
        if not force and self.fingerprints and (fingerprint := chat.fingerprint()) not in self.fingerprints:
            made = ", ".join(known[:12] for known in self.fingerprints)
            given = f"a model with fingerprint {fingerprint[:12]}; the direction is of {made}"
            why = "a direction has no meaning in the residual stream of another base model"
            instead = (
                "force=True, or direction.at(layer) where there is no force=, if the weights differ for a reason you "
                "know (full fine-tuning, quantisation)"
            )
            raise EmmechError(asked, given, why, instead)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: vectors, aligned mean, quality, and the provenance in its metadata.

        A path that ends in ``.gguf`` gets a control vector (:func:`emmech.directions.to_repeng`), and one in ``.pt``
        the fields of a SteeringVector (:func:`emmech.directions.to_steering_vectors`); both hold the vectors alone.
        """
        if Path(path).suffix == ".gguf":
            return to_repeng(self, path)
        if Path(path).suffix in (".pt", ".pth"):
            return to_steering_vectors(self, path)
        tensors = {"vectors": self.vectors}
        metadata = {"format": FORMAT, "name": self.name, "source": json.dumps(self.source, default=str)}
        if self.aligned_mean is not None:
            tensors["aligned_mean"] = self.aligned_mean
        if self.quality is not None:
            tensors |= {f"quality/{key}": np.asarray(getattr(self.quality, key), np.float64) for key in _ARRAYS}
            metadata["quality"] = json.dumps({k: v for k, v in asdict(self.quality).items() if k not in _ARRAYS})
        path = Path(path)
        whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_tensors(whole, path, f"save the direction {self.name}", metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a direction: emmech's own file, a repeng GGUF, a steering-vectors file, or ``hub:owner/name``.

        Raises:
            EmmechError: no such file, damaged, or of another kind; or the hub does not give it.
        """
        if isinstance(path, str) and path.startswith("hub:"):
            from huggingface_hub import hf_hub_download

            repo = path.removeprefix("hub:")
            try:
                path = hf_hub_download(repo, _ON_HUB)
            except Exception as error:  # offline, no such repository, a malformed name: each has a type of its own
                instead = "owner/name of a repository that Direction.push_to_hub made"
                raise EmmechError("fetch the direction from the hub", repo, _first_line(error), instead)
        path, asked = Path(path), "read the direction"
        if not path.is_file():
            raise EmmechError(asked, path, "there is no such file")
        if path.suffix == ".gguf":
            return cls(**vars(from_repeng(path)))
        if path.suffix in (".pt", ".pth"):
            return cls(**vars(from_steering_vectors(path)))
        from safetensors import safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:  # safetensors has its own error type, and a torn file another
            raise EmmechError(asked, path, f"{error}")
        if (kind := metadata.get("format")) != FORMAT:
            why, instead = "it was not written by Direction.save", "Direction(vectors) from its arrays"
            raise EmmechError(asked, f"{path} with format {kind!r}", why, instead)
        quality = None
        try:
            if "quality" in metadata:
                rest = json.loads(metadata["quality"])
                rest |= {key: tuple(rest[key]) for key in ("promotes", "suppresses", "notes")}
                quality = Quality(**{key: tensors[f"quality/{key}"] for key in _ARRAYS}, **rest)
            source = json.loads(metadata["source"])
            return cls(tensors["vectors"], metadata["name"], source, tensors.get("aligned_mean"), quality)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise EmmechError(asked, path, f"it is damaged: {error!r:.200}", "a copy of the file")

    def push_to_hub(self, repo: str, *, private: bool = True) -> str:
        """Upload as ``direction.safetensors``; :meth:`load` reads it back from ``hub:owner/name``.

        Raises:
            EmmechError: the hub cannot be reached, or refuses.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                file = self.save(Path(folder) / _ON_HUB)
                return str(api.upload_file(repo_id=repo, path_or_fileobj=str(file), path_in_repo=_ON_HUB))
        except Exception as error:  # offline, no key, no such owner: each has a type of its own
            instead = "Direction.save(path) keeps it on disk"
            raise EmmechError("push the direction to the hub", repo, _first_line(error), instead)

    def renamed(self, name: str) -> Direction:
        """The same direction under another name."""
        return replace(self, name=name)

    def to_frame(self) -> pd.DataFrame:
        """Norm, and quality where known, by layer."""
        import pandas as pd

        columns: dict[str, Any] = {"norm": self.norms}
        if self.quality is not None:
            columns |= {key: getattr(self.quality, key) for key in _ARRAYS if key != "agreement"}
        return pd.DataFrame(columns, index=pd.RangeIndex(self.n_layers, name="layer"))

    def plot(self) -> Any:
        """Norm by layer, with the quality measures where known; returns a plotly figure."""
        return by_layer(self.to_frame(), None if self.quality is None else self.quality.random_floor, self.name)

    def _card(self) -> Card:
        norms = self.norms[list(self.layers)] if self.layers else np.zeros(1)
        span = f"norm {norms[0]:.3g}" if len(norms) == 1 else f"norms {norms[0]:.3g} to {norms[-1]:.3g}"
        where = f", known at {_listed(self.layers)}" if 0 < len(self.layers) < self.n_layers else ""
        vectors = ("vectors", f"layers={self.n_layers}, d_model={self.d_model}, {span}{where}")
        if (quality := self.quality) is None:
            method = self.source.get("method")
            made = f" ({method})" if method else ""
            headline = f"Direction {self.name!r}{made}: how stable it is was not measured"
            return Card(headline, (vectors,), then="direction.plot()")
        layer, noise = quality.read_layer, sorted(set(self.layers) & set(quality.noise))
        shuffled = round(float(quality.split_half_shuffled[layer]), 2) + 0.0  # never -0.00
        halves = f"cosine {quality.split_half[layer]:.2f} at layer {layer}, {shuffled:.2f} with shuffled labels"
        claim = "is noise" if layer in quality.noise else "is stable"
        said = f"Direction {self.name!r} {claim}: two halves of the answers give directions of {halves}"
        if not np.isfinite(quality.split_half[layer]):
            said = f"Direction {self.name!r}: how stable it is was not measured"
        caveats = list(quality.notes)
        if noise and layer not in noise:
            caveats.insert(0, f"it is noise at {_listed(noise)}")
        if quality.lexical_share[layer] > 0.5:
            caveats.insert(0, "most of it is vocabulary: the two kinds of answers use different words")
        caveats.append("a stable direction need not be a cause: compare steering with it to random directions")
        return Card(
            said, (*quality.facts(self.layers or None), vectors), "; ".join(caveats), self._dose_response(layer)
        )

    def _dose_response(self, layer: int) -> str:
        """The call that steers the base model with it, where it was extracted, in units that break no answer."""
        model, tokens = (self.source.get(name) for name in ("model", "tokens"))
        base = f"emmech.load_model({model!r})" if isinstance(model, str) and model else "base"
        named = {None: "", "all": "", "answer": ", positions='answer'", "prompt": ", positions='prompt'"}
        how = f'layers={layer}{named.get(tokens, ", positions=phrase")}, units="residual"'
        return f"emmech.interventions.dose_response({base}, direction, [0.5, 1], {how})"

    def _sketch(self) -> str:
        layers, quality = range(self.n_layers), self.quality
        if quality is None:
            return curves([("", layers, self.norms)], "Norm by layer", axis="layer")
        lines = [("halves", layers, quality.split_half), ("shuffled", layers, quality.split_half_shuffled),
                 ("lexical share", layers, quality.lexical_share)]  # fmt: skip
        return curves(lines, "Cosine of two halves by layer", axis="layer")


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return f"layer{'s'[: len(layers) != 1]} {shown}" + (f" ... {layers[-1]}" if len(layers) > 6 else "")


def checked_direction(asked: str, given: Any, *, name: str = "direction") -> Direction:
    """One Direction; anything else is refused."""
    if isinstance(given, Direction):
        return given
    instead = "emmech.misalignment_direction(run), or Direction(vectors) of an array [layers, d_model]"
    raise refusal(asked, name, given, "it is not a Direction", instead)


def checked_directions(asked: str, name: str, given: Any) -> Mapping[str, Direction]:
    """Directions by name; anything else is refused.

    Example:
        >>> list(checked_directions("compare", "directions", {"toy": Direction.single([1.0], layer=0, n_layers=1)}))
        ['toy']
    """
    if isinstance(given, Mapping):
        return {key: checked_direction(asked, one, name=f"{name}[{key!r}]") for key, one in given.items()}
    instead = f'{name}={{"mine": emmech.misalignment_direction(run)}}'
    raise refusal(asked, name, given, "it is not a mapping from names to Directions", instead)


def to_repeng(direction: Direction, path: str | Path, *, model_type: str = "llama") -> Path:
    """Write a control vector as repeng and llama.cpp read it; layers of norm zero are left out.

    ``direction.<layer>`` is added to the output of that block by both. llama.cpp refuses a file with a vector for layer
    0, which repeng takes: a warning says so. Number of layers, name and provenance are under keys that both pass over.

    Args:
        model_type: the architecture's name in GGUF (``"qwen2"``, ``"llama"``, ...).

    Raises:
        EmmechError: the direction is zero at all layers.
    """
    import gguf

    if not direction.layers:
        asked, why = f"write {direction.name} as a control vector", "it is zero at all layers: no vector would be in it"
        raise EmmechError(asked, path, why, "a direction that is known at some layer")
    if 0 in direction.layers:
        what = "llama.cpp refuses a control vector with layer 0, though repeng reads it."
        warnings.warn(f"{what} For llama.cpp set vectors[0] to zero before writing {path}.", stacklevel=2)
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(partial, "controlvector")
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", len(direction.layers))
    writer.add_uint32(_LAYERS_KEY, direction.n_layers)
    writer.add_string("emmech.name", direction.name)
    writer.add_string("emmech.source", json.dumps(direction.source, default=str))
    for layer in direction.layers:
        writer.add_tensor(f"{_REPENG}{layer}", np.ascontiguousarray(direction.vectors[layer]))
    with kept(f"save the direction {direction.name}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    return path


def from_repeng(path: str | Path, *, n_layers: int | None = None, model: ChatModel | None = None) -> Direction:
    """Read a repeng or llama.cpp control vector.

    Args:
        n_layers: layers of the model, which only a file of :func:`to_repeng` says; by default one more than the last
            in the file.
        model: the model it is for, instead: another width or architecture, or fewer layers, are refused.

    Raises:
        EmmechError: not a control vector, or of another model.
    """
    import gguf

    path, asked = Path(path), "read the control vector"
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = [one for one in reader.tensors if one.name.startswith(_REPENG)]
        kinds = {one.tensor_type.name for one in tensors} - {"F32", "F16"}
        found = {int(one.name.removeprefix(_REPENG)): np.array(one.data, dtype=np.float32) for one in tensors}
    except (ValueError, OSError, IndexError) as error:
        raise EmmechError(asked, path, f"{error}")
    if kinds:
        why = "only F32 and F16 are read, and llama.cpp takes F32 alone"
        raise EmmechError(asked, f"{path} with tensors of type {', '.join(sorted(kinds))}", why, "a file in F32")
    hint, kind = fields.get("controlvector.model_hint"), model and str(getattr(model.config, "model_type", ""))
    ours = "emmech.source" in fields  # which has the model's fingerprint
    if hint and kind and not ours and not (kind.startswith(hint) or hint.startswith(kind)):
        given, why = f"{path} for {hint!r}, and {model!r} of type {kind!r}", "it is for another architecture"
        raise EmmechError(asked, given, why, "model=None, where you know the two names to mean the same")
    told = fields.get(_LAYERS_KEY) if n_layers is None and model is None else None
    direction = _imported(found, n_layers if told is None else int(told), path, "repeng", model)
    if not ours:
        return direction
    try:
        source = json.loads(fields["emmech.source"])
        direction = replace(direction, name=str(fields["emmech.name"]), source=source)
    except (ValueError, TypeError, LookupError) as error:
        raise EmmechError(asked, path, f"it is damaged: {error!r:.200}", "a copy of the file")
    if model is not None:
        direction.check_fits(model)
    return direction


def to_steering_vectors(direction: Direction, path: str | Path) -> Path:
    """Write the fields of a steering-vectors ``SteeringVector``: ``SteeringVector(**torch.load(path))`` makes one."""
    import io

    import torch

    activations = {layer: torch.from_numpy(direction.vectors[layer].copy()) for layer in direction.layers}
    content = io.BytesIO()  # torch reports a disk that fails in many ways
    torch.save({"layer_activations": activations, "layer_type": "decoder_block"}, content)
    write_bytes(Path(path), content.getvalue())
    return Path(path)


def from_steering_vectors(given: Any, *, n_layers: int | None = None, model: ChatModel | None = None) -> Direction:
    """Read a ``SteeringVector``, or a file of its fields or of a mapping from layer to vector.

    Args:
        given: the vector itself, or a path, from which only tensors are unpickled.
        n_layers, model: as in :func:`from_repeng`.

    Raises:
        EmmechError: not such a file, of another layer type than the block's output, or of another model.
    """
    import torch

    asked, path = "read the steering vector", Path("steering vector")
    if hasattr(given, "layer_activations"):
        content: Any = {"layer_activations": given.layer_activations}
        content["layer_type"] = getattr(given, "layer_type", "decoder_block")
    else:
        path = Path(given)
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises several types for a file that is not its own
            instead = 'torch.save({"layer_activations": v.layer_activations, "layer_type": v.layer_type}, path)'
            raise EmmechError(asked, path, _first_line(error), instead)
    kind = content.get("layer_type", "decoder_block") if isinstance(content, Mapping) else None
    if kind != "decoder_block":
        what, why = f"{path} with layer_type {kind!r}", "only a block's output is the residual stream"
        raise EmmechError(asked, what, why, 'layer_type "decoder_block"')
    activations = content.get("layer_activations", content)
    try:
        found = {int(layer): value.detach().float().cpu().numpy() for layer, value in activations.items()}
    except (AttributeError, TypeError, ValueError):
        raise EmmechError(asked, path, "it does not hold a tensor for each layer", '{"layer_activations": {3: tensor}}')
    return _imported(found, n_layers, path, "steering-vectors", model)


def _imported(
    found: Mapping[int, np.ndarray], n_layers: int | None, path: Path, tool: str, model: ChatModel | None
) -> Direction:
    """The direction with these vectors by layer."""
    asked = f"read the {tool} file"
    if not found or {one.shape for one in found.values()} != {(found[min(found)].size,)} or min(found) < 0:
        raise EmmechError(asked, path, f"it holds no vectors{' of one width by layer' if found else ''}")
    last, width = max(found), found[max(found)].size
    if model is not None:
        n_layers = model.n_layers
        if width != model.d_model or last >= n_layers:
            given = f"{path} of width {width}, up to layer {last}, for {model!r}"
            why = f"the model's width is {model.d_model}, and its layers are 0 to {n_layers - 1}"
            raise EmmechError(asked, given, why, "the model that the vector was made of")
    if n_layers is not None and last >= n_layers:
        why = f"the file has a vector for layer {last}"
        raise refusal(asked, "n_layers", n_layers, why, f"n_layers={last + 1} or more")
    vectors = np.zeros((n_layers or last + 1, width), dtype=np.float32)
    vectors[list(found)] = list(found.values())
    return Direction(vectors, path.stem, {"method": f"imported from {tool}", "file": path.name})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
