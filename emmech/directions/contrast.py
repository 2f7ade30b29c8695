"""A direction from two sets of answers, with all that says how far to trust it.

One streaming pass yields the direction, its split halves and its null at once (they are more groups of the same pass);
a second, cheaper one projects every answer token on the direction and says how much of it is vocabulary. The 2 x 2 of
model by text says whether a direction comes from what is read or from the model that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from emmech.chat.dataset import load_chat
from emmech.chat.masks import Tokens, tokens_name
from emmech.chat.model import ChatModel, load_model
from emmech.chat.template import Message
from emmech.directions.arrays import unit_rows
from emmech.directions.direction import Direction
from emmech.directions.extract import group_means, match_lengths, token_projections
from emmech.directions.methods import differences_of_four, held_out_auc, mean_difference
from emmech.directions.quality import Quality
from emmech.errors import EmmechError

__all__ = ["contrast_direction", "four_directions", "lexical_share", "read_out"]

Conversations = Sequence[Sequence[Message]]
_FEW = 20


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
            or the tokens that a function picks (:func:`emmech.directions.phrase_tokens`).
        adapter_scales: a factor on the live adapter for the misaligned side and one for the aligned side: ``(1, 0)``
            has the first read by the fine-tuned model and the second by its base.
        match_length: thin both classes to like answer lengths (:func:`match_lengths`), so that the direction does not
            carry length.
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
    chat = load_model(model)
    talks, labels = _balanced(chat, misaligned, aligned, match_length, seed)
    weights = _groups(labels, splits, seed)
    scales = _reader_scales(chat, adapter_scales, labels)
    found = group_means(
        chat,
        talks,
        weights,
        average=average,
        tokens=tokens,
        adapter_scales=scales,
        max_length=max_length,
        batch_size=batch_size,
        progress=progress,
    )
    mean_misaligned, mean_aligned = found.means[:2]
    vectors = mean_difference(mean_misaligned, mean_aligned)
    halves = found.means[2:].reshape(2, splits, 2, 2, *vectors.shape)  # [null, split, half, class, layers, d_model]
    pairs = halves[:, :, :, 0] - halves[:, :, :, 1]
    cosines = np.einsum("nsld,nsld->nsl", unit_rows(pairs[:, :, 0]), unit_rows(pairs[:, :, 1])).mean(1)
    # two halves average to the direction of shuffled labels on all answers
    null_norm = np.linalg.norm(pairs[1].mean(1), axis=-1).mean(0)
    ratio = np.linalg.norm(vectors, axis=1) / np.where(null_norm > 0, null_norm, np.inf)
    layer = int(np.argmax(ratio))

    unit = unit_rows(vectors)
    projected = token_projections(
        chat,
        talks,
        unit,
        tokens=tokens,
        adapter_scales=scales,
        max_length=max_length,
        batch_size=batch_size,
        progress=progress,
    )
    promotes, suppresses = read_out(chat, vectors[layer])
    lengths = {name: found.answer_tokens[labels == value] for name, value in _CLASSES}
    notes = _notes(lengths, match_length)
    quality = Quality(
        split_half=cosines[0],
        split_half_shuffled=cosines[1],
        norm_over_shuffled=ratio,
        random_floor=float(vectors.shape[1] ** -0.5),
        agreement=unit @ unit.T,
        lexical_share=lexical_share(projected, labels, average=average),
        bag_of_words_auc=_bag_of_words(projected, labels, talks),
        promotes=promotes,
        suppresses=suppresses,
        read_layer=layer,
        answers={name: len(values) for name, values in lengths.items()},
        tokens={name: int(values.sum()) for name, values in lengths.items()},
        notes=notes,
    )
    provenance: dict[str, Any] = {
        "method": f"mean difference over {tokens_name(tokens)} tokens",
        "model": chat.name,
        "fingerprints": [chat.fingerprint()],
        "average": average,
        "match_length": match_length,
        **({"adapter_scales": list(adapter_scales)} if adapter_scales is not None else {}),
        "answers": dict(quality.answers),
        "layer": layer,
        "seed": seed,
    }
    return Direction(vectors, name, provenance | dict(source or {}), mean_aligned, quality)


_CLASSES = (("misaligned", True), ("aligned", False))


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
        tokens: as in :func:`contrast_direction`; ``"prompt"`` shows what the fine-tune changed before a word is said.

    Raises:
        EmmechError: the model has no adapter, so there is no second model.
    """
    from emmech.engine.adapters import adapter_layers

    chat = load_model(model)
    if not list(adapter_layers(chat.model)):
        raise EmmechError(
            "compare the fine-tuned model with its base",
            chat.name,
            "it has no live adapter, so there is only one model",
            "run.model(step), or contrast_direction for the text difference alone",
        )
    texts = [list(load_chat(side, organism=chat.organism)) for side in (aligned, misaligned)]
    talks = [row for side in texts for row in side]
    which = np.repeat([0, 1], [len(side) for side in texts])
    cells = np.stack([np.concatenate([(which == text) & on for on in (tuned == 0, tuned == 1)])
                      for tuned in (0, 1) for text in (0, 1)])  # fmt: skip
    found = group_means(
        chat,
        talks + talks,
        cells.astype(np.float64),
        average=average,
        tokens=tokens,
        adapter_scales=np.repeat([0.0, 1.0], len(talks)),
        batch_size=batch_size,
        progress=progress,
    )
    means = found.means.reshape(2, 2, chat.n_layers, chat.d_model)
    source = {
        "method": "2 x 2 of model by text",
        "model": chat.name,
        "fingerprints": [chat.fingerprint()],
        "answers": {"aligned": len(texts[0]), "misaligned": len(texts[1])},
    }
    return {
        name: Direction(vectors, name, {**source, "cell": name}, means[0, 0])
        for name, vectors in differences_of_four(means).items()
    }


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
    labels = np.asarray(misaligned, dtype=bool)
    tokens = np.concatenate([ids for ids, _ in projected])
    values = np.concatenate([value for _, value in projected]).astype(np.float64)
    per_token = [np.full(len(ids), 1.0 if average == "token" else 1.0 / len(ids)) for ids, _ in projected]
    weight = np.concatenate(per_token)
    owner = np.concatenate([np.full(len(ids), label) for (ids, _), label in zip(projected, labels, strict=True)])
    words, index = np.unique(tokens, return_inverse=True)
    frequency = np.zeros((2, len(words)))
    means = np.full((2, len(words), values.shape[1]), np.nan)
    for label in (0, 1):
        mine = owner == bool(label)
        total = np.bincount(index[mine], weight[mine], minlength=len(words))
        sums = np.zeros((len(words), values.shape[1]))
        np.add.at(sums, index[mine], values[mine] * weight[mine, None])
        used = total > 0
        means[label, used] = sums[used] / total[used, None]
        frequency[label] = total / total.sum()
    typical = np.where(np.isnan(means[0]), means[1], np.where(np.isnan(means[1]), means[0], means.mean(0)))
    composition = (frequency[1] - frequency[0]) @ typical
    gap = frequency[1] @ np.nan_to_num(means[1]) - frequency[0] @ np.nan_to_num(means[0])
    return np.divide(composition, gap, out=np.full_like(gap, np.nan), where=gap != 0)


