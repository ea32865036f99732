"""The process group that ``torchrun`` starts: joining it, its device, and the edge at which all ranks fail together."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
import torch.distributed as dist

from nanokimi.console import WAIT_SECONDS, mute
from nanokimi.device import resolve_device
from nanokimi.errors import RunError, UserError
from nanokimi.parallel.ranks import Ranks, current_ranks

# What torch's backends say, in their own words, when another process is gone or does not come.
LOST = ("connection closed", "connection reset", "connection refused", "timed out", "timeout", "broken pipe")
LOST_TYPES = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)

Store: TypeAlias = Any  # torch.distributed.Store, which has no type hints


class LostContact(RunError):
    """Another rank has ended or does not answer."""


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started with this process; a process that was started alone is its own.

    A UserError or RunError that leaves the block on one rank ends all ranks: with one line from the rank that failed,
    from the main rank where all failed, and with the same exit code. Ranks learn of it when they next wait for each
    other: the one that failed has noted it in the store, and ended.

    Args:
        device: as for ``--device``: decides how tensors travel.
        timeout: seconds that a rank waits for the others.

    Raises:
        RunError: contact with another rank was lost, or the others did not come.
        SystemExit: another rank has told of the error.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    rank = int(os.environ["RANK"])
    if rank:
        mute()
    store: Store | None = None
    try:
        with contact_lost_explained():
            store = _join(rank, device, timeout)
            yield current_ranks()
    except (UserError, RunError) as error:
        _fail_together(error, rank, store)
        raise
    dist.destroy_process_group()


def _join(rank: int, device: str, timeout: float) -> Store:
    on_cuda = torch.cuda.is_available() and not device.startswith(("cpu", "mps"))
    if on_cuda:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local + 1} processes or more for {torch.cuda.device_count()} CUDA devices: "
                "lower --nproc_per_node, or use --device cpu"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    patience = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
    # After a restart the store may still hold the addresses of processes that have ended.
    store = dist.PrefixStore(f"attempt_{restarts()}", store)  # type: ignore[attr-defined]
    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    return store


# ---- failing together ---------------------------------------------------------------------------


def _fail_together(error: UserError | RunError, rank: int, store: Store | None) -> None:
    """Sees to it that one rank tells the user of ``error``; returns only on the main rank, if it is to tell.

    Raises:
        SystemExit: with the exit code of the error, once the user knows of it.
    """
    code = 2 if isinstance(error, UserError) else 1
    with suppress(RuntimeError):  # of the store, which is gone with the process that kept it
        if store is not None and isinstance(error, LostContact):
            failed = [int(store.get(key)) for key in _failure_keys() if store.check([key])]
            if failed or store.add("lost_contact", 1) > 1:  # another has told, of this or of what led to it
                _end(failed[0] if failed else code, error)
        elif store is not None:
            store.set(_failure_keys()[rank], str(code))
            deadline = time.monotonic() + (WAIT_SECONDS if rank else 0)
            while time.monotonic() < deadline:  # whether the main rank fails too, which then is the one to tell
                if store.check([_failure_keys()[0]]):
                    _end(code, error)
                time.sleep(0.1)
    if rank:
        print(f"nanokimi: rank {rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from error


def _failure_keys() -> list[str]:
    """Where in the store each rank notes the exit code of its own failure."""
    return [f"failure_{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]


def _end(code: int, error: Exception) -> NoReturn:
    """Ends silently; torchrun ends all ranks when the first one ends, so the rank that tells gets time to do so."""
    time.sleep(1)
    raise SystemExit(code) from error


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
        raise LostContact(
            f"lost contact with another rank ({line[:120]}): it ended, or hangs. Saved checkpoints are intact: start "
            "again with --resume, or let torchrun --max-restarts do it"
        ) from error


# ---- what torchrun tells ------------------------------------------------------------------------


def rank_device(name: str) -> torch.device:
    """The device of this rank; UserError where several would have the same one."""
    size = current_ranks().size
    several = f"--device {name} cannot be that of {size} ranks: use cuda, of which each takes its own, or cpu"
    if size > 1 and name.startswith("cuda:"):
        raise UserError(several)
    device = resolve_device(name)
    if size > 1 and device.type == "mps":
        raise UserError(several)
    return device


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
