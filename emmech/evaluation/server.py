"""A model on an OpenAI-compatible server, to sample from and to read log-probabilities from.

The same client serves OpenAI, ``transformers serve`` (one local model, no log-probabilities) and vLLM::

    transformers serve ./model --port 8000
    vllm serve Qwen/Qwen2.5-14B-Instruct --enable-lora --lora-modules medical=./adapter

    Server("medical", url="http://localhost:8000/v1")     # the adapter, by the name it was given
"""

from __future__ import annotations

import base64
import logging
import math
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, quote_plus, unquote, urlsplit

from emmech.engine.responses import Response, ResponseLog, as_conversations, check_request, digest, row_seeds
from emmech.errors import EmmechError, as_float, as_int
from emmech.progress import bar

Messages = Sequence[Mapping[str, str]]
_OPTIONAL = ("max_tokens", "temperature", "top_p", "seed")  # what a request can do without
_OF_LOGPROBS = ("logprobs", "top_logprobs", "continue_final_message", "add_generation_prompt")
# a refusal of one prompt's text, not of every request
_OF_TEXT = re.compile(r"context.?length|content.?(filter|management|policy)|blocked|safety|too long", re.I)
_SECRET = re.compile(r"(key|token|secret|pass\w*|auth\w*|credentials?|cookies?|headers?)$", re.I)  # a field's name
_UNMET = 2  # retries of a connection to a server that has never answered
MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)  # raised for an answer of another form
_BROKEN = ("error", "abort", "cancelled")  # an answer's end where the server gave up within it
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
        logprobs: of the answer's tokens; None if not asked for or not given.
        prompt: log-probability of each of the prompt's tokens after the first, None if not asked for or not given.
    """

    text: str
    finish: str
    tokens: int = -1
    first: Mapping[str, float] | None = None
    error: str | None = None
    logprobs: tuple[float, ...] | None = None
    prompt: tuple[float, ...] | None = None


class _Pace:
    """A limit on the requests that start in a minute; after a 429 all threads wait."""

    def __init__(self) -> None:
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, per_minute: float | None) -> None:
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + (60.0 / per_minute if per_minute else 0.0)
        time.sleep(max(0.0, start - time.monotonic()))

    def __reduce__(self) -> tuple[type[_Pace], tuple[()]]:
        return _Pace, ()  # a lock does not travel to another process, which keeps a pace of its own

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class _Discreet(logging.Filter):
    """Leaves the values of further fields out of the requests that the client's library logs to debug."""

    def filter(self, record: logging.LogRecord) -> bool:
        logged: Any = record.args
        if isinstance(logged, Mapping) and (fields := logged.get("extra_json")):
            record.args = {**logged, "extra_json": dict.fromkeys(fields, "...")}
        return True


_DISCREET = _Discreet()


