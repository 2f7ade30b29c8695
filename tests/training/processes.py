"""A training by anyone's Trainer with the Recorder, for torchrun and accelerate to launch in several processes.

``python -m tests.training.processes FOLDER lora|full PER_PROCESS [fsdp]``
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
from tests.conftest import make_rows, make_tiny
from tests.training.plain import Rows, collate


def main(folder: Path, kind: str, per_process: int, fsdp: str = "") -> None:
    torch.set_num_threads(1)
    chat = make_tiny("llama")
    torch.manual_seed(0)
    model = chat.model
    if kind == "lora":
        config = LoraConfig(r=2, lora_alpha=16, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    several = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    several |= {"fsdp": "full_shard", "fsdp_config": {"version": int(fsdp[-1])}} if fsdp else {}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=per_process, gradient_accumulation_steps=2,
        max_steps=5, learning_rate=0.01, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, max_grad_norm=0.1, disable_tqdm=True, seed=1, **several,
    )  # fmt: skip
    recorder = emmech.Recorder(
        folder / "run", every=2, probes=["how to sleep ?"], measures={"ln": lambda chat: chat.final_norm.weight.sum()}
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Rows(encode([row["messages"] for row in make_rows()], chat.tokenizer)),
        data_collator=collate, processing_class=chat.tokenizer, callbacks=[recorder],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
