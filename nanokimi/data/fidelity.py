"""Whether a tokenizer gives back the text that it is given, tried on a sample before anything is counted by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from nanokimi.data.documents import START, Cursor, Text
from nanokimi.data.local import LocalDocuments
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

PLACES = 16  # of a text from which the sample is taken
PIECES = 16  # from each place
CHARACTERS = 4096  # of each piece


def check_tokenizer(text: Text, tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    """Tells ``log`` of a tokenizer that changes the text by design: by its normaliser, or by its unknown token.

    Raises:
        UserError: it loses text without a sign, so that nothing measured per byte would be true.
    """
    looked_at = changed = unknown = n_before = n_after = 0
    for piece in _sample(text):
        looked_at += 1
        ids = tokenizer.encode(piece)
        found = tokenizer.restored(ids)
        n_before, n_after = n_before + len(piece.encode()), n_after + len(found)
        if _is_same(found, piece):
            continue
        changed += 1
        n_unknown = sum(token == tokenizer.unknown_id for token in ids)
        unknown += n_unknown
        if not n_unknown and not _is_same(found, tokenizer.normalised(piece)):
            raise UserError(
                f"tokenizer {tokenizer.name}: loses text: {_first_loss(piece, found)} in {text.name} does not come "
                "back from its tokens, and it has no token for what it does not know: choose another with "
                "--set tokenizer_name=..., such as byte"
            )
    if changed:
        by = f"{unknown:,} unknown tokens" if unknown else "its normaliser"
        log(
            f"warning: tokenizer {tokenizer.name} does not give back {changed:,} of {looked_at:,} samples of "
            f"{text.name} ({by}): of {n_before:,} bytes {n_after:,} come back, and they are what is counted"
        )


def _is_same(found: bytes, text: str) -> bool:
    """Whether ``text`` came back, but for a space that many tokenizers put before it."""
    expected = text.encode()
    return found in (expected, b" " + expected)


def _first_loss(piece: str, found: bytes) -> str:
    there = set(found.decode("utf-8", "replace"))
    return next((f"{character!r} (U+{ord(character):04X})" for character in piece if character not in there), "a text")


def _sample(text: Text) -> Iterator[str]:
    """The beginnings of pieces from places all over the text; of data on a network from the first part alone."""
    documents = text.documents
    places = [(0, START)]
    if isinstance(documents, LocalDocuments):
        places = [(p, Cursor(s)) for p in range(documents.n_parts) for s in range(documents.n_spans(p))]
    for number in range(0, len(places), -(-len(places) // PLACES)):
        for piece in islice(documents.read(*places[number]), PIECES):
            if piece.text.strip():
                yield piece.text[:CHARACTERS]
