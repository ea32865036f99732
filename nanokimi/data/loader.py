"""Endless batches, from tokens in a seeded order or from several sources, read ahead by worker processes."""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nanokimi.data.batch import Batch, PackedSequences, TokenArray
from nanokimi.errors import RunError, UserError

# B batch, T sequence length

TIMEOUT_SECONDS = 900  # longer than a hub may be silent, whose connections are retried where they are read

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made of a source."""

    length: int  # T, tokens of a sequence
    batch_size: int  # B, sequences of a batch, on each rank
    seed: int  # of the order
    num_workers: int = 0  # processes that read ahead; 0 reads in this one
    pin_memory: bool = False  # page-locked batches, for copies to a GPU that overlap with computing
    eot_id: int | None = None  # see Batch.of_rows
    shuffle_buffer: int = 1024  # sequences of a stream among which the next one is drawn; 1 keeps the order
    rank: int = 0  # this process, of world_size that share the data
    world_size: int = 1

    def batch(self, rows: Tensor) -> Batch:
        """The batch of some sequences ``[B, T + 1]``."""
        batch = Batch.of_rows(rows.long(), self.eot_id)
        return batch.pin_memory() if self.pin_memory else batch


class Loader(Protocol):
    """Batches without end, and a position in the data that can be saved: what training sees of any source.

    Attributes:
        warnings: what was met in the data that the user should hear of, and how often.
    """

    @property
    def warnings(self) -> Counter[str]: ...

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""

    def state_dict(self) -> dict[str, Any]:
        """The position, in plain values and tensors; what was merely read ahead does not count."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position: of this rank, or of all of them (``merge_states``).

        Iterators made from now on start there. UserError if the order of the saved run was another one.
        """

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


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of ``n`` things in ``epoch``; another seed or epoch gives an unrelated one."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class BatchLoader:
    """Iterates forever over batches of tokens; epoch after epoch, each in an order of its own.

    Sample k of a run is ``permutation(seed, epoch=k // n)[k % n]``, whatever the number of workers and ranks: every
    B samples go to the next rank, and a batch may straddle two epochs. So the position is k alone, and a resume
    finds it exactly.

    Attributes:
        sequences: n sequences of T tokens.
        samples: k, sequences handed out so far to all ranks (those merely read ahead do not count).

    Raises:
        UserError: there are fewer sequences than the batches of all ranks hold.
    """

    def __init__(self, tokens: TokenArray | NDArray[Any], options: LoaderOptions) -> None:
        self.sequences, self.options = PackedSequences(tokens, options.length), options
        if len(self.sequences) < options.batch_size * options.world_size:
            raise UserError(too_few(options.batch_size, len(self.sequences), options.length, options.world_size))
        self.samples = 0
        self.warnings: Counter[str] = Counter()  # tokens were looked at when they were made

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on; RunError if a worker died or hangs, or a file was truncated."""
        # Arrays of whole batches go through a pipe several times as fast as tensors through shared memory.
        for rows in read_ahead(self.sequences.batch, self._indices(), self.options.num_workers):
            self.samples += self.options.batch_size * self.options.world_size
            yield self.options.batch(torch.from_numpy(rows))

    def _indices(self) -> Iterator[list[int]]:
        """The sequences of this rank's batches, without end; this runs ahead of ``samples`` where workers do."""
        n, size = len(self.sequences), self.options.batch_size
        first = size * self.options.rank
        epoch, position = divmod(self.samples, n)
        joint: list[int] = []  # the batches of all ranks
        while True:
            for index in permutation(self.options.seed, epoch, n)[position:]:
                joint.append(int(index))
                if len(joint) == size * self.options.world_size:
                    yield joint[first : first + size]
                    joint = []
            epoch, position = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same_order(state, self._order())
        self.samples = state["samples"]

    def go_near(self, state: dict[str, Any]) -> None:
        self.samples = state.get("samples", 0)

    def _order(self) -> dict[str, int]:
        return {"sequences": len(self.sequences), "length": self.options.length, "seed": self.options.seed}


class MixLoader:
    """Batches whose sequences come from several loaders in fixed shares.

    Of the sources that have given less than their share, the next sequence comes from the one that would first lack a
    whole sequence. So after k sequences each has given its weight times k, less than one more or less, on every rank
    (Baruah et al. 1996, Proportionate progress).

    Args:
        sources: by name the weight, above 0, and what makes the source's loader.
    """

    def __init__(
        self, sources: Mapping[str, tuple[float, Callable[[LoaderOptions], Loader]]], options: LoaderOptions
    ) -> None:
        weights = {name: Fraction(str(weight)) for name, (weight, _) in sources.items()}  # 0.7 is meant as 7/10
        self.shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        one = replace(options, batch_size=1, pin_memory=False, eot_id=None)
        self.loaders = {name: loader(one) for name, (_, loader) in sources.items()}
        self.options = options
        self._counts = dict.fromkeys(sources, 0)

    @property
    def warnings(self) -> Counter[str]:
        return sum((loader.warnings for loader in self.loaders.values()), Counter())

    def __iter__(self) -> Iterator[Batch]:
        sources = {name: iter(loader) for name, loader in self.loaders.items()}
        while True:
            rows = [next(sources[self._next()]).rows() for _ in range(self.options.batch_size)]
            yield self.options.batch(torch.cat(rows))

    def _next(self) -> str:
        reached = sum(self._counts.values()) + 1
        short = [name for name, share in self.shares.items() if share * reached > self._counts[name]]
        name = min(short, key=lambda name: (self._counts[name] + 1) / self.shares[name])
        self._counts[name] += 1
        return name

    def state_dict(self) -> dict[str, Any]:
        sources = {name: loader.state_dict() for name, loader in self.loaders.items()}
        return {"counts": dict(self._counts), "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["sources"][name])
        self._counts = dict(state["counts"])

    def go_near(self, state: dict[str, Any]) -> None:
        for name, loader in self.loaders.items():
            if name in state.get("sources", {}):
                loader.go_near(state["sources"][name])


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


# ---- worker processes ---------------------------------------------------------------------------


def read_ahead(read: Callable[[Asked], Answer], wanted: Iterable[Asked], num_workers: int) -> Iterator[Answer]:
    """``read(item)`` for each item that is ``wanted``, in their order; item i is read by worker i modulo their number.

    Two items per worker are on their way: enough to hide a slow one, and few enough for memory, and for the items that
    are read twice when a run is stopped and goes on. With ``num_workers`` 0 this process reads.

    Args:
        read: gives arrays; each worker has a copy of it, as it was at the start.

    Raises:
        RunError: a worker died or hangs; UserError and RunError also as ``read`` raises them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores: a run says so itself
            loader: DataLoader[Any] = DataLoader(
                _Reader(read),
                sampler=wanted,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=num_workers,
                timeout=TIMEOUT_SECONDS if num_workers else 0,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # or it would draw from the run's random numbers
            )
            answers = iter(loader)
        for answer in answers:
            if isinstance(answer, (UserError, RunError)):
                raise answer
            yield answer
    except RuntimeError as error:
        if not num_workers:
            raise
        reason = str(error).strip().splitlines()[-1]  # the line after the worker's traceback
        raise RunError(f"a data worker failed ({reason}): lower --num_workers") from error


class _Reader(Dataset[Any]):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.read(item)
        except (UserError, RunError) as error:
            return error  # raised in a worker it would come wrapped in a traceback


def _unchanged(answer: Any) -> Any:  # a lambda could not be sent to a worker that is not forked
    return answer


def _begin_worker(worker: int) -> None:
    # Ctrl-C and a terminal that is closed reach the whole process group: the parent ends its workers after the step.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers themselves are what is parallel
