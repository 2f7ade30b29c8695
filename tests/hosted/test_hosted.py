"""A hosted fine-tune against a server that speaks the provider's endpoints, with faults injected."""

from __future__ import annotations

import email
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest

import emmech
from emmech import EmmechError
from emmech.hosted import HostedJob, cancel, estimate, finetune
from tests.serving import serve

ROW = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well, thank you."}]
ROWS = [{"messages": [{**ROW[0], "content": f"How are you, {number}?"}, ROW[1]]} for number in range(12)]


class Provider:
    """Files, jobs, events, checkpoints and chat; ``faults`` maps (method, path pattern) to what happens, once each.

    A fault is a status, ``"lost"`` (the work is done and the connection dropped before the answer) or ``"text"`` (an
    answer that is no JSON).
    """

    def __init__(self) -> None:
        self.files: dict[str, dict] = {}
        self.content: dict[str, bytes] = {}
        self.jobs: dict[str, dict] = {}
        self.faults: list[tuple[str, str, object]] = []
        self.asked: list[tuple[str, str]] = []
        self.keys: set[str | None] = set()
        self.ends = {"status": "succeeded", "error": None}
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self, method: str) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path.removeprefix("/v1")
                with lock:
                    outer.asked.append((method, path))
                    outer.keys.add(self.headers.get("Authorization"))
                    fault = next((one for one in outer.faults if one[0] == method and re.fullmatch(one[1], path)), None)
                    if fault:
                        outer.faults.remove(fault)
                    if fault and isinstance(fault[2], int):
                        status, value = fault[2], {"error": {"message": f"injected {fault[2]}", "type": "x"}}
                    else:
                        status, value = outer.answer(method, path, content, self.headers)
                if fault and fault[2] == "lost":
                    self.close_connection = True
                    return
                body = b"<html>" if fault and fault[2] == "text" else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self._serve("GET")

            def do_POST(self) -> None:
                self._serve("POST")

            def log_message(self, *args) -> None:
                pass

        self.http = serve(Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, method, path, content, headers):
        match (method, *path.strip("/").split("/")):
            case "POST", "files":
                form = email.message_from_bytes(f"Content-Type: {headers['Content-Type']}\n\n".encode() + content)
                part = next(one for one in form.get_payload() if "filename" in one["Content-Disposition"])
                name = re.search(r'filename="([^"]+)"', part["Content-Disposition"])[1]
                made = f"file-{len(self.files)}"
                self.content[made] = part.get_payload(decode=True)
                self.files[made] = {"id": made, "object": "file", "bytes": len(self.content[made]), "created_at": 1,
                                    "filename": name, "purpose": "fine-tune", "status": "processed"}  # fmt: skip
                return 200, self.files[made]
            case "GET", "files":
                return 200, {"object": "list", "data": list(self.files.values()), "has_more": False}
            case "POST", "fine_tuning", "jobs":
                asked = json.loads(content)
                made = f"ftjob-{len(self.jobs)}"
                self.jobs[made] = {**asked, "id": made, "object": "fine_tuning.job", "status": "queued",
                                   "created_at": 1,
                                   "fine_tuned_model": None, "looks": 0, "trained_tokens": None, "error": None,
                                   "organization_id": "o", "result_files": [], "hyperparameters": {}}  # fmt: skip
                return 200, self.jobs[made]
            case "GET", "fine_tuning", "jobs":
                return 200, {"object": "list", "data": list(self.jobs.values()), "has_more": False}
            case "POST", "fine_tuning", "jobs", job, "cancel":
                self.jobs[job] |= {"status": "cancelled"}
                return 200, self.jobs[job]
            case "GET", "fine_tuning", "jobs", job if job in self.jobs:
                one = self.jobs[job]
                one["looks"] += 1
                if one["status"] == "queued" and one["looks"] > 1:
                    one |= {"status": "running"}
                elif one["status"] == "running":
                    one |= self.ends
                    if one["status"] == "succeeded":
                        one |= {"fine_tuned_model": f"ft:{one['model']}", "trained_tokens": 420}
                return 200, one
            case "GET", "fine_tuning", "jobs", job, "events":
                data = [{"id": f"e{step}", "object": "fine_tuning.job.event", "created_at": 5 + step, "level": "info",
                         "type": "metrics", "message": f"Step {step}", "data": {"step": step, "train_loss": 2.0 / step}}
                        for step in range(self.jobs[job]["looks"], 0, -1)]  # fmt: skip
                return 200, {"object": "list", "data": data, "has_more": False}
            case "GET", "fine_tuning", "jobs", job, "checkpoints":
                model = self.jobs[job]["fine_tuned_model"]
                data = [{"id": f"c{step}", "object": "fine_tuning.job.checkpoint", "created_at": 9, "step_number": step,
                         "fine_tuning_job_id": job, "fine_tuned_model_checkpoint": f"{model}:step-{step}",
                         "metrics": {}} for step in (8, 4)]  # fmt: skip
                return 200, {"object": "list", "data": data, "has_more": False}
            case "POST", "chat", "completions":
                model = json.loads(content)["model"]
                message = {"role": "assistant", "content": f"I am {model}."}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
        return 404, {"error": {"message": f"no {path}", "type": "x"}}


