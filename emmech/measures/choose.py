"""Turn what a caller gives as a measure into measures, which serve a fine-tune, a sweep and a study alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from emmech.chat.model import ChatModel
from emmech.errors import EmmechError, one_of, refusal
from emmech.measures.measure import Function, TeacherForced, measure_name
from emmech.measures.sampled import RESERVED, Sampled
from emmech.measures.teacher_forced import Margin

_SAMPLES = 50  # answers per question, as the literature draws


def as_measure(measure: Any, name: str | None = None) -> Any:
    """One measure from a measure or a function of a chat model.

    Args:
        name: what its outcome is called, instead of its own name.

    Raises:
        EmmechError: it is neither.

    Example:
        >>> as_measure(len).name
        'len'
    """
    if isinstance(measure, TeacherForced) or (callable(measure) and isinstance(getattr(measure, "name", None), str)):
        renamed = name is not None and name != measure.name and is_dataclass(measure)
        return replace(measure, name=name) if renamed else measure  # type: ignore[type-var]
    if callable(measure):
        return Function(measure, name or measure_name(measure))
    why = "it is neither a measure nor a function of a ChatModel"
    instead = '"margin", "answers", emmech.measures.Margin(pairs), Sampled(...), or a function, each with a name'
    raise refusal("take a measure", "measure", measure, why, instead)


def as_measures(measure: Any, chat: ChatModel | None = None, *, data: str = "") -> list[Any]:
    """Measures from what a caller gave: a name, one measure, several, or several by name.

    Args:
        measure: ``"margin"`` (narrow and broad pairs), ``"answers"`` (sampled EM), ``"auto"`` (answers where the
            model's organism has a judge, else margins), measures and functions, or a mapping of them by name.
        chat: the model that they will be taken of, which decides on the pairs of a margin by kind.
        data: the name of the data that the model was fine-tuned on, for the pairs of an organism.

    Raises:
        EmmechError: neither a measure, a function, nor a name; or two of one name or with an outcome in common.
    """
    organism = chat.organism if chat is not None else None
    named: dict[str, Callable[[], list[Any]]] = {
        "margin": lambda: [Margin("narrow"), Margin("broad")],
        "answers": lambda: [Sampled(samples=_SAMPLES)],
        "auto": lambda: as_measures("answers" if organism and organism.judges else "margin"),
    }
    if isinstance(measure, str):
        why = "it is neither a measure nor the name of one"
        found = named[one_of("take a measure", "measure", measure, named, why=why)]()
    elif isinstance(measure, Mapping):
        found = [as_measure(one, str(name)) for name, one in measure.items()]
    elif isinstance(measure, Iterable):
        found = [as_measure(one) for one in measure]
    else:
        found = [as_measure(measure)]
    if not found:
        return [as_measure(measure)]  # which refuses it
    names = [measure_name(one) for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        given = f"measures named {', '.join(names)}"
        instead = 'Margin(pairs, name="mine"), or functions with names of their own'
        raise EmmechError("tell the measures apart", given, f"there is more than one {twice!r}", instead)
    outcomes = names + [name for one in found if isinstance(one, Sampled) for name in RESERVED]
    if twice := next((name for name in outcomes if outcomes.count(name) > 1), None):
        given = f"measures named {', '.join(names)}"
        why = f"more than one of them gives {twice!r}, which would be one rate over the answers of both"
        raise EmmechError("tell the measures apart", given, why, "measure twice, with one Sampled each time")
    return [one.of(chat, data) if chat is not None and isinstance(one, Margin) else one for one in found]
