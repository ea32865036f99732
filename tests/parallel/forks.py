"""Ranks as forks: torch is imported once, by the process that they come from."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def forked(work: Callable[[int], None], size: int) -> int:
    """``work(rank)`` in so many processes; the number of those that failed."""
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)
