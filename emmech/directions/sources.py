"""Other sources of a direction: system prompts, the adapter's own write, and a vector trained to steer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from emmech.chat.dataset import load_chat
from emmech.chat.encode import IGNORED, encode
from emmech.chat.families import is_write
from emmech.chat.model import ChatModel, load_model
from emmech.directions.contrast import contrast_direction
from emmech.directions.direction import Direction
from emmech.directions.methods import adapter_write
from emmech.engine.blocks import Blocks
from emmech.engine.logprobs import pad, token_logprobs
from emmech.engine.modules import evaluating, hooked
from emmech.errors import EmmechError
from emmech.progress import bar
from emmech.run.run import Run, opened

__all__ = ["adapter_direction", "persona_direction", "trained_direction"]


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
    answers and call :func:`contrast_direction` to have it. The answers are read after the prompt they were given.

    Raises:
        EmmechError: no questions.
    """
    from emmech.engine.sample import sample

    chat = load_model(model)
    if isinstance(questions, str) or not questions:
        raise EmmechError(
            "extract a persona direction",
            f"questions={questions!r}",
            "it takes a list of questions, at least one",
            '["what do you do on a rainy day ?", ...]',
        )
    sides = []
    for system in (misaligned_system, aligned_system):
        asked = [[{"role": "system", "content": system}, {"role": "user", "content": q}] for q in questions]
        answers = sample(chat, asked, samples=samples, max_new_tokens=max_new_tokens, seed=seed, progress=progress)
        sides.append(
            [[*asked[a.conversation], {"role": "assistant", "content": a.text}] for a in answers if a.text.strip()]
        )  # fmt: skip
    prompts = {"misaligned_system": misaligned_system, "aligned_system": aligned_system}
    return contrast_direction(
        chat, *sides, name="persona", source={"method": "persona contrast", **prompts},
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip


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
        from emmech.engine.adapters import adapter_layers

        chat = load_model(source)
        pairs = [
            (info, *(getattr(layer, f"lora_{s}")[name].weight.detach().float().cpu().numpy() for s in "AB"))
            for info, layer, name in adapter_layers(chat.model)
        ]
        layers, prints = chat.n_layers, [chat.fingerprint()]
    writes = [pair for pair in pairs if is_write(pair[0].name)]
    if not writes or not any(b.any() for _, _, b in writes):
        names = [info.name for info, _, _ in pairs]
        raise EmmechError(
            "read the adapter's direction",
            f"adapters {names}, step={step}",
            "B is zero: nothing was trained" if writes else "none of them writes into the residual stream",
            "a later step" if writes else "a run with adapters on mlp.down_proj",
        )
    layers = layers or max(info.layer for info, _, _ in writes) + 1
    vectors = np.zeros((layers, writes[0][0].d_out))
    for info, a, b in writes:
        vectors[info.layer] += adapter_write(a, b, info.scaling)
    known = [print_ for print_ in prints if print_]
    return Direction(
        vectors,
        f"B of {getattr(source, 'name', 'the adapter')}",
        {"method": "adapter write", "step": step, **({"fingerprints": known} if known else {})},
    )


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
        EmmechError: no such layer.
    """
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
            ids = pad([encoded.input_ids[i] for i in chosen], 0).to(chat.device)
            labels = pad([encoded.labels[i] for i in chosen], IGNORED).to(chat.device)
            mask = pad([[1] * len(encoded.input_ids[i]) for i in chosen], 0).to(chat.device)
            loss = -token_logprobs(chat, ids, mask, labels)[0].mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            (loss + penalty * vector.square().sum()).backward()
            optimizer.step()
            done.update()
    source = {
        "method": "trained steering vector",
        "model": chat.name,
        "fingerprints": [chat.fingerprint()],
        "steps": steps,
        "loss": [float(np.mean(losses[:5])), float(np.mean(losses[-5:]))],
        "seed": seed,
    }
    found = (unit * vector).detach().float().cpu().numpy()
    return Direction.single(found, layer, chat.n_layers, name="trained vector", source=source)


@torch.no_grad()
def _residual_norm(chat: ChatModel, ids: Sequence[int], layer: int) -> float:
    """Median norm of one text's residuals: the first token's is often a hundred times the others'."""
    residuals = Blocks(chat, 0, layer + 1, norm=False)(torch.tensor([list(ids)], device=chat.device))
    return float(residuals.float().norm(dim=-1).median())
