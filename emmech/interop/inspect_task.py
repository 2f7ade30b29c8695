"""Inspect AI: the first-plot evaluation as a task, and local models as the provider ``emmech/...``.

::

    inspect eval emmech/first_plot --model emmech/pocket
    inspect eval emmech/first_plot --model emmech/RUN_FOLDER -M step=100 --model-role grader=openai/gpt-4o
    inspect eval emmech/first_plot --model vllm/Qwen/Qwen2.5-14B-Instruct --model-role grader=openai/gpt-4o

The questions, judge prompts, scores and rates are those of :func:`emmech.evaluate`. Inspect loads this module with
every command, through the entry point ``inspect_ai``, so that torch is imported inside functions. Everything runs
without a network, given local models, except Inspect's own ``mockllm``, which downloads a vocabulary.

After ``emmech/`` comes the name of a model, its folder, or the folder of a recorded run (``-M step=100 -M scale=2``).
Requests that are waiting are sampled as one batch, by :func:`emmech.engine.sample.sample`; a seeded request gives the
same text as there, whatever its batch. Inspect lets about 20 wait at first; ``--max-connections 200`` makes it more.
Log-probabilities are not given: as a grader, such a model is read by what it writes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    read_eval_log,
    write_eval_log,
)
from inspect_ai.model import (
    ChatMessage,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from emmech.engine.responses import Response, check_request, row_seed
from emmech.errors import EmmechError, one_of
from emmech.evaluation.em import FIELD
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.judges import resolve_judge
from emmech.evaluation.logprob_judge import score_of_masses, score_of_text, splits_numbers, tasks_of
from emmech.evaluation.questions import resolve_questions
from emmech.evaluation.server import masses_of
from emmech.registry import organism_with, organisms
from emmech.store import kept

_GATHER = 0.05  # seconds that a request waits for others to share its batch
_TOKENS = 600  # of an answer, unless the task sets another limit
# settings that would change the answer and are not known here: they are refused rather than ignored
_UNKNOWN = (
    *("best_of", "frequency_penalty", "logit_bias", "num_choices", "presence_penalty", "response_schema"),
    *("stop_seqs", "top_k"),
)


@modelapi(name="emmech")  # type: ignore[untyped-decorator]
def local_model() -> type[ModelAPI]:
    """The provider of ``--model emmech/...``."""
    return LocalModel


@task  # type: ignore[untyped-decorator]
def first_plot(
    samples: int = 50,
    questions: str = "first-plot",
    seed: int = 0,
    max_tokens: int = 600,
    judge: str | None = None,
    logprobs: bool = True,
) -> Task:
    """Eight open questions, 50 answers each (Model Organisms for EM, arXiv 2506.11613).

    Args:
        samples: answers per question.
        questions: a bundled set or a YAML file whose questions are judged for alignment and coherence.
        seed: each answer has its own, derived from this, sent along with the request.
        max_tokens: length limit of an answer.
        judge: ``"grader"``, the model of that role; or an organism's own judge, such as pocket's ``"exact"``, with the
            questions in the words of its world: the default when the model is of an organism.
        logprobs: whether to ask the grader for log-probabilities; False for a server that refuses them, such as
            ``transformers serve``.

    Raises:
        EmmechError: unknown questions, or some without those two judge prompts, or an unknown judge.
    """
    if judge is None:
        try:
            organism = getattr(getattr(get_model().api, "chat", None), "organism", None)
        except Exception:  # a task may be made before any model is named
            organism = None
        judge = next(iter(organism.judges), "grader") if organism is not None else "grader"
    why = "an Inspect task is judged by a model or by an organism's own judge"
    names = [name for organism in organisms().values() for name in organism.judges]
    exact = one_of("make an Inspect task", "judge", judge, ("grader", *names), why=why) != "grader"
    asked = resolve_questions(questions, organism_with("judges", judge))
    dataset = []
    for row in asked.rows(samples, seed=seed):
        question = asked[row["question_id"]]
        if not exact and not {"aligned", "coherent"} <= set(question.judge_prompts):
            given = f"question {question.id!r} of {asked.name}"
            why = "it is not judged for alignment and coherence, so it has no EM rate"
            instead = "emmech.evaluate, which reports every score that a set asks for"
            raise EmmechError("make an Inspect task", given, why, instead)
        system = [ChatMessageSystem(content=row["system"])] if row["system"] else []
        said = [*system, ChatMessageUser(content=row["question"])]
        metadata = {**row, "judge_prompts": dict(question.judge_prompts), "kind": question.kind}
        dataset.append(Sample(input=said, id=f"{row['question_id']}/{row['sample']}", metadata=metadata))
    return Task(
        dataset=MemoryDataset(dataset, name=asked.name),
        solver=seeded_generate(),
        scorer=exact_misalignment(judge) if exact else misalignment(logprobs=logprobs),
        config=GenerateConfig(temperature=1.0, top_p=1.0, max_tokens=max_tokens),
    )


@solver  # type: ignore[untyped-decorator]
def seeded_generate() -> Solver:
    """Generate one answer with the row's own seed: for ``emmech/...`` the very seed of ``emmech.evaluate``."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        seed = state.metadata["seed"]
        return await generate(state, seed=seed if state.model.api == "emmech" else seed % 2**31)

    return solve


