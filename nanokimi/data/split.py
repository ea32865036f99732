"""A text and its two splits: what is trained on and what is held out.

What a text is decides which of its documents are held out, so that every run and every source decide alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from nanokimi.console import progress_bar
from nanokimi.data.documents import START, Advance, Cursor, Documents, Piece, ignore, short_hash
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

VERSION = 2  # raise it when the same text would become other tokens
ENOUGH_DOCUMENTS = 100
NEAR_CHARACTERS = 4096
MOST_BLANK_PIECES = 16


@dataclass(frozen=True)
class HoldOutRule:
    """What is held out: documents by their hash, or everything from one place on.

    Attributes:
        fraction: share of the documents.
        cut: part, cursor of a piece and characters in it from which on all is held out.
        about: the rule in words, for the summary; empty when nothing is held out.
    """

    fraction: float = 0.0
    cut: tuple[int, Cursor, int] | None = None
    about: str = ""


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
        return short_hash([VERSION, self.documents.identity, held_out, fingerprint])

    @cached_property
    def rule(self) -> HoldOutRule:
        """What of ``documents`` is held out; to know it, the text is looked at.

        Raises:
            UserError: there is no text, or it cannot be read, or one of the two splits would be empty.
        """
        rule = self._survey(self.documents, self.flag, 0.0 if self.val else self.fraction).rule()
        if self.val is not None:
            self._survey(self.val, "--val_path", 0.0)
        return rule

    @property
    def about_split(self) -> str:
        """What is held out, in words; empty when nothing is."""
        rule = self.rule
        return rule.about if self.val is None else f"in {self.val.name}"

    def _survey(self, documents: Documents, flag: str, fraction: float) -> Survey:
        found = Survey(fraction)
        with progress_bar(f"reading {documents.name}", documents.n_bytes) as advance:
            for part in range(documents.n_parts):
                for piece in settled(documents.read(part, START, advance)):
                    found.add(part, piece)
                    if not self.in_full and found.n_documents >= ENOUGH_DOCUMENTS:
                        return found
        if not found.n_documents:
            raise UserError(f"{flag} {documents.name}: the text is blank: name one with something in it")
        found.complete = True
        return found

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


@dataclass
class Survey:
    """What one pass over a text found; documents without text do not count.

    Attributes:
        n_held_out: documents whose hash falls into the share.
        complete: whether the pass went to the end.
    """

    fraction: float
    n_documents: int = 0
    n_held_out: int = 0
    characters: int = 0
    complete: bool = False
    _pieces: list[tuple[int, Cursor, int]] = field(default_factory=list)  # while the documents are few

    def add(self, part: int, piece: Piece) -> None:
        """Counts a piece; those of a part come in their order."""
        if is_blank(piece):
            return
        if not piece.cursor.piece:
            self.n_documents += 1
            self.n_held_out += in_share(piece.text.encode(), self.fraction)
        self.characters += len(piece.text)
        if self.n_documents < ENOUGH_DOCUMENTS:
            self._pieces.append((part, piece.cursor, len(piece.text)))
        else:
            self._pieces.clear()

    def rule(self) -> HoldOutRule:
        """Holds out documents by their hash, so that copies of one stay together; of few documents, the end.

        Raises:
            UserError: one of the two splits would be empty.
        """
        if not self.fraction:
            return HoldOutRule()
        if self.n_documents < ENOUGH_DOCUMENTS:
            held_out = int(self.characters * self.fraction)
            if not held_out:
                return HoldOutRule()
            cut = self._place_after(self.characters - held_out)
            return HoldOutRule(cut=cut, about=f"the last {self.fraction:g} of the text")
        if self.complete and self.n_held_out in (0, self.n_documents):
            raise wrong_share(self.fraction, f"{self.n_held_out} of {self.n_documents} documents")
        return HoldOutRule(fraction=self.fraction, about="by hash")

    def _place_after(self, characters: int) -> tuple[int, Cursor, int]:
        for part, cursor, length in self._pieces:
            if characters < length:
                return part, cursor, characters
            characters -= length
        raise AssertionError("the text has fewer characters")


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
    """The pieces of ``part``, and for each whether it is held out.

    ``pieces`` may begin inside a document: then that is one to train on.
    """
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
