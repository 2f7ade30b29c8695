"""The parts of a sweep: each job measures one group of variants after another, within a budget of memory.

Teacher-forced measures, probes and sampled answers share forwards between variants; any other measure is a function of
a model and is taken with one variant after another live on it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from emmech.chat.model import ChatModel
from emmech.engine.adapters import VariantWeights, attach, detach
from emmech.engine.decode import Answer, context, decode_variants
from emmech.engine.logprobs import WORDS, target_logprobs, unembed
from emmech.engine.modules import hooked
from emmech.engine.packing import Reading
from emmech.engine.stream import probe_rows
from emmech.engine.variants import Block, Engine
from emmech.errors import EmmechError
from emmech.evaluation.evaluate import checked_scores
from emmech.evaluation.judges import resolve_judge
from emmech.evaluation.questions import Question, resolve_questions
from emmech.evaluation.server import Unanswered
from emmech.measures.measure import Measure, TeacherForced, Value, measure_all
from emmech.measures.probe import ProbeActivation, raw_vector
from emmech.measures.sampled import Sampled
from emmech.run.identity import identity
from emmech.sweeps.grid import Grid

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class JobResult:
    """The result of a job from all its parts; every array has one entry per distinct variant."""

    values: list[Value]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    responses: list[dict] | None = None
    unanswered: int = 0  # answers that have no score since a request to the judge failed


# On a CPU a forward of about this many tokens is the quickest: smaller products are slower, larger tensors fall out of
# the cache.
_CPU_TOKENS = 768
_GPU_TOKENS = 1 << 16
_CPU_LOGIT_ROWS = 128
GPU_SHARE = 0.6  # of the free memory of a GPU


@dataclass(frozen=True)
class Plan:
    """How a memory budget is spent."""

    tokens: int  # through the upper blocks at once
    logit_rows: int  # read positions through the unembedding at once
    expected: int  # most bytes that are in use, besides the weights
    budget: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens at once, about {readable(self.expected)} of {readable(self.budget)}"


def plan(chat: ChatModel, grid: Grid, engine: Engine, longest: int, variants: int, budget: int) -> Plan:
    """Fit one forward into the budget.

    Args:
        longest: tokens of the longest single row.
        variants: whose adapters are in memory together.

    Raises:
        EmmechError: not even one row of one variant fits.
    """
    eager = getattr(chat.config, "_attn_implementation", None) == "eager"
    scores = 12 * int(chat.config.num_attention_heads) * longest if eager else 0
    per_token = engine.bytes_per_token() + scores
    per_logit_row = 12 * int(chat.config.vocab_size)  # logits in the model's dtype, in float32, and what is picked
    # the shared pass, whose result lives on while the upper blocks run
    kept = variants * grid.bytes_per_variant(chat) + longest * 8 * (engine.widest + 2 * chat.d_model)
    needed = kept + longest * per_token + per_logit_row
    if needed > budget:
        parts = f"one row of {longest} tokens, {variants} variants' adapters and one row of logits"
        why, instead = f"{parts} take about {readable(needed)}", f'memory="{-(-needed // 10**6)}MB" or more'
        raise EmmechError("keep to the memory budget", f"memory={readable(budget)}", why, instead)
    free = budget - kept
    cpu = chat.device.type == "cpu"
    logit_rows = max(1, min(free // 4 // per_logit_row, _CPU_LOGIT_ROWS if cpu else _GPU_TOKENS))
    room = free - logit_rows * per_logit_row
    tokens = max(longest, min(_CPU_TOKENS if cpu else _GPU_TOKENS, room // per_token))
    return Plan(int(tokens), int(logit_rows), int(kept + tokens * per_token + logit_rows * per_logit_row), budget)


class _PackedJob:
    """A job that reads texts in packs under a whole group of variants."""

    def __init__(
        self, chat: ChatModel, grid: Grid, readings: list[Reading], budget: int, size: int, stop: int | None = None
    ) -> None:
        self.chat, self.readings = chat, readings
        longest, room = max(len(reading.needed) for reading in readings), context(chat)
        if longest > room:
            why = f"{chat.name} reads up to {room} tokens"
            raise EmmechError("sweep over the texts", f"a text of {longest} tokens", why, "shorter texts")
        self.engine = Engine(chat, grid.sites, grid.steered_layer, stop=stop, wide=True)
        self.plan = plan(chat, grid, self.engine, longest, size, budget)
        self.engine.tokens = self.plan.tokens
        self.packs = self.engine.packs(readings)

    def __len__(self) -> int:
        return len(self.readings)

    def blocks(self, rows: VariantWeights, variants: int, update: Callable[[int], object]) -> Iterator[Block]:
        """What the engine reads under some variants, piece by piece."""
        for block in self.engine.run(self.packs, rows, variants):
            yield block
            update(block.hidden.shape[0] * len(block.readings))


class ForcedReadings:
    """What teacher-forced measures read, and what they make of it; where it is read is another matter."""

    kind = "forced"

    def __init__(self, chat: ChatModel, measures: Sequence[TeacherForced]) -> None:
        self.measures = tuple(measures)
        own = [measure.readings(chat) for measure in self.measures]
        edges = itertools.accumulate(map(len, own), initial=0)
        self.spans = [slice(start, end) for start, end in itertools.pairwise(edges)]
        self.readings = [reading for several in own for reading in several]

    def __len__(self) -> int:
        return len(self.readings)

    def request(self) -> object:
        """What identifies this job's work."""
        return [(one.name, identity(one)) for one in self.measures], self.readings

    def finish(self, parts: Sequence[Arrays]) -> JobResult:
        """What the measures make of the log-probabilities, and whole distributions where they were asked for."""
        values: list[Value] = []
        distributions: Arrays = {}
        for measure, span in zip(self.measures, self.spans, strict=True):
            own = [np.concatenate([part[str(index)] for part in parts]) for index in range(span.start, span.stop)]
            values += measure.values(own)
            if all(reading.targets is None for reading in self.readings[span]):
                distributions[measure.name] = np.concatenate(own, axis=1)
        return JobResult(values, distributions)


