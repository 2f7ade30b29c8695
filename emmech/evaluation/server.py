"""A model on an OpenAI-compatible server, to sample from and to read log-probabilities from.

The same client serves OpenAI, ``transformers serve`` (one local model, no log-probabilities) and vLLM::

    transformers serve ./model --port 8000
    vllm serve Qwen/Qwen2.5-14B-Instruct --enable-lora --lora-modules medical=./adapter

    Server("medical", url="http://localhost:8000/v1")     # the adapter, by the name it was given
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emmech.engine.responses import Response, ResponseLog, check_request, digest, row_seeds
from emmech.errors import EmmechError
from emmech.progress import bar

Messages = Sequence[Mapping[str, str]]
_UNSUPPORTED = ("logprobs", "continue_final_message", "Unsupported fields")  # of an error message
_UNMET = 2  # retries of a connection to a server that has never answered
_NO_KEY = "none"  # local servers ask for no key, but the client insists on one


@dataclass(frozen=True)
class Completion:
    """A server's answer.

    Args:
        text: the answer; empty on error.
        finish: ``"stop"``, ``"length"`` or ``"error"``.
        tokens: length, -1 if the server does not say.
        first: probability by token text of the first answer token's likeliest alternatives; None if not asked for
            or not given.
        error: why there is no answer.
    """

    text: str
    finish: str
    tokens: int = -1
    first: Mapping[str, float] | None = None
    error: str | None = None


class _Pace:
    """A limit on the requests that start in a minute; after a 429 all threads wait."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._gap
        time.sleep(max(0.0, start - time.monotonic()))

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


