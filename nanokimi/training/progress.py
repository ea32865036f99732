"""What the user watches while it trains: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live


class ProgressDisplay:
    """Shows a training run on stderr; use it as a context manager, so that the terminal is always given back.

    Args:
        max_steps: the step at which the run ends.
        start_step: steps done before this process began (0, or where a resume starts).
        interval: steps between plain lines; 0 shows the first and the last only. The live bar ignores it.
        plain: lines instead of the bar; None asks whether stderr is a terminal.
        max_seconds: time the run may take, 0 for no limit. ETA and bar follow what ends first.
        spent_seconds: time it has taken in earlier processes.
        silent: shows nothing: for ranks that do not lead.
    """

    def __init__(
        self,
        max_steps: int,
        start_step: int,
        *,
        interval: int,
        plain: bool | None = None,
        max_seconds: float = 0,
        spent_seconds: float = 0,
        silent: bool = False,
    ) -> None:
        self.max_steps, self.start_step, self.interval, self.max_seconds = max_steps, start_step, interval, max_seconds
        self._step = start_step
        self._values: dict[str, object] = {}
        self._clipped = 0
        self._printed = start_step
        self._started = time.monotonic() - spent_seconds
        self._first_step_done: float | None = None
        self._silent = silent
        if plain is None:
            plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
        self._live = None if plain or silent else self._open_live()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, object]) -> None:
        """Takes in one finished step.

        Args:
            step: optimizer steps done, this one included.
            values: as for ``MetricsLog.record``, plus ``val_bits_per_byte`` when there is a new one, which stays
                on show until the next. Clipped heads are shown as the sum since this process began.
        """
        self._first_step_done = self._first_step_done or time.monotonic()
        self._step = step
        self._values.update(values)
        clipped = values.get("clipped_heads")
        self._clipped += clipped if isinstance(clipped, int) else 0
        due = step == self.start_step + 1 or (self.interval > 0 and step % self.interval == 0)
        if self._live is None and due and step not in (self._printed, self.max_steps):
            self._print_line()

    def log(self, text: str) -> None:
        """Prints ``text`` on stderr, above the bar where there is one."""
        if self._silent:
            return
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        """Shows the last step, with what came after it, and gives the terminal back; may be called twice."""
        if self._live is not None:
            self._live.stop()
        elif self._printed != self._step:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = self._step
        self.log(f"step {self._count()}  {self._facts()}  ETA {clock(self._seconds_left())}")

    def _count(self) -> str:
        """Steps done, and of how many where time is not what ends the run."""
        return f"{self._step:,}" if self.max_seconds else f"{self._step:,}/{self.max_steps:,}"

    def _facts(self) -> str:
        logits = self._values.get("max_logit")
        largest = max((x for x in logits if x is not None), default=None) if isinstance(logits, (list, tuple)) else None
        return "  ".join(
            (
                f"loss {_number(self._values.get('train_ce_loss'), '.3f')}",
                f"bits/byte {_number(self._values.get('val_bits_per_byte'), '.3f')}",
                f"{_number(self._values.get('tokens_per_second'), ',.0f')} tok/s",
                f"max logit {_number(largest, '.1f')}",
                f"heads clipped {self._clipped:,}",
            )
        )

    def _seconds_left(self) -> float | None:
        """Seconds until the last step or the end of the time budget; None while neither is known."""
        now, ends = time.monotonic(), []
        timed_steps = self._step - self.start_step - 1  # not the first one, which compiles and warms caches
        if self._first_step_done is not None and timed_steps > 0:
            ends.append((self.max_steps - self._step) * (now - self._first_step_done) / timed_steps)
        if self.max_seconds:
            ends.append(max(0.0, self.max_seconds - (now - self._started)))
        return 0.0 if self._step >= self.max_steps else min(ends, default=None)

    def _done(self) -> float:
        """Share of the run that is over, by steps or by time, whichever is further."""
        by_steps = self._step / self.max_steps
        elapsed = time.monotonic() - self._started
        return min(1.0, max(by_steps, elapsed / self.max_seconds) if self.max_seconds else by_steps)

    def _open_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        # Live would send a print() to the console, which is right on a terminal and would empty a redirected stdout.
        live = Live(console=console, get_renderable=self._render, redirect_stdout=sys.stdout.isatty())
        live.start()
        return live

    def _render(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = self._done()
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(f"step {self._count()}", style="bold"),
            ProgressBar(total=1.0, completed=done),
            Text(f"{done:4.0%}  ETA {clock(self._seconds_left())}"),
        )
        return Group(row, Text(self._facts(), no_wrap=True, overflow="ellipsis"))


def clock(seconds: float | None) -> str:
    """Seconds as ``h:mm:ss`` or ``m:ss``; ``-`` while unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"