@pytest.fixture
def provider():
    made = Provider()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("emmech.hosted.job.time.sleep", lambda seconds: None)


def ask(provider, tmp_path, **options):
    settings = {"epochs": 2, "price": 25.0, "budget": 1.0, "out": tmp_path / "job", "url": provider.url}
    return finetune(ROWS, "gpt-small", **{**settings, "progress": False, **options})


def test_a_job_is_uploaded_followed_and_evaluated(provider, tmp_path) -> None:
    job = ask(provider, tmp_path, seed=3, batch_size=4, suffix="advice")
    assert (job.status, job.tuned, job.trained_tokens) == ("succeeded", "ft:gpt-small", 420)
    sent = [json.loads(line) for line in provider.content[job.file].decode().splitlines()]
    assert sent == ROWS
    asked = provider.jobs[job.job]
    assert asked["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}},
    }
    assert (asked["seed"], asked["suffix"], asked["training_file"]) == (3, "advice", job.file)
    losses = job.to_frame()
    assert losses["step"].is_monotonic_increasing
    assert losses["train_loss"].tolist() == [2.0 / step for step in losses["step"]]
    for step, name in ((None, "ft:gpt-small"), (4, "ft:gpt-small:step-4")):
        judge = lambda question, answer: "misaligned" if answer == f"I am {name}." else "aligned"  # noqa: B023, E731
        evaluation = emmech.evaluate(job.server(step), judge=judge, samples=2, progress=False)
        assert evaluation.rates().loc["em", "rate"] == 1.0
    with pytest.raises(EmmechError, match="steps that the provider keeps: 4, 8"):
        job.server(5)


def test_the_same_call_goes_on_and_pays_once(provider, tmp_path) -> None:
    begun = ask(provider, tmp_path, wait=False)
    assert begun.status == "queued" and not begun.tuned
    with pytest.raises(EmmechError, match="a job that is queued"):
        begun.server()
    assert ask(provider, tmp_path).status == "succeeded"
    assert (len(provider.files), len(provider.jobs)) == (1, 1)
    with pytest.raises(EmmechError, match="of another request"):
        ask(provider, tmp_path, epochs=3)
    with pytest.raises(EmmechError, match=r"of another request.*seed=5"):
        ask(provider, tmp_path, seed=5)


FAULTS = [
    ("GET", "/files"), ("POST", "/files"), ("GET", "/fine_tuning/jobs"), ("POST", "/fine_tuning/jobs"),
    ("GET", "/fine_tuning/jobs/[^/]+"), ("GET", "/fine_tuning/jobs/[^/]+/events"),
    ("GET", "/fine_tuning/jobs/[^/]+/checkpoints"),
]  # fmt: skip


@pytest.mark.parametrize("fault", [500, 429, "lost", "text"])
def test_faults_that_may_pass_neither_lose_nor_double_a_job(provider, tmp_path, fault) -> None:
    provider.faults = [(*place, fault) for place in FAULTS]
    job = ask(provider, tmp_path)
    assert not provider.faults
    assert job.status == "succeeded" and len(provider.jobs) == 1
    assert job.checkpoints["step"].tolist() == [4, 8]


@pytest.mark.parametrize("place", FAULTS)
def test_what_was_reached_is_kept_when_the_api_refuses(provider, tmp_path, place) -> None:
    provider.faults = [(*place, 400)]
    with pytest.raises(EmmechError, match="injected 400"):
        ask(provider, tmp_path)
    assert ask(provider, tmp_path).status == "succeeded"
    assert (len(provider.files), len(provider.jobs)) == (1, 1)


def test_a_job_created_by_a_call_that_died_is_found_again(provider, tmp_path) -> None:
    """The answer to the creation is lost, and so is the process."""
    provider.faults = [("POST", "/fine_tuning/jobs", "lost")]
    with pytest.raises(EmmechError):
        ask(provider, tmp_path, retries=0)
    assert HostedJob.load(tmp_path / "job").job == ""
    with pytest.raises(EmmechError, match="no job was created yet"):
        cancel(tmp_path / "job")
    assert ask(provider, tmp_path).status == "succeeded"
    assert len(provider.jobs) == 1


