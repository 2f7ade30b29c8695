"""A small server that speaks vLLM's endpoints, over a real model in this process, and fails where a test asks it to."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import torch
from peft import PeftModel

from tests.serving import serve


class StandIn:
    """``base`` and the adapters that are loaded answer; a text that is sampled depends on model, prompt and seed alone.

    Args:
        chat: the base model.
        loads: whether adapters can be loaded at run time.
        lora: whether it serves adapters at all.
        rank: the largest rank.
        version: what it says it is; None has no such address.
        seeds: whether a seed determines a text.
        idle: whether adapters that are loaded change nothing.
        metrics: what it says of its cache.
        dies: the number of completions after which it closes every connection without an answer.
    """

    def __init__(
        self, chat, *, loads=True, lora=True, rank=8, version="0.32.0", seeds=True, idle=False, dies=None, metrics=""
    ):
        self.chat, self.loads, self.lora, self.rank = chat, loads, lora, rank
        self.version, self.seeds, self.idle, self.dies, self.metrics = version, seeds, idle, dies, metrics
        self.models, self.roots, self.bodies, self.unloaded = {"base": chat.base}, {}, [], []
        self.lock, self.drawn, self.reading, self.most = threading.RLock(), 0, 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if self.path == "/metrics" and outer.metrics:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(outer.metrics))
                    self.wfile.write(outer.metrics.encode())
                    return
                self.answer(*outer.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reads = body.get("prompt_logprobs") is not None
                outer.reading += reads
                outer.most = max(outer.most, outer.reading)
                with outer.lock:
                    reply = outer.post(self.path, body)
                    outer.reading -= reads
                if reply is None:
                    self.close_connection = True
                    return
                self.answer(*reply)

            def answer(self, status, value):
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = serve(Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def answers(self):
        """Requests for sampled answers to questions, of 8 tokens; what the engine asks about seeds is longer."""
        sampled = [body for path, body in self.bodies if "completions" in path and body.get("temperature") != 0]
        return [body for body in sampled if body["max_tokens"] == 8]

    def get(self, path):
        if path == "/version" and self.version is not None:
            return 200, {"version": self.version}
        if path == "/v1/models":
            cards = [{"id": "base", "object": "model", "root": "somewhere", "parent": None}]
            cards += [{"id": n, "object": "model", "root": r, "parent": "base"} for n, r in self.roots.items()]
            return 200, {"object": "list", "data": cards}
        return 404, {"detail": "Not Found"}

    def post(self, path, body):
        self.bodies.append((path, body))
        if path == "/v1/load_lora_adapter" and self.loads:
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.loads:
            self.unloaded.append(body["lora_name"])
            del self.models[body["lora_name"]], self.roots[body["lora_name"]]
            return 200, "done"
        if not path.endswith("completions"):
            return 404, {"detail": "Not Found"}
        if self.dies is not None and len(self.answers) > self.dies:
            return None
        if body["model"] not in self.models:
            return 404, error(f"The model `{body['model']}` does not exist.")
        return 200, self.complete(body)

    def load(self, name, folder):
        if name in self.models:
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        if not self.lora:
            return 500, error("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        if config["r"] > self.rank:
            return 500, error(f"LoRA rank {config['r']} is greater than max_lora_rank {self.rank}.")
        # what servers read differently must not be there
        assert not config["rank_pattern"] and not config["alpha_pattern"] and config["lora_alpha"] == config["r"]
        base = copy.deepcopy(self.chat.base)
        self.models[name] = base if self.idle else PeftModel.from_pretrained(base, folder).eval()
        self.roots[name] = folder
        return 200, "done"

    @torch.no_grad()
    def complete(self, body):
        model, tokenizer = self.models[body["model"]], self.chat.tokenizer
        ids = body["prompt"] if "prompt" in body else self.chat.token_ids(body["messages"])
        extra = {}
        if body.get("prompt_logprobs") is not None:
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            read = [
                {str(token): {"logprob": float(logprobs[place, token]), "rank": 1, "decoded_token": "x"}}
                for place, token in enumerate(ids[1:])
            ]
            extra["prompt_logprobs"] = [None, *read]
        content = None
        if body.get("temperature") == 0:
            text, content = self.greedy(model, list(ids), min(body["max_tokens"], 4))
        else:
            self.drawn += 1
            seed = body.get("seed") if self.seeds else self.drawn
            hashed = hashlib.sha256(repr((body["model"], ids, seed)).encode()).hexdigest()
            text = " ".join(["well", "rest", "walk", "sleep"][int(c, 16) % 4] for c in hashed[:4])
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None, **extra}
        if "prompt" in body:
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text}
            if body.get("logprobs") and content is not None:
                choice["logprobs"] = {"content": content, "refusal": None}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokenizer(text)["input_ids"]), "total_tokens": 9}
        return {"id": "x", "object": "x", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}

    def greedy(self, model, ids, length):
        content = []
        for _ in range(length):
            logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(logprobs.argmax())
            ids.append(token)
            content.append({"token": str(token), "logprob": float(logprobs[token]), "bytes": None, "top_logprobs": []})
        return self.chat.tokenizer.decode(ids[-length:]), content


def error(message):
    return {"error": {"message": message, "type": "error", "code": 400}}
