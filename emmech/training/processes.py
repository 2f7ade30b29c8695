"""One training in several processes: each runs a share of every step's rows, and all take the same step.

A process holds the whole model, the adapters and the optimizer. The loss of a step is divided by the answer tokens of
all its rows, whichever process runs them, so that the sum of the processes' gradients is the gradient of one process.
The first process writes the run and measures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from emmech.engine.split import Asked, RowForwards
from emmech.errors import EmmechError


@dataclass(frozen=True)
class Processes:
    """The processes of a training, ``count`` of them, of which this one has the number ``rank``."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and measures."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def union(self, found: Iterable[int]) -> list[int]:
        """The numbers that any process has found, ascending."""
        own = sorted(set(found))
        if self.count == 1:
            return own
        told: list[list[int]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(told, own)
        return sorted({one for several in told for one in several})

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)


def launched(*, cpu: bool) -> Processes:
    """The processes that torchrun or accelerate started, which are connected if they are not yet.

    Args:
        cpu: whether they train on the CPU, where gloo connects them.

    Raises:
        EmmechError: weights are to be in shards.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "").lower() == "true":
            why = "each process would hold a part of the weights only, and here each runs the whole model"
            instead = "emmech finetune --launch N, or transformers' Trainer with callbacks=[emmech.Recorder(folder)]"
            raise EmmechError("fine-tune in several processes", f"{name}=true", why, instead)
    from accelerate import PartialState

    state = PartialState(cpu=cpu, **({"backend": "gloo"} if cpu else {}))
    return Processes(state.process_index, state.num_processes)


class SharedRows(RowForwards):
    """The forwards of one process: of the rows that are asked for, every ``count``-th."""

    def __init__(self, forwards: RowForwards, processes: Processes) -> None:
        self.rows, self._chat = forwards.rows, forwards._chat
        self._forwards, self._processes = forwards, processes

    def answer_tokens(self, asked: Sequence[Asked]) -> torch.Tensor:
        """Of all rows, whichever process runs them."""
        return self._forwards.answer_tokens(asked)

    def hidden(self, asked: Sequence[Asked]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """See :meth:`RowForwards.hidden`."""
        rank, count = self._processes.rank, self._processes.count
        if own := asked[rank::count]:
            for hidden, targets, places in self._forwards.hidden(own):
                yield hidden, targets, places * count + rank
