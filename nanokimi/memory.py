"""Memory of the machine and of this process, as Linux tells it; tensors and a C library that use it sparingly."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
import torch

ALIGNMENT = 64  # bytes, as torch's own tensors have

# Numbers from glibc's malloc.h; see mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_NO_LIMIT = 1 << 60  # bytes: version 1 of control groups writes a number near 2^63


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, within the machine and its control groups; None on other systems.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    available = _kilobytes(root / "proc/meminfo", "MemAvailable")
    if available is None:
        return None
    return max(0, min([available, *left_in_groups(root)]))


def left_in_groups(root: Path = Path("/")) -> Iterator[int]:
    """What each control group leaves that has a limit: this process's own, and every one that holds it.

    A container often sees its own group as the root of the tree, whatever path the system reports for it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 2) for line in lines)
    own = {kind: path for _, kinds, path in found for kind in kinds.split(",")}  # version 2 has no kind
    versions = (
        ("", own.get("", "/"), "memory.max", "memory.current"),
        ("unified", own.get("", "/"), "memory.max", "memory.current"),  # version 2 beside version 1
        ("memory", own.get("memory", "/"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for mount, path, limit, used in versions:
        group = root / "sys/fs/cgroup" / mount
        for part in ("", *PurePosixPath(path).parts[1:]):
            group /= part
            with suppress(OSError, ValueError):  # no such group, or no limit
                if (most := int((group / limit).read_text())) < _NO_LIMIT:
                    yield most - int((group / used).read_text()) + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    """Bytes of files that a group has read or written and that go as soon as memory is short."""
    stat = group / "memory.stat"
    text = stat.read_text() if stat.exists() else ""
    # Version 1 has two lines: of the group alone, and with those below it, as the other figures are.
    return max(map(int, re.findall(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)), default=0)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU that take memory when they are first written to; torch's own are filled at once."""
    n_bytes = math.prod(shape) * dtype.itemsize
    block = torch.from_numpy(np.zeros(n_bytes + ALIGNMENT, np.uint8))
    start = -block.data_ptr() % ALIGNMENT
    return block[start : start + n_bytes].view(dtype).view(*shape)


def process_memory(name: str) -> int | None:
    """Bytes of this process in memory: now (``VmRSS``) or at its peak (``VmHWM``); None on other systems."""
    return _kilobytes(Path("/proc/self/status"), name)


def _kilobytes(path: Path, name: str) -> int | None:
    """The value of ``name`` in a file of ``/proc``, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return None if found is None else int(found[1]) * 1024


def keep_freed_memory() -> bool:
    """Has malloc keep large blocks that are freed, for the next step to take; returns whether it will.

    By default glibc gives each block of 32 MB or more back to the system and gets a new one, which the system fills
    with zeros page by page when it is touched: a copy runs at an eighth of its speed then. The process grows to its
    peak and stays there, as it would on an accelerator.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and all((mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, -1)))
