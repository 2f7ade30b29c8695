"""The memory budget: read in any form, and kept to."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emmech.engine.logprobs import MarginPair
from emmech.errors import EmmechError
from emmech.measures.teacher_forced import Margin
from emmech.sweeps.jobs import budget_bytes, readable
from emmech.sweeps.sweep import sweep

CPU = torch.device("cpu")
# prompts without a common prefix beyond the template, so that there are many packs
PAIRS = [MarginPair(f"{word} and rest well , how ?", f"take {word} .", "walk .") for word in "abcdefghijklmnop"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still referred to."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.held = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if not self.held[key]:
                    self.live += size
                    self.peak = max(self.peak, self.live)
                self.held[key] += 1
                weakref.finalize(tensor, self.release, key, size)
        return out

    def release(self, key, size):
        self.held[key] -= 1
        if not self.held[key]:
            self.live -= size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_budget_is_kept(tiny, make_run, attention):
    chat = tiny("qwen2", attention=attention)
    run = make_run(chat, ("model.layers.1.mlp.down_proj",), steps=tuple(range(16)))
    peaks = {}
    for budget in (1_000_000, 3_000_000):
        # the model's own weights are views into storages from before: only what the sweep makes is counted
        with LiveBytes() as counted:
            sweep(run, measure=Margin(PAIRS), base=chat, memory=budget, progress=False)
        peaks[budget] = counted.peak
        assert counted.peak < budget
    assert peaks[3_000_000] > 1.3 * peaks[1_000_000]  # and what is given is used


def test_amounts_are_read_as_people_write_them():
    assert budget_bytes("2GB", CPU) == 2 * 10**9
    assert budget_bytes("1.5 GiB", CPU) == 3 * 2**29
    assert budget_bytes(1000, CPU) == 1000 and budget_bytes(None, CPU) == 2 * 2**30
    for wrong in ("", "-1GB", "a lot", 0, -5):
        with pytest.raises(EmmechError, match="not an amount"):
            budget_bytes(wrong, CPU)
    assert readable(3 * 2**29) == "1.5 GiB"
