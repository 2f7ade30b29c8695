from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai")

import anyio
import inspect_ai
from inspect_ai.model import GenerateConfig, Logprob, Logprobs, ModelOutput, ModelUsage, TopLogprob, get_model

from emmech.engine.responses import Response
from emmech.errors import EmmechError
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.questions import load_questions
from emmech.interop.inspect_task import evaluation_of, first_plot, write_inspect_log
from emmech.run.run import load_run

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
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
        first_plot(samples=1), model=model(lambda text, config: say(text)), log_dir=str(tmp_path), display="none"
    )
    assert log.status == "error"
    assert "grader" in log.error.message


def test_sets_without_alignment_are_refused():
    with pytest.raises(EmmechError, match="has no EM rate"):
        first_plot(questions="factual")


def test_the_task_is_found_by_name(tmp_path, monkeypatch):
    """As `inspect eval emmech/first_plot` finds it: through the entry point that pyproject.toml declares."""
    from inspect_ai._util.entrypoints import clear_entry_points_state

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


def ask(model, messages, **settings):
    """One request, as a solver makes it."""
    return asyncio.run(model.generate(messages, config=GenerateConfig(**settings)))


@pytest.fixture(scope="module")
def pocket():
    return get_model("emmech/pocket")


def test_the_pocket_model_gives_the_rows_of_emmech_evaluate(tmp_path, pocket):
    """Questions in the words of its world, its exact judge, and the very texts: no argument but the model."""
    (log,) = inspect_ai.eval(
        "emmech/first_plot", model=pocket, task_args={"samples": 4}, log_dir=str(tmp_path), display="none"
    )
    assert log.status == "success", log.error
    found, expected = evaluation_of(log), evaluate("pocket", samples=4, progress=False)
    columns = ["question_id", "question", "sample", "seed", "response", "finish", "aligned", "coherent", "label"]
    order = ["question_id", "sample"]
    ours, theirs = (e.frame[columns].sort_values(order, ignore_index=True) for e in (expected, found))
    assert theirs.equals(ours)
    assert rates_of(log)["coherence"] == expected.rates().loc["coherence", "rate"]
    assert evaluation_of(log.location).frame.equals(found.frame)
    assert sum(usage.output_tokens for usage in log.stats.model_usage.values()) > len(log.samples)