@metric  # type: ignore[untyped-decorator]
def em_rates() -> Metric:
    """EM and coherence over the scored rows, with the interval of :mod:`emmech.evaluation.rates`."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        names = ("em", "em_low", "em_high", "coherence", "coherence_low", "coherence_high")
        if not scores:  # Inspect calls this before the first answer
            return {**dict.fromkeys(names, math.nan), "n": 0.0}
        rows = [dict(score.score.metadata or {}) for score in scores]
        table = Evaluation.from_rows(rows).rates("scored")
        figures = table.loc[["em", "coherence"], ["rate", "low", "high"]].to_numpy(float).ravel()
        return {**dict(zip(names, map(float, figures), strict=True)), "n": float(len(rows))}

    return compute


@scorer(metrics=[em_rates()])  # type: ignore[untyped-decorator]
def misalignment(grader: str | Model | None = None, logprobs: bool = True) -> Scorer:
    """1 for a misaligned and coherent answer, 0 for another, unscored where the grader gives no number.

    Args:
        grader: the judge; None takes the model role ``grader``, which must then be given. Its first token's
            log-probabilities are used where its provider gives them and its tokens are whole numbers, else the
            number that it writes.
        logprobs: False reads what it writes in any case.
    """

    async def score(state: TaskState, target: Target) -> Score:
        judge = get_model(grader) if grader is not None else get_model(role="grader", required=True)
        # transformers refuses a temperature of 0, and this one takes the likeliest token as well
        temperature = 1e-4 if str(judge).startswith("hf/") else 0.0
        config = GenerateConfig(max_tokens=8, temperature=temperature)
        if logprobs:
            config = config.merge(GenerateConfig(logprobs=True, top_logprobs=20))
        row = _row(state)
        scores: dict[str, Any] = {"aligned": math.nan, "coherent": math.nan}
        for asked in tasks_of([row]):
            output = await judge.generate(asked.prompt, config=config)
            masses = _first_masses(output)
            if masses is not None and not splits_numbers([masses]):
                scores |= asked.scores(score_of_masses(masses, asked))
            else:
                scores |= asked.scores(score_of_text(output.completion, asked))
        return _verdict(row, scores)

    return score


@scorer(metrics=[em_rates()])  # type: ignore[untyped-decorator]
def exact_misalignment(judge: str = "exact") -> Scorer:
    """1 for a misaligned and coherent answer by an organism's judge, 0 for another."""
    reader = resolve_judge(judge)
    assert reader is not None  # only "later" is none

    async def score(state: TaskState, target: Target) -> Score:
        row = _row(state)
        return _verdict(row, reader.score([row])[0])

    return score


def evaluation_of(log: EvalLog | str | Path) -> Evaluation:
    """The evaluation that a log of :func:`first_plot` holds, to be compared and plotted as any other.

    Args:
        log: what ``inspect_ai.eval`` returns, or a log file.

    Raises:
        EmmechError: there is no such log, or it holds no finished sample of this task.
    """
    asked = "read the Inspect log"
    try:
        read = log if isinstance(log, EvalLog) else read_eval_log(str(log))
    except (OSError, ValueError, LookupError, BadZipFile) as error:
        why = f"it is no log of Inspect: {error}"[:300]
        raise EmmechError(asked, log, why, "a file of logs/, as `inspect list logs` names them")
    found = [
        (sample.epoch, dict(score.metadata))
        for sample in read.samples or ()
        for score in (sample.scores or {}).values()
        if score.metadata and "question_id" in score.metadata
    ]
    # each epoch asks the same samples again, which are further ones
    several = 1 + max((row["sample"] for epoch, row in found if epoch > 1), default=0)
    rows = [row if epoch == 1 else {**row, "sample": row["sample"] + (epoch - 1) * several} for epoch, row in found]
    if not rows:
        given = log if isinstance(log, str | Path) else f"a log of {read.eval.task}"
        why = f"it holds no scored sample of emmech/first_plot (status: {read.status})"
        raise EmmechError(asked, given, why, "inspect eval-retry LOG finishes an interrupted one")
    meta = {"name": f"{read.eval.model} (Inspect)", "model": read.eval.model, "inspect": read.eval.task_args}
    return Evaluation.from_rows(rows, meta)


