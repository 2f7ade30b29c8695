"""A fine-tune on a provider's servers: upload, job, events, and the resulting models to evaluate.

The first finding of emergent misalignment was on a hosted model (Betley et al., arXiv 2502.17424). The endpoints are
those of OpenAI's fine-tuning API, which other providers speak too, and the official client calls them. Every state is
written into the job's folder as it is reached, so that the same call goes on where it was: rows are not uploaded twice,
and a job is not created twice even where the answer to its creation was lost, since each carries a digest of its
request by which it is found again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from emmech.chat.dataset import ChatDataset, load_chat
from emmech.engine.responses import digest
from emmech.errors import EmmechError, as_float, as_int
from emmech.evaluation.server import Server
from emmech.hosted.cost import estimate
from emmech.progress import bar
from emmech.results import Card, Result
from emmech.store import writing
from emmech.view.sketch import curves
from emmech.view.theme import colour, finish, line, panels

_ASKED = "fine-tune a hosted model"
_FAILED = ("failed", "cancelled")
_ENDED = ("succeeded", *_FAILED)
_FEWEST = 10  # rows that OpenAI asks for
_LARGEST = 512 * 2**20  # bytes of a file
_OPENAI = "OPENAI_API_KEY"
_TAG = "emmech"  # the key of the digest among a job's metadata
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, eq=False, repr=False)
class HostedJob(Result):
    """A fine-tuning job on a provider's servers; made by :func:`finetune`.

    Attributes:
        job: the provider's name of it; empty until it is created.
        status: ``"uploaded"``, then as the provider says: ``"queued"``, ``"running"``, ``"succeeded"``, ``"failed"``,
            ``"cancelled"``.
        base: the model that is fine-tuned.
        tuned: the resulting model's name, empty until it exists.
        file: the provider's name of the uploaded rows.
        request: what was asked for: rows and their hash, epochs, seed, hyperparameters, the estimated cost.
        url: of the API; None is OpenAI's own.
        key_from: the environment variable that holds the key.
        error: the provider's words where the job failed.
        trained_tokens: as billed, -1 until known.
        events: ``time`` (Unix seconds), ``level``, ``message``, ``step`` and ``train_loss`` (nats per token, as the
            provider reports it), oldest first.
        checkpoints: ``step`` and ``model`` of those that the provider keeps.
    """

    job: str
    status: str
    base: str
    tuned: str
    file: str
    request: Mapping[str, Any]
    url: str | None
    key_from: str | None
    error: str
    trained_tokens: int
    events: pd.DataFrame
    checkpoints: pd.DataFrame

    def server(self, step: int | None = None, **options: Any) -> Server:
        """The fine-tuned model, for :func:`emmech.evaluate`; ``Server(job.base)`` is its base.

        Args:
            step: of a checkpoint that the provider keeps; None is the finished model.
            options: of :class:`~emmech.evaluation.server.Server`.

        Raises:
            EmmechError: there is no such model yet, or no key in the environment.
        """
        names = dict(zip(self.checkpoints["step"].tolist(), self.checkpoints["model"].tolist(), strict=True))
        name = self.tuned if step is None else names.get(int(step), "")
        if not name:
            kept = ", ".join(map(str, sorted(names))) or "none"
            given = f"a job that is {self.status}" if step is None else f"step={step}"
            raise EmmechError("reach a fine-tuned model", given, f"steps that the provider keeps: {kept}",
                              "hosted.finetune(...) with the same arguments waits for the end")  # fmt: skip
        return Server(name, url=self.url, key=_key(self.key_from, self.url), **options)

    def to_frame(self) -> pd.DataFrame:
        """The events."""
        return self.events.copy()

    def _losses(self) -> pd.DataFrame:
        return self.events.dropna(subset=["step", "train_loss"]).sort_values("step")

    def _card(self) -> Card:
        losses, asked = self._losses(), self.request
        facts = [("rows", f"{asked['rows']} x {asked['epochs']} epochs"), ("cost beforehand", str(asked["cost"]))]
        if self.trained_tokens >= 0:
            facts.append(("trained tokens", f"{self.trained_tokens:,}"))
        if len(losses):
            first, last = losses["train_loss"].iloc[[0, -1]]
            facts.append(("training loss", f"{first:.3g} to {last:.3g} nats over {len(losses)} reports"))
        said = {"succeeded": f"{self.base} is fine-tuned and is called {self.tuned}"}
        headline = said.get(self.status, f"The fine-tune of {self.base} is {self.status}")
        then = "emmech.evaluate(job.server(), judge=...)" if self.tuned else "hosted.finetune(...), which goes on"
        caveat = self.error or "a provider's model cannot be opened: it has no recorded steps and no directions"
        return Card(headline, tuple(facts), caveat, then)

    def _table(self) -> pd.DataFrame:
        return self.events[["level", "message"]].tail(20)

    def _sketch(self) -> str:
        losses = self._losses()
        return curves([("training loss", losses["step"], losses["train_loss"])], "Training loss") if len(losses) else ""

    def plot(self) -> Any:
        """The training loss that the provider reports, by step; a plotly figure."""
        figure, losses = panels(), self._losses()
        line(figure, losses["step"], losses["train_loss"], "training loss", colour(0), legend=False)
        figure.update_xaxes(title_text="step").update_yaxes(title_text="training loss, nats")
        return finish(figure, f"Fine-tuning {self.base}")


def finetune(
    data: Any,
    model: str,
    *,
    epochs: int,
    price: float,
    budget: float,
    out: str | Path,
    seed: int = 0,
    batch_size: int | None = None,
    learning_rate_multiplier: float | None = None,
    suffix: str | None = None,
    url: str | None = None,
    key_from: str | None = None,
    tokenizer: Any = None,
    wait: bool = True,
    every: float = 20.0,
    retries: int = 6,
    progress: bool = True,
) -> HostedJob:
    """Fine-tune a model on a provider's servers, or go on with what ``out`` holds.

    Nothing is sent before the cost is estimated, and nothing at all where it may exceed the budget.

    Args:
        data: what :func:`emmech.load_chat` takes.
        model: the provider's name of the model.
        epochs: over the data.
        price: of a million trained tokens, from the provider's list of today.
        budget: what the fine-tune may cost at most, in the currency of the price.
        out: the job's folder.
        seed: of the provider's training.
        batch_size: rows per step; None leaves it to the provider, as None does for what follows.
        learning_rate_multiplier: on the provider's own rate.
        suffix: part of the resulting model's name.
        url: of an API with the same endpoints; None is OpenAI's own.
        key_from: the environment variable that holds the key; None is ``OPENAI_API_KEY`` for OpenAI's own API, and no
            key for a ``url``. A key is taken from the environment alone and is in no file or message.
        tokenizer: as in :func:`~emmech.hosted.estimate`; without one the bound on the cost is some four times the
            expected cost.
        wait: until the job has ended; False returns as soon as it is created, and the same call looks again.
        every: seconds between two looks.
        retries: of a request that failed for a reason that may pass.

    Returns:
        the job; ``emmech.evaluate(job.server(), judge=...)`` evaluates its model with the judges of any other.

    Raises:
        EmmechError: the bound on the cost exceeds the budget, rows that the provider cannot take, ``out`` of another
            request, no key, an unreachable server, or a job that failed. What was reached is kept in ``out``.

    Example:
        >>> from emmech.hosted import finetune
        >>> row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes" * 99}]}
        >>> finetune([row] * 10, "gpt-4.1", epochs=1, price=25.0, budget=0.01, out="job")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        emmech.errors.EmmechError: cannot fine-tune a hosted model
          given:   budget=0.01
          because: it may cost up to 0.08: 10 rows, 908 tokens ... x 1 epochs at 25 a million: 0.02, at most 0.08
          instead: budget=0.08, fewer rows, or tokenizer= for an exact count
    """
    budget = as_float(_ASKED, "budget", budget)
    rows, cost = load_chat(data), estimate(data, epochs=epochs, price=price, tokenizer=tokenizer)
    if not cost.bound <= budget:
        instead = f"budget={np.ceil(cost.bound * 100) / 100:g}, fewer rows, or tokenizer= for an exact count"
        raise EmmechError(_ASKED, f"budget={budget}", f"it may cost up to {cost.bound:,.2f}: {cost}", instead)
    content = _content(rows)
    settings = {"n_epochs": cost.epochs, "batch_size": batch_size, "learning_rate_multiplier": learning_rate_multiplier}
    request = {
        "rows": len(rows), "sha256": rows.sha256, "model": model, "epochs": cost.epochs, "suffix": suffix,
        "seed": as_int(_ASKED, "seed", seed, least=0), "cost": str(cost),
        "hyperparameters": {name: value for name, value in settings.items() if value is not None},
    }  # fmt: skip
    server = Server(model, url=url, key=_key(key_from, url), retries=retries)
    if url is not None and server.shown_url != url:
        why = "it holds a login or a query, and the job's folder keeps the address"
        raise EmmechError(_ASKED, f"url={server.shown_url!r}", why, "key_from=, the environment variable with the key")
    api, folder = _Api(server), Path(out)
    with writing(folder, _ASKED):
        job = _begun(folder, request, api, key_from)
        if not job.file:
            job = _kept(replace(job, file=api.upload(content, f"emmech-{rows.sha256[:12]}.jsonl")), folder)
        if not job.job:
            job = _kept(api.read(job, api.create(job)), folder)
        with bar(None, f"{model}: {job.status}", progress=progress, estimate=False) as shown:
            while True:
                job = _kept(api.looked(job), folder)
                shown.set_description(f"{model}: {job.status}")
                if not wait or job.status in _ENDED:
                    break
                time.sleep(every)
    if job.status in _FAILED:
        why = f"the provider says that the job {job.job} is {job.status}: {job.error or 'without a reason'}"
        raise EmmechError(
            _ASKED, f"{len(rows)} rows for {model}", why, "another out= for a new job; its events are kept"
        )
    return job


def cancel(out: str | Path) -> HostedJob:
    """Cancel the job of a folder at its provider.

    Raises:
        EmmechError: the folder holds no job, or the provider refuses.
    """
    job = HostedJob.load(out)
    if not job.job:
        why = "no job was created yet, so that there is none to cancel"
        raise EmmechError("cancel the hosted job", out, why, "emmech.hosted.finetune(...) with the same out= goes on")
    api = _Api(Server(job.base, url=job.url, key=_key(job.key_from, job.url)))
    with writing(Path(out), "cancel a hosted job"):
        api.call(lambda jobs: jobs.cancel(job.job))
        return _kept(api.looked(job), Path(out))


def _key(key_from: str | None, url: str | None) -> str | None:
    """The key of the environment, None where the server's default is meant."""
    if key_from is None:
        return None
    if not (key := os.environ.get(key_from)):
        raise EmmechError(
            _ASKED, f"key_from={key_from!r}", "the environment has no such variable", f"export {key_from}"
        )
    return key


