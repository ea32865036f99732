"""Large pages for memory that every token reads from end to end: fewer addresses for the processor to look up."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

# Numbers from Linux's mman.h; see madvise(2).
_HUGEPAGE, _COLLAPSE = 14, 25
_PAGE = 2 << 20  # bytes


def prefer_huge_pages(tensor: Tensor, *, filled: bool = True) -> bool:
    """Asks Linux to keep what whole large pages of ``tensor`` there are in such pages; returns whether it agreed.

    Args:
        filled: move what is there now, which takes as long as a copy the first time. Otherwise pages are large as
            they are first written.
    """
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - first
    if size <= 0 or not sys.platform.startswith("linux"):
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advised = madvise(first, size, _HUGEPAGE) == 0
    return advised and (not filled or madvise(first, size, _COLLAPSE) == 0)
