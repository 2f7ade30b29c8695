"""The kernel's half of the panel: it receives states, computes on a thread of its own, and sends results."""

from __future__ import annotations

import atexit
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anywidget
import numpy as np
import traitlets

from emmech.errors import EmmechError
from emmech.progress import said_if_long
from emmech.transition.phase import phase_transition
from emmech.view.theme import BAD, CYCLE, DARK, GOOD, GREY, LIGHT, faint
from emmech.widget.answers import COLUMNS, Token
from emmech.widget.picture import counted, dose_note, dose_picture, sentence, twin
from emmech.widget.session import Session, Stale
from emmech.widget.settings import DOSES, Settings

if TYPE_CHECKING:
    import pandas as pd

_HERE = Path(__file__).parent
_FLUSH = 0.03  # seconds between two messages of tokens
_KEPT = 40  # states of the history
_APART = ("coefficient", "question", "colour")  # settings on which a dose-response does not depend
_PATIENCE = 600.0  # seconds that a call waits for the panel, unless it says how long
_DISPLAY = 4.0  # seconds that a cell waits for the first answers, so that its output contains them
_COLOURS = {"good": GOOD, "bad": BAD, "mark": CYCLE[2], "grey": GREY, "faint-good": faint(GOOD, 0.3),
            "faint-bad": faint(BAD, 0.35), "faint-grey": faint(GREY, 0.22)}  # fmt: skip
_STYLE = "".join(
    [".emmech-panel { ", LIGHT, *(f"--{name}: {value};" for name, value in _COLOURS.items()), " }\n",
     ".emmech-panel.dark { ", DARK, f" --good: {CYCLE[5]}; }}\n"]
)  # fmt: skip


class _State(traitlets.Dict):  # type: ignore[type-arg]
    """A trait that is completed and checked where Python assigns it; the front end sets it as it is."""

    def __set__(self, obj: Any, value: Any) -> None:
        super().__set__(obj, obj._completed(value))


