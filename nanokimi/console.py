"""Lines for the user: results on stdout, everything else on stderr, nothing that could harm a terminal."""

from __future__ import annotations

import io
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 5.0  # seconds
SECONDS_BETWEEN_LINES = 30.0

_speaks = True


def mute() -> None:
    """From now on ``say`` is silent: one process of a run tells what all of them do."""
    global _speaks
    _speaks = False


def log(text: str) -> None:
    """Tells the user something that is not the command's result."""
    if _speaks:
        print(text, file=sys.stderr, flush=True)


def complain(line: str) -> None:
    """Tells of a mistake; where ``torchrun`` started several processes, which all find it, the first of them does."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        let_others_speak()
    print(line, file=sys.stderr, flush=True)


def let_others_speak() -> None:
    """Does not end before the process that tells the user what is wrong: ``torchrun`` ends all with the first."""
    time.sleep(PATIENCE)


def show(text: str) -> None:
    """Prints a result, to a terminal that may lack a character or to a reader who may leave (``| head``)."""
    tolerate_odd_characters()
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        discard_stdout()


def tolerate_odd_characters() -> None:
    """Input that is not UTF-8, or a terminal that lacks a character, shows a replacement and ends nothing."""
    for text_file in (sys.stdin, sys.stdout):
        if isinstance(text_file, io.TextIOWrapper):
            text_file.reconfigure(errors="replace")


def discard_stdout() -> None:
    """The reader has left: what is still buffered must not fail again when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """``text`` without control characters, except line break and tab.

    A model can write anything, also a sequence that retitles the window or rewrites the screen. Without its
    ESC (or the C1 form of it) such a sequence is inert and stays visible. Each character is judged alone, so
    a text cut into pieces gives the same as the whole.
    """
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@contextmanager
def progress_bar(label: str, n_bytes: int | None, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how far ``n_bytes`` (None: nobody knows how many) are read: a bar, or lines without a terminal.

    Args:
        done: bytes that were read earlier.

    Yields:
        the function to call with every number of bytes read.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        size = "" if n_bytes is None else f" ({n_bytes / 1e6:.1f} MB)"
        earlier = f", going on after {done / 1e6:.1f} MB" if done else ""
        print(f"{label}{size}{earlier}", file=sys.stderr, flush=True)
        yield _progress_lines(label, n_bytes, done)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(escape(label)), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=n_bytes, completed=done)
        yield lambda count: progress.advance(task, count)


def _progress_lines(label: str, n_bytes: int | None, done: int) -> Callable[[int], None]:
    last = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            of = "" if n_bytes is None else f" of {n_bytes / 1e6:.1f}"
            print(f"{label}: {done / 1e6:.1f}{of} MB", file=sys.stderr, flush=True)

    return advance
