"""One command in this process: what it answers, and that this is plain."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import settings

from nanokimi.cli import main

FACTOR = float(os.environ.get("NANOKIMI_PROPERTIES_FACTOR", "0.5"))
SECONDS = 60  # within which any of these small commands has to end
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def tries(n: int) -> Any:
    """So many examples in the test suite; more in the long form."""
    return settings(max_examples=round(n * FACTOR))


class Answer(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: Any
    out: str
    err: str

    def require_plain(self) -> None:
        """One line and exit code 2 for a mistake, one line and 1 for a failure; never a traceback or a warning."""
        assert self.code in (0, 1, 2), self
        assert "Traceback" not in self.err, self
        assert "Warning" not in self.err, self
        complaints = [line for line in self.err.splitlines() if line.startswith("nanokimi")]
        assert len(complaints) == bool(self.code), self
        if self.code:
            assert self.err.endswith(f"{complaints[0]}\n"), self
            assert complaints[0].isprintable(), self


def answer(arguments: Sequence[str], folder: Path, stdin: str = "") -> Answer:
    """Runs ``nanokimi`` with ``arguments`` in ``folder``, outside of which it may write nothing but its cache."""
    out, err = _stream("strict"), _stream("backslashreplace")
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            _watched(folder),
            _in_time(),
            _a_laptops_memory(),
            redirect_stdout(out),
            redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            sys.stdin, kept = io.StringIO(stdin), sys.stdin
            try:
                code: Any = main(list(arguments))
            except SystemExit as ended:
                code = ended.code
            finally:
                sys.stdin = kept
    finally:
        os.chdir(before)
    return Answer(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def _stream(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)


@contextmanager
def _a_laptops_memory() -> Iterator[None]:
    """A shape that is too large has to be refused by the allocator, not by the kernel's killer."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _in_time() -> Iterator[None]:
    def too_late(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- where a command writes ---------------------------------------------------------------------------------

_allowed: tuple[str, ...] = ()
_elsewhere: list[str] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which can never be removed: notes what is opened for writing outside of the allowed folders."""
    if not _allowed or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    if event == "open" and not args[2] & WRITING:
        return
    path = args[1] if event == "os.rename" else args[0]
    if isinstance(path, int):
        return
    name = os.path.realpath(os.fsdecode(path))
    if not name.startswith((*_allowed, "/dev/", "/proc/")):
        _elsewhere.append(f"{event} {name}")


sys.addaudithook(_note)


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    global _allowed
    _elsewhere.clear()
    _allowed = tuple(os.path.realpath(path) for path in (folder, os.environ["HOME"], os.environ["TMPDIR"]))
    try:
        yield
    finally:
        _allowed = ()
    assert not _elsewhere, _elsewhere


# ---- what commands are given --------------------------------------------------------------------------------


@dataclass
class Bench:
    """A folder with files to give to commands, and one in which each example works."""

    root: Path

    @property
    def files(self) -> Path:
        return self.root / "files"

    def make(self) -> None:
        """A text; a model that was trained on it for a step, in three formats; a tokenizer, token files."""
        self.files.mkdir()
        (self.files / "t.txt").write_text("".join(f"line {i} of some text, ünï ☃\n" for i in range(200)))
        (self.files / "folder").mkdir()
        (self.files / "q.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
        for command in (
            [*TRAIN, "--output_dir", "run"],
            ["tokenizer", "train", "t.txt", "--vocab_size", "280", "--output", "tokenizer.json"],
            ["export", "hf", "run/checkpoints/final.pt", "hf", "--no_compare"],
            ["export", "gguf", "run/checkpoints/final.pt", "m.gguf", "--no_compare"],
            ["prepare", "tokens", "--preset", "debug", "--data_path", "t.txt", "--output", "tokens"],
        ):
            done = answer(command, self.files)
            assert done.code == 0, done
        shutil.copytree(self.files / "hf", self.files / "bare", ignore=shutil.ignore_patterns("receipt.json"))

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """A folder with copies of all files."""
        folder = self.root / "work"
        shutil.copytree(self.files, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


TRAIN = ["train", "--preset", "debug", "--data_path", "t.txt", "--eval_interval", "0", "--set", "max_seq_length=32"]
TRAIN += ["--batch_size", "1", "--gradient_accumulation", "1", "--compile", "off"]
