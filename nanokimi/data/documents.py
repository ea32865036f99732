"""A UTF-8 text file of any size as documents, in pieces that fit into memory.

Line ends: CRLF becomes LF, everything else stays as it is. A byte order mark at the start is dropped.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanokimi.data.tokenizer import END_OF_TEXT
from nanokimi.errors import UserError

BLOCK_BYTES = 1 << 18
PIECE_CHARACTERS = 1 << 18
_SEPARATOR = re.compile(re.escape(END_OF_TEXT) + r"(?:\n|\Z)")


class Piece(NamedTuple):
    """Part of a document; a document is the text of its pieces up to and including one that ends it."""

    text: str
    ends_document: bool


def check_text_file(path: Path, flag: str) -> None:
    """Raises UserError, naming ``flag``, unless ``path`` is a regular file with something in it."""
    if os.path.isdir(path):  # unlike Path's, these raise nothing where access is denied
        raise UserError(f"{flag} {path} is a directory: name a text file in it")
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: no such file: check the path, or make one with `nanokimi prepare stdlib`")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: not a regular file: it is read more than once, so save the text to disk first")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path}: the file is empty: name a text file with something in it")


def read_pieces(path: Path, errors: str, advance: Callable[[int], None]) -> Iterator[Piece]:
    """The documents of ``path`` in order; lines that are exactly ``<|endoftext|>`` stand between them.

    Args:
        errors: ``strict``, or ``replace`` to turn bytes that are not UTF-8 into U+FFFD.
        advance: told how many bytes of the file were read, as they are.

    Raises:
        UserError: the file cannot be read, or holds bytes that are not UTF-8 (the message gives the offset).
    """
    document_open = False
    for text, starts_line in _whole_lines(_normalised(_decoded(path, errors, advance))):
        start = 0
        for separator in _SEPARATOR.finditer(text):
            at = separator.start()
            if text[at - 1] == "\n" if at else starts_line:
                yield Piece(text[start:at], ends_document=True)
                start = separator.end()
                document_open = False
        if start < len(text):
            yield Piece(text[start:], ends_document=False)
            document_open = True
    if document_open:
        yield Piece("", ends_document=True)


def _decoded(path: Path, errors: str, advance: Callable[[int], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                pending = len(decoder.getstate()[0])  # first bytes of a character that the last block cut in two
                yield decoder.decode(block)
                offset += len(block)
                advance(len(block))
        pending = len(decoder.getstate()[0])
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {offset - pending + error.start}: convert it (iconv -t utf-8), "
            "or go on with --encoding_errors replace"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _normalised(blocks: Iterable[str]) -> Iterator[str]:
    held, first = "", True
    for block in blocks:
        text = held + (block.removeprefix("\ufeff") if first else block)
        first = first and not block
        held = "\r" if text.endswith("\r") else ""  # its "\n" may open the next block
        yield text.removesuffix("\r").replace("\r\n", "\n")
    yield held


def _whole_lines(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The same text cut at line ends, and whether each piece starts a line; only a very long line is cut itself."""
    held, starts_line = "", True
    for block in blocks:
        held += block
        if len(held) >= PIECE_CHARACTERS:
            end = held.rfind("\n") + 1 or len(held)
            yield held[:end], starts_line
            starts_line = held[end - 1] == "\n"
            held = held[end:]
    if held:
        yield held, starts_line