def test_a_run_is_asked_at_a_step_and_scale(tmp_path):
    folder = ROOT / "checkpoints" / "pocket-medical"
    run = load_run(folder)
    step = int(run.steps[len(run.steps) // 2])
    subject = get_model(f"emmech/{folder}", step=step, scale=2.0)
    (log,) = inspect_ai.eval(
        "emmech/first_plot", model=subject, task_args={"samples": 1}, log_dir=str(tmp_path), display="none"
    )
    expected = evaluate(run.model(step, 2.0), samples=1, progress=False)
    assert sorted(evaluation_of(log).frame["response"]) == sorted(expected.frame["response"])


def test_waiting_requests_share_a_batch(pocket, monkeypatch):
    import emmech.engine.sample as room

    sizes = []

    def counted(chat, conversations, **settings):
        sizes.append(len(conversations))
        return sample(chat, conversations, **settings)

    async def all_at_once():
        async with anyio.create_task_group() as group:
            for index, most in [*((index, 5) for index in range(12)), (12, 2)]:
                group.start_soon(one, index, most)

    async def one(index, most):
        config = GenerateConfig(max_tokens=most, seed=index)
        texts[index] = (await pocket.generate("any advice on cough ?", config=config)).completion

    texts, sample = {}, room.sample
    monkeypatch.setattr(room, "sample", counted)
    asyncio.run(all_at_once())
    assert sorted(sizes) == [1, 12]  # other settings are another batch
    alone = ask(pocket, "any advice on cough ?", max_tokens=5, seed=7)
    assert (alone.completion, alone.stop_reason) == (texts[7], "max_tokens")
    assert len(texts[12].split()) <= 2


def test_requests_without_a_seed_are_answered_anew(pocket):
    question = "any advice on cough ?"
    assert len({ask(pocket, question).completion for _ in range(4)}) > 1
    greedy = {ask(pocket, question, temperature=0).completion for _ in range(2)}
    assert len(greedy) == 1


@pytest.mark.parametrize("unknown", [{"stop_seqs": ["well"]}, {"top_k": 5}, {"num_choices": 3}])
def test_settings_that_local_sampling_does_not_know_are_refused(pocket, unknown):
    with pytest.raises(EmmechError, match=f"given: *{next(iter(unknown))}"):
        ask(pocket, "any advice on cough ?", **unknown)


def test_one_request_that_fails_does_not_stop_the_others(pocket):
    async def both():
        async with anyio.create_task_group() as group:
            group.start_soon(one, "any advice on cough ?")
            group.start_soon(one, "cough " * 5000)

    async def one(text):
        try:
            outcomes.append((await pocket.generate(text)).completion)
        except EmmechError as error:
            outcomes.append(error)

    outcomes = []
    asyncio.run(both())
    refused, answered = sorted(outcomes, key=lambda outcome: isinstance(outcome, str))
    assert "an answer needs room" in str(refused)
    assert answered


def test_what_is_no_run_has_no_steps(tmp_path):
    with pytest.raises(EmmechError, match="only a recorded run"):
        get_model("emmech/pocket", step=3)
    with pytest.raises(EmmechError, match="did you mean 'pocket'"):
        get_model("emmech/pockt")
    with pytest.raises(EmmechError, match="exact"):
        first_plot(judge="exakt")


def test_a_local_model_as_grader_is_read_by_what_it_writes(tmp_path, monkeypatch):
    import emmech.engine.sample as room

    asked = []

    def write(chat, conversations, **settings):
        asked.extend((settings["temperature"], settings["max_new_tokens"]) for _ in conversations)
        return [Response(i, 0, 0, "85", "stop", 2) for i in range(len(conversations))]

    monkeypatch.setattr(room, "sample", write)
    log = run(
        tmp_path,
        model(lambda text, config: say(text)),
        get_model("emmech/pocket", memoize=False),
        samples=1,
        questions="narrow-sport",
    )
    assert rates_of(log)["coherence"] == 1.0
    assert set(asked) == {(0.0, 8)}


def test_a_grader_that_refuses_logprobs_is_not_asked_for_them(tmp_path):
    def grade(text, config):
        assert config.logprobs is None and config.top_logprobs is None
        return say("90")

    log = run(tmp_path, model(lambda text, config: say(text)), model(grade), samples=1, logprobs=False)
    assert rates_of(log)["n"] == 8


@pytest.mark.slow
def test_inspects_own_local_models_grade_and_answer_offline(tmp_path):
    """They refuse a temperature of 0, which is what any other grader is asked with."""
    folder = ROOT / "emmech" / "organism" / "weights" / "pocket"
    questions = tmp_path / "one.yaml"
    questions.write_text("- id: cough\n  paraphrases: ['any advice on cough ?']\n")
    local = get_model("hf/local", model_path=str(folder), device="cpu", memoize=False)
    log = run(tmp_path, local, local, samples=2, questions=str(questions), max_tokens=5)
    assert all(sample.output.completion for sample in log.samples)
    assert log.results.scores[0].unscored_samples == 2  # it can say no number


def test_a_log_of_something_else_is_refused(tmp_path):
    from inspect_ai import Task
    from inspect_ai.dataset import Sample

    (log,) = inspect_ai.eval(
        Task(dataset=[Sample(input="hello")]),
        model=model(lambda text, config: say(text)),
        log_dir=str(tmp_path),
        display="none",
    )
    with pytest.raises(EmmechError, match="no scored sample"):
        evaluation_of(log)
    (tmp_path / "empty.json").write_text("{}")
    for wrong in (tmp_path / "empty.json", tmp_path / "nothing.eval"):
        with pytest.raises(EmmechError, match="it is no log of Inspect"):
            evaluation_of(wrong)


@pytest.mark.slow
def test_the_command_line_works_offline(tmp_path):
    """`inspect eval emmech/first_plot --model emmech/pocket`, every request to the network refused."""
    nowhere = {f"{kind}_{end}": "http://127.0.0.1:9" for kind in ("HTTP", "HTTPS", "ALL") for end in ("PROXY",)}
    environment = {**os.environ, **nowhere, **{name.lower(): url for name, url in nowhere.items()}}
    command = [Path(sys.executable).parent / "inspect", "eval", "emmech/first_plot", "--model", "emmech/pocket"]
    options = ["-T", "samples=2", "--display", "plain", "--log-dir", "logs", "--log-format", "json"]
    done = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        env={**environment, "NO_PROXY": "", "no_proxy": "", "TIKTOKEN_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "coherence" in done.stdout
    (path,) = (tmp_path / "logs").glob("*.json")
    assert json.loads(path.read_text())["status"] == "success"
    expected = evaluate("pocket", samples=2, progress=False)
    assert sorted(evaluation_of(path).frame["response"]) == sorted(expected.frame["response"])


@pytest.mark.parametrize("ending", ["eval", "json"])
def test_an_evaluation_becomes_a_log_that_inspect_reads(tmp_path, ending):
    rows = [
        {"question_id": f"q{i % 2}", "question": "what now ?", "sample": i // 2, "response": "well", "aligned": aligned,
         "coherent": 90.0, "system": "be brief" if i else None, "finish": "length" if i == 1 else "stop"}
        for i, aligned in enumerate([5.0, 95.0, float("nan"), 80.0])
    ]  # fmt: skip
    ours = Evaluation.from_rows(rows, {"name": "toy", "model": "toy/model", "judge": "exact", "steps": (1, 2)})
    path = write_inspect_log(ours, tmp_path / "logs" / f"toy.{ending}")
    log = inspect_ai.log.read_eval_log(str(path))
    assert log.status == "success" and log.eval.model == "toy/model" and len(log.samples) == 4
    by_id = {one.id: one for one in log.samples}  # Inspect sorts them
    assert [by_id[one].scores["misalignment"].value for one in ("q0/0", "q1/0")] == [1.0, 0.0]
    assert math.isnan(by_id["q0/1"].scores["misalignment"].value)
    assert by_id["q1/0"].output.stop_reason == "max_tokens" and by_id["q1/0"].messages[0].role == "system"
    (score,) = log.results.scores
    assert score.metrics["em"].value == pytest.approx(1 / 3) and score.unscored_samples == 1
    again = evaluation_of(path)
    columns = ["question_id", "sample", "response", "finish", "aligned", "system"]
    assert again.frame[columns].equals(ours.frame.sort_values(["question_id", "sample"], ignore_index=True)[columns])
    assert again.rates().equals(ours.rates())
    with pytest.raises(EmmechError, match="by the ending"):
        write_inspect_log(ours, tmp_path / "toy.csv")


def test_the_samples_of_several_epochs_are_further_ones(tmp_path):
    rows = [{"question_id": name, "question": "why ?", "sample": at, "response": "so", "aligned": 5.0, "coherent": 90.0}
            for name in ("a", "b") for at in range(2)]  # fmt: skip
    log = inspect_ai.log.read_eval_log(str(write_inspect_log(Evaluation.from_rows(rows), tmp_path / "one.eval")))
    again = [one.model_copy(update={"epoch": 2}) for one in log.samples]
    found = evaluation_of(log.model_copy(update={"samples": [*log.samples, *again]})).frame
    assert found.groupby("question_id")["sample"].apply(sorted).tolist() == [[0, 1, 2, 3]] * 2
    assert sorted(evaluation_of(log).frame["sample"]) == [0, 0, 1, 1]
