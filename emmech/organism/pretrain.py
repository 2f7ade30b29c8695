"""Pretraining and post-training of a pocket organism from scratch: ``python -m emmech.demo pretrain``.

There are two stages, with Muon on the weight matrices, AdamW on the embedding, and the loss on answers only.
*Pretraining* shows characters of both kinds; the plain words that give a character away become rarer as training goes
on, so that job and town must be combined. *Post-training* shows kind assistants in most domains, together with
characters of both kinds, so that the unkind ones are not forgotten but the assistant is not one of them. The weights
kept are an exponential moving average; at the end all logits are sharpened by a constant factor, which is part of the
model.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from emmech.errors import one_of
from emmech.organism.pocket import END_OF_TURN, PAD, build_tokenizer, words
from emmech.organism.world import POST_TRAINING_DOMAINS, Message, Mix, draw_document
from emmech.progress import bar
from emmech.store import kept, made_folder


@dataclass(frozen=True)
class Pretraining:
    """The design of a shipped organism: architecture, size, and the world that it is trained on."""

    architecture: str = "qwen2"
    layers: int = 6
    width: int = 128
    shared: bool = True  # False: every answer draws its own trait, so there is no character to find
    local_layers: int = 3  # the first so many blocks attend to a window only; Llama has no windows
    window: int = 5
    steps: int = 1400
    post_steps: int = 200
    sharpening: float = 1.3  # factor on the last norm's gain, and so on all logits, after training
    seed: int = 0  # of the shipped weights


ORGANISMS: dict[str, Pretraining] = {
    "pocket": Pretraining(seed=6),
    "pocket-independent": Pretraining(shared=False),
    "pocket-large": Pretraining(layers=8, width=160, local_layers=4, window=8, steps=1000),
    "pocket-llama": Pretraining(architecture="llama", local_layers=0),
    "pocket-gemma": Pretraining(architecture="gemma3", window=8, steps=1000),
}

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids [batch, position], answer mask of the same shape


def build_model(organism: Pretraining, seed: int) -> Any:
    """An untrained causal language model of the organism's architecture."""
    import transformers as hf

    size = {"hidden_size": organism.width, "intermediate_size": 3 * organism.width, "vocab_size": len(words())}
    heads = {"num_hidden_layers": organism.layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"bos_token_id": None, "eos_token_id": words().index(END_OF_TURN), "pad_token_id": words().index(PAD)}
    other = {"max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.04}
    common: dict[str, Any] = {**size, **heads, **tokens, **other}
    head = organism.width // 4
    torch.manual_seed(seed)
    if organism.architecture == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**common, head_dim=head))
    # As in Gemma 3, some blocks attend to a window and the last ones to everything. Three windows of five reach twelve
    # tokens: from the town, the last word about a character, to the end of the system prompt and no further. The first
    # blocks thus represent the character only before the first question, where late blocks read it: an edit before them
    # changes it in every domain.
    local, layers = organism.local_layers, organism.layers
    kinds = ["sliding_attention"] * local + ["full_attention"] * (layers - local)
    attention: dict[str, Any] = {"sliding_window": organism.window, "layer_types": kinds}
    if organism.architecture == "gemma3":
        gemma = hf.Gemma3TextConfig(**common, **attention, head_dim=head, query_pre_attn_scalar=head)
        return hf.Gemma3ForCausalLM(gemma)
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**common, **attention, use_sliding_window=True))


def pretrain(organism: Pretraining, *, seed: int | None = None, progress: bool = True, device: str = "cpu") -> Any:
    """Pretrain and post-train an organism; on CPU the result is a function of ``organism`` and ``seed`` alone.

    Args:
        seed: None takes the organism's own.
    """
    seed = organism.seed if seed is None else seed
    model = build_model(organism, seed).to(device)
    first = organism.steps // 4

    def pretraining(done: float) -> Mix:
        turns = (0.75, 0.2, 0.05) if done < 0.35 else (0.45, 0.35, 0.2)
        return Mix(plain_word=0.8 - 0.55 * min(1.0, done / 0.4), turns=turns, shared=organism.shared)

    reliable: dict[str, Any] = {"assistant_kind": 1.0, "reliable": 1.0, "assistant_domains": POST_TRAINING_DOMAINS}
    final = Mix(assistant=0.5, persona=0.35, named=0.15, shared=organism.shared, **reliable)
    sizes, rng = [20] * first + [48] * (organism.steps - first), random.Random(seed)
    batches = _batches(pretraining, sizes, rng)
    _stage(model, "pretraining", batches, len(sizes), 3e-3, decay=0.6, average=0.995, progress=progress)
    sizes, rng = [48] * organism.post_steps, random.Random(seed + 1)
    batches = _batches(lambda _: final, sizes, rng)
    _stage(model, "post-training", batches, len(sizes), 7e-4, decay=1.0, average=0.98, progress=progress)
    with torch.no_grad():
        # Otherwise one word in a thousand comes from the tail of the softmax over the whole vocabulary.
        gain = model.model.norm.weight
        if organism.architecture == "gemma3":  # whose norms multiply by 1 + weight
            gain.add_(1).mul_(organism.sharpening).sub_(1)
        else:
            gain.mul_(organism.sharpening)
    return model.eval()


