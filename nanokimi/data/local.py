"""Local files as documents: which files a path means, and parts of them that can be read apart."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from nanokimi.data.documents import START, Advance, Cursor, Piece, ignore
from nanokimi.data.formats import FOLDER_SUFFIXES, JSON_LINES, Format, Span, inner_suffix, is_compressed
from nanokimi.data.tokenizer import END_OF_TEXT
from nanokimi.errors import UserError

CACHE_SUFFIX = ".nanokimi"  # of the folder beside a text where its tokens are kept
PART_BYTES = 64 << 20
SEARCHED_BYTES = 1 << 20
_SEPARATOR = re.compile(rb"\n" + re.escape(END_OF_TEXT.encode()) + rb"\r?\n")
CHANGED = "the text was changed while it was read: start again"


class LocalDocuments:
    """Documents of one or many files, in the order of their names.

    Args:
        path: a file, a folder (all ``.txt``, ``.jsonl``, ``.parquet`` below it, also ``.gz`` and ``.zst``), a
            pattern such as ``books/*.txt``, or several of these with commas between them.
        flag: how the user named it, for messages.
        split_up: in parts of about ``PART_BYTES``: plain files by bytes, compressed and columnar ones whole.
            A part never cuts a line; it ends with a document wherever one ends near enough. Otherwise there is
            one part.

    Raises:
        UserError: there is no such file, or nothing in it.
    """

    def __init__(
        self, path: str | Path, flag: str = "--data_path", form: Format | None = None, *, split_up: bool = False
    ) -> None:
        self.name, self.form, self.split_up = str(path), form or Format(), split_up
        self.files = find_files(str(path), flag)
        self._stamps = {path: _stamp(path) for path in self.files}

    @property
    def n_bytes(self) -> int:
        return sum(size for size, _ in self._stamps.values())

    @property
    def n_parts(self) -> int:
        return len(self._parts)

    @property
    def stamps(self) -> list[Any]:
        """Name, size and time of change of every file."""
        return [[path.name, *stamp] for path, stamp in self._stamps.items()]

    @property
    def identity(self) -> list[Any]:
        """The stamps and how the files are read: while these are as they were, so is the text."""
        return [self.stamps, self.form.text_column, self.form.errors, self.split_up and PART_BYTES]

    def read(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[Piece]:
        for number, span in enumerate(self._parts[part][start.span :], start.span):
            begin = start if number == start.span else Cursor(number)
            self._require_unchanged(span.path)
            try:
                yield from self.form.read(span, begin, advance)
            except UserError:
                self._require_unchanged(span.path)  # or what is wrong with it is that it changes
                raise
            self._require_unchanged(span.path)

    def _require_unchanged(self, path: Path) -> None:
        if _stamp(path) != self._stamps[path]:
            raise UserError(f"{path}: {CHANGED}")

    @cached_property
    def _parts(self) -> list[list[Span]]:
        if not self.split_up:
            return [[Span(path) for path in self.files]]
        parts: list[list[Span]] = []
        room = 0
        for path, (size, _) in self._stamps.items():
            for span in _slices(path, size):
                length = (size if span.end is None else span.end) - span.start
                if length > room:
                    parts.append([])
                    room = PART_BYTES
                parts[-1].append(span)
                room -= length
        return parts


def find_files(path: str, flag: str) -> list[Path]:
    """The files that ``path`` means, each once, in the order of their names within each of its items."""
    return list(dict.fromkeys(file for item in split_path(path) for file in _files_of(item, flag)))


def split_path(path: str) -> list[str]:
    """The items of a path that may be several with commas between them."""
    return [path] if os.path.lexists(path) else [item.strip() for item in path.split(",")]


def _files_of(item: str, flag: str) -> list[Path]:
    if os.path.isdir(item):  # unlike Path's, these raise nothing where access is denied
        found = sorted(path for path in Path(item).rglob("*") if _is_text_in(path, Path(item)))
        if not found:
            kinds = ", ".join(FOLDER_SUFFIXES)
            raise UserError(f"{flag} {item} is a directory without text: it needs {kinds} files, or name one file")
    elif glob.has_magic(item) and not os.path.lexists(item):
        found = sorted(Path(name) for name in glob.glob(item, recursive=True) if os.path.isfile(name))
    else:
        found = [Path(item)] if os.path.exists(item) else []
    if not found:
        raise UserError(f"{flag} {item}: no such file: check the path, or make one with `nanokimi prepare stdlib`")
    if not os.path.isfile(found[0]):
        raise UserError(f"{flag} {item}: not a regular file: it is read more than once, so save the text to disk first")
    with_text = [file for file in found if file.stat().st_size]
    if not with_text:
        raise UserError(f"{flag} {item}: the file is empty: name a text file with something in it")
    return with_text


def _is_text_in(path: Path, folder: Path) -> bool:
    """Whether a file below ``folder`` is text by its name; what lies in a token cache (``.nanokimi``) is not."""
    in_cache = any(parent.suffix == CACHE_SUFFIX for parent in path.relative_to(folder).parents)
    return inner_suffix(path) in FOLDER_SUFFIXES and os.path.isfile(path) and not in_cache


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {CHANGED}") from error
    return stat.st_size, stat.st_mtime_ns


def _slices(path: Path, size: int) -> Iterator[Span]:
    """A file in slices of about ``PART_BYTES`` that begin at lines, at documents where possible."""
    start = 0
    if not is_compressed(path) and inner_suffix(path) != ".parquet":
        for nominal in range(PART_BYTES, size, PART_BYTES):
            if nominal <= start:
                continue
            try:
                with path.open("rb") as file:
                    file.seek(nominal - 1)
                    data = file.read(SEARCHED_BYTES)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}: repair or replace it") from error
            end = _boundary(data, documents=inner_suffix(path) not in JSON_LINES)
            if end and nominal - 1 + end < size:
                yield Span(path, start, nominal - 1 + end)
                start = nominal - 1 + end
    yield Span(path, start, None)


def _boundary(data: bytes, *, documents: bool) -> int:
    """The first place in ``data`` after a document's end, else after a line end; 0 if there is neither."""
    if documents and (separator := _SEPARATOR.search(data)):
        return separator.end()
    if documents and len(data) < SEARCHED_BYTES:
        return 0  # the document ends with the file
    return data.find(b"\n") + 1
