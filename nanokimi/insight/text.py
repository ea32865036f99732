"""The text that an evaluation scores: all of one, or what training holds out of it, as tokens of whole documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanokimi.config import TrainConfig, field_names
from nanokimi.data.batch import TokenArray
from nanokimi.data.documents import START, Advance, Piece, is_blank, settled
from nanokimi.data.fidelity import check_tokenizer
from nanokimi.data.sources import parse_mix, text_of, with_sample
from nanokimi.data.tokenbin import TokenBin
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

ENCODED_CHARACTERS = 1 << 22  # a longer document is tokenised in stretches of about so many characters
BLOCK_TOKENS = 1 << 20
SETTINGS = field_names(TrainConfig, group="text", decides_text=True)

Log = Callable[[str], None]


class Part(NamedTuple):
    """A document, or of a very long one the next stretch: its tokens without the end of text, and their UTF-8 bytes."""

    tokens: list[int]
    n_bytes: int
    ends_document: bool


class ChosenText(NamedTuple):
    """Documents to be scored.

    Attributes:
        name: what the user knows it by.
        n_bytes: what there is to read, in the unit that ``read`` tells its argument; None where nobody knows.
        read: their parts, blank documents included.
    """

    name: str
    n_bytes: int | None
    read: Callable[[Advance], Iterator[Part]]


def choose_text(config: TrainConfig, tokenizer: Tokenizer, *, held_out: bool, log: Log) -> list[ChosenText]:
    """The text, or of a mixture the texts, that ``config`` names.

    Args:
        config: its fields ``SETTINGS``.
        held_out: only what training with it would hold out.
        log: takes warnings, a line each.

    Raises:
        UserError: missing or undecodable data, nothing is held out.
    """
    sources = [part for _, part in parse_mix(config).values()]
    if held_out and config.val_path:
        sources = [part for part in sources if part.val_path][:1]  # they share it
    return [
        (_choose_tokens if source.dataset == "tokenbin" else _choose_documents)(source, tokenizer, held_out, log)
        for source in sources
    ]


def _nothing_held_out(config: TrainConfig, name: str) -> UserError:
    return UserError(
        f"--part held_out: nothing of {name} is held out with --val_fraction {config.val_fraction:g}: "
        "choose another share, or score all of it with --part all"
    )


def _choose_documents(config: TrainConfig, tokenizer: Tokenizer, held_out: bool, log: Log) -> ChosenText:
    config = with_sample(config, log)
    text = text_of(config, log, split_up=config.dataset == "localstreaming")
    check_tokenizer(text, tokenizer, log)
    name, documents = text.name, text.documents
    if held_out:
        if not text.about_split:
            raise _nothing_held_out(config, name)
        name, documents = f"{name}, held out {text.about_split}", documents if text.val is None else text.val

    def pieces(advance: Advance) -> Iterator[Piece]:
        if held_out:
            return text.held_out_pieces(advance)
        parts = (documents.read(part, START, advance) for part in range(documents.n_parts))
        return chain.from_iterable(map(settled, parts))

    return ChosenText(name, documents.n_bytes, lambda advance: _encoded(pieces(advance), tokenizer))


def _encoded(pieces: Iterator[Piece], tokenizer: Tokenizer) -> Iterator[Part]:
    waiting: list[str] = []
    for piece in pieces:
        waiting.append("" if is_blank(piece) else piece.text)
        if piece.ends_document or sum(map(len, waiting)) >= ENCODED_CHARACTERS:
            text = "".join(waiting)
            ids = tokenizer.encode(text)
            yield Part(ids, tokenizer.count_bytes(torch.tensor(ids, dtype=torch.int64)), piece.ends_document)
            waiting = []


def _choose_tokens(config: TrainConfig, tokenizer: Tokenizer, held_out: bool, log: Log) -> ChosenText:
    """Token files; of a folder with ``val*`` files all is two rows: theirs and the others'."""
    path, width = config.data_path, 2 if tokenizer.vocab_size <= 1 << 16 else 4
    if held_out:
        corpus = TokenBin(path, config.val_path, config.val_fraction).open(tokenizer, log)
        if corpus.val is None:
            raise _nothing_held_out(config, path)
        name, rows = f"{path}, held out", [corpus.val]
    else:
        fraction = TrainConfig.val_fraction if any(Path(path).glob("val*.bin")) else 0.0
        corpus = TokenBin(path, "", fraction).open(tokenizer, log)
        name, rows = path, [row for row in (corpus.train.tokens, corpus.val) if row is not None]
    return ChosenText(name, width * sum(map(len, rows)), partial(_token_parts, rows, tokenizer, width))


def _token_parts(rows: list[TokenArray], tokenizer: Tokenizer, width: int, advance: Advance) -> Iterator[Part]:
    """The runs between ends of text, of which ``count_bytes`` counts none."""
    for row in rows:
        for start in range(0, len(row), BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, len(row))
            block = row.read(start, stop)
            advance(width * len(block))
            *documents, rest = np.split(block, np.flatnonzero(block == tokenizer.eot_id) + 1)
            for tokens in documents:
                yield Part(tokens[:-1].tolist(), tokenizer.count_bytes(torch.from_numpy(tokens)), True)
            if len(rest):
                yield Part(rest.tolist(), tokenizer.count_bytes(torch.from_numpy(rest)), stop == len(row))