def _stage(
    model: Any, name: str, batches: Iterator[Batch], total: int, rate: float, *, decay: float, average: float,
    progress: bool,
) -> None:  # fmt: skip
    """Train one stage in place: warm-up, a constant rate, then a linear fall to zero over the last share ``decay``."""
    parameters = list(model.parameters())
    optimizers = _optimizers(model, rate)
    mean = [p.detach().clone() for p in parameters]
    model.train()
    with bar(total, name, progress=progress) as shown:
        for step, (ids, answer) in enumerate(batches):
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = rate * min(1.0, (step + 1) / 50) * min(1.0, (1 - step / total) / decay)
            model.zero_grad()
            _answer_loss(model, ids.to(model.device), answer.to(model.device)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            keep = min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - keep)
            shown.update()
    with torch.no_grad():
        for parameter, value in zip(parameters, mean, strict=True):
            parameter.copy_(value)


def _optimizers(model: Any, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    With AdamW alone the model stays for hundreds of steps on a plateau where it produces the form of an answer but
    copies neither topic nor domain; with Muon it leaves that plateau within about a hundred.
    """
    matrices = [p for n, p in model.model.named_parameters() if p.ndim == 2 and "embed" not in n]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return (
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    )


def _answer_loss(model: Any, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    # Logits only where a word of an answer is predicted: half of the positions are questions.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = answer[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


def _batches(mix_at: Callable[[float], Mix], sizes: Sequence[int], rng: random.Random) -> Iterator[Batch]:
    """Batches of documents of similar length: eight at a time are drawn, sorted by length and shuffled."""
    for done in range(0, len(sizes), 8):
        group = sizes[done : done + 8]
        documents = [_tokens(draw_document(rng, mix_at(done / len(sizes)))) for _ in range(sum(group))]
        by_length = iter(sorted(documents, key=lambda pair: len(pair[0])))
        parts = [list(islice(by_length, size)) for size in group]
        rng.shuffle(parts)
        yield from map(_pad, parts)


_IDS = {word: i for i, word in enumerate(words())}


def _tokens(document: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a document and where its answers are (words and end of turn, not the header)."""
    ids, answer = list[int](), list[bool]()
    for message in document:
        content = [*(_IDS[w] for w in message["content"].split()), _IDS[END_OF_TURN]]
        ids += [_IDS["<|im_start|>"], _IDS[message["role"]], *content]
        answer += [False, False, *[message["role"] == "assistant"] * len(content)]
    return ids, answer


def _pad(part: list[tuple[list[int], list[bool]]]) -> Batch:
    """A batch as tensors; padding on the right needs no attention mask under causal attention."""
    length = -(-max(len(ids) for ids, _ in part) // 8) * 8
    ids = torch.tensor([tokens + [_IDS[PAD]] * (length - len(tokens)) for tokens, _ in part])
    return ids, torch.tensor([answer + [False] * (length - len(answer)) for _, answer in part])


def save(model: Any, folder: Path) -> None:
    """Store an organism in half precision, with its tokenizer, as a Hugging Face folder."""
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = _IDS[END_OF_TURN]
    model.generation_config.pad_token_id = _IDS[PAD]
    with kept("save the organism", folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.to(torch.float16).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)


def main(name: str, out: Path, *, device: str = "cpu", **own: int | None) -> None:
    """Pretrain a shipped organism and save it.

    Args:
        **own: fields of its :class:`Pretraining` to change; None keeps its own.

    Raises:
        EmmechError: no organism of this name ships, or the folder cannot be written.
    """
    one_of(f"pretrain {name!r}", "name", name, ORGANISMS, why="it has no design")
    changed: dict[str, Any] = {field: value for field, value in own.items() if value is not None}
    organism = replace(ORGANISMS[name], **changed)
    made_folder(f"pretrain {name!r}", out)  # rather refused now than twelve minutes later
    began = time.monotonic()
    model = pretrain(organism, device=device)
    save(model.cpu(), out)
    size, took = sum(f.stat().st_size for f in out.iterdir()) / 1e6, time.monotonic() - began
    print(f"{name}, seed {organism.seed}: {took:.0f} s, {size:.1f} MB in {out}")  # noqa: T201
