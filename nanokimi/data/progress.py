"""What the user sees while a text is read: a bar on a terminal, one plain line anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reading(label: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how far a file of ``n_bytes`` is read; yields the function to call with every bytes read."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        print(f"{label} ({n_bytes / 1e6:.1f} MB)", file=sys.stderr, flush=True)
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
        task = progress.add_task(label, total=n_bytes)
        yield lambda count: progress.advance(task, count)
