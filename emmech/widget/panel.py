"""``emmech.panel``: change a model by hand in a notebook, and see at once what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emmech.errors import EmmechError, as_int, refusal
from emmech.progress import said_if_long

if TYPE_CHECKING:
    from emmech.widget.front import Panel


def panel(
    model: Any,
    *,
    directions: Any = None,
    questions: Any = "first-plot",
    judge: Any = None,
    samples: int = 25,
    base: Any = None,
    transition: Any = None,
    **state: Any,
) -> Panel:
    """Open the panel: three answers side by side while you move the sliders.

    The first answer is the base model's, the second that of the model as it is set, the third that of the same model
    with a random direction of the same norm in place of yours. They share one seed and are written in one batch, so
    that what differs between them is the change. A move of a slider cancels what is being written.

    It is a widget of anywidget, for JupyterLab, VS Code and marimo, and works on modules of its own: the model that is
    given shares its weights with the panel and is never changed.

    Args:
        model: a :class:`emmech.Run` of adapters or its folder, or what :func:`emmech.load_model` takes.
        directions: a :class:`emmech.Direction` or several by name. A run needs none: it offers its adapter's B and,
            where there is a judge, the directions of :func:`emmech.misalignment_direction`, which are made when they
            are chosen.
        questions: the presets, which are also what the verdict is about, as :func:`emmech.evaluate` takes them.
        judge: as :func:`emmech.evaluate` takes it. The models of an organism have one; other models get no verdict
            without one, and the dose-response then shows how likely the base model's answers still are.
        samples: judged answers per question and column, at most.
        base: the run's base model in memory, to save loading it again.
        transition: a :class:`emmech.PhaseTransition` to mark on the slider of steps; by default that of the run.
        state: what the panel is set to; what is not given, or None, has a default: ``question``, ``direction``,
            ``layer``, ``step``, ``scale``, ``change`` (``"add"``, ``"ablate"`` or ``"cap"``), ``coefficient``,
            ``towards`` (``"zero"`` or ``"aligned"``), ``positions`` (``"prompt"``, ``"answer"``, ``"phrase"`` or
            ``"all"``), ``phrase``, ``seed``, ``temperature``, ``max_new_tokens``, ``colour`` (``"direction"``, or a
            rank-1 adapter's name for its A·x).

    Returns:
        the panel. ``.state`` is what it is set to, and a dict of some settings can be assigned to it; ``.code()`` is
        that state as a code cell; ``.result()`` is a DataFrame of all that was tried; ``.wait()`` returns once nothing
        is being computed; ``.close()`` ends it.

    Raises:
        EmmechError: no direction can be made, a setting that does not fit the model, or anywidget is not installed.

    Example:
        >>> import emmech
        >>> opened = emmech.panel(emmech.load_run("checkpoints/pocket-medical"))  # doctest: +SKIP
        >>> opened.state = {"coefficient": 0.5}  # doctest: +SKIP
    """
    samples = as_int("open the panel", "samples", samples, least=1)
    if transition is not None and not hasattr(transition, "mechanistic"):
        instead = "emmech.phase_transition(run), or None to have it found"
        raise refusal("open the panel", "transition", transition, "it is the result of phase_transition", instead)
    try:
        with said_if_long("opening the panel: importing PyTorch and the parts of the widget"):
            from emmech.widget.front import Panel
            from emmech.widget.session import Session
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("emmech"):
            raise
        why = "the panel is a widget of anywidget, which is not installed"
        raise EmmechError("open the panel", error.name, why, 'pip install "emmech[notebook]"')
    with said_if_long("opening the panel: loading the model"):
        session = Session(model, directions, questions, judge, base)
    given = {"directions": directions, "questions": None if questions == "first-plot" else questions, "judge": judge}
    with said_if_long("opening the panel: reading the direction, which may need answers of the model"):
        settings = session.start(state)
    return Panel(session, settings, samples, transition, [key for key, one in given.items() if one])
