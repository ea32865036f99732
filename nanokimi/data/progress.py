"""What the user sees while a text is read: a bar on a terminal, one plain line anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def reading(label: str, n_bytes: int | None, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how far ``n_bytes`` (None: nobody knows how many) are read, ``done`` of them earlier.

    Yields:
        the function to call with every number of bytes read.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        size = "" if n_bytes is None else f" ({n_bytes / 1e6:.1f} MB)"
        print(
            f"{label}{size}" + (f", going on behind {done / 1e6:.1f} MB" if done else ""), file=sys.stderr, flush=True
        )
        yield _plain_lines(label, n_bytes, done)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn(escape(label)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=n_bytes, completed=done)
        yield lambda count: progress.advance(task, count)


def _plain_lines(label: str, n_bytes: int | None, done: int) -> Callable[[int], None]:
    """Says now and then how far it is, where there is no terminal to draw on."""
    told = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            of = "" if n_bytes is None else f" of {n_bytes / 1e6:.1f}"
            print(f"{label}: {done / 1e6:.1f}{of} MB", file=sys.stderr, flush=True)

    return advance
