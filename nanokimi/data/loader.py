"""Endless batches in a seeded order whose position is one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nanokimi.data.batch import Batch
from nanokimi.data.packing import PackedSequences
from nanokimi.data.shuffle import permutation
from nanokimi.data.workers import read_ahead
from nanokimi.errors import UserError

# B batch, T sequence length


class Loader(Protocol):
    """Batches without end, and a position that can be saved: what training sees of any source.

    Attributes:
        oddities: what was met in the data that the user should hear of, and how often.
    """

    @property
    def warnings(self) -> Counter[str]:
        """See above."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; what was merely read ahead does not count."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position: of this rank, or of all of them (``merge_states``)."""

    def go_near(self, state: dict[str, Any]) -> None:
        """Goes to about the place that ``state`` had in other data."""


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state out of those of all ranks, in their order; any number of ranks can go on from it."""
    merged = dict(states[0])
    if "ranks" in merged:
        merged["ranks"] = [own for state in states for own in state["ranks"]]
    if "sources" in merged:
        merged["sources"] = {name: merge_states([s["sources"][name] for s in states]) for name in merged["sources"]}
    return merged


class BatchLoader:
    """Iterates forever over batches; epoch after epoch, each in an order of its own.

    Sample k of a run is ``permutation(seed, epoch=k // n)[k % n]``, whatever the number of workers and ranks: every
    B samples go to the next rank, and a batch may straddle two epochs. So the position is k alone, and a resume
    finds it exactly.

    Args:
        sequences: n sequences of one length.
        batch_size: B, of one rank.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: page-locked batches, for copies to a GPU that overlap with computing.
        eot_id: see ``Batch.of_rows``.
        rank, world_size: this process and how many share the data.

    Attributes:
        samples: k, sequences handed out so far to all ranks (those merely read ahead do not count).
        oddities: none: tokens were looked at when they were made.

    Raises:
        UserError: there are fewer sequences than the batches of all ranks hold.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        batch_size: int,
        *,
        seed: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        eot_id: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(sequences) < batch_size * world_size:
            raise UserError(too_few(batch_size, len(sequences), sequences.length, world_size))
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.num_workers, self.pin_memory, self.eot_id = num_workers, pin_memory, eot_id
        self.rank, self.world_size = rank, world_size
        self.samples = 0
        self.warnings: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on.

        Raises:
            RunError: a worker died or hangs, or a file was truncated.
        """
        together = self.batch_size * self.world_size
        first = self.rank * self.batch_size
        order = _Order(len(self.sequences), together, slice(first, first + self.batch_size), self.seed, self.samples)
        for ids in read_ahead(_Batches(self.sequences), order, self.num_workers):
            self.samples += together
            batch = Batch.of_rows(torch.from_numpy(ids).long(), self.eot_id)
            yield batch.pin_memory() if self.pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on."""
        return {"samples": self.samples, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; iterators made from now on start there.

        Raises:
            UserError: the order of the saved run was another one.
        """
        require_same_order(state, self._order())
        self.samples = state["samples"]

    def go_near(self, state: dict[str, Any]) -> None:
        """Goes as many samples far as the other run was."""
        self.samples = state.get("samples", 0)

    def _order(self) -> dict[str, int]:
        return {"sequences": len(self.sequences), "length": self.sequences.length, "seed": self.seed}


class _Batches(Dataset[NDArray[np.int32]]):
    """Whole batches as arrays, which go through a pipe several times as fast as tensors through shared memory."""

    def __init__(self, sequences: PackedSequences) -> None:
        self.sequences = sequences

    def __getitem__(self, indices: list[int]) -> NDArray[np.int32]:
        return self.sequences.batch(indices)


class _Order:
    """Indices of one rank's part of every joint batch, from sample ``start`` on, without end."""

    def __init__(self, n: int, batch_size: int, part: slice, seed: int, start: int) -> None:
        self.n, self.batch_size, self.part, self.seed, self.start = n, batch_size, part, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.n)
        batch: list[int] = []
        while True:
            for index in permutation(self.seed, epoch, self.n)[position:]:
                batch.append(int(index))
                if len(batch) == self.batch_size:
                    yield batch[self.part]
                    batch = []
            epoch, position = epoch + 1, 0


def evenly_spread(n: int, limit: int) -> list[int]:
    """At most ``limit`` of ``n`` indices, evenly spread, the same every time; 0 takes all."""
    count = min(n, limit) if limit else n
    return [i * n // count for i in range(count)]


def require_same_order(state: dict[str, Any], order: dict[str, int]) -> None:
    """Raises UserError unless a position was saved in the same data, cut in the same way, in the same order."""
    for name, value in order.items():
        if name not in state:
            raise UserError("the saved position is of another kind of source: resume with the same --dataset")
        if state[name] != value:
            raise UserError(
                f"cannot find the saved position in the data: {name} was {state[name]} and is {value} now: "
                "resume with the same text, tokenizer, context, split and --seed"
            )


def too_few(batch_size: int, n_sequences: int, length: int, world_size: int = 1) -> str:
    """The message for fewer sequences than a batch."""
    ranks = f" on {world_size} devices" if world_size > 1 else ""
    return (
        f"--batch_size is {batch_size}{ranks} but the text makes only {n_sequences} sequences of "
        f"{length} tokens: use more text, a smaller batch or a smaller max_seq_length"
    )
