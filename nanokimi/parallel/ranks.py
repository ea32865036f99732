"""The processes of one run, as ``torchrun`` starts them, and what they tell each other beside the training itself."""

from __future__ import annotations

import faulthandler
import io
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist

from nanokimi.console import let_others_speak, mute
from nanokimi.errors import RunError, UserError

T = TypeVar("T")

# What torch's backends say, in their own words, when another process is gone or does not come.
LOST = ("connection closed", "connection reset", "connection refused", "timed out", "timeout", "broken pipe")
LOST_TYPES = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class Ranks:
    """The ranks of a run. One process is a run of one rank, for which nothing here costs anything.

    Numbers and bytes travel between hosts' memories (gloo); the device has its own paths.

    Attributes:
        rank, size: this process, and how many there are.
        local, on_this_machine: number of this process on its machine, and how many there are.
        launched: whether by ``torchrun``: there is a process group, also of one rank.
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
        self.largest([0.0])

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Sequence[float], by: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, by)
        return numbers.tolist()

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, in their order, on all of them."""
        return [data] if self.size == 1 else gather(data)

    def given(self, data: bytes | None) -> bytes:
        """The leader's ``data``, on all ranks."""
        return self.gather(data or b"")[0]

    def run_or_fail_together(self, act: Callable[[], T]) -> T:
        """``act()``; if it fails on any rank with a UserError or RunError, all end with that error.

        ``act`` must not wait for other ranks itself.

        Raises:
            UserError, RunError: that of the first rank that failed, on the leader.
            SystemExit: the same on the other ranks, silently.
        """
        result, failure = None, b""
        try:
            result = act()
        except (UserError, RunError) as error:
            if self.size == 1:
                raise
            failure = f"{type(error).__name__}\n{error}".encode()
        for rank, told in enumerate(self.gather(failure)):
            if told:
                self._end(rank, told.decode())
        return result  # type: ignore[return-value]

    def _end(self, rank: int, told: str) -> None:
        name, message = told.split("\n", 1)
        run_time = name == RunError.__name__
        if not self.is_main:
            raise SystemExit(1 if run_time else 2)
        message = f"rank {rank}: {message}" if rank else message
        raise RunError(message) if run_time else UserError(message)

    def in_turn(self, act: Callable[[], T]) -> T:
        """``act()`` first on one rank of each machine, then on the others: what the first leaves in caches, they find.

        Raises:
            UserError, RunError, SystemExit: see ``agreed``.
        """
        first = self.run_or_fail_together(lambda: act() if self.local == 0 else None)
        others = self.run_or_fail_together(lambda: act() if self.local > 0 else None) if self.size > 1 else None
        return first if self.local == 0 else others  # type: ignore[return-value]


ALONE = Ranks()


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started with this process; one that was started alone is its own.

    Args:
        device: as for ``--device``: decides how tensors travel.
        timeout: seconds that a rank waits for the others.

    Raises:
        RunError: contact with another rank was lost, or the others did not come.
        SystemExit: an error of a rank that does not lead, after it was told.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, on_this_machine = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    ranks = Ranks(rank, size, local, on_this_machine, launched=True)
    if not ranks.is_main:
        mute()
    try:
        with contact_lost_explained():
            _join(ranks, device, timeout)
            yield ranks
    except (UserError, RunError) as error:
        if ranks.is_main:
            raise
        print(f"nanokimi: rank {rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from error
    except SystemExit:
        let_others_speak()
        raise
    dist.destroy_process_group()


def _join(ranks: Ranks, device: str, timeout: float) -> None:
    on_cuda = torch.cuda.is_available() and not device.startswith(("cpu", "mps"))
    if on_cuda:
        if ranks.local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {ranks.local + 1} processes or more for {torch.cuda.device_count()} CUDA devices: "
                "lower --nproc_per_node, or use --device cpu"
            )
        torch.cuda.set_device(ranks.local)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    patience = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
    # After a restart the store may still hold the addresses of processes that have ended.
    store = dist.PrefixStore(f"attempt_{restarts()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=patience)


@contextmanager
def contact_lost_explained() -> Iterator[None]:
    """Turns what torch's backends raise when another rank is gone into a RunError that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        line = re.sub(r"\[/\S+\] ", "", line)  # gloo names its source files
        lost = isinstance(error, LOST_TYPES) or any(word in line.lower() for word in LOST)
        if isinstance(error, torch.OutOfMemoryError) or not lost:
            raise
        raise RunError(
            f"lost contact with another rank ({line[:120]}): it ended, or hangs. Saved checkpoints are intact: start "
            "again with --resume, or let torchrun --max-restarts do it"
        ) from error


def restarts() -> int:
    """How often ``torchrun --max-restarts`` has started the processes again since one ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launcher() -> str:
    """The ``torchrun`` that started this process: machine, process, when that began; empty where none can be told."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # starttime (man 5 proc)
    except OSError:
        return ""
    return f"{socket.gethostname()} {parent} {began}"


class HangWatch:
    """Writes where every thread stands when no step ended for half the ``timeout``, behind which ranks give up.

    Args:
        folder: gets ``stacks_rank_N.txt``, which goes again unless there was a hang.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout: float) -> None:
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
        """Something happened: waits anew."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None and self._path is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()


def gather(data: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """``data`` of every rank of ``group`` (None: of all), in their order, on all of them; between hosts' memories."""
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
