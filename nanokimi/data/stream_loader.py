"""Endless batches out of a stream: lanes in turn, then a shuffle buffer; the whole state can be saved."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanokimi.data.batch import Batch
from nanokimi.data.loader import require_same_order, too_few
from nanokimi.data.packing import too_short
from nanokimi.data.shuffle import draw
from nanokimi.data.stream import Chunk, LaneReader, Position, TokenStream
from nanokimi.data.workers import read_ahead
from nanokimi.errors import UserError

# B batch, T sequence length

Sequence = NDArray[np.int32]


class StreamLoader:
    """Iterates forever over batches of a stream of documents.

    Lanes give one sequence each in turn until all have ended their epoch; what fills no sequence opens the next
    epoch. Each sequence goes through a shuffle buffer, which is emptied at the end of an epoch. The order is the same
    for any number of workers. Ranks share the lanes between them; where there are fewer lanes than ranks, every rank
    reads all and keeps its share.

    Args:
        batch_size: B.
        num_workers: processes that read, parse and tokenise ahead; those that would get no lane are not started.
        pin_memory: page-locked batches, for copies to a GPU that overlap with computing.
        eot_id: see ``Batch.of_rows``.
        shuffle_buffer: sequences among which the next one is drawn; 1 keeps the order.
        rank, world_size: this process and how many share the stream.

    Attributes:
        oddities: what the user should hear of, such as documents without text, as often as it came by.
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_size: int,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        eot_id: int | None = None,
        shuffle_buffer: int = 1024,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.pin_memory, self.eot_id = stream, batch_size, pin_memory, eot_id
        self.capacity, self.rank, self.world_size = shuffle_buffer, rank, world_size
        lanes = range(stream.n_lanes)
        self._lanes = list(lanes[rank::world_size] if stream.n_lanes >= world_size else lanes)
        self._keep_one_of = 1 if stream.n_lanes >= world_size else world_size
        self.num_workers = max(
            (n for n in range(1, num_workers + 1) if len(self._lanes) % n == 0), default=0
        )  # each lane lives in one of them
        self._positions = {lane: Position() for lane in self._lanes}
        self._epochs = dict.fromkeys(self._lanes, 0)  # the one that a lane's next sequence belongs to
        self._turn = 0
        self._buffer: list[Sequence] = []
        self._draws = 0
        self._epoch_over = False  # and nobody was told yet
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
            rows = torch.from_numpy(np.stack([next(sequences) for _ in range(self.batch_size)]).astype(np.int64))
            batch = Batch.of_rows(rows, self.eot_id)
            yield batch.pin_memory() if self.pin_memory else batch

    @property
    def epoch(self) -> int:
        """How many times all of it was read: at the last sequence drawn, which may wait in the shuffle buffer."""
        return min(self._epochs.values())

    # ---- from chunks to batches -----------------------------------------------------------------

    def _shuffled(self) -> Iterator[Sequence]:
        kept = self._kept()
        while True:
            while not self._emptying and len(self._buffer) < self.capacity:
                sequence = next(kept)
                if sequence is None:
                    self._emptying = True
                else:
                    self._buffer.append(sequence)
            if self._buffer:
                at = draw(self.stream.seed, self.rank, self._draws, len(self._buffer))
                self._buffer[at], self._buffer[-1] = self._buffer[-1], self._buffer[at]
                self._draws += 1
                yield self._buffer.pop()
            self._emptying = self._emptying and bool(self._buffer)

    def _kept(self) -> Iterator[Sequence | None]:
        """The sequences of this rank, and None behind the last of each epoch."""
        group: list[Sequence] = []
        for sequence in self._in_turn():
            if sequence is not None:
                group.append(sequence)
            if len(group) == self._keep_one_of:  # a group may reach into the next epoch
                yield group[self.rank % self._keep_one_of]
                group = []
            if self._epoch_over and not group:
                self._epoch_over = False
                yield None

    def _in_turn(self) -> Iterator[Sequence | None]:
        """The sequences of all lanes in turn, and None where there is something new to tell beside them."""
        if self._epoch_over:
            yield None
        chunks = self._chunks()
        queues: dict[int, deque[tuple[Sequence, Position]]] = {lane: deque() for lane in self._lanes}
        ended = dict.fromkeys(self._lanes, -1)  # epoch whose last sequences are in the queue
        from_start = all(position == Position() for position in self._positions.values())
        n_sequences = n_tokens = 0
        while True:
            epoch, lane = self.epoch, self._lanes[self._turn]
            self._turn = (self._turn + 1) % len(self._lanes)
            if self._epochs[lane] > epoch:
                continue
            while not queues[lane] and ended[lane] < epoch:
                chunk = next(chunks)
                queues[chunk.lane].extend(zip(chunk.sequences, map(_position, chunk.positions), strict=True))
                ended[chunk.lane] = max(ended[chunk.lane], chunk.epoch if chunk.ends_epoch else -1)
                n_tokens += chunk.n_tokens
                self.warnings += chunk.warnings
            if queues[lane]:
                n_sequences += 1
                sequence, self._positions[lane] = queues[lane].popleft()
                yield sequence
            else:
                self._epochs[lane] = epoch + 1
                self._epoch_over = self._epoch_over or self.epoch > epoch
                if self._epoch_over:
                    if from_start:
                        self._require_enough(n_sequences, n_tokens)
                    from_start = False
                    yield None

    def _chunks(self) -> Iterator[Chunk]:
        """What the lanes answer, asked in turn: the rotation keeps each of them with one worker."""
        return read_ahead(LaneReader(self.stream, dict(self._positions)), self._requests(), self.num_workers)

    def _requests(self) -> Iterator[tuple[int, int]]:
        while True:
            for lane in self._lanes:
                yield lane, self.epoch

    def _require_enough(self, n_sequences: int, n_tokens: int) -> None:
        """Raises UserError when the first epoch was too short to train on."""
        if n_tokens <= self.stream.length:
            raise UserError(too_short(self.stream.length, n_tokens))
        if n_sequences // self._keep_one_of < self.batch_size:
            raise UserError(too_few(self.batch_size, n_sequences // self._keep_one_of, self.stream.length))

    # ---- the state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, what it depends on, and the shuffle buffer (int32 ``[n, T + 1]``)."""
        empty = np.empty((0, self.stream.length + 1), np.int32)
        own = {
            "lanes": {lane: [self._epochs[lane], *self._positions[lane]] for lane in self._lanes},
            "turn": self._turn,
            "draws": self._draws,
            "epoch_over": self._epoch_over,
            "emptying": self._emptying,
            "buffer": torch.from_numpy(np.stack(self._buffer) if self._buffer else empty),
        }
        return {**self._order(), "ranks": [own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; iterators made from now on start there.

        Args:
            state: of as many ranks as there are now: the rest of the run is the same to the bit. Of another number
                (see ``merge_states``): no sequence is lost or repeated.

        Raises:
            UserError: the order of the saved run was another one.
        """
        require_same_order(state, self._order())
        ranks = state["ranks"]
        same = len(ranks) == self.world_size
        own = ranks[self.rank] if same else _dealt_out(ranks, self.rank, self.world_size)
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
        return {"length": self.stream.length, "seed": self.stream.seed, "parts": self.stream.documents.n_parts}


def _dealt_out(ranks: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The state of one rank of ``world_size``, out of the states of another number of them."""
    lanes: dict[int, list[int]] = {}
    for state in ranks:
        lanes |= state["lanes"]
    return {
        "lanes": lanes,
        "turn": 0,
        "draws": max(state["draws"] for state in ranks),
        "epoch_over": False,
        "emptying": False,
        "buffer": torch.cat([state["buffer"] for state in ranks])[rank::world_size],
    }


def _position(row: NDArray[np.int64]) -> Position:
    return Position(*row.tolist())
