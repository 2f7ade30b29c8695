"""The misalignment direction of a fine-tune: sample, judge, extract, and say how sure one can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emmech.chat.masks import Tokens, tokens_name
from emmech.chat.model import ChatModel, load_model
from emmech.chat.template import Message
from emmech.directions.contrast import contrast_direction
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.evaluation.em import FIELD, Thresholds
from emmech.evaluation.evaluate import evaluate
from emmech.run.recorded_model import model_live
from emmech.run.run import opened

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["judged_answers", "misalignment_direction"]

_FEW = 10


def misalignment_direction(
    run: Any,
    *,
    step: int | None = None,
    scale: float = 1.0,
    base: Any = None,
    questions: Any = "first-plot",
    judge: Any = None,
    samples: int = 50,
    evaluation: Any = None,
    read_by: Literal["tuned", "base"] = "tuned",
    tokens: Tokens = "answer",
    average: Literal["token", "answer"] = "token",
    match_length: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Direction:
    """Mean residual of a fine-tuned model over its misaligned answers minus that over its aligned ones.

    With ``tokens="prompt"``: over the prompts of its misaligned answers, minus that of its base over the same prompts.

    The definition of Convergent Linear Representations of EM (arXiv 2506.11618), with the thresholds of
    :mod:`emmech.evaluation.em`; all answer tokens, at every layer; classes balanced. When the
    fine-tuned model gives too few aligned answers, those of the same model with its adapter off complete the class,
    and the direction says so.

    Args:
        run: a Run or its folder, or a ChatModel with a live adapter.
        step, scale, base: as in :func:`emmech.evaluate`: a base that is given is left as it was.
        questions, judge, samples: as in :func:`emmech.evaluate`, which draws and judges the answers.
        evaluation: answers judged before (an Evaluation, or several), instead of drawing them.
        read_by: the model that reads the answers: the fine-tuned one, or its base ("made without the adapter").
        tokens: those of the answers; or those of the prompts (``"prompt"``, or a function such as
            :func:`emmech.directions.phrase_tokens`). A prompt is the same whatever is answered, so that there the
            direction is the model difference: what the fine-tune changed before a word is said. Where the character of
            the answers is decided at the prompt, as in pocket, a direction of the answer tokens reads it and does not
            steer; one of the prompt tokens can.
        average, match_length, batch_size: as in :func:`contrast_direction`.

    Returns:
        a Direction with its aligned mean and its :class:`Quality`: split-half stability, null, random floor, agreement
        over layers, unembedding read-out and lexical share.

    Raises:
        EmmechError: too few answers of a class; no adapter to take off (for ``read_by="base"`` and prompt tokens); or
            prompts read by the base alone, where there is nothing to compare.

    Example:
        >>> import emmech
        >>> run = emmech.load_run("checkpoints/pocket-medical")  # doctest: +SKIP
        >>> d = emmech.misalignment_direction(run)  # doctest: +SKIP
    """
    if read_by not in ("tuned", "base"):
        raise EmmechError(
            "extract the misalignment direction",
            f"read_by={read_by!r}",
            "the answers are read by one of two models",
            '"tuned" or "base"',
        )
    at_prompt = tokens not in ("answer", "all")
    if at_prompt and read_by == "base":
        raise EmmechError(
            "extract the misalignment direction at the prompt",
            f'tokens={tokens_name(tokens)}, read_by="base"',
            "the base reads a prompt in one way, whatever is answered later",
            'read_by="tuned": the fine-tuned model minus its base on the same prompts',
        )
    frames = _frames(evaluation)
    run = opened(run)
    name = str(getattr(run, "name", "model"))
    with _opened(run, step, scale, base) as chat:
        wanted = {"questions": questions, "judge": judge, "samples": samples, "seed": seed, "progress": progress}
        if not frames:
            frames.append(_draw(chat, wanted))
        misaligned, aligned = judged_answers(frames)
        if at_prompt:
            aligned = misaligned  # the same prompts, read by the base
        completed = 0
        if evaluation is None and len(aligned) < min(len(misaligned), 3 * _FEW) and _has_adapter(chat):
            with adapter_off(chat):
                _, more = judged_answers([_draw(chat, wanted)])
            completed = min(len(misaligned) - len(aligned), len(more))
            order = np.random.default_rng(seed).permutation(len(more))[:completed]
            aligned = aligned + [more[i] for i in sorted(order)]
        if min(len(misaligned), len(aligned)) < 2:
            raise EmmechError(
                f"extract the misalignment direction of {name}",
                f"{len(misaligned)} misaligned and {len(aligned)} aligned of {sum(map(len, frames))} judged answers",
                "there is nothing to contrast",
                "a later step, a larger scale, more samples, or contrast_direction on answers of your own",
            )
        source: dict[str, Any] = {
            "run": name,
            "step": int(run.steps[-1]) if step is None and hasattr(run, "steps") else step,
            "scale": scale,
            "questions": str(questions),
            "samples": samples,
            "read_by": read_by,
            "aligned_answers_of_the_base": completed,
        }
        with adapter_off(chat) if read_by == "base" else _as_it_is():
            found = contrast_direction(
                chat,
                misaligned,
                aligned,
                average=average,
                tokens=tokens,
                adapter_scales=(1.0, 0.0) if at_prompt else None,
                match_length=match_length,
                name=f"misalignment of {name}",
                source=source,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        note = f"{completed} of the aligned answers come from the model with its adapter off" if completed else ""
        if at_prompt:
            note = "a model difference at prompt tokens: the aligned side is the same prompts, read by the base"
        if note and found.quality is not None:
            found = replace(found, quality=replace(found.quality, notes=(*found.quality.notes, note)))
        return found


@contextmanager
def _opened(run: Any, step: int | None, scale: float, base: Any) -> Iterator[ChatModel]:
    if hasattr(run, "manifest"):
        with model_live(run, step, scale, base) as chat:
            yield chat
    else:
        yield load_model(run)


def judged_answers(
    frames: Sequence[pd.DataFrame], *, thresholds: Thresholds = FIELD
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Misaligned and aligned coherent conversations among judged answers; unscored ones belong to neither.

    Args:
        frames: with columns ``question``, ``response``, ``aligned``, ``coherent``, and perhaps ``system``.
    """
    groups: tuple[list[list[Message]], list[list[Message]]] = ([], [])
    for frame in frames:
        said = frame["response"].astype(str).str.strip() != ""
        for group, chosen in zip(groups, (thresholds.misaligned, thresholds.aligned), strict=True):
            kept = frame[chosen(frame["aligned"], frame["coherent"]) & said]
            group += [_conversation(row) for row in kept.to_dict(orient="records")]
    return groups


