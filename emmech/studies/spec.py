"""What a study consists of: every combination of its settings as a run, with the sweep and the evaluation of each."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from emmech.errors import EmmechError, as_int, as_ints, one_of, refusal
from emmech.evaluation.judges import Judge
from emmech.run.identity import identity

_ASKED = "read the study"
Kind = Literal["train", "sweep", "evaluate"]


@dataclass(frozen=True)
class Piece:
    """One piece of work: a fine-tune, or the sweep or evaluation of one.

    Args:
        kind: what is done.
        setting: model, data, layers, rank and seed of the run, and what its data and model's files hold.
        options: further arguments of the function that does it.
        needs: the digest of the fine-tune that comes first, "" for a fine-tune.

    Example:
        >>> one, same = (Piece("train", {"seed": 0}, {"max_steps": 5}) for _ in range(2))
        >>> one.digest == same.digest, one.digest == Piece("train", {"seed": 1}, {"max_steps": 5}).digest
        (True, False)
    """

    kind: Kind
    setting: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""

    @cached_property
    def digest(self) -> str:
        """What identifies the work: a sha256 of everything that determines its result."""
        content = [self.kind, dict(self.setting), dict(self.options), self.needs]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=_told).encode()).hexdigest()

    def folder(self, out: Path) -> Path:
        """Where its result is kept, inside the study's folder."""
        return out / self.kind / self.digest[:16]


