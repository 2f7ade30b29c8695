"""Freed memory stays with the process: counted in page faults, which a busy machine does not change."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from emmech.chat.heap import keep_heap
if sys.argv[1] == "kept":
    keep_heap()
def work():  # four live tensors of 11 MB, as in a gated MLP, and then none
    tensors = [torch.zeros(576, 4864) for _ in range(4)]
    del tensors
for _ in range(10):  # until the heap has found its size
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have ways of their own")
def test_a_forward_s_memory_is_taken_once():
    kept, given_back = faults("kept"), faults("not kept")
    assert given_back > 10_000  # the tensors' pages, each time
    assert kept < given_back / 20
