"""Loaders by name: of models, data, question sets, judges and recipes, and of organisms with their own.

A package registers what it provides under a name, so that other code reaches a package on a higher floor without
importing it. An organism is a small model with data, questions and a judge of its own world; it registers itself
through the entry-point group ``emmech.organisms`` of any installed package::

    [project.entry-points."emmech.organisms"]
    toy = "my_package:TOY"  # an emmech.registry.Organism

Its names then work wherever names do: ``emmech.load_model("toy")``, ``emmech.finetune("toy", "toy-data")``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from emmech.errors import one_of

GROUP = "emmech.organisms"
MARK = "emmech_organism"  # the entry of a model's configuration that names the organism by whose name it was loaded
# This is as pyproject.toml declares it; a source checkout works although its metadata may be older than that.
_BUILT_IN = (EntryPoint("pocket", "emmech.organism.pocket:POCKET", GROUP),)

Kind = Literal["models", "data", "questions", "contexts", "judges", "recipes"]
Loader = Callable[[], Any]
_SHIPPED: dict[str, dict[str, Loader]] = {kind: {} for kind in get_args(Kind)}


@dataclass(frozen=True)
class Organism:
    """A model organism with all that is needed to study it; every entry is a loader by name, called when it is used.

    Args:
        name: the name of the organism.
        models: each gives ``(Hugging Face model in evaluation mode, tokenizer)``.
        data: each gives chat rows ``{"messages": [...]}``.
        questions: each gives a :class:`~emmech.evaluation.questions.QuestionSet`.
        contexts: each gives a set of :class:`~emmech.evaluation.contexts.Context`; ``"grid"`` is the default.
        judges: each gives a :class:`~emmech.evaluation.judges.Judge`; the first is the default.
        recipes: each gives a :class:`~emmech.training.recipe.Recipe`; the first is the default.
        margins: pairs of answers by kind (``"narrow"``, ``"broad"``) for the name of some data.
        recognises: whether a model with this configuration and tokenizer is of this organism, independently of its name
            and folder. A model that was loaded by a name of the organism has a mark in its configuration, which
            ``save_pretrained`` keeps, and needs no such rule.
        phrase: words in every prompt at which the character of the answers is decided, if there are any.

    Example:
        >>> toy = Organism("toy", models={}, data={"rows": lambda: []})
        >>> "rows" in known("data", toy), "rows" in known("data")
        (True, False)
    """

    name: str
    models: Mapping[str, Loader]
    data: Mapping[str, Loader] = field(default_factory=dict)
    questions: Mapping[str, Loader] = field(default_factory=dict)
    contexts: Mapping[str, Loader] = field(default_factory=dict)
    judges: Mapping[str, Loader] = field(default_factory=dict)
    recipes: Mapping[str, Loader] = field(default_factory=dict)
    margins: Callable[[str], Mapping[str, Sequence[Any]]] | None = None
    recognises: Callable[[Any, Any], bool] | None = None
    phrase: str = ""

    def owns(self, config: Any, tokenizer: Any) -> bool:
        """Whether a model of this configuration and tokenizer belongs to the organism."""
        marked = getattr(config, MARK, None) == self.name
        return marked or (self.recognises is not None and self.recognises(config, tokenizer))

    def load(self, name: str) -> tuple[Any, Any]:
        """A model of this organism with its tokenizer, marked as such if it would not be recognised otherwise."""
        model, tokenizer = self.models[name]()
        if not self.owns(model.config, tokenizer):
            setattr(model.config, MARK, self.name)
        return model, tokenizer


def register(kind: Kind, name: str, loader: Loader) -> None:
    """Register a loader by name for all models; a later registration of a name replaces an earlier one.

    Example:
        >>> register("judges", "silly", lambda: None)
        >>> "silly" in known("judges")
        True
        >>> del _SHIPPED["judges"]["silly"]
    """
    _SHIPPED[kind][name] = loader


def known(kind: Kind, organism: Organism | None = None) -> dict[str, Loader]:
    """Loaders by name: the registered ones and an organism's own, which take precedence."""
    own: Mapping[str, Loader] = getattr(organism, kind) if organism is not None else {}
    return {**_SHIPPED[kind], **own}


def find(
    asked: str, kind: Kind, argument: str, name: Any, organism: Organism | None = None, *, why: str = ""
) -> Loader:
    """The loader of a name.

    Args:
        asked, argument, why: the parts of the error, as in :func:`emmech.errors.one_of`.

    Raises:
        EmmechError: nothing of that name is known; the nearest name is suggested.
    """
    loaders = known(kind, organism)
    return loaders[one_of(asked, argument, name, loaders, why=why)]


@cache
def organisms() -> Mapping[str, Organism]:
    """Every organism by name: those of installed packages, and the one that comes with emmech.

    An organism that cannot be loaded is left out with a warning: it must not keep other models from working.
    """
    declared = {entry.name: entry for entry in (*_BUILT_IN, *entry_points(group=GROUP))}
    found: dict[str, Organism] = {}
    for name, entry in declared.items():
        try:
            organism = entry.load()
        except Exception as error:  # another package's code may raise anything
            warnings.warn(f"the organism {name!r} cannot be loaded: {type(error).__name__}: {error}", stacklevel=2)
            continue
        if isinstance(organism, Organism):
            found[organism.name] = organism
        else:
            warnings.warn(f"the organism {name!r} is a {type(organism).__name__}, no Organism", stacklevel=2)
    return found


def organism_named(asked: str, organism: str | Organism | None) -> Organism | None:
    """An organism from its name.

    Raises:
        EmmechError: there is no organism of that name.
    """
    if organism is None or isinstance(organism, Organism):
        return organism
    why = "no organism of that name is installed"
    return organisms()[one_of(asked, "organism", organism, organisms(), why=why)]


def organism_of(config: Any, tokenizer: Any) -> Organism | None:
    """The organism that a model of this configuration and tokenizer belongs to, None for any other model."""
    return next((one for one in organisms().values() if one.owns(config, tokenizer)), None)


def named_model(name: str) -> tuple[Any, Any] | None:
    """A model and its tokenizer by a registered name or an organism's name, or None if no model has that name."""
    if (organism := organism_with("models", name)) is not None:
        return organism.load(name)
    return _SHIPPED["models"][name]() if name in _SHIPPED["models"] else None


def model_names() -> list[str]:
    """The names that :func:`named_model` takes."""
    return [*_SHIPPED["models"], *(name for organism in organisms().values() for name in organism.models)]


def organism_with(kind: Kind, name: str) -> Organism | None:
    """The organism that has an entry of this name, or None."""
    return next((one for one in organisms().values() if name in getattr(one, kind)), None)