def _told(value: Any) -> Any:
    """What tells an argument that is no plain value from another; a judge without an identity is known by its name."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Judge) and not hasattr(value, "identity"):
        return type(value).__name__, value.name
    return identity(value)


@dataclass(frozen=True)
class StudySpec:
    """A study as its file describes it; all combinations of the lists are made.

    Args:
        models: names or folders of models.
        data: names or files of chat data.
        layers: where the adapters are: None for the recipe's own layers, or lists of layers.
        ranks: ranks of the adapters; None is the recipe's own.
        seeds: seeds of the fine-tunes.
        recipe: as in :func:`emmech.finetune`.
        train: further arguments of :func:`emmech.finetune`.
        sweep: arguments of :func:`emmech.sweep`, or None for no sweeps.
        evaluate: arguments of :func:`emmech.evaluate`, or None for no evaluations.

    Example:
        >>> spec = StudySpec(("pocket",), ("medical", "good-medical"), seeds=(0, 1), sweep={"scales": [1, 5]})
        >>> [piece.kind for piece in spec.pieces()].count("train"), len(spec.pieces())
        (4, 8)
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    layers: tuple[tuple[int, ...] | None, ...] = (None,)
    ranks: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    recipe: str | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] | None = None
    evaluate: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a text where several are meant, which would be taken letter by letter."""
        for name in ("models", "data", "layers", "ranks", "seeds"):
            if isinstance(value := getattr(self, name), str):
                raise refusal(_ASKED, name, value, f"{name} are several, and this is one text", f"{name}=({value!r},)")

    @classmethod
    def read(cls, given: Any) -> Self:
        """A study from a YAML file, a mapping, or a :class:`StudySpec`.

        Paths of models and data in a file may be relative to the file.

        Raises:
            EmmechError: no such file, or an entry that a study does not have or that has another form.
        """
        if isinstance(given, cls):
            return given
        beside = None
        if isinstance(given, str | Path):
            given, beside = _yaml(Path(given)), Path(given).parent
        if not isinstance(given, Mapping):
            why = "a study is a YAML file or a mapping"
            raise EmmechError(_ASKED, f"a {type(given).__name__}", why, 'emmech.study("study.yaml")')
        names = [one.name for one in fields(cls)]
        for name in given:
            one_of(_ASKED, "entry", str(name), names, why="a study has no such entry")
        for name in ("models", "data"):
            if not given.get(name):
                raise EmmechError(_ASKED, f"entries {sorted(map(str, given))}", f"it names no {name}", f"{name}: [...]")
        found: dict[str, Any] = {name: _placed(_texts(name, given[name]), beside) for name in ("models", "data")}
        if "layers" in given:
            found["layers"] = tuple(one if one is None else tuple(as_ints(_ASKED, "layers", one))
                                    for one in _several(given["layers"]))  # fmt: skip
        if "ranks" in given:
            found["ranks"] = tuple(one if one is None else as_int(_ASKED, "ranks", one, least=0)
                                   for one in _several(given["ranks"]))  # fmt: skip
        if "seeds" in given:
            found["seeds"] = tuple(as_int(_ASKED, "seeds", one, least=0) for one in _several(given["seeds"]))
        for name in ("train", "sweep", "evaluate"):
            options = given.get(name)
            options = {} if options is True or (options is None and name in given) else options
            if options is not None and not isinstance(options, Mapping):
                raise refusal(_ASKED, name, options, f"{name} holds arguments by name", f"{name}: {{}}")
            if own := set(options or ()) & _TAKEN[name]:
                why = f"the study itself gives {', '.join(sorted(own))}"
                raise refusal(_ASKED, name, options, why, "the lists of the study, and out=")
            for option in options or ():
                one_of(
                    _ASKED,
                    f"{name} argument",
                    str(option),
                    _arguments(name),
                    why=f"emmech.{_DONE_BY[name]} has no such argument",
                )
            if options is not None:
                found[name] = dict(options)
        return cls(**found, recipe=given.get("recipe"))

    def pieces(self) -> list[Piece]:
        """All the work: the fine-tunes first, each combination once, and then their sweeps and evaluations."""
        trained: dict[str, Piece] = {}
        for model, data, layers, rank, seed in itertools.product(
            self.models, self.data, self.layers, self.ranks, self.seeds
        ):
            setting: dict[str, Any] = {"model": model, "data": data, "layers": layers and list(layers), "rank": rank}
            setting |= {"seed": seed, "recipe": self.recipe, "content": [_content(model), _content(data)]}
            piece = Piece("train", {**setting, **_named_files(self.train)}, self.train)
            trained[piece.digest] = piece
        kinds: tuple[tuple[Kind, Mapping[str, Any] | None], ...] = (("sweep", self.sweep), ("evaluate", self.evaluate))
        further = [
            Piece(kind, {**piece.setting, **_named_files(options)}, options, needs=digest)
            for digest, piece in trained.items()
            for kind, options in kinds
            if options is not None
        ]
        return [*trained.values(), *further]


# arguments that the study gives
_TAKEN = {
    "train": {"model", "data", "layers", "rank", "seed", "recipe", "out", "resume", "progress"},
    "sweep": {"run", "out", "progress"},
    "evaluate": {"model", "out", "progress", "steps", "scales"},
}
_DONE_BY = {"train": "finetune", "sweep": "sweep", "evaluate": "evaluate"}


def _arguments(kind: str) -> set[str]:
    """The names of the arguments that a study passes on."""
    import emmech
    from emmech.training.recipe import Recipe

    parameters = inspect.signature(getattr(emmech, _DONE_BY[kind])).parameters.values()
    own = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    return own | ({one.name for one in fields(Recipe)} if kind == "train" else set())


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EmmechError(_ASKED, path, f"it cannot be read ({error.strerror})", "the path of a YAML file")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EmmechError(_ASKED, path, f"it is no YAML: {str(error)[:200]}", "models: [pocket]")


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence | range) and not isinstance(value, str) else [value]


def _texts(name: str, value: Any) -> list[str]:
    several = _several(value)
    if not all(isinstance(one, str | Path) and str(one) for one in several):
        raise refusal(_ASKED, name, value, f"{name} are names or paths", f"{name}: [pocket]")
    return [str(one) for one in several]


def _placed(names: list[str], beside: Path | None) -> tuple[str, ...]:
    """Names as they are, and paths relative to the study's file as full paths."""
    return tuple(
        str((beside / one).resolve()) if beside is not None and one and (beside / one).exists() else one
        for one in names
    )  # fmt: skip


def _named_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the files hold that arguments name, if they name any."""
    found, left = {}, list(options.values())
    for value in left:  # which grows
        if isinstance(value, str) and (content := _content(value)):
            found[value] = content
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return {"files": found} if found else {}


_SAMPLES, _SAMPLE = 64, 65536  # of a file of weights, of which another checkpoint has as many bytes


def _content(name: str) -> str:
    """What a local file holds, or the files of a folder, large ones in samples; "" for anything else."""
    path = Path(name)
    try:
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else []
        found = [(one.name, one.stat().st_size, _file_content(one)) for one in files]
    except (OSError, ValueError):  # a name that is too long, or that may not be read: no file of the study's
        return ""
    return hashlib.sha256(repr(found).encode()).hexdigest() if path.is_dir() else ""


def _file_content(path: Path) -> str:
    """The hash of a file, or of evenly spaced parts of it, the first and the last among them."""
    content, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE:
            content.update(file.read())
        else:
            for part in range(_SAMPLES):
                file.seek((size - _SAMPLE) * part // (_SAMPLES - 1))
                content.update(file.read(_SAMPLE))
    return content.hexdigest()
