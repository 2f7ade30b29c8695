"""Trainings for torchrun and accelerate to launch in several processes: ``python -m tests.training.processes ...``.

Args: the folder, what to train (``lora``, ``full``, ``finetune``, ``sharded``, or ``stop/`` with what is watched), and
rows in a process's batch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import emmech
from emmech.chat.encode import encode
from emmech.errors import EmmechError
from emmech.training.recorder import find_capture
from emmech.transition import Watch
from tests.conftest import make_rows, make_tiny
from tests.training.plain import Rows, collate


def recorded(folder: Path, kind: str, batch: int) -> None:
    """Anyone's Trainer with the Recorder; two processes of 2 rows see the rows of one process of 4."""
    chat = make_tiny("llama")
    torch.manual_seed(0)
    model = chat.model
    if kind != "full":
        config = LoraConfig(r=2, lora_alpha=16, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=batch, gradient_accumulation_steps=2,
        max_steps=5, learning_rate=0.01, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, max_grad_norm=0.1, disable_tqdm=True, seed=1,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )  # fmt: skip
    measures = {"size": lambda chat: float(chat.final_norm.weight.sum())}
    watch = None
    if kind.startswith("stop/"):  # the first value is passed as soon as there are two
        watch = Watch("stop", metric=kind.partition("/")[2], threshold=1e-9, window=2)
    how = {"every": 2, "probes": ["how to sleep ?"], "measures": measures, "on_transition": watch}
    recorder = emmech.Recorder(folder / "run", **how)
    rows = Rows(encode([row["messages"] for row in make_rows()], chat.tokenizer))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate,
        processing_class=chat.tokenizer, callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    (folder / f"ended-{os.environ.get('RANK', 0)}").write_text(str(trainer.state.global_step))


def sharded() -> None:
    """What FSDP makes of a model, in its three forms; the Trainer has it on a GPU only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def first(original: bool):
        return lambda model: FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))

    def second(model):
        return fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))

    torch.distributed.init_process_group("gloo")
    for name, shard in {"first": first(False), "first, original": first(True), "second": second}.items():
        for lora in (False, True) if name != "first" else (False,):  # flat parameters train as a whole
            model = make_tiny("llama").model
            if lora:
                model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
            try:
                print(f"{name}, {lora}: {find_capture(shard(model)).kind} accepted")
            except EmmechError as error:
                print(f"{name}, {lora}: refused\n{error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kind, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if kind == "sharded":
        sharded()
    elif kind == "finetune":
        emmech.finetune(make_tiny("llama"), make_rows(), max_steps=2, margins={}, out=folder / "run")
    else:
        recorded(folder, kind, batch)
