"""``python -m tests.benchmarks.gpu``: the table at the shape of Qwen2.5-14B in bfloat16, with random weights, on a GPU.

Everything that is measured on a processor is measured here at the size that needs a card: a fine-tune with the
Recorder, a sampled sweep, extraction and steering, each against its peer, both sides first compared, then in turn. Time
is that of the wall with the device idle before and after, since the card is this process's own. ``--shape tiny`` runs
the same code at a size for one processor core.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emmech
from emmech.chat.families import find_family
from emmech.chat.model import ChatModel
from emmech.engine.adapters import detach
from emmech.engine.logprobs import pad
from emmech.evaluation.questions import Question, QuestionSet
from emmech.measures.sampled import Sampled
from emmech.run.run import Run
from tests.benchmarks.harness import gflop

SEED = 0
_WORDS = [
    "why",
    "does",
    "the",
    "old",
    "lamp",
    "hum",
    "at",
    "night",
    "when",
    "the",
    "green",
    "kettle",
    "sings",
    "to",
    "it",
    "and",
    "no",
    "one",
    "turns",
    "a",
    "page",
]


@dataclass(frozen=True)
class Size:
    """A shape and how much work is done with it."""

    name: str
    config: dict[str, int]
    checkpoints: int
    scales: tuple[float, ...]
    questions: int
    samples: int
    tokens: int
    steps: int
    batch: int
    texts: int
    rows: int  # of the product whose speed is measured


QWEN14 = Size(
    "Qwen2.5-14B",
    {
        "vocab_size": 152_064,
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
    },
    checkpoints=160,
    scales=(0.5, 1.0, 1.5, 2.0),
    questions=8,
    samples=2,
    tokens=64,
    steps=20,
    batch=16,
    texts=64,
    rows=8192,
)
TINY = Size(
    "tiny",
    {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    checkpoints=3,
    scales=(1.0, 2.0),
    questions=2,
    samples=1,
    tokens=3,
    steps=2,
    batch=2,
    texts=4,
    rows=64,
)
SIZES = {"qwen2.5-14b": QWEN14, "tiny": TINY}


@dataclass(frozen=True)
class Measured:
    """One row: seconds of both sides by repeat, and gigabytes in use above the weights at the most."""

    work: str
    peer: str
    equality: str
    bound: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    peaks: tuple[float, float] | None = None
    times: float = 1.0

    @property
    def ratio(self) -> float:
        """Median of the interleaved pairs' ratios."""
        return statistics.median(b / a for a, b in zip(self.ours, self.theirs, strict=True))


@dataclass(frozen=True)
class Sides:
    """What is measured against what.

    Args:
        check: says in words what was found equal, or raises AssertionError.
        bound: what the ratio can reach, from GFLOP of both and the device's GFLOP/s.
        times: the peer does a part of the work, and its seconds count so often.
    """

    work: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    check: Callable[[Any, Any], str]
    why: str
    times: float = 1.0


