"""Endless batches in a seeded order whose position is one number."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from nanokimi.data.packing import PackedSequences
from nanokimi.errors import RunError, UserError

WORKER_TIMEOUT_SECONDS = 300


class BatchLoader:
    """Iterates forever over batches, int64 [B, T + 1]; epoch after epoch, each in an order of its own.

    Sample k of a run is ``permutation(seed, epoch=k // n)[k % n]``, whatever the number of workers, and a batch
    may straddle two epochs: so the position is k alone, and a resume finds it exactly.

    Args:
        sequences: n sequences of one length.
        batch_size: B.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: page-locked batches, for copies to a GPU that overlap with computing.

    Attributes:
        samples: k, sequences handed out so far (those merely read ahead do not count).

    Raises:
        UserError: there are fewer sequences than a batch holds.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        batch_size: int,
        *,
        seed: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if len(sequences) < batch_size:
            raise UserError(
                f"--batch_size is {batch_size} but the text makes only {len(sequences)} sequences of "
                f"{sequences.length} tokens: use more text, a smaller batch or a smaller max_seq_length"
            )
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.samples = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Batches from the present position on.

        Raises:
            RunError: a worker died or hangs.
        """
        order = _Order(len(self.sequences), self.batch_size, self.seed, self.samples)
        batches = iter(
            DataLoader(
                self.sequences,
                batch_sampler=order,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                timeout=WORKER_TIMEOUT_SECONDS if self.num_workers else 0,
                worker_init_fn=_leave_signals_to_the_parent,
                generator=torch.Generator(),  # or it would draw from the run's random numbers
            )
        )
        while True:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if not self.num_workers:
                    raise
                reason = str(error).strip().splitlines()[-1]  # behind the worker's traceback
                raise RunError(f"a data worker failed ({reason}): lower --num_workers") from error
            self.samples += self.batch_size
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, and what it depends on."""
        return {"samples": self.samples, "sequences": len(self.sequences), "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved position; iterators made from now on start there.

        Raises:
            UserError: the order of the saved run was another one.
        """
        for name, value in (("sequences", len(self.sequences)), ("seed", self.seed)):
            if state[name] != value:
                raise UserError(
                    f"cannot find the saved position in the data: {name} was {state[name]} and is {value} now: "
                    "resume with the same text, tokenizer, context, split and --seed"
                )
        self.samples = state["samples"]


class _Order(Sampler[list[int]]):
    """Indices of every batch, from sample ``start`` on, without end."""

    def __init__(self, n: int, batch_size: int, seed: int, start: int) -> None:
        self.n, self.batch_size, self.seed, self.start = n, batch_size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.n)
        batch: list[int] = []
        while True:
            for index in permutation(self.seed, epoch, self.n)[position:]:
                batch.append(int(index))
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            epoch, position = epoch + 1, 0


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of ``n`` sequences in ``epoch``; another seed or epoch gives an unrelated one."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def evenly_spread(n: int, limit: int) -> list[int]:
    """At most ``limit`` of ``n`` indices, evenly spread, the same every time; 0 takes all."""
    count = min(n, limit) if limit else n
    return [i * n // count for i in range(count)]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole group: the parent ends its workers once the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
