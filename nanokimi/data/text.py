"""A text to learn from: documents to train on, and what of them, or beside them, is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanokimi.data.documents import START, Advance, Cursor, Documents, Piece, ignore
from nanokimi.data.progress import reading
from nanokimi.data.split import Split, Survey, choose_split, divide, settled, survey
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

VERSION = 2  # raise it when the same text would become other tokens


@dataclass(frozen=True)
class Role:
    """Documents and how they are divided."""

    documents: Documents
    split: Split
    all_held_out: bool = False

    def pieces(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[tuple[bool, Piece]]:
        """Every piece of ``part`` from ``start`` on, and whether it is held out."""
        for held_out, piece in divide(self.documents.read(part, start, advance), part, self.split):
            yield held_out or self.all_held_out, piece


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
        """What the user knows it by."""
        return self.documents.name

    @property
    def n_bytes(self) -> int | None:
        """What there is to read, where it is known."""
        sizes = [documents.n_bytes for documents in (self.documents, self.val) if documents is not None]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def identity(self, tokenizer: Tokenizer | None = None) -> str:
        """Hash of everything that the documents and the split, and with ``tokenizer`` the tokens, depend on."""
        held_out = self.fraction if self.val is None else self.val.identity
        fingerprint = tokenizer.fingerprint if tokenizer is not None else ""
        return short_hash([VERSION, self.documents.identity, held_out, fingerprint])

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The documents and, behind them, the held-out ones of their own.

        Raises:
            UserError: there is no text in them, or it cannot be read.
        """
        found = self._look_at(self.documents, self.flag, 0.0 if self.val else self.fraction)
        roles = [Role(self.documents, choose_split(found))]
        if self.val is not None:
            self._look_at(self.val, "--val_path", 0.0)
            roles.append(Role(self.val, Split(about=f"in {self.val.name}"), all_held_out=True))
        return tuple(roles)

    def _look_at(self, documents: Documents, flag: str, fraction: float) -> Survey:
        with reading(f"reading {documents.name}", documents.n_bytes) as advance:
            parts = range(documents.n_parts)
            pieces = ((part, piece) for part in parts for piece in settled(documents.read(part, START, advance)))
            found = survey(pieces, fraction, in_full=self.in_full)
        if not found.n_documents:
            raise UserError(f"{flag} {documents.name}: the text is blank: name one with something in it")
        return found

    @property
    def about_split(self) -> str:
        """What is held out, in words; empty when nothing is."""
        return roles[-1].split.about if (roles := self.roles) else ""

    def training_text(self, doing: str, characters: int = 0) -> Iterator[str]:
        """What is not held out, in pieces: all of it, or the first ``characters``."""
        role, left = self.roles[0], characters
        with reading(f"{doing} {self.name}", None if characters else role.documents.n_bytes) as advance:
            for part in range(role.documents.n_parts):
                for held_out, piece in role.pieces(part, START, advance):
                    if not held_out:
                        yield piece.text
                        left -= len(piece.text)
                        if characters and left <= 0:
                            return


def short_hash(value: Any) -> str:
    """16 hexadecimal digits for a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
