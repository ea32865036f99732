"""What training sees of a source once it is open: sequences to train on, tokens that are held out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from nanokimi.data.loader import BatchLoader, Loader
from nanokimi.data.mixture import MixLoader
from nanokimi.data.packing import PackedSequences, TokenRow
from nanokimi.data.stream import TokenStream
from nanokimi.data.stream_loader import StreamLoader
from nanokimi.data.text import Role, short_hash
from nanokimi.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """How batches are to be made of a source.

    Attributes:
        length: T, tokens of a sequence.
        batch_size: B, sequences of a batch.
        num_workers, pin_memory, eot_id, rank, world_size: see ``BatchLoader``.
        shuffle_buffer: see ``StreamLoader``.
    """

    length: int
    batch_size: int
    seed: int
    num_workers: int = 0
    pin_memory: bool = False
    eot_id: int | None = None
    shuffle_buffer: int = 1024
    rank: int = 0
    world_size: int = 1


class TrainData(Protocol):
    """The part of a source that is trained on."""

    @property
    def identity(self) -> str:
        """Hash of the tokens and of what they are read from: positions are valid while it is the same."""

    def loader(self, reading: Reading) -> Loader:
        """Batches of it; UserError if it is too short for one."""


@dataclass(frozen=True)
class Finite:
    """A row of tokens of known length."""

    tokens: TokenRow
    identity: str

    def loader(self, reading: Reading) -> BatchLoader:
        """Batches in the order of a seeded permutation."""
        return BatchLoader(
            PackedSequences(self.tokens, reading.length), reading.batch_size, seed=reading.seed,
            num_workers=reading.num_workers, pin_memory=reading.pin_memory, eot_id=reading.eot_id,
            rank=reading.rank, world_size=reading.world_size,
        )  # fmt: skip


@dataclass(frozen=True)
class Streamed:
    """Documents that are read and tokenised while training goes on."""

    role: Role
    tokenizer: Tokenizer

    @property
    def identity(self) -> str:
        """Hash of documents, split and tokenizer."""
        split = self.role.split
        return short_hash([self.role.documents.identity, split.fraction, split.cut, self.tokenizer.fingerprint])

    def loader(self, reading: Reading) -> StreamLoader:
        """Batches in the order of the stream, shuffled in a buffer."""
        stream = TokenStream(self.role.documents, self.role.split, self.tokenizer, reading.length, reading.seed)
        return StreamLoader(
            stream, reading.batch_size, num_workers=reading.num_workers, pin_memory=reading.pin_memory,
            eot_id=reading.eot_id, shuffle_buffer=reading.shuffle_buffer,
            rank=reading.rank, world_size=reading.world_size,
        )  # fmt: skip


@dataclass(frozen=True)
class Mixed:
    """Several sources by weight."""

    sources: dict[str, tuple[float, TrainData]]

    @property
    def identity(self) -> str:
        """Hash of the sources and their weights."""
        return short_hash([[name, weight, data.identity] for name, (weight, data) in self.sources.items()])

    def loader(self, reading: Reading) -> MixLoader:
        """Batches whose sequences come from all of them."""
        return MixLoader(
            {name: (weight, data.loader(_one_at_a_time(reading))) for name, (weight, data) in self.sources.items()},
            reading.batch_size, pin_memory=reading.pin_memory,
        )  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out.

    Attributes:
        val: None when nothing is held out.
        summary: one line with documents, tokens and bytes of each part.
        revision: commit of the hub's data set that is read; empty when there is none, or more than one source.
    """

    tokenizer: Tokenizer
    train: TrainData
    val: TokenRow | None
    summary: str
    revision: str = ""


def _one_at_a_time(reading: Reading) -> Reading:
    return dataclasses.replace(reading, batch_size=1, pin_memory=False)
