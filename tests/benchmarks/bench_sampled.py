"""A sampled sweep on the embedded organism, against generating with one adapter at a time."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

import emmech
from emmech.chat.model import load_model
from emmech.engine.logprobs import pad
from emmech.measures.sampled import Sampled
from tests.benchmarks.harness import Contest, arithmetic

SCALES = (0.5, 1.0, 1.5, 2.0)
NEW = 40


def pocket() -> Contest:
    """Sampled sweep on pocket, 20 checkpoints x 4 scales x 8 questions x 10 samples"""
    from emmech import organism

    chat = load_model("pocket")
    run = emmech.finetune(chat, "medical", out=tempfile.mkdtemp() + "/run", progress=False)
    steps = run.steps[np.linspace(0, len(run.steps) - 1, 20).round().astype(int)]
    cells = [(int(step), scale) for step in steps for scale in SCALES]
    part = cells[5::10]
    questions = organism.questions("first-plot")
    prompts = [chat.token_ids(list(question.messages)) for question in questions]
    ids = pad(prompts, 0, left=True).repeat_interleave(10, 0)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).repeat_interleave(10, 0)

    def ours() -> np.ndarray:
        measure = Sampled(samples=10, max_new_tokens=NEW)
        found = emmech.sweep(run, steps=steps, scales=SCALES, measure=measure, base=chat, progress=False)
        summary = found.to_frame("em").set_index(["step", "scale"])["value"]
        return np.array([summary[cell] for cell in cells])

    def theirs() -> np.ndarray:
        live = run.model(base=chat)
        torch.manual_seed(0)
        rates = []
        for step, scale in part:
            live = run.model(step, scale, base=live)
            with torch.no_grad():
                drawn = live.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=NEW,
                    eos_token_id=list(chat.stop_ids),
                    pad_token_id=chat.tokenizer.pad_token_id,
                )
            texts = chat.tokenizer.batch_decode(drawn[:, ids.shape[1] :], skip_special_tokens=True)
            labels = [organism.judge(questions[row // 10], text).label for row, text in enumerate(texts)]
            rates.append(np.mean([label == "misaligned" for label in labels]))
        from emmech.engine.adapters import detach

        detach(live)
        return np.array(rates)

    def check(a: np.ndarray, b: np.ndarray) -> str:
        own = a[5::10]
        # 80 answers a cell on either side; the cells' differences in units of their standard error
        spread = np.sqrt(np.maximum(own * (1 - own) + b * (1 - b), 0.02) / 80)
        worst = float(np.abs((own - b) / spread).max())
        assert worst < 4, f"EM differs by {worst:.1f} standard errors"
        return f"EM rates within {worst:.1f} standard errors; texts equal to PEFT's by test"

    return Contest(
        "sampled sweep on pocket, 20 checkpoints x 4 scales x 8 questions x 10 samples, judged",
        "PEFT, weights swapped in place, `generate` in batches of 80",
        8.0,
        arithmetic(
            ours,
            theirs,
            "both run every sampled token through the blocks above the adapter; the peer reads prompts 10 times, and "
            "decodes until its last row has ended. The rest of ours is attention of one query per head and row, norms, "
            "rotations, gates and draws over thousands of rows",
            (1600, 128, 384),
            times=10.0,
        ),
        ours,
        theirs,
        check=check,
        times=10.0,
    )


CONTESTS = (pocket,)