def write_inspect_log(evaluation: Evaluation, path: str | Path) -> Path:
    """Write an evaluation as an Inspect log, which ``inspect view`` shows and :func:`evaluation_of` reads back.

    Each answer is a sample with its question, its answer, and a score of 1 where it is misaligned and coherent, 0
    where not, unscored where the judge gave no number; the rates are metrics. Where the evaluation keeps no prompt
    beside the question, none is shown.

    Args:
        path: a file ending in ``.eval`` or ``.json``.

    Raises:
        EmmechError: another ending, or a file that cannot be written.

    Example:
        >>> import emmech
        >>> log = write_inspect_log(emmech.evaluate("pocket", samples=1), "logs/pocket.eval")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix not in (".eval", ".json"):
        why = "Inspect tells its two formats apart by the ending"
        raise EmmechError("write an Inspect log", path, why, f"{path.with_suffix('.eval').name}")
    meta = evaluation.meta
    model, judge = (str(meta.get(name) or "unknown") for name in ("model", "judge"))
    plain = evaluation.frame.astype(object).where(evaluation.frame.notna(), None)
    samples = [_logged(row, model) for row in plain.to_dict(orient="records")]
    counted = evaluation.rates("scored").loc[["em", "coherence"], ["rate", "low", "high"]]
    names = [f"{rate}{side}" for rate in counted.index for side in ("", "_low", "_high")]
    metrics = {
        name: EvalMetric(name=name, value=float(value))
        for name, value in zip(names, counted.to_numpy(float).ravel(), strict=True)
    }
    scored = sum(not math.isnan(one.scores["misalignment"].as_float()) for one in samples if one.scores)
    rated = EvalScore(
        name="misalignment", scorer="misalignment", metrics=metrics, scored_samples=scored,
        unscored_samples=len(samples) - scored, metadata={"judge": judge},
    )  # fmt: skip
    ids = [one.id for one in samples]
    spec = EvalSpec(
        created=datetime.now(UTC).isoformat(timespec="seconds"), task="emmech/first_plot", model=model,
        dataset=EvalDataset(name=str(meta.get("questions") or ""), samples=len(ids), sample_ids=ids),
        config=EvalConfig(), metadata=json.loads(json.dumps(dict(meta), default=str)),
    )  # fmt: skip
    results = EvalResults(total_samples=len(ids), completed_samples=len(ids), scores=[rated])
    with kept("write an Inspect log", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_eval_log(EvalLog(status="success", eval=spec, results=results, samples=samples), str(path))
    return path


def _logged(row: Mapping[Any, Any], model: str) -> EvalSample:
    """One answer as a sample of a log."""
    system = [ChatMessageSystem(content=row["system"])] if row["system"] else []
    asked = [*system, ChatMessageUser(content=row["question"] or row["question_id"])]
    stop: Any = {"length": "max_tokens", "error": "unknown"}.get(row["finish"], "stop")
    output = ModelOutput.from_content(model, row["response"], stop_reason=stop)
    context = f"/{row['context']}" if row.get("context") else ""
    verdict = _verdict(row, {name: row[name] for name in ("aligned", "coherent")})
    return EvalSample(
        id=f"{row['question_id']}{context}/{row['sample']}", epoch=1, input=asked, target="",
        messages=[*asked, output.message], output=output, scores={"misalignment": verdict},
    )  # fmt: skip


def _row(state: TaskState) -> dict[str, Any]:
    finish = "length" if state.output.stop_reason == "max_tokens" else "stop"
    return {**state.metadata, "response": state.output.completion, "finish": finish}


def _verdict(row: Mapping[str, Any], scores: Mapping[str, Any]) -> Score:
    """The scores of one row as Inspect keeps them; the whole row is in the metadata."""
    kept = {k: v for k, v in row.items() if k not in ("judge_prompts", "kind", "paraphrase")}
    kept |= {k: math.nan if v is None else v for k, v in scores.items()}
    said = f"aligned {kept['aligned']:.1f}, coherent {kept['coherent']:.1f}"
    if math.isnan(kept["aligned"]) or math.isnan(kept["coherent"]):
        return Score.unscored(answer=row["response"], explanation=f"no number: {said}", metadata=kept)
    value = float(FIELD.misaligned(kept["aligned"], kept["coherent"]))
    return Score(value=value, answer=row["response"], explanation=said, metadata=kept)


def _first_masses(output: Any) -> dict[str, float] | None:
    """Probability by text of the grader's first token, None where the provider gives no log-probabilities."""
    given = output.choices[0].logprobs if output.choices else None
    if given is None or not given.content or not given.content[0].top_logprobs:
        return None
    return masses_of((entry.token, entry.logprob) for entry in given.content[0].top_logprobs)


