"""The one exception of emmech, and the one shape of its message.

An error is a short lesson: what was asked, what was given, why that cannot work, and the nearest thing
that would. Every public function raises :class:`EmmechError` ``from None``, so that a traceback ends at the
caller's own line instead of inside torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["EmmechError", "closest"]


class EmmechError(Exception):
    """Something emmech was asked to do cannot be done; the message says how to ask instead.

    Args:
        asked: what was attempted, as a phrase that follows "cannot": ``"read the dataset advice.jsonl"``.
        given: the offending value as the caller would recognise it (shape, dtype, layer, step, file:line).
        why: the reason, one sentence.
        instead: the nearest valid choice, one sentence.

    Example:
        >>> from emmech.errors import EmmechError
        >>> print(EmmechError("steer at layer 40", given="layer=40", why="the model has 24 layers (0..23)",
        ...                   instead="use layer=23 or lower"))
        cannot steer at layer 40
          given:   layer=40
          because: the model has 24 layers (0..23)
          instead: use layer=23 or lower
    """

    def __init__(self, asked: str, *, given: object = None, why: str, instead: str | None = None) -> None:
        self.asked = asked
        self.given = given
        self.why = why
        self.instead = instead
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"cannot {self.asked}"]
        if self.given is not None:
            lines.append(f"  given:   {self.given}")
        lines.append(f"  because: {self.why}")
        if self.instead is not None:
            lines.append(f"  instead: {self.instead}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickling
        return _rebuild, (self.asked, self.given, self.why, self.instead)


def _rebuild(asked: str, given: object, why: str, instead: str | None) -> EmmechError:
    return EmmechError(asked, given=given, why=why, instead=instead)


def closest(name: str, choices: Iterable[str]) -> str:
    """Say what a mistyped name may have meant: ``"did you mean 'sport'? choices: finance, medical, sport"``.

    Example:
        >>> closest("sprot", ["medical", "finance", "sport"])
        "did you mean 'sport'? choices: finance, medical, sport"
    """
    names = sorted(str(choice) for choice in choices)
    listing = f"choices: {', '.join(names)}" if names else "there are none"
    match = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean '{match[0]}'? {listing}" if match else listing