class Panel(anywidget.AnyWidget):
    """What :func:`emmech.panel` returns."""

    _esm = _HERE / "panel.js"
    _css = _STYLE + (_HERE / "panel.css").read_text(encoding="utf-8")

    state = _State(help="the settings, as keyword arguments of emmech.panel").tag(sync=True)
    about = traitlets.Dict(help="what does not change while it is open").tag(sync=True)
    shown = traitlets.Dict(help="what was last seen").tag(sync=True)
    pinned: Any = traitlets.List(help="numbers of the states that are compared").tag(sync=True)

    def __init__(self, session: Session, settings: Settings, samples: int, transition: Any, given: list[str]) -> None:
        self._session, self._samples, self._given = session, samples, given
        self._settings = settings
        self._asked, self._run, self._told = 0, 0, 0.0  # moves made; the one being computed
        self._unsent: list[list[list[Any]]] = [[] for _ in COLUMNS]
        self._wake, self._news = threading.Event(), threading.Condition()
        self._reached = {"answers": 0, "result": 0, "all": 0}  # the last move of which each was done
        self._failed: tuple[int, EmmechError] | None = None  # a move that could not be computed, and why
        self._doses: dict[tuple[Any, ...], Any] = {}
        self._entries: dict[Settings, dict[str, Any]] = {}
        self._ended = False
        self._twin: Any = None
        self._own: dict[str, Any] | None = None
        self._transition: dict[str, Any] | None = None
        self._describing = threading.Lock()
        self._twin_id = uuid4().hex[:12]
        self._seen: dict[str, Any] = {}
        session.stale = lambda: self._run != self._asked or self._ended
        super().__init__(state=settings.to_dict(), about=self._describe())
        self.observe(self._moved, "state")
        self._threads = [threading.Thread(target=self._work, name="emmech panel", daemon=True)]
        if session.run is not None:
            self._threads.append(threading.Thread(target=self._mark, args=(transition,), daemon=True))
        self._asked = 1
        self._wake.set()
        for thread in self._threads:
            thread.start()
        atexit.register(self._finish)

    # what is offered

    def _describe(self) -> dict[str, Any]:
        session, run = self._session, self._session.run
        made = {name: list(one.layers) for name, one in session._made.items()}
        aligned = [name for name, one in session._made.items() if one.aligned_mean is not None]
        questions = [text for one in session.asked for text in one.paraphrases]
        return {
            "twin": self._twin_id,
            "name": run.name if run is not None else session.chat.name,
            "steps": run.steps.tolist() if run is not None else [],
            "directions": {name: made.get(name, []) for name in session.names},
            "aligned": aligned,
            "questions": questions,
            "doses": {change: [grid[0], grid[-1]] for change, grid in DOSES.items()},
            "judge": session.judged_by.name if session.judged_by is not None else "",
            "asked": f"{counted(len(session.asked), 'question')} of {session.asked.name}",
            "adapted": session.adapted,
            "limit": self._samples * len(session.asked),
            "colours": session.colours,
            "transition": self._transition,
        }

    def _mark(self, transition: Any) -> None:
        """Find the transition to mark, once, concurrently with everything else."""
        try:
            found = phase_transition(self._session.run) if transition is None else transition
            turn = found.mechanistic
            self._transition = {"step": turn.step, "low": turn.low, "high": turn.high, "text": str(turn)}
        except Exception as error:  # the panel would go on looking for ever
            self._transition = {"step": None, "text": error.why if isinstance(error, EmmechError) else str(error)}
        self._redescribe()

    def _redescribe(self) -> None:
        with self._describing:
            self.about = self._describe()

    # moves

    def _moved(self, change: Any) -> None:
        """A state from the front end, or assigned in a cell; what is being computed then becomes stale."""
        if change["new"] == self._own:  # set here, for a move that is being computed
            self._own = None
            return
        before, after = ({**state, "colour": ""} for state in (change["old"], change["new"]))
        if before == after and change["new"].get("colour") in self._session.colours:
            self._recolour(change["new"]["colour"])
            return
        self._asked += 1
        self._wake.set()

    def _completed(self, given: Any) -> dict[str, Any]:
        """The whole state of what is assigned in Python: settings that are not given stay as they are."""
        kept = self._settings.to_dict()
        before = {name: self.state.get(name, value) for name, value in kept.items()}
        settings = Settings(**{**before, **Settings.given(given)})
        if settings.direction != before["direction"] and settings.layer == before["layer"]:
            settings = self._session.at_known_layer(settings)
        self._session.check(settings)
        return settings.to_dict()

    def _recolour(self, colour: str) -> None:
        """Show the same answers in other colours, while whatever is being computed goes on."""
        self._settings = replace(self._settings, colour=colour)
        if self._seen:
            self._seen["settings"]["colour"] = colour
            self._tell(code=self._code(self._settings))
            if self._reached["answers"] >= self._run:  # until then the views have more words than are kept here
                self._keep()

    def _work(self) -> None:
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            if self._ended:
                return
            self._run = self._asked
            try:
                self._compute(self._take(dict(self.state)))
            except Stale:
                continue
            except EmmechError as error:
                self._fail(error)
            except Exception as error:  # a thread that died silently would leave the panel waiting for ever
                self._fail(EmmechError("compute what the panel is set to", None, f"{type(error).__name__}: {error}"))
            if self._run == self._asked:
                self._keep()
            self._reach("answers", "result", "all")

    def _fail(self, error: EmmechError) -> None:
        self._failed = self._run, error
        given = "" if error.given is None else str(error.given)
        self._tell(error={"given": given, "why": error.why, "instead": error.instead or ""})

    def _reach(self, *parts: str) -> None:
        with self._news:
            self._reached.update(dict.fromkeys(parts, self._run))
            self._news.notify_all()

    def _wait(self, part: str, seconds: float) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._ended or self._reached[part] >= self._asked, seconds)
            return self._reached[part] >= self._asked

    def _raise_failure(self) -> None:
        if self._failed is not None and self._failed[0] == self._asked:
            error = self._failed[1]
            raise EmmechError(error.asked, error.given, error.why, error.instead)

    def _take(self, given: dict[str, Any]) -> Settings:
        """The settings of a state; the layer of a new direction where it is not known at the old one."""
        session = self._session
        settings = Settings(**{**self._settings.to_dict(), **Settings.given(given)})
        if settings.direction in session.names and settings.direction not in session._made:
            self._tell(status="reading the direction from answers ...")
        layers = session.direction(settings.direction).layers
        # making a direction takes a while, in which the colour may have been changed
        settings = replace(settings, colour=self.state.get("colour", settings.colour))
        if self.about["directions"].get(settings.direction) != list(layers):
            self._redescribe()
        if settings.direction != self._settings.direction and session.at_known_layer(settings) != settings:
            session._check()  # a move that came in between is not undone
            settings = session.at_known_layer(settings)
            self._own = settings.to_dict()
            self.set_trait("state", self._own)
        session.check(settings)
        self._settings = settings
        return settings

    def _compute(self, settings: Settings) -> None:
        session, began = self._session, time.perf_counter()
        acting = session.acting(settings)
        self._seen = {"settings": settings.to_dict(), "columns": [[] for _ in COLUMNS], "verdict": [], "dose": "",
                      "note": "", "broken": [], "prompt": [], "quality": {},
                      "history": list(self._entries.values())}  # fmt: skip
        key = tuple(value for name, value in settings.to_dict().items() if name not in _APART)
        self._tell(start=settings.to_dict(), status="writing ...", error=None, sentence=sentence(settings.to_dict()),
                   code=self._code(settings))  # fmt: skip
        columns, prompt, said = session.answers(settings, self._told_tokens)
        took = time.perf_counter() - began
        self._flush()
        shown = [[*one, [round(value, 4) for value in read]] for one, read in zip(acting, prompt, strict=True)]
        ends = [one.finish for one in said]
        self._tell(prompt=shown, ends=ends, quality=session.quality(settings), status=f"written in {took:.2f} s")
        self._seen["columns"] = [[one.packed() for one in column] for column in columns]
        known = self._doses.get(key)
        if known is not None:
            self._tell_dose(known, settings)
        if session.judged_by is None:
            self._record(settings, None)
        self._keep()
        self._reach("answers")
        verdicts = session.verdicts(settings, self._samples)
        self._judge(settings, verdicts, rounds=2)
        if known is None and session.judged_by is not None:
            self._tell(status="trying every coefficient ...")
        if known is None:
            for dose in session.dose(settings):
                self._tell_dose(dose, settings)
            self._doses[key] = dose
            self._keep()
        self._judge(settings, verdicts)
        self._tell(status=f"done; written in {took:.2f} s")

    def _judge(self, settings: Settings, verdicts: Any, rounds: int = 1 << 30) -> None:
        for _, counts in zip(range(rounds), verdicts, strict=False):
            rates = counts.rates()
            self._record(settings, rates, verdict=rates, status=f"judged {rates[0]['n']} of {self.about['limit']}")

    def _tell_dose(self, dose: Any, settings: Settings) -> None:
        note = dose_note(dose, self.about["asked"])
        self._tell(dose=dose_picture(dose, settings), note=note, broken=dose.broken)

    def _record(self, settings: Settings, rates: Any, **news: Any) -> None:
        """Keep a state in the history, and tell it with other news; a state that is already there is replaced."""
        answers = ["".join(token[0] for token in column) for column in self._seen["columns"]]
        old = self._entries.pop(settings, None)
        if old and old["rates"] and rates and old["rates"][0]["n"] > rates[0]["n"]:
            rates = old["rates"]  # more of the same answers were judged when it was set before
        number = old["number"] if old else 1 + max((one["number"] for one in self._entries.values()), default=0)
        state = {name: value for name, value in settings.to_dict().items() if name != "colour"}
        entry = {"number": number, "state": state, "answers": answers, "rates": rates}
        self._entries[settings] = entry
        loose = [one for one in self._entries if self._entries[one]["number"] not in self.pinned]
        for one in loose[: max(0, len(self._entries) - _KEPT)]:
            self._entries.pop(one)
        self._tell(history=list(self._entries.values()), **news)
        self._reach("result")

    # messages

    def _tell(self, **news: Any) -> None:
        if self._run == self._asked:
            self._seen.update(news)
            self.send({"run": self._run, **_finite(news)})

    def _told_tokens(self, new: list[list[Token]]) -> None:
        for unsent, tokens in zip(self._unsent, new, strict=True):
            unsent += [token.packed() for token in tokens]
        if time.perf_counter() - self._told >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if any(self._unsent) and self._run == self._asked:
            self.send({"run": self._run, "tokens": _finite(self._unsent)})
            self._told = time.perf_counter()
        self._unsent = [[] for _ in COLUMNS]

    def _keep(self) -> None:
        """Keep what is seen for views that open later, and in the notebook's file."""
        self.shown = _finite({"run": self._run, **self._seen})
        if self._twin is not None:
            from IPython.display import HTML

            self._twin.update(HTML(self._repr_html_()))

    def _repr_html_(self) -> str:
        return twin(self.about, self._seen)

    def _ipython_display_(self, **_: Any) -> None:
        """The live widget, followed by its static twin, which the widget hides and a converted notebook shows."""
        from IPython.display import HTML, display

        display(self._repr_mimebundle_()[0], raw=True)  # type: ignore[index]
        self._wait("answers", _DISPLAY)
        self._twin = display(HTML(self._repr_html_()), display_id=True)

    # what a cell asks for

    def code(self) -> str:
        """The state as one code cell; ``emmech.panel(run, **panel.state)`` opens it too.

        Of a state that cannot be computed, such as one with an empty question, the cell is that of the one before it.
        """
        try:
            return self._code(Settings(**self._completed(self.state)))
        except EmmechError:
            return self._code(self._settings)

    def _code(self, settings: Settings) -> str:
        run, name = self._session.run, self._session.chat.name
        more = ", ".join(f"{one}={one}" for one in self._given)
        if run is not None:
            opening = f"run = emmech.load_run({str(run.path)!r})" if run.path else "# run: the one that was opened"
            return settings.code(opening, "run", more)
        opening = f"model = emmech.load_model({name!r})" if self._session.named else "# model: the one that was opened"
        return settings.code(opening, "model", more)

    def result(self) -> pd.DataFrame:
        """The states that were tried, the last 40 and all pinned ones, a row for each column; the present one last.

        It waits for the first verdict on the present state; :meth:`wait` waits for the last one.

        Columns: ``number``, ``column`` (``"base"``, ``"changed"``, ``"random"``), ``answer``, ``em`` with ``em_low``
        and ``em_high``, ``coherent``, ``n`` (NaN and 0 without a judge), ``pinned``, and the settings.

        Raises:
            EmmechError: what the panel is set to cannot be computed, or has no verdict after ten minutes.
        """
        import pandas as pd

        with said_if_long("waiting for the panel: the first verdict on what it is set to"):
            known = self._ended or self._wait("result", _PATIENCE)
        if not known:
            why = f"no answer to it was judged within {_PATIENCE:g} seconds"
            raise EmmechError("read the result of the panel", self._settings.question, why, "panel.wait(), then again")
        self._raise_failure()
        rows = []
        for entry in self._entries.values():
            rates = entry["rates"] or [{"em": np.nan, "low": np.nan, "high": np.nan, "coherent": np.nan, "n": 0}] * 3
            for column, answer, rate in zip(COLUMNS, entry["answers"], rates, strict=True):
                found = {"em": rate["em"], "em_low": rate["low"], "em_high": rate["high"]}
                found |= {"coherent": rate["coherent"], "n": rate["n"], "pinned": entry["number"] in self.pinned}
                rows.append({"number": entry["number"], "column": column, "answer": answer, **found, **entry["state"]})
        return pd.DataFrame(rows)

    def wait(self, seconds: float = _PATIENCE, *, answers: bool = False) -> bool:
        """Wait until nothing is being computed, or (``answers``) until the three answers are written.

        Returns:
            whether that happened in time.

        Raises:
            EmmechError: what the panel is set to cannot be computed. The panel shows the same, and goes on with the
                next state.
        """
        about = self.about
        judged = f", then {about['limit']} judged ones of each and the dose-response" if about["judge"] else ""
        with said_if_long(f"waiting for the panel: three answers{'' if answers else judged}"):
            done = self._wait("answers" if answers else "all", seconds)
        self._raise_failure()
        return done

    def close(self) -> None:
        """End the panel and its thread."""
        with self._news:
            self._ended = True
            self._news.notify_all()
        self._wake.set()
        atexit.unregister(self._finish)
        super().close()

    def _finish(self) -> None:
        """Wait for the threads: a process that ends while one of them is inside torch is aborted."""
        self._ended = True
        self._wake.set()
        for thread in self._threads:
            thread.join()


def _finite(value: Any) -> Any:
    """The same without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