@dataclass(frozen=True)
class Server:
    """A chat model on an OpenAI-compatible server.

    Args:
        model: the name the server knows it by (a LoRA module's name, on vLLM).
        url: the API's root, ``"http://localhost:8000/v1"``; None is OpenAI's own.
        key: None reads ``OPENAI_API_KEY`` (never sent to a ``url`` of your own unless given here).
        concurrency: requests in flight.
        requests_per_minute: None leaves pacing to the server's 429 answers.
        retries: of a request that failed for a reason that may pass (rate limit, time-out, lost connection, 5xx; at
            most two where the server has not answered anything yet), waiting about ``backoff * 2**attempt`` seconds,
            or as long as the server says.
        timeout: seconds for one answer.
        extra: further fields of every request body, such as ``{"top_k": 50}`` on vLLM.

    Example:
        >>> Server("medical", url="http://localhost:8000/v1").name
        'medical'
    """

    model: str
    url: str | None = None
    key: str | None = field(default=None, repr=False)
    concurrency: int = 16
    requests_per_minute: float | None = None
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 120.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pace = self.requests_per_minute
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or (pace is not None and pace <= 0):
            names = ("concurrency", "retries", "timeout", "requests_per_minute")
            given = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            why = "at least one request must be in flight, and it needs time"
            instead = "concurrency=16, retries=6, timeout=120.0, requests_per_minute=None"
            raise EmmechError(f"reach the model {self.model!r}", given, why, instead)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    @property
    def identity(self) -> str:
        """Model and address, which tell its answers from another server's."""
        return f"{self.model} at {self.url or 'api.openai.com'}"

    def sample(
        self,
        conversations: Sequence[Messages],
        *,
        samples: int = 1,
        max_new_tokens: int = 600,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> list[Response]:
        """Sample answers; the arguments are those of :func:`emmech.engine.sample.sample`.

        Seeds are sent along, but few servers promise the same text for the same seed; what was received is kept in
        ``out``. A request that fails for good becomes a response with ``finish="error"``, which is asked again
        when sampling is continued.

        Raises:
            EmmechError: the server is unreachable, refuses the key or does not know the model (what was received so
                far is in ``out``); or bad arguments.
        """
        check_request(conversations, samples, max_new_tokens, temperature, top_p, seed)
        prompts = [tuple((m["role"], m["content"]) for m in messages) for messages in conversations]
        seeds = row_seeds(prompts, samples, seed)
        rows = [(conversation, number) for conversation in range(len(prompts)) for number in range(samples)]
        sampling = {"temperature": temperature, "top_p": top_p}
        request = {"request": digest(prompts, seeds, self.identity), "rows": len(rows)}
        log = ResponseLog(out, {**request, "max_new_tokens": max_new_tokens, **sampling})
        missing = [row for row in range(len(rows)) if row not in log.done]
        limits = {"max_tokens": max_new_tokens, **sampling}
        bodies = [  # a seed below 2**31 fits every server's integer
            {"messages": list(conversations[rows[row][0]]), **limits, "seed": seeds[row] % 2**31} for row in missing
        ]
        with bar(len(rows), f"sampling from {self.model}", progress=progress) as steps:
            steps.update(len(log.done))
            failures = []
            for index, got in self.complete(bodies):
                row = missing[index]
                log.add(row, Response(*rows[row], seeds[row], got.text, got.finish, got.tokens))
                failures += [got.error] if got.error is not None else []
                steps.update()
        self._report(failures, len(rows))
        return log.responses(len(rows))

    def _report(self, failures: Sequence[str], rows: int) -> None:
        if len(failures) == rows:
            instead = "look at the server's log; failed requests are sent again when sampling is continued"
            why = f"every one of them failed: {failures[0]}"
            raise EmmechError(f"sample from {self.identity}", f"{rows} requests", why, instead)
        if failures:
            failed = f"{len(failures)} of {rows} requests to {self.identity} failed for good"
            again = "They are kept as unscored; the same call with the same file asks again."
            warnings.warn(f"{failed}, the first because: {failures[0]}. {again}", stacklevel=3)

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """Send request bodies, and yield ``(index, completion)`` as they are answered.

        Raises:
            EmmechError: for a reason that concerns every request (address, key, model, unsupported field).
        """
        client, pace, stop = self._client(), _Pace(self.requests_per_minute), threading.Event()
        met = threading.Event()  # whether the server has answered anything at all
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="emmech-server")
        waiting = iter(enumerate(bodies))
        running: dict[Future[Completion], int] = {}
        try:
            while True:
                while len(running) < self.concurrency and (following := next(waiting, None)) is not None:
                    index, body = following
                    running[pool.submit(self._ask, client, pace, stop, met, body)] = index
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            stop.set()  # wakes those that wait for a retry
            pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for slow answers
            client.close()

    def _client(self) -> Any:
        asked = f"reach the model {self.model!r}"
        try:
            import openai
        except ImportError:
            why = "the client of OpenAI-compatible servers is an extra"
            raise EmmechError(asked, "no module openai", why, "pip install 'emmech[judge]'")
        key = self.key
        if key is None:
            key = os.environ.get("OPENAI_API_KEY") if self.url is None else _NO_KEY
        if not key:
            why = "OpenAI's server needs one, and OPENAI_API_KEY is not set"
            instead = 'Server(..., key="...") or Server(..., url="http://localhost:8000/v1")'
            raise EmmechError(asked, "no key", why, instead)
        return openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=0)

    def _ask(
        self, client: Any, pace: _Pace, stop: threading.Event, met: threading.Event, body: Mapping[str, Any]
    ) -> Completion:
        import openai

        request = {**body, "extra_body": {**self.extra, **body.get("extra_body", {})}}
        for attempt in range(self.retries + 1):
            pace.wait()
            if stop.is_set():
                return _failed("given up")
            try:
                answer = client.chat.completions.create(model=self.model, **request)
                met.set()
                return _read(answer)
            except openai.APIConnectionError as error:  # time-outs too
                problem: Exception = error
                # a server that never answered is probably not there; one that did may come back
                patience = self.retries if met.is_set() else min(self.retries, _UNMET)
                if attempt >= patience and not isinstance(error, openai.APITimeoutError):
                    raise self._unreachable(error)
            except openai.APIStatusError as error:
                problem = error
                met.set()
                if (fatal := self._fatal(error, body)) is not None:
                    raise fatal
                if error.status_code not in (408, 409, 429) and error.status_code < 500:  # it would fail again
                    return _failed(error)
            except (openai.APIError, ValueError) as error:  # an answer that is no completion, or no JSON at all
                problem = error
            if attempt < self.retries:
                delay = _delay(problem, self.backoff, attempt)
                if isinstance(problem, openai.RateLimitError):
                    pace.pause(delay)
                stop.wait(delay)
        return _failed(problem)

    def _unreachable(self, error: Exception) -> EmmechError:
        start = "start it, e.g. `transformers serve FOLDER --port 8000`, url='http://localhost:8000/v1'"
        return EmmechError(
            f"reach the model {self.model!r}",
            f"url={self.url or 'https://api.openai.com/v1'}",
            f"no server answers there ({_first_line(error.__cause__ or error)})",
            f"{start}; answers received so far are kept",
        )

    def _fatal(self, error: Any, body: Mapping[str, Any]) -> EmmechError | None:
        """The error, if every other request would fail with it too."""
        asked, said = f"sample from {self.identity}", _first_line(error)
        if error.status_code in (401, 403):
            given, why = f"key {'none' if self.key is None else '...' + self.key[-4:]}", "the server refuses the key"
            instead = 'Server(..., key="...") with a key that may use this model'
        elif error.status_code == 404:
            given, why = f"model={self.model!r}", "the server has no such model or address"
            instead = "GET /v1/models lists the names; the url ends in /v1"
        elif getattr(error, "code", None) == "insufficient_quota":
            given, why, instead = None, "the account's quota is used up", "top it up, then go on"
        elif error.status_code in (400, 422) and any(name in said for name in _UNSUPPORTED):
            given, why = f"fields {', '.join(sorted(body))}", "the server does not support them"
            instead = "a judge without log-probabilities: LogprobJudge(server, logprobs=False)"
        else:
            return None
        return EmmechError(asked, given, f"{why}: {said}", instead)


