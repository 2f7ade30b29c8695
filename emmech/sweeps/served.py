"""The parts of a sweep whose checkpoints answer on a server: requests to all of a group's checkpoints go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from emmech.chat.model import ChatModel
from emmech.engine.packing import Reading
from emmech.engine.responses import Response, ResponseLog, digest
from emmech.errors import EmmechError
from emmech.evaluation.engine import Live
from emmech.evaluation.server import Completion, Server
from emmech.measures.measure import TeacherForced, measure_name
from emmech.measures.sampled import Sampled
from emmech.sweeps.grid import Grid
from emmech.sweeps.jobs import Arrays, ForcedReadings, SampledAnswers, as_bytes

Update = Callable[[int], object]
_ASKED = "sweep on a server"


def served_jobs(chat: ChatModel, grid: Grid, measures: Sequence[Any], out: str | Path | None) -> list[Any]:
    """The jobs of a sweep on a server.

    Raises:
        EmmechError: what needs the model's activations: coefficients, probes, whole distributions, functions.
    """
    if any(variant.coefficient for variant in grid.variants):
        why = "a server runs adapters, and has no place to steer"
        raise EmmechError(_ASKED, "coefficients", why, "the sweep without engine=")
    forced = [one for one in measures if isinstance(one, TeacherForced)]
    sampled = [one for one in measures if isinstance(one, Sampled)]
    if others := [measure_name(one) for one in measures if not isinstance(one, TeacherForced | Sampled)]:
        why = "it reads the model's activations, and a server gives texts and log-probabilities"
        raise EmmechError(
            _ASKED, f"the measure {others[0]!r}", why, '"margin", "answers", or the sweep without engine='
        )
    jobs: list[Any] = [ServedReadings(chat, forced)] if forced else []
    return jobs + [ServedAnswers(one, chat, out) for one in sampled]


def _servers(rows: Iterable[Live]) -> list[Server]:
    servers = [one.subject for one in rows if isinstance(one.subject, Server)]
    if not servers:
        raise EmmechError(_ASKED, "an engine in this process", "its checkpoints are on no server", "engine=None")
    return servers


def _answered(
    servers: Sequence[Server], bodies: Iterable[tuple[int, Mapping[str, Any]]], **options: Any
) -> Iterator[tuple[int, Completion]]:
    """Send requests, each with the index of the server that it is for, in one stream over all of them."""
    named = [{**body, "model": servers[which].model} for which, body in bodies]
    return servers[0].complete(named, **options)


class ServedReadings(ForcedReadings):
    """Teacher-forced measures, read from the log-probabilities of prompts.

    A server gives the log-probability of each token of a prompt. What is wanted of a token that does not follow in the
    text is read from a prompt of its own, which ends in it.
    """

    plan = "on a server"

    def __init__(self, chat: ChatModel, measures: Sequence[TeacherForced]) -> None:
        super().__init__(chat, measures)
        # each distinct prompt, and for each reading the prompt and the place of every target
        self.prompts: dict[tuple[int, ...], int] = {}
        self.places: list[list[tuple[int, int]]] = []
        for reading in self.readings:
            if reading.targets is None:
                why = "a server gives the log-probabilities of given tokens, and this reads the whole vocabulary"
                raise EmmechError(_ASKED, "whole distributions", why, "Margin, AnswerLogprob or FirstToken")
            self.places.append(list(self._wanted(reading)))

    def _wanted(self, reading: Reading) -> Iterator[tuple[int, int]]:
        # the text up to the last token that follows where it is read
        whole = reading.ids[: reading.at[-1] + 2]
        for at, targets in zip(reading.at, reading.targets or (), strict=True):
            for token in targets:
                follows = at + 1 < len(reading.ids) and reading.ids[at + 1] == token
                prompt = whole if follows else (*reading.ids[: at + 1], token)
                yield self.prompts.setdefault(prompt, len(self.prompts)), at

    def run(self, rows: Iterable[Live], group: Sequence[int], update: Update) -> Arrays:
        """Log-probabilities of every reading under a group of variants: ``[variants, targets]`` by reading.

        Raises:
            EmmechError: the server does not give them.
        """
        servers = _servers(rows)
        if readers := getattr(servers[0], "readers", None):
            servers[0] = replace(servers[0], concurrency=readers)
        prompts = list(self.prompts)
        asked = {"max_tokens": 1, "temperature": 0.0, "extra_body": {"prompt_logprobs": 0}}
        cells = [(which, prompt) for which in range(len(servers)) for prompt in range(len(prompts))]
        bodies = [(which, {"prompt": list(prompts[prompt]), **asked}) for which, prompt in cells]
        found = np.empty((len(servers), len(prompts)), dtype=object)
        whole, done = len(self) * len(servers), 0
        for answered, (index, got) in enumerate(_answered(servers, bodies), 1):
            which, prompt = cells[index]
            if got.prompt is None or len(got.prompt) != len(prompts[prompt]) - 1:
                given, why = f"prompt_logprobs of {servers[which].model}", "it gives none for a prompt of token ids"
                if got.error is not None:
                    why = got.error
                instead = "vLLM, or the sweep without engine="
                raise EmmechError("read log-probabilities from the server", given, why, instead)
            found[which, prompt] = got.prompt
            update(answered * whole // len(cells) - done)
            done = answered * whole // len(cells)
        return {
            str(index): np.array(
                [[found[which, prompt][at] for prompt, at in places] for which in range(len(servers))], np.float32
            )
            for index, places in enumerate(self.places)
        }


class ServedAnswers(SampledAnswers):
    """Sampled answers of all checkpoints of a group, in one stream of requests that is kept as it comes."""

    plan = "on a server"

    def __init__(self, measure: Sampled, chat: ChatModel, out: str | Path | None) -> None:
        super().__init__(measure, chat)
        self.out = Path(out) if out is not None else None

    def run(self, rows: Iterable[Live], group: Sequence[int], update: Update) -> Arrays:
        """Answers and verdicts of a group of variants.

        Raises:
            EmmechError: the server is gone, or requests failed for good; the others are kept.
        """
        servers, one = _servers(rows), self.measure
        cells = [(which, row) for which in range(len(servers)) for row in range(len(self.rows))]
        settings = {name: getattr(one, name) for name in ("temperature", "top_p")}
        asked = digest(self.rows, [server.identity for server in servers])
        name = f"part-answers-{one.name}-{group[0]:04d}.jsonl"
        log = ResponseLog(
            None if self.out is None else self.out / name,
            {"request": asked, "rows": len(cells), "max_new_tokens": one.max_new_tokens, **settings},
        )
        update(len(log.done))
        missing = [index for index in range(len(cells)) if index not in log.done]
        bodies = []
        for which, row in (cells[index] for index in missing):
            seeded = servers[which].seeded(self.rows[row]["seed"])
            own = {**servers[which].asked(self.conversations[row]), "max_tokens": one.max_new_tokens, **seeded}
            bodies.append((which, {**own, **settings}))
        failures = []
        fixed = [field for field, value in settings.items() if value != 1.0]
        for index, got in _answered(servers, bodies, fixed=fixed):
            cell = missing[index]
            log.add(cell, Response(*cells[cell], self.rows[cells[cell][1]]["seed"], got.text, got.finish, got.tokens))
            failures += [got.error] if got.error is not None else []
            update(1)
        if failures:
            given, why = f"{len(failures)} of {len(cells)} requests", f"they failed for good: {failures[0]}"
            instead = (
                "the same call again asks them alone" if self.out is not None else "out=, so that the others are kept"
            )
            raise EmmechError("sweep sampled answers on a server", given, why, instead)
        answers = [{"response": answer.text, "finish": answer.finish} for answer in log.responses(len(cells))]
        size = len(self.rows)
        return {"records": as_bytes([self.judged(answers[at : at + size]) for at in range(0, len(answers), size)])}