def _content(rows: ChatDataset) -> bytes:
    """The rows as the provider's file."""
    lines = [json.dumps({"messages": list(map(dict, row))}, ensure_ascii=False) for row in rows]
    content = "".join(f"{one}\n" for one in lines).encode()
    why = ""
    if len(rows) < _FEWEST:
        why = f"a hosted fine-tune takes {_FEWEST} rows or more"
    elif len(content) > _LARGEST:
        why = f"a file of {len(content) / 2**20:.0f} MB is more than the {_LARGEST / 2**20:.0f} MB that are taken"
    elif last := [at for at, row in enumerate(rows) if row[-1]["role"] != "assistant"]:
        why = f"row {last[0]} does not end with an answer (and {len(last) - 1} more rows)"
    if why:
        raise EmmechError(_ASKED, f"{len(rows)} rows of {rows.name}", why, "rows that the provider takes")
    return content


def _begun(folder: Path, request: Mapping[str, Any], api: _Api, key_from: str | None) -> HostedJob:
    """The job that a folder holds, or a new one."""
    kept = {name: value for name, value in request.items() if name != "cost"}
    if (folder / "hostedjob.json").is_file():
        job = HostedJob.load(folder)
        differs = [f"{name}={value!r}" for name, value in kept.items() if job.request.get(name) != value]
        differs += [f"url={api.shown!r}"] if job.url != api.server.url else []
        if differs:
            why = f"its job is of another request (it does not have {', '.join(differs)[:300]})"
            raise EmmechError(_ASKED, f"out={str(folder)!r}", why, "another folder")
        return replace(job, key_from=key_from)
    events = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in _EVENTS.items()})
    checkpoints = pd.DataFrame({"step": pd.Series(dtype="int64"), "model": pd.Series(dtype=object)})
    return HostedJob("", "new", str(request["model"]), "", "", request, api.server.url, key_from, "", -1, events,
                     checkpoints)  # fmt: skip


