"""Which part of a text is held out: decided by what the text is, so that every run decides alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nanokimi.data.documents import Cursor, Piece
from nanokimi.errors import UserError

ENOUGH_DOCUMENTS = 100
NEAR_CHARACTERS = 4096
MOST_BLANK_PIECES = 16


@dataclass
class Survey:
    """What one pass over a text found; documents without text are skipped everywhere and counted here.

    Attributes:
        n_documents, characters: of documents with text.
        n_held_out: documents whose hash falls into the share.
        nuls: NUL characters.
        complete: whether the pass went to the end; a stream's stops at ``ENOUGH_DOCUMENTS``.
    """

    fraction: float
    n_documents: int = 0
    n_blank: int = 0
    n_held_out: int = 0
    characters: int = 0
    nuls: int = 0
    complete: bool = False
    _pieces: list[tuple[int, Cursor, int]] = field(default_factory=list)  # while the documents are few

    def add(self, part: int, piece: Piece) -> None:
        """Counts a piece; those of a part come in their order."""
        self.nuls += piece.text.count("\0")
        if is_blank(piece):
            self.n_blank += 1
            return
        if not piece.cursor.piece:
            self.n_documents += 1
            self.n_held_out += falls_into(piece.text, self.fraction)
        self.characters += len(piece.text)
        if self.n_documents < ENOUGH_DOCUMENTS:
            self._pieces.append((part, piece.cursor, len(piece.text)))
        else:
            self._pieces.clear()

    def locate(self, characters: int) -> tuple[int, Cursor, int]:
        """Part, cursor and place within the piece of the character behind the first ``characters``."""
        for part, cursor, length in self._pieces:
            if characters < length:
                return part, cursor, characters
            characters -= length
        raise AssertionError("the text has fewer characters")


@dataclass(frozen=True)
class Split:
    """What is held out: documents by their hash, or everything behind one place.

    Attributes:
        fraction: share of the documents.
        cut: part, cursor of a piece and characters in it from which on all is held out.
        about: the rule in words, for the summary; empty when nothing is held out.
    """

    fraction: float = 0.0
    cut: tuple[int, Cursor, int] | None = None
    about: str = ""


def survey(parts: Iterable[tuple[int, Piece]], fraction: float, *, in_full: bool) -> Survey:
    """Measures a text, given as pieces and their parts; unless ``in_full`` only far enough to choose a rule."""
    found = Survey(fraction)
    for part, piece in parts:
        found.add(part, piece)
        if not in_full and found.n_documents >= ENOUGH_DOCUMENTS:
            return found
    found.complete = True
    return found


def choose_split(found: Survey) -> Split:
    """Holds out a share: documents by their hash, so that copies of one stay together; of few, the end.

    Raises:
        UserError: one of the two parts would be empty.
    """
    fraction = found.fraction
    if not fraction:
        return Split()
    if found.n_documents < ENOUGH_DOCUMENTS:
        held_out = int(found.characters * fraction)
        if not held_out:
            return Split()
        return Split(cut=found.locate(found.characters - held_out), about=f"the last {fraction:g} of the text")
    if found.complete and found.n_held_out in (0, found.n_documents):
        raise UserError(
            f"--val_fraction {fraction:g} holds out {found.n_held_out} of {found.n_documents} documents: "
            "choose another share, 0 for no validation, or give --val_path"
        )
    return Split(fraction=fraction, about="by hash")


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


def divide(pieces: Iterable[Piece], part: int, split: Split) -> Iterator[tuple[bool, Piece]]:
    """The pieces of ``part``, and for each whether it is held out.

    ``pieces`` may begin inside a document: then that is one to train on.
    """
    held_out = False
    for piece in settled(pieces):
        if split.cut is not None:
            yield from _divide_at(split.cut, part, piece)
            continue
        if not piece.cursor.piece:
            held_out = falls_into(piece.text, split.fraction)
        yield held_out, piece


def is_blank(piece: Piece) -> bool:
    """Whether the piece is a whole document without text."""
    return piece.ends_document and not piece.cursor.piece and not piece.text.strip()


def falls_into(text: str, fraction: float) -> bool:
    """Whether a document whose first piece is ``text`` belongs to the share: by the SHA-256 of that piece."""
    return fraction > 0 and int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


def _divide_at(cut: tuple[int, Cursor, int], part: int, piece: Piece) -> Iterator[tuple[bool, Piece]]:
    """Cuts at the last line start before the place, when there is one near."""
    *where, characters = cut
    if [part, piece.cursor] != where or not characters:
        yield [part, piece.cursor] >= where, piece
        return
    at = piece.text.rfind("\n", max(0, characters - NEAR_CHARACTERS), characters) + 1 or characters
    yield False, Piece(piece.text[:at], True, piece.cursor)
    yield True, Piece(piece.text[at:], piece.ends_document, piece.cursor)
