"""Which part of a text is held out: decided by what the text is, so that every run decides alike."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nanokimi.data.documents import Piece
from nanokimi.errors import UserError

ENOUGH_DOCUMENTS = 100
NEAR_CHARACTERS = 4096
CHANGED = "the text was changed while it was read: start again"


@dataclass(frozen=True)
class Survey:
    """What one pass over a text found.

    Attributes:
        digests: first 64 bits of the SHA-256 of every document.
        lengths: characters of every document; 0 for one that is blank, which is skipped.
        nuls: NUL characters in the text.
    """

    digests: array[int]
    lengths: array[int]
    nuls: int

    @property
    def n_documents(self) -> int:
        return len(self.lengths) - self.n_blank

    @property
    def n_blank(self) -> int:
        return self.lengths.count(0)


@dataclass(frozen=True)
class Split:
    """What is held out: the documents marked in ``documents``, or all characters from ``cut`` on.

    Attributes:
        about: the rule in words, for the summary; empty when nothing is held out.
    """

    documents: bytes = b""
    cut: int | None = None
    about: str = ""


def survey(pieces: Iterable[Piece]) -> Survey:
    """Measures every document; memory grows by 16 bytes for each."""
    digests, lengths, nuls = array("Q"), array("Q"), 0
    sha256, length, blank = hashlib.sha256(), 0, True
    for piece in pieces:
        sha256.update(piece.text.encode())
        length += len(piece.text)
        blank = blank and not piece.text.strip()
        nuls += piece.text.count("\0")
        if piece.ends_document:
            digests.append(int.from_bytes(sha256.digest()[:8], "big"))
            lengths.append(0 if blank else length)
            sha256, length, blank = hashlib.sha256(), 0, True
    return Survey(digests, lengths, nuls)


def choose_split(found: Survey, fraction: float) -> Split:
    """Holds out ``fraction``: documents by their hash, so that copies of one stay together; of few, the end.

    Raises:
        UserError: one of the two parts would be empty.
    """
    if not fraction:
        return Split()
    if found.n_documents < ENOUGH_DOCUMENTS:
        total = sum(found.lengths)
        held_out = int(total * fraction)
        return Split(cut=total - held_out, about=f"the last {fraction:g} of the text") if held_out else Split()
    marks = bytes(digest < fraction * 2**64 for digest in found.digests)
    n_held_out = sum(mark and length > 0 for mark, length in zip(marks, found.lengths, strict=True))
    if n_held_out in (0, found.n_documents):
        raise UserError(
            f"--val_fraction {fraction:g} holds out {n_held_out} of {found.n_documents} documents: "
            "choose another share, 0 for no validation, or give --val_path"
        )
    return Split(marks, about="by hash")


def divide(pieces: Iterable[Piece], found: Survey, split: Split) -> Iterator[tuple[bool, Piece]]:
    """The pieces of all documents that are not blank, and for each whether it is held out."""
    document = position = 0
    for piece in pieces:
        if document == len(found.lengths):
            raise UserError(CHANGED)
        if found.lengths[document]:
            if split.cut is None:
                yield bool(split.documents and split.documents[document]), piece
            else:
                yield from _divide_at(split.cut - position, piece)
            position += len(piece.text)
        document += piece.ends_document


def _divide_at(cut: int, piece: Piece) -> Iterator[tuple[bool, Piece]]:
    """Cuts at the last line start before ``cut`` when there is one near; ``cut`` may lie outside the piece."""
    if not 0 < cut < len(piece.text):
        yield cut <= 0, piece
        return
    cut = piece.text.rfind("\n", max(0, cut - NEAR_CHARACTERS), cut) + 1 or cut
    yield False, Piece(piece.text[:cut], ends_document=True)
    yield True, Piece(piece.text[cut:], piece.ends_document)
