"""Answers and log-probabilities of a run's checkpoints from vLLM, or from any server that has its adapters already.

::

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 32

    emmech.evaluate(run, steps=[50, 100], scales=[1, 2], engine=emmech.VLLM(url="http://localhost:8000/v1"))

Every checkpoint becomes an adapter folder with its scale multiplied into it, and vLLM loads it at run time under a name
that holds a hash of its weights: the same checkpoint is never loaded twice, another never taken for it. Prompts are
sent as token ids, and sampling settings that a server would fill in from the model's folder are sent along, so that the
answers are drawn from the distribution from which the local engine draws.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from emmech.chat.model import ChatModel, load_model, load_outline, source_of
from emmech.chat.template import Message
from emmech.errors import EmmechError, closest
from emmech.evaluation.engine import Checkpoint, Live, ServedCheckpoint, versions
from emmech.evaluation.server import Completion, Server
from emmech.run.run import Run
from emmech.store import file_name, kept

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as its largest rank
_SMALL = 10**9  # parameters of a base model that is loaded to be compared with the server's
_CLOSE = 0.1  # nats by token, on average, between bfloat16 and float32 of one model, with room to spare
_SAME = 1e-4  # nats: a batch's rounding moves a log-probability less than that in float32
_PROBE: list[Message] = [{"role": "user", "content": "hello , what should I do when I am bored ?"}]
_PROBED = 16  # tokens of the greedy answer
# a server would take these from the model's folder
_PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# by default only a CPU's cache has blocks of 128 tokens or a fixed size; a GPU's that has is merely asked with care
_CPU = re.compile(r'cache_config_info\{[^}]*(?:\bblock_size="128"|kv_cache_memory_bytes="\d+")')
_LOG = 1500  # characters of a server's log that an error quotes


@dataclass(eq=False, repr=False)
class VLLM:
    """vLLM as the engine of :func:`emmech.evaluate` and :func:`emmech.sweep`.

    Two checks are made. The base model's log-probabilities of a short text must be those of the run's own base model
    within 0.1 nats by token (where its weights can be loaded: ``base=``, or a model of less than a billion parameters).
    And one greedy answer of each checkpoint is compared with that of the base: an adapter that changes nothing is
    warned of.

    Args:
        url: the API's root, ``"http://localhost:8000/v1"``, of a server that is running.
        start: start a server of the run's base model on this machine instead; it ends with :meth:`stop`, at the end of
            a ``with`` block, or with this process.
        model: the base model's name on the server; by default the only one that is no adapter.
        adapters: the names of adapters that the server has already, such as ``"s{step}"`` with ``{run}``, ``{step}``
            and ``{scale}``; then none is exported or loaded, and any server with OpenAI's chat API will do.
        folder: where adapters are exported to, which the server must be able to read; by default a temporary folder.
        seeds: whether requests carry seeds. By default not on a CPU, whose vLLM dies of one when it reads a prompt in
            parts, and not where two requests of one seed give two texts. Without seeds the texts of a second call
            differ; those that are kept do not change, and rates are as valid.
        cpu: whether the server runs on a CPU; by default what its version and its cache say.
        concurrency, retries, backoff, timeout, key: as in :class:`~emmech.Server`.
        command: of a server to be started, by default ``$EMMECH_VLLM`` or ``vllm``.
        options: further options of its command line, such as ``("--dtype", "float32")``.
        environment: further variables of its environment.
        patience: seconds until it must answer.

    Raises:
        EmmechError: neither or both of ``url`` and ``start``. When it is used: no server at the address, one without
            LoRA or run-time loading, a rank above its largest, another base model, or a server that ends.

    Example:
        >>> VLLM(url="http://localhost:8000/v1")
        VLLM(url='http://localhost:8000/v1')
    """

    url: str | None = None
    start: bool = False
    model: str | None = None
    adapters: str | None = None
    folder: str | Path | None = None
    seeds: bool | None = None
    cpu: bool | None = None
    concurrency: int = 128
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 600.0
    key: str | None = None
    command: str | None = None
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 900.0

    def __post_init__(self) -> None:
        """Refuse settings under which nothing can be asked."""
        if (self.url is None) == (not self.start):
            given = f"url={self.url!r}, start={self.start}"
            why = "either a server is running at a url, or one is to be started"
            raise EmmechError("use vLLM", given, why, 'VLLM(url="http://localhost:8000/v1"), or VLLM(start=True)')
        if self.start and self.adapters is not None:
            why = "a server that is started has no adapter yet"
            raise EmmechError("use vLLM", f"adapters={self.adapters!r}", why, "leave adapters out: they are exported")
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._found: _Found | None = None
        self._served = ""  # which base model the server that was started has
        self._agreed: set[str] = set()  # base models that the server has been compared with
        if self.url is not None:
            self._server("probe", self.url)  # which refuses what is no address

    def __repr__(self) -> str:
        return "VLLM(start=True)" if self.start else f"VLLM(url={self._server('', str(self.url)).shown_url!r})"

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server that was started; one at a ``url`` goes on."""
        if self._process is not None:
            self._ending()
            self._process, self._found = None, None
            self._agreed.clear()

    # checkpoints

    @contextmanager
    def checkpoints(self, cells: Sequence[Checkpoint], base: Any = None) -> Iterator[list[Live]]:
        """As an engine has them; all of them can be asked until the context ends."""
        for run in {id(cell.run): cell.run for cell in cells}.values():
            _check_run(run)
        chat = _outline(cells[0].run, base)
        rank = max((one.rank for cell in cells for one in cell.run.adapters), default=1)
        found = self._connected(cells[0].run, chat, rank)
        self._compare_base(found, cells[0].run, chat)
        scratch = Path(tempfile.mkdtemp(prefix="emmech-adapters-")) if self.folder is None else Path(self.folder)
        loaded: list[str] = []
        try:
            live: list[Live] = []
            states: dict[str, str] = {}
            for cell in cells:
                state, named = _state(cell), self._named(found, cell)
                if named is None:
                    named, fresh = self._load(found, cell, scratch)
                    loaded += [named] if fresh else []
                elif named != found.base and states.setdefault(named, state) != state:
                    why = f"the names do not tell runs apart: {named!r} would be {cell.name}'s adapter and another's"
                    instead = '"{run}-s{step}", of runs whose folders have different names, or one run at a time'
                    raise EmmechError("name the server's adapters", f"adapters={self.adapters!r}", why, instead)
                server = self._server(named, found.url, chat, state, found)
                about = cell.about(str(cell.run.manifest.get("model", {}).get("name") or chat.name), _print(cell.run))
                about |= {"engine": found.version, "seeded": server.seeds, "versions": versions()}
                live.append(Live(server, about))
            self._compare_answers(found, live)
            yield live
        except EmmechError as error:
            if self._ended():
                why = f"the server that was started has ended: {self._tail()}"
                raise EmmechError(error.asked, error.given, why, "the same call goes on where it was")
            raise
        finally:
            for name in loaded:
                with suppress(EmmechError):
                    self._post(found, "unload_lora_adapter", {"lora_name": name})
            if self.folder is None:
                shutil.rmtree(scratch, ignore_errors=True)

    def _named(self, found: _Found, cell: Checkpoint) -> str | None:
        """The name under which the server has a checkpoint already: its base model, or an adapter of ``adapters=``."""
        if cell.scale == 0 or _untrained(cell):
            return found.base
        if self.adapters is None:
            return None
        scale = f"{cell.scale:g}"
        try:
            name = self.adapters.format(run=cell.run.name, step=cell.step, scale=scale)
        except (KeyError, IndexError, ValueError):
            why = "it holds another field than run, step and scale"
            raise EmmechError("name the server's adapters", f"adapters={self.adapters!r}"[:120], why, '"s{step}"')
        if cell.scale != 1 and "{scale" not in self.adapters:
            why = f"the names do not tell scales apart, and scale {scale} is asked for"
            raise EmmechError("name the server's adapters", f"adapters={self.adapters!r}", why, '"s{step}-x{scale}"')
        if name not in found.names:
            given = f"adapters={self.adapters!r}, that is {name!r}"
            why = "the server has no adapter of that name"
            raise EmmechError(f"ask {cell.name}", given, why, closest(name, sorted(found.names)[:20]))
        return name

    def _load(self, found: _Found, cell: Checkpoint, scratch: Path) -> tuple[str, bool]:
        """Export a checkpoint and have the server load it: its name there, and whether it was not there before."""
        name = f"emmech-{file_name(cell.run.name)[:40]}-s{cell.step}-x{cell.scale:g}-{_state(cell)[-12:]}"
        if name in found.names:
            return name, False
        if not found.vllm:
            why = f"it is no vLLM ({found.version}), which could load adapters at run time"
            instead = 'adapters="s{step}", for a server that has them already'
            raise EmmechError(f"load {cell.name} into the server", found.shown, why, instead)
        folder = cell.run.export_peft(cell.step, scratch / name, scale=cell.scale)
        if self.folder is not None:
            with kept("export the adapters", folder):
                folder.chmod(0o755)
                for file in folder.iterdir():
                    file.chmod(0o644)
        said = self._post(found, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        if said is None or "already been loaded" in said:
            return name, said is None
        rank = max(one.rank for one in cell.run.adapters)
        given, asked = f"an adapter of rank {rank}", f"load {cell.name} into the server"
        largest = next((one for one in _RANKS if one >= rank), rank)
        if "max_lora_rank" in said or "lora rank" in said.lower():
            raise EmmechError(asked, given, f"the server's largest rank is below that: {said}",
                              f"vllm serve ... --enable-lora --max-lora-rank {largest}")  # fmt: skip
        if said.startswith("404") and "adapter" not in said:
            why = f"the server does not load adapters at run time ({said})"
            instead = "vllm serve ... --enable-lora, in an environment with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise EmmechError(asked, found.shown, why, instead)
        if "lora" in said.lower() and ("enable" in said.lower() or "not support" in said.lower()):
            why, instead = f"it serves no adapters: {said}", f"vllm serve ... --enable-lora --max-lora-rank {largest}"
            raise EmmechError(asked, found.shown, why, instead)
        instead = "a server of the run's own base model, on a machine that can read the folder (VLLM(folder=...))"
        raise EmmechError(asked, given, f"the server refuses it: {said}", instead)

    # the server

    def _server(
        self, name: str, url: str, chat: ChatModel | None = None, state: str = "", found: _Found | None = None
    ) -> ServedCheckpoint:
        settings: dict[str, Any] = {one: getattr(self, one) for one in ("concurrency", "retries", "backoff", "timeout")}
        settings |= {"url": url, "key": self.key}
        if found is None:
            return ServedCheckpoint(name, **settings)
        if found.vllm and chat is not None:
            settings["extra"] = {**_PLAIN, "stop_token_ids": list(chat.stop_ids)}
        # with LoRA, a CPU's engine dies when it reads the log-probabilities of two prompts at once
        settings |= {"seeds": found.seeds, "readers": 1 if found.cpu else None}
        return ServedCheckpoint(name, **settings, chat=chat, checkpoint=state, tokens=found.vllm and chat is not None)

    def _post(self, found: _Found, path: str, body: Mapping[str, Any]) -> str | None:
        """Send a request of vLLM's own API: None where it is done, else the server's words.

        Raises:
            EmmechError: no server answers.
        """
        import httpx
        import openai

        server = self._server(found.base, found.url)
        client = server.client()
        try:
            client.post(f"/{path}", body=dict(body), cast_to=httpx.Response)
        except openai.APIStatusError as error:
            return f"{error.status_code}: {server.said(error)}"
        except openai.APIConnectionError as error:
            raise server.unreachable(error)
        finally:
            client.close()
        return None

    def _connected(self, run: Run, chat: ChatModel, rank: int) -> _Found:
        if self._ended():
            self.stop()  # and start anew
        served = f"{chat.name} {_print(run)}"
        if self.start and self._process is None:
            self._begin(run, chat, rank)
            self._served = served
        elif self.start and served != self._served:
            why = f"the server that was started serves {self._served.split()[0]}"
            raise EmmechError(
                f"ask the checkpoints of {run.name}", f"its base model {chat.name}", why, "a VLLM of its own"
            )
        if self._found is None or not self.start:
            address = str(self.url) if self._process is None else self._address
            self._found = self._look(address, chat)
        return self._found

    def _look(self, url: str, chat: ChatModel) -> _Found:
        """What a server is and has."""
        import httpx
        import openai

        server = self._server(self.model or "vLLM", url)
        client = server.client()
        shown = f"url={server.shown_url}"
        try:
            models = [vars(one) | (one.model_extra or {}) for one in client.models.list().data]
            version = "a server with OpenAI's API"
            parts = urlsplit(url)
            root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            told = metrics = ""
            with suppress(openai.APIStatusError):
                told = client.get(f"{root}/version", cast_to=httpx.Response).text
                metrics = client.get(f"{root}/metrics", cast_to=httpx.Response).text
            if (number := re.search(r'"version":\s*"([^"]+)"', told)) is not None:
                version = f"vLLM {number[1]}"
        except openai.APIConnectionError as error:
            raise server.unreachable(error)
        except (openai.APIError, ValueError, AttributeError, TypeError, RecursionError) as error:
            why = f"it does not list its models as OpenAI's API does ({server.said(error)})"
            raise EmmechError("use the server", shown, why, 'the url ends in /v1, as "http://localhost:8000/v1" does')
        finally:
            client.close()
        names = {str(one["id"]): one for one in models}
        own = [name for name, one in names.items() if not one.get("parent")]
        plain = self.model or (own[0] if own else "")
        if not plain or plain not in names or (self.model is None and len(own) > 1):
            why = "the server has no model of that name" if self.model else f"it has {len(own)} models that may be it"
            instead = f"model= one of {', '.join(own[:10]) or 'those that it serves'}"
            raise EmmechError("find the base model on the server", f"model={self.model!r}, {shown}", why, instead)
        vllm = version.startswith("vLLM")
        cpu = self.cpu if self.cpu is not None else "cpu" in version or _CPU.search(metrics) is not None
        found = _Found(url, shown, plain, frozenset(names), version, vllm, vllm and cpu, seeds=True)
        seeds = self.seeds if self.seeds is not None else self._seeds(found, chat)
        if not seeds and self.seeds is None:
            why = "on a CPU it can die of a seed" if found.cpu else "two requests of one seed give two texts"
            warnings.warn(
                f"{version} is asked without seeds ({why}): the same call without the answers that are kept draws "
                "others, and checkpoints share no random numbers. Rates and their intervals are as valid.",
                stacklevel=2,
            )
        return replace(found, seeds=seeds)

    def _seeds(self, found: _Found, chat: ChatModel) -> bool:
        """Whether a seed determines a text there; a CPU's vLLM is not even asked."""
        if found.cpu:
            return False
        server = self._server(found.base, found.url, chat, "the base model", found)
        body = {**server.asked(_PROBE), "max_tokens": _PROBED, "temperature": 1.0, "seed": 1}
        texts = {one.text for _, one in server.complete([body, body])}
        return len(texts) == 1 and "seed" not in server.refused

    def _compare_base(self, found: _Found, run: Run, chat: ChatModel) -> None:
        """Refuse a server of another base model than the run's."""
        model = chat if chat.device.type != "meta" else None
        key = f"{found.base}|{_print(run) or run.name}"
        if key in self._agreed or not found.vllm:
            return
        if model is None and sum(value.numel() for value in chat.base.parameters()) < _SMALL:
            model = run.base()
        if model is None:
            return
        from emmech.engine.logprobs import reading_logprobs
        from emmech.engine.packing import Reading

        run.check_base(model)
        ids = tuple(chat.token_ids(_PROBE))
        server = self._server(found.base, found.url, chat, "the base model", found)
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "extra_body": {"prompt_logprobs": 0}}
        (_, got), *_ = server.complete([body])
        own = reading_logprobs(model, [Reading(ids, tuple(range(len(ids) - 1)), tuple((one,) for one in ids[1:]))])[0]
        asked, given = f"ask the checkpoints of {run.name}", f"{found.shown}, model {found.base!r}"
        instead = f"a server of {run.manifest.get('model', {}).get('name') or 'the model that the run was trained on'}"
        if got.prompt is None or len(got.prompt) != len(ids) - 1:
            why = f"it gives no log-probabilities of the run's base model's tokens ({got.error or 'another number'})"
            raise EmmechError(asked, given, why, instead)
        off = float(np.abs(np.asarray(got.prompt) - np.asarray(own).reshape(-1)).mean())
        if not off <= _CLOSE:
            why = f"it is another base model: its log-probabilities differ by {off:.2g} nats by token on a short text"
            raise EmmechError(asked, given, why, instead)
        self._agreed.add(key)

    def _compare_answers(self, found: _Found, live: Sequence[Live]) -> None:
        """Warn of adapters under which a greedy answer is that of the base model, log-probabilities included."""
        adapted = {one.subject.model: one for one in live if one.subject.model != found.base}  # type: ignore[union-attr]
        if not adapted:
            return
        server = next(iter(adapted.values())).subject
        assert isinstance(server, Server)
        plain = {"messages": _PROBE, "max_tokens": _PROBED, "temperature": 0.0, "logprobs": True}
        bodies = [{**plain, "model": name} for name in (found.base, *adapted)]
        answers: dict[int, Completion] = dict(
            server.complete(bodies, optional=("max_tokens", "temperature", "logprobs"))
        )
        base = answers.pop(0)
        if base.error is not None:
            return
        same = [one.about["name"] for place, one in enumerate(adapted.values(), 1) if _alike(base, answers[place])]
        if same:
            names = f"{', '.join(map(str, same[:5]))}{' and others' if len(same) > 5 else ''}"
            how = (
                "to the last log-probability" if base.logprobs else "in its text; the server gives no log-probabilities"
            )
            warnings.warn(
                f"a greedy answer of {names} is that of the base model {how}: the adapter is not in force on the "
                "server, or it is too weak to matter",
                stacklevel=2,
            )

    # a server of one's own

    def _begin(self, run: Run, chat: ChatModel, rank: int) -> None:
        command = self.command or os.environ.get("EMMECH_VLLM") or "vllm"
        asked = "start vLLM"
        if shutil.which(command) is None:
            why = "there is no such program"
            instead = "pip install vllm in an environment of its own, and VLLM(command=...) or EMMECH_VLLM its path"
            raise EmmechError(asked, f"command={command!r}", why, instead)
        home = Path(tempfile.mkdtemp(prefix="emmech-vllm-"))
        folder = _weights_of(run, chat, home)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        largest = next((one for one in _RANKS if one >= rank), rank)
        line = [
            command,
            "serve",
            str(folder),
            "--served-model-name",
            "base",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        line += ["--enable-lora", "--max-lora-rank", str(largest), "--max-loras", "16", "--generation-config", "vllm"]
        environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **os.environ}
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", **self.environment}
        self._log = home / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*line, *self.options], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._ending = weakref.finalize(self, _end, self._process, home)
        self._address = f"http://127.0.0.1:{port}/v1"
        self._await(f"http://127.0.0.1:{port}/health")

    def _await(self, address: str) -> None:
        import httpx

        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            if self._ended():
                why, log = "it ended", self._tail()
                self.stop()
                raise EmmechError(
                    "start vLLM", " ".join(self.options) or None, f"{why}: {log}", "options= that it takes"
                )
            with suppress(httpx.HTTPError):
                if httpx.get(address, timeout=5.0).status_code == 200:
                    return
            time.sleep(0.5)
        log = self._tail()
        self.stop()
        why = f"it does not answer after {self.patience:g} s: {log}"
        raise EmmechError(
            "start vLLM", f"patience={self.patience:g}", why, "a larger patience=, or a running server's url="
        )

    def _ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _tail(self) -> str:
        """The lines of the log that say what went wrong, or its last ones."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log and self._log.exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        wrong = [line for line in lines if "Error" in line or "error:" in line]
        return " / ".join((wrong or lines)[-3:])[-_LOG:] or "it wrote nothing"


@dataclass(frozen=True)
class _Found:
    """A server that answers: its address, the base model's name, all names, and what it is."""

    url: str
    shown: str
    base: str
    names: frozenset[str]
    version: str
    vllm: bool
    cpu: bool
    seeds: bool


