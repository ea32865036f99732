"""Documents, what every source of text is made of: in pieces that fit into memory and can be found again.

A document of up to ``PIECE_BYTES`` is one piece. A longer one is cut after a line end; a line that is longer still,
between two characters. Where a document is cut depends on nothing but its own text, so that it becomes the same
tokens whichever file, format or position it is read from. CRLF line ends become LF, everything else stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

PIECE_BYTES = 1 << 18
Advance = Callable[[int], None]


class Cursor(NamedTuple):
    """Where in a part a piece begins; cursors of a part are ordered as its pieces are.

    Attributes:
        span: which file of the part, counted from 0.
        at: the byte in a text or JSON lines file (uncompressed), the row elsewhere.
        piece: number of the piece within its document; above 0 the document began earlier.
    """

    span: int = 0
    at: int = 0
    piece: int = 0


START = Cursor()


class Piece(NamedTuple):
    """Part of a document; a document is the text of its pieces up to and including one that ends it."""

    text: str
    ends_document: bool
    cursor: Cursor = START


def ignore(count: int) -> None:
    """The ``advance`` of a caller who does not want to know."""


class Documents(Protocol):
    """Documents in parts that can be read apart from one another, each from any of its pieces on.

    Attributes:
        name: what the user knows them by.
        n_bytes: size of the whole in the unit that ``advance`` counts, None where it is not known.
        n_parts: how many parts there are; they and their order depend on the data alone.
    """

    name: str

    @property
    def n_bytes(self) -> int | None: ...

    @property
    def n_parts(self) -> int: ...

    @property
    def identity(self) -> list[Any]:
        """Plain values on which the documents depend: while these are the same, so is every piece."""

    def read(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[Piece]:
        """The pieces of one part from ``start`` on; a row without text is an empty document.

        Args:
            advance: told how many bytes were read, as they are.

        Raises:
            UserError: the data cannot be read as what they are said to be.
            RunError: a network or a disk failed.
        """


def short_hash(value: Any) -> str:
    """16 hexadecimal digits for a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def cut_text(text: str) -> Iterator[str]:
    """The pieces of one document, at least one; lone surrogates, which are not Unicode, become U+FFFD."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = re.sub("[\ud800-\udfff]", "\ufffd", text).encode()
    start = 0
    while len(data) - start > PIECE_BYTES:
        end = start + place_to_cut(data[start : start + PIECE_BYTES])
        yield line_ends(data[start:end].decode())
        start = end
    yield line_ends(data[start:].decode())


def line_ends(text: str) -> str:
    """CRLF as LF."""
    return text.replace("\r\n", "\n")


def place_to_cut(window: bytes) -> int:
    """Where to cut a window that holds the end of no document: at its last line end, else between two characters."""
    end = window.rfind(b"\n") + 1
    if end:
        return end
    end = len(window)
    for back in range(1, min(4, end) + 1):
        byte = window[end - back]
        if byte >= 0xC0:  # the first byte of a character, and how many belong to it
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            end -= back if back < length else 0
            break
        if byte < 0x80:
            break
    if end > 1 and window[end - 1] == 0x0D:  # its "\n" may come next
        end -= 1
    return max(1, end)