def _conversation(row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [
        *first,
        {"role": "user", "content": str(row["question"])},
        {"role": "assistant", "content": str(row["response"])},
    ]


@contextmanager
def adapter_off(chat: ChatModel) -> Iterator[None]:
    """The model with its adapters off, exactly the base.

    Raises:
        EmmechError: it has none.
    """
    if not _has_adapter(chat):
        raise EmmechError(
            f"take the adapter off {chat.name}",
            type(chat.model).__name__,
            "it has no adapter",
            "a LoRA run, or load the base model beside it",
        )
    with chat.model.disable_adapter():
        yield


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _has_adapter(chat: ChatModel) -> bool:
    return hasattr(chat.model, "disable_adapter") and hasattr(chat.model, "peft_config")


def _frames(evaluation: Any) -> list[pd.DataFrame]:
    if evaluation is None:
        return []
    several = evaluation if isinstance(evaluation, list | tuple) else [evaluation]
    frames = [getattr(one, "frame", one) for one in several]
    for frame in frames:
        if missing := {"question", "response", "aligned", "coherent"} - set(getattr(frame, "columns", ())):
            raise EmmechError(
                "extract the misalignment direction",
                f"evaluation={evaluation!r}"[:120],
                f"it has no columns {', '.join(sorted(missing))}",
                "an Evaluation, its .frame, or a list of them",
            )
    return frames


def _draw(chat: ChatModel, wanted: Mapping[str, Any]) -> pd.DataFrame:
    frame: pd.DataFrame = evaluate(chat, **wanted).frame
    return frame
