"""How much memory there is and how much this process takes, as Linux tells it; None where it does not."""

from __future__ import annotations

import re
from pathlib import Path


def free_memory() -> int | None:
    """Bytes that processes may still take, of the machine and of the control groups that this one is in."""
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
    """Bytes of this process in memory: now (``VmRSS``) or at most (``VmHWM``)."""
    return _kilobytes(Path("/proc/self/status"), name)


def _kilobytes(path: Path, name: str) -> int | None:
    """The value of ``name`` in a file of ``/proc``, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return None if found is None else int(found[1]) * 1024
