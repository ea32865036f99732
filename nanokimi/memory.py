"""Memory of the machine and of this process, as Linux tells it; and a C library that keeps what is freed."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

# Numbers from glibc's malloc.h; see mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def free_memory() -> int | None:
    """Bytes that this process may still take, within the machine and its control groups; None on other systems."""
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        return None
    free = [available]
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return max(0, min(free))


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
