"""Signals set a flag; the training loop acts on it at a step boundary, on all ranks at the same."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from nanokimi.parallel.ranks import ALONE, Ranks


class StopSignals:
    """While active: SIGINT and SIGTERM ask the run to save and stop, SIGUSR1 asks it to save and go on.

    A second SIGINT raises KeyboardInterrupt at once; what was saved before stays intact.

    Attributes:
        stop: number of the signal that asked to stop, or None.
        save: whether SIGUSR1 came since this was last cleared.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.stop: int | None = None
        self.save = False
        self._ranks = ranks
        self._came = {"stop": 0, "save": 0}  # to this process, since the last look
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

    def look(self) -> None:
        """Takes over what has come to any rank; between two looks nothing changes."""
        came, self._came = self._came, {"stop": 0, "save": 0}
        stop, save = self._ranks.largest([came["stop"], came["save"]])
        self.stop = self.stop or int(stop) or None
        self.save = self.save or bool(save)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._came["save"] = 1
            return
        self._came["stop"] = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