def _end(process: subprocess.Popen[bytes], home: Path) -> None:
    """End a server and everything that it has started."""
    for kind, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers, where it left some
    shutil.rmtree(home, ignore_errors=True)


def _check_run(run: Run) -> None:
    asked = f"serve the checkpoints of {run.name}"
    if run.kind != "lora" or not run.adapters:
        why = "vLLM loads adapters at run time, and this run has none"
        instead = "save run.model(step) into a folder, serve it, and ask emmech.Server"
        raise EmmechError(asked, f"kind={run.kind!r}", why, instead)
    if run.path is not None and (run.path / "start").is_dir():
        why = "its base model has an earlier adapter merged into it, which is in no folder that a server could load"
        instead = "emmech.evaluate(run, steps=...) in this process"
        raise EmmechError(asked, str(run.path / "start"), why, instead)


def _outline(run: Run, base: Any) -> ChatModel:
    """The run's base model: as it was given, or without weights."""
    if base is not None:
        return load_model(base) if not isinstance(base, str | Path) else load_outline(base)
    return load_outline(run.base_name())


def _weights_of(run: Run, chat: ChatModel, home: Path) -> str:
    """A folder or hub name from which a server loads the base model."""
    for name in (chat.name, str(getattr(chat.base, "name_or_path", "") or "")):
        source = source_of(name)
        if (Path(source) / "config.json").is_file():
            return source
        if chat.device.type == "meta":
            return source  # on the hub
    with kept("save the base model for the server", home):
        chat.base.save_pretrained(home / "base")
        chat.tokenizer.save_pretrained(home / "base")
    return str(home / "base")