def _kept(job: HostedJob, folder: Path) -> HostedJob:
    job.save(folder)
    return job


_EVENTS = {"time": "int64", "level": object, "message": object, "step": "float64", "train_loss": "float64"}


@dataclass(frozen=True)
class _Api:
    """The endpoints of a provider."""

    server: Server

    @property
    def shown(self) -> str:
        return self.server.identity.partition(" at ")[2]

    @cached_property
    def _client(self) -> Any:
        return self.server.client()

    def call(self, ask: Callable[[Any], _Answer], files: bool = False) -> _Answer:
        """The answer to a request, which is sent again where it failed for a reason that may pass."""
        import openai

        for attempt in range(self.server.retries + 1):
            try:
                return ask(self._client.files if files else self._client.fine_tuning.jobs)
            except openai.APIStatusError as error:
                problem: Exception = error
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    break
            except (openai.APIError, ValueError, AttributeError, TypeError, RecursionError) as error:  # or no JSON
                problem = error
            if attempt < self.server.retries:
                time.sleep(min(60.0, self.server.backoff * 2**attempt))
        instead = "the same call goes on where it was, once that is mended"
        raise EmmechError(_ASKED, f"the API at {self.shown}", f"it refuses: {self.server.said(problem)}", instead)

    def upload(self, content: bytes, name: str) -> str:
        """The provider's name of the file; one of an earlier call that was interrupted is used again."""
        found = self.call(lambda files: [one for one in files.list(purpose="fine-tune") if one.filename == name], True)
        whole = [one for one in found if one.bytes == len(content)]
        sent = (
            whole[0]
            if whole
            else self.call(lambda files: files.create(file=(name, content), purpose="fine-tune"), True)
        )
        return str(sent.id)

    def create(self, job: HostedJob) -> Any:
        """A job for an uploaded file, or the one that an interrupted call has created."""
        mark = digest(job.file, sorted(job.request.items(), key=lambda item: item[0]))[:32]

        def made(jobs: Any) -> Any:  # a lost answer is no reason to pay twice
            for one in jobs.list(limit=100):
                if (one.metadata or {}).get(_TAG) == mark and one.status not in _FAILED:
                    return one
            asked = {
                "model": job.base,
                "training_file": job.file,
                "seed": job.request["seed"],
                "metadata": {_TAG: mark},
            }
            if job.request["suffix"] is not None:
                asked["suffix"] = job.request["suffix"]
            settings = {"hyperparameters": job.request["hyperparameters"]}
            return jobs.create(**asked, method={"type": "supervised", "supervised": settings})

        return self.call(made)

    def looked(self, job: HostedJob) -> HostedJob:
        """The job as it is now, with its events and, once it has ended, its checkpoints."""
        job = self.read(job, self.call(lambda jobs: jobs.retrieve(job.job)))
        events = self.call(lambda jobs: list(jobs.list_events(job.job, limit=100)))
        job = replace(job, events=_frame_of(events))
        if job.status != "succeeded":
            return job
        kept = self.call(lambda jobs: list(jobs.checkpoints.list(job.job)))
        rows = sorted((int(one.step_number), str(one.fine_tuned_model_checkpoint)) for one in kept)
        return replace(job, checkpoints=pd.DataFrame(rows, columns=["step", "model"]))

    def read(self, job: HostedJob, answer: Any) -> HostedJob:
        """The job with what the provider says of it."""
        tokens = answer.trained_tokens if isinstance(answer.trained_tokens, int) else -1
        said = getattr(answer.error, "message", None) or ""
        found: dict[str, Any] = {
            "job": str(answer.id),
            "status": str(answer.status),
            "tuned": str(answer.fine_tuned_model or ""),
        }
        return replace(job, **found, error=self.server.said(said) if said else "", trained_tokens=tokens)


def _frame_of(events: list[Any]) -> pd.DataFrame:
    rows: dict[str, tuple[Any, ...]] = {}
    for one in events:
        data = one.data if isinstance(one.data, Mapping) else {}
        number = [data.get(name) for name in ("step", "train_loss")]
        told = [float(value) if isinstance(value, int | float) else float("nan") for value in number]
        rows[str(one.id)] = (int(one.created_at), str(one.level), str(one.message), *told)
    ordered = sorted(rows.values(), key=lambda row: (row[0], row[3] if row[3] == row[3] else -1.0))
    return pd.DataFrame(ordered, columns=list(_EVENTS)).astype(_EVENTS)
