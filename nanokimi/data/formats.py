"""Text, JSON lines and Parquet files, plain or compressed, as pieces of documents, from any of them on."""

from __future__ import annotations

import io
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from nanokimi.data import documents
from nanokimi.data.documents import START, Advance, Cursor, Piece, cut_position, cut_text, ignore, line_ends
from nanokimi.data.tokenizer import END_OF_TEXT
from nanokimi.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")  # a .json has to be named: most hold something else
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 28
ROWS_PER_BATCH = 256
SEPARATOR_BYTES = len(END_OF_TEXT) + 2  # a line of its own, with CRLF
_SEPARATOR = re.compile(rb"^" + re.escape(END_OF_TEXT.encode()) + rb"\r?(?:\n|\Z)", re.MULTILINE)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """A file, or the bytes ``start`` to ``end`` of an uncompressed one (None: to its end)."""

    path: Path
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Format:
    """How files are read."""

    text_column: str = ""  # of JSON lines and Parquet; "" finds it
    errors: str = "strict"  # or "replace": for bytes that are not UTF-8

    def read(self, span: Span, start: Cursor = START, advance: Advance = ignore) -> Iterator[Piece]:
        """The pieces of ``span`` from ``start`` on; ``advance`` counts bytes on disk.

        Raises:
            UserError: the file is not what its name says, or damaged.
        """
        start = start if start.at else start._replace(at=span.start)
        readers = {".parquet": self._parquet, **dict.fromkeys(JSON_LINES, self._json_lines)}
        try:
            yield from readers.get(inner_suffix(span.path), self._text)(span, start, advance)
        except OSError as error:
            reason = _in_one_line(error.strerror or error)
            raise UserError(f"{span.path}: cannot be read: {reason}: repair or replace it") from error

    def _text(self, span: Span, start: Cursor, advance: Advance) -> Iterator[Piece]:
        before = min(1, start.piece)  # a document begins a line; inside one the byte before tells whether a line begins
        with _opened(span.path, start.at - before, span.end, advance) as file:
            starts_line = file.read(before) in (b"", b"\n")
            data = b"" if start.at else file.read(len(_BYTE_ORDER_MARK))
            if data == _BYTE_ORDER_MARK:
                start, data = start._replace(at=len(data)), b""
            yield from self._text_pieces(file, data, start, starts_line, str(span.path))

    def _text_pieces(self, file: _File, data: bytes, cursor: Cursor, starts_line: bool, name: str) -> Iterator[Piece]:
        """Cuts ``data``, which begins at ``cursor``, and what follows in ``file``."""
        window, at, ended = documents.PIECE_BYTES + SEPARATOR_BYTES, 0, False  # a longest piece and its separator
        while True:
            if not ended and len(data) - at <= window:  # a byte more tells whether anything comes after the window
                more = file.read(max(BLOCK_BYTES, window + 1))
                data, at, ended = data[at:] + more, 0, len(more) < max(BLOCK_BYTES, window + 1)
            longest = at + documents.PIECE_BYTES
            final = ended and len(data) <= longest
            if final and at == len(data) and not cursor.piece:
                return
            separators = (s.span() for s in _SEPARATOR.finditer(data, at, at + window) if s.start() > at or starts_line)
            found = next((s for s in separators if final or s[0] <= longest), None)  # the window holds all of it
            stop = after = len(data) if final else at + cut_position(data[at:longest])
            stop, after = found or (stop, after)
            ends_document = final or found is not None
            yield Piece(self._decoded(data[at:stop], cursor.at, name), ends_document, cursor)
            starts_line = after > stop or data[at:after].endswith(b"\n")
            cursor = Cursor(cursor.span, cursor.at + after - at, 0 if ends_document else cursor.piece + 1)
            at = after

    def _decoded(self, data: bytes, at: int, name: str) -> str:
        try:
            return line_ends(data.decode("utf-8", self.errors))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: not UTF-8 at byte {at + error.start}: convert it (iconv -t utf-8), "
                "or go on with --encoding_errors replace"
            ) from error

    def _json_lines(self, span: Span, start: Cursor, advance: Advance) -> Iterator[Piece]:
        first = self._records(span.path, 0, None, ignore) if start.at else ()
        column = next((self._column(record, span.path) for _, record in first), "")  # whichever record is read first
        for at, record in self._records(span.path, start.at, span.end, advance):
            column = column or self._column(record, span.path)
            yield from pieces_of_row(record.get(column), start, Cursor(start.span, at), f"{span.path} at byte {at}")

    def _records(self, path: Path, at: int, end: int | None, advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a JSON lines file from byte ``at`` on, each with the byte where its line begins."""
        with _opened(path, at, end, advance) as file:
            while line := file.readline(MAX_RECORD_BYTES + 1):
                where = f"{path}: the line at byte {at}"
                if len(line) > MAX_RECORD_BYTES:
                    raise UserError(f"{where} is longer than {MAX_RECORD_BYTES >> 20} MiB: is this JSON lines?")
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    try:
                        record = json.loads(self._decoded(line, at, str(path)).removeprefix("\ufeff"))
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{where} is not JSON ({error}): one object a line is needed") from error
                    if not isinstance(record, dict):
                        raise UserError(f"{where} is no JSON object: one object a line is needed")
                    yield at, record
                at += len(line)

    def _column(self, record: Mapping[str, Any], path: Path) -> str:
        types = {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in record.items()}
        return pick_text_column(types, self.text_column, str(path))

    def _parquet(self, span: Span, start: Cursor, advance: Advance) -> Iterator[Piece]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with _seekable(span.path) as handle:
                file = pq.ParquetFile(handle)
                column = pick_text_column(column_types(file.schema_arrow), self.text_column, str(span.path))
                size, n_rows = span.path.stat().st_size, file.metadata.num_rows
                for first, values in parquet_batches(file, column, start.at, ROWS_PER_BATCH):
                    for row, value in enumerate(values, first):
                        where = f"{span.path} row {row}"
                        yield from pieces_of_row(self._value(value, where), start, Cursor(start.span, row), where)
                    advance(size * (first + len(values)) // n_rows - size * first // n_rows)
        except (pa.ArrowException, ValueError) as error:  # ValueError: names that are not UTF-8
            reason = _in_one_line(error)
            raise UserError(f"{span.path}: not a Parquet file, or damaged ({reason}): replace it") from error

    def _value(self, value: Any, where: str) -> Any:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            if self.errors == "replace":
                return value.as_buffer().to_pybytes().decode("utf-8", "replace")
            raise UserError(
                f"{where}: not UTF-8 at byte {error.start} of the text: go on with --encoding_errors replace"
            ) from error


def _in_one_line(reason: object) -> str:
    return " ".join(str(reason).split()) or type(reason).__name__


def pieces_of_row(text: Any, start: Cursor, cursor: Cursor, where: str) -> Iterator[Piece]:
    """The pieces of one row's text from ``start`` on; a row without text is an empty document.

    Raises:
        UserError: the value is no text.
    """
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{where}: the text is of type {type(text).__name__}, not a string: choose another --text_column"
        )
    pieces = list(cut_text(text or ""))
    for number, piece in enumerate(pieces):
        if cursor.at > start.at or number >= start.piece:
            yield Piece(piece, number + 1 == len(pieces), cursor._replace(piece=number))


def parquet_batches(file: Any, column: str, start: int, n_rows: int) -> Iterator[tuple[int, Any]]:
    """A column of a ``pyarrow.parquet.ParquetFile`` from row ``start`` on: arrays, each with its first row's number.

    Row groups before ``start`` are not read: the footer says how many rows they have.
    """
    ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
    group = bisect_right(ends, start)
    row = ends[group - 1] if group else 0
    for batch in file.iter_batches(n_rows, row_groups=range(group, len(ends)), columns=[column]):
        if row + len(batch) > start:
            first = max(row, start)
            yield first, batch.column(0)[first - row :]
        row += len(batch)


def column_types(schema: Any) -> dict[str, str]:
    """The type of every column of a ``pyarrow.Schema`` by its name."""
    return {field.name: str(field.type).removeprefix("large_") for field in schema}


def pick_text_column(types: Mapping[str, str], wanted: str, where: str) -> str:
    """The column that holds the text: ``wanted``, else ``text``, else the only one of strings.

    Args:
        types: type of every column, ``string`` where it holds text.

    Raises:
        UserError: there is no such column, or no single sensible choice; the message lists what there is.
    """
    there = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "none"
    if wanted:
        if wanted not in types:
            raise UserError(f"{where}: no column {wanted!r}: choose another --text_column of: {there}")
        return wanted
    if "text" in types:
        return "text"
    strings = [name for name, kind in types.items() if kind == "string"]
    if len(strings) != 1:
        raise UserError(f"{where}: which column holds the text? Name it with --text_column; there are: {there}")
    return strings[0]


def inner_suffix(path: Path) -> str:
    """The suffix that tells the format: ``.jsonl`` of ``a.jsonl.gz``."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSION else path
    return name.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether all of the file has to be read to come to its end."""
    return path.suffix.lower() in COMPRESSION


class _File:
    """What a file holds, up to a byte; tells how far the file on disk is read."""

    def __init__(self, raw: IO[bytes], stream: IO[bytes], left: int, advance: Advance) -> None:
        self._raw, self._stream, self._left, self._advance = raw, stream, left, advance
        self._told = raw.tell()

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        return self._taken(self._stream.read(min(count, self._left)))

    def readline(self, limit: int) -> bytes:
        """The next line with its end, or ``limit`` bytes of it; empty at the end."""
        return self._taken(self._stream.readline(min(limit, self._left)))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        now = self._raw.tell()
        self._advance(now - self._told)
        self._told = now
        return data


@contextmanager
def _opened(path: Path, start: int, end: int | None, advance: Advance) -> Iterator[_File]:
    """The contents of ``path`` from byte ``start`` to ``end``, both counted uncompressed."""
    with path.open("rb") as raw:
        stream: Any = raw
        codec = COMPRESSION.get(path.suffix.lower())
        if codec is None:
            raw.seek(start)
        else:
            import pyarrow as pa

            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec), BLOCK_BYTES)
            for position in range(0, start, BLOCK_BYTES):
                stream.read(min(BLOCK_BYTES, start - position))
        yield _File(raw, stream, sys.maxsize if end is None else max(0, end - start), advance)


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """The file itself, or a temporary one with what a compressed file holds."""
    if not is_compressed(path):
        with path.open("rb") as file:
            yield file
        return
    with TemporaryFile() as file, _opened(path, 0, None, ignore) as source:
        while block := source.read(BLOCK_BYTES):
            file.write(block)
        file.seek(0)
        yield file
