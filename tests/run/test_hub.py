"""A run on the hub and back, against a server in the test that speaks the hub's file protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest

import emmech
from emmech import EmmechError, Run
from emmech.run import hub
from tests.serving import serve

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "sillySillySilly" * 2  # no real one


class Hub:
    """Repositories in memory: creation, preupload, LFS, commits, trees and files with their etags."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.calls: list[str] = []
        self.refuse = ""
        hub_ = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None: ...

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if not self.headers.get("Content-Length") and self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline().strip(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                hub_.tokens.add(self.headers.get("Authorization", ""))
                status, headers, content = hub_.answer(self.command, self.path, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do

        self.server = serve(Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, verb: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(path).path.strip("/").split("/")
        self.calls.append(f"{verb} {'/'.join(parts)}")

        def told(value, status=200):
            return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

        if self.refuse:
            return told({"error": self.refuse}, 403)
        if parts == ["api", "validate-yaml"]:
            return told({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, {})
            return told({"url": f"{self.url}/{name}", "name": name})
        if parts[0] == "lfs":
            self.lfs[parts[1]] = body
            return 200, {}, b""
        if parts[-1] == "batch":
            objects = [{**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            return told({"transfer": "basic", "objects": objects})
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            if name not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"Repository Not Found"
            files = self.repos[name]
            if rest[:1] == ["preupload"]:
                asked = json.loads(body)["files"]
                modes = {one["path"]: "lfs" if one["path"].endswith(".safetensors") else "regular" for one in asked}
                made = [{"path": path, "shouldIgnore": False, "uploadMode": mode} for path, mode in modes.items()]
                return told({"files": made})
            if rest[:1] == ["commit"]:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.lfs[value["oid"]]
                return told({"success": True, "commitOid": self.sha(name), "commitUrl": f"{self.url}/{name}/commit/x"})
            if rest[:1] == ["tree"]:
                return told([{"type": "file", "path": file, "size": len(content), "oid": etag(content)}
                             for file, content in sorted(files.items())])  # fmt: skip
            siblings = [{"rfilename": file} for file in sorted(files)]
            return told({"id": name, "sha": self.sha(name), "siblings": siblings, "private": True, "tags": []})
        if "resolve" in parts:
            at = parts.index("resolve")
            name, file = "/".join(parts[:at]), "/".join(parts[at + 2 :])
            if file not in self.repos.get(name, {}):
                return 404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
            content = self.repos[name][file]
            return 200, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": self.sha(name)}, content
        raise AssertionError(path)

    def sha(self, name: str) -> str:
        digest = hashlib.sha1()
        for file, content in sorted(self.repos[name].items()):
            digest.update(file.encode() + content)
        return digest.hexdigest()


def etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def server():
    started = Hub()
    yield started
    started.server.shutdown()


@pytest.fixture
def run(tmp_path) -> Run:
    """A run on disk with a turn in the middle, and files in its folder that nobody else should get."""
    rng = np.random.default_rng(0)
    steps = np.arange(60)
    along = np.zeros((60, 12))
    along[:30, 0], along[30:, 1] = 1.0, 1.0
    metrics = pd.DataFrame({"loss": np.exp(-steps / 20), "grad_norm": 1 + rng.random(60)}, index=steps)
    made = Run.from_arrays(steps, B=np.cumsum(along, 0).astype(np.float32), metrics=metrics, name="bad-medical")
    made.manifest |= {"model": {"name": "Qwen/Qwen2.5-0.5B-Instruct"}, "seed": 3}
    made.manifest["data"] = {"name": "advice", "path": "/home/somebody/private/advice.jsonl", "rows": 7}
    kept = made.save(tmp_path / "runs" / "mine")
    (tmp_path / "secret.txt").write_text("not for others")
    (kept.path / "resume").mkdir()
    (kept.path / "resume" / "optimizer.pt").write_text("large")
    (kept.path / ".writer").write_text("process 1 on a machine")
    (kept.path / "half.json.partial").write_text("{")
    return kept


CLIENT = """
import sys, emmech
run = emmech.load_run(sys.argv[1])
control = emmech.load_run(sys.argv[1])
print(run.push_to_hub(sys.argv[2], results=[emmech.phase_transition(run)]))
back = emmech.load_run("hub:" + sys.argv[2])
assert back.steps.tolist() == run.steps.tolist() and (back.B() == run.B()).all() and not back.damaged
assert back.metrics.equals(run.metrics)
print("back")
try:
    emmech.load_run("hub:nobody/nothing")
except emmech.EmmechError as error:
    print(error)
"""


def client(code: str, server: Hub, tmp_path: Path, *arguments: object) -> str:
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    known |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "EMMECH_PROGRESS": "0"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=known, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_goes_to_the_hub_and_comes_back(server, run, tmp_path):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    said = client(CLIENT, server, tmp_path, run.path, "me/bad-medical")
    assert f"{server.url}/me/bad-medical" in said and "back" in said and "nobody/nothing" in said
    files = server.repos["me/bad-medical"]
    assert set(files) == {"README.md", "run.json", "metrics.jsonl", "trajectory/stacked.safetensors"}
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert f"Bearer {TOKEN}" in server.tokens  # it is sent, and is nowhere else
    assert TOKEN not in said and not any(TOKEN.encode() in content for content in files.values())
    assert b"/home/somebody" not in files["run.json"] and b"advice.jsonl" in files["run.json"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: emmech\n") and "base_model: Qwen/Qwen2.5-0.5B-Instruct" in card
    for wanted in ('emmech.load_run("hub:me/bad-medical")', "## PhaseTransition", "| loss | 1 |", "do not deploy"):
        assert wanted in card
    found = emmech.phase_transition(run)._card()
    section = " ".join(card.split("## PhaseTransition")[1].split())
    assert found.headline in section and found.facts
    assert all(" ".join(text.split()).replace("|", "\\|") in section for _, text in found.facts)


def test_a_refusal_of_the_hub_holds_no_token(monkeypatch, run):
    import huggingface_hub

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"403 for {TOKEN}, and for hf_{'x' * 34}")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(EmmechError, match="403 for") as caught:
        run.push_to_hub("me/mine")
    assert TOKEN not in str(caught.value) and "xxxx" not in str(caught.value)


def test_nothing_outside_the_folder_is_uploaded(run, tmp_path):
    (run.path / "evaluations").mkdir()
    (run.path / "evaluations" / "notes.json").write_text("{}")
    assert "evaluations/notes.json" in hub.files(run.path) and "resume/optimizer.pt" not in hub.files(run.path)
    (run.path / "inner.json").symlink_to(run.path / "run.json")
    assert "inner.json" in hub.files(run.path)
    (run.path / "evaluations" / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(EmmechError, match=r"evaluations/link.txt\n.*outside"):
        hub.files(run.path)


@pytest.mark.parametrize("name", ["notes.txt", "run.json"])
def test_a_file_with_a_token_is_refused_by_name(run, name):
    path = run.path / name
    text = json.dumps(json.loads(path.read_text()) | {"key": TOKEN}) if name == "run.json" else f"my key is {TOKEN}"
    path.write_text(text)
    with pytest.raises(EmmechError, match=name) as caught:
        emmech.load_run(run.path).push_to_hub("me/mine")
    assert TOKEN not in str(caught.value)


def test_a_card_says_when_nothing_was_analysed(run):
    text = hub.card(run, "me/mine")
    assert "No analysis was given" in text and "/home/" not in text and "| seed | 3 |" in text
