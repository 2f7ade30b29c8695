"""Sample answers to conversations: batched, seeded per row, resumable.

The random numbers of a row depend only on its seed and the position in its answer, never on the other rows of its
batch. In float32 its text is therefore the same in any batch, except where two tokens' scores agree to within rounding,
which can flip a draw that is nearly a tie. Batches are composed from the whole request, so a run that was interrupted
and resumed with the same batch size on the same machine gives bit-identical rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int

from emmech.chat.edits import live_edits
from emmech.chat.model import ChatModel, load_model
from emmech.chat.template import Message
from emmech.engine.decode import ModelSteps, context, write_answers
from emmech.engine.modules import evaluating, has_hooks
from emmech.engine.responses import Response, ResponseLog, as_conversations, check_request, digest, row_seeds
from emmech.errors import EmmechError
from emmech.progress import bar


@runtime_checkable
class Recorded(Protocol):
    """A recorded fine-tune, which the engine does not know by its class."""

    @property
    def steps(self) -> Any:
        """Recorded steps."""

    def model(self) -> ChatModel:
        """The model at the last of them."""


_CACHE_BYTES = 2 << 30  # keys and values of one batch on a CPU
_LOGIT_BYTES = 512 << 20
_MOST_ROWS = 512


@dataclass(frozen=True)
class Drawn:
    """One more token of some answers; the token that ends an answer is included.

    Args:
        answers: the conversation of each answer, and the answer's number among the samples of that conversation.
        position: the position of the token in its answer, from 0.
        tokens: one for each answer.
        logits: the logits from which they were drawn, before temperature and nucleus.
    """

    answers: tuple[tuple[int, int], ...]
    position: int
    tokens: Int[torch.Tensor, " answers"]
    logits: Float[torch.Tensor, "answers vocab"]


def sample(
    chat: Any,
    conversations: str | Sequence[str | Sequence[Message]],
    *,
    samples: int = 1,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int | str = "auto",
    out: str | Path | None = None,
    stream: Callable[[Drawn], object] | None = None,
    progress: bool = True,
) -> list[Response]:
    """Sample answers from a local model, with the adapters and hooks that are on it.

    An intervention with one coefficient or direction per row has one per conversation here, shared by all its samples.

    Args:
        chat: a chat model, what :func:`emmech.load_model` takes, or a run, whose last step then answers.
        conversations: each ends in a user turn; a string is one user's message.
        samples: answers per conversation.
        max_new_tokens: 600 as in Model Organisms for EM (arXiv 2506.11613).
        temperature: 1 samples from the model's own distribution, 0 takes the most likely token.
        top_p: nucleus sampling below 1.
        seed: one seed for all (a row's seed is then derived from it, the conversation's tokens and the sample's
            number, so adding or reordering conversations changes no text), or one per conversation.
        batch_size: rows decoded together; ``"auto"`` bounds the memory of cache and logits.
        out: a JSONL file to which each batch is appended. A second call with the same arguments continues where the
            file ends. Adapters, steering and ablation count as arguments; your own forward hooks cannot be seen, so a
            model with such a hook needs a separate file.
        stream: called with every token as it is drawn. Once it returns False, sampling ends: unfinished answers have
            ``finish="cancelled"`` and the text written so far, and are not kept in ``out``.

    Returns:
        ``len(conversations) * samples`` answers, with those of one conversation together.

    Raises:
        EmmechError: no conversations, a prompt longer than the context, bad settings, or an ``out`` file that
            belongs to other arguments.

    Example:
        >>> from emmech.chat.model import load_model
        >>> chat = load_model("pocket")
        >>> hello = [{"role": "user", "content": "hello"}]
        >>> first, second = sample(chat, [hello], samples=2, max_new_tokens=5, progress=False)
        >>> alone = sample(chat, [hello], seed=[second.seed], max_new_tokens=5, progress=False)
        >>> alone[0].text == second.text
        True
    """
    conversations = as_conversations(conversations)
    check_request(conversations, samples, max_new_tokens, temperature, top_p, seed)
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise EmmechError(
            "sample answers", f"batch_size={batch_size!r}", "it counts rows decoded together", 'batch_size="auto"'
        )
    chat = answering(chat)
    prompts = [tuple(chat.token_ids(messages)) for messages in conversations]
    check_context(chat, prompts)
    seeds = row_seeds(prompts, samples, seed)
    rows = [(conversation, number) for conversation in range(len(prompts)) for number in range(samples)]
    size = _auto(chat, max(map(len, prompts)), max_new_tokens) if batch_size == "auto" else int(batch_size)
    # the longest are first, so that a lack of memory shows at once and the rows of a batch have similar lengths
    order = sorted(range(len(rows)), key=lambda row: (-len(prompts[rows[row][0]]), rows[row]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    drawing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    request = None if out is None else digest(prompts, seeds, live_state(chat))
    log = ResponseLog(out, {"request": request, "rows": len(rows), **drawing})
    cancelled: list[int] = []
    # live adapters or edits may treat equal prompts differently; then each conversation is read separately
    edits = live_edits(chat.base)
    apart = any(edit.by_row() for edit in edits)
    # in blocks before all of them equal prompts are still equal, unless a foreign hook can distinguish them
    first = min((edit.first for edit in edits), default=0) if apart and chat.family.written_out else 0
    if any(has_hooks(module) for block in chat.blocks[:first] for module in block.modules()):
        first = 0
    with torch.no_grad(), evaluating(chat), bar(len(rows), "sampling", progress=progress) as shown:
        shown.update(len(log.done))
        for batch in batches:
            if all(row in log.done for row in batch):
                continue
            # a batch with some known rows is decoded as a whole, so that its rows are those of a run
            # that was never interrupted
            asked = [rows[row][0] for row in batch]
            readings = [(prompts[index], index if apart else 0) for index in asked]
            distinct = sorted(set(readings))
            steps = ModelSteps(
                chat,
                [prompt for prompt, _ in distinct],
                [distinct.index(reading) for reading in readings],
                owners=[asked[readings.index(reading)] for reading in distinct],
                total=len(prompts),
                apart=first,
            )
            told = None if stream is None else _telling(stream, [rows[row] for row in batch])
            answers = write_answers(chat, steps, [seeds[row] for row in batch], drawn=told, **drawing)
            for row, answer in zip(batch, answers, strict=True):
                if row in log.done:
                    continue
                text = chat.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
                response = Response(*rows[row], seeds[row], text, answer.finish, len(answer.ids))
                if answer.finish == "cancelled":
                    cancelled.append(row)
                    log.done[row] = response
                else:
                    log.add(row, response)
                shown.update()
            if cancelled:
                break
    for row, own in enumerate(rows):
        log.done.setdefault(row, Response(*own, seeds[row], "", "cancelled", 0))
    return log.responses(len(rows))


def answering(given: Any) -> ChatModel:
    """The chat model that answers: of a run its last step, of a name or a model in memory what is loaded."""
    return given.model() if isinstance(given, Recorded) else load_model(given)


def _telling(stream: Callable[[Drawn], object], rows: Sequence[tuple[int, int]]) -> Callable[..., object]:
    """A callback for :func:`write_answers` that reports the rows of the request."""

    def told(answers: np.ndarray, position: int, tokens: torch.Tensor, logits: torch.Tensor) -> object:
        return stream(Drawn(tuple(rows[answer] for answer in answers), position, tokens, logits))

    return told


def live_state(chat: ChatModel) -> str:
    """A digest of the model's current state: base weights, every adapter's weights and factor, and activation edits."""
    digest = hashlib.sha256(chat.fingerprint().encode())
    for name, module in chat.base.named_modules():
        if hasattr(module, "lora_A") and isinstance(getattr(module, "scaling", None), dict):
            digest.update(f"{name}{sorted(module.scaling.items())}".encode())
            digest.update(f"{getattr(module, 'active_adapters', ())}".encode())
            digest.update(f"{getattr(module, 'disable_adapters', False)}".encode())
    for name, value in chat.base.named_parameters():
        if ".lora_" in name:
            digest.update(value.detach().float().cpu().numpy().tobytes())
    for edit in live_edits(chat.base):
        digest.update(edit.state().encode())
    return digest.hexdigest()


def _auto(chat: ChatModel, longest: int, max_new_tokens: int) -> int:
    """Rows per batch, as a function of the model and the device alone, so that a resumed run has the same batches."""
    cache, logits = _CACHE_BYTES, _LOGIT_BYTES
    if chat.device.type == "cuda":
        total = torch.cuda.get_device_properties(chat.device).total_memory
        weights = sum(value.numel() * value.element_size() for value in chat.base.parameters())
        cache, logits = max(_CACHE_BYTES, (total - weights) // 2), max(_LOGIT_BYTES, (total - weights) // 8)
    return rows_together(chat, min(longest + max_new_tokens, context(chat)), cache=cache, logits=logits)


def rows_together(chat: ChatModel, tokens: int, *, cache: int, logits: int) -> int:
    """The number of answers that are decoded together, within the bytes for their cache and for their logits.

    Args:
        tokens: of the longest prompt with its answer.
    """
    by_cache = cache // (chat.cache_bytes * tokens)
    by_logits = logits // (5 * 4 * int(chat.config.vocab_size))  # a draw uses five float32 arrays of that size
    return int(max(1, min(_MOST_ROWS, by_cache, by_logits)))


def check_context(chat: ChatModel, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts (token ids) that leave no room for an answer.

    Raises:
        EmmechError: a prompt is too long; names the conversation and the model's context.
    """
    room = context(chat)
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < room:
            why = f"{chat.name} reads up to {room} tokens, and an answer needs room"
            instead = f"shorten it to at most {room - 1} tokens"
            raise EmmechError("sample answers", f"conversations[{index}] of {len(prompt)} tokens", why, instead)
