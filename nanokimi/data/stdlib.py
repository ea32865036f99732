"""A training text that every machine has: the sources of Python's standard library and its language reference."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nanokimi.data.tokenizer import END_OF_TEXT
from nanokimi.errors import RunError, UserError
from nanokimi.files import atomic_write

# Tests, other people's packages, and the file that holds the language reference, which is taken topic by topic.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def prepare_stdlib(output: str | Path = "data/train.txt", *, library: str | Path | None = None) -> str:
    """Writes the library to ``output``, one document per source file or topic; returns a line that says what.

    Args:
        output: text file to make; replaced once the new one is complete.
        library: folder of the library; None takes that of the Python which runs this.

    Raises:
        UserError: there are no sources in the folder, or ``output`` is a folder.
        RunError: ``output`` cannot be written.
    """
    output = Path(output)
    folder = Path(library or sysconfig.get_path("stdlib"))
    if output.is_dir():
        raise UserError(f"--output {output} is a directory: name the text file to write")
    sources = [_read(path) for path in _sources(folder)]
    if not sources:
        raise UserError(f"{folder} holds no Python sources: train on a text of your own with --data_path")
    files = [text for text in sources if text]
    topics = _topics()
    text = f"{END_OF_TEXT}\n".join(files + topics).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"--output {output} cannot be written: {error.strerror}") from error
    return (
        f"{output}: {len(files)} source files and {len(topics)} topics of the language reference, "
        f"{len(text) / 1e6:.1f} MB; left out {sources.count(None)} that are not UTF-8 or hold a line {END_OF_TEXT}"
    )


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        if path.is_file() and _LEFT_OUT.isdisjoint(path.relative_to(folder).parts[:-1]):
            yield path


def _read(path: Path) -> str | None:
    """The file as one document, ``""`` when it is blank, None when it cannot be one."""
    try:
        return _document(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        return None


def _document(text: str) -> str | None:
    if END_OF_TEXT in text.splitlines():
        return None
    return text.rstrip("\n") + "\n" if text.strip() else ""


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions put it in a package of its own
        return []
    return [document for _, text in sorted(topics.items()) if (document := _document(text))]
