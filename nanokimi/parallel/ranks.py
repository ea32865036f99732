"""The ranks of a run, what stops them together, and a model as it lies on them. One process asks nobody."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanokimi.errors import RunError, UserError
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import Orthogonalise
from nanokimi.parallel.layout import ONE, Layout

Read = TypeVar("Read")


class Ranks:
    """The processes of a run, and what they tell each other besides tensors: through host memory, by gloo.

    Attributes:
        rank, size: number of this process, and how many there are.
        local, on_this_machine: number of this process on its machine, and how many there are.
        launched: whether by ``torchrun``: then there is a process group, also of one rank.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local: int = 0, on_this_machine: int = 1, *, launched: bool = False
    ) -> None:
        self.rank, self.size, self.local, self.on_this_machine = rank, size, local, on_this_machine
        self.launched = launched

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        self.max([0.0])

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], by: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, by)
        return numbers.tolist()

    def gather(self, data: bytes) -> list[bytes]:
        """The data of every rank, in their order, on all of them."""
        return [data] if self.size == 1 else gather(data)

    def broadcast(self, data: bytes | None) -> bytes:
        """The main rank's ``data``, on all ranks."""
        return self.gather(data or b"")[0]

    @contextmanager
    def first_of_machine_first(self) -> Iterator[None]:
        """One rank of each machine runs the block before the others do, which find what it left in caches."""
        if self.local > 0:
            self.barrier()
        yield
        if self.local == 0:
            self.barrier()


def current_ranks() -> Ranks:
    """The ranks of the process group that this process has joined; without one it is a run of its own."""
    if not dist.is_initialized():
        return Ranks()
    local, on_this_machine = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), local, on_this_machine, launched=True)


def gather(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """``data`` of every rank of ``group`` (None: of all), in their order, on all of them; through host memory."""
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
    lengths[dist.get_rank(group)] = len(data)
    dist.all_reduce(lengths, group=group)
    padded = torch.zeros(max(1, int(lengths.max())), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
    everyone = padded.new_empty(len(lengths), len(padded))
    dist.all_gather(list(everyone), padded, group=group)
    return [row[:length].numpy().tobytes() for row, length in zip(everyone, lengths.tolist(), strict=True)]


def to_bytes(state: object) -> bytes:
    """Plain values and tensors, to be sent to other ranks."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """Takes ``to_bytes`` back; nothing in it is executed."""
    return torch.load(io.BytesIO(data), weights_only=True)


class HangWatch:
    """Writes the stack of every thread to a file when no step ends for half the ``timeout`` after which ranks give up.

    Args:
        folder: gets ``stacks_rank_N.txt``, which is removed unless there was a hang.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        ranks = current_ranks()
        self._seconds = timeout / 2
        self._path = folder / f"stacks_rank_{ranks.rank}.txt" if ranks.size > 1 else None
        self._file: TextIO | None = None

    def __enter__(self) -> HangWatch:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
        self.alive()
        return self

    def alive(self) -> None:
        """A step has ended: the time begins anew."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._path is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            with suppress(FileNotFoundError):  # the folder may be gone
                if not self._path.stat().st_size:
                    self._path.unlink()


class StopSignals:
    """While active: SIGINT, SIGTERM and SIGHUP ask the run to save and stop, SIGUSR1 asks it to save and go on.

    Signals set a flag, which the loop looks at between two steps. A second SIGINT raises KeyboardInterrupt at once;
    what was saved before stays intact. A SIGHUP that was ignored when the process began (``nohup``) stays ignored.

    Attributes:
        stop: number of the signal that asked to stop, or None.
        save: whether SIGUSR1 came since this was last cleared.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._ranks = current_ranks()
        self._came = {"stop": 0, "save": 0}  # to this process, since the last look
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        keeps_hup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *[signal.SIGHUP] * keeps_hup):
            self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def look(self) -> None:
        """Notes what has come to any rank; so all ranks stop at the same step."""
        came, self._came = self._came, {"stop": 0, "save": 0}
        stop, save = self._ranks.max([came["stop"], came["save"]])
        self.stop = self.stop or int(stop) or None
        self.save = self.save or bool(save)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._came["save"] = 1
            return
        self._came["stop"] = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def read_or_save(read: Callable[[], Read], save: Callable[[], str], ranks: Ranks) -> Read:
    """What ``read`` takes from the data. All ranks call it; where it fails on any, all save the run, which ends.

    Args:
        save: saves the run; returns what the user should know of it, to be said after what is wrong.

    Raises:
        UserError, RunError: as ``read`` raises them.
        LostContact: it was another rank that failed, and told.
    """
    failure: UserError | RunError | None = None
    try:
        found = read()
    except (UserError, RunError) as error:
        failure = error
    if not ranks.max([failure is not None])[0]:
        return found
    note = save()
    if failure is not None:
        raise type(failure)(f"{failure}{note}") from failure
    ranks.barrier()  # which never comes: the rank that failed ends without it
    raise RunError("the data of another rank cannot be read")


class ParallelModel(Protocol):
    """A model on the ranks of a run.

    Attributes:
        model: its module on this rank.
    """

    ranks: Ranks
    layout: Layout
    model: Transformer

    @property
    def orthogonalise(self) -> Orthogonalise | None:
        """Muon's orthogonalisation as these ranks share it, for ``MuonClip``; None: each does all of it."""

    def training_module(self, compiled: bool) -> nn.Module:
        """``model`` as it is called for this rank's sequences; its gradients become the mean over the ranks."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around one forward and backward pass of a step; ``last``: no other follows in this step."""

    def clip_gradients(self, limit: float) -> Tensor:
        """Scales the gradients down to the norm ``limit``; returns the norm they had over all ranks, a scalar."""

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """The sum of ``numbers`` over all ranks, in place; without waiting for the device."""

    def shard_rows(self, parameter: Tensor, shard: int) -> slice:
        """The rows, of the first dimension, that shard rank ``shard`` of a replica holds of ``parameter``."""

    def as_dtensor(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, the rows here of the parameter or buffer ``name``, as a part of the whole one (a DTensor)."""

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of each tensor, in host memory of the main rank; elsewhere nothing. All ranks call it."""

    def copy_rows(self, name: str, here: Tensor, whole: Tensor) -> None:
        """Copies into ``here`` its rows of ``whole``, a value for all of the parameter or buffer ``name``."""


class SingleDevice:
    """A model on one device: nothing is shared."""

    orthogonalise: Orthogonalise | None = None

    def __init__(self, model: Transformer, ranks: Ranks | None = None, layout: Layout = ONE) -> None:
        self.model, self.ranks, self.layout = model, ranks or Ranks(), layout

    def training_module(self, compiled: bool) -> nn.Module:
        return cast(nn.Module, torch.compile(self.model)) if compiled else self.model

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def clip_gradients(self, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True)

    def all_reduce(self, numbers: Tensor) -> Tensor:
        return numbers

    def shard_rows(self, parameter: Tensor, shard: int) -> slice:
        return slice(0, len(parameter))

    def as_dtensor(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def copy_rows(self, name: str, here: Tensor, whole: Tensor) -> None:
        here.copy_(whole)
