"""Freed memory that stays: seen in a process of its own, because the setting is for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of the same work, before the setting and after it: rounds of large tensors, made and freed. The first
# rounds find the places where all of them fit.
SCRIPT = """
import resource, torch
from nanokimi.memory import keep_freed_memory
torch.set_num_threads(1)
def work(rounds):
    for _ in range(rounds):
        first, second = torch.ones(10_000_000), torch.ones(20_000_000)
        first = first + 1
        del first, second
def faults():
    work(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(5)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have another malloc")
def test_a_large_block_is_not_fetched_anew_each_time() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(before) > 1000
    assert int(after) < int(before) / 10
