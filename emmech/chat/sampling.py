"""Sample answers to conversations: batched, seeded per row, resumable.

What is guaranteed: the random numbers of a row depend on its seed and the position in its answer, never on its
batch-mates; so in float32 its text is the same in any batch, except where two tokens' scores agree to within
rounding (about one token in 10^5). Batches are composed from the whole request, so a run that was
interrupted and resumed with the same batch size on the same machine gives bit-identical rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from emmech.chat.decode import decode
from emmech.chat.draw import row_seed
from emmech.chat.model import ChatModel
from emmech.chat.template import Message
from emmech.errors import EmmechError
from emmech.progress import bar
from emmech.store import append_jsonl, read_jsonl

__all__ = ["Response", "sample"]

_CACHE_BYTES = 2 << 30  # keys and values of one batch on a CPU
_LOGIT_BYTES = 512 << 20
_MOST_ROWS = 512


@dataclass(frozen=True)
class Response:
    """One sampled answer.

    Args:
        conversation: index into the conversations given.
        sample: which answer to it, from 0.
        seed: the row's own seed; ``sample(chat, [conversation], seed=[seed])`` draws the same text again.
        text: the answer, without the token that ended it.
        finish: ``"stop"``, or ``"length"`` when it was cut at ``max_new_tokens`` (or at the end of the context).
        tokens: its length in tokens.
    """

    conversation: int
    sample: int
    seed: int
    text: str
    finish: str
    tokens: int


def sample(
    chat: ChatModel,
    conversations: Sequence[Sequence[Message]],
    *,
    samples: int = 1,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int | str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
) -> list[Response]:
    """Sample answers through a local model, with whatever adapters and hooks are on it.

    Args:
        conversations: each ends in a user turn.
        samples: answers per conversation.
        max_new_tokens: 600 as in Model Organisms for EM (arXiv 2506.11613).
        temperature: 1 samples from the model's own distribution, 0 takes the most likely token.
        top_p: nucleus sampling below 1.
        seed: one for all (a row's seed is then derived from it, the conversation's tokens and the sample's
            number, so adding or reordering conversations changes no text), or one per conversation.
        batch_size: rows decoded together; ``"auto"`` bounds the memory of cache and logits.
        out: a JSONL file that is appended to after each batch. Called again with the same arguments, sampling
            continues where the file ends. Adapters are part of the arguments; forward hooks cannot be
            seen, so a steered model needs a file of its own.

    Returns:
        ``len(conversations) * samples`` answers, those of one conversation together.

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
    _check(conversations, samples, max_new_tokens, temperature, top_p, seed, batch_size)
    prompts = [tuple(chat.token_ids(messages)) for messages in conversations]
    _check_context(chat, prompts)
    seeds = _row_seeds(prompts, samples, seed)
    rows = [(conversation, number) for conversation in range(len(prompts)) for number in range(samples)]
    size = _auto(chat, max(map(len, prompts)), max_new_tokens) if batch_size == "auto" else int(batch_size)
    # longest first: what does not fit in memory fails at once, and batches are alike in length
    order = sorted(range(len(rows)), key=lambda row: (-len(prompts[rows[row][0]]), rows[row]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    settings = {
        "request": _digest(prompts, seeds, _state(chat)),
        "rows": len(rows),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    path = Path(out) if out is not None else None
    done = _resume(path, settings) if path is not None else {}
    was_training = chat.base.training
    chat.base.eval()
    try:
        with bar(len(rows), "sampling", progress=progress) as steps:
            steps.update(len(done))
            for batch in batches:
                if all(row in done for row in batch):
                    continue
                # a batch of which some rows are known is decoded whole, so that its rows are those of a run
                # that was never interrupted
                distinct = sorted({prompts[rows[row][0]] for row in batch})
                decoded = decode(
                    chat,
                    distinct,
                    [distinct.index(prompts[rows[row][0]]) for row in batch],
                    [seeds[row] for row in batch],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                )
                for row, answer in zip(batch, decoded, strict=True):
                    if row in done:
                        continue
                    text = chat.tokenizer.decode(answer.ids, skip_special_tokens=True)
                    done[row] = Response(*rows[row], seeds[row], text, answer.finish, len(answer.ids))
                    if path is not None:
                        append_jsonl(path, {"row": row, **asdict(done[row])})
                    steps.update()
    finally:
        chat.base.train(was_training)
    return [done[row] for row in range(len(rows))]


def _row_seeds(prompts: Sequence[tuple[int, ...]], samples: int, seed: int | Sequence[int]) -> list[int]:
    if not isinstance(seed, int):
        return [
            int(own) if number == 0 else row_seed(int(own), number)
            for own in seed
            for number in range(samples)
        ]
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in prompts:
        for _ in range(samples):
            found.append(row_seed(seed, prompt, seen[prompt]))
            seen[prompt] += 1  # the same conversation given twice is answered anew
    return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _state(chat: ChatModel) -> str:
    """The model as it answers now: base weights, and every adapter's weights and factor."""
    digest = hashlib.sha256(chat.fingerprint().encode())
    for name, module in chat.base.named_modules():
        if hasattr(module, "lora_A") and isinstance(getattr(module, "scaling", None), dict):
            digest.update(f"{name}{sorted(module.scaling.items())}".encode())
            digest.update(f"{getattr(module, 'active_adapters', ())}".encode())
            digest.update(f"{getattr(module, 'disable_adapters', False)}".encode())
    for name, value in chat.base.named_parameters():
        if ".lora_" in name:
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _resume(path: Path, settings: dict[str, Any]) -> dict[int, Response]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(path, settings)
        return {}
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):  # the process died while writing a line; it is drawn again
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    stored = read_jsonl(path)
    if not stored:
        append_jsonl(path, settings)
        return {}
    if stored[0] != settings:
        differing = [key for key in settings if stored[0].get(key) != settings[key]]
        raise EmmechError(
            f"continue sampling into {path.name}",
            given=f"{path}",
            why="it was begun with other arguments: "
            + ", ".join("conversations, seed or model" if key == "request" else key for key in differing),
            instead="repeat the arguments it was begun with, or give another file",
        ) from None
    return {int(entry.pop("row")): Response(**entry) for entry in stored[1:]}


def _auto(chat: ChatModel, longest: int, max_new_tokens: int) -> int:
    """Rows per batch; a function of the model and the device alone, so that a resumed run has the same."""
    config = chat.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * chat.n_layers * heads * width * chat.dtype.itemsize
    cache, logits = _CACHE_BYTES, _LOGIT_BYTES
    if chat.device.type == "cuda":
        total = torch.cuda.get_device_properties(chat.device).total_memory
        weights = sum(value.numel() * value.element_size() for value in chat.base.parameters())
        cache, logits = max(_CACHE_BYTES, (total - weights) // 2), max(_LOGIT_BYTES, (total - weights) // 8)
    tokens = min(longest + max_new_tokens, getattr(config, "max_position_embeddings", None) or 1 << 30)
    by_cache = cache // (per_token * tokens)
    by_logits = logits // (5 * 4 * int(config.vocab_size))  # five float32 arrays of that size live in a draw
    return int(max(1, min(_MOST_ROWS, by_cache, by_logits)))


def _check_context(chat: ChatModel, prompts: Sequence[Sequence[int]]) -> None:
    room = int(getattr(chat.config, "max_position_embeddings", None) or 1 << 30)
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < room:
            raise EmmechError(
                "sample answers",
                given=f"conversations[{index}] of {len(prompt)} tokens",
                why=f"{chat.name} reads up to {room} tokens, and an answer needs room",
                instead=f"shorten it to at most {room - 1} tokens",
            ) from None


def _check(
    conversations: Sequence[Sequence[Message]],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | Sequence[int],
    batch_size: int | str,
) -> None:
    def refuse(given: str, why: str, instead: str) -> None:
        raise EmmechError("sample answers", given=given, why=why, instead=instead) from None

    if isinstance(conversations, str) or (conversations and isinstance(conversations[0], str | dict)):
        refuse(
            f"conversations={conversations!r}"[:120],
            "each conversation is a list of messages",
            'sample(chat, [[{"role": "user", "content": "..."}]])',
        )
    if not conversations or any(not messages for messages in conversations):
        refuse(
            f"{len(conversations)} conversations",
            "there is nothing to answer",
            "at least one message in each",
        )
    for index, messages in enumerate(conversations):
        if messages[-1].get("role") == "assistant":
            refuse(
                f"conversations[{index}] ends in an assistant turn",
                "the model answers the last user turn",
                "leave the assistant's turn out",
            )
    if not isinstance(samples, int) or samples < 1:
        refuse(f"samples={samples!r}", "it counts the answers per conversation", "samples=1 or more")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        refuse(f"max_new_tokens={max_new_tokens!r}", "an answer has at least one token", "max_new_tokens=600")
    if not 0 <= temperature < float("inf"):
        refuse(
            f"temperature={temperature}",
            "it divides the logits",
            "temperature=1.0, or 0 for the likeliest token",
        )
    if not 0 < top_p <= 1:
        refuse(f"top_p={top_p}", "it is a probability", "top_p=1.0 keeps every token")
    if not isinstance(seed, int) and len(seed) != len(conversations):
        refuse(
            f"{len(seed)} seeds for {len(conversations)} conversations",
            "a sequence of seeds has one for each conversation",
            "seed=0 derives one for every row",
        )
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        refuse(f"batch_size={batch_size!r}", "it counts rows", 'batch_size="auto"')
