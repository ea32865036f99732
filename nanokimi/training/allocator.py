"""Memory that a training step frees stays with the process, on Linux with glibc."""

from __future__ import annotations

import ctypes
import sys

# Numbers from glibc's malloc.h; see mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


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
