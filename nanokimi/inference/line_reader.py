"""Reads what the user types: lines with editing and history on a terminal, plain lines from a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

QUOTES = '"""'
HISTORY_LINES = 1000

ReadLine = Callable[[str], str]  # shows a prompt, gives a line without its end, raises EOFError after the last


class Line(NamedTuple):
    """One input; ``is_command`` if it begins with a slash and not with quotes."""

    text: str
    is_command: bool


def read_input(read_line: ReadLine) -> Line:
    '''A line, or the lines from one that begins with """ to one that ends in """. EOFError: there is no more.'''
    line = read_line("> ")
    if not line.startswith(QUOTES):
        return Line(line, line.startswith("/"))
    text = line.removeprefix(QUOTES)
    with contextlib.suppress(EOFError):
        while not text.endswith(QUOTES):
            text += "\n" + read_line("... ")
    return Line(text.removesuffix(QUOTES).removeprefix("\n").removesuffix("\n"), False)


@contextmanager
def line_reader(source: TextIO, commands: Sequence[str] = (), *, keep_history: bool = False) -> Iterator[ReadLine]:
    """A function that reads from ``source``; on a terminal with editing and completion of ``commands``.

    Args:
        keep_history: on a terminal, offer the lines of earlier talks, and keep this one's for later ones.
    """

    def plain_line(prompt: str) -> str:
        if not (line := source.readline()):
            raise EOFError
        return line.removesuffix("\n")

    if not (source is sys.stdin and source.isatty()):
        yield plain_line
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # without the readline module, input() has no editing and no history
            _complete(commands)
            if keep_history and (path := history_file()):
                stack.enter_context(_history(path))
        yield input


def _complete(commands: Sequence[str]) -> None:
    """The tabulator completes commands at the beginning of a line, and nothing else."""
    import readline

    def completed(text: str, index: int) -> str | None:
        found = [name + " " for name in commands if name.startswith(text)] if text.startswith("/") else []
        return found[index] if readline.get_begidx() == 0 and index < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completed)
    readline.parse_and_bind("tab: complete")


def history_file() -> Path | None:
    """Where the lines of earlier talks are kept; None if there is no home folder."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    with contextlib.suppress(RuntimeError):
        return (state if state.is_absolute() else Path.home() / ".local/state") / "nanokimi" / "chat_history"
    return None


@contextmanager
def _history(path: Path) -> Iterator[None]:
    """Reads the history, and writes it at the end; a file that cannot be read or written changes nothing else."""
    import readline

    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            path.chmod(0o600)  # before anything is written: an older file may be open to others
            readline.write_history_file(path)
