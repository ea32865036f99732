"""What the user sees while a text is read: a bar on a terminal, one plain line anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
        yield lambda count: None
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
