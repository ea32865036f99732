"""Signals that ask a run to save, or to save and stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from nanokimi.parallel.ranks import current_ranks


class StopSignals:
    """While active: SIGINT, SIGTERM and SIGHUP ask the run to save and stop, SIGUSR1 asks it to save and go on.

    Signals set a flag, which the loop looks at between two steps. A second SIGINT raises KeyboardInterrupt at once;
    what was saved before stays intact. A SIGHUP that was ignored when the process began (``nohup``) stays ignored.

    Attributes:
        stop: number of the signal that asked to stop, or None.
        save: whether SIGUSR1 came since this was last cleared.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._ranks = current_ranks()
        self._came = {"stop": 0, "save": 0}  # to this process, since the last look
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        keeps_hup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *[signal.SIGHUP] * keeps_hup):
            self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def look(self) -> None:
        """Notes what has come to any rank; so all ranks stop at the same step."""
        came, self._came = self._came, {"stop": 0, "save": 0}
        stop, save = self._ranks.max([came["stop"], came["save"]])
        self.stop = self.stop or int(stop) or None
        self.save = self.save or bool(save)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._came["save"] = 1
            return
        self._came["stop"] = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
