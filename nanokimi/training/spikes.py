"""The spike guard: which steps stand out so far that they are better skipped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 128  # steps looked back on; the smallest number from which there is a judgement is half of it
DEVIATIONS = 6.0


class SpikeWatch:
    """Compares loss and gradient norm of each step with those of the last ``WINDOW`` finite steps.

    A spike enters the window like any other step: should the loss stay where it jumped to, that is normal soon, and a
    guard never locks a run out (as in OLMo-core's ``SkipStepOptimizer``).

    Args:
        earlier: loss and gradient norm of the steps before, in their order; None where one was not finite.
    """

    def __init__(self, earlier: Iterable[tuple[float | None, float | None]] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        for loss, norm in earlier:
            if loss is not None and norm is not None:
                self._note(loss, norm)

    def __call__(self, loss: float, norm: float) -> bool:
        """Whether one of two finite numbers lies more than ``DEVIATIONS`` standard deviations over its window."""
        spike = _stands_out(loss, self._losses) or _stands_out(norm, self._norms)
        self._note(loss, norm)
        return spike

    def _note(self, loss: float, norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(norm)


def _stands_out(value: float, window: deque[float]) -> bool:
    if len(window) < WINDOW // 2:
        return False
    mean = math.fsum(window) / len(window)
    variance = math.fsum((x - mean) ** 2 for x in window) / (len(window) - 1)
    return value > mean + DEVIATIONS * math.sqrt(variance)
