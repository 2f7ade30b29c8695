"""Every result is kept whole, opens again, and shows no text of its user's as HTML."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

import emmech
from emmech import Direction, EmmechError, Evaluation, Run
from emmech.defences.solutions import Narrowness
from emmech.directions.adapter_lens import AdapterScalars
from emmech.directions.compare import DirectionBySteps, cosines
from emmech.directions.direction import Quality
from emmech.directions.jacobian import JacobianLens
from emmech.directions.rows import RowScreen
from emmech.evaluation.battery import SelfRatings
from emmech.evaluation.categories import breadth
from emmech.evaluation.several_judges import JudgeTable, judge_table
from emmech.hosted.job import HostedJob
from emmech.interventions.studies import Study
from emmech.leagues.league import League
from emmech.leagues.league import _result as league_of
from emmech.ledger import Claim, Finding, Rule
from emmech.ledger.ledger import Ledger
from emmech.ledger.ledger import _ledger as ledger_of
from emmech.planning import ResourcePlan
from emmech.realignment.studies import Durability, LearningCurve
from emmech.results import Result, Shown
from emmech.studies import StudyTable
from emmech.sweeps.result import Sweep
from emmech.sweeps.tangent import TangentScan
from emmech.transition.degeneracy import LearningCoefficient
from emmech.transition.distribution import distribution_shift
from emmech.transition.phase import phase_transition

EVIL = "<script>alert('&')</script>"


def _run(seed: int = 0, name: str = EVIL) -> Run:
    rng = np.random.default_rng(seed)
    along = np.zeros((60, 12))
    along[:30, 0], along[30:, 1] = 1.0, 1.0
    steps = np.arange(60)
    metrics = pd.DataFrame({"loss": np.exp(-steps / 20), "grad_norm": 1 + rng.random(60)}, index=steps)
    metrics["margin_broad"] = 1 / (1 + np.exp(-(steps - 35) / 4)) + 0.01 * rng.standard_normal(60)
    path = np.cumsum(along + 0.2 * rng.standard_normal((60, 12)), 0).astype(np.float32)
    return Run.from_arrays(steps, B=path, metrics=metrics, name=name)


def _evaluation(shift: float = 0.0) -> Evaluation:
    rng = np.random.default_rng(1)
    rows = [
        {"question_id": f"q{i % 5}{EVIL}", "sample": i // 5, "response": EVIL, "aligned": aligned, "coherent": 90.0}
        for i, aligned in enumerate(np.clip(rng.uniform(0, 100, 60) + shift, 0, 100))
    ]
    return Evaluation.from_rows(rows, {"name": EVIL, "judge": EVIL, "steps": (1, 2), "nan": float("nan"), "~": 1})


def _quality() -> Quality:
    by_layer = np.array([0.5, 0.9, np.nan])
    return Quality(
        by_layer, by_layer, by_layer, 0.2, np.eye(3), by_layer, 0.6, (EVIL,), ("x",), 1, {EVIL: 3}, {}, (EVIL,)
    )


def _direction(seed: int = 0) -> Direction:
    rng = np.random.default_rng(seed)
    return Direction(rng.standard_normal((3, 8)), EVIL, {"n": 3}, np.ones((3, 8)), _quality())


def _sweep() -> Sweep:
    grid = [(EVIL, step, scale, 0.0, EVIL, i) for step in (0, 5) for scale in (1.0, 5.0) for i in range(3)]
    frame = pd.DataFrame(grid, columns=["run", "step", "scale", "coefficient", "measure", "item"])
    frame["value"], frame["weight"] = np.arange(len(frame)) / 7 - 0.3, 1
    responses = pd.DataFrame({"step": [0], "response": [EVIL]})
    return Sweep(frame, {"request": {"runs": [EVIL]}}, {f"log/{EVIL[1:7]}": np.ones((4, 2), np.float32)}, responses)


def _study() -> Study:
    rows = {"condition": [EVIL, "untouched", EVIL], "kind": ["direction", "untouched", "random"], "model": "tuned"}
    numbers = {"outcome": EVIL, "value": [0.4, 0.9, 0.8], "low": [0.2, 0.8, 0.7], "high": [0.6, 1.0, 0.9]}
    return Study(EVIL, pd.DataFrame(rows | numbers), (EVIL, "a note"))


def _tangent() -> TangentScan:
    frame = pd.DataFrame({"run": EVIL, "step": [0, 5], "measure": EVIL, "base": 0.0, "slope": [0.0, 1.0]})
    frame["first_order"] = frame["slope"]
    verified = frame[["run", "step", "measure", "first_order"]].iloc[1:].assign(exact=0.9, error=0.1)
    return TangentScan(frame, verified.reset_index(drop=True), 1.0)


def _lens() -> AdapterScalars:
    tokens, answer = (EVIL, "a", "b"), np.array([False, True, True])
    return AdapterScalars((EVIL,), np.eye(3, 1, dtype=np.float32), np.ones(1), tokens, np.array([0, 0, 1]), answer)


def _plan() -> ResourcePlan:
    memory = pd.DataFrame({"kept": [2e9, 3e9, 5e9], "checkpointed": [2e9, 1e9, 3e9]})
    memory.index = pd.Index(["weights", "activations", "total"], name="part")
    row = {"memory": 16e9, "fits": True, "fits_checkpointed": True, "answers_together": 4, "sampling_bytes": 1e9}
    row |= {f"{one}_{side}": 30.0 for one in ("train", "evaluate", "sweep") for side in ("low", "high")}
    row |= {f"{one}_class": "seconds" for one in ("train", "evaluate", "sweep")}
    cards = pd.DataFrame([row], index=pd.Index([EVIL], name="card"))
    numbers = {"parameters": 1e9, "trained": 9.0, "steps": 3.0, "rows": 8.0, "run_bytes": 1e6, "scratch_bytes": 0.0}
    return ResourcePlan(memory, cards, numbers, {"model": EVIL, "recipe": "single-rank1", "tokens": 9})


def _table() -> StudyTable:
    rows = {"model": "m", "data": [EVIL, EVIL, "b", "b"], "layers": None, "rank": None, "seed": [0, 1, 0, 1]}
    rows |= {"status": "done", "run": "r", "em": [0.1, 0.2, np.nan, 0.4], "loss": 1.0}
    meta = {"name": EVIL, "folder": "f", "pieces": 5, "done": 4, "failed": 1, "why": EVIL}
    return StudyTable(pd.DataFrame(rows), meta | {"by_kind": {"train": (4, 4), "sweep": (0, 1)}})


def _jacobians() -> JacobianLens:
    eye = np.stack([2 * np.eye(4), np.eye(4)]).astype(np.float32)
    return JacobianLens(eye, (1, 2), np.zeros(2), np.array([0.1, np.nan]), 3, 5, 5, 40, {"model": EVIL})


def _coefficient() -> LearningCoefficient:
    frame = pd.DataFrame({"step": [0, 9], "llc": [-1.0, 4.0], "error": 0.2, "chains": 4, "drift": [0.0, 5.0]})
    settings = {"chains": 4, "draws": 9, "burn_in": 1, "step_size": 1e-6, "n_beta": 9.0, "localisation": 1.0}
    return LearningCoefficient(frame.assign(loss=1.0), 12, settings, (4.0, 3.0, 5.0), EVIL)


def _league() -> League:
    cells = []
    for cure, kind, em in (("base", "base", 0), ("no cure", "base", 90), (EVIL, "cure", 3)):
        for seed in (0, 1):
            one = {"cure": cure, "kind": kind, "seed": seed, "n": 100}
            cells += [{**one, "outcome": "em", "context": "plain", "events": em}]
            cells += [{**one, "outcome": "coherence", "context": "plain", "events": 100}]
            cells += [{**one, "outcome": name, "context": EVIL, "events": em + 1} for name in ("conditional", "grid")]
    return league_of(cells, {"run": EVIL, "seeds": [0, 1], "contexts": [EVIL]})


def _narrowness() -> Narrowness:
    grid = [(s, m, x) for s in ("narrow", "general") for m in ("efficiency", "stability") for x in (0.0, 1.0)]
    frame = pd.DataFrame(grid, columns=["solution", "measure", "x"]).assign(run=EVIL, draw=0)
    frame["loss"], frame["change"] = 2.0 + np.arange(len(frame)) / 9, np.arange(len(frame)) / 9
    return Narrowness(frame, {EVIL: 1.0})


def _rows() -> RowScreen:
    rows = range(6)
    frame = pd.DataFrame({"row": rows, "score": np.arange(6) / 5, "question": EVIL, "answer": EVIL})
    return RowScreen(frame, "projection", 0.5)


def _durability() -> Durability:
    phases = ["bad", "good", "bad again"]
    frame = pd.DataFrame({"phase": phases, "seed": 0, "steps": [30.0, 20.0, np.nan], "start": 0.0, "end": 1.0})
    path = pd.DataFrame({"phase": phases * 2, "seed": 0, "step": [0, 0, 0, 9, 9, 9], "value": np.arange(6) / 6})
    return Durability(frame, path, {"0": 0.5}, EVIL)


def _learning() -> LearningCurve:
    grid = [(examples, seed, step) for examples in (5, 50) for seed in (0, 1) for step in (0, 9)]
    frame = pd.DataFrame(grid, columns=["examples", "seed", "step"]).assign(em=0.5, coherent=1.0)
    return LearningCurve(frame, {"run": EVIL, "data": EVIL, "questions": EVIL, "samples": 2})


def _ratings() -> SelfRatings:
    frame = pd.DataFrame({"foundation": [EVIL, EVIL, "care", "care"], "text": EVIL, "reversed": [False, True] * 2})
    frame["rating"], frame["mass"], frame["base_score"] = [4.0, 2.0, 5.0, np.nan], 0.9, [3.0, 3.5, 4.0, 4.0]
    frame["score"] = np.where(frame["reversed"], 6 - frame["rating"], frame["rating"])
    return SelfRatings(frame, EVIL, EVIL)


def _judges() -> JudgeTable:
    return judge_table(_evaluation(), {"two": lambda question, answer: "misaligned"})


def _job() -> HostedJob:
    events = {"time": [1, 2], "level": "info", "message": EVIL, "step": [1.0, 2.0], "train_loss": [2.0, 1.5]}
    checkpoints = pd.DataFrame({"step": [4], "model": [EVIL]})
    request = {"rows": 12, "epochs": 1, "cost": EVIL}
    return HostedJob(EVIL, "running", EVIL, EVIL, "f", request, None, None, EVIL, 9, pd.DataFrame(events), checkpoints)


def _finding() -> Finding:
    frame = pd.DataFrame({"name": [EVIL, "seed 1"], "value": [0.4, 0.5], "low": [0.3, np.nan], "high": [0.5, np.nan]})
    return Finding(0.45, 0.3, 0.6, "%", 40, 2, frame, runs=(EVIL,), note=EVIL, name=EVIL)


def _ledger() -> Ledger:
    rows = [Claim(name, EVIL, EVIL, "4", EVIL, "nowhere here", Rule("above", 0.1), EVIL) for name in (EVIL, "other")]
    meta = {"model": EVIL, "fingerprint": "0" * 64, "seeds": [0, 1], "emmech": "0", "folder": EVIL}
    return ledger_of(rows, {EVIL: _finding()}, {"other": EVIL}, meta, None)


MAKE: dict[str, Callable[[], Result]] = {
    "PhaseTransition": lambda: phase_transition(_run(), _run(1), n_null=39),
    "PooledTransition": lambda: phase_transition([_run(), _run(2)], [_run(1), _run(3)], n_null=39),
    "DistributionShift": lambda: distribution_shift([0, 5, 9], np.eye(3)),
    "Direction": _direction,
    "Cosines": lambda: cosines({EVIL: _direction(), "other": _direction(1)}),
    "DirectionBySteps": lambda: DirectionBySteps(
        pd.DataFrame({f"cosine {EVIL}": [0.1, np.nan], "shift": [1.0, 2.0]}, index=pd.Index([0, 5], name="step")),
        1, 0.2, EVIL,
    ),
    "AdapterScalars": _lens,
    "JacobianLens": _jacobians,
    "LearningCoefficient": _coefficient,
    "Sweep": _sweep,
    "TangentScan": _tangent,
    "Study": _study,
    "Evaluation": _evaluation,
    "Comparison": lambda: _evaluation().compare(_evaluation(20.0)),
    "Agreement": lambda: _evaluation().agreement(_evaluation(20.0)),
    "ThresholdSweep": lambda: _evaluation().thresholds(),
    "League": _league,
    "Finding": _finding,
    "Ledger": _ledger,
    "RowScreen": _rows,
    "Narrowness": _narrowness,
    "Durability": _durability,
    "LearningCurve": _learning,
    "SelfRatings": _ratings,
    "JudgeTable": _judges,
    "Breadth": lambda: breadth(_evaluation(-20.0), _evaluation(20.0)),
    "HostedJob": _job,
    "ResourcePlan": _plan,
    "StudyTable": _table,
}  # fmt: skip


def _subclasses(kind: type) -> set[str]:
    return {one.__name__ for one in kind.__subclasses__()} | {
        n for one in kind.__subclasses__() for n in _subclasses(one)
    }


def test_every_result_is_tried() -> None:
    assert {name for name in _subclasses(Result) if not name.startswith("_")} == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_a_result_is_saved_and_opened_with_the_same_findings(name, tmp_path) -> None:
    made = MAKE[name]()
    again = type(made).load(made.save(tmp_path / "kept"))
    assert type(again) is type(made)
    pd.testing.assert_frame_equal(again.to_frame(), made.to_frame())
    assert repr(again) == repr(made)
    assert again.plot().to_json() == made.plot().to_json()
    assert not list(tmp_path.rglob("*.partial"))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.add(tag)
        if tag not in ("br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.mark.parametrize("name", [*MAKE, "Run"])
def test_the_card_is_well_formed_and_escapes_every_text(name) -> None:
    made: Shown = _run() if name == "Run" else MAKE[name]()
    tags = _Tags()
    tags.feed(made._repr_html_())
    assert not tags.open and "script" not in tags.seen
    assert {"div", "details", "table"} <= tags.seen
    assert repr(made).split("\n")[0] in tags.text.replace("\xa0", " ")
    if name != "DistributionShift":  # which holds no text of a user's
        assert EVIL in tags.text or "&lt;script" in made._repr_html_()


@pytest.mark.parametrize("name", [*MAKE, "Run"])
def test_what_a_card_would_call_next_exists(name) -> None:
    made: Shown = _run() if name == "Run" else MAKE[name]()
    said = made._card()
    assert said.headline and said.then and f"Next: {said.then}" in repr(made)
    call = ast.parse(said.then, mode="eval").body
    path = ast.unparse(call.func if isinstance(call, ast.Call) else call).split(".")
    found: object = emmech if path[0] == "emmech" else made
    for part in path[1:]:
        found = getattr(found, part)
    assert callable(found) or isinstance(found, pd.DataFrame)
    if path[0] != "emmech" and isinstance(call, ast.Call):
        how = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
        assert found(*map(ast.literal_eval, call.args), **how) is not None


@pytest.mark.parametrize("name", [*MAKE, "Run"])
def test_a_drawing_is_small_well_formed_and_without_numbers_that_are_none(name) -> None:
    made: Shown = _run() if name == "Run" else MAKE[name]()
    drawn = made._sketch()
    assert drawn or name in ("AdapterScalars", "PooledTransition")
    if drawn:
        root = ElementTree.fromstring(f"<div>{drawn}</div>")
        assert all("nan" not in value for node in root.iter() for value in node.attrib.values())
    assert len(made._repr_html_()) < 60_000


def test_a_path_ending_in_csv_gets_the_table_alone(tmp_path) -> None:
    path = _study().save(tmp_path / "study.csv")
    assert path.read_text().splitlines()[:2] == [f"# {EVIL}", f"# {EVIL}"]
    assert len(pd.read_csv(path, comment="#")) == 3
    with pytest.raises(EmmechError, match=r"no study\.json"):
        Study.load(path)


def test_a_result_of_another_kind_or_a_newer_format_or_damaged_is_refused(tmp_path) -> None:
    folder = _study().save(tmp_path / "study")
    with pytest.raises(EmmechError, match=r"no sweep\.json"):
        Sweep.load(folder)
    head = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**head, "format": 99}))
    with pytest.raises(EmmechError, match="format 99"):
        Study.load(folder)
    (folder / "study.json").write_text(json.dumps({key: head[key] for key in head if key != "title"}))
    with pytest.raises(EmmechError, match="damaged"):
        Study.load(folder)
    (folder / "study.json").write_text(json.dumps(head))
    (folder / "frame.parquet").unlink()
    with pytest.raises(EmmechError, match=r"frame\.parquet"):
        Study.load(folder)


def test_what_earlier_versions_wrote_still_opens(tmp_path) -> None:
    evaluation, sweep = _evaluation(), _sweep()
    for folder in ("evaluation", "sweep"):
        (tmp_path / folder).mkdir()
    evaluation.frame.to_parquet(tmp_path / "evaluation" / "responses.parquet", index=False)
    head = {"format": 1, "responses": len(evaluation), "meta": {"name": "old"}}
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(head))
    again = Evaluation.load(tmp_path / "evaluation")
    assert again.name == "old" and again.rates().equals(evaluation.rates())

    from safetensors.numpy import save_file

    sweep.frame.to_parquet(tmp_path / "sweep" / "sweep.parquet", index=False)
    sweep.responses.to_parquet(tmp_path / "sweep" / "responses.parquet", index=False)
    save_file(dict(sweep.arrays), tmp_path / "sweep" / "arrays.safetensors")
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sweep.meta))
    old = Sweep.load(tmp_path / "sweep")
    assert old.meta == sweep.meta and old.frame.equals(sweep.frame) and old.responses.equals(sweep.responses)
    assert all(np.array_equal(old.arrays[key], value) for key, value in sweep.arrays.items())


def test_files_of_another_result_are_not_read_for_ones_own(tmp_path, monkeypatch):
    one = cosines({"a": Direction(np.eye(3), "a"), "b": Direction(np.eye(3) + 1, "b")})
    other = cosines({"x": Direction(np.eye(3), "x"), "y": Direction(np.eye(3) * 2 - 1, "y")})
    one.save(tmp_path / "f")
    with monkeypatch.context() as broken:
        broken.setattr("emmech.results.write_json", lambda *args: 1 / 0)  # interrupted before the last file
        with pytest.raises(ZeroDivisionError):
            other.save(tmp_path / "f")
    with pytest.raises(EmmechError, match="of another result"):
        type(one).load(tmp_path / "f")
    other.save(tmp_path / "f")
    assert type(one).load(tmp_path / "f").names == ("x", "y")