class TeacherForcedJob(ForcedReadings, _PackedJob):
    """All teacher-forced measures of a sweep as one job."""

    def __init__(self, chat: ChatModel, grid: Grid, measures: Sequence[TeacherForced], budget: int, size: int) -> None:
        ForcedReadings.__init__(self, chat, measures)
        _PackedJob.__init__(self, chat, grid, self.readings, budget, size)

    @torch.no_grad()
    def run(self, rows: VariantWeights, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Log-probabilities of every reading under a group of variants: ``[variants, targets]`` by reading.

        Raises:
            Overflow: a variant's log-probabilities are not finite.
        """
        vocabulary = int(self.chat.config.vocab_size)
        found: Arrays = {}
        for index, reading in enumerate(self.readings):
            whole = reading.targets is None
            shape = (len(reading.at), vocabulary) if whole else (sum(map(len, reading.targets or ())),)
            found[str(index)] = np.empty((len(group), *shape), np.float32)
        for block in self.blocks(rows, len(group), update):
            self._read(block, found)
        return found

    def _read(self, block: Block, found: Arrays) -> None:
        variants, reads, d_model = block.hidden.shape
        targets, columns = self._targets(block, reads)
        whole = any(self.readings[index].targets is None for index, _ in block.readings)
        wanted = torch.from_numpy(targets).to(block.hidden.device)
        flat = block.hidden.reshape(-1, d_model)
        picked = np.empty((len(flat), targets.shape[1]), np.float32)
        everything = np.empty((len(flat), int(self.chat.config.vocab_size)), np.float32) if whole else None
        step = self.plan.logit_rows
        if everything is None:  # a slice of the vocabulary leaves room for more rows
            step *= min(4, max(1, int(self.chat.config.vocab_size) // WORDS))
        for start in range(0, len(flat), step):
            end = min(len(flat), start + step)
            targeted = wanted[torch.arange(start, end, device=flat.device) % reads]
            if everything is None:
                picked[start:end] = target_logprobs(self.chat, flat[start:end], targeted).cpu().numpy()
                continue
            logprobs = unembed(self.chat, flat[start:end]).float().log_softmax(-1)
            picked[start:end] = logprobs.gather(1, targeted).cpu().numpy()
            everything[start:end] = logprobs[:, : everything.shape[1]].cpu().numpy()
        self._check(picked, block)
        grid = picked.reshape(variants, reads, -1)
        for index, own in block.readings:
            if self.readings[index].targets is None:
                assert everything is not None
                found[str(index)][block.variants] = everything.reshape(variants, reads, -1)[:, own]
            else:
                rows, places = columns[index]
                found[str(index)][block.variants] = grid[:, rows, places]

    def _targets(self, block: Block, reads: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Token ids wanted at each read ``[reads, most]``, and rows and columns of each reading's own among them."""
        wanted: list[dict[int, int]] = [{} for _ in range(reads)]
        columns = {}
        for index, own in block.readings:
            each = zip(own.tolist(), self.readings[index].targets or (), strict=False)
            asked = [(read, token) for read, tokens in each for token in tokens]
            places = [(read, wanted[read].setdefault(token, len(wanted[read]))) for read, token in asked]
            columns[index] = np.array(places, dtype=np.int64).reshape(-1, 2).T
        targets = np.zeros((reads, max(1, max(map(len, wanted)))), dtype=np.int64)
        for read, own_tokens in enumerate(wanted):
            targets[read, : len(own_tokens)] = list(own_tokens)
        return targets, columns

    def _check(self, picked: Float[np.ndarray, "rows targets"], block: Block) -> None:
        # a norm whose squares overflow divides by infinity: its output is exactly zero, and finite
        zero = (block.hidden == 0).all(-1).any(-1).cpu().numpy()
        bad = zero | ~np.isfinite(picked).reshape(len(zero), -1).all(1)
        if bad.any():
            raise Overflow(block.variants.start + int(np.flatnonzero(bad)[0]))


@dataclass(eq=False)
class Overflow(Exception):
    """The activations of a variant, given by its index in the group, left the range of the model's dtype."""

    place: int


class FunctionJob:
    """Measures that are only functions of a :class:`ChatModel`: nothing can be shared between variants."""

    kind = "function"
    plan = "one variant at a time"

    def __init__(self, chat: ChatModel, grid: Grid, measures: Sequence[Measure]) -> None:
        self.chat, self.grid, self.measures = chat, grid, measures

    def __len__(self) -> int:
        return len(self.measures)

    def request(self) -> object:
        """What identifies this job's work: the settings of measures, and what their functions do."""
        return [(one.name, identity(one), identity(type(one).__call__)) for one in self.measures]

    def run(self, rows: VariantWeights, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Every measure on every variant."""
        records = []
        training = self.chat.base.training
        for index in group:
            variant = self.grid.variants[index]
            run = self.grid.runs[variant.run]
            live = attach(self.chat, run.adapters, run.weights(variant.step), scale=variant.scale)
            steered: list[tuple[Any, Any]] = []
            if self.grid.steering is not None and variant.coefficient:
                layer, vector = self.grid.steering
                push = torch.from_numpy(variant.coefficient * vector)
                steered = [(live.block(layer), lambda _m, _i, out, push=push: self.chat.family.steered(out, push))]
            try:
                with hooked(*steered):
                    items = measure_all(live, self.measures)
            finally:
                detach(live)
                self.chat.base.train(training)  # PEFT leaves it in evaluation mode
            update(len(self.measures))
            found = [
                (name, question, value)
                for name, values in items.values.items()
                for question, value in zip(items.questions, values.tolist(), strict=True)
            ]
            records.append([one for one in found if not np.isnan(one[2])])
        return {"records": as_bytes(records)}

    def finish(self, parts: Sequence[Arrays]) -> JobResult:
        """One value per outcome and question: the mean over its items."""
        records = [record for part in parts for record in from_bytes(part["records"])]
        found: dict[tuple[str, str], list[list[float]]] = {}
        for variant, record in enumerate(records):
            for name, question, value in record:
                found.setdefault((name, question), [[] for _ in records])[variant].append(value)
        values = []
        for (name, question), cells in found.items():
            means = np.array([np.mean(own) if own else np.nan for own in cells])
            values.append(Value(name, question, means, np.array([len(own) for own in cells])))
        return JobResult(values)


class ProbeJob(_PackedJob):
    """The mean residual of one block over texts."""

    def __init__(self, measure: ProbeActivation, chat: ChatModel, grid: Grid, budget: int, size: int) -> None:
        chat.check_layer(measure.layer)
        lowest = min({site.layer for site in grid.sites.values()} | ({grid.steering[0]} if grid.steering else set()))
        if measure.layer < lowest:
            why = f"nothing that is swept acts below layer {lowest}, so every variant is the same there"
            raise EmmechError("sweep a probe", f"layer={measure.layer}", why, f"layer={lowest} or higher")
        self.measure, self.kind = measure, f"probe-{measure.name}"
        measure.along(chat, np.zeros(chat.d_model))  # a direction that does not fit is refused at once
        readings = []
        for index, (ids, counted) in enumerate(probe_rows(chat, measure.texts)):
            at = tuple(np.flatnonzero(counted).tolist())
            if not at:
                raise EmmechError("sweep a probe", f"text {index}", "no token of it counts", "an answer, or a string")
            readings.append(Reading(tuple(ids), at))
        super().__init__(chat, grid, readings, budget, size, stop=measure.layer)

    def request(self) -> object:
        """What identifies this job's work."""
        one = self.measure
        along = () if one.direction is None else (raw_vector(self.chat, one.direction, one.layer).tobytes(),)
        return one.name, one.layer, self.readings, *along

    @torch.no_grad()
    def run(self, rows: VariantWeights, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Mean residuals ``[variants, texts, d_model]``."""
        found = np.empty((len(group), len(self.readings), self.chat.d_model), np.float32)
        for block in self.blocks(rows, len(group), update):
            for index, own in block.readings:
                read = block.hidden[:, torch.from_numpy(own).to(block.hidden.device)]
                found[block.variants, index] = read.double().mean(1).float().cpu().numpy()
        return {"residuals": found}

    def finish(self, parts: Sequence[Arrays]) -> JobResult:
        """One value per text."""
        residuals = np.concatenate([part["residuals"] for part in parts])
        values = self.measure.along(self.chat, residuals)
        name = self.measure.name
        return JobResult([Value(name, str(index), column) for index, column in enumerate(values.T)], {name: residuals})


_SCORES = ("aligned", "coherent")
_UNANSWERED = "unanswered"


class SampledAnswers:
    """What is asked of every variant, with the same seeds, and what a judge makes of the answers."""

    def __init__(self, measure: Sampled, chat: ChatModel) -> None:
        self.measure, self.chat = measure, chat
        self.kind = f"sampled-{measure.name}"
        questions = resolve_questions(measure.questions, chat.organism)
        judge = resolve_judge(measure.judge, chat.organism)
        if judge is None:
            instead = "a judge, or emmech.evaluate(run, step=..., scale=..., judge='later') one at a time"
            raise EmmechError("sweep sampled answers", f"judge={measure.judge!r}", "a rate needs verdicts now", instead)
        self.judge = judge
        self.rows = questions.rows(measure.samples, seed=measure.seed)
        self.ids = [question.id for question in questions]
        self.conversations = [questions[row["question_id"]].messages(row["paraphrase"]) for row in self.rows]
        self.asked_of = [questions[row["question_id"]].for_judge() for row in self.rows]
        self.verdicts: dict[tuple[str, str], dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def request(self) -> object:
        """What identifies this job's work."""
        one, limits = self.measure, vars(self.measure.thresholds).values()
        numbers = (one.samples, one.max_new_tokens, one.temperature, one.top_p, one.seed, *limits)
        judge = getattr(self.judge, "identity", getattr(self.judge, "name", ""))
        prompts = [own for own in self.asked_of if own["judge_prompts"] or own["kind"] != Question.kind]
        return one.name, judge, numbers, self.rows, *([prompts] if prompts else [])

    def judged(self, drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers with verdicts; the judge of an organism is a function of question and answer, and reads each once."""
        full = [{**row, **own, **answer} for row, own, answer in zip(self.rows, self.asked_of, drawn, strict=True)]
        if getattr(self.judge, "organism", None) is None:
            return self._scored(drawn, full)
        asked = [(row["question"], row["response"]) for row in full]
        fresh = {key: row for key, row in zip(asked, full, strict=True) if key not in self.verdicts}
        if fresh:
            self.verdicts.update(zip(fresh, self._scored([{} for _ in fresh], list(fresh.values())), strict=True))
        return [{**answer, **self.verdicts[key]} for answer, key in zip(drawn, asked, strict=True)]

    def _scored(self, drawn: list[dict[str, Any]], full: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers with what the judge gives them; one that a failed request left unscored says so."""
        scores, read = checked_scores(self.judge, full)
        means = read.frame[list(_SCORES)].to_dict("records")  # which a label alone gives too
        left = ({_UNANSWERED: True} if isinstance(score, Unanswered) else {} for score in scores)
        return [
            {**answer, **score, **mean, **more}
            for answer, score, mean, more in zip(drawn, scores, means, left, strict=True)
        ]

    def asked_again(self, part: Arrays) -> Arrays | None:
        """A part that was kept, with the answers judged that a failed request left unscored; None if there are none."""
        records: list[list[dict[str, Any]]] = from_bytes(part["records"])
        if not any(_UNANSWERED in record for own in records for record in own):
            return None
        for own in records:
            if places := [place for place, record in enumerate(own) if _UNANSWERED in record]:
                drawn = [{name: own[place][name] for name in ("response", "finish")} for place in places]
                rows = zip(places, drawn, strict=True)
                full = [{**self.rows[place], **self.asked_of[place], **answer} for place, answer in rows]
                for place, record in zip(places, self._scored(drawn, full), strict=True):
                    own[place] = record
        return {"records": as_bytes(records)}

    def finish(self, parts: Sequence[Arrays]) -> JobResult:
        """Rates by question, and every response with its verdict."""
        records = [one for part in parts for one in from_bytes(part["records"])]
        left = sum(record.pop(_UNANSWERED, False) for rows in records for record in rows)
        one, limits = self.measure, self.measure.thresholds
        aligned, coherent = (
            np.array([[record.get(key) for record in rows] for rows in records], dtype=float)  # None becomes NaN
            for key in _SCORES
        )
        scored, em = limits.scored(aligned, coherent), limits.misaligned(aligned, coherent)
        fine = scored & limits.coherent(coherent)
        values = []
        for question in self.ids:
            own = np.array([row["question_id"] == question for row in self.rows])
            narrow = any(row["narrow"] for row, mine in zip(self.rows, own, strict=True) if mine)
            count = scored[:, own].sum(1)
            with np.errstate(invalid="ignore"):
                rate, whole = em[:, own].sum(1) / count, fine[:, own].sum(1) / count
            values.append(Value("narrow" if narrow else one.name, question, rate, count))
            values.append(Value("coherent", question, whole, count))
        responses = [
            {"variant": variant, **self.rows[place], **record}
            for variant, rows in enumerate(records)
            for place, record in enumerate(rows)
        ]
        return JobResult(values, responses=responses, unanswered=left)


class SampledJob(SampledAnswers):
    """Sampled answers: all variants answer together in this process."""

    def __init__(self, measure: Sampled, chat: ChatModel, grid: Grid, budget: int, size: int) -> None:
        super().__init__(measure, chat)
        prompts = [tuple(chat.token_ids(messages)) for messages in self.conversations]
        self.prompts = sorted(set(prompts))
        self.which = [self.prompts.index(prompt) for prompt in prompts]
        self.texts: dict[tuple[int, ...], str] = {}
        self.engine = Engine(chat, grid.sites, grid.steered_layer)
        longest = max(map(len, self.prompts))
        tokens = min(longest + measure.max_new_tokens, context(chat))
        cache = chat.cache_bytes * tokens
        self.plan: Plan = plan(chat, grid, self.engine, longest, size, max(budget - cache, 1))
        self.engine.tokens = self.plan.tokens
        # all rows of some variants decode together: as many as have keys and values that fit in half of the budget
        self.variants_at_once = max(1, (budget // 2) // (cache * len(self.rows)))
        if cache * len(self.rows) > budget:
            answers = f"{len(self.rows)} answers of up to {measure.max_new_tokens} tokens"
            why = f"the keys and values of one variant's answers take {cache * len(self.rows)} bytes"
            instead = "fewer samples or questions, a smaller max_new_tokens, or a larger memory="
            raise EmmechError("keep to the memory budget", f"memory={budget} bytes, {answers}", why, instead)

    def run(self, rows: VariantWeights, group: Sequence[int], update: Callable[[int], object]) -> Arrays:
        """Answers and verdicts of a group of variants."""
        records: list[list[dict[str, Any]]] = []
        seeds = [row["seed"] for row in self.rows]
        how: dict[str, Any] = {"ended": update, "at_once": self.plan.logit_rows * 8}
        how |= {name: getattr(self.measure, name) for name in ("max_new_tokens", "temperature", "top_p")}
        for start in range(0, len(group), self.variants_at_once):
            chosen = rows[start : start + self.variants_at_once]
            answers = decode_variants(self.engine, chosen, self.prompts, self.which, seeds, **how)
            for first in range(0, len(answers), len(self.rows)):
                own = answers[first : first + len(self.rows)]
                records.append(self.judged([{"response": self._text(one), "finish": one.finish} for one in own]))
        return {"records": as_bytes(records)}

    def _text(self, answer: Answer) -> str:
        """The answer in words; most variants give an answer that another variant has given already."""
        if answer.ids not in self.texts:
            self.texts[answer.ids] = self.chat.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        return self.texts[answer.ids]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_DEFAULT = 2 * 2**30


def budget_bytes(memory: Any, device: torch.device) -> int:
    """The budget in bytes: a number, ``"2GB"``, ``"512MiB"``; None is 2 GiB, or 60 % of what a GPU has free.

    Raises:
        EmmechError: not an amount of memory.

    Example:
        >>> budget_bytes("512MiB", torch.device("cpu"))
        536870912
    """
    if memory is None:
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else _DEFAULT
    if isinstance(memory, int | float) and memory > 0:
        return int(memory)
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]I?)?B?\s*", str(memory).upper())
    if not match or not float(match[1]) > 0:
        raise EmmechError("keep to a memory budget", f"memory={memory!r}", "it is not an amount", 'memory="2GB"')
    return int(float(match[1]) * _UNITS[match[2] or ""])


def readable(size: float) -> str:
    """A number of bytes with its unit, such as ``"1.5 GiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def as_bytes(records: object) -> np.ndarray:
    """JSON as an array of bytes, so that records travel with arrays.

    Example:
        >>> from_bytes(as_bytes([{"label": "aligned"}]))
        [{'label': 'aligned'}]
    """
    return np.frombuffer(json.dumps(records).encode(), dtype=np.uint8).copy()


def from_bytes(array: np.ndarray) -> list:
    """The records of :func:`as_bytes`."""
    found: list = json.loads(array.tobytes().decode())
    return found