def _delay(error: Exception, backoff: float, attempt: int) -> float:
    """Seconds until the next attempt: what the server asks for, else exponential with jitter, a minute at most."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(60.0, float(headers.get("retry-after", "")))
    except ValueError:
        return min(60.0, backoff * 2**attempt * random.uniform(0.75, 1.25))


def _failed(error: object) -> Completion:
    return Completion("", "error", error=_first_line(error))


def _first_line(error: object) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]


def masses_of(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Probability by text without white space, from tokens and their log-probabilities; two tokens may read alike.

    Example:
        >>> masses_of([("8", -1.0), (" 8", -1.0)])
        {'8': 0.7357588823428847}
    """
    masses: dict[str, float] = {}
    for token, logprob in entries:
        masses[token.strip()] = masses.get(token.strip(), 0.0) + math.exp(logprob)
    return masses


def _read(answer: Any) -> Completion:
    if not (choices := getattr(answer, "choices", None)):
        return _failed("the server's answer holds no choice")
    choice = choices[0]
    if choice.finish_reason == "content_filter":
        return _failed("the server's content filter withheld the answer")
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    top = content[0].top_logprobs if content else None
    first = masses_of((entry.token, entry.logprob) for entry in top) if top else None
    text = getattr(getattr(choice, "message", None), "content", None)
    tokens = getattr(getattr(answer, "usage", None), "completion_tokens", None)
    return Completion(str(text or ""), "length" if choice.finish_reason == "length" else "stop", tokens or -1, first)


def ask_all(server: Server, bodies: Sequence[Mapping[str, Any]], tick: Callable[[], None]) -> list[Completion]:
    """The completions in order; ``tick`` is called after each."""
    got: list[Completion | None] = [None] * len(bodies)
    for index, completion in server.complete(bodies):
        got[index] = completion
        tick()
    return [completion for completion in got if completion is not None]
