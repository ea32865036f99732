"""The text that an evaluation scores: all of one, or what training holds out of it, as tokens of whole documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nanokimi.config import TrainConfig, field_names
from nanokimi.data.batch import TokenArray
from nanokimi.data.documents import START, Advance, Piece, Text, is_blank, settled
from nanokimi.data.sources import parse_mix, text_of, with_sample
from nanokimi.data.tokenbin import TokenBin, find_token_files
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

ENCODED_CHARACTERS = 1 << 22  # a longer document is tokenised in stretches of about so many characters
BLOCK_TOKENS = 1 << 20
SETTINGS = field_names(TrainConfig, group="text", decides_text=True)

Log = Callable[[str], None]


class Part(NamedTuple):
    """A document, or of a very long one the next stretch; ``tokens`` holds no end of text.

    Attributes:
        n_bytes: UTF-8 bytes of its text.
    """

    tokens: list[int]
    n_bytes: int
    ends_document: bool


@dataclass(frozen=True)
class ChosenText:
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


# ---- text ---------------------------------------------------------------------------------------


def _choose_documents(config: TrainConfig, tokenizer: Tokenizer, held_out: bool, log: Log) -> ChosenText:
    config = with_sample(config, log)
    text = text_of(config, log, split_up=config.dataset == "localstreaming")
    if not held_out:
        return ChosenText(
            text.name, text.documents.n_bytes, partial(_text_parts, partial(_all_pieces, text), tokenizer)
        )
    if not text.about_split:
        raise _nothing_held_out(config, text.name)
    n_bytes = text.documents.n_bytes if text.val is None else text.val.n_bytes
    name = f"{text.name}, held out {text.about_split}"
    return ChosenText(name, n_bytes, partial(_text_parts, text.held_out_pieces, tokenizer))


def _all_pieces(text: Text, advance: Advance) -> Iterator[Piece]:
    for part in range(text.documents.n_parts):
        yield from settled(text.documents.read(part, START, advance))


def _text_parts(read: Callable[[Advance], Iterator[Piece]], tokenizer: Tokenizer, advance: Advance) -> Iterator[Part]:
    """The documents that the pieces make up."""
    waiting: list[str] = []
    for piece in read(advance):
        waiting.append("" if is_blank(piece) else piece.text)
        if piece.ends_document or sum(map(len, waiting)) >= ENCODED_CHARACTERS:
            text = "".join(waiting)
            yield Part(tokenizer.encode(text), len(text.encode()), piece.ends_document)
            waiting = []


# ---- tokens -------------------------------------------------------------------------------------


def _choose_tokens(config: TrainConfig, tokenizer: Tokenizer, held_out: bool, log: Log) -> ChosenText:
    path, name = config.data_path, config.data_path
    if held_out:
        val = TokenBin(path, config.val_path, config.val_fraction).open(tokenizer, log).val
        if val is None:
            raise _nothing_held_out(config, path)
        rows, name = [val], f"{path}, held out"
    else:
        rows = _all_rows(path, tokenizer, log)
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    return ChosenText(name, width * sum(map(len, rows)), partial(_token_parts, rows, tokenizer, width))


def _all_rows(path: str, tokenizer: Tokenizer, log: Log) -> list[TokenArray]:
    """Everything in the files of ``path``; what lies in a folder's ``val*`` files is a row of its own."""
    has_val = os.path.isdir(path) and any(file.name.startswith("val") for file in find_token_files(path, "--data_path"))
    corpus = TokenBin(path, "", TrainConfig.val_fraction if has_val else 0.0).open(tokenizer, log)
    return [row for row in (corpus.train.tokens, corpus.val) if row is not None]


def _token_parts(rows: Iterable[TokenArray], tokenizer: Tokenizer, width: int, advance: Advance) -> Iterator[Part]:
    """The runs between ends of text."""
    for row in rows:
        for start in range(0, len(row), BLOCK_TOKENS):
            block = row.read(start, min(start + BLOCK_TOKENS, len(row)))
            advance(width * len(block))
            begin = 0
            for end in np.flatnonzero(block == tokenizer.eot_id).tolist():
                yield _run(block[begin:end], tokenizer, ends_document=True)
                begin = end + 1
            if begin < len(block):
                yield _run(block[begin:], tokenizer, ends_document=start + len(block) == len(row))


def _run(tokens: NDArray[np.int64], tokenizer: Tokenizer, *, ends_document: bool) -> Part:
    return Part(tokens.tolist(), tokenizer.count_bytes(torch.from_numpy(tokens)), ends_document)
