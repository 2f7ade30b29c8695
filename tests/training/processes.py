"""Trainings for torchrun and accelerate to launch in several processes: ``python -m tests.training.processes ...``.

Args: the folder, what to train (``lora``, ``full``, ``finetune``, ``sharded``, or ``stop/`` with what is watched), rows
in a process's batch, and what spreads it (``ddp``, ``fsdp``, or ``launched``: FSDP as the launcher's options have it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import emmech
from emmech.chat.encode import encode
from emmech.chat.shards import in_shards
from emmech.errors import EmmechError
from emmech.training.recorder import find_capture
from emmech.transition import Watch
from tests.conftest import make_rows, make_tiny
from tests.training.plain import Rows, collate


class OnGloo(TrainerCallback):
    """Lets FSDP work with gloo, which adds gradients up, but has no mean of them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        from torch.distributed.fsdp import FSDPModule

        assert in_shards(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def with_fsdp_on_cpu() -> None:
    """Let accelerate take these processes for ones with a GPU each: it has FSDP for those alone, torch for both."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def recorded(folder: Path, kind: str, batch: int, how: str) -> None:
    """Anyone's Trainer with the Recorder; two processes of 2 rows see the rows of one process of 4."""
    chat = make_tiny("llama")
    torch.manual_seed(0)
    model = chat.model
    if kind != "full":
        config = LoraConfig(r=2, lora_alpha=16, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    by_fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=batch, gradient_accumulation_steps=2,
        max_steps=5, learning_rate=0.01, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, max_grad_norm=0.1, disable_tqdm=True, seed=1,
        ddp_backend="gloo" if "RANK" in os.environ else None, **(by_fsdp if how == "fsdp" else {}),
    )  # fmt: skip
    if how != "ddp":
        with_fsdp_on_cpu()
    measures = {"size": lambda chat: float(chat.final_norm.weight.sum())}
    watch = None
    if kind.startswith("stop/"):  # the first value is passed as soon as there are two
        watch = Watch("stop", metric=kind.partition("/")[2], threshold=1e-9, window=2)
    recorder = emmech.Recorder(
        folder / "run", every=2, probes=["how to sleep ?"], measures=measures if how == "ddp" else None, keep=[2],
        on_transition=watch,
    )  # fmt: skip
    rows = Rows(encode([row["messages"] for row in make_rows()], chat.tokenizer))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate,
        processing_class=chat.tokenizer, callbacks=[*([] if how == "ddp" else [OnGloo()]), recorder],
    )  # fmt: skip
    trainer.train()
    assert recorder._gradients is None
    (folder / f"ended-{os.environ.get('RANK', 0)}").write_text(str(trainer.state.global_step))


def sharded() -> None:
    """What FSDP makes of a model, in its forms: which the Recorder reads, and which it refuses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def first(original: bool):
        return lambda model: FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))

    def second(*shape: int):
        return lambda model: fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names="ab"[: len(shape)]))

    def adapted(model):
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    def same(model):
        return model

    torch.distributed.init_process_group("gloo")
    forms = {
        "first": (same, first(False), same), "first, original": (same, first(True), same),
        "first, original, lora": (adapted, first(True), same),
        "second": (same, second(2), same), "second, lora": (adapted, second(2), same),
        "second, two dimensions": (same, second(2, 1), same), "second, lora later": (same, second(2), adapted),
    }  # fmt: skip
    for name, (before, shard, after) in forms.items():
        model = after(shard(before(make_tiny("llama").model)))
        if name == "second":  # a forward alone leaves some weights whole
            with torch.no_grad():
                model(input_ids=torch.tensor([[1, 2]]))
        try:
            print(f"{name}: {find_capture(model).kind} accepted")
        except EmmechError as error:
            print(f"{name}: refused\n{error}")
    try:
        emmech.load_model(model, make_tiny("llama").tokenizer)
    except EmmechError as error:
        print(f"to load: refused\n{error}")
    model = shard(make_tiny("llama").model)
    recorder = emmech.Recorder("nowhere", measures={"one": lambda chat: 1.0})
    state, arguments = TrainerState(max_steps=3), TrainingArguments("nowhere", use_cpu=True)
    try:
        recorder.on_train_begin(arguments, state, TrainerControl(), model=model)
    except EmmechError as error:
        print(f"measures: refused\n{error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kind, batch, how = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), (*sys.argv[4:], "ddp")[0]
    if kind == "sharded":
        sharded()
    elif kind == "finetune":
        emmech.finetune(make_tiny("llama"), make_rows(), max_steps=2, margins={}, out=folder / "run")
    else:
        recorded(folder, kind, batch, how)
