"""Margins of several checkpoints on a real model, against PEFT."""

from __future__ import annotations

import numpy as np
import torch

from emmech.chat.encode import IGNORED, encode
from emmech.chat.model import load_model
from emmech.engine.logprobs import bundled_margins, pad
from emmech.measures.teacher_forced import Margin
from emmech.sweeps.jobs import _CPU_TOKENS
from emmech.sweeps.sweep import sweep
from tests.benchmarks.bench_teacher_forced import random_run
from tests.benchmarks.harness import Contest, arithmetic, equal


def smollm2() -> Contest:
    """Margins on SmolLM2, 16 checkpoints x 16 pairs"""
    from emmech.engine.adapters import attach, detach

    chat = load_model("smollm2-135m")
    pairs = (bundled_margins("narrow") + bundled_margins("broad"))[:16]
    run = random_run(chat, 15, 16)
    part = run.steps[::8]
    talks = [
        [{"role": "user", "content": pair.question}, {"role": "assistant", "content": answer}]
        for pair in pairs
        for answer in (pair.misaligned, pair.aligned)
    ]
    encoded = encode(talks, chat.tokenizer)
    order = np.argsort([len(ids) for ids in encoded.input_ids], kind="stable")
    batches = []
    for chosen in np.array_split(order, 4):
        ids = pad([encoded.input_ids[i] for i in chosen], 0, left=True)
        mask = pad([[1] * len(encoded.input_ids[i]) for i in chosen], 0, left=True)
        labels = pad([encoded.labels[i] for i in chosen], IGNORED, left=True)
        keep = ids.shape[1] - int((labels != IGNORED).int().argmax(1).min()) + 1
        batches.append((chosen, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels, keep))

    def ours() -> np.ndarray:
        found = sweep(run, measure=Margin(pairs), base=chat, progress=False)
        return found.frame["value"].to_numpy().reshape(16, 16)

    def theirs() -> np.ndarray:
        live = attach(chat, run.adapters, run.weights(1))
        found = []
        with torch.no_grad():
            for step in part.tolist():
                live = attach(live, run.adapters, run.weights(step))
                means = np.empty(len(talks))
                for chosen, ids, mask, positions, labels, keep in batches:
                    logits = live.model(
                        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
                    ).logits[:, :-1]
                    targets = labels[:, -keep:][:, 1:]
                    answer = targets != IGNORED
                    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
                    means[chosen] = ((picked * answer).sum(1) / answer.sum(1)).numpy()
                found.append(means[::2] - means[1::2])
        detach(live)
        return np.array(found)

    return Contest(
        "margins on SmolLM2-135M, adapter at layer 15 of 30, 16 checkpoints x 16 pairs",
        "PEFT, weights swapped in place (as quick as `set_adapter`), 4 batches sorted by length, left-padded, "
        "`logits_to_keep` of the longest answer",
        4.0,
        arithmetic(
            ours,
            theirs,
            "blocks below the adapter once for all checkpoints, each prompt once for its two answers, the last MLP and "
            "the unembedding at answer positions, no padding",
            (_CPU_TOKENS, 576, 1536),
            times=8.0,
        ),
        ours,
        theirs,
        check=lambda a, b: equal(a[::8], b),
        times=8.0,
    )


CONTESTS = (smollm2,)
