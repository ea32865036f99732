"""A pseudo-terminal, so that tests see what a person at a keyboard does."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path


class Terminal:
    """A Python program on a pseudo-terminal of its own, as a person would use it."""

    def __init__(self, code: str, **environment: str) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
            path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            os.execve(sys.executable, [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path, **environment})

    def wait_for(self, text: str, *, pressing: str = "") -> None:
        """Reads up to and including ``text``; presses ``pressing`` again each time nothing comes for a while.

        Again, because a Ctrl-C between the display of the prompt and the wait for a key is seen only with the
        next key: CPython's readline module has this gap.
        """
        deadline = time.monotonic() + 60
        self.press(pressing)
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            else:
                self.press(pressing)
        self.seen = self.seen.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
