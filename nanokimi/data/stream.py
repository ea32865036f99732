"""Endless batches out of documents that are read and tokenised while training goes on, from any position on.

The parts of a source are distributed to a fixed number of lanes. A lane reads its parts one after the other and cuts
what it reads into sequences; those go through a shuffle buffer and become batches. Which sequences a lane makes depends
on the data and the seed alone, so any process can make them, and a lane's position is a handful of numbers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nanokimi.data.batch import Batch, too_short
from nanokimi.data.documents import START, Cursor, Piece, Text, is_blank
from nanokimi.data.loader import LoaderOptions, permutation, read_ahead, require_same_order, too_few
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError

LANES = 8
CHUNK_CHARACTERS = 1 << 16
DRAWS = 1024  # of one random generator

NO_TEXT = "documents without text were passed over"
NULS = "NUL bytes were in the data: is it really text?"

# B batch, T sequence length

Sequence = NDArray[np.int32]


class Position(NamedTuple):
    """Where a sequence begins: ``skip`` tokens after the start of a piece."""

    epoch: int = 0
    ordinal: int = 0  # which of the lane's parts of the epoch
    span: int = 0  # this and the next two: the Cursor of the piece in that part
    at: int = 0
    piece: int = 0
    skip: int = 0


class Chunk(NamedTuple):
    """What a lane makes at a time."""

    lane: int
    epoch: int  # that the lane reads next: of those before it there is nothing more
    sequences: NDArray[np.int32]  # [n, T + 1], ids (they stay below 2^31)
    positions: NDArray[np.int64]  # [n, 6], for each sequence the Position of the next one
    n_tokens: int  # that were read, whether or not they filled a sequence
    warnings: Counter[str]  # how often something was met that the user should hear of


@dataclass
class LaneReader:
    """Makes chunks of any lane, each from its position on; a worker process has a copy of its own.

    An open lane is a state: files that are open, tokens that fill no sequence yet. So one worker must make all chunks
    of a lane, in their order. Of ``options``, only T and the seed change what a lane makes.
    """

    text: Text
    tokenizer: Tokenizer
    options: LoaderOptions
    positions: dict[int, Position] = field(default_factory=dict)
    _open: dict[int, Lane] = field(default_factory=dict, init=False)

    @property
    def n_lanes(self) -> int:
        """How many lanes there are: never more than parts."""
        return min(LANES, self.text.documents.n_parts)

    def parts(self, lane: int, epoch: int) -> NDArray[np.int64]:
        """The parts that ``lane`` reads in ``epoch``, in this order."""
        return permutation(self.options.seed, epoch, self.text.documents.n_parts)[lane :: self.n_lanes]

    def chunk(self, wanted: tuple[int, int]) -> Chunk:
        """The next chunk of the lane ``wanted[0]`` in the epoch ``wanted[1]``: empty once the lane has ended it."""
        number, epoch = wanted
        if number not in self._open:
            self._open[number] = Lane(self, number, self.positions[number])
        return self._open[number].chunk(epoch)


class Lane:
    """Makes the sequences of one lane, one chunk after the other."""

    def __init__(self, reader: LaneReader, number: int, position: Position) -> None:
        self.reader, self.number = reader, number
        self.epoch = position.epoch
        self._skip = position.skip
        self._pieces = self._read(position)
        self._rest: deque[tuple[Position, Sequence]] = deque()  # tokens that fill no sequence yet
        self._n_rest = 0
        self._warnings: Counter[str] = Counter()

    def chunk(self, epoch: int) -> Chunk:
        """The next sequences of ``epoch``: none when they were all made."""
        length, sequences, positions, n_tokens = self.reader.options.length, [], [], 0
        while self.epoch < epoch:  # what is left of an earlier epoch fills no sequence
            self._fill()
        if self.epoch == epoch:
            n_tokens = self._fill()
        while self._n_rest > length:
            sequences.append(self._cut(length))
            positions.append(self._rest[0][0])
        warnings, self._warnings = self._warnings, Counter()
        rows = np.array(sequences, np.int32).reshape(-1, length + 1)
        nexts = np.array(positions, np.int64).reshape(-1, len(Position._fields))
        return Chunk(self.number, self.epoch, rows, nexts, n_tokens, warnings)

    def _fill(self) -> int:
        """Tokenises about CHUNK_CHARACTERS, or up to the end of the epoch; returns the number of tokens."""
        batch: list[tuple[Position, Piece]] = []
        size = n_tokens = 0
        while size < CHUNK_CHARACTERS:
            found = next(self._pieces)
            if found is None:
                self.epoch += 1
                break
            batch.append(found)
            size += len(found[1].text)
        texts = [piece.text for _, piece in batch]
        if nuls := sum(text.count("\0") for text in texts):
            self._warnings[NULS] += nuls
        eot_id = self.reader.tokenizer.eot_id
        for (position, piece), ids in zip(batch, self.reader.tokenizer.encode_batch(texts), strict=True):
            tokens = np.array([*ids, eot_id] if piece.ends_document else ids, np.int32)
            n_tokens += len(tokens)
            if len(tokens) > self._skip:
                self._rest.append((position._replace(skip=self._skip), tokens[self._skip :]))
                self._n_rest += len(tokens) - self._skip
            self._skip = 0
        return n_tokens

    def _cut(self, length: int) -> Sequence:
        """Takes the next T tokens away and returns them with the one after them, which opens the next sequence."""
        need, taken = length, []
        self._n_rest -= need
        while need:
            position, tokens = self._rest.popleft()
            if len(tokens) > need:
                self._rest.appendleft((position._replace(skip=position.skip + need), tokens[need:]))
            taken.append(tokens[:need])
            need -= len(taken[-1])
        return np.concatenate([*taken, self._rest[0][1][:1]])

    def _read(self, start: Position) -> Iterator[tuple[Position, Piece] | None]:
        """Every piece to train on, epoch after epoch, and None after the last of each epoch."""
        epoch, ordinal, cursor = start.epoch, start.ordinal, Cursor(start.span, start.at, start.piece)
        while True:
            parts = self.reader.parts(self.number, epoch)
            for number in range(ordinal, len(parts)):
                for held_out, piece in self.reader.text.read(int(parts[number]), cursor):
                    if is_blank(piece):
                        self._warnings[NO_TEXT] += 1
                    elif not held_out:
                        yield Position(epoch, number, *piece.cursor), piece
                cursor = START
            yield None
            epoch, ordinal = epoch + 1, 0


class StreamLoader:
    """Iterates forever over batches of a stream of documents.

    Lanes give one sequence each in turn until all have ended their epoch; what fills no sequence opens the next
    epoch. Each sequence goes through a shuffle buffer, which is emptied at the end of an epoch. The order is the same
    for any number of workers. Ranks share the lanes between them; where there are fewer lanes than ranks, every rank
    reads all and keeps its share.

    Attributes:
        num_workers: as many of those wanted as can each have the same number of lanes.
        warnings: such as documents without text, as often as they came by.
    """

    def __init__(self, text: Text, tokenizer: Tokenizer, options: LoaderOptions) -> None:
        self.reader, self.options = LaneReader(text, tokenizer, options), options
        n_lanes, rank, world_size = self.reader.n_lanes, options.rank, options.world_size
        self._lanes = list(range(n_lanes)[rank::world_size] if n_lanes >= world_size else range(n_lanes))
        self._keep_one_of = 1 if n_lanes >= world_size else world_size
        # Item i goes to worker i modulo their number: a lane stays with one worker if that number divides the lanes.
        fitting = (n for n in range(1, options.num_workers + 1) if len(self._lanes) % n == 0)
        self.num_workers = max(fitting, default=0)
        self._positions = {lane: Position() for lane in self._lanes}
        self._epochs = dict.fromkeys(self._lanes, 0)  # the one that a lane's next sequence belongs to
        self._turn = 0
        self._buffer: list[Sequence] = []
        self._draws = 0
        self._epoch_over = False  # and ``_kept`` has not passed it on yet
        self._emptying = False
        self.warnings: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on.

        Raises:
            UserError: the data cannot be read, or an epoch of it does not fill a sequence or a batch.
            RunError: the network or a worker failed for good.
        """
        sequences = self._shuffled()
        while True:
            rows = np.stack([next(sequences) for _ in range(self.options.batch_size)])
            yield self.options.batch(torch.from_numpy(rows))

    @property
    def epoch(self) -> int:
        """How many times all of it was read: at the last sequence drawn, which may wait in the shuffle buffer."""
        return min(self._epochs.values())

    # ---- from chunks to batches -----------------------------------------------------------------

    def _shuffled(self) -> Iterator[Sequence]:
        kept = self._kept()
        while True:
            while not self._emptying and len(self._buffer) < self.options.shuffle_buffer:
                sequence = next(kept)
                if sequence is not None:
                    self._buffer.append(sequence)
                self._emptying = sequence is None
            if self._buffer:
                at = draw(self.options.seed, self.options.rank, self._draws, len(self._buffer))
                self._buffer[at], self._buffer[-1] = self._buffer[-1], self._buffer[at]
                self._draws += 1
                yield self._buffer.pop()
            self._emptying = self._emptying and bool(self._buffer)

    def _kept(self) -> Iterator[Sequence | None]:
        """The sequences of this rank, and None after the last of each epoch."""
        group: list[Sequence] = []
        for sequence in self._in_turn():
            if sequence is not None:
                group.append(sequence)
            if len(group) == self._keep_one_of:  # a group may reach into the next epoch
                yield group[self.options.rank % self._keep_one_of]
                group = []
            if self._epoch_over and not group:
                self._epoch_over = False
                yield None

    def _in_turn(self) -> Iterator[Sequence | None]:
        """The sequences of all lanes in turn, and None where an epoch is over.

        The loader's state moves with each sequence that is handed out, never with what workers made ahead.
        """
        if self._epoch_over:
            yield None
        reader = replace(self.reader, positions=dict(self._positions))
        wanted = (
            (lane, self.epoch) for lane in cycle(self._lanes)
        )  # a chunk of an epoch that its lane has ended is empty
        chunks = read_ahead(reader.chunk, wanted, self.num_workers)
        queues: dict[int, deque[tuple[Sequence, NDArray[np.int64]]]] = {lane: deque() for lane in self._lanes}
        reached = dict.fromkeys(self._lanes, 0)  # the epoch up to which all sequences are in the queue, or were
        from_start = all(position == Position() for position in self._positions.values())
        n_sequences = n_tokens = 0
        while True:
            epoch, lane = self.epoch, self._lanes[self._turn]
            self._turn = (self._turn + 1) % len(self._lanes)
            if self._epochs[lane] > epoch:
                continue
            # Chunks come lane after lane, whichever is short of sequences: those of other lanes wait in their queues.
            while not queues[lane] and reached[lane] <= epoch:
                chunk = next(chunks)
                queues[chunk.lane].extend(zip(chunk.sequences, chunk.positions, strict=True))
                reached[chunk.lane] = chunk.epoch
                n_tokens += chunk.n_tokens
                self.warnings += chunk.warnings
            if queues[lane]:
                n_sequences += 1
                sequence, position = queues[lane].popleft()
                self._positions[lane] = Position(*position.tolist())
                yield sequence
                continue
            self._epochs[lane] = epoch + 1
            self._epoch_over = self._epoch_over or self.epoch > epoch
            if self._epoch_over:
                if from_start:
                    self._require_enough(n_sequences // self._keep_one_of, n_tokens)
                from_start = False
                yield None

    def _require_enough(self, n_sequences: int, n_tokens: int) -> None:
        if n_tokens <= self.options.length:
            raise UserError(too_short(self.options.length, n_tokens))
        if n_sequences < self.options.batch_size:
            raise UserError(too_few(self.options.batch_size, n_sequences, self.options.length))

    # ---- the state ------------------------------------------------------------------------------

    def mark(self) -> Callable[[], dict[str, Any]]:
        then = copy(self)
        then._positions, then._epochs, then._buffer = dict(self._positions), dict(self._epochs), list(self._buffer)
        return then.state_dict

    def state_dict(self) -> dict[str, Any]:
        """The position, what it depends on, and the shuffle buffer (int32 ``[n, T + 1]``)."""
        buffer = np.array(self._buffer, np.int32).reshape(-1, self.options.length + 1)
        own = {
            "lanes": {lane: [self._epochs[lane], *self._positions[lane]] for lane in self._lanes},
            "turn": self._turn,
            "draws": self._draws,
            "epoch_over": self._epoch_over,
            "emptying": self._emptying,
            "buffer": torch.from_numpy(buffer),
        }
        return {**self._order(), "ranks": [own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position: on as many ranks to the bit, on others so that no sequence is lost or repeated."""
        require_same_order(state, self._order())
        ranks, rank, world_size = state["ranks"], self.options.rank, self.options.world_size
        own = ranks[rank] if len(ranks) == world_size else _dealt_out(ranks, rank, world_size)
        for lane in self._lanes:
            self._epochs[lane], *position = own["lanes"][lane]
            self._positions[lane] = Position(*position)
        self._turn, self._draws = own["turn"], own["draws"]
        self._epoch_over, self._emptying = own["epoch_over"], own["emptying"]
        self._buffer = list(own["buffer"].numpy())

    def go_near(self, state: dict[str, Any]) -> None:
        """Goes to the place of the same number where this stream is laid out alike, else to the start."""
        with suppress(UserError, KeyError):
            self.load_state_dict(state)

    def _order(self) -> dict[str, int]:
        parts = self.reader.text.documents.n_parts
        return {"length": self.options.length, "seed": self.options.seed, "parts": parts}


def _dealt_out(ranks: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The state of one rank of ``world_size``, out of the states of another number of them."""
    return {
        "lanes": {lane: position for state in ranks for lane, position in state["lanes"].items()},
        "turn": 0,
        "draws": max(state["draws"] for state in ranks),
        "epoch_over": False,
        "emptying": False,
        "buffer": torch.cat([state["buffer"] for state in ranks])[rank::world_size],
    }


def draw(seed: int, rank: int, number: int, n: int) -> int:
    """Draw ``number`` of a row of random indices below ``n``: the number is all that has to be saved."""
    return int(_uniform(seed, rank, number // DRAWS)[number % DRAWS] * n)


@lru_cache(maxsize=16)
def _uniform(seed: int, rank: int, block: int) -> NDArray[np.float64]:
    return np.random.default_rng([seed, rank, block, DRAWS]).random(DRAWS)
