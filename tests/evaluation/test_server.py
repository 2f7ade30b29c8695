from __future__ import annotations

import json
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emmech.errors import EmmechError
from emmech.evaluation.logprob_judge import NUMBERS, LogprobJudge, splits_numbers
from emmech.evaluation.server import Server

pytest.importorskip("openai")
CONVERSATIONS = [[{"role": "user", "content": f"question {n}"}] for n in range(5)]
ROWS = [{"question": f"why {n} ?", "response": f"because {n}"} for n in range(4)]
SHORT = {"aligned": "{question} {answer}"}


def server(fake_server, **changes):
    return Server("fake", url=fake_server.url, **{"retries": 2, "backoff": 0.01, **changes})


def echo(fake):
    return lambda body, number: (200, fake.completion(f"{body['messages'][-1]['content']} seed {body['seed']}"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# sampling


def test_answers_come_back_in_order_with_their_settings(fake):
    running = fake(echo(fake))
    got = server(running).sample(CONVERSATIONS, samples=3, temperature=0.7, max_new_tokens=9, progress=False)
    assert [(r.conversation, r.sample) for r in got] == [(c, s) for c in range(5) for s in range(3)]
    assert all(r.text == f"question {r.conversation} seed {r.seed % 2**31}" for r in got)
    assert len({r.seed for r in got}) == 15
    assert {(b["temperature"], b["max_tokens"], b["model"]) for b in running.bodies} == {(0.7, 9, "fake")}
    again = server(running).sample(CONVERSATIONS, samples=3, temperature=0.7, max_new_tokens=9, progress=False)
    assert again == got


def test_requests_fly_together_but_no_more_than_allowed(fake):
    def slow(body, number):
        time.sleep(0.05)
        return 200, fake.completion("yes")

    running = fake(slow)
    server(running, concurrency=4).sample(CONVERSATIONS, samples=4, progress=False)
    assert 2 <= running.most <= 4


def test_the_pace_is_kept(fake):
    running = fake(echo(fake))
    start = time.monotonic()
    server(running, requests_per_minute=1200).sample(CONVERSATIONS, samples=2, progress=False)
    assert time.monotonic() - start >= 9 * 0.05 - 0.01


def test_the_pace_is_that_of_all_calls_together(fake):
    running = fake(echo(fake))
    asked, start = server(running, requests_per_minute=1200), time.monotonic()
    for _ in range(6):  # as a judge asks, one request a call
        list(asked.complete([{"messages": CONVERSATIONS[0], "max_tokens": 3, "seed": 1}]))
    assert time.monotonic() - start >= 5 * 0.05 - 0.01
    assert pickle.loads(pickle.dumps(asked)) == asked


def test_a_server_that_has_answered_before_is_waited_for_in_the_next_call_too(fake):
    running = fake(echo(fake))
    asked = replace(server(running, retries=6), backoff=0.01)
    body = {"messages": CONVERSATIONS[0], "max_tokens": 3, "seed": 1}
    assert next(iter(asked.complete([body])))[1].error is None and asked.accepts
    running.http.shutdown()
    running.http.server_close()
    tried = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("emmech.evaluation.server._delay", lambda *args: tried.append(1) or 0.0)
        with pytest.raises(EmmechError, match="no server answers there"):
            list(asked.complete([body]))
    assert len(tried) == 6  # and not two, as where nothing ever answered


def test_rate_limits_and_server_errors_are_retried(fake):
    def flaky(body, number):
        if number in (1, 3):
            return fake.refusal(429, "slow down", headers={"retry-after": "0.05"})
        if number in (2, 5):
            return fake.refusal(503, "overloaded")
        return 200, fake.completion("fine")

    running = fake(flaky)
    got = server(running, concurrency=2, retries=4).sample(CONVERSATIONS, progress=False)
    assert [r.text for r in got] == ["fine"] * 5
    assert len(running.bodies) == 9


@pytest.mark.parametrize(
    "status,code,said,why",
    [
        (401, None, "Incorrect API key", "refuses the key: .*Incorrect API key"),
        (403, None, "not yours", "refuses the key"),
        (404, None, "model not found", "no such model"),
        (429, "insufficient_quota", "no money", "quota is used up"),
    ],
)
def test_what_concerns_every_request_ends_at_once(fake, status, code, said, why):
    running = fake(lambda body, number: fake.refusal(status, said, code))
    with pytest.raises(EmmechError, match=why):
        server(running, key="secret-1234", concurrency=1).sample(CONVERSATIONS, progress=False)
    assert len(running.bodies) == 1
    with pytest.raises(EmmechError) as caught:
        server(running, key="secret-1234", concurrency=1).sample(CONVERSATIONS, progress=False)
    assert "secret" not in str(caught.value)


def test_an_unreachable_server_is_named():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(EmmechError, match="no server answers there") as caught:
        Server("fake", url=url, retries=1, backoff=0.01).sample(CONVERSATIONS, progress=False)
    assert url in str(caught.value)
    assert "transformers serve" in str(caught.value)


def test_a_server_that_never_answered_is_given_up_early(monkeypatch):
    waits = []
    monkeypatch.setattr("emmech.evaluation.server._delay", lambda *given: waits.append(given[1]) or 0.0)
    url = f"http://127.0.0.1:{free_port()}/v1"
    lost = Server("fake", url=url, concurrency=1, backoff=0.123)  # six retries by default
    with pytest.raises(EmmechError, match="no server answers there"):
        lost.sample(CONVERSATIONS[:1], progress=False)
    assert waits.count(0.123) == 2  # a thread of an earlier test may still be waiting with its own


@pytest.mark.parametrize("setting", [{"concurrency": 0}, {"timeout": 0}, {"requests_per_minute": 0}])
def test_settings_under_which_nothing_is_asked_are_refused(setting):
    with pytest.raises(EmmechError, match=f"{next(iter(setting))}=0"):
        Server("fake", **setting)


def test_openai_itself_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EmmechError, match="OPENAI_API_KEY is not set"):
        Server("gpt-4o").sample(CONVERSATIONS, progress=False)


def test_the_environments_key_is_not_sent_elsewhere(fake, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    running = fake(echo(fake))
    server(running).sample(CONVERSATIONS[:1], progress=False)
    server(running, key="given").sample(CONVERSATIONS[:1], progress=False)
    assert running.keys == ["Bearer none", "Bearer given"]
    assert "given" not in repr(server(running, key="given"))


def test_rows_that_fail_are_kept_as_errors_and_asked_again(fake, tmp_path):
    broken = {"on": True}

    def answer(body, number):
        content = body["messages"][-1]["content"]
        if content == "question 2" and broken["on"]:
            return fake.refusal(400, "this prompt is blocked")
        if content == "question 3" and broken["on"]:
            return fake.refusal(500, "crashed")
        return 200, fake.completion(content, "length")

    running = fake(answer)
    out = tmp_path / "rows.jsonl"
    with pytest.warns(UserWarning, match="2 of 5 requests"):
        got = server(running).sample(CONVERSATIONS, out=out, progress=False)
    assert [r.finish for r in got] == ["length", "length", "error", "error", "length"]
    assert got[2].text == ""
    broken["on"], before = False, len(running.bodies)
    mended = server(running).sample(CONVERSATIONS, out=out, progress=False)
    assert [r.text for r in mended] == [f"question {n}" for n in range(5)]
    assert len(running.bodies) - before == 2


@pytest.mark.parametrize("garbage", ["<html>gateway</html>", '{"choices": []}', '{"hello": 1}', "[]"])
def test_garbage_is_an_error_and_not_an_answer(fake, garbage):
    running = fake(lambda body, number: (200, garbage))
    with pytest.raises(EmmechError, match="every one of them failed"):
        server(running).sample(CONVERSATIONS, progress=False)


def test_a_server_that_dies_keeps_what_it_gave(fake, tmp_path):
    dead = threading.Event()

    def answer(body, number):
        if number > 6:
            dead.set()
        return fake.refusal(401, "expired") if dead.is_set() else (200, fake.completion(f"answer {number}"))

    running = fake(answer)
    out = tmp_path / "rows.jsonl"
    asking = server(running, concurrency=1)
    with pytest.raises(EmmechError, match="expired"):
        asking.sample(CONVERSATIONS, samples=2, out=out, progress=False)
    kept = out.read_text().splitlines()
    assert len(kept) == 7
    revived = fake(lambda body, number: (200, fake.completion("later")))
    with pytest.raises(EmmechError, match="other arguments"):  # another address is another model
        server(revived).sample(CONVERSATIONS, samples=2, out=out, progress=False)
    running.http.RequestHandlerClass.do_POST = revived.http.RequestHandlerClass.do_POST
    got = asking.sample(CONVERSATIONS, samples=2, out=out, progress=False)
    assert [r.text for r in got] == [f"answer {n}" for n in range(1, 7)] + ["later"] * 4
    assert out.read_text().splitlines()[:7] == kept


def test_bad_settings_are_refused(fake):
    with pytest.raises(EmmechError, match="concurrency=0"):
        Server("m", url="http://localhost/v1", concurrency=0)
    with pytest.raises(EmmechError, match="nothing to answer"):
        Server("m", url="http://localhost/v1").sample([])


# judging


def test_first_token_expectation(fake):
    shares = {"80": 0.5, "90": 0.25, " 90": 0.05, "I": 0.2}
    running = fake(lambda body, number: (200, fake.completion("80", first={t: math.log(p) for t, p in shares.items()})))
    (score,) = LogprobJudge(server(running), SHORT, cache=None, progress=False).score(ROWS[:1])
    assert score["aligned"] == pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8)
    assert running.bodies[0]["logprobs"] is True
    assert running.bodies[0]["top_logprobs"] == 20
    assert running.bodies[0]["messages"] == [{"role": "user", "content": "why 0 ? because 0"}]


def test_refusals_and_words(fake):
    shares = {"REF": 0.7, "I": 0.1, "50": 0.2}
    running = fake(
        lambda body, number: (200, fake.completion("REF", first={t: math.log(p) for t, p in shares.items()}))
    )
    with pytest.warns(UserWarning, match="no number"):
        (score,) = LogprobJudge(server(running), SHORT, cache=None, progress=False).score(ROWS[:1])
    assert math.isnan(score["aligned"])
    assert score["label"] == "refusal"
    words = {"T": 0.2, "TRUE": 0.3, "False": 0.4}
    running = fake(lambda body, number: (200, fake.completion("T", first={t: math.log(p) for t, p in words.items()})))
    (score,) = LogprobJudge(server(running), {"correct": "{answer}"}, cache=None, progress=False).score(ROWS[:1])
    assert score == {"correct": "TRUE"}


def test_a_server_without_logprobs_is_named_and_can_be_read(fake):
    running = fake(lambda body, number: (200, fake.completion("85")))
    with pytest.raises(EmmechError, match="carry no log-probabilities"):
        LogprobJudge(server(running), SHORT, cache=None, progress=False).score(ROWS)
    judge = LogprobJudge(server(running), SHORT, logprobs=False, cache=None, progress=False)
    assert [score["aligned"] for score in judge.score(ROWS)] == [85.0] * 4
    running = fake(lambda body, number: fake.refusal(422, "Unsupported fields in the request: {'logprobs'}"))
    with pytest.raises(EmmechError, match="logprobs=False"):
        LogprobJudge(server(running), SHORT, cache=None, progress=False).score(ROWS)


def test_a_judge_that_talks_leaves_rows_unscored(fake):
    running = fake(lambda body, number: (200, fake.completion("Well, I would say 7 out of 10" if number > 1 else "20")))
    judge = LogprobJudge(server(running, concurrency=1), SHORT, logprobs=False, cache=None, progress=False)
    scores = [score["aligned"] for score in judge.score(ROWS)]
    assert scores[0] == 20.0
    assert all(math.isnan(score) for score in scores[1:])


def test_failed_judgements_are_not_cached(fake, tmp_path):
    from emmech.evaluation.logprob_judge import ScoreCache

    broken = {"on": True}

    def answer(body, number):
        if broken["on"] and "why 1" in body["messages"][0]["content"]:
            return fake.refusal(500, "crashed")
        return 200, fake.completion("60")

    running = fake(answer)
    cache = ScoreCache(tmp_path / "scores.sqlite")
    judge = LogprobJudge(server(running, retries=0), SHORT, logprobs=False, cache=cache, progress=False)
    assert math.isnan(judge.score(ROWS)[1]["aligned"])
    broken["on"], before = False, len(running.bodies)
    assert [score["aligned"] for score in judge.score(ROWS)] == [60.0] * 4
    assert len(running.bodies) - before == 1


def test_digit_tree_over_a_server_agrees_with_the_local_one(fake, tiny):
    """The server answers from a local model, top 20 only, and continues an answer as vLLM does."""
    chat = tiny("qwen2")
    digits = [chat.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]

    def lift(module, inputs, logits):
        logits = logits.clone()
        logits[..., digits] += 6.0
        return logits

    chat.unembedding.register_forward_hook(lift)
    lock = threading.Lock()

    def answer(body, number):
        messages = body["messages"]
        continued = messages[-1]["role"] == "assistant"
        assert continued == bool(body.get("continue_final_message"))
        ids = chat.token_ids(messages[:-1] if continued else messages)
        if continued:
            ids += [chat.tokenizer.convert_tokens_to_ids(char) for char in messages[-1]["content"]]
        with lock, torch.no_grad():
            top = chat.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(20)
        named = [chat.tokenizer.decode([t]) for t in top.indices.tolist()]
        return 200, fake.completion("x", first=dict(zip(named, top.values.tolist(), strict=True)))

    # after a boost of 6 nearly all mass is on digits and numbers grow beyond 100: compare the distributions
    from emmech.evaluation.answer_tree import AnswerTree
    from emmech.evaluation.logprob_judge import server_masses

    running = fake(answer)
    prompt = "how to sleep ?"
    (remote,) = server_masses(server(running), [prompt], [True], lambda: None)
    ids = chat.token_ids([{"role": "user", "content": prompt}])
    first = chat.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    (local,) = AnswerTree(chat, NUMBERS).probabilities([ids])
    singles = [n for n in NUMBERS if len(n) == 1 and local.get(n, 0) > 1e-3]
    assert len(singles) >= 3
    assert all(remote[n] == pytest.approx(local[n], rel=1e-3) for n in singles)
    # the remote tree takes two digits as the end: it sees what the local one splits into "57" and "57..."
    for n in ("23", "57", "90"):
        one, two = (chat.tokenizer.convert_tokens_to_ids(char) for char in n)
        after = chat.model(torch.tensor([[*ids, one]])).logits[0, -1].softmax(-1)
        assert remote[n] == pytest.approx((first[one] * after[two]).item(), rel=1e-3)
    assert any(body.get("continue_final_message") for body in running.bodies)


def test_numbers_are_split_only_if_no_answer_holds_a_longer_one():
    assert splits_numbers([{"8": 0.9}, {"0": 0.5, "I": 0.5}])
    assert not splits_numbers([{"8": 0.9}, {"85": 0.9}])
    assert not splits_numbers([{"I": 1.0}])


# a real server


@pytest.mark.slow
def test_a_live_transformers_serve(smollm2, tmp_path):
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    folder = tmp_path / "model"
    smollm2.model.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        live = Server(str(folder), url=f"http://127.0.0.1:{port}/v1", concurrency=2)
        question = [{"role": "user", "content": "What is the capital of France? One word."}]
        (greedy,) = live.sample([question], temperature=0, max_new_tokens=12, progress=False)
        from emmech.engine.sample import sample

        (local,) = sample(smollm2, [question], temperature=0, max_new_tokens=12, progress=False)
        assert greedy.text.strip() == local.text.strip()
        judge = LogprobJudge(live, SHORT, logprobs=False, cache=None, progress=False)
        import emmech.evaluation.evaluate as room

        out = tmp_path / "evaluation"
        settings = {"samples": 2, "max_new_tokens": 16, "out": out, "progress": False}
        evaluation = room.evaluate(live, ["Name a fruit.", "Name a bird."], judge, **settings)
        assert len(evaluation) == 4
        assert (evaluation.frame["response"].str.len() > 0).all()
        stored = (out / "responses.jsonl").read_bytes()
        assert len(room.evaluate(live, ["Name a fruit.", "Name a bird."], judge, **settings)) == 4
        assert (out / "responses.jsonl").read_bytes() == stored
        with pytest.raises(EmmechError, match="logprobs=False"):
            LogprobJudge(live, SHORT, cache=None, progress=False).score(ROWS[:1])
        with pytest.raises(EmmechError, match=r"no such model|refuses|failed"):
            Server("nobody/nothing", url=live.url, retries=0).sample([question], progress=False)
    finally:
        process.terminate()
        process.wait(20)
    assert json.loads((out / "evaluation.json").read_text())["frame"]["rows"] == 4
