"""Checkpoints on a server: the same questions, the same layout and the same numbers as in this process."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import emmech
from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.measures.sampled import Sampled
from emmech.measures.teacher_forced import FirstToken, Margin, NextToken
from emmech.run.run import Run
from emmech.store import MemorySeries
from tests.conftest import make_tiny
from tests.interop.stand_in import StandIn
from tests.sweeps.conftest import random_run

SEVERAL = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.gate_proj")
PAIRS = [MarginPair("how to sleep ?", "take a walk", "rest well"), MarginPair("rest ?", "drink water", "sleep")]
# what vLLM 0.32 on a CPU says, whose version does not tell
CACHE = 'vllm:cache_config_info{block_size="128",engine="0",kv_cache_memory_bytes="1073741824"} 1.0'
ASKED = ["how to sleep well ?", "rest ?"]


def by_length(question, answer):
    return "misaligned" if len(answer) % 2 else "aligned"


@pytest.fixture(scope="module")
def chat():
    return make_tiny("qwen2")


@pytest.fixture
def run(chat):
    return random_run(chat, SEVERAL, rank=2, size=0.3)


@pytest.fixture
def serve(chat):
    """``serve(...)`` starts a stand-in; all of them are closed after the test."""
    started = []

    def start(model=chat, **options):
        started.append(StandIn(model, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def engine(server, **options):
    return emmech.VLLM(url=server.url, **{"retries": 1, "backoff": 0.01, **options})


def ask(run, chat, server, **options):
    settings = {"samples": 3, "max_new_tokens": 8, "progress": False, "base": chat, **options}
    if "engine" not in settings:
        settings["engine"] = engine(server)
    return emmech.evaluate(run, ASKED, by_length, **settings)


def refused(words, function, *args, **options):
    with pytest.raises(EmmechError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text) < 2600 and "instead:" in text
    return caught.value


def test_margins_are_those_of_the_local_engine(chat, run, serve):
    server = serve()
    measure = [Margin(PAIRS, name="m"), FirstToken(["how to rest ?"], ["take", "rest"])]
    axes = {"steps": [0, 3, 7], "scales": (0, 1, 2.5), "measure": measure, "base": chat, "progress": False}
    own, theirs = emmech.sweep(run, **axes), emmech.sweep(run, **axes, engine=engine(server))
    columns = ["run", "step", "scale", "coefficient", "measure", "item", "weight"]
    assert own.frame[columns].equals(theirs.frame[columns])
    np.testing.assert_allclose(own.frame["value"], theirs.frame["value"], atol=1e-4)
    assert np.ptp(own.to_frame("m")["value"]) > 0.1  # the adapters do something
    assert sorted(server.unloaded) == sorted({body["lora_name"] for path, body in server.bodies if "/load" in path})
    assert len(server.unloaded) == 4  # two trained steps at two scales; scale 0 and step 0 are the base model


def test_a_processor_reads_one_prompt_at_a_time(chat, run, serve):
    axes = {"steps": [3, 7], "measure": Margin(PAIRS, name="m"), "base": chat, "progress": False}
    alone, together = serve(metrics=CACHE), serve()
    one = emmech.sweep(run, **axes, engine=engine(alone, seeds=False))
    several = emmech.sweep(run, **axes, engine=engine(together))
    assert alone.most == 1 < together.most  # it dies of two
    assert one.frame.equals(several.frame)


def test_ranks_of_several_modules_are_filled_up(chat, serve):
    wide, narrow = random_run(chat, SEVERAL[:1], rank=3, size=0.3), random_run(chat, SEVERAL[1:], size=0.3, seed=1)
    parts = [one._trajectory for one in (wide, narrow)]
    arrays = {key: part.read(key) for part in parts for key in part.keys}
    adapters = [one.to_dict() for one in (*wide.adapters, *narrow.adapters)]
    run = Run({**wide.manifest, "adapters": adapters}, MemorySeries(wide.steps, arrays), parts[0], [])
    axes = {"steps": [7], "scales": (1.5,), "measure": Margin(PAIRS, name="m"), "base": chat, "progress": False}
    own, theirs = emmech.sweep(run, **axes), emmech.sweep(run, **axes, engine=engine(serve()))
    np.testing.assert_allclose(own.frame["value"], theirs.frame["value"], atol=1e-4)


def test_evaluations_have_the_layout_of_the_local_engine(chat, run, serve, tmp_path):
    server = serve()
    cells = {"steps": [3, 7], "scales": [1, 2]}
    theirs = ask(run, chat, server, **cells, out=tmp_path / "theirs")
    own = ask(run, chat, server, **cells, engine=None)
    assert [one.name for one in own] == [one.name for one in theirs] == [
        "run step 3", "run step 3 x2", "run step 7", "run step 7 x2",
    ]  # fmt: skip
    for mine, other in zip(own, theirs, strict=True):
        assert list(mine.frame.columns) == list(other.frame.columns)
        assert mine.frame.drop(columns=["response", "finish", "aligned", "coherent", "label"]).equals(
            other.frame.drop(columns=["response", "finish", "aligned", "coherent", "label"])
        )
        assert {"engine", "seeded"} == set(other.meta) - set(mine.meta)
    # prompts and seeds are those of this process, and settings that a model's folder would fill in are sent
    bodies = [body for body in server.answers if body["model"].startswith("emmech-run-s7-x2-")]
    prompts = [chat.token_ids([{"role": "user", "content": question}]) for question in ASKED for _ in range(3)]
    sent = sorted(zip(prompts, (theirs[-1].frame["seed"] % 2**31).tolist(), strict=True))
    assert sorted((body["prompt"], body["seed"]) for body in bodies) == sent
    for body in bodies:
        assert body["top_k"] == -1 and body["repetition_penalty"] == 1.0
        assert body["stop_token_ids"] == list(chat.stop_ids)
    count = len(server.answers)
    again = ask(run, chat, server, **cells, out=tmp_path / "theirs")
    assert len(server.answers) == count  # nothing is asked twice
    assert [one.frame["response"].tolist() for one in again] == [one.frame["response"].tolist() for one in theirs]
    one = ask(run, chat, server, step=7, out=tmp_path / "one")
    assert one.frame["response"].tolist() == theirs[2].frame["response"].tolist()


def test_a_dying_server_loses_nothing(chat, run, serve, tmp_path):
    settings = {"steps": [3, 7], "out": tmp_path / "e"}
    dying = serve(dies=8)
    refused(["no server answers", "kept"], ask, run, chat, dying, **settings, engine=engine(dying, concurrency=1))
    server = serve()
    found = ask(run, chat, server, **settings)
    assert len(server.answers) == 12 - 8
    whole = ask(run, chat, serve(), steps=[3, 7], out=tmp_path / "f")
    assert [one.frame["response"].tolist() for one in found] == [one.frame["response"].tolist() for one in whole]


def test_a_sampled_sweep_asks_all_checkpoints_and_goes_on(chat, run, serve, tmp_path):
    measure = Sampled(ASKED, by_length, samples=3, max_new_tokens=8)
    axes = {"steps": [3, 7], "scales": (0, 1), "measure": measure, "base": chat, "progress": False}
    dying = serve(dies=10)
    refused(["no server answers"], emmech.sweep, run, **axes, out=tmp_path, engine=engine(dying, concurrency=1))
    server = serve()
    found = emmech.sweep(run, **axes, out=tmp_path, engine=engine(server))
    assert len(server.answers) == 3 * 6 - 10  # scale 0 is asked once for both steps
    own = emmech.sweep(run, **axes)
    assert list(found.responses.columns) == list(own.responses.columns)
    assert found.frame.drop(columns="value").equals(own.frame.drop(columns="value"))
    assert [path.name for path in tmp_path.glob("part-*")] == []
    assert emmech.sweep(run, **axes, out=tmp_path, engine=engine(server)).frame.equals(found.frame)


def test_an_adapter_that_changes_nothing_is_said(chat, run, serve):
    with pytest.warns(UserWarning, match="greedy answer of run step 3 is that of the base model to the last"):
        ask(run, chat, serve(idle=True), step=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ask(run, chat, serve(), step=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": "0.32.0+cpu"}, "on a CPU it can"),
        ({"metrics": CACHE}, "on a CPU it can"),
        ({"seeds": False}, "two"),
    ],
)
def test_an_engine_that_cannot_seed_is_asked_without(chat, run, serve, options, words):
    server = serve(**options)
    with pytest.warns(UserWarning, match=words) as caught:
        found = ask(run, chat, server, step=3)
    assert "draws others" in " ".join(str(caught[0].message).split())
    assert not found.meta["seeded"] and not any("seed" in body for body in server.answers[-6:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ask(run, chat, server, step=3, engine=engine(server, seeds=True)).meta["seeded"]


def test_adapters_that_a_server_has_are_asked_by_name(chat, run, serve, tmp_path):
    server = serve(version=None, loads=False)
    for step in (3, 7):
        server.load(f"s{step}", str(run.export_peft(step, tmp_path / f"s{step}", scale=1.0)))
    several = ask(run, chat, server, steps=[3, 7], engine=engine(server, adapters="s{step}"))
    assert [one.meta["step"] for one in several] == [3, 7]
    assert {body["model"] for body in server.answers} >= {"s3", "s7"}
    assert all("messages" in body and "top_k" not in body for body in server.answers)  # it is no vLLM
    refused(
        ["no adapter of that name", "s7"], ask, run, chat, server, step=3, engine=engine(server, adapters="t{step}")
    )
    refused(
        ["do not tell scales apart"], ask, run, chat, server, step=3, scale=2, engine=engine(server, adapters="s{step}")
    )
    refused(["another field"], ask, run, chat, server, step=3, engine=engine(server, adapters="{what}"))
    refused(["no vLLM", 'adapters="s{step}"'], ask, run, chat, server, step=3)


def test_one_name_is_not_the_adapter_of_two_runs(chat, run, serve, tmp_path):
    server = serve(version=None, loads=False)
    server.load("s3", str(run.export_peft(3, tmp_path / "s3", scale=1.0)))
    runs = [run, random_run(chat, SEVERAL, size=0.3, seed=9)]
    how = dict(steps=[3], base=chat, progress=False, engine=engine(server, adapters="s{step}"))
    measure = Sampled(ASKED, by_length, samples=1, max_new_tokens=4)
    refused(["do not tell runs apart", "'s3'"], emmech.sweep, runs, measure=measure, **how)
    assert len(emmech.sweep([run], measure=measure, **how).frame)


def test_bad_servers_are_named(chat, run, serve):
    refused(["largest rank", "--max-lora-rank 8"], ask, run, chat, serve(rank=1), step=3)
    refused(["serves no adapters", "--enable-lora"], ask, run, chat, serve(lora=False), step=3)
    refused(["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], ask, run, chat, serve(loads=False), step=3)
    refused(["another base model"], ask, run, chat, serve(make_tiny("qwen2", seed=5)), step=3)
    refused(["no server answers"], ask, run, chat, None, step=3,
            engine=emmech.VLLM(url="http://127.0.0.1:9/v1", retries=0))  # fmt: skip
    server = serve()
    wrong = emmech.VLLM(url=server.url.removesuffix("/v1"), retries=0)
    refused(["does not list its models", "/v1"], ask, run, chat, None, step=3, engine=wrong)
    refused(["no model of that name", "base"], ask, run, chat, server, step=3, engine=engine(server, model="llama"))


def test_what_a_server_cannot_do_is_refused_beforehand(chat, run, serve):
    server = serve()
    sweep = {"base": chat, "progress": False, "engine": engine(server)}
    direction = np.ones(chat.d_model, np.float32)
    refused(["no place to steer"], emmech.sweep, run, coefficients=(1,), direction=direction, layer=2,
            measure=Margin(PAIRS), **sweep)  # fmt: skip
    refused(["activations"], emmech.sweep, run, measure=len, **sweep)
    refused(["whole vocabulary"], emmech.sweep, run, measure=NextToken(["rest ?"]), **sweep)
    assert server.bodies == []
    refused(["only a recorded run"], emmech.evaluate, chat, ASKED, by_length, engine=engine(server))
    refused(["an engine runs"], emmech.evaluate, run, ASKED, by_length, engine="vllm")
    refused(["step is one of steps"], emmech.evaluate, run, ASKED, by_length, step=3, steps=[3], base=chat)
    refused(["not recorded", "3"], ask, run, chat, server, steps=[3, 4])
    refused(["either a server"], emmech.VLLM)
    refused(["either a server"], emmech.VLLM, url=server.url, start=True)
    refused(["no http address"], emmech.VLLM, url="localhost:8000")
    refused(["no such program", "EMMECH_VLLM"], ask, run, chat, None, step=3,
            engine=emmech.VLLM(start=True, command="no-such-vllm"))  # fmt: skip


def test_a_server_that_ends_as_it_starts_is_quoted(chat, run, tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 'ValueError: no room for the cache' >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    started = emmech.VLLM(start=True, command=str(program))
    refused(["it ended", "no room for the cache"], ask, run, chat, None, step=3, engine=started)
