"""Lines for the user: results on stdout, everything else on stderr, nothing that could harm a terminal or a run."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WAIT_SECONDS = 5.0
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.1

_is_muted = False


# ---- the standard streams -----------------------------------------------------------------------


class _Stream(io.FileIO):
    """The file under stdout or stderr: printing never fails, whatever becomes of the terminal, the pipe or the disk.

    After a first failure what is printed goes nowhere.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a slow reader, at a stream that is set not to wait
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = error
            _lead_nowhere(self.fileno())
            return memoryview(data).nbytes


def _lead_nowhere(descriptor: int) -> None:
    """Makes ``descriptor``, open or not, one of the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.set_inheritable(descriptor, True)  # the programs that this one starts have the same streams
    if null != descriptor:
        os.close(null)


def protect_streams() -> None:
    """Makes printing safe in this process, also where stdin, stdout or stderr was closed by who started it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # then the next file that is opened, perhaps a checkpoint, would become the stream
            _lead_nowhere(number)
            opened = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, opened)
            setattr(sys, f"__{name}__", opened)
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # and not what a test or a notebook put there
            setattr(sys, name, _protected(stream, errors))


def _protected(stream: io.TextIOWrapper, errors: str) -> io.TextIOWrapper:
    stream.flush()
    raw = _Stream(stream.fileno(), "w", closefd=False)
    straight, by_line = stream.write_through, stream.line_buffering
    buffer: Any = raw if straight else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=by_line, write_through=straight)


def _failure_of_stdout() -> OSError | None:
    buffer = getattr(sys.stdout, "buffer", None)
    failure: OSError | None = getattr(getattr(buffer, "raw", buffer), "failure", None)
    return failure


def has_reader() -> bool:
    """Whether results can still be printed; not after ``| head`` has seen enough, or on a terminal that is gone."""
    return _failure_of_stdout() is None


def why_result_is_lost() -> str:
    """What kept a result from being written; empty if nothing did, or nobody was there to read it."""
    sys.stdout.flush()
    failure = _failure_of_stdout()
    return "" if failure is None or failure.errno in (errno.EPIPE, errno.EIO) else one_line(failure)


# ---- lines --------------------------------------------------------------------------------------


def mute() -> None:
    """Makes ``log`` silent in this process: the main process of a run speaks for all."""
    global _is_muted
    _is_muted = True


def log(text: str) -> None:
    """Prints a line for the user that is not the command's result."""
    if not _is_muted:
        print(text, file=sys.stderr, flush=True)


def complain(line: str) -> None:
    """Prints a mistake. Of several processes that ``torchrun`` started, all find it, and the first should print it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        let_others_speak()
    print(escaped(line), file=sys.stderr, flush=True)


def escaped(line: str) -> str:
    """``line`` with what would end it, or act on a terminal, as Python writes it: names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def let_others_speak() -> None:
    """Waits while another process tells the user what is wrong: ``torchrun`` ends all processes with the first."""
    time.sleep(WAIT_SECONDS)


def show(text: str, *, end: str = "\n") -> None:
    """Prints a result; the terminal may lack some of its characters."""
    tolerate_odd_characters()
    print(printable(text), end=end, flush=True)


def tolerate_odd_characters() -> None:
    """Makes input that is not UTF-8, and characters that the terminal lacks, replacements instead of errors."""
    for text_file in (sys.stdin, sys.stdout):
        if isinstance(text_file, io.TextIOWrapper):
            text_file.reconfigure(errors="replace")


def one_line(error: BaseException) -> str:
    """What ``error`` says, or else its name."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """``text`` without control characters, except line break and tab.

    A model can write anything, also a sequence that retitles the window or rewrites the screen. Without its
    ESC (or the C1 form of it) such a sequence does nothing and stays visible. Each character is judged alone, so
    a text that comes in chunks gives the same as the whole.
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


def attended(work: Callable[[], object], label: str) -> None:
    """Does ``work``, a long call into a library that cannot be interrupted and says nothing.

    It runs in a thread of its own, so that Ctrl-C ends the command at once; a line now and then tells that it goes on.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    began = told = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_LOOKS)
        if (now := time.monotonic()) - told >= SECONDS_BETWEEN_LINES and thread.is_alive():
            log(f"{label}: {now - began:.0f} s")
            told = now
    if failures:
        raise failures[0]


def aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """The lines of a table: columns as wide as their widest cell, to the left or right as ``sides`` (``<``, ``>``)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        yield "  ".join(cells).rstrip()


def counted(n: int, what: str) -> str:
    """``1 step``, ``1,200 steps``."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
