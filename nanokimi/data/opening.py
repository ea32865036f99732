"""Files as rows of bytes, plain or compressed, from any byte on; what is no text at all is refused by how it begins."""

from __future__ import annotations

import bz2
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from nanokimi.data.documents import Advance, ignore
from nanokimi.errors import UserError

BLOCK_BYTES = 1 << 18
MOST_ZSTD_WINDOW = 1 << 27  # of the library that decompresses it
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_LOOKED_AT_BYTES = 1 << 15  # more than the header of a token file, which is words

# By how a file begins: what it is and, after a colon, what to do.
_UNPACK = ": unpack it, and name the text that it holds"
_CONVERT = ": convert it (iconv -f {} -t utf-8)"
_BINARY = {
    b"\x1f\x8b": "gzip: give it the suffix .gz",
    _ZSTD_MAGIC: "zstd: give it the suffix .zst",
    b"\xfd7zXZ\x00": "xz: give it the suffix .xz",
    b"BZh": "bzip2: give it the suffix .bz2",
    b"\x04\x22\x4d\x18": f"lz4{_UNPACK}",
    b"PK\x03\x04": f"a zip archive, or a document in one (docx, xlsx, epub, ...){_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive{_UNPACK}",
    b"Rar!\x1a\x07": f"a rar archive{_UNPACK}",
    b"%PDF-": "a PDF: extract its text (pdftotext)",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an Office document: save it as text",
    b"PAR1": "Parquet: give it the suffix .parquet",
    b"ARROW1": "Arrow: write it as Parquet",
    b"NKTOKENS": "tokens: train on them with --dataset tokenbin",
    b"SQLite format 3\x00": "an SQLite database: write its text to JSON lines",
    b"\x89PNG": "a picture: name a text",
    b"\xff\xd8\xff": "a picture: name a text",
    b"GIF8": "a picture: name a text",
    b"\x7fELF": "a program: name a text",
    b"\x89HDF": "HDF5: write its text to JSON lines",
    b"\x93NUMPY": "a numpy array: name a text",
    b"GGUF": "the weights of a model: name a text",
    b"RIFF": "sound or pictures: name a text",
    b"\xff\xfe\x00\x00": "UTF-32" + _CONVERT.format("utf-32"),
    b"\x00\x00\xfe\xff": "UTF-32" + _CONVERT.format("utf-32"),
    b"\xff\xfe": "UTF-16" + _CONVERT.format("utf-16"),
    b"\xfe\xff": "UTF-16" + _CONVERT.format("utf-16"),
}
_TAR = (257, b"ustar")


def _arrow(codec: str) -> Callable[[IO[bytes]], IO[bytes]]:
    def opened(raw: IO[bytes]) -> IO[bytes]:
        import pyarrow as pa

        stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec)
        return io.BufferedReader(stream, BLOCK_BYTES)

    return opened


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    window = _zstd_window(raw.read(14))
    if window > MOST_ZSTD_WINDOW:
        raise UserError(
            f"{raw.name}: its zstd window of {window >> 20:,} MiB is over the {MOST_ZSTD_WINDOW >> 20} MiB that can be "
            f"read: compress it anew without --long (zstd -dc --long=31 FILE | zstd > NEW)"
        )
    raw.seek(0)
    return _arrow("zstd")(raw)


def _zstd_window(start: bytes) -> int:
    """The window in bytes that the first frame asks for; 0 where there is none (RFC 8878, section 3.1.1)."""
    if len(start) < 14 or not start.startswith(_ZSTD_MAGIC):
        return 0
    descriptor, exponent, mantissa = start[4], start[5] >> 3, start[5] & 7
    if descriptor & 0x20:  # one segment: the window is all of the contents, whose size follows the dictionary's id
        at, width = 5 + (0, 1, 2, 4)[descriptor & 3], (1, 2, 4, 8)[descriptor >> 6]
        return int.from_bytes(start[at : at + width], "little")
    return (1 << (10 + exponent)) // 8 * (8 + mantissa)


def _bzip2(raw: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(bz2.BZ2File(raw), BLOCK_BYTES)


def _xz(raw: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(lzma.LZMAFile(raw), BLOCK_BYTES)


_DECOMPRESSED = {".gz": _arrow("gzip"), ".zst": _zstd, ".bz2": _bzip2, ".xz": _xz}
COMPRESSED = tuple(_DECOMPRESSED)


def inner_suffix(path: Path) -> str:
    """The suffix that tells the format: ``.jsonl`` of ``a.jsonl.gz``."""
    name = path.with_suffix("") if is_compressed(path) else path
    return name.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether all of the file has to be read to come to its end."""
    return path.suffix.lower() in COMPRESSED


def require_text(start: bytes, name: str) -> None:
    """Raises UserError if a file that begins with ``start`` is surely no text, however odd bytes are dealt with."""
    kind = next((kind for magic, kind in _BINARY.items() if start.startswith(magic)), "")
    if start[_TAR[0] :].startswith(_TAR[1]):
        kind = f"a tar archive{_UNPACK}"
    if kind and not _is_plain(start):
        raise UserError(f"{name}: not text but {kind}")


def _is_plain(start: bytes) -> bool:
    """Whether it reads as text all the same: some kinds of binary files begin with words."""
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
    return b"\0" not in start


class OpenFile:
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
def opened_text(path: Path, start: int, end: int | None, advance: Advance) -> Iterator[OpenFile]:
    """``opened`` for a file of text; UserError if it is surely none."""
    if not start:
        with opened(path, 0, _LOOKED_AT_BYTES, ignore) as file:
            require_text(file.read(_LOOKED_AT_BYTES), str(path))
    with opened(path, start, end, advance) as file:
        yield file


@contextmanager
def opened(path: Path, start: int, end: int | None, advance: Advance) -> Iterator[OpenFile]:
    """The contents of ``path`` from byte ``start`` to ``end``, both counted uncompressed.

    Raises:
        OSError: also of compressed files that are damaged or cut off.
    """
    with path.open("rb") as raw:
        stream: IO[bytes] = raw
        decompressed = _DECOMPRESSED.get(path.suffix.lower())
        try:
            if decompressed is None:
                raw.seek(start)
            else:
                stream = decompressed(raw)
                for position in range(0, start, BLOCK_BYTES):
                    stream.read(min(BLOCK_BYTES, start - position))
            yield OpenFile(raw, stream, sys.maxsize if end is None else max(0, end - start), advance)
        except (EOFError, lzma.LZMAError) as error:
            raise OSError(str(error)) from error


@contextmanager
def seekable(path: Path) -> Iterator[IO[bytes]]:
    """The file itself, or a temporary one with what a compressed file holds."""
    if not is_compressed(path):
        with path.open("rb") as file:
            yield file
        return
    with TemporaryFile() as file, opened(path, 0, None, ignore) as source:
        while block := source.read(BLOCK_BYTES):
            file.write(block)
        file.seek(0)
        yield file
