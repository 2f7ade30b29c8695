"""What the panel is set to: a value that is checked when it is made, and the code cell that makes the panel again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from emmech.errors import EmmechError, as_float, as_int, closest, one_of, refusal

CHANGES = ("add", "ablate", "cap")
POSITIONS = ("prompt", "answer", "phrase", "all")
DOSES = {
    "add": (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
    "ablate": (0.0, 0.25, 0.5, 0.75, 1.0),
    "cap": (0.0, 0.25, 0.5, 0.75, 1.0),
}
_ASKED = "set the panel"


# what a panel chooses for itself where it is not given, so that a cell which opens the same state has to say it
_CHOSEN = ("question", "direction", "layer", "step", "change", "coefficient", "positions")


@dataclass(frozen=True)
class Settings:
    """One state of the panel.

    Args:
        question: the user's words.
        direction: its name among those that the panel was opened with.
        layer: whose output is changed.
        step: of the run; None for a model without a run.
        scale: a factor on the run's adapter.
        change: ``"add"`` a multiple, ``"ablate"`` the component, or ``"cap"`` it at the base model's range.
        coefficient: to add: the share of each token's residual norm. To ablate and to cap: how much of it, 0 to 1.
        towards: what an ablation puts in place of the component: ``"zero"`` or the ``"aligned"`` mean.
        positions: ``"prompt"``, ``"answer"``, ``"phrase"`` or ``"all"``.
        phrase: the words that ``"phrase"`` is about.
        seed, temperature, max_new_tokens: as :func:`emmech.sample` takes them.
        colour: what tokens are coloured by: ``"direction"``, or the name of a rank-1 adapter for its A·x. It changes no
            answer, so that settings which differ in nothing else are equal.

    Raises:
        EmmechError: one of them is out of range.
    """

    question: str
    direction: str
    layer: int
    step: int | None = None
    scale: float = 1.0
    change: str = "add"
    coefficient: float = 0.0
    towards: str = "zero"
    positions: str = "all"
    phrase: str = ""
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 40
    colour: str = field(default="direction", compare=False)

    def __post_init__(self) -> None:
        for name in ("question", "direction", "phrase", "colour"):
            if not isinstance(text := getattr(self, name), str):
                raise refusal(_ASKED, name, text, f"{name} is a string", f'{name}="..."')
        if not self.question.strip():
            raise EmmechError(_ASKED, "question=''", "there is nothing to answer", "a question, or one of the list")
        one_of(_ASKED, "change", self.change, CHANGES)
        one_of(_ASKED, "positions", self.positions, POSITIONS)
        one_of(_ASKED, "towards", self.towards, ("zero", "aligned"))
        for name in ("scale", "coefficient", "temperature"):
            object.__setattr__(self, name, as_float(_ASKED, name, getattr(self, name)))
        if self.temperature < 0:
            instead = "temperature=1.0, or 0 for the likeliest tokens"
            raise refusal(_ASKED, "temperature", self.temperature, "the logits are divided by it", instead)
        for name, least in (("layer", 0), ("seed", 0), ("max_new_tokens", 1)):
            object.__setattr__(self, name, as_int(_ASKED, name, getattr(self, name), least=least))
        if self.seed >= 2**63:
            raise refusal(_ASKED, "seed", self.seed, "a seed has at most 63 bits", "seed=0")
        if self.step is not None:
            object.__setattr__(self, "step", as_int(_ASKED, "step", self.step, least=0))
        low, high = DOSES[self.change][0], DOSES[self.change][-1]
        if not low <= self.coefficient <= high:
            why = f"to {self.change}, the panel goes from {low:g} to {high:g}"
            instead = f"coefficient={high:g}, or emmech.steer for more"
            raise EmmechError(_ASKED, f"coefficient={self.coefficient:g}", why, instead)
        if self.positions == "phrase" and not self.phrase.strip():
            why = "no words are given at which the change could act"
            raise EmmechError(_ASKED, 'positions="phrase", phrase=""', why, "phrase= words that every prompt has")

    @classmethod
    def given(cls, state: Any, asked: str = _ASKED) -> dict[str, Any]:
        """The settings that are given by name; None leaves a setting as it is.

        Raises:
            EmmechError: it is no mapping, or the panel has no such setting.
        """
        if not isinstance(state, Mapping):
            why, instead = "the state of a panel is a dict of its settings", 'panel.state = {"coefficient": 0.5}'
            raise refusal(asked, "state", state, why, instead)
        names = [one.name for one in fields(cls)]
        for name, value in state.items():
            if name not in names:
                raise refusal(asked, str(name), value, "the panel has no such setting", closest(str(name), names))
        return {name: value for name, value in state.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON stores them."""
        return asdict(self)

    def code(self, opening: str, subject: str, more: str = "") -> str:
        """A code cell that opens the panel in this state.

        Args:
            opening: lines that make the subject.
            subject: what the panel opens.
            more: arguments besides the state.

        Example:
            >>> print(Settings("hello ?", "B", 2, seed=3).code("run = ...", "run"))
            import emmech
            <BLANKLINE>
            run = ...
            emmech.panel(
                run,
                question='hello ?',
                direction='B',
                layer=2,
                change='add',
                coefficient=0.0,
                positions='all',
                seed=3,
            )
        """
        shown = [
            f"    {one.name}={getattr(self, one.name)!r},"
            for one in fields(self)
            if (one.name in _CHOSEN and getattr(self, one.name) is not None) or getattr(self, one.name) != one.default
        ]
        lines = ["import emmech", "", opening, "emmech.panel(", f"    {subject},", *([f"    {more},"] if more else [])]
        return "\n".join([*lines, *shown, ")"])
