"""The early warning: once, at the right step, in the run; a stop leaves a whole run that goes on."""

from __future__ import annotations

import numpy as np
import pytest

import emmech
from emmech.errors import EmmechError
from emmech.transition import EarlyWarning, Watch
from tests.conftest import make_rows, make_tiny
from tests.training.test_recorder import lora_state, plain_training

SHORT = dict(recipe="single-rank1", learning_rate=1e-2, batch_size=2, accumulation=2, warmup_steps=1, held_out=0.0,
             max_steps=8, measure_every=2, margins={}, progress=False)  # fmt: skip


def size(chat):
    """A number that rises as any adapter trains."""
    return 100 * sum(float(p.detach().abs().sum()) for name, p in chat.model.named_parameters() if "lora_B" in name)


def trained(folder, **options):
    return emmech.finetune(make_tiny("qwen2"), make_rows(), out=folder, measures={"size": size}, **SHORT | options)


def watching(rise):
    return dict(metric="size", threshold=rise, window=1, change=True)


def due(run, rise):
    """The first measured step at which the rise is reached, read from the whole run."""
    series = run.metrics["size"].dropna()
    return int(series.index[(series - series.iloc[0] >= rise).argmax()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole") / "run", seed=[1, 4])


@pytest.fixture(scope="module")
def rise(whole):
    """A threshold that is passed in the middle of both runs, at steps that differ if the paths do."""
    return 0.6 * float(whole[0].metrics["size"].dropna().iloc[-1])


def test_it_comes_once_and_changes_nothing(tmp_path, whole, rise):
    seen = []
    runs = trained(tmp_path / "runs", seed=[1, 4], on_transition=Watch(seen.append, **watching(rise)))
    assert [one.step for one in seen] == sorted(due(run, rise) for run in whole) and all(
        0 < one.step < 8 for one in seen
    )
    for run, same in zip(runs, whole, strict=True):
        [event] = [one for one in seen if one.run == str(run.path)]
        assert run.manifest["warning"] == event.to_dict() and EarlyWarning(**run.manifest["warning"]) == event
        series = run.metrics["size"].dropna()
        assert event.score == pytest.approx(series[event.step] - series[0]) and event.threshold == rise <= event.score
        assert np.array_equal(run.B(), same.B()) and run.manifest["status"] == "complete"
        assert f"step {event.step}, size" in repr(run)
    with pytest.warns(UserWarning, match=r"step \d+: size is"):
        trained(tmp_path / "warned", seed=1, on_transition=Watch("warn", **watching(rise)))


def test_a_stopped_run_is_whole_and_goes_on(tmp_path, whole, rise):
    def stop(event):
        return "stop"

    run = trained(tmp_path / "run", seed=1, on_transition=Watch(stop, **watching(rise)))
    at = due(whole[0], rise)
    assert run.manifest["status"] == "stopped" and run.manifest["warning"]["step"] == at
    assert run.steps.tolist() == list(range(at + 1)) and not run.damaged
    assert (run.path / "trajectory" / "stacked.safetensors").exists() and "ended the training" in repr(run)
    # the same call with resume goes on, without a second warning, to the uninterrupted run
    again = trained(tmp_path / "run", seed=1, on_transition=Watch(stop, **watching(rise)), resume=True)
    assert again.manifest["status"] == "complete" and again.manifest["warning"]["step"] == at
    assert np.allclose(again.B(), whole[0].B(), atol=1e-6) and not (again.path / "resume").exists()


def test_of_several_runs_each_stops_alone(tmp_path, whole, rise):
    said = []

    def stop_the_first(event):
        said.append(event)
        return "stop" if "s1" in event.run else None

    first, other = trained(tmp_path / "runs", seed=[1, 4], on_transition=Watch(stop_the_first, **watching(rise)))
    assert len(said) == 2 and first.manifest["status"] == "stopped" and other.manifest["status"] == "complete"
    assert first.steps[-1] == due(whole[0], rise) < 8
    assert np.allclose(first.B(), whole[0].B()[: len(first.steps)], atol=1e-6)
    assert np.allclose(other.B(), whole[1].B(), atol=1e-6)
    opened = trained(tmp_path / "runs", seed=[1, 4], resume=True)
    assert [one.manifest["status"] for one in opened] == ["stopped", "complete"]
    onwards = trained(tmp_path / "on", start=(first, int(first.steps[-1])))
    assert np.array_equal(onwards.B()[0], first.B()[-1])


def test_in_a_plain_trainer(tmp_path):
    def recorder(name, on_transition=None):
        return emmech.Recorder(tmp_path / name, measures={"size": size}, measure_every=1, on_transition=on_transition)

    model, _ = plain_training(tmp_path / "a", recorder("whole"))
    run = emmech.load_run(tmp_path / "whole")
    rise = 0.5 * float(run.metrics["size"].iloc[-1])
    plain_training(tmp_path / "b", recorder("cut", Watch(lambda event: "stop", **watching(rise))))
    cut = emmech.load_run(tmp_path / "cut")
    at = due(run, rise)
    assert cut.steps.tolist() == list(range(at + 1)) and 0 < at < 8 and cut.manifest["status"] == "stopped"
    assert np.array_equal(cut.B("layers.1.mlp.down_proj"), run.B("layers.1.mlp.down_proj")[: at + 1])
    # the Trainer kept its state at that step
    assert [path.name for path in (tmp_path / "b" / "trainer").glob("checkpoint-*")] == [f"checkpoint-{at}"]
    assert all(parameter.isfinite().all() for parameter in lora_state(model).values())


def test_by_default_the_gradients_of_all_b_are_watched(tmp_path):
    """The median over five steps, from the fifth on."""
    seen = []
    run = trained(tmp_path / "r", recipe="all-adapter", rank=2, on_transition=Watch(seen.append, threshold=1e-9))
    norms = run.metrics[[name for name in run.metrics if name.startswith("grad_norm_B/")]]
    assert norms.shape[1] == 28 and [one.step for one in seen] == [5]
    whole = np.sqrt((norms**2).sum(axis=1))[1:6]
    assert seen[0].score == pytest.approx(float(whole.median())) and seen[0].signal == "grad_norm_B"


@pytest.mark.parametrize(("given", "why"), [("wran", "warn"), (3, "no act"), ({"rise": 2}, "no act")])
def test_what_is_not_understood_is_refused(given, why, tmp_path):
    with pytest.raises(EmmechError, match=why):
        emmech.Recorder(tmp_path / "r", on_transition=given)


@pytest.mark.parametrize("wrong", [dict(threshold=0), dict(threshold=float("nan")), dict(metric=""), dict(window=0)])
def test_a_watch_out_of_range_is_refused(wrong):
    with pytest.raises(EmmechError, match="watch the training"):
        Watch(**wrong)


def test_numbers_that_are_not_finite_are_watched_as_none_live_and_from_the_file():
    watch = Watch("warn")
    assert watch.value({"step": 3, "grad_norm_B/x": None}) is None  # as a file has it
    assert watch.value({"grad_norm_B/x": float("nan"), "grad_norm_B/y": 1.0}) is None
    assert watch.value({"grad_norm_B/x": 3.0, "grad_norm_B/y": 4.0}) == 5.0
    assert watch.value({"loss": 1.0}) is None and Watch("warn", "loss").value({"loss": 1.5}) == 1.5