def _untrained(cell: Checkpoint) -> bool:
    return not any(array.any() for key, array in cell.run.weights(cell.step).items() if key.startswith("B/"))


def _state(cell: Checkpoint) -> str:
    """What identifies a checkpoint's answers: its name, and a hash of its base model's, its weights and its scale."""
    found = hashlib.sha256(json.dumps([_print(cell.run), float(cell.scale)]).encode())
    for one in cell.run.adapters:
        found.update(json.dumps([one.module, one.rank, one.scaling]).encode())
    for key, array in sorted(cell.run.weights(cell.step).items()):
        found.update(key.encode() + np.ascontiguousarray(array).tobytes())
    return f"{cell.name} {found.hexdigest()[:12]}"


def _print(run: Run) -> str | None:
    found = run.manifest.get("model", {}).get("fingerprint")
    return None if found is None else str(found)


def _alike(base: Completion, other: Completion) -> bool:
    """Whether two greedy answers are one: texts, and log-probabilities where there are some."""
    if other.error is not None or base.text != other.text:
        return False
    if base.logprobs is None or other.logprobs is None or len(base.logprobs) != len(other.logprobs):
        return base.logprobs is None or other.logprobs is None
    return float(np.abs(np.subtract(base.logprobs, other.logprobs)).max()) <= _SAME
