"""Text, JSON lines and Parquet files, plain or compressed, as pieces of documents, from any of them on."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from nanokimi.data import documents
from nanokimi.data.documents import START, Advance, Cursor, Piece, cut_position, cut_text, ignore, line_ends
from nanokimi.data.opening import BLOCK_BYTES, OpenFile, inner_suffix, opened_text, seekable
from nanokimi.data.tokenizer import END_OF_TEXT
from nanokimi.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")  # a .json has to be named: most hold something else
MAX_RECORD_BYTES = 1 << 28
ROWS_PER_BATCH = 256
MOST_RECORDS, MOST_RECORD_BYTES = 1000, 1 << 24  # of a file, by which the field of the text is chosen
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
        with _read_errors_explained(span.path):
            yield from readers.get(inner_suffix(span.path), self._text)(span, start, advance)

    def _text(self, span: Span, start: Cursor, advance: Advance) -> Iterator[Piece]:
        before = min(1, start.piece)  # a document begins a line; inside one the byte before tells whether a line begins
        with opened_text(span.path, start.at - before, span.end, advance) as file:
            starts_line = file.read(before) in (b"", b"\n")
            data = b"" if start.at else file.read(len(_BYTE_ORDER_MARK))
            if data == _BYTE_ORDER_MARK:
                start, data = start._replace(at=len(data)), b""
            yield from self._text_pieces(file, data, start, starts_line, str(span.path))

    def _text_pieces(
        self, file: OpenFile, data: bytes, cursor: Cursor, starts_line: bool, name: str
    ) -> Iterator[Piece]:
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
        column = self._json_column(span.path)  # whichever record is read first
        for at, record in self._records(span.path, start.at, span.end, advance):
            yield from pieces_of_row(record.get(column), start, Cursor(start.span, at), f"{span.path} at byte {at}")

    def _records(self, path: Path, at: int, end: int | None, advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a JSON lines file from byte ``at`` on, each with the byte where its line begins."""
        with opened_text(path, at, end, advance) as file:
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

    def column(self, path: Path) -> str:
        """The column (field) of a file that holds the text; empty for files without columns, or without records."""
        with _read_errors_explained(path):
            if inner_suffix(path) in JSON_LINES:
                return self._json_column(path)
            if inner_suffix(path) == ".parquet":
                with _opened_parquet(path) as file:
                    return self._parquet_column(file, path)
        return ""

    def _json_column(self, path: Path) -> str:
        types = _types_of_records(self._records(path, 0, None, ignore), self.text_column or "text")
        return pick_text_column(types, self.text_column, str(path)) if types else ""

    def _parquet_column(self, file: Any, path: Path) -> str:
        return pick_text_column(column_types(file.schema_arrow), self.text_column, str(path))

    def _parquet(self, span: Span, start: Cursor, advance: Advance) -> Iterator[Piece]:
        with _opened_parquet(span.path) as file:
            column = self._parquet_column(file, span.path)
            size, n_rows = span.path.stat().st_size, file.metadata.num_rows
            for first, values in parquet_batches(file, column, start.at, ROWS_PER_BATCH):
                for row, value in enumerate(values, first):
                    where = f"{span.path} row {row}"
                    yield from pieces_of_row(self._value(value, where), start, Cursor(start.span, row), where)
                advance(size * (first + len(values)) // n_rows - size * first // n_rows)

    def _value(self, value: Any, where: str) -> Any:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            if self.errors == "replace":
                return value.as_buffer().to_pybytes().decode("utf-8", "replace")
            raise UserError(
                f"{where}: not UTF-8 at byte {error.start} of the text: go on with --encoding_errors replace"
            ) from error


@contextmanager
def _read_errors_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _in_one_line(error.strerror or error)
        raise UserError(f"{path}: cannot be read: {reason}: repair or replace it") from error


@contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``; what pyarrow finds wrong with it is a UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with seekable(path) as handle:
            yield pq.ParquetFile(handle)
    except (pa.ArrowException, ValueError) as error:  # ValueError: names that are not UTF-8
        raise UserError(f"{path}: not a Parquet file, or damaged ({_in_one_line(error)}): replace it") from error


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


def _types_of_records(records: Iterable[tuple[int, Mapping[str, Any]]], sought: str) -> dict[str, str]:
    """The type of every field, ``string`` where it is ever a text; nulls count for nothing.

    Looks on until the field ``sought`` is met, up to ``MOST_RECORDS`` and ``MOST_RECORD_BYTES``.
    """
    types: dict[str, str] = {}
    for number, (at, record) in enumerate(records, 1):
        for name, value in record.items():
            kind = "string" if isinstance(value, str) else "null" if value is None else type(value).__name__
            if kind == "string" or types.get(name, "null") == "null":
                types[name] = kind
        if sought in types or number >= MOST_RECORDS or at >= MOST_RECORD_BYTES:
            break
    return types


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
