"""Freed memory that stays: seen in a process of its own, because the setting is for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanokimi.memory import free_memory

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


def machine(root: Path, cgroup: str, files: dict[str, int | str]) -> Path:
    """A ``proc`` and a ``sys`` of a machine with 1000 KiB to spare."""
    contents = {"proc/meminfo": "MemAvailable:    1000 kB\n", "proc/self/cgroup": cgroup}
    contents |= {f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in files.items()}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = {"memory/x/memory.limit_in_bytes": 70, "memory/x/memory.usage_in_bytes": 1}
V2 = {"a/memory.max": 900_000, "a/memory.current": 100_000, "a/b/memory.max": "max", "a/b/memory.current": 5}


@pytest.mark.fault("A18")
@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("", {}, 1_024_000),
        ("0::/\n", {"memory.max": 5000, "memory.current": 1000}, 4000),
        ("0::/a/b\n", V2, 800_000),  # the limit is an ancestor's
        ("0::/a/b\n", {**V2, "a/b/memory.max": 305}, 300),
        ("0::/a/b\n", {**V2, "a/b/memory.max": 3}, 0),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": 700, "memory/x/memory.usage_in_bytes": 1}, 699),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": 70, "memory/memory.usage_in_bytes": 1}, 69),
        ("4:cpu,memory:/x\n", V1, 69),
        ("0::/a/b\n", {**V2, "a/memory.stat": "file 9\ninactive_file 70000"}, 870_000),  # goes when memory is short
        ("4:memory:/x\n", {**V1, "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 30"}, 99),
        ("0::/gone/b\n", {"memory.max": 5000, "memory.current": 1000}, 4000),
        ("0::/a\n1:name=systemd:/\n", {"unified/a/memory.max": 50, "unified/a/memory.current": 1}, 49),
    ],
)
def test_free_memory_is_the_least_that_any_group_leaves(
    tmp_path: Path, cgroup: str, files: dict[str, int | str], free: int
) -> None:
    assert free_memory(machine(tmp_path, cgroup, files)) == free


@pytest.mark.fault("A18")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_a_cache_takes_memory_when_it_is_filled() -> None:
    script = """
import torch
from nanokimi.memory import process_memory
from nanokimi.config import ModelConfig
from nanokimi.model.cache import LatentCache
before = process_memory("VmRSS")
cache = LatentCache(ModelConfig.preset("debug"), 20000)
print(cache.entries.nbytes, process_memory("VmRSS") - before, int(cache.entries[0, 7].count_nonzero()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reserved, taken, nonzero = map(int, done.stdout.split())
    assert reserved > 100_000_000
    assert taken < reserved / 10
    assert nonzero == 0
