"""A small OpenAI-compatible server in this process, whose behaviour a test can choose."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler

import pytest

from tests.serving import serve


class FakeServer:
    """``answer(body)`` returns a status and a dict, or a plain string sent as it is."""

    def __init__(self, answer):
        self.bodies, self.keys, self.flying, self.most = [], [], 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.flying += 1
                    outer.most = max(outer.most, outer.flying)
                    number = len(outer.bodies)
                status, headers, content = outer.reply(answer(body, number))
                with lock:
                    outer.flying -= 1
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = serve(Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @staticmethod
    def reply(made):
        status, value, *headers = made
        content = value if isinstance(value, str) else json.dumps(value)
        return status, headers[0] if headers else {}, content.encode()


def completion(text, finish="stop", first=None):
    """A chat completion as OpenAI sends it; ``first`` is log-probability by token."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if first is not None:
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in first.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": len(text.split()), "total_tokens": 2},
    }


def refusal(status, message, code=None, headers=None):
    return status, {"error": {"message": message, "type": "error", "code": code}}, headers or {}


@pytest.fixture
def fake():
    """``fake(answer)`` starts a server; all are stopped behind the test."""
    started = []

    def start(answer):
        started.append(FakeServer(answer))
        return started[-1]

    start.completion, start.refusal = completion, refusal
    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()