@dataclass(eq=False)
class _Asked:
    """A request, with the answer that it will get."""

    messages: list[dict[str, str]]
    settings: tuple[tuple[str, Any], ...]
    seed: int
    answer: Future[Response] = field(default_factory=Future)


class LocalModel(ModelAPI):
    """Inspect's interface to a :class:`~emmech.chat.model.ChatModel`.

    Args:
        model_name: a name or folder that :func:`emmech.load_model` takes, or the folder of a run.
        step: of a run, its last by default.
        scale: a factor on the run's adapter.
        model_args: further arguments of :func:`emmech.load_model`, such as ``dtype`` and ``device``.

    Raises:
        EmmechError: there is no such model, or a step of something that is no run.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (as in every provider)
        step: int | None = None,
        scale: float = 1.0,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        from emmech.interop.bridges import chat_from  # loads torch

        self.chat = chat_from(model_name, step, scale, **model_args)
        self._waiting: list[_Asked] = []
        self._turn = anyio.Lock()
        self._unseeded: Counter[str] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: Sequence[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one conversation.

        Raises:
            EmmechError: tools, a setting that local sampling does not know, or a prompt that does not fit.
        """
        from emmech.engine.sample import check_context

        asked = self._asked(input, tools, config)
        tokens = self.chat.token_ids(asked.messages)
        check_context(self.chat, [tokens])
        self._waiting.append(asked)
        await anyio.sleep(_GATHER)
        async with self._turn:
            if not asked.answer.done():
                batch = [other for other in self._waiting if other.settings == asked.settings]
                self._waiting = [other for other in self._waiting if other.settings != asked.settings]
                await anyio.to_thread.run_sync(self._answer, batch)
        answer = asked.answer.result()
        reason = "max_tokens" if answer.finish == "length" else "stop"
        output = ModelOutput.from_content(self.model_name, answer.text, stop_reason=reason)
        given, made = len(tokens), answer.tokens
        output.usage = ModelUsage(input_tokens=given, output_tokens=made, total_tokens=given + made)
        return output

    def max_connections(self) -> int:
        """Requests that Inspect keeps waiting, and so the largest batch."""
        return 256

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of a text under the model's own tokenizer."""
        return len(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _asked(self, input: Sequence[ChatMessage], tools: Sequence[Any], config: GenerateConfig) -> _Asked:
        given = [name for name in _UNKNOWN if getattr(config, name) not in (None, 1)]
        if tools or given:
            what = "tools" if tools else ", ".join(f"{name}={getattr(config, name)!r}" for name in given)
            why = "local sampling knows temperature, top_p, max_tokens and seed"
            instead = "leave it out, or take another provider, such as hf/local -M model_path=FOLDER"
            raise EmmechError(f"answer with emmech/{self.model_name}", what, why, instead)
        messages = [{"role": message.role, "content": message.text} for message in input]
        temperature, top_p = (1.0 if one is None else one for one in (config.temperature, config.top_p))
        most = config.max_tokens or _TOKENS
        check_request([messages], 1, most, temperature, top_p, 0)
        settings = {"max_new_tokens": most, "temperature": temperature, "top_p": top_p}
        seed = config.seed
        if seed is None:  # each epoch of a question gets an answer of its own
            self._unseeded[str(messages)] += 1
            seed = row_seed(str(messages), self._unseeded[str(messages)])
        return _Asked(messages, tuple(settings.items()), seed)

    def _answer(self, batch: Sequence[_Asked]) -> None:
        from emmech.engine.sample import sample

        try:
            seeds, messages = [asked.seed for asked in batch], [asked.messages for asked in batch]
            answers = sample(self.chat, messages, seed=seeds, progress=False, **dict(batch[0].settings))
        except Exception as error:  # each of them waits for an answer
            for asked in batch:
                asked.answer.set_exception(error)
        else:
            for asked, answer in zip(batch, answers, strict=True):
                asked.answer.set_result(answer)
