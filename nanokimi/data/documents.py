"""Documents, what every source of text is made of, and the two splits of a text: to train on, and held out.

A document of up to ``PIECE_BYTES`` is one piece. A longer one is cut after a line end; a line that is longer still,
between two characters. Where a document is cut depends on nothing but its own text, so that it becomes the same
tokens whichever file, format or position it is read from. CRLF line ends become LF, everything else stays as it is.

What a text is decides which of its documents are held out, so that every run and every source decide alike.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from nanokimi.console import progress_bar
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

PIECE_BYTES = 1 << 18
_CONTINUATION = bytes(range(0x80, 0xC0))  # of a character in UTF-8: all bytes but its first
SPLIT_VERSION = 2  # raise it when the same text would become other tokens
ENOUGH_DOCUMENTS = 100
NEAR_CHARACTERS = 4096
MOST_BLANK_PIECES = 16

Advance = Callable[[int], None]


class Cursor(NamedTuple):
    """Where in a part a piece begins; cursors of a part are ordered as its pieces are."""

    span: int = 0  # which file of the part, counted from 0
    at: int = 0  # the byte in a text or JSON lines file (uncompressed), the row elsewhere
    piece: int = 0  # number of the piece within its document; above 0 the document began earlier


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
        end = start + cut_position(data[start : start + PIECE_BYTES])
        yield line_ends(data[start:end].decode())
        start = end
    yield line_ends(data[start:].decode())


def line_ends(text: str) -> str:
    """CRLF as LF."""
    return text.replace("\r\n", "\n")


def cut_position(window: bytes) -> int:
    """Where to cut a window that holds the end of no document: at its last line end, else between two characters."""
    end = window.rfind(b"\n") + 1
    if end:
        return end
    end, last = len(window), window[-4:]
    character = last[max(0, len(last.rstrip(_CONTINUATION)) - 1) :]  # the last one, perhaps not all of it
    n_bytes = next(n for n, smallest in ((4, 0xF0), (3, 0xE0), (2, 0xC0), (1, 0)) if character[0] >= smallest)
    if len(character) < n_bytes:
        end -= len(character)
    if end > 1 and window[end - 1] == 0x0D:  # its "\n" may come next
        end -= 1
    return max(1, end)


# ---- the two splits of a text ---------------------------------------------------------------------


@dataclass(frozen=True)
class HoldOutRule:
    """What is held out: documents by their hash, or everything from ``cut`` on."""

    fraction: float = 0.0  # of the documents
    cut: tuple[int, Cursor, int] | None = None  # part, cursor of a piece, characters in it
    about: str = ""  # the rule in words, for the summary


@dataclass(frozen=True)
class Text:
    """Documents to train on, and held-out ones.

    Args:
        documents: to train on, but for what the rule holds out.
        val: held-out documents of their own; without them a ``fraction`` of ``documents`` is held out (0: nothing).
        flag: how the user named ``documents``, for messages.
        in_full: look at all of the text before anything is done with it; otherwise only far enough to know by
            which rule to hold out.
    """

    documents: Documents
    val: Documents | None = None
    fraction: float = 0.05
    flag: str = "--data_path"
    in_full: bool = True

    @property
    def name(self) -> str:
        return self.documents.name

    @property
    def n_bytes(self) -> int | None:
        """What there is to read, where it is known."""
        sizes = [documents.n_bytes for documents in (self.documents, self.val) if documents is not None]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def n_parts(self) -> int:
        """Parts of ``documents`` and, after them, of ``val``."""
        return self.documents.n_parts + (self.val.n_parts if self.val is not None else 0)

    def identity(self, tokenizer: Tokenizer | None = None) -> str:
        """Hash of everything that the documents and the split, and with ``tokenizer`` the tokens, depend on."""
        held_out = self.fraction if self.val is None else self.val.identity
        fingerprint = tokenizer.fingerprint if tokenizer is not None else ""
        return short_hash([SPLIT_VERSION, self.documents.identity, held_out, fingerprint])

    @cached_property
    def rule(self) -> HoldOutRule:
        """What of ``documents`` is held out, found out by looking at the text; UserError if a split would be empty."""
        rule = self._find_rule(self.documents, self.flag, 0.0 if self.val else self.fraction)
        if self.val is not None:
            self._find_rule(self.val, "--val_path", 0.0)
        return rule

    @property
    def about_split(self) -> str:
        """What is held out, in words; empty when nothing is."""
        rule = self.rule
        return rule.about if self.val is None else f"in {self.val.name}"

    def _find_rule(self, documents: Documents, flag: str, fraction: float) -> HoldOutRule:
        """Holds out documents by their hash, so that copies of one stay together; of few documents, the end."""
        n_documents = n_held_out = n_characters = 0
        pieces: list[tuple[int, Cursor, int]] = []  # while the documents are few: part, cursor, characters
        complete = True
        with progress_bar(f"reading {documents.name}", documents.n_bytes) as advance:
            for part, piece in _with_text(documents, advance):
                if not piece.cursor.piece:
                    n_documents += 1
                    n_held_out += in_share(piece.text.encode(), fraction)
                n_characters += len(piece.text)
                if n_documents < ENOUGH_DOCUMENTS:
                    pieces.append((part, piece.cursor, len(piece.text)))
                elif not self.in_full:
                    complete = False
                    break
        if not n_documents:
            raise UserError(f"{flag} {documents.name}: the text is blank: name one with something in it")
        if not fraction:
            return HoldOutRule()
        if n_documents < ENOUGH_DOCUMENTS:
            return _hold_out_end(pieces, int(n_characters * fraction), f"the last {fraction:g} of the text")
        if complete and n_held_out in (0, n_documents):
            raise wrong_share(fraction, f"{n_held_out} of {n_documents} documents")
        return HoldOutRule(fraction=fraction, about="by hash")

    def read(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[tuple[bool, Piece]]:
        """Every piece of ``part`` from ``start`` on, and whether it is held out."""
        own = self.documents.n_parts
        if part < own:
            yield from divide(self.documents.read(part, start, advance), part, self.rule)
        elif self.val is not None:
            yield from ((True, piece) for piece in settled(self.val.read(part - own, start, advance)))

    def held_out_pieces(self, advance: Advance = ignore) -> Iterator[Piece]:
        """What is held out, blank documents included."""
        first, cursor = self.rule.cut[:2] if self.rule.cut else (0, START)
        if self.val is not None:
            first = self.documents.n_parts
        for part in range(first, self.n_parts):
            pieces = self.read(part, cursor if part == first else START, advance)
            yield from (piece for held_out, piece in pieces if held_out)

    def training_text(self, doing: str, characters: int = 0) -> Iterator[str]:
        """What is not held out, in pieces: all of it, or the first ``characters``."""
        left = characters
        with progress_bar(f"{doing} {self.name}", None if characters else self.documents.n_bytes) as advance:
            for part in range(self.documents.n_parts):
                for held_out, piece in self.read(part, START, advance):
                    if not held_out:
                        yield piece.text
                        left -= len(piece.text)
                        if characters and left <= 0:
                            return


def _with_text(documents: Documents, advance: Advance) -> Iterator[tuple[int, Piece]]:
    """Every piece that belongs to a document with text, and its part."""
    for part in range(documents.n_parts):
        yield from ((part, piece) for piece in settled(documents.read(part, START, advance)) if not is_blank(piece))


def _hold_out_end(pieces: list[tuple[int, Cursor, int]], characters: int, about: str) -> HoldOutRule:
    """Holds out the last ``characters`` of the text."""
    left = characters
    for part, cursor, length in reversed(pieces):
        if 0 < left <= length:
            return HoldOutRule(cut=(part, cursor, length - left), about=about)
        left -= length
    return HoldOutRule()


def wrong_share(fraction: float, held_out: str) -> UserError:
    """The error for a share that leaves one of the two splits empty."""
    return UserError(
        f"--val_fraction {fraction:g} holds out {held_out}: choose another share, 0 for no validation, "
        "or give --val_path"
    )


def in_share(data: bytes, fraction: float) -> bool:
    """Whether what begins with ``data`` belongs to the share that is held out: by its SHA-256."""
    return fraction > 0 and int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < fraction * 2**64


def is_blank(piece: Piece) -> bool:
    """Whether the piece is a whole document without text."""
    return piece.ends_document and not piece.cursor.piece and not piece.text.strip()


def settled(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces, but a document that is blank throughout comes as one: see ``is_blank``.

    A document's leading blank pieces wait for one with text, up to ``MOST_BLANK_PIECES``.
    """
    waiting: list[Piece] = []
    for piece in pieces:
        if not waiting and (piece.cursor.piece or piece.ends_document or piece.text.strip()):
            yield piece
            continue
        waiting.append(piece)
        if piece.text.strip() or len(waiting) > MOST_BLANK_PIECES:
            yield from waiting
            waiting = []
        elif piece.ends_document:
            yield Piece("", True, waiting[0].cursor)
            waiting = []


def divide(pieces: Iterable[Piece], part: int, rule: HoldOutRule) -> Iterator[tuple[bool, Piece]]:
    """The pieces of ``part``, and whether each is held out; a document that they begin inside of is not."""
    held_out = False
    for piece in settled(pieces):
        if rule.cut is not None:
            yield from _divide_at(rule.cut, part, piece)
            continue
        if not piece.cursor.piece:
            held_out = in_share(piece.text.encode(), rule.fraction)
        yield held_out, piece


def _divide_at(cut: tuple[int, Cursor, int], part: int, piece: Piece) -> Iterator[tuple[bool, Piece]]:
    """Cuts at the last line start before the place, when there is one near."""
    *where, characters = cut
    if [part, piece.cursor] != where or not characters:
        yield [part, piece.cursor] >= where, piece
        return
    at = piece.text.rfind("\n", max(0, characters - NEAR_CHARACTERS), characters) + 1 or characters
    yield False, Piece(piece.text[:at], True, piece.cursor)
    yield True, Piece(piece.text[at:], piece.ends_document, piece.cursor)
