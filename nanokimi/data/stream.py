"""Packed sequences out of documents that are never all in memory, from any position on.

The parts of a source are dealt out to a fixed number of lanes; each lane reads its parts one after the other and cuts
what it reads into sequences. Which sequences a lane makes depends on the data and the seed alone, so lanes can live
in any process, be handed to another, and go on at a position that is a handful of numbers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanokimi.data.documents import START, Cursor, Documents, Piece
from nanokimi.data.shuffle import permutation
from nanokimi.data.split import Split, divide, is_blank
from nanokimi.data.tokenizer import Tokenizer

LANES = 8
CHUNK_CHARACTERS = 1 << 16

NO_TEXT = "documents without text were passed over"
NULS = "NUL bytes were in the data: is it really text?"

# T sequence length


class Position(NamedTuple):
    """Where a sequence begins: ``skip`` tokens behind the start of a piece.

    Attributes:
        epoch, ordinal: which of the lane's parts of which epoch.
        span, at, piece: ``Cursor`` within it.
    """

    epoch: int = 0
    ordinal: int = 0
    span: int = 0
    at: int = 0
    piece: int = 0
    skip: int = 0

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.span, self.at, self.piece)


@dataclass
class Chunk:
    """What a lane makes at a time.

    Attributes:
        lane, epoch: what was asked for.
        sequences: ``[n, T + 1]`` int32 ids (they stay below 2^31).
        positions: ``[n, 6]``, for each sequence the ``Position`` of the one behind it.
        n_tokens: tokens read, whether or not they filled a sequence.
        oddities: how often something was met that the user should hear of.
        ends_epoch: whether the lane has nothing more for this epoch.
    """

    lane: int
    epoch: int
    sequences: NDArray[np.int32]
    positions: NDArray[np.int64]
    n_tokens: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    ends_epoch: bool = False


@dataclass(frozen=True)
class TokenStream:
    """Documents, what of them is held out, and the tokenizer: all that is needed to make lanes.

    Args:
        length: T, the model's context.
        seed: of the order of the parts.
    """

    documents: Documents
    split: Split
    tokenizer: Tokenizer
    length: int
    seed: int

    @property
    def n_lanes(self) -> int:
        """How many lanes there are: never more than parts."""
        return min(LANES, self.documents.n_parts)

    def parts(self, lane: int, epoch: int) -> NDArray[np.int64]:
        """The parts that ``lane`` reads in ``epoch``, in this order."""
        return permutation(self.seed, epoch, self.documents.n_parts)[lane :: self.n_lanes]

    def lane(self, number: int, position: Position) -> Lane:
        """Lane ``number`` from ``position`` on."""
        return Lane(self, number, position)


class Lane:
    """Makes the sequences of one lane, one chunk after the other."""

    def __init__(self, stream: TokenStream, number: int, position: Position) -> None:
        self.stream, self.number = stream, number
        self.epoch = position.epoch
        self._skip = position.skip
        self._pieces = self._read(position)
        self._rest: deque[tuple[Position, NDArray[np.int32]]] = deque()  # tokens that fill no sequence yet
        self._n_rest = 0
        self._oddities: Counter[str] = Counter()

    def chunk(self, epoch: int) -> Chunk:
        """The next sequences of ``epoch``: none when they were all made, and ``ends_epoch`` with the last."""
        sequences, positions, n_tokens = [], [], 0
        while self.epoch < epoch:  # what is left of an earlier epoch fills no sequence
            self._fill()
        if self.epoch == epoch:
            n_tokens = self._fill()
        while self._n_rest > self.stream.length:
            sequences.append(self._cut())
            positions.append([*self._rest[0][0]])
        return Chunk(
            self.number, epoch,
            np.array(sequences, np.int32).reshape(-1, self.stream.length + 1),
            np.array(positions, np.int64).reshape(-1, len(Position._fields)),
            n_tokens, self._taken_oddities(), self.epoch > epoch,
        )  # fmt: skip

    def _fill(self) -> int:
        """Tokenises about CHUNK_CHARACTERS, or up to the end of the epoch; returns the number of tokens."""
        batch: list[tuple[Position, Piece]] = []
        size = 0
        for place in self._pieces:
            if place is None:
                self.epoch += 1
                break
            batch.append(place)
            size += len(place[1].text)
            if size >= CHUNK_CHARACTERS:
                break
        n_tokens = 0
        texts = [piece.text for _, piece in batch]
        if nuls := sum(text.count("\0") for text in texts):
            self._oddities[NULS] += nuls
        encoded = self.stream.tokenizer.encode_batch(texts)
        for (position, piece), ids in zip(batch, encoded, strict=True):
            tokens = np.array([*ids, self.stream.tokenizer.eot_id] if piece.ends_document else ids, np.int32)
            n_tokens += len(tokens)
            self._add(position, tokens)
        return n_tokens

    def _taken_oddities(self) -> Counter[str]:
        taken, self._oddities = self._oddities, Counter()
        return taken

    def _add(self, position: Position, tokens: NDArray[np.int32]) -> None:
        tokens, skipped = tokens[self._skip :], self._skip
        self._skip = 0
        if len(tokens):
            self._rest.append((position._replace(skip=skipped), tokens))
            self._n_rest += len(tokens)

    def _cut(self) -> NDArray[np.int32]:
        """Takes the next T tokens away and returns them with the one behind them, which opens the next sequence."""
        need, parts = self.stream.length, []
        self._n_rest -= need
        while need:
            position, tokens = self._rest.popleft()
            if len(tokens) > need:
                left = position._replace(skip=position.skip + need)
                self._rest.appendleft((left, tokens[need:]))
            parts.append(tokens[:need])
            need -= len(parts[-1])
        parts.append(self._rest[0][1][:1])
        return np.concatenate(parts)

    def _read(self, start: Position) -> Iterator[tuple[Position, Piece] | None]:
        """Every piece to train on, epoch after epoch, and None behind the last of each epoch."""
        epoch, ordinal, cursor = start.epoch, start.ordinal, start.cursor
        while True:
            parts = self.stream.parts(self.number, epoch)
            for number in range(ordinal, len(parts)):
                part = int(parts[number])
                pieces = self.stream.documents.read(part, cursor)
                for held_out, piece in divide(pieces, part, self.stream.split):
                    if is_blank(piece):
                        self._oddities[NO_TEXT] += 1
                    elif not held_out:
                        yield Position(epoch, number, *piece.cursor), piece
                cursor = START
            yield None
            epoch, ordinal = epoch + 1, 0


class LaneReader:
    """Answers requests for chunks of lanes; a worker process has one of its own.

    A map-style data set for torch's DataLoader whose index is a pair of lane and epoch: each lane must always be
    asked in the same process, and its epochs in their order.
    """

    def __init__(self, stream: TokenStream, positions: dict[int, Position]) -> None:
        self._stream, self._positions = stream, positions
        self._lanes: dict[int, Lane] = {}

    def __getitem__(self, request: tuple[int, int]) -> Chunk:
        number, epoch = request
        if number not in self._lanes:
            self._lanes[number] = self._stream.lane(number, self._positions[number])
        return self._lanes[number].chunk(epoch)
