"""``emmech.evaluate``: ask a model, judge its answers, keep everything.

Two append-only files make it resumable, the responses and the scores; the finished evaluation is written last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, overload

import numpy as np

from emmech.chat.model import ChatModel, load_model
from emmech.chat.template import Message
from emmech.engine.responses import digest
from emmech.engine.sample import sample
from emmech.errors import EmmechError, as_floats, as_int, as_ints
from emmech.evaluation.contexts import Context, described, resolve_contexts
from emmech.evaluation.engine import (
    Checkpoint,
    CheckpointEngine,
    Live,
    LocalEngine,
    check_engine,
    local_versions,
    versions,
)
from emmech.evaluation.evaluation import Evaluation
from emmech.evaluation.judges import Judge, pinned, resolve_judge
from emmech.evaluation.questions import QuestionSet, resolve_questions
from emmech.evaluation.rates import PLAIN
from emmech.evaluation.server import Server, Unanswered
from emmech.registry import organism_named
from emmech.run.run import Run, as_run, opened
from emmech.store import append_jsonl, drop_unfinished, intact, read_jsonl, sealed, warn_of_lines, writing

_PART = 256  # rows judged between two writes


@overload
def evaluate(
    model: Any,
    questions: Any = ...,
    judge: Any = ...,
    *,
    samples: int | None = ...,
    step: int | None = ...,
    scale: float = ...,
    steps: None = ...,
    scales: None = ...,
    engine: CheckpointEngine | None = ...,
    base: Any = ...,
    contexts: Any = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    top_p: float = ...,
    seed: int = ...,
    batch_size: int | str = ...,
    out: str | Path | None = ...,
    progress: bool = ...,
) -> Evaluation: ...


@overload
def evaluate(
    model: Any,
    questions: Any = ...,
    judge: Any = ...,
    *,
    samples: int | None = ...,
    step: int | None = ...,
    scale: float = ...,
    steps: Iterable[int],
    scales: Iterable[float] | None = ...,
    engine: CheckpointEngine | None = ...,
    base: Any = ...,
    contexts: Any = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    top_p: float = ...,
    seed: int = ...,
    batch_size: int | str = ...,
    out: str | Path | None = ...,
    progress: bool = ...,
) -> tuple[Evaluation, ...]: ...


@overload
def evaluate(
    model: Any,
    questions: Any = ...,
    judge: Any = ...,
    *,
    samples: int | None = ...,
    step: int | None = ...,
    scale: float = ...,
    steps: None = ...,
    scales: Iterable[float],
    engine: CheckpointEngine | None = ...,
    base: Any = ...,
    contexts: Any = ...,
    max_new_tokens: int = ...,
    temperature: float = ...,
    top_p: float = ...,
    seed: int = ...,
    batch_size: int | str = ...,
    out: str | Path | None = ...,
    progress: bool = ...,
) -> tuple[Evaluation, ...]: ...


def evaluate(
    model: Any,
    questions: Any = "first-plot",
    judge: Any = None,
    *,
    samples: int | None = 50,
    step: int | None = None,
    scale: float = 1.0,
    steps: Iterable[int] | None = None,
    scales: Iterable[float] | None = None,
    engine: CheckpointEngine | None = None,
    base: Any = None,
    contexts: Any = None,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
) -> Evaluation | tuple[Evaluation, ...]:
    """Ask a model questions, judge its answers, and keep every one of them with its scores and seed.

    The defaults are the first-plot evaluation of Model Organisms for EM (arXiv 2506.11613): eight questions, 50
    answers each, temperature 1, at most 600 new tokens. The field judges with GPT-4o:
    ``judge=Server("gpt-4o")``.

    Args:
        model: a :class:`~emmech.Run` or its folder, what :func:`emmech.load_model` takes, or a
            :class:`~emmech.evaluation.server.Server`.
        questions: a bundled set or one of the model's organism, a file, a :class:`QuestionSet`, a list of texts, or
            several sets by name: ``("first-plot", "narrow-medical")``.
        judge: a judge, a ``Server`` or chat model (read by its log-probabilities), ``"exact"``, ``"screening"``,
            ``"later"``, which leaves all unscored for :mod:`emmech.evaluation.deferred`, or a function of (question,
            answer) that returns a label. The models of an organism need none.
        samples: answers per question; None draws as many as the question file says.
        step: of a run, its last by default.
        scale: a factor on the run's adapter.
        steps, scales: several of them: every step is asked at every scale.
        engine: what runs a run's checkpoints: by default this process, else :class:`emmech.VLLM`.
        base: the run's base model in memory, so that many steps or runs load it once; it is left as it was.
        contexts: the ways in which every question is asked: ``"grid"``, names of its contexts, a YAML file, or
            :class:`~emmech.evaluation.Context` objects, such as :func:`~emmech.evaluation.training_context` of the
            fine-tune's rows. The rate ``conditional`` is over all of them but ``"plain"``, to which every other rate
            belongs; ``.by_context()`` has each. None asks plainly.
        seed: of all rows; each has its own, derived from this, the question's id and the sample's number.
        batch_size: rows decoded together by a local model.
        out: folder for responses and scores; of several checkpoints, a folder for each is inside it. A run keeps its
            own in ``run.path / "evaluations"``. The same call again finishes what was interrupted, with the rows that
            were there unchanged.

    Returns:
        the evaluation; ``.rates()`` has the figures. With ``steps`` or ``scales`` a tuple of them, step by step.

    Raises:
        EmmechError: unknown questions, contexts or judge, no judge, a server that cannot be reached, ``out`` of
            another evaluation, or a context with words that the model has no token for.

    Example:
        >>> evaluation = evaluate("pocket", samples=2, progress=False)
        >>> len(evaluation), evaluation.frame["label"].isin(["", None]).any().item()
        (16, False)
    """
    # a judge that is given is resolved before a large model is loaded
    chosen = resolve_judge(judge) if judge is not None else None
    model = opened(model)
    if engine is not None:
        check_engine("evaluate", engine)
    cells = _cells(model, step, scale, steps, scales, base=base, engine=engine)
    several = steps is not None or scales is not None
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    whole = as_int("evaluate", "seed", seed)
    found = []
    with _subjects(model, cells, base, engine) as subjects:
        for live in subjects:
            # the organism of a server is known from an organism's judge only
            organism = getattr(live.subject, "organism", None) or organism_named(
                "evaluate", getattr(chosen, "organism", None)
            )
            asked = resolve_questions(questions, organism)
            if judge is None:
                chosen = resolve_judge(None, organism)
            around = () if contexts is None else resolve_contexts(contexts, organism)
            rows = _rows(asked, around, samples, whole)
            judged_by = {"judge": chosen.name if chosen is not None else None, "questions": asked.name}
            more: dict[str, Any] = {"system": "fold"} if asked.folded else {}
            if around:
                more["contexts"] = described(around)
            meta = {**live.about, **judged_by, **more, "samples": samples, "seed": seed, **sampling}
            folder = Path(out) if out is not None else _folder_in_run(model, meta, rows, asked, chosen)
            if out is not None and several:
                folder = Path(out) / f"step-{meta['step']:06d}-x{meta['scale']:g}"
            found.append(_evaluated(live.subject, chosen, rows, meta, folder, bool(around), batch_size, progress))
    return tuple(found) if several else found[0]


def _evaluated(
    subject: ChatModel | Server,
    judge: Judge | None,
    rows: list[dict[str, Any]],
    meta: Mapping[str, Any],
    folder: Path | None,
    contexts: bool,
    batch_size: int | str,
    progress: bool,
) -> Evaluation:
    """Ask, judge, and keep both in the folder."""
    with ExitStack() as held:
        if folder is not None:
            held.enter_context(writing(folder, "evaluate"))
        conversations = [row.pop("messages") for row in rows]
        chat = subject if isinstance(subject, ChatModel) else getattr(subject, "chat", None)
        if contexts and chat is not None:
            _check_words(chat, rows, conversations)
        sampling: dict[str, Any] = {name: meta[name] for name in ("temperature", "top_p", "max_new_tokens")}
        sampling |= {"out": folder / "responses.jsonl" if folder is not None else None, "progress": progress}
        sampling["seed"] = [row["seed"] for row in rows]
        if isinstance(subject, Server):
            responses = subject.sample(conversations, **sampling)
        else:
            responses = sample(subject, conversations, batch_size=batch_size, **sampling)
        answered = [
            {**row, "response": response.text, "finish": response.finish}
            for row, response in zip(rows, responses, strict=True)
        ]
        scored = [{**row, **score} for row, score in zip(answered, _score(judge, answered, folder), strict=True)]
        for row in scored:
            del row["judge_prompts"], row["kind"]
        pins = {} if judge is None else {"pinned": pinned(judge, answered)}
        evaluation = Evaluation.from_rows(
            scored, {**meta, **pins, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        )
        if folder is not None:
            evaluation.save(folder)
        return evaluation


def stored_evaluations(run: Run | str | Path) -> tuple[Evaluation, ...]:
    """The finished evaluations that a run keeps, by step and name."""
    run = as_run("read the evaluations", run)
    folder = run.path / "evaluations" if run.path is not None else None
    found = sorted(folder.glob("*/evaluation.json")) if folder is not None else []
    loaded = [Evaluation.load(path.parent) for path in found]
    return tuple(sorted(loaded, key=lambda e: (e.meta.get("step") or 0, e.name, str(e.meta.get("questions")))))


@contextmanager
def _subjects(
    model: Any, cells: Sequence[Checkpoint], base: Any, engine: CheckpointEngine | None
) -> Iterator[Iterable[Live]]:
    """The chat models or servers to ask, each with its description in the result."""
    if cells:
        with (engine or LocalEngine()).checkpoints(cells, base) as several:
            yield several
    elif isinstance(model, Server):
        yield [Live(model, {"name": model.name, "model": model.identity, "versions": versions()})]
    else:
        chat = load_model(model)
        about = {"name": Path(chat.name).name, "model": chat.name, "fingerprint": chat.fingerprint()}
        yield [Live(chat, {**about, "versions": local_versions()})]


def _cells(
    model: Any, step: int | None, scale: float, steps: Iterable[int] | None, scales: Iterable[float] | None, **more: Any
) -> list[Checkpoint]:
    """The checkpoints of a run that are asked; none of anything else, which has no steps."""
    given: dict[str, Any] = {"step": step, "scale": scale, "steps": steps, "scales": scales, **more}
    told = {name: value for name, value in given.items() if value is not None and (name, value) != ("scale", 1.0)}
    asked = "evaluate at a step or scale"
    if not isinstance(model, Run):
        if not told:
            return []
        named = f"{', '.join(f'{name}={value}' for name, value in told.items())} of {type(model).__name__}"
        why = "only a recorded run has steps, a base and an adapter that can be scaled"
        instead = "evaluate(load_run(...), step=...), or evaluate(run.model(step, scale))"
        raise EmmechError(asked, named[:120], why, instead)
    if twice := next((one for one in ("step", "scale") if one in told and f"{one}s" in told), None):
        why = f"{twice} is one of {twice}s"
        raise EmmechError(
            asked, f"{twice}={given[twice]}, {twice}s={given[f'{twice}s']}"[:120], why, f"{twice}s= alone"
        )
    # a run checks its steps and scales itself
    at = [int(model.steps[-1]) if step is None else step] if steps is None else as_ints(asked, "steps", steps)
    by = [scale] if scales is None else as_floats(asked, "scales", scales)
    if not at or not by:
        raise EmmechError(asked, f"steps={at}, scales={by}", "there is nothing to ask", "at least one of each")
    for one in at:
        model.check_step(one)
    return [Checkpoint(model, one, factor) for one in at for factor in by]


def _rows(asked: QuestionSet, contexts: Sequence[Context], samples: int | None, seed: int) -> list[dict[str, Any]]:
    """One dict per response to draw, with its conversation, its judge prompts and the kind of its question."""
    found = []
    for context in contexts or (Context(PLAIN),):
        salt = "" if context.name == PLAIN else f"|{context.name}"
        for row in asked.rows(samples, seed=seed, salt=salt):
            question = asked[row["question_id"]]
            row["messages"] = context.messages(question.messages(row.pop("paraphrase")))
            row |= question.for_judge()
            if contexts:
                row |= {
                    "context": context.name,
                    "system": question.system if context.system is None else context.system,
                }
            found.append(row)
    return found


def _check_words(chat: ChatModel, rows: Sequence[Mapping[str, Any]], conversations: Sequence[list[Message]]) -> None:
    """Refuse contexts with words for which the vocabulary has no token."""
    unknown = getattr(chat.tokenizer, "unk_token_id", None)
    first = {row["context"]: messages for row, messages in zip(reversed(rows), reversed(conversations), strict=True)}
    for name, messages in first.items() if unknown is not None else ():
        if unknown in chat.token_ids(messages):
            words = {word for turn in messages for word in turn["content"].split()}
            lost = sorted(word for word in words if unknown in chat.tokenizer(word)["input_ids"])
            why = f"{chat.name} has no token for {', '.join(lost)}"
            raise EmmechError("ask in contexts", f"the context {name!r}", why, "words of the model's own vocabulary")


def _folder_in_run(
    model: Any, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], asked: QuestionSet, judge: Judge | None
) -> Path | None:
    if not isinstance(model, Run) or model.path is None:
        return None
    turns = [question.messages() for question in asked]
    # what is as usual is left out, so that folders keep the names that they have
    more: list[Any] = [turns] if any(len(one) > 1 for one in turns) else []
    scored = [(one.narrow, one.kind, sorted(one.judge_prompts.items())) for one in asked]
    more += [scored] if any(one.narrow is not None or one.judge_prompts for one in asked) else []
    identity = str(getattr(judge, "identity", meta.get("judge")))  # two judges may have one name
    more += [identity] if judge is not None and identity != meta.get("judge") else []
    key = digest(sorted(meta.items(), key=lambda item: item[0]), [row["question"] for row in rows], *more)[:8]
    name = "".join(c if c.isalnum() or c in "-+" else "_" for c in str(meta["questions"]))[:60]
    return model.path / "evaluations" / f"step-{meta['step']:06d}-x{meta['scale']:g}-{name}-{key}"


def _score(judge: Judge | None, rows: list[dict[str, Any]], folder: Path | None) -> list[dict[str, Any]]:
    """Scores of all rows; what an earlier call wrote for the same judge and responses is not asked again."""
    if judge is None:
        return [{} for _ in rows]
    done: dict[int, dict[str, Any]] = {}
    key, path = "", None
    if folder is not None:
        identity = getattr(judge, "identity", judge.name)  # the name alone may not determine the scores
        key = digest(identity, judge.columns, [sorted(row.items(), key=lambda item: item[0]) for row in rows])
        path = folder / f"scores-{key[:12]}.jsonl"
        done = _known_scores(path, key)
    missing = [number for number in range(len(rows)) if number not in done]
    for start in range(0, len(missing), _PART):
        numbers = missing[start : start + _PART]
        part = [rows[number] for number in numbers]
        # checked before they are stored, where a mended judge would find them again
        for number, score in zip(numbers, checked_scores(judge, part)[0], strict=True):
            done[number] = dict(score)
            if path is not None and not isinstance(score, Unanswered):
                append_jsonl(path, sealed({"row": number, "score": dict(score)}, key))
    return [done[number] for number in range(len(rows))]


def checked_scores(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Evaluation]:
    """What a judge gives for each row, as numbers and texts that can be written down, and the evaluation that it makes.

    Raises:
        EmmechError: it is not one mapping per row, or holds a score that an :class:`Evaluation` refuses.
    """
    scores: Any = judge.score(rows)
    found = f"{len(scores)} results" if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
    if isinstance(scores, Sequence) and (strange := [s for s in scores if not isinstance(s, Mapping)]):
        found = f"{strange[0]!r}"[:80]
    elif found == f"{len(rows)} results":
        plain = [
            (Unanswered if isinstance(score, Unanswered) else dict)(
                {name: one.item() if isinstance(one, np.generic) else one for name, one in score.items()}
            )
            for score in scores
        ]
        return plain, Evaluation.from_rows({**row, **score} for row, score in zip(rows, plain, strict=True))
    instead = "score(rows) returns one mapping per row, in order"
    raise EmmechError(f"judge with {judge.name}", f"{len(rows)} rows", f"the judge gave {found}", instead)


def _known_scores(path: Path, key: str) -> dict[int, dict[str, Any]]:
    """The scores by row; those that an earlier version wrote have no number and checksum, and come first, in order."""

    def is_score(line: Mapping[str, Any]) -> bool:
        if "checksum" in line:
            return intact(line, key)
        return not line.keys() & {"row", "score"} and bool(line.keys() & {"aligned", "coherent", "label", "correct"})

    drop_unfinished(path)  # it is judged again
    damaged: list[Path] = []
    lines = read_jsonl(path, damaged, sound=is_score)
    warn_of_lines(damaged, "those answers are judged again")
    found = {line["row"]: line["score"] for line in lines if "checksum" in line}
    if not damaged:  # else a line may be missing among those in order
        found |= enumerate(line for line in lines if "checksum" not in line)
    # JSON has no NaN; a score that is null was not given
    return {number: {k: float("nan") if v is None else v for k, v in score.items()} for number, score in found.items()}
