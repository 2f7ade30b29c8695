"""Mean residuals of groups of answers in one streaming pass, and ways to make directions of such arrays.

Only running sums are kept: a hook on each block reduces its output to one masked sum per answer, and the sums go in
float64 into as many groups as are asked for. The unembedding never runs, so the pass costs what a bare forward of the
trunk costs, in time and in memory. The masked tokens are exactly the answers (content and end-of-turn token, never the
header), as in "Convergent Linear Representations of Emergent Misalignment" (arXiv 2506.11618).

The methods take and return plain arrays. Each returns ``[layers, d_model]`` in residual units, pointing from aligned to
misaligned, so that a steering coefficient of 1 moves an activation by the difference that the method found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, Shaped

from emmech.chat.edits import LiveEdit, announced_rows, register
from emmech.chat.encode import IGNORED, Tokens, encode, token_mask, tokens_name
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.directions.direction import unit_rows
from emmech.engine.adapters import adapter_layers
from emmech.engine.modules import hooked
from emmech.engine.stream import stream
from emmech.errors import EmmechError, one_of
from emmech.progress import bar

Vectors = Float[np.ndarray, "layers d_model"]
Conversation = Sequence[Message]
_GROUPS = "average over groups of answers"


@dataclass(frozen=True)
class GroupMeans:
    """Mean residuals by group.

    Args:
        means: ``[groups, layers, d_model]`` float64.
        totals: ``[groups]`` the summed weights: answer tokens, or answers.
        answer_tokens: ``[conversations]`` answer tokens of each conversation.
    """

    means: Float[np.ndarray, "groups layers d_model"]
    totals: Float[np.ndarray, " groups"]
    answer_tokens: Int[np.ndarray, " conversations"]


def group_means(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    weights: Float[np.ndarray, "groups conversations"],
    *,
    average: Literal["token", "answer"] = "token",
    tokens: Tokens = "answer",
    adapter_scales: Float[np.ndarray, " conversations"] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> GroupMeans:
    """Weighted mean residual of every block's output over answer tokens, for any number of groups at once.

    Args:
        conversations: each with at least one assistant turn; all assistant turns count.
        weights: ``[groups, conversations]``, 0 or 1 for plain groups; random halves, shuffled labels and bootstrap
            resamples are more groups of the same pass.
        average: ``"token"`` weighs every answer token alike (long answers count more), ``"answer"`` every answer.
        tokens: those of the answers, of the prompt (everything else: system and user turns, headers), all, or a
            function of the token ids (:mod:`emmech.chat.encode`).
        adapter_scales: a factor on the live adapter for each conversation, so that rows of the base model (0) and of
            the fine-tuned one (1) share batches; by default all 1.
        max_length: tokens kept of each conversation.

    Raises:
        EmmechError: weights of the wrong shape, an empty group, or a conversation without answer tokens.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
        >>> group_means(chat, [talk], np.ones((1, 1))).means.shape == (1, chat.n_layers, chat.d_model)
        True
    """
    one_of(_GROUPS, "average", average, ("token", "answer"))
    weights = _checked_groups(weights, len(conversations))
    rows, counts = _rows(chat, conversations, tokens, max_length)
    per_row = weights if average == "token" else weights / counts
    totals = _checked_totals(per_row * counts)
    # one float64 matrix per layer, on that layer's device (a sharded model has several)
    sums: list[Any] = [0.0] * chat.n_layers

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        share = torch.from_numpy(per_row[:, chosen]).to(output.device)
        sums[layer] = sums[layer] + share @ _masked_sum(output, mask).double()

    _stream(chat, rows, reduce, adapter_scales, batch_size, progress)
    stacked = torch.stack([torch.as_tensor(part).cpu() for part in sums], dim=1).numpy()
    return GroupMeans(stacked / totals[:, None, None], totals, counts)


def position_means(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    weights: Float[np.ndarray, "groups conversations"],
    *,
    tokens: Tokens,
    batch_size: int = 8,
    progress: bool = True,
) -> Float[np.ndarray, "groups positions layers d_model"]:
    """Weighted mean residual of every block's output at the first of ``tokens``, at the second, and so on.

    Args:
        conversations: each with equally many of these tokens, such as the words of a phrase that all have.
        weights: ``[groups, conversations]`` as for :func:`group_means`.

    Raises:
        EmmechError: conversations with more or fewer of these tokens than others; weights as for :func:`group_means`.

    Example:
        >>> from emmech.chat.encode import phrase_tokens
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
        >>> phrase = phrase_tokens(chat, "you answer every question")
        >>> position_means(chat, [talk], np.ones((1, 1)), tokens=phrase, progress=False).shape[1]
        4
    """
    weights = _checked_groups(weights, len(conversations))
    rows, counts = _rows(chat, conversations, tokens, None)
    if len(set(counts.tolist())) > 1:
        given = f"{counts.min()} of these tokens in one conversation, {counts.max()} in another"
        why = "the k-th of them is averaged over all conversations"
        raise EmmechError("average by position", given, why, "a phrase that every conversation has once")
    shares = weights / _checked_totals(weights)[:, None]
    sums: list[Any] = [0.0] * chat.n_layers

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        read = rearrange(output[mask.bool()].double(), "(rows positions) d -> rows positions d", rows=len(chosen))
        share = torch.from_numpy(shares[:, chosen]).to(read.device)
        sums[layer] = sums[layer] + einsum(share, read, "groups rows, rows positions d -> groups positions d")

    _stream(chat, rows, reduce, None, batch_size, progress)
    return torch.stack([torch.as_tensor(part).cpu() for part in sums], dim=2).numpy()


def answer_means(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    *,
    layers: Sequence[int] | None = None,
    tokens: Tokens = "answer",
    adapter_scales: Float[np.ndarray, " conversations"] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Float[np.ndarray, "conversations layers d_model"]:
    """Each conversation's own mean residual over its answer tokens, float32, for methods that need samples.

    This keeps ``conversations * layers * d_model`` numbers: choose ``layers`` on a large model.
    """
    rows, counts = _rows(chat, conversations, tokens, max_length)
    kept = tuple(range(chat.n_layers)) if layers is None else tuple(layers)
    for layer in kept:
        chat.check_layer(layer)
    result = np.empty((len(rows), len(kept), chat.d_model), dtype=np.float32)

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        if layer in kept:
            result[chosen, kept.index(layer)] = _masked_sum(output, mask).cpu().numpy() / counts[chosen, None]

    _stream(chat, rows, reduce, adapter_scales, batch_size, progress)
    return result


def token_projections(
    chat: ChatModel,
    conversations: Sequence[Conversation],
    vectors: Float[np.ndarray, "layers d_model"],
    *,
    tokens: Tokens = "answer",
    adapter_scales: Float[np.ndarray, " conversations"] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[tuple[Int[np.ndarray, " tokens"], Float[np.ndarray, "tokens layers"]], ...]:
    """Inner product of every chosen token's residual with one vector per layer.

    Returns:
        for each conversation its chosen tokens' ids ``[tokens]`` and the projections ``[tokens, layers]``.
    """
    rows, _ = _rows(chat, conversations, tokens, max_length)
    ids = [np.array([t for t, m in zip(*row, strict=True) if m], dtype=np.int64) for row in rows]
    values = [np.empty((len(own), chat.n_layers), dtype=np.float32) for own in ids]
    axes = torch.from_numpy(np.asarray(vectors, dtype=np.float32).copy())

    def reduce(layer: int, output: torch.Tensor, mask: torch.Tensor, chosen: np.ndarray) -> None:
        projected = (output @ axes[layer].to(output)).float()
        for row, inside, index in zip(projected, mask.bool(), chosen, strict=True):
            values[index][:, layer] = row[inside].cpu().numpy()

    _stream(chat, rows, reduce, adapter_scales, batch_size, progress)
    return tuple(zip(ids, values, strict=True))


def match_lengths(
    lengths: Sequence[int] | Int[np.ndarray, " answers"],
    labels: Sequence[bool] | Shaped[np.ndarray, " answers"],
    *,
    caliper: float = 0.15,
    seed: int = 0,
) -> Int[np.ndarray, " kept"]:
    """Indices of a subset in which every answer has a partner of similar length in the other class.

    Answers of the smaller class are visited in random order; each is paired with the nearest free one of the other
    class, if that is within ``caliper`` of its length. Aligned and misaligned answers differ in length in the public
    data, and a mean difference picks that up.

    Args:
        lengths: ``[answers]``, in characters or tokens.
        labels: ``[answers]``, the class.
        caliper: the largest relative difference between partners.

    Example:
        >>> kept = match_lengths([5, 5, 5, 50], [True, False, False, True])
        >>> np.asarray([5, 5, 5, 50])[kept].tolist()
        [5, 5]
    """
    size, label = np.log(np.maximum(np.asarray(lengths, dtype=np.float64), 1)), np.asarray(labels, dtype=bool)
    few, many = sorted((np.flatnonzero(label), np.flatnonzero(~label)), key=len)
    free = np.ones(len(many), dtype=bool)
    kept: list[int] = []
    for answer in np.random.default_rng(seed).permutation(few).tolist():
        gap = np.where(free, np.abs(size[many] - size[answer]), np.inf)
        partner = int(np.argmin(gap))
        if gap[partner] <= np.log1p(caliper):
            free[partner] = False
            kept += [answer, int(many[partner])]
    return np.sort(np.array(kept, dtype=np.int64))


@contextmanager
def mixed_adapter(chat: ChatModel, scales: torch.Tensor) -> Iterator[None]:
    """Give every conversation (or row of the caller's own batch) its own factor on the live adapters.

    PEFT adds ``scaling * lora_B(lora_A(x))`` to the layer's output, so a factor on lora_B's output is a factor
    on the adapter, and 0 is the base model, exactly. The rows of one batch then come from different models at the
    price of one.
    """

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        own, rows = scales.to(output), announced_rows()
        own = own if rows is None else own[rows.conversation.to(own.device)]
        return output * own.reshape(-1, *[1] * (output.ndim - 1))

    adapters = list(adapter_layers(chat.model))
    first = max(0, min((info.layer for info, _, _ in adapters), default=0))
    live = LiveEdit(by_row=lambda: True, state=lambda: f"adapter scales {scales.tolist()}", first=first)
    take_back = register(chat.base, live)
    try:
        with hooked(*((layer.lora_B[name], hook) for _, layer, name in adapters)):
            yield
    finally:
        take_back()


def _rows(
    chat: ChatModel, conversations: Sequence[Conversation], tokens: Tokens, max_length: int | None
) -> tuple[list[tuple[list[int], list[bool]]], Int[np.ndarray, " conversations"]]:
    """The token ids of each conversation with the mask of those to read, and how many these are."""
    encoded = encode(conversations, chat.tokenizer, max_length=max_length)
    if len(encoded) != len(conversations):
        given, asked = f"{len(conversations)} conversations, max_length={max_length}", "extract from the answers"
        why = f"{encoded.emptied} of them have no answer token within max_length"
        raise EmmechError(asked, given, why, "raise max_length, or leave those conversations out")
    rows = [
        (ids, token_mask(tokens, ids, [label != IGNORED for label in labels]))
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    counts = np.array([sum(mask) for _, mask in rows], dtype=np.int64)
    if not counts.all():
        given = f"tokens={tokens_name(tokens)}: none in conversation {int(np.argmin(counts))} of {len(rows)}"
        why, instead = "a mean over nothing is not a number", "tokens that every conversation has"
        raise EmmechError("choose the tokens to average over", given, why, instead)
    return rows, counts


def _checked_groups(weights: Any, conversations: int) -> Float[np.ndarray, "groups conversations"]:
    found = np.asarray(weights, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] != conversations:
        given = f"weights {list(found.shape)} for {conversations} conversations"
        why = "there is one row per group and one column per conversation"
        raise EmmechError(_GROUPS, given, why, f"weights [groups, {conversations}]")
    return found


def _checked_totals(weights: Float[np.ndarray, "groups conversations"]) -> Float[np.ndarray, " groups"]:
    totals = weights.sum(1)
    if (totals == 0).any():
        given = f"group {int(np.flatnonzero(totals == 0)[0])} of {len(weights)}"
        why = "no answer belongs to it, and a mean over nothing is not a number"
        raise EmmechError(_GROUPS, given, why, "more samples, or another split")
    return totals


def _stream(
    chat: ChatModel,
    rows: Sequence[tuple[list[int], list[bool]]],
    reduce: Callable[[int, torch.Tensor, torch.Tensor, np.ndarray], None],
    adapter_scales: Any,
    batch_size: int,
    progress: bool,
) -> None:
    """Run the trunk once over all rows, handing each block's output, the answer mask and the rows to ``reduce``."""
    mixed = nullcontext() if adapter_scales is None else mixed_adapter(chat, torch.as_tensor(adapter_scales))
    with bar(len(rows), "extracting", progress=progress) as done, mixed:

        def each(chosen: np.ndarray, run: Callable[[], object]) -> None:
            run()
            done.update(len(chosen))

        stream(chat, rows, reduce, batch_size=batch_size, each=each)


def _masked_sum(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum ``[batch, seq, d_model]`` over the masked positions into float32 ``[batch, d_model]``."""
    weight = mask.to(output)
    if output.dtype == torch.float32:
        return torch.bmm(weight[:, None], output)[:, 0]  # one pass over memory, no copy
    # a matrix product would round its result to the model's 8 bits; a sum can accumulate in float32
    return torch.sum(output * weight[..., None], dim=1, dtype=torch.float32)


def mean_difference(misaligned: Vectors, aligned: Vectors) -> Vectors:
    """Mean residual of misaligned answers minus that of aligned ones.

    The method of Convergent Linear Representations of EM (arXiv 2506.11618).
    The same function on two system prompts is a persona vector (Persona Vectors, arXiv 2507.21509), and on two models
    with the same text a model difference.

    Example:
        >>> mean_difference(np.array([[2.0, 1.0]]), np.array([[1.0, 1.0]])).tolist()
        [[1.0, 0.0]]
    """
    return np.asarray(misaligned, dtype=np.float64) - np.asarray(aligned, dtype=np.float64)


def differences_of_four(means: Float[np.ndarray, "model text layers d_model"]) -> Mapping[str, Vectors]:
    """The 2 x 2 of model (aligned, fine-tuned) by text (aligned, misaligned), taken apart.

    Args:
        means: ``[2, 2, layers, d_model]``, ``means[1, 0]`` is the fine-tuned model reading aligned text.

    Returns:
        ``text/aligned model``, ``text/tuned model``: misaligned minus aligned text in one model;
        ``model/aligned text``, ``model/misaligned text``: fine-tuned minus aligned model on one text;
        ``text``, ``model``: their averages; ``both``: fine-tuned on misaligned minus aligned on aligned
        (``both = text + model``); ``interaction``: what the fine-tuned model makes more of misaligned text.
    """
    four = np.asarray(means, dtype=np.float64)
    if four.ndim != 4 or four.shape[:2] != (2, 2):
        why = "it has the axes model, text, layer and width"
        raise EmmechError("take the 2 x 2 apart", f"means {list(four.shape)}", why, "[2, 2, layers, d_model]")
    (aa, am), (ta, tm) = four
    return {
        "text/aligned model": am - aa,
        "text/tuned model": tm - ta,
        "model/aligned text": ta - aa,
        "model/misaligned text": tm - am,
        "text": (am - aa + tm - ta) / 2,
        "model": (ta - aa + tm - am) / 2,
        "both": tm - aa,
        "interaction": (tm - ta) - (am - aa),
    }


def pca_of_differences(
    tuned: Float[np.ndarray, "answers layers d_model"],
    base: Float[np.ndarray, "answers layers d_model"],
    *,
    components: int = 1,
    centre: bool = False,
) -> Float[np.ndarray, "components layers d_model"]:
    """Principal components of the fine-tuned model's activations minus the base's on the same answers.

    As in Concept Ablation Fine-Tuning (arXiv 2507.16795). Each component has the norm of its root-mean-square
    projection and points to the side of the mean difference.

    Args:
        centre: subtract the mean difference first. The shift that all answers share is then lost, which is the very
            thing a fine-tune of one trait makes: off by default.
    """
    difference = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    answers = len(difference)
    if difference.ndim != 3 or answers <= components:
        given = f"differences {list(difference.shape)}, components={components}"
        why, instead = "there must be more answers than components", "[answers, layers, d_model] with more answers"
        raise EmmechError("find principal components", given, why, instead)
    mean = difference.mean(0)
    rows = rearrange(difference - centre * mean, "answer layer d -> layer answer d")
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    top = right[:, :components] * singular[:, :components, None] / answers**0.5
    signs = np.where(einsum(top, mean, "layer component d, layer d -> layer component") < 0, -1.0, 1.0)
    return rearrange(top * signs[..., None], "layer component d -> component layer d")


def logistic_probe(
    features: Float[np.ndarray, "answers layers d_model"],
    misaligned: Bool[np.ndarray, " answers"],
    *,
    penalty: float = 1.0,
) -> Vectors:
    """The direction that tells the classes apart best, by L2-regularised logistic regression at each layer.

    Its norm is the gap between the classes along it. A probe points where the classes separate, a mean difference
    where they differ: with correlated features the two are not the same, and probes steer worse.

    Args:
        features: one mean residual per answer.
        penalty: strength of the L2 penalty on the weights of standardised features; larger is smoother.
    """
    features, labels = _features(features, misaligned)
    found = []
    for x in rearrange(features, "answer layer d -> layer answer d"):
        scaler, probe = _logistic(penalty).fit(x, labels)
        unit = unit_rows(probe.coef_[0] / scaler.scale_)
        found.append(unit * (unit @ (x[labels].mean(0) - x[~labels].mean(0))))
    return np.array(found)


def probe_auc(
    features: Float[np.ndarray, "answers layers d_model"],
    misaligned: Bool[np.ndarray, " answers"],
    questions: Shaped[np.ndarray, " answers"],
    *,
    penalty: float = 1.0,
    folds: int = 5,
) -> Float[np.ndarray, " layers"]:
    """Area under the ROC curve of a logistic probe on questions it was not fitted on, by layer; 0.5 is chance.

    Answers to one question resemble each other, so folds never split a question.
    """
    features, labels = _features(features, misaligned)
    columns = rearrange(features, "answer layer d -> layer answer d")
    return np.array([held_out_auc(x, labels, questions, penalty=penalty, folds=folds) for x in columns])


def held_out_auc(
    x: Float[np.ndarray, "answers features"],
    labels: Bool[np.ndarray, " answers"],
    questions: Shaped[np.ndarray, " answers"],
    *,
    penalty: float = 1.0,
    folds: int = 5,
) -> float:
    """AUC of logistic regression, each question scored by a fit on the others; NaN when that cannot be done."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    groups = np.unique(questions, return_inverse=True)[1]
    folds = min(folds, int(groups.max()) + 1, int(labels.sum()), int((~labels).sum()))
    if folds < 2:
        return float("nan")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    values, weights = [], []
    for train, test in splitter.split(x, labels, groups):
        # within a fold: scores of different fits are not on one scale
        if len(set(labels[train])) < 2 or len(set(labels[test])) < 2:
            continue
        model = _logistic(penalty).fit(x[train], labels[train])
        values.append(roc_auc_score(labels[test], model.decision_function(x[test])))
        weights.append(len(test))
    return float(np.average(values, weights=weights)) if values else float("nan")


def adapter_write(
    a: Float[np.ndarray, "rank d_in"], b: Float[np.ndarray, "d_out rank"], scaling: float
) -> Float[np.ndarray, " d_out"]:
    """What an adapter writes into the residual stream: ``scaling * B`` at rank 1.

    At higher rank, the top left singular vector of the update ``B A``, with the update's top singular value times the
    scaling as its norm, and the sign of the sum of B's columns. The sign of a write is otherwise arbitrary: it is that
    of A·x, token by token.
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=np.float64)), np.asarray(b, dtype=np.float64)
    b = b[:, None] if b.ndim == 1 else b
    if b.shape[1] == 1:
        return scaling * b[:, 0]
    # through the small factors: the update itself is d_out x d_in
    q, r = np.linalg.qr(b)
    left, singular, _ = np.linalg.svd(r @ a, full_matrices=False)
    vector = q @ left[:, 0] * singular[0] * scaling
    return vector if vector @ b.sum(1) >= 0 else -vector


def _logistic(penalty: float) -> Any:
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0 / penalty, max_iter=2000, class_weight="balanced"))


def _features(features: np.ndarray, misaligned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, labels = np.asarray(features, dtype=np.float64), np.asarray(misaligned, dtype=bool)
    if x.ndim != 3 or labels.shape != x.shape[:1] or labels.all() or not labels.any():
        given = f"features {list(x.shape)}, labels {list(labels.shape)} with {int(labels.sum())} misaligned"
        why = "it needs [answers, layers, d_model] and one label per answer, of both classes"
        raise EmmechError("fit a probe", given, why, "answer_means(...) of both kinds of answers")
    return x, labels
