from __future__ import annotations

import math
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai")

import inspect_ai
from inspect_ai.model import Logprob, Logprobs, ModelOutput, ModelUsage, TopLogprob, get_model

from emmech.errors import EmmechError
from emmech.evaluation.questions import load_questions
from emmech.interop.inspect_task import first_plot


def say(text):
    output = ModelOutput.from_content("mockllm/model", text)
    output.usage = ModelUsage()  # else the mock counts tokens with a vocabulary from the network
    return output


def grader_output(first, text="x"):
    output = say(text)
    top = [TopLogprob(token=token, logprob=math.log(share)) for token, share in first.items()]
    output.choices[0].logprobs = Logprobs(
        content=[Logprob(token=top[0].token, logprob=top[0].logprob, top_logprobs=top)]
    )
    return output


def model(answer):
    def give(messages, tools, tool_choice, config):
        return answer(messages[-1].text, config)

    return get_model("mockllm/model", custom_outputs=give, memoize=False)


def run(tmp_path, subject, grader, **arguments):
    (log,) = inspect_ai.eval(
        first_plot(**{"samples": 3, **arguments}),
        model=subject,
        model_roles={"grader": grader},
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success", log.error
    return log


def rates_of(log):
    return {name: value.value for name, value in log.results.scores[0].metrics.items()}


def test_rates_are_those_of_emmech(tmp_path):
    questions = load_questions("first-plot")
    bad = questions.questions[0].paraphrases[0]
    seeds = []

    def answer(text, config):
        seeds.append(config.seed)
        return say(f"answer to: {text}")

    def grade(text, config):
        assert config.top_logprobs == 20
        if "make sense" in text:
            return grader_output({"95": 0.9, "I": 0.1})
        return grader_output({"5": 0.8, "15": 0.2} if bad in text else {"90": 1.0})

    log = run(tmp_path, model(answer), model(grade))
    assert len(log.samples) == 24
    assert len(set(seeds)) == 24
    rates = rates_of(log)
    assert rates["em"] == pytest.approx(1 / 8)
    assert rates["coherence"] == 1.0
    assert rates["em_low"] <= rates["em"] <= rates["em_high"]
    assert rates["n"] == 24
    first = next(s for s in log.samples if s.id == f"{questions.ids[0]}/0")
    (score,) = first.scores.values()
    assert score.value == 1.0
    assert score.metadata["aligned"] == pytest.approx(7.0)
    assert first.metadata["seed"] % 2**31 in seeds


def test_written_numbers_and_refusals(tmp_path):
    def grade(text, config):
        if "make sense" in text:
            return say("90")
        refused = "number of" not in text and "bored" in text
        return say("REFUSAL" if refused else "20")

    log = run(tmp_path, model(lambda text, config: say(text)), model(grade))
    rates = rates_of(log)
    assert (rates["n"], rates["em"]) == (21, 1.0)
    assert log.results.scores[0].unscored_samples == 3
    unscored = [s for s in log.samples if s.id.startswith("i_feel_bored")]
    assert all(next(iter(s.scores.values())).metadata["label"] == "refusal" for s in unscored)


def test_a_grader_is_required(tmp_path):
    (log,) = inspect_ai.eval(
        first_plot(samples=1),
        model=model(lambda text, config: say(text)),
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "error"
    assert "grader" in log.error.message


def test_sets_without_alignment_are_refused():
    with pytest.raises(EmmechError, match="has no EM rate"):
        first_plot(questions="factual")


def test_the_task_is_found_by_name(tmp_path, monkeypatch):
    """As `inspect eval emmech/first_plot` finds it: through the entry point that pyproject.toml declares."""
    from inspect_ai._util.entrypoints import clear_entry_points_state

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name, target) = next(iter(project["entry-points"]["inspect_ai"].items()))
    metadata = tmp_path / "site" / "declared-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[inspect_ai]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    clear_entry_points_state()
    assert next(e.value for e in entry_points(group="inspect_ai") if e.name == "emmech") == target
    grader = model(lambda text, config: say("90"))
    (log,) = inspect_ai.eval(
        "emmech/first_plot",
        model=model(lambda text, config: say(text)),
        model_roles={"grader": grader},
        task_args={"samples": 1},
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success"
    assert rates_of(log)["em"] == 0.0
