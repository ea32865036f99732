"""A source that is read while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from nanokimi.data.corpus import Corpus, Streamed
from nanokimi.data.documents import START
from nanokimi.data.packing import TokenRow
from nanokimi.data.prepared import describe
from nanokimi.data.progress import reading
from nanokimi.data.split import is_blank
from nanokimi.data.text import Role, Text
from nanokimi.data.tokenizer import Tokenizer, train_bpe
from nanokimi.errors import UserError

BPE_CHARACTERS = 32 << 20
MOST_HELD_OUT_TOKENS = 1 << 20

Say = Callable[[str], None]


class StreamedText:
    """A text of any size in bounded memory.

    Args:
        val_tokens: held-out tokens that are kept for evaluations; 0 keeps ``MOST_HELD_OUT_TOKENS``.
    """

    def __init__(self, text: Text, val_tokens: int) -> None:
        self.text = text
        self.val_tokens = val_tokens or MOST_HELD_OUT_TOKENS

    def find_tokenizer(self) -> Tokenizer | None:
        """A text brings none."""
        return None

    def training_text(self, characters: int) -> Iterator[str]:
        """The first ``characters`` of what is not held out."""
        return self.text.training_text("training the tokenizer on", characters)

    def train_bpe(self, size: int) -> Tokenizer:
        """A BPE of the beginning of the training part."""
        return train_bpe(self.training_text(BPE_CHARACTERS), size)

    def open(self, tokenizer: Tokenizer, log: Say) -> Corpus:
        """Finds the rule of the split and reads the held-out tokens."""
        roles = self.text.roles
        train = f"training on a stream of {self.text.name}"
        revision = getattr(self.text.documents, "commit", "")
        if not self.text.about_split:
            return Corpus(tokenizer, Streamed(roles[0], tokenizer), None, f"{train}; nothing held out", revision)
        val, counts = held_out_tokens(roles[-1], tokenizer, self.val_tokens + 1)
        summary = f"{train}; held out ({self.text.about_split}), the first of it for evaluations: {counts}"
        return Corpus(tokenizer, Streamed(roles[0], tokenizer), val, summary, revision)


def held_out_tokens(role: Role, tokenizer: Tokenizer, limit: int) -> tuple[TokenRow, str]:
    """The first ``limit`` held-out tokens, and their counts in words."""
    tokens: list[NDArray[np.int32]] = []
    n_documents = n_bytes = n_tokens = 0
    first_part, cursor = role.split.cut[:2] if role.split.cut else (0, START)
    with reading(f"reading the held-out part of {role.documents.name}", None) as advance:
        for part in range(first_part, role.documents.n_parts):
            for held_out, piece in role.pieces(part, cursor if part == first_part else START, advance):
                if not held_out or is_blank(piece):
                    continue
                ids = tokenizer.encode(piece.text)
                tokens.append(np.array([*ids, tokenizer.eot_id] if piece.ends_document else ids, np.int32))
                n_documents += piece.ends_document
                n_bytes += len(piece.text.encode())
                n_tokens += len(tokens[-1])
                if n_tokens >= limit:
                    return _row(tokens, limit), describe(n_documents, n_tokens, n_bytes)
    if not n_tokens:
        raise UserError(
            f"--val_fraction holds out no document of {role.documents.name}: choose a larger share, 0 for no "
            "validation, or give --val_path"
        )
    return _row(tokens, limit), describe(n_documents, n_tokens, n_bytes)


def _row(tokens: list[NDArray[np.int32]], limit: int) -> TokenRow:
    return TokenRow([np.concatenate(tokens)[:limit]])