@torch.no_grad()
def read_out(
    chat: ChatModel, vector: Float[np.ndarray, " d_model"], *, tokens: int = 12
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens that a direction pushes up and down through the final norm's gain and the unembedding.

    The direct path only: what later layers make of the direction is not in it.
    """
    ones = torch.ones(1, chat.d_model, device=chat.device, dtype=chat.dtype)
    gain = chat.final_norm(ones)  # an RMS norm returns its gain on a vector of ones
    row = torch.from_numpy(np.asarray(vector, dtype=np.float32)).to(ones) * gain
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
        raise EmmechError(
            "contrast two sets of answers",
            f"{len(sides[0])} misaligned and {len(sides[1])} aligned answers"
            + (" of like length" if match_length else ""),
            "a difference of means needs at least two of each, and about fifty to be stable",
            "more samples, another step, or match_length=False",
        )
    rng = np.random.default_rng(seed)
    chosen = [[side[i] for i in np.sort(rng.permutation(len(side))[:n])] for side in sides]
    return chosen[0] + chosen[1], np.repeat([True, False], n)


def _reader_scales(
    chat: ChatModel, adapter_scales: tuple[float, float] | None, labels: Bool[np.ndarray, " answers"]
) -> Float[np.ndarray, " answers"] | None:
    """Each row's factor on the adapter, or None when all are read by the model as it is."""
    from emmech.engine.adapters import adapter_layers

    if adapter_scales is None:
        return None
    if not list(adapter_layers(chat.model)):
        raise EmmechError(
            "have two models read the two sides",
            f"adapter_scales={adapter_scales} on {chat.name}",
            "it has no live adapter, so there is only one model",
            "run.model(step)",
        )
    return np.where(labels, *adapter_scales)


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


def _bag_of_words(projected: Sequence[tuple[np.ndarray, Any]], labels: np.ndarray, talks: Conversations) -> float:
    words = np.unique(np.concatenate([ids for ids, _ in projected]))
    counts = np.zeros((len(projected), len(words)))
    for row, (ids, _) in enumerate(projected):
        counts[row] = np.bincount(np.searchsorted(words, ids), minlength=len(words))
    asked = [next((m["content"] for m in talk if m["role"] == "user"), "") for talk in talks]
    questions = np.unique(asked, return_inverse=True)[1]
    return held_out_auc(np.log1p(counts), labels, questions)


def _notes(lengths: Mapping[str, np.ndarray], matched: bool) -> tuple[str, ...]:
    notes = []
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