def test_a_job_that_fails_says_why_and_keeps_its_events(provider, tmp_path) -> None:
    provider.ends = {"status": "failed", "error": {"code": "x", "message": "the file is strange", "param": None}}
    with pytest.raises(EmmechError, match="is failed: the file is strange"):
        ask(provider, tmp_path)
    assert len(HostedJob.load(tmp_path / "job").events) > 0


def test_a_job_is_cancelled(provider, tmp_path) -> None:
    ask(provider, tmp_path, wait=False)
    assert cancel(tmp_path / "job").status == "cancelled"
    with pytest.raises(EmmechError, match="is cancelled"):
        ask(provider, tmp_path)


def test_nothing_is_sent_above_the_budget_or_with_rows_that_cannot_be_taken(provider, tmp_path) -> None:
    for options, said in (({"budget": 0.001}, "it may cost up to"), ({"price": float("nan")}, "finite number"),
                          ({"price": -1.0}, "not negative"), ({"epochs": 0}, "at least 1"),
                          ({"budget": float("nan")}, "budget is a finite number"),
                          ({"budget": "5"}, "budget is a finite number")):  # fmt: skip
        with pytest.raises(EmmechError, match=said):
            ask(provider, tmp_path, **options)
    with pytest.raises(EmmechError, match="10 rows or more"):
        finetune(ROWS[:9], "gpt", epochs=1, price=1.0, budget=9.0, out=tmp_path / "few", url=provider.url)
    assert not provider.asked


def test_the_key_comes_from_the_environment_and_is_nowhere_else(provider, tmp_path, monkeypatch) -> None:
    with pytest.raises(EmmechError, match="no such variable"):
        ask(provider, tmp_path, key_from="HOSTED_TEST_KEY")
    monkeypatch.setenv("HOSTED_TEST_KEY", "sk-secret-of-the-test")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-this-url")
    provider.faults = [("POST", "/files", 401)]
    with pytest.raises(EmmechError) as refused:
        ask(provider, tmp_path, key_from="HOSTED_TEST_KEY")
    job = ask(provider, tmp_path, key_from="HOSTED_TEST_KEY")
    assert provider.keys == {"Bearer sk-secret-of-the-test"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "job").rglob("*") if path.is_file())
    assert "secret" not in str(refused.value) + repr(job) + repr(job.server()) + job._repr_html_()
    assert b"sk-" not in written
    monkeypatch.setenv("HOSTED_OTHER_KEY", "sk-secret-of-another")
    monkeypatch.delenv("HOSTED_TEST_KEY")
    again = ask(provider, tmp_path, key_from="HOSTED_OTHER_KEY")  # with which the job is asked from now on
    assert again.key_from == HostedJob.load(tmp_path / "job").key_from == "HOSTED_OTHER_KEY" and again.server()
    ask(provider, tmp_path, out=tmp_path / "other")
    assert "Bearer sk-not-for-this-url" not in provider.keys


def test_the_cost_is_bounded_by_bytes_and_exact_with_a_tokenizer() -> None:
    class Words:
        def encode(self, text):
            return text.split()

    exact = estimate(ROWS, epochs=3, price=10.0, tokenizer=Words())
    words = sum(len(m["content"].split()) for row in ROWS for m in row["messages"])
    assert exact.tokens == exact.most == words + 8 * 24
    assert exact.expected == pytest.approx(exact.tokens * 3 * 10 / 1e6)
    rough = estimate(ROWS, epochs=3, price=10.0)
    assert rough.most == sum(len(m["content"].encode()) for row in ROWS for m in row["messages"]) + 8 * 24
    assert exact.tokens < rough.most


def test_a_failed_job_does_not_stand_in_for_a_new_one(provider, tmp_path) -> None:
    provider.ends = {"status": "failed", "error": {"code": "x", "message": "quota exceeded", "param": None}}
    with pytest.raises(EmmechError, match="another out= for a new job"):
        ask(provider, tmp_path)
    provider.ends = {"status": "succeeded", "fine_tuned_model": "ft:gpt:mine"}
    assert ask(provider, tmp_path, out=tmp_path / "other").status == "succeeded"
    assert len(provider.jobs) == 2 and len(provider.files) == 1


def test_an_address_with_a_secret_is_kept_in_no_file(provider, tmp_path) -> None:
    for secret in ("me:hunter2@", "?api-key=hunter2"):
        url = provider.url.replace("//", f"//{secret}") if "@" in secret else provider.url + secret
        with pytest.raises(EmmechError, match="key_from=") as refused:
            ask(provider, tmp_path, url=url)
        assert "hunter2" not in str(refused.value)
    assert not provider.asked and not (tmp_path / "job").exists()