class _Known:
    """What is known of a server so far: the fields that it took and refused, and when the next request may start."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.refused: set[str] = set()
        self.pace = _Pace()


@dataclass(frozen=True, repr=False)
class Server:
    """A chat model on an OpenAI-compatible server.

    A server that does not take ``max_tokens`` is sent ``max_completion_tokens``; a seed is left out where it is
    refused, and so is a temperature or ``top_p`` that a judge's scores or the default of 1 can do without. The first
    request of a kind goes alone, so that what concerns every request is found at once. Keys, passwords in the address,
    and what ``extra`` holds are in no representation, message or file, nor in the log of the client's library.

    Args:
        model: the name the server knows it by (a LoRA module's name, on vLLM).
        url: the API's root, ``"http://localhost:8000/v1"``; None is OpenAI's own. A user name and password in it are
            sent as a header.
        key: None reads ``OPENAI_API_KEY`` (never sent to a ``url`` of your own unless given here).
        concurrency: requests in flight.
        requests_per_minute: None leaves pacing to the server's 429 answers.
        retries: of a request that failed for a reason that may pass (rate limit, time-out, lost connection, 5xx; at
            most two where the server has not answered anything yet), waiting about ``backoff * 2**attempt`` seconds,
            or as long as the server says.
        timeout: seconds for one answer.
        extra: further fields of every request body, such as ``{"top_k": 50}`` on vLLM.
        seeds: whether each request carries its row's seed. vLLM on a CPU dies of one where a prompt is read in parts.

    Raises:
        EmmechError: a setting under which nothing is asked, or a ``url`` that is no address.

    Example:
        >>> Server("medical", url="http://localhost:8000/v1").name
        'medical'
    """

    model: str
    url: str | None = None
    key: str | None = None
    concurrency: int = 16
    requests_per_minute: float | None = None
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 120.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    seeds: bool = True
    _known: _Known = field(default_factory=_Known, init=False, compare=False)

    def __post_init__(self) -> None:
        asked, pace = f"reach the model {self.model!r}", self.requests_per_minute
        for name in ("concurrency", "retries"):
            object.__setattr__(self, name, as_int(asked, name, getattr(self, name)))
        for name in ("backoff", "timeout", *(("requests_per_minute",) if pace is not None else ())):
            as_float(asked, name, getattr(self, name))
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or (pace is not None and pace <= 0):
            names = ("concurrency", "retries", "timeout", "requests_per_minute")
            given = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            why = "at least one request must be in flight, and it needs time"
            instead = "concurrency=16, retries=6, timeout=120.0, requests_per_minute=None"
            raise EmmechError(asked, given, why, instead)
        try:
            address = urlsplit(self.url or "")
            valid = self.url is None or (address.scheme in ("http", "https") and address.hostname and address.port != 0)
        except (ValueError, AttributeError, TypeError):  # brackets or a port that cannot be, or no text at all
            valid = False
        if not valid:
            instead = 'url="http://localhost:8000/v1", or None for OpenAI\'s own'
            raise EmmechError(asked, "the url given", "it is no http address", instead)

    def __repr__(self) -> str:
        fields = f", extra={{{', '.join(map(repr, self.extra))}}}" if self.extra else ""
        return f"Server({self.model!r}, url={self.shown_url!r}{fields})"

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    @property
    def identity(self) -> str:
        """Model, address and further fields (as a hash), which tell its answers from another server's."""
        fields = f" with {digest(_without_secrets(self.extra))[:12]}" if self.extra else ""
        return f"{self.model} at {self.shown_url or 'api.openai.com'}{fields}"

    @property
    def shown_url(self) -> str | None:
        """The address without user name, password and the values of its query."""
        if self.url is None:
            return None
        query = "&".join(f"{name}=..." for name, _ in parse_qsl(urlsplit(self.url).query))
        return _bare(urlsplit(self.url)) + (f"?{query}" if query else "")

    @property
    def accepts(self) -> bool:
        """Whether the server has answered a request."""
        return bool(self._known.taken)

    @property
    def refused(self) -> frozenset[str]:
        """The fields of requests that the server has not taken."""
        return frozenset(self._known.refused)

    def said(self, error: object) -> str:
        """The first line of an error's words, with nothing in it that is secret."""
        text = str(error).strip().split("\n")[0] or type(error).__name__
        address = urlsplit(self.url or "")
        login = [part for part in (address.username, address.password) if part]
        secrets = {self.key or "", os.environ.get("OPENAI_API_KEY", ""), *login, *map(unquote, login)}
        query = [value for _, value in parse_qsl(address.query)]
        secrets |= {_basic(address).removeprefix("Basic "), *query, *map(quote_plus, query)}
        secrets |= {*_texts(self.extra), *(quote(value, safe="") for value in query)}
        for secret in sorted({*secrets, *(s.strip() for s in secrets)} - {""}, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text[:300]

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
        conversations = as_conversations(conversations)
        check_request(conversations, samples, max_new_tokens, temperature, top_p, seed)
        prompts = [tuple((m["role"], m["content"]) for m in messages) for messages in conversations]
        seeds = row_seeds(prompts, samples, seed)
        rows = [(conversation, number) for conversation in range(len(prompts)) for number in range(samples)]
        sampling = {"temperature": temperature, "top_p": top_p}
        request = {"request": digest(prompts, seeds, self.identity), "rows": len(rows)}
        log = ResponseLog(out, {**request, "max_new_tokens": max_new_tokens, **sampling})
        missing = [row for row in range(len(rows)) if row not in log.done]
        limits = {"max_tokens": max_new_tokens, **sampling}
        bodies = [{**self.asked(conversations[rows[row][0]]), **limits, **self.seeded(seeds[row])} for row in missing]
        with bar(len(rows), f"sampling from {self.model}", progress=progress) as steps:
            steps.update(len(log.done))
            failures = []
            fixed = [name for name, value in sampling.items() if value != 1.0]
            for index, got in self.complete(bodies, fixed=fixed):
                row = missing[index]
                log.add(row, Response(*rows[row], seeds[row], got.text, got.finish, got.tokens))
                failures += [got.error] if got.error is not None else []
                steps.update()
        self.report(failures, len(rows))
        return log.responses(len(rows))

    def asked(self, messages: Messages) -> dict[str, Any]:
        """The field of a request that carries a conversation."""
        return {"messages": list(messages)}

    def seeded(self, seed: int) -> dict[str, int]:
        """The field of a request that carries a seed; none where ``seeds=False``."""
        return {"seed": seed % 2**31} if self.seeds else {}  # below 2**31 it fits every server's integer

    def report(self, failures: Sequence[str], rows: int) -> None:
        """Warn of requests that failed for good.

        Raises:
            EmmechError: all of them did.
        """
        if len(failures) == rows:
            instead = "look at the server's log; failed requests are sent again when sampling is continued"
            why = f"every one of them failed: {failures[0]}"
            raise EmmechError(f"sample from {self.identity}", f"{rows} requests", why, instead)
        if failures:
            failed = f"{len(failures)} of {rows} requests to {self.identity} failed for good"
            again = "They are kept as unscored; the same call with the same file asks again."
            warnings.warn(f"{failed}, the first because: {failures[0]}. {again}", stacklevel=3)

    def complete(
        self, bodies: Sequence[Mapping[str, Any]], *, fixed: Collection[str] = (), optional: Collection[str] = _OPTIONAL
    ) -> Iterator[tuple[int, Completion]]:
        """Send request bodies, and yield ``(index, completion)`` as they are answered.

        A body with ``prompt`` (a text or token ids) instead of ``messages`` is completed without a chat template, and
        one with ``model`` is for another model of the same server.

        Args:
            fixed: fields that must not be left out where the server does not take them.
            optional: fields that a request can do without, but for the fixed ones.

        Raises:
            EmmechError: for a reason that concerns every request (address, key, model, unsupported field), after the
                requests that were in flight, whose answers are yielded.
        """
        client, stop = self.client(), threading.Event()
        spare = frozenset(optional) - frozenset(fixed)
        met = threading.Event()  # whether the server has answered anything at all
        if self.accepts:
            met.set()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="emmech-server")
        waiting = iter(enumerate(bodies))
        running: dict[Future[Completion], int] = {}
        fields = {name for body in bodies[:1] for name in body}
        together = self.concurrency if fields <= self._known.taken | self._known.refused else 1
        fatal: Exception | None = None
        try:
            while True:
                while fatal is None and len(running) < together and (following := next(waiting, None)) is not None:
                    index, body = following
                    running[pool.submit(self._ask, client, stop, met, body, spare)] = index
                if not running and fatal is not None:
                    raise fatal
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, problem = running.pop(future), future.exception()
                    if isinstance(problem, Exception):
                        fatal = fatal or problem
                        stop.set()  # what was sent may still be answered; nothing is sent again
                    elif fatal is None or future.result().error is None:
                        yield index, future.result()
                together = self.concurrency
        finally:
            stop.set()  # wakes those that wait for a retry
            pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for slow answers
            client.close()

    def client(self) -> Any:
        """The official client for this server, without retries of its own; it is the caller's to close.

        Raises:
            EmmechError: the client is not installed, or the key is missing or cannot be sent.
        """
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
        if not (key := key.strip()).isascii() or not key.isprintable():
            why = "it holds characters that cannot be sent in a header"
            raise EmmechError(asked, "the key given", why, "the key as the server's owner gave it")
        logging.getLogger("openai._base_client").addFilter(_DISCREET)
        address = urlsplit(self.url or "")
        options: dict[str, Any] = {"timeout": self.timeout, "max_retries": 0}
        if login := _basic(address):  # not in the address, which the client's library logs
            options["default_headers"] = {"Authorization": login}
        if address.query:
            options["http_client"] = openai.DefaultHttpxClient(event_hooks={"request": [_asking(address)]})
        return openai.OpenAI(base_url=self.url and _bare(address), api_key=key, **options)

    def _ask(
        self, client: Any, stop: threading.Event, met: threading.Event, body: Mapping[str, Any], spare: Collection[str]
    ) -> Completion:
        import openai

        attempt = 0
        while attempt <= self.retries:
            request = self._form(body)
            self._known.pace.wait(self.requests_per_minute)
            if stop.is_set():
                return self._failed("given up")
            try:
                kind = client.completions if "prompt" in request else client.chat.completions
                answer = kind.create(**{"model": self.model, **request})
                met.set()
                self._known.taken.update(request)
                return self._read(answer)
            except openai.APIConnectionError as error:  # time-outs too
                problem: Exception = error
                # a server that never answered is probably not there; one that did may come back
                patience = self.retries if met.is_set() else min(self.retries, _UNMET)
                if attempt >= patience and not isinstance(error, openai.APITimeoutError):
                    raise self.unreachable(error)
            except openai.APIStatusError as error:
                problem = error
                met.set()
                name = _refused_field(error, request)
                if name in spare and name in request:  # at most once for each field: the next form is without
                    self._leave_out(name, request[name])
                    continue
                if (fatal := self._fatal(error, request, name)) is not None:
                    raise fatal
                if error.status_code not in (408, 409, 429) and error.status_code < 500:  # it would fail again
                    return self._failed(error)
            except (openai.APIError, ValueError, RecursionError) as error:  # no completion, or no JSON
                problem = error
            if attempt < self.retries:
                delay = _delay(problem, self.backoff, attempt)
                if isinstance(problem, openai.RateLimitError):
                    self._known.pace.pause(delay)
                stop.wait(delay)
            attempt += 1
        return self._failed(problem)

    def _form(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request in the form that this server accepts, as far as is known."""
        request = {name: value for name, value in body.items() if name not in self._known.refused}
        if "max_tokens" in body and "max_tokens" not in request:
            request["max_completion_tokens"] = body["max_tokens"]
        return {**request, "extra_body": {**self.extra, **body.get("extra_body", {})}}

    def _leave_out(self, name: str, value: Any) -> None:
        if name not in self._known.refused and name in ("temperature", "top_p") and value != 1.0:
            said = f"{self.identity} does not take {name}={value}, and answers at a setting of its own"
            warnings.warn(said, stacklevel=2)
        self._known.refused.add(name)

    def _failed(self, error: object) -> Completion:
        return Completion("", "error", error=self.said(error))

    def _read(self, answer: Any) -> Completion:
        """What a server's answer holds.

        Raises:
            ValueError: it is the beginning of one, which is asked again.
        """
        if not (choices := getattr(answer, "choices", None)):
            return self._failed("the server's answer holds no choice")
        try:
            choice = choices[0]
            if choice.finish_reason == "content_filter":
                return self._failed("the server's content filter withheld the answer")
            content = getattr(getattr(choice, "logprobs", None), "content", None)
            top = content[0].top_logprobs if content else None
            first = masses_of((entry.token, entry.logprob) for entry in top) if top else None
            logprobs = tuple(float(entry.logprob) for entry in content) if content else None
            read = getattr(choice, "prompt_logprobs", None)
            # each entry holds the prompt's own token alone, unless likelier ones were asked for too
            prompt = tuple(float(next(iter(one.values()))["logprob"]) for one in read[1:]) if read else None
        except MALFORMED:
            return self._failed("the server's answer is no chat completion")
        if choice.finish_reason in _BROKEN:
            raise ValueError(f"the server broke the answer off (finish_reason {choice.finish_reason!r})")
        text = getattr(choice, "text", None) or getattr(getattr(choice, "message", None), "content", None)
        tokens = getattr(getattr(answer, "usage", None), "completion_tokens", None)
        known = tokens if isinstance(tokens, int) and tokens else -1
        finish = "length" if choice.finish_reason == "length" else "stop"
        return Completion(str(text or ""), finish, known, first, logprobs=logprobs, prompt=prompt)

    def unreachable(self, error: Exception) -> EmmechError:
        """The error that no server answers at the address."""
        start = "start it, e.g. `transformers serve FOLDER --port 8000`, url='http://localhost:8000/v1'"
        return EmmechError(
            f"reach the model {self.model!r}",
            f"url={self.shown_url or 'https://api.openai.com/v1'}",
            f"no server answers there ({self.said(error.__cause__ or error)})",
            f"{start}; answers received so far are kept",
        )

    def _fatal(self, error: Any, request: Mapping[str, Any], name: str | None) -> EmmechError | None:
        """The error, if every other request would fail with it too; ``name`` is the field that it refuses."""
        asked, said = f"sample from {self.identity}", self.said(error)
        given: str | None = f"a request with {name}"
        if name is not None and name in request:
            given = f"{name}={request[name]!r}"
        if error.status_code in (401, 403):
            given = "no key" if self.key is None else "the key given"
            why = "the server refuses the key"
            instead = 'Server(..., key="...") with a key that may use this model'
        elif error.status_code == 404:
            given = f"model={request.get('model', self.model)!r}"
            why = "the server has no such model or address"
            instead = "GET /v1/models lists the names; the url ends in /v1"
        elif getattr(error, "code", None) == "insufficient_quota":
            given, why, instead = None, "the account's quota is used up", "top it up, then go on"
        elif name in _OF_LOGPROBS:
            why = "the server does not support that"
            instead = "a judge without log-probabilities: LogprobJudge(server, logprobs=False)"
            if name == "top_logprobs":
                instead = f"Server(..., extra={{'top_logprobs': 5}}) where it allows fewer; else {instead}"
        elif name in self.extra:  # its value may be secret
            given, why, instead = f"extra with {name!r}", "the server does not support that", "extra= without it"
        elif name is not None:
            why = "the server does not support that"
            instead = f"{name}=1.0" if name in ("temperature", "top_p") else "another model or server"
        elif error.status_code in (400, 422) and not self.accepts and not _OF_TEXT.search(str(error)):
            given, why = (
                f"fields {', '.join(sorted(request.keys() - {'extra_body'}))}",
                "the server refuses the request",
            )
            instead = "a request as the server's words want it; fields of its own go into Server(..., extra={...})"
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


def _refused_field(error: Any, request: Mapping[str, Any]) -> str | None:
    """The field of a request that a server's words refuse, None where they speak of something else."""
    said = str(error)
    if error.status_code not in (400, 422) or _OF_TEXT.search(said):
        return None
    names = {*request, *request["extra_body"]} - {"messages", "prompt", "model", "extra_body"}
    told = str(getattr(error, "param", None) or "")
    if told in names:
        return told
    if told.startswith("messages"):
        return None
    found = [name for name in sorted(names, key=len, reverse=True) if re.search(rf"\b{re.escape(name)}\b", said)]
    # "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead." refuses the first that it names
    return min(found, key=lambda name: said.index(name), default=None)


def _bare(address: SplitResult) -> str:
    """An address without user name, password, query and fragment."""
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"


def _basic(address: SplitResult) -> str:
    """The header that an address's user name and password make, "" without."""
    if not address.username and not address.password:
        return ""
    login = f"{unquote(address.username or '')}:{unquote(address.password or '')}"
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _asking(address: SplitResult) -> Callable[[Any], None]:
    """A hook that adds an address's query to each request as it is sent, so that the client's library cannot log it."""

    def add(request: Any) -> None:
        kind: Any = type(request.url)  # that of the client's library, which need not be httpx
        home = kind(_bare(address))
        # a redirection to another server does not take the query along
        if (request.url.scheme, request.url.host, request.url.port) == (home.scheme, home.host, home.port):
            shown = type("Shown", (kind,), {"__str__": lambda url: kind.__str__(url).partition("?")[0]})
            request.url = shown(request.url.copy_merge_params(parse_qsl(address.query)))

    return add


def _texts(value: Any, secret: bool = False) -> Iterator[str]:
    """Texts at any depth of a request's further fields that may be secret: long ones, and those of a telling name."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _texts(one, secret or bool(_SECRET.search(str(name))))
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _texts(one, secret)
    elif len(text := str(value)) >= (4 if secret else 8):
        yield text


def _without_secrets(value: Any) -> Any:
    """Fields in the order of their names, without those whose name tells that they are secret."""
    if isinstance(value, Mapping):
        named = sorted((str(name), one) for name, one in value.items() if not _SECRET.search(str(name)))
        return [(name, _without_secrets(one)) for name, one in named]
    return [_without_secrets(one) for one in value] if isinstance(value, list | tuple) else value


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


class Unanswered(dict[str, Any]):
    """The scores of a row of which a request failed: it is unscored for now, and the next call asks for it again."""


def ask_all(server: Server, bodies: Sequence[Mapping[str, Any]], tick: Callable[[], None]) -> list[Completion]:
    """The completions in order; ``tick`` is called after each.

    Raises:
        EmmechError: none of them is an answer, and the server has never given one.
    """
    got: list[Completion | None] = [None] * len(bodies)
    for index, completion in server.complete(bodies):
        got[index] = completion
        tick()
    failures = [completion.error for completion in got if completion is not None and completion.error is not None]
    if len(failures) == len(bodies) and failures and not server.accepts:
        server.report(failures, len(bodies))
    return [completion for completion in got if completion is not None]
