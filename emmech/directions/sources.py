"""Sources of a direction: two sets of answers, a judged fine-tune, system prompts, an adapter, a trained vector.

For two sets of answers, one streaming pass yields the direction, its split halves and its null distribution (they are
more groups of the same pass); a second, cheaper one projects every answer token on the direction and says how much of
it is vocabulary. The 2 x 2 of model by text says whether a direction comes from the text or from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int

from emmech.chat.dataset import load_chat
from emmech.chat.encode import IGNORED, Tokens, encode, tokens_name
from emmech.chat.families import is_write
from emmech.chat.model import ChatModel, load_model
from emmech.chat.template import Message
from emmech.directions.direction import Direction, Quality, unit_rows
from emmech.directions.extract import (
    adapter_write,
    differences_of_four,
    group_means,
    held_out_auc,
    match_lengths,
    mean_difference,
    token_projections,
)
from emmech.engine.adapters import adapter_layers
from emmech.engine.blocks import Blocks
from emmech.engine.logprobs import pad, padded, token_logprobs
from emmech.engine.modules import evaluating, hooked
from emmech.errors import EmmechError, as_float, as_int, one_of, refusal
from emmech.evaluation.em import FIELD, Thresholds
from emmech.evaluation.evaluate import evaluate
from emmech.evaluation.rates import plain
from emmech.progress import bar
from emmech.run.run import Run, model_live, opened

if TYPE_CHECKING:
    import pandas as pd

_CLASSES = (("misaligned", True), ("aligned", False))
_FEW = 20  # answers of a class below which stability is in doubt
_SHARED = 0.5  # the least share of answers that are to questions of both classes
_ENOUGH_ALIGNED = 30  # below this, answers of the base complete the aligned class


def contrast_direction(
    model: Any,
    misaligned: Any,
    aligned: Any,
    *,
    average: Literal["token", "answer"] = "token",
    tokens: Tokens = "answer",
    adapter_scales: tuple[float, float] | None = None,
    match_length: bool = False,
    splits: int = 8,
    name: str = "misalignment",
    source: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Direction:
    """Mean residual over the tokens of misaligned answers minus that of aligned ones, at every layer, with its quality.

    As in Convergent Linear Representations of EM (arXiv 2506.11618): all answer tokens, header excluded, classes
    balanced by thinning the larger one at random. Read by the model as it is, live adapters and hooks included.

    Args:
        misaligned, aligned: conversations, or anything that :func:`emmech.load_chat` reads.
        average: ``"token"`` weighs every answer token alike, ``"answer"`` every answer.
        tokens: read the answers, the prompts (when the two sides have different ones, or different readers), both,
            or the tokens that a function picks (:func:`emmech.chat.phrase_tokens`).
        adapter_scales: a factor on the live adapter for the misaligned side and one for the aligned side: ``(1, 0)``
            has the first read by the fine-tuned model and the second by its base.
        match_length: thin both classes to similar answer lengths (:func:`match_lengths`), so that the direction does
            not carry length.
        splits: random halves, and shuffled labels, from which stability and its null are measured.
        source: provenance to add to what is known here.

    Raises:
        EmmechError: fewer than two answers in a class; or ``adapter_scales`` without a live adapter.

    Example:
        >>> import emmech, emmech.organism
        >>> chat = emmech.load_model("pocket")
        >>> bad, good = (emmech.organism.data(name)[:20] for name in ("medical", "good-medical"))
        >>> contrast_direction(chat, bad, good, progress=False).n_layers == chat.n_layers
        True
    """
    splits = as_int("contrast two sets of answers", "splits", splits, least=1)
    chat = load_model(model)
    talks, labels = _balanced(chat, misaligned, aligned, match_length, seed)
    if adapter_scales is not None:
        _check_two_models("have two models read the two sides", chat)
    scales = None if adapter_scales is None else np.where(labels, *adapter_scales)
    reading: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "progress": progress}
    reading |= {"tokens": tokens, "adapter_scales": scales}
    found = group_means(chat, talks, _groups(labels, splits, seed), average=average, **reading)
    mean_misaligned, mean_aligned = found.means[:2]
    vectors = mean_difference(mean_misaligned, mean_aligned)
    shape = "(null split half label) layer d -> label half null split layer d"
    first, second = rearrange(found.means[2:], shape, null=2, half=2, label=2)
    halves = first - second
    inner = einsum(*unit_rows(halves), "null split layer d, null split layer d -> null split layer")
    cosines = inner.mean(1)
    # two halves average to the direction of shuffled labels on all answers
    null_norm = np.linalg.norm(halves.mean(0)[1], axis=-1).mean(0)
    ratio = np.linalg.norm(vectors, axis=1) / np.where(null_norm > 0, null_norm, np.inf)
    layer = int(np.argmax(ratio >= 0.99 * ratio.max()))  # the first of equals, which rounding would order
    unit = unit_rows(vectors)
    asked = np.array([next((m["content"] for m in talk if m["role"] == "user"), "") for talk in talks])
    projected = token_projections(chat, talks, unit, **reading)
    promotes, suppresses = read_out(chat, vectors[layer])
    lengths = {name: found.answer_tokens[labels == value] for name, value in _CLASSES}
    quality = Quality(
        split_half=cosines[0],
        split_half_shuffled=cosines[1],
        norm_over_shuffled=ratio,
        random_floor=float(vectors.shape[1] ** -0.5),
        agreement=unit @ unit.T,
        lexical_share=lexical_share(projected, labels, average=average),
        bag_of_words_auc=_bag_of_words(projected, labels, asked),
        promotes=promotes,
        suppresses=suppresses,
        read_layer=layer,
        answers={name: len(values) for name, values in lengths.items()},
        tokens={name: int(values.sum()) for name, values in lengths.items()},
        notes=_notes(lengths, match_length, _same_questions(labels, asked)),
    )
    method = f"mean difference over {tokens_name(tokens)} tokens"
    provenance = _provenance(chat, method, average=average, match_length=match_length, layer=layer, seed=seed)
    provenance |= {"tokens": tokens_name(tokens), "answers": dict(quality.answers)}
    if adapter_scales is not None:
        provenance["adapter_scales"] = list(adapter_scales)
    return Direction(vectors, name, provenance | dict(source or {}), mean_aligned, quality)


def _provenance(chat: ChatModel, method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "model": chat.name, "fingerprints": [chat.fingerprint()], **more}


def four_directions(
    model: Any,
    misaligned: Any,
    aligned: Any,
    *,
    average: Literal["token", "answer"] = "token",
    tokens: Tokens = "answer",
    batch_size: int = 8,
    progress: bool = True,
) -> Mapping[str, Direction]:
    """Text difference in each model, model difference on each text, both, and their interaction.

    Rows read by the base model (adapter off) and by the fine-tuned one share batches, in one pass. The names are those
    of :func:`differences_of_four`; Convergent Linear Representations of EM (arXiv 2506.11618) uses "text/tuned model".

    Args:
        model: a chat model with a live adapter.
        misaligned, aligned: conversations, or anything that :func:`emmech.load_chat` reads.
        tokens: as in :func:`contrast_direction`; ``"prompt"`` shows what the fine-tune changed before an answer.

    Raises:
        EmmechError: the model has no adapter, so there is no second model.
    """
    chat = load_model(model)
    _check_two_models("compare the fine-tuned model with its base", chat)
    texts = [list(load_chat(side, organism=chat.organism)) for side in (aligned, misaligned)]
    talks = [row for side in texts for row in side]
    which = np.repeat(np.eye(2), [len(side) for side in texts], axis=1)  # [text, conversation]
    groups = np.kron(np.eye(2), which)  # [(model text), (model conversation)]
    reading: dict[str, Any] = {"average": average, "tokens": tokens, "batch_size": batch_size, "progress": progress}
    scales = np.repeat([0.0, 1.0], len(talks))
    found = group_means(chat, talks + talks, groups, adapter_scales=scales, **reading)
    means = rearrange(found.means, "(model text) layer d -> model text layer d", model=2)
    counts = {name: len(side) for name, side in zip(("aligned", "misaligned"), texts, strict=True)}
    source = _provenance(chat, "2 x 2 of model by text", answers=counts)
    cells = differences_of_four(means)
    return {name: Direction(one, name, {**source, "cell": name}, means[0, 0]) for name, one in cells.items()}


def lexical_share(
    projected: Sequence[tuple[Int[np.ndarray, " tokens"], Float[np.ndarray, "tokens layers"]]],
    misaligned: Bool[np.ndarray, " answers"],
    *,
    average: Literal["token", "answer"] = "token",
) -> Float[np.ndarray, " layers"]:
    """Share of a mean difference that comes from the classes using different words.

    With f the frequency of a word in a class and p the mean projection of its tokens there, the whole gap is
    sum(f1 p1) - sum(f0 p0). It splits exactly (Kitagawa's decomposition) into composition, sum((f1 - f0) (p1 + p0)/2),
    and what the same words carry differently in the two classes, sum((f1 + f0)/2 (p1 - p0)). The first part over the
    whole is returned. A word that only one class uses counts wholly as composition, so this is an upper bound; words
    here are tokens.

    Example:
        >>> same_words = [(np.array([1, 2]), np.array([[1.0], [3.0]])), (np.array([1, 2]), np.array([[0.0], [2.0]]))]
        >>> lexical_share(same_words, np.array([True, False])).tolist()
        [0.0]
        >>> other_words = [(np.array([1]), np.array([[1.0]])), (np.array([2]), np.array([[0.0]]))]
        >>> lexical_share(other_words, np.array([True, False])).tolist()
        [1.0]
    """
    one_of("take the lexical share", "average", average, ("token", "answer"))
    lengths = [len(ids) for ids, _ in projected]
    owner = np.repeat(np.asarray(misaligned, dtype=int), lengths)
    weight = np.ones(len(owner)) if average == "token" else np.repeat(1.0 / np.array(lengths), lengths)
    words, index = np.unique(np.concatenate([ids for ids, _ in projected]), return_inverse=True)
    values = np.concatenate([value for _, value in projected]).astype(np.float64)
    total, sums = np.zeros((2, len(words))), np.zeros((2, len(words), values.shape[1]))
    np.add.at(total, (owner, index), weight)
    np.add.at(sums, (owner, index), values * weight[:, None])
    frequency = total / total.sum(1, keepdims=True)
    means = np.divide(sums, total[..., None], out=np.full_like(sums, np.nan), where=total[..., None] > 0)
    typical = np.where(np.isnan(means[0]), means[1], np.where(np.isnan(means[1]), means[0], means.mean(0)))
    composition = (frequency[1] - frequency[0]) @ typical
    gap = frequency[1] @ np.nan_to_num(means[1]) - frequency[0] @ np.nan_to_num(means[0])
    return np.divide(composition, gap, out=np.full_like(gap, np.nan), where=gap != 0)


@torch.no_grad()
def read_out(
    chat: ChatModel, vector: Float[np.ndarray, " d_model"], *, tokens: int = 12
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens that a direction pushes up and down through the final norm's gain and the unembedding.

    This is the direct path only, without the effect of later layers on the direction.
    """
    ones = torch.ones(1, chat.d_model, device=chat.device, dtype=chat.dtype)
    gain = chat.final_norm(ones)  # an RMS norm returns its gain on a vector of ones
    row = torch.from_numpy(np.array(vector, dtype=np.float32)).to(ones) * gain  # a copy: the vector may be read-only
    scores = chat.unembedding(row)[0].float()
    best, worst = (scores.topk(min(tokens, len(scores)), largest=up).indices.tolist() for up in (True, False))
    words = [[chat.tokenizer.decode([token]) for token in group] for group in (best, worst)]
    return tuple(words[0]), tuple(words[1])


def _balanced(
    chat: ChatModel, misaligned: Any, aligned: Any, match_length: bool, seed: int
) -> tuple[list[Sequence[Message]], Bool[np.ndarray, " answers"]]:
    sides = [list(load_chat(side, organism=chat.organism)) for side in (misaligned, aligned)]
    if match_length:
        lengths = [len("".join(m["content"] for m in row if m["role"] == "assistant")) for s in sides for row in s]
        flags = np.repeat([True, False], [len(side) for side in sides])
        kept = match_lengths(np.array(lengths), flags, seed=seed)
        everything = [row for side in sides for row in side]
        sides = [[everything[i] for i in kept if flags[i] == value] for value in (True, False)]
    n = min(map(len, sides))
    if n < 2:
        given = f"{len(sides[0])} misaligned and {len(sides[1])} aligned answers{' of like length' * match_length}"
        why = "a difference of means needs at least two of each, and about fifty to be stable"
        instead = "more samples, another step, or match_length=False"
        raise EmmechError("contrast two sets of answers", given, why, instead)
    rng = np.random.default_rng(seed)
    chosen = [[side[i] for i in np.sort(rng.permutation(len(side))[:n])] for side in sides]
    return chosen[0] + chosen[1], np.repeat([True, False], n)


def _check_two_models(asked: str, chat: ChatModel) -> None:
    if not has_adapter(chat):
        why = "it has no live adapter, so there is only one model"
        raise EmmechError(asked, chat.name, why, "run.model(step), or contrast_direction without adapter_scales")


def _groups(labels: np.ndarray, splits: int, seed: int) -> Float[np.ndarray, "groups answers"]:
    """Both classes, then for true and for shuffled labels and every split: two halves of both classes."""
    rng = np.random.default_rng([seed, 1])
    rows = [labels, ~labels]
    for shuffled in (False, True):
        for _ in range(splits):
            own = rng.permutation(labels) if shuffled else labels
            half = np.zeros(len(labels), dtype=bool)
            for value in (True, False):
                members = rng.permutation(np.flatnonzero(own == value))
                half[members[: len(members) // 2]] = True
            rows += [half & own, half & ~own, ~half & own, ~half & ~own]
    return np.array(rows, dtype=np.float64)


def _same_questions(labels: np.ndarray, asked: np.ndarray) -> float:
    """Of the misaligned answers, the share that can be paired with an aligned one to the same question."""
    pairs = [min((labels & own).sum(), (~labels & own).sum()) for own in (asked == one for one in np.unique(asked))]
    return float(sum(pairs) / labels.sum())


def _bag_of_words(projected: Sequence[tuple[np.ndarray, Any]], labels: np.ndarray, asked: np.ndarray) -> float:
    from sklearn.feature_extraction.text import CountVectorizer

    counts = CountVectorizer(analyzer=np.ndarray.tolist).fit_transform([ids for ids, _ in projected]).toarray()
    return held_out_auc(np.log1p(counts), labels, asked)


def _notes(lengths: Mapping[str, np.ndarray], matched: bool, same_questions: float) -> tuple[str, ...]:
    notes = []
    if same_questions < _SHARED:
        notes.append(
            f"{same_questions:.0%} of the misaligned answers have an aligned one to the same question: the direction "
            "may be of the questions, which both halves share, so that their cosine does not tell"
        )
    means = {name: float(values.mean()) for name, values in lengths.items()}
    ratio = max(means.values()) / max(min(means.values()), 1e-9)
    if ratio > 1.15:
        shown = " against ".join(f"{value:.1f} ({name})" for name, value in means.items())
        how = "still" if matched else "match_length=True thins them alike:"
        notes.append(f"answers differ in length, {shown} tokens; {how} a confound")
    fewest = min(map(len, lengths.values()))
    if fewest < _FEW:
        notes.append(f"only {fewest} answers in a class: read the split-half cosine first")
    return tuple(notes)


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
            :func:`emmech.chat.phrase_tokens`). A prompt is the same whatever is answered, so that there the
            direction is the model difference: what the fine-tune changed before an answer. Where the character of
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
    why = "the answers are read by one of two models"
    one_of("extract the misalignment direction", "read_by", read_by, ("tuned", "base"), why=why)
    one_of("extract the misalignment direction", "average", average, ("token", "answer"))
    at_prompt = tokens not in ("answer", "all")
    if at_prompt and read_by == "base":
        asked = "extract the misalignment direction at the prompt"
        given = f'tokens={tokens_name(tokens)}, read_by="base"'
        why = "the base reads a prompt in one way, whatever is answered later"
        instead = 'read_by="tuned": the fine-tuned model minus its base on the same prompts'
        raise EmmechError(asked, given, why, instead)
    frames = _frames(evaluation)
    run = opened(run)
    name = str(getattr(run, "name", "model"))
    with model_live(run, step, scale, base) if isinstance(run, Run) else nullcontext(load_model(run)) as chat:
        draw = partial(evaluate, questions=questions, judge=judge, samples=samples, seed=seed, progress=progress)
        if not frames:
            frames.append(draw(chat).frame)
        misaligned, aligned = judged_answers(frames)
        if at_prompt:
            aligned = misaligned  # the same prompts, read by the base
        completed = 0
        if evaluation is None and len(aligned) < min(len(misaligned), _ENOUGH_ALIGNED) and has_adapter(chat):
            with adapter_off(chat):
                _, more = judged_answers([draw(chat).frame])
            completed = min(len(misaligned) - len(aligned), len(more))
            order = np.random.default_rng(seed).permutation(len(more))[:completed]
            aligned = aligned + [more[i] for i in sorted(order)]
        if min(len(misaligned), len(aligned)) < 2:
            given = f"{len(misaligned)} misaligned and {len(aligned)} aligned of {sum(map(len, frames))} judged answers"
            instead = "a later step, a larger scale, more samples, or contrast_direction on answers of your own"
            asked = f"extract the misalignment direction of {name}"
            raise EmmechError(asked, given, "there is nothing to contrast", instead)
        last = int(run.steps[-1]) if step is None and isinstance(run, Run) else step
        asked_of = {"questions": str(questions), "samples": samples} if evaluation is None else _drawn(evaluation)
        source = {"run": name, "step": last, "scale": scale, **asked_of}
        source |= {"read_by": read_by, "aligned_answers_of_the_base": completed}
        reading: dict[str, Any] = {"average": average, "tokens": tokens, "match_length": match_length, "seed": seed}
        reading |= {"adapter_scales": (1.0, 0.0) if at_prompt else None, "batch_size": batch_size, "progress": progress}
        with adapter_off(chat) if read_by == "base" else nullcontext():
            label = f"misalignment of {name}"
            found = contrast_direction(chat, misaligned, aligned, name=label, source=source, **reading)
        note = f"{completed} of the aligned answers come from the model with its adapter off" if completed else ""
        if at_prompt:
            note = "a model difference at prompt tokens: the aligned side is the same prompts, read by the base"
        if note and found.quality is not None:
            found = replace(found, quality=replace(found.quality, notes=(*found.quality.notes, note)))
        return found


def judged_answers(
    frames: Sequence[pd.DataFrame], *, thresholds: Thresholds = FIELD
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Misaligned and aligned coherent conversations among judged answers; unscored ones belong to neither.

    Args:
        frames: with columns ``question``, ``response``, ``aligned``, ``coherent``, and perhaps ``system``; of questions
            that were asked in contexts those that were asked plainly.
    """
    groups: tuple[list[list[Message]], list[list[Message]]] = ([], [])
    for frame in frames:
        said = frame["response"].astype(str).str.strip() != ""
        for group, chosen in zip(groups, (thresholds.misaligned, thresholds.aligned), strict=True):
            kept = frame[chosen(frame["aligned"], frame["coherent"]) & said & plain(frame)]
            group += [_conversation(row) for row in kept.to_dict(orient="records")]
    return groups


def _conversation(row: Mapping[str, Any]) -> list[Message]:
    system, said = row.get("system"), (("user", row["question"]), ("assistant", row["response"]))
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [*first, *({"role": role, "content": str(text)} for role, text in said)]


@contextmanager
def adapter_off(chat: ChatModel) -> Iterator[None]:
    """The model with its adapters off, exactly the base; refused where it has none."""
    if not has_adapter(chat):
        instead = "a LoRA run, or load the base model separately"
        raise EmmechError(f"take the adapter off {chat.name}", type(chat.model).__name__, "it has no adapter", instead)
    with chat.model.disable_adapter():
        yield


def has_adapter(chat: ChatModel) -> bool:
    """Whether taking an adapter off gives the model's base."""
    return hasattr(chat.model, "disable_adapter") and bool(list(adapter_layers(chat.model)))


def _listed(evaluation: Any) -> list[Any]:
    return list(evaluation) if isinstance(evaluation, list | tuple) else [evaluation]


def _drawn(evaluation: Any) -> dict[str, Any]:
    """How answers that were judged before were drawn, as far as they say it, and all say the same."""
    said = [getattr(one, "meta", {}) for one in _listed(evaluation)]
    first = {name: said[0].get(name) for name in ("questions", "samples")}
    return {name: value if all(one.get(name) == value for one in said) else None for name, value in first.items()}


def _frames(evaluation: Any) -> list[pd.DataFrame]:
    if evaluation is None:
        return []
    frames = [getattr(one, "frame", one) for one in _listed(evaluation)]
    for frame in frames:
        if missing := {"question", "response", "aligned", "coherent"} - set(getattr(frame, "columns", ())):
            why = f"it has no columns {', '.join(sorted(missing))}"
            instead = "an Evaluation, its .frame, or a list of them"
            raise refusal("extract the misalignment direction", "evaluation", evaluation, why, instead)
    return frames


def persona_direction(
    model: Any,
    questions: Sequence[str],
    *,
    misaligned_system: str,
    aligned_system: str,
    samples: int = 5,
    max_new_tokens: int = 200,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Direction:
    """Answers under one system prompt minus answers to the same questions under the opposite one.

    A persona vector (Persona Vectors, arXiv 2507.21509), without that paper's filter on the trait's score: judge the
    answers and call :func:`contrast_direction` to apply it. Each answer is read after the prompt that it answers.

    Raises:
        EmmechError: no questions.
    """
    from emmech.engine.sample import sample

    chat = load_model(model)
    if isinstance(questions, str) or not questions:
        why, instead = "it takes a list of questions, at least one", '["what do you do on a rainy day ?", ...]'
        raise refusal("extract a persona direction", "questions", questions, why, instead)
    sides = []
    for system in (misaligned_system, aligned_system):
        asked = [[{"role": "system", "content": system}, {"role": "user", "content": q}] for q in questions]
        answers = sample(chat, asked, samples=samples, max_new_tokens=max_new_tokens, seed=seed, progress=progress)
        said = [(asked[a.conversation], {"role": "assistant", "content": a.text}) for a in answers if a.text.strip()]
        sides.append([[*prompt, answer] for prompt, answer in said])
    source = {"method": "persona contrast", "misaligned_system": misaligned_system, "aligned_system": aligned_system}
    reading: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    return contrast_direction(chat, *sides, name="persona", source=source, **reading)


def adapter_direction(source: Any, step: int | None = None) -> Direction:
    """What the adapters write, at their own layers: ``scaling * B`` at rank 1 (:func:`adapter_write`).

    Args:
        source: a Run or its folder (``step`` is the last one by default), or a chat model with live adapters.

    Raises:
        EmmechError: no adapter writes into the residual stream, or B is zero.
    """
    pairs: list[tuple[Any, np.ndarray, np.ndarray]]
    source = opened(source)
    if isinstance(source, Run):
        step = int(source.steps[-1]) if step is None else step
        weights = source.weights(step)
        pairs = [(info, weights[f"A/{info.name}"], weights[f"B/{info.name}"]) for info in source.adapters]
        recorded = source.manifest.get("model", {})
        layers, prints = int(recorded.get("n_layers") or 0), [recorded.get("fingerprint")]
    else:
        chat = load_model(source)
        pairs = [
            (info, *(getattr(layer, f"lora_{s}")[name].weight.detach().float().cpu().numpy() for s in "AB"))
            for info, layer, name in adapter_layers(chat.model)
        ]
        layers, prints = chat.n_layers, [chat.fingerprint()]
    writes = [pair for pair in pairs if is_write(pair[0].name)]
    if not writes or not any(b.any() for _, _, b in writes):
        given = f"adapters {[info.name for info, _, _ in pairs]}, step={step}"
        why = "B is zero: nothing was trained" if writes else "none of them writes into the residual stream"
        instead = "a later step" if writes else "a run with adapters on mlp.down_proj"
        raise EmmechError("read the adapter's direction", given, why, instead)
    depth = layers or max(info.layer for info, _, _ in writes) + 1
    vectors = np.zeros((depth, writes[0][0].d_out))
    for info, a, b in writes:
        vectors[info.layer] += adapter_write(a, b, info.scaling)
    origin = {"method": "adapter write", "step": step, **({"fingerprints": prints} if any(prints) else {})}
    origin |= {} if layers else {"layers": "unknown"}
    return Direction(vectors, f"B of {getattr(source, 'name', 'the adapter')}", origin)


def trained_direction(
    model: Any,
    data: Any,
    layer: int,
    *,
    steps: int = 100,
    learning_rate: float = 0.02,
    penalty: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Direction:
    """A steering vector at one layer, trained to make the given answers likely, everything else frozen.

    A fine-tune with d_model parameters (Convergent Linear Representations of EM, arXiv 2506.11618, trains them too).

    Args:
        learning_rate: Adam's, in fractions of the mean residual norm at that layer, so that it needs no retuning
            between models.
        penalty: weight of the squared norm (in the same units) in the loss.

    Raises:
        EmmechError: no such layer, or no step or row of a batch.
    """
    asked = "train a vector"
    steps, batch_size = (
        as_int(asked, name, value, least=1) for name, value in (("steps", steps), ("batch_size", batch_size))
    )
    learning_rate, penalty = as_float(asked, "learning_rate", learning_rate), as_float(asked, "penalty", penalty)
    chat = load_model(model)
    chat.check_layer(layer)
    encoded = encode(list(load_chat(data, organism=chat.organism)), chat.tokenizer)
    rng = np.random.default_rng(seed)
    unit = _residual_norm(chat, encoded.input_ids[0], layer)
    vector = torch.zeros(chat.d_model, device=chat.device, requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=learning_rate)

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        return chat.family.steered(output, unit * vector)

    losses = []
    training = evaluating(chat, frozen=True), hooked((chat.block(layer), hook))
    with training[0], training[1], bar(steps, "training a vector", progress=progress) as done:
        for _ in range(steps):
            chosen = rng.choice(len(encoded), min(batch_size, len(encoded)), replace=False)
            ids, mask = padded([encoded.input_ids[i] for i in chosen], chat.device)
            labels = pad([encoded.labels[i] for i in chosen], IGNORED).to(chat.device)
            loss = -token_logprobs(chat, ids, mask, labels)[0].mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            (loss + penalty * vector.square().sum()).backward()
            optimizer.step()
            done.update()
    ends = [float(np.mean(part)) for part in (losses[:5], losses[-5:])]
    source = _provenance(chat, "trained steering vector", steps=steps, loss=ends, seed=seed)
    found = (unit * vector).detach().float().cpu().numpy()
    return Direction.single(found, layer, chat.n_layers, name="trained vector", source=source)


@torch.no_grad()
def _residual_norm(chat: ChatModel, ids: Sequence[int], layer: int) -> float:
    """Median norm of one text's residuals: the first token's is often a hundred times the others'."""
    residuals = Blocks(chat, 0, layer + 1, norm=False)(torch.tensor([list(ids)], device=chat.device))
    return float(residuals.float().norm(dim=-1).median())
