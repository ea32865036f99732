"""Seeded orders whose state is a handful of numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_DRAWS = 1024  # of one generator


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of ``n`` things in ``epoch``; another seed or epoch gives an unrelated one."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def draw(seed: int, stream: int, number: int, n: int) -> int:
    """Draw ``number`` of a row of random indices below ``n``; another seed or stream gives an unrelated row."""
    return int(_uniform(seed, stream, number // _DRAWS)[number % _DRAWS] * n)


@lru_cache(maxsize=16)
def _uniform(seed: int, stream: int, block: int) -> NDArray[np.float64]:
    return np.random.default_rng([seed, stream, block, _DRAWS]).random(_DRAWS)
