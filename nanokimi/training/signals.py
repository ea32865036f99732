"""Signals set a flag; the training loop acts on it at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While active: SIGINT and SIGTERM ask the run to save and stop, SIGUSR1 asks it to save and go on.

    A second SIGINT raises KeyboardInterrupt at once; what was saved before stays intact.

    Attributes:
        stop: number of the signal that asked to stop, or None.
        save: whether SIGUSR1 came since this was last cleared.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._earlier[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.stop = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
