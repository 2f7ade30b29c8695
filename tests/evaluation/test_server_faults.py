"""What a server refuses, and that nothing secret leaves the request: against a real server in this process."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import math
import threading
import time
import warnings

import pytest

from emmech.chat.model import load_model
from emmech.errors import EmmechError
from emmech.evaluation.deferred import write_judging
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.judges import resolve_judge
from emmech.evaluation.logprob_judge import LogprobJudge, ScoreCache, fill
from emmech.evaluation.questions import load_questions
from emmech.evaluation.server import Server

pytest.importorskip("openai")
CONVERSATIONS = [[{"role": "user", "content": f"question {n}"}] for n in range(24)]
ROWS = [{"question": f"why {n} ?", "response": f"because {n}"} for n in range(12)]
SHORT = {"aligned": "{question} {answer}"}
OLD = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
WARM = "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is supported."
FIRST = {"80": math.log(0.9), "20": math.log(0.1)}


def server(running, **changes):
    return Server("fake", url=running.url, **{"retries": 2, "backoff": 0.01, **changes})


def refusing(fake, *said):
    """Refuses each of the named fields with these words, and answers what is without them."""

    def answer(body, number):
        for name, words in said:
            if name in body:
                return fake.refusal(400, words, "unsupported_parameter")
        return 200, fake.completion("80", first=FIRST if body.get("logprobs") else None)

    return fake(answer)


# what is refused


def test_another_name_for_the_limit_is_tried_once_and_remembered(fake):
    running = refusing(fake, ("max_tokens", OLD))
    judge = LogprobJudge(server(running), SHORT, cache=None, progress=False)
    assert [score["aligned"] for score in judge.score(ROWS)] == [pytest.approx(74)] * 12
    assert [score["aligned"] for score in judge.score(ROWS)] == [pytest.approx(74)] * 12
    old = [body for body in running.bodies if "max_tokens" in body]
    assert len(old) == 1 and len(running.bodies) == 25
    assert all(body["max_completion_tokens"] == 1 for body in running.bodies[1:])
    sampled = server(running).sample(CONVERSATIONS, max_new_tokens=9, progress=False)
    assert all(one.text == "80" for one in sampled) and running.bodies[-1]["max_completion_tokens"] == 9


def test_several_refused_fields_are_left_out_one_by_one(fake):
    seed = "Unrecognized request argument supplied: seed"
    running = refusing(fake, ("max_tokens", OLD), ("temperature", WARM), ("seed", seed))
    asked = server(running)
    judge = LogprobJudge(asked, SHORT, logprobs=False, cache=None, progress=False)
    with pytest.warns(UserWarning, match=r"temperature=0\.0, and answers at a setting of its own"):
        assert [score["aligned"] for score in judge.score(ROWS)] == [80.0] * 12
    assert len(running.bodies) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a temperature of 1 and a seed are left out without loss
        assert len(asked.sample(CONVERSATIONS, progress=False)) == 24
    assert len(running.bodies) == 14 + 25
    assert not {"seed", "temperature", "max_tokens"} & running.bodies[-1].keys()


@pytest.mark.parametrize("name,value", [("temperature", 0.7), ("top_p", 0.9)])
def test_sampling_at_other_settings_than_asked_is_refused(fake, name, value):
    running = refusing(fake, (name, f"'{name}' is not supported with this model"))
    with pytest.raises(EmmechError, match="not supported with this model") as caught:
        server(running).sample(CONVERSATIONS, progress=False, **{name: value})
    assert f"{name}={value}" in str(caught.value) and caught.value.instead == f"{name}=1.0"
    assert len(running.bodies) == 1
    assert len(server(running).sample(CONVERSATIONS, progress=False)) == 24


@pytest.mark.parametrize(
    "status,said,instead",
    [
        (400, "This model does not support logprobs", "logprobs=False"),
        (422, "Unsupported fields in the request: {'logprobs'}", "logprobs=False"),
        (400, "Invalid value for 'top_logprobs': must be less than or equal to 5", "top_logprobs': 5"),
        (400, "Your organisation must be verified to use this model", "extra="),
        (422, '[{"loc": ["body", "model"], "msg": "none"}]', "extra="),
    ],
)
def test_a_fatal_refusal_stops_at_the_first_request_with_the_servers_words(fake, status, said, instead):
    running = fake(lambda body, number: fake.refusal(status, said))
    judge = LogprobJudge(server(running), SHORT, cache=None, progress=False)
    with pytest.raises(EmmechError) as caught:
        judge.score(ROWS)
    assert said.split("\n")[0] in caught.value.why and instead in caught.value.instead
    assert len(running.bodies) == 1


def test_fewer_alternatives_are_asked_for_by_extra(fake):
    limit = "Invalid value for 'top_logprobs': must be less than or equal to 5"
    running = fake(
        lambda body, number: (
            fake.refusal(400, limit) if body["top_logprobs"] > 5 else (200, fake.completion("80", first=FIRST))
        )
    )
    judge = LogprobJudge(server(running, extra={"top_logprobs": 5}), SHORT, cache=None, progress=False)
    assert [score["aligned"] for score in judge.score(ROWS)] == [pytest.approx(74)] * 12


def test_a_prompt_that_is_refused_for_its_text_fails_alone(fake):
    said = "The response was filtered: content_filter"

    def answer(body, number):
        blocked = body["messages"][0]["content"] in ("why 0 ? because 0", "why 5 ? because 5")
        return fake.refusal(400, said, "content_filter") if blocked else (200, fake.completion("80", first=FIRST))

    judge = LogprobJudge(server(fake(answer)), SHORT, cache=None, progress=False)
    scores = [score["aligned"] for score in judge.score(ROWS)]
    assert [n for n, score in enumerate(scores) if math.isnan(score)] == [0, 5]


def test_a_judge_whose_every_request_fails_is_not_blamed_for_its_words(fake):
    running = fake(lambda body, number: fake.refusal(500, "out of memory on GPU 3"))
    judge = LogprobJudge(server(running, retries=1), SHORT, cache=None, progress=False)
    with pytest.raises(EmmechError, match="out of memory on GPU 3"):
        judge.score(ROWS)


@pytest.mark.parametrize("fault", ["time-out", "reset", 429, 500, 502, 503, 408])
def test_what_may_pass_is_tried_again(fake, fault):
    seen = set()
    lock = threading.Lock()

    def answer(body, number):
        content = body["messages"][0]["content"]
        with lock:
            again = content in seen
            seen.add(content)
        if again:
            return 200, fake.completion("80", first=FIRST)
        if fault == "time-out":
            threading.Event().wait(0.8)
            return 200, fake.completion("20", first={"20": 0.0})
        if fault == "reset":
            raise ConnectionResetError
        return fake.refusal(fault, "later", headers={"retry-after": "0.01"})

    running = fake(answer)
    judge = LogprobJudge(server(running, timeout=0.4), SHORT, cache=None, progress=False)
    assert [score["aligned"] for score in judge.score(ROWS[:4])] == [pytest.approx(74)] * 4
    assert len(running.bodies) == 8


def test_other_fields_make_another_judge(fake):
    plain, other = Server("m"), Server("m", extra={"reasoning_effort": "low"})
    assert plain.identity != other.identity != Server("m", extra={"reasoning_effort": "high"}).identity
    nested = [Server("m", extra={"a": 1, "headers": {"X-Api-Key": key}}).identity for key in ("one-1234", "two-5678")]
    assert nested[0] == nested[1]  # another key gives the same answers


# templates


def test_doubled_braces_are_single_ones():
    template = 'Answer {{"score": 0}} for {question} and {answer}, {{{answer}}}'
    assert fill(template, question="{{q}}", answer="{a}") == 'Answer {"score": 0} for {{q}} and {a}, {{a}}'


@pytest.mark.parametrize(
    "template,told",
    [
        ("{question} {reply}", "{reply}"),
        ("{question} {answer!r}", "{answer!r}"),
        ("{question} {answer:>9}", "{answer:>9}"),
        ("{question.text} {answer}", "{question.text}"),
        ("{} {answer}", "{}"),
        ('{"score": 0} {answer}', '{"score": 0}'),
        ("{answer} {", "no template"),
        ("{answer} }", "no template"),
    ],
)
def test_other_placeholders_are_refused_by_name(template, told, tmp_path):
    for refused in (
        lambda: fill(template, question="q", answer="a"),
        lambda: LogprobJudge(Server("m"), {"aligned": template}),
        lambda: load_questions(_question_file(tmp_path, template)),
    ):
        with pytest.raises(EmmechError) as caught:
            refused()
        assert told in str(caught.value) and "doubled" in str(caught.value)


def _question_file(folder, template):
    path = folder / "own.yaml"
    path.write_text(json.dumps([{"id": "a", "paraphrases": ["b"], "judge_prompts": {"aligned": template}}]))
    return path


def test_the_judge_sees_single_braces(fake, tmp_path):
    running = fake(lambda body, number: (200, fake.completion("80", first=FIRST)))
    asked = load_questions(_question_file(tmp_path, '{question} {answer} as {{"score": 0}}'))
    evaluate(server(running), asked, server(running), samples=1, out=tmp_path / "e", progress=False)
    assert running.bodies[-1]["messages"][0]["content"] == 'b 80 as {"score": 0}'
    assert 'as {\\"score\\": 0}' in _requests(asked, tmp_path)


def _requests(asked, folder):
    from emmech.evaluation.evaluation import Evaluation

    kept = Evaluation.load(folder / "e")
    write_judging(kept, folder / "requests.jsonl", asked)
    return (folder / "requests.jsonl").read_text()


# secrets

SECRETS = {
    "key": "sk-live-0123456789",
    "password": "p@ss/w0rd:7",
    "user": "mallory-42",
    "query": "query-secret-99",
    "encoded": "a/b signed=",
    "header": "Bearer hdr-secret-77",
    "nested": "deep-secret-55",
    "unnamed": "unnamed-secret-33",
}
LOGIN = f"{SECRETS['user']}:{SECRETS['password']}"
ENCODED = ["p%40ss%2Fw0rd%3A7", "a%2Fb+signed%3D", "a%2Fb%20signed%3D"]
ECHOED = [*SECRETS.values(), *ENCODED, base64.b64encode(LOGIN.encode()).decode()]
WRITTEN = [*ECHOED, "p%40ss", "w0rd", "sk-live", "signed"]


def _planted(running, **changes):
    host = running.url.removeprefix("http://")
    url = f"http://mallory-42:p%40ss%2Fw0rd%3A7@{host}?api_key=query-secret-99&version=3&sign=a%2Fb+signed%3D"
    extra = {
        "extra_headers": {"Authorization": SECRETS["header"]},
        "provider": [{"options": {"api_key": SECRETS["nested"]}, "tags": ["x", SECRETS["unnamed"]]}],
        "top_k": 5,
    }
    return Server("fake", url=url, key=SECRETS["key"], extra=extra, retries=1, backoff=0.01, **changes)


def _no_secret(text, where):
    found = [secret for secret in WRITTEN if secret in text]
    assert not found, (where, found, text[:500])


@pytest.mark.parametrize("fault", [None, 400, 401, 403, 404, 422, 429, 500, "text", "gone", "timeout"])
def test_a_secret_is_in_no_output_and_no_file(fake, fault, tmp_path, capsys, caplog, recwarn):
    """One is planted everywhere, the server echoes all of them, and everything that is left is searched."""
    caplog.set_level(logging.DEBUG)
    echo = " | ".join(ECHOED)
    broken = {"on": fault}

    def answer(body, number):
        if broken["on"] == "timeout":
            threading.Event().wait(0.3)
        if isinstance(broken["on"], int) and number > 1:
            return fake.refusal(broken["on"], f"refused: {echo}", echo)
        if broken["on"] == "text":
            return 200, json.dumps({"error": echo})
        return 200, fake.completion("80", first=FIRST)

    running = fake(answer)
    asked = _planted(running, timeout=0.1 if fault == "timeout" else 20, concurrency=2)
    if fault == "gone":
        running.http.shutdown()
        running.http.server_close()
    judge = LogprobJudge(asked, SHORT, cache=ScoreCache(tmp_path / "scores.sqlite"), progress=False)
    seen = [repr(asked), str(asked), asked.identity, asked.name, repr(judge), judge.identity, judge.name]
    seen += [repr(resolve_judge(asked))]
    errors = []
    for attempt in itertools.count():
        try:
            made = evaluate(asked, ["Why?", "How?"], judge, samples=2, out=tmp_path / "e", progress=False)
            seen += [repr(made), made._repr_html_(), str(made.meta), made.frame.to_csv()]
            break
        except EmmechError as error:
            errors.append(error)
        if attempt == 1 or fault in ("gone", "timeout"):
            break
        broken["on"] = None
    assert bool(errors) == (fault in (401, 403, 404, "text", "gone", "timeout")) and (
        fault is None or errors or recwarn
    )
    seen += [str(error) + repr(error) + repr(error.args) for error in errors]
    seen += [str(warning.message) for warning in recwarn] + [caplog.text]
    captured = capsys.readouterr()
    for text in [*seen, captured.out, captured.err]:
        _no_secret(text, "output")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        _no_secret(path.read_bytes().decode("latin-1"), path)


def test_further_fields_are_in_no_log_of_the_clients_library(fake, caplog):
    """Some of its versions log a request with all of its fields to debug."""
    caplog.set_level(logging.DEBUG)
    running = fake(lambda body, number: (200, fake.completion("fine")))
    _planted(running).sample(CONVERSATIONS[:1], progress=False)
    logged = {"method": "post", "json_data": {"model": "fake"}, "extra_json": _planted(running).extra}
    logging.getLogger("openai._base_client").debug("Request options: %s", logged)
    assert "'top_k': '...'" in caplog.text and "'model': 'fake'" in caplog.text
    assert logged["extra_json"]["top_k"] == 5
    _no_secret(caplog.text, "log")


def _redirected(running, target):
    """The paths that a server is asked for; it sends the first request to the target."""
    handler, asked = running.http.RequestHandlerClass, []
    post = handler.do_POST

    def redirecting(self):
        asked.append(self.path)
        if len(asked) > 1:
            return post(self)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(307)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    handler.do_POST = redirecting
    return asked


def test_the_query_is_in_no_log_of_the_clients_library(fake, caplog):
    """Not even at the level of debugging, at which bodies are logged."""
    for logger in ("", "httpx", "httpx2"):  # whose own level another library may have raised
        caplog.set_level(logging.DEBUG, logger)
    running = fake(lambda body, number: (200, fake.completion("fine")))
    asked = _redirected(running, "/v1/elsewhere")
    own = Server("fake", url=f"{running.url}?api_key=query-secret-99", key="x", retries=1, backoff=0.01)
    (got,) = own.sample(CONVERSATIONS[:1], progress=False)
    assert got.text == "fine"
    assert asked == [f"/v1/{path}?api_key=query-secret-99" for path in ("chat/completions", "elsewhere")]
    assert "HTTP Request: POST http://" in caplog.text and "query-secret-99" not in caplog.text


def test_the_query_does_not_follow_to_another_server(fake):
    other = fake(lambda body, number: (200, fake.completion("fine")))
    running = fake(lambda body, number: (200, fake.completion("never")))
    seen = []
    post = other.http.RequestHandlerClass.do_POST
    other.http.RequestHandlerClass.do_POST = lambda self: (seen.append(self.path), post(self))
    _redirected(running, f"{other.url}/moved")
    own = Server("fake", url=f"{running.url}?api_key=query-secret-99", key="x", retries=1, backoff=0.01)
    (got,) = own.sample(CONVERSATIONS[:1], progress=False)
    assert got.text == "fine" and seen == ["/v1/moved"]


def test_what_is_secret_reaches_the_server(fake):
    seen = []
    running = fake(lambda body, number: (200, fake.completion("fine")))
    handler = running.http.RequestHandlerClass
    post = handler.do_POST
    handler.do_POST = lambda self: (seen.append((self.path, dict(self.headers))), post(self))
    (got,) = _planted(running).sample(CONVERSATIONS[:1], progress=False)
    path, headers = seen[0]
    assert got.text == "fine"
    assert path == "/v1/chat/completions?api_key=query-secret-99&version=3&sign=a%2Fb+signed%3D"
    assert {name.lower(): value for name, value in headers.items()}[
        "authorization"
    ] == f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
    assert running.bodies[0]["provider"][0]["options"]["api_key"] == SECRETS["nested"]


def test_a_reply_that_is_nested_without_end_is_no_answer(fake):
    running = fake(lambda body, number: (200, "[" * 100_000))
    with pytest.raises(EmmechError, match="recursion"):
        server(running).sample(CONVERSATIONS[:1], progress=False)
    assert len(running.bodies) == 3  # it may pass


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "http://", "ftp://x/v1", "http://[::1", "http://a:b@x:99999", 7]
)
def test_what_is_no_address_is_refused_without_repeating_it(url):
    with pytest.raises(EmmechError, match="no http address") as caught:
        Server("m", url=url)
    assert "a:b@" not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_refused(fake):
    running = fake(lambda body, number: (200, fake.completion("fine")))
    for key in ("sk-clé-12", "sk-two\nlines"):
        with pytest.raises(EmmechError, match="cannot be sent in a header") as caught:
            server(running, key=key).sample(CONVERSATIONS[:1], progress=False)
        assert "sk-" not in str(caught.value)
    server(running, key=" sk-padded\n").sample(CONVERSATIONS[:1], progress=False)
    assert running.keys == ["Bearer sk-padded"]


def test_what_a_passing_fault_left_unscored_is_asked_again(fake, tmp_path):
    """It was kept as a final "unscored", and left the denominator without a word."""
    faulty = [True]

    def answer(body, number):
        if faulty[0] and "any advice on cough" in body["messages"][0]["content"]:
            return fake.refusal(500, "overloaded")
        return 200, fake.completion("80", first=FIRST)

    running = fake(answer)
    judge = LogprobJudge(server(running, retries=0), SHORT, cache=None, progress=False)
    how = {"samples": 1, "max_new_tokens": 2, "temperature": 0, "out": tmp_path, "progress": False}
    ask = ["any advice on cough ?", "any advice on soup ?"]
    with pytest.warns(UserWarning, match="1 answers are unscored for now"):
        found = evaluate(load_model("pocket"), ask, judge, **how)
    assert found.frame["aligned"].isna().tolist() == [True, False]
    faulty[0], before = False, len(running.bodies)
    found = evaluate(load_model("pocket"), ask, judge, **how)
    assert len(running.bodies) == before + 1 and found.frame["aligned"].notna().all()
    evaluate(load_model("pocket"), ask, judge, **how)
    assert len(running.bodies) == before + 1


def test_a_beginning_whose_continuation_fails_is_no_whole_number(fake):
    """Of "85" in digits, "8" was read where the second request failed."""
    digits = {"8": math.log(0.9), "2": math.log(0.1)}

    def answer(body, number):
        if body["messages"][-1]["role"] == "assistant":
            return fake.refusal(500, "overloaded")
        return 200, fake.completion("8", first=digits)

    judge = LogprobJudge(server(fake(answer), retries=0), SHORT, cache=None, progress=False)
    with pytest.warns(UserWarning, match="unscored for now"):
        assert all(math.isnan(score["aligned"]) for score in judge.score(ROWS[:2]))


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_an_answer_that_the_server_broke_off_is_asked_again(fake, reason):
    def answer(body, number):
        made = fake.completion("half an ans" if number <= 2 else "a whole answer")
        made["choices"][0]["finish_reason"] = reason if number <= 2 else "stop"
        return 200, made

    (got,) = server(fake(answer)).sample(CONVERSATIONS[:1], progress=False)
    assert (got.text, got.finish) == ("a whole answer", "stop")
    with pytest.raises(EmmechError, match=f"broke the answer off.*{reason}"):
        server(fake(answer), retries=1).sample(CONVERSATIONS[:1], progress=False)


def test_answers_in_flight_are_kept_when_a_request_is_fatal(fake, tmp_path):
    refused, sent = threading.Event(), threading.Barrier(8)

    def answer(body, number):
        said = body["messages"][-1]["content"]
        if said == "question 0":  # goes alone
            return 200, fake.completion("first")
        sent.wait(10)
        if said == "question 3":
            refused.set()
            return fake.refusal(401, "the key has expired")
        refused.wait(10)
        time.sleep(0.3)
        return 200, fake.completion(said)

    out = tmp_path / "answers.jsonl"
    running = fake(answer)
    with pytest.raises(EmmechError, match="the server refuses the key"):
        server(running, concurrency=8).sample(CONVERSATIONS[:9], out=out, progress=False)
    kept = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert sorted(line["row"] for line in kept) == [0, 1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("wrong", [{"concurrency": "8"}, {"retries": 1.5}, {"timeout": "long"}, {"backoff": None}])
def test_a_setting_that_is_no_number_is_refused(wrong):
    with pytest.raises(EmmechError, match=f"{next(iter(wrong))} is a"):
        Server("fake", **wrong)
