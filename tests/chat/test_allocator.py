"""Freed memory stays with the process: counted in page faults, which a busy machine does not change."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from emmech.chat.model import keep_freed_memory
keep_freed_memory()
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have ways of their own")
@pytest.mark.slow
def test_a_forward_s_memory_is_taken_once():
    # without keep_freed_memory every other process takes all 54,560 pages anew, as its heap happens to lie
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 1000