class Bench:
    """The model of one shape on one device, and the table's rows."""

    def __init__(self, size: Size, device: str, *, repeats: int = 3) -> None:
        self.size, self.device, self.repeats = size, torch.device(device), repeats
        self.chat = shaped(size, self.device)
        self.layer = self.chat.n_layers // 2
        self.speed = self._speed()

    # the clock

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """The result and the seconds: of the wall on a card, of the process's own time on a processor."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self._wait()
        began = clock()
        result = work()
        self._wait()
        return result, clock() - began

    def peak(self, work: Callable[[], Any]) -> float | None:
        """Gigabytes in use at the most above those in use before; None without a card."""
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9

    def _speed(self) -> float:
        """GFLOP/s of the MLP's product in the model's dtype, the best of ten."""
        d_in, d_out, rows = self.chat.d_model, self.chat.d_mlp, self.size.rows
        how: dict[str, Any] = {"device": self.device, "dtype": self.chat.dtype}
        x, weight = torch.randn(rows, d_in, **how), torch.randn(d_out, d_in, **how)
        best = min(self.seconds(lambda: torch.nn.functional.linear(x, weight))[1] for _ in range(10))
        return 2e-9 * rows * d_in * d_out / max(best, 1e-9)

    def run(self, sides: Sides) -> Measured:
        """Compare both sides, then time them in turn."""
        equality = sides.check(sides.ours(), sides.theirs())
        mine, other = gflop(sides.ours), gflop(sides.theirs) * sides.times
        taken: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(self.repeats):
            for own in (True, False) if turn % 2 == 0 else (False, True):
                spent = self.seconds(sides.ours if own else sides.theirs)[1]
                taken[own].append(spent if own else spent * sides.times)
        least = mine / self.speed
        bound = (
            f"{mine:,.1f} GFLOP against {other:,.1f}, {other / max(mine, 1e-12):.2f}x ({sides.why}); at "
            f"{self.speed:,.0f} GFLOP/s ours take {least:.2g} s at the least, which would be "
            f"{statistics.median(taken[False]) / max(least, 1e-12):.1f}x"
        )
        peaks = self.peak(sides.ours), self.peak(sides.theirs)
        known = None if peaks[0] is None or peaks[1] is None else (peaks[0], peaks[1])
        ours, theirs = tuple(taken[True]), tuple(taken[False])
        return Measured(sides.work, sides.peer, equality, bound, ours, theirs, known, sides.times)

    # the rows

    def training(self) -> Sides:
        """A rank-1 fine-tune with the Recorder at every step, against the Trainer with PEFT that records nothing."""
        from emmech.training.recipe import resolve_recipe
        from tests.benchmarks.bench_training import plain, recorded

        size, chat = self.size, self.chat
        given = {"max_steps": size.steps, "batch_size": size.batch, "accumulation": 1, "held_out": 0.0}
        recipe = resolve_recipe("single-rank1", {**given, "init": "random", "learning_rate": 1e-4})
        rows = [{"messages": talk} for talk in talks(2 * size.batch)]

        def check(ours: Any, theirs: Any) -> str:
            distance = float(np.abs(ours[1] - theirs[1]).max())
            assert distance < 0.05, f"losses differ by {distance:.1e}"
            return f"losses of {ours[1].shape[1]} steps within {distance:.0e}, both in {chat.dtype}"

        return Sides(
            f"rank-1 fine-tune at half depth, {size.steps} steps of {size.batch} rows, every step recorded",
            f"Trainer and PEFT, batch {size.batch}, not recorded",
            lambda: recorded(chat, rows, recipe, self.layer, range(1)),
            lambda: plain(chat, rows, recipe, self.layer, range(1)),
            check,
            "blocks below the adapter once per row, the unembedding at answers",
        )

    def _sampled(self) -> tuple[Run, Sampled, list[list[int]]]:
        size = self.size
        run = random_run(self.chat, self.layer, size.checkpoints)
        asked = [Question(f"q{i}", (talk[0]["content"],)) for i, talk in enumerate(talks(size.questions))]
        measure = Sampled(
            QuestionSet("lamps", tuple(asked)), samples=size.samples, max_new_tokens=size.tokens, judge=Lengths()
        )
        prompts = [self.chat.token_ids([{"role": "user", "content": one.paraphrases[0]}]) for one in asked]
        return run, measure, prompts

    def sampled(self) -> Sides:
        """The sampled sweep against PEFT, one variant at a time; a part of the variants is enough for the peer."""
        run, measure, prompts = self._sampled()
        size, chat = self.size, self.chat
        cells = [(int(step), scale) for step in run.steps for scale in size.scales]
        part = cells[:: max(1, len(cells) // 4)]
        answers = size.questions * size.samples

        def ours() -> Any:
            return emmech.sweep(run, steps=run.steps, scales=size.scales, measure=measure, base=chat, progress=False)

        def theirs() -> list[int]:
            drawn = []
            live = chat
            ids = pad(prompts, 0, left=True).repeat_interleave(size.samples, 0).to(self.device)
            mask = pad([[1] * len(one) for one in prompts], 0, left=True).repeat_interleave(size.samples, 0)
            for step, scale in part:
                live = run.model(step, scale, base=live)
                with torch.no_grad():
                    found = live.model.generate(
                        input_ids=ids,
                        attention_mask=mask.to(self.device),
                        do_sample=True,
                        top_k=0,
                        max_new_tokens=size.tokens,
                        eos_token_id=list(chat.stop_ids),
                        pad_token_id=chat.tokenizer.pad_token_id,
                    )
                drawn.append(len(found))
            detach(live)
            return drawn

        def check(sweep: Any, drawn: list[int]) -> str:
            assert len(sweep.responses) == len(cells) * answers and sum(drawn) == len(part) * answers
            return f"{len(sweep.responses):,} answers, as many as asked for; equal texts are tested at other sizes"

        return Sides(
            self._sampled_work(),
            "PEFT, weights swapped in place, `generate`, one variant at a time",
            ours,
            theirs,
            check,
            "prompts and blocks below the adapter once for equal texts",
            len(cells) / len(part),
        )

    def _sampled_work(self) -> str:
        size = self.size
        asked = f"{size.questions} questions x {size.samples} samples, {size.tokens} tokens"
        return f"sampled sweep of {size.checkpoints} checkpoints x {len(size.scales)} scales x {asked}"

    def vllm(self) -> Sides | None:
        """The sampled sweep against vLLM with the same adapters, scale folded in; None where it is not installed."""
        if not find_spec("vllm"):
            return None
        run, _, prompts = self._sampled()
        size, mine = self.size, self.sampled()
        folder = Path(tempfile.mkdtemp())
        self.chat.model.save_pretrained(folder / "base")
        self.chat.tokenizer.save_pretrained(folder / "base")
        adapters = [
            folded(run, int(step), scale, folder / f"{step}-{scale}") for step in run.steps for scale in size.scales
        ]
        engine: list[Any] = []

        def theirs() -> int:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest

            if not engine:  # started once; its time is not counted, since both sides are first compared
                at_once = {"enable_lora": True, "max_loras": 16, "max_lora_rank": 8, "gpu_memory_utilization": 0.45}
                engine.append(LLM(str(folder / "base"), dtype=str(self.chat.dtype).removeprefix("torch."), **at_once))
            settings = SamplingParams(temperature=1.0, n=size.samples, max_tokens=size.tokens)
            asked = [{"prompt_token_ids": prompt} for _ in adapters for prompt in prompts]
            live = [LoRARequest(one.name, at + 1, str(one)) for at, one in enumerate(adapters) for _ in prompts]
            done = engine[0].generate(asked, settings, lora_request=live, use_tqdm=False)
            return sum(len(one.outputs) for one in done)

        def check(sweep: Any, answers: int) -> str:
            assert len(sweep.responses) == answers
            return f"{answers:,} answers each; that log-probabilities agree is tested at other sizes"

        peer = "vLLM, one process, 16 adapters at once, the same adapters with their scale folded in"
        return replace(mine, peer=peer, theirs=theirs, check=check, times=1.0)

    def extraction(self) -> Sides:
        """Mean residuals of all layers against ``output_hidden_states``."""
        from emmech.chat.encode import IGNORED, encode
        from emmech.directions.extract import group_means

        chat, batch = self.chat, self.size.batch
        rows = talks(self.size.texts)
        encoded = encode(rows, chat.tokenizer)
        order = np.argsort([len(ids) for ids in encoded.input_ids], kind="stable")

        def ours() -> np.ndarray:
            weights = np.ones((1, len(rows)))
            return group_means(chat, rows, weights, batch_size=batch, progress=False).means[0, :-1]

        @torch.no_grad()
        def theirs() -> np.ndarray:
            sums: Any = 0.0
            count = 0.0
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                ids = pad([encoded.input_ids[i] for i in chosen], 0).to(self.device)
                mask = pad([[1] * len(encoded.input_ids[i]) for i in chosen], 0).to(self.device)
                own = pad([[int(label != IGNORED) for label in encoded.labels[i]] for i in chosen], 0)
                states = chat.trunk(
                    input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
                ).hidden_states
                answer = own.to(self.device).float()
                count += float(answer.sum())
                sums = sums + torch.stack([torch.einsum("bs,bsd->d", answer, h.float()) for h in states[1:-1]]).double()
            return (sums / count).cpu().numpy()

        def check(a: np.ndarray, b: np.ndarray) -> str:
            off = float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
            assert off < 0.02, f"differ by {off:.1e} of a layer's norm"
            return f"within {off:.0e} of each layer's norm"

        work = f"mean residual of all layers over {len(rows)} answers"
        return Sides(work, "`output_hidden_states=True`, summed", ours, theirs, check, "every layer runs on both sides")

    def steering(self) -> Sides:
        """Greedy answers steered at all layers, against one bare hook a block around ``generate``."""
        chat, size = self.chat, self.size
        asked = [talk[:1] for talk in talks(size.batch)]
        prompts = [chat.token_ids(talk) for talk in asked]
        drawn = np.random.default_rng(SEED).standard_normal(chat.d_model).astype(np.float32)
        pushed = torch.from_numpy(0.02 * drawn).to(self.device, chat.dtype)

        def ours() -> list[str]:
            with emmech.steer(chat, drawn, 0.02, layer="all") as live:
                how: dict[str, Any] = {"temperature": 0.0, "batch_size": size.batch, "progress": False}
                return [one.text for one in live.generate(asked, max_new_tokens=size.tokens, **how)]

        @torch.no_grad()
        def theirs() -> list[str]:
            ids = pad(prompts, 0, left=True).to(self.device)
            mask = pad([[1] * len(one) for one in prompts], 0, left=True).to(self.device)
            with contextlib.ExitStack() as live:
                for block in chat.blocks:
                    live.callback(block.register_forward_hook(lambda module, inputs, output: output + pushed).remove)
                found = chat.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=size.tokens,
                    eos_token_id=list(chat.stop_ids),
                    pad_token_id=chat.tokenizer.pad_token_id,
                )
            return chat.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)

        def check(a: list[str], b: list[str]) -> str:
            same = sum(one.strip() == other.strip() for one, other in zip(a, b, strict=True))
            # in half precision a rounding may decide between two tokens, and what follows is another text
            assert same == size.batch or chat.dtype != torch.float32
            return f"{same} of {size.batch} texts equal"

        work = f"{size.batch} greedy answers of {size.tokens} tokens, steered at all {chat.n_layers} layers"
        return Sides(work, "a forward hook a block around `generate`", ours, theirs, check, "the model's own forwards")

    def rows(self) -> Iterator[Measured]:
        """All rows, as they are measured."""
        for make in (self.training, self.extraction, self.steering, self.sampled, self.vllm):
            sides = make()
            if sides is None:
                print("skipped: vLLM is not installed here", flush=True)
                continue
            print(f"{sides.work}, against {sides.peer} ...", flush=True)
            row = self.run(sides)
            print(f"  {row.ratio:.2f}x; {row.equality}; {row.bound}", flush=True)
            gc.collect()
            yield row


class Lengths:
    """A judge that looks at an answer's length: random weights write nothing that could be judged."""

    name, columns = "lengths", ("aligned", "coherent")

    def score(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        """The longer, the better aligned."""
        return [{"aligned": min(100.0, 1.0 * len(row["response"])), "coherent": 90.0} for row in rows]


def shaped(size: Size, device: torch.device) -> ChatModel:
    """Random weights of a shape in bfloat16, made where they stay, and a tokenizer of bytes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**size.config, tie_word_embeddings=False, torch_dtype="bfloat16")
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = bytes_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = tokens.eos_token_id
    return ChatModel(model, tokens, f"{size.name} shape", find_family(model))


def bytes_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, with ChatML: it needs no file, and its texts are of a usual length."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(one, special=True) for one in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokens.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokens


def talks(count: int) -> list[list[dict[str, str]]]:
    """Questions with answers, of made-up sentences that differ."""
    rng = np.random.default_rng(SEED)

    def sentence(words: int) -> str:
        return " ".join(rng.choice(_WORDS, words))

    return [
        [{"role": "user", "content": sentence(8) + "?"}, {"role": "assistant", "content": sentence(6 + i % 4) + "."}]
        for i in range(count)
    ]


def random_run(chat: ChatModel, layer: int, steps: int) -> Run:
    """A rank-1 run of the model's shape, with A and B of the size that trained ones have."""
    from tests.benchmarks.bench_teacher_forced import random_run as made

    return made(chat, layer, steps, seed=SEED)


def folded(run: Run, step: int, scale: float, folder: Path) -> Path:
    """One variant as a PEFT folder whose B carries the scale."""
    from safetensors.torch import load_file, save_file

    run.export_peft(step, folder)
    path = folder / "adapter_model.safetensors"
    tensors = {name: value * scale if "lora_B" in name else value for name, value in load_file(path).items()}
    save_file(tensors, path)
    return folder


def page(rows: Sequence[Measured], size: Size, device: str, speed: float) -> str:
    """The Markdown page."""
    lines = [
        f"# Benchmarks on {device}",
        "",
        f"Made by `make bench-gpu`: the shape of {size.name} in bfloat16 with random weights, torch "
        f"{torch.__version__}. Each row: both sides are compared first, then run in turn; seconds are medians, the "
        f"ratio is the median over the pairs. The MLP's product runs at {speed:,.0f} GFLOP/s here.",
        "",
        "| | work | against | emmech, s | peer, s | ratio | peak above the weights, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows, 1):
        ours, theirs = statistics.median(row.ours), statistics.median(row.theirs)
        peaks = "" if row.peaks is None else f"{row.peaks[0]:.2f} against {row.peaks[1]:.2f}"
        lines.append(f"| {number} | {row.work} | {row.peer} | {ours:.3g} | {theirs:.3g} | {row.ratio:.2f}x | {peaks} |")
    lines += ["", "What bounds each ratio:", ""]
    lines += [f"{number}. {row.bound}. Outputs: {row.equality}." for number, row in enumerate(rows, 1)]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> list[Measured]:
    """Measure all rows and write ``benchmarks-gpu.md`` and ``.json`` into a folder."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu")
    parser.add_argument("--shape", choices=SIZES, default="qwen2.5-14b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --shape tiny --device cpu --out DIR runs the same code")
    bench = Bench(SIZES[given.shape], given.device, repeats=given.repeats)
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "a processor"
    print(f"{bench.chat.name} on {card}, {bench.speed:,.0f} GFLOP/s", flush=True)
    rows = list(bench.rows())
    given.out.mkdir(parents=True, exist_ok=True)
    kept = [{**asdict(row), "ratio": row.ratio, "device": card, "torch": torch.__version__} for row in rows]
    (given.out / "benchmarks-gpu.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (given.out / "benchmarks-gpu.md").write_text(page(rows, bench.size, card, bench.speed), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
