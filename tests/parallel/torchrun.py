"""Whole runs under torchrun, at the price of a fork: torch is imported once, by a server that every launch comes from.

A launch is torchrun's own agent with torchrun's own flags; only its ranks are forked, and not started afresh.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nanokimi.data.batch import Batch

SLOW = ("torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo")
SLOW += ("torch.distributed.checkpoint.hf_storage", "torch.distributed.elastic.agent.server.local_elastic_agent")
SLOW += ("nanokimi.training.run", "nanokimi.parallel.memory_estimate")
ALONE: tuple[str, ...] = ()  # in the place of torchrun's flags: one process, without it


@dataclass(frozen=True)
class Launch:
    """What to run.

    Attributes:
        arguments: of ``nanokimi``.
        flags: torchrun's own, or ``ALONE``.
        afresh: whether ranks are processes of their own that torchrun starts, as users' are, and not forks.
        call: ``module:function`` that each rank calls with the folder of the launch, instead of ``nanokimi``.
        fp64: whether numbers are of double precision where no type is named.
        late: seconds that rank 0 begins after the others.
        record: where each rank notes the sequences that it trains on; empty for nowhere.
        part_bytes: size of a stream's parts, so that a small one has many; 0 leaves it.
        stumble: rank, step and number of the signal that this rank sends itself before this step, once.
        end_in_save: the step in whose sharded save the whole job is killed; 0 for none.
    """

    arguments: Sequence[str]
    flags: Sequence[str] = ("--standalone", "--nproc_per_node=2")
    afresh: bool = False
    call: str = ""
    fp64: bool = False
    late: float = 0.0
    record: str = ""
    part_bytes: int = 0
    stumble: tuple[int, int, int] | None = None
    end_in_save: int = 0


class Job:
    """A launch on its way. ``pid`` is that of torchrun, ``folder`` where it is noted what happened."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder

    def wait(self, seconds: float = 100) -> int:
        """The exit code, once there is one."""
        code = self.folder / "code"
        wait_until(code.exists, self, seconds)
        return int(code.read_text())

    def said(self) -> str:
        """All that torchrun and the ranks have written so far."""
        return (self.folder / "said").read_text(errors="replace")

    def lines(self) -> list[str]:
        """What nanokimi ended with, on any rank."""
        return [line for line in self.said().splitlines() if line.startswith("nanokimi: ")]

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        return int((self.folder / f"rank_{rank}").read_text())


@contextmanager
def launched(launch: Launch, folder: Path) -> Iterator[Job]:
    """Starts ``launch``, which does not outlive the block; ``folder`` is for notes."""
    folder = folder / f"launch_{len(list(folder.glob('launch_*')))}"
    folder.mkdir(parents=True)
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([str(folder), asdict(launch)]) + "\n")
    server.stdin.flush()
    job = Job(int(server.stdout.readline()), folder)
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def run(launch: Launch, folder: Path) -> tuple[int, Job]:
    """Runs ``launch`` to its end: its exit code, and what it said."""
    with launched(launch, folder) as job:
        return job.wait(), job


def wait_until(condition: Any, job: Job, seconds: float = 100) -> None:
    """Returns when ``condition()`` holds; fails, with what ``job`` said, when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.01)


def free_port() -> int:
    """A port for torchrun's static rendezvous, which has no way to find one itself."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, which closes its input then."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


# ---- the server ---------------------------------------------------------------------------------


def serve() -> None:
    """A launch for every line of input."""
    torch.set_num_threads(1)
    for module in SLOW:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if not os.fork():
            folder, launch = json.loads(line)
            mind(Path(folder), Launch(**launch))


def mind(folder: Path, launch: Launch) -> None:
    """Starts a launch, tells its process id, and notes how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    child = os.fork()
    os.setpgid(child, child)  # on both sides, whoever is first
    if not child:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os._exit(exit_code_of(folder, launch))
    print(child, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "code.new").write_text(str(code))
    (folder / "code.new").rename(folder / "code")
    os._exit(0)


def exit_code_of(folder: Path, launch: Launch) -> int:
    try:
        if launch.flags:
            agent(folder, launch)
        else:
            as_rank(folder, launch)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def agent(folder: Path, launch: Launch) -> None:
    """What ``torchrun`` does."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args
    from torch.distributed.run import main as torchrun

    if launch.afresh:
        torchrun([*launch.flags, __file__, str(folder), json.dumps(asdict(launch))])
        return
    options = parse_args([*launch.flags, "train.py"])
    if options.standalone:
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", folder.name
    config, _, _ = config_from_args(options)
    config.start_method = "fork"
    elastic_launch(config, as_rank)(folder, launch)


def as_rank(folder: Path, launch: Launch) -> None:
    """One rank, or the only process."""
    from nanokimi.cli import main
    from nanokimi.data import local

    rank, first = int(os.environ.get("RANK", 0)), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    (folder / f"rank_{rank}").write_text(str(os.getpid()))
    if rank == 0:
        time.sleep(launch.late)
    do_not_draw()
    if launch.fp64:
        torch.set_default_dtype(torch.float64)
    if launch.record:
        note_sequences(Path(launch.record) / f"{folder.name}_{rank}")
    if launch.part_bytes:
        local.PART_BYTES = launch.part_bytes
    if launch.stumble and launch.stumble[0] == rank and first:
        stumble(*launch.stumble[1:])
    if launch.end_in_save and rank == 0:
        end_in_save(launch.end_in_save)
    if launch.call:
        module, function = launch.call.split(":")
        getattr(importlib.import_module(module), function)(folder)
    elif code := main(launch.arguments):
        sys.exit(code)


def do_not_draw() -> None:
    """Half a second less for each save, and a second to begin with."""
    plots: Any = ModuleType("nanokimi.training.plots")
    plots.plot_training = lambda *arguments, **options: None
    sys.modules["nanokimi.training.plots"] = plots


def stumble(step: int, number: int) -> None:
    from nanokimi.training.trainer import Trainer

    train_step = Trainer._train_step

    def stumbling(self: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
        if self.counters.step + 1 == step:
            os.kill(os.getpid(), number)
        return train_step(self, batches)

    Trainer._train_step = stumbling  # type: ignore[method-assign]


def end_in_save(step: int) -> None:
    from nanokimi.checkpoint import shards

    publish = shards._publish

    def ending(inside: Path, *rest: Any) -> None:
        if inside.name == f"step_{step:08d}":
            os.killpg(0, signal.SIGKILL)
        publish(inside, *rest)

    shards._publish = ending


def note_sequences(path: Path) -> None:
    """Appends every batch, as int32, to the file ``path``."""
    from nanokimi.data.loader import BatchLoader
    from nanokimi.data.stream import StreamLoader

    def noted(iterate: Any) -> Any:
        def batches(self: Any) -> Iterator[Batch]:
            for batch in iterate(self):
                with path.open("ab") as file:
                    file.write(batch.rows().int().numpy().tobytes())
                yield batch

        return batches

    for kind in (BatchLoader, StreamLoader):
        kind.__iter__ = noted(kind.__iter__)  # type: ignore[method-assign]


# ---- texts and results --------------------------------------------------------------------------


def real_text(characters: int) -> str:
    """The beginning of a module of the standard library."""
    return Path(argparse.__file__).read_text(encoding="utf-8")[:characters]


def history(output: Path) -> dict[str, Any]:
    """``training_metrics.json`` of a run."""
    content: dict[str, Any] = json.loads((output / "logs" / "training_metrics.json").read_text())
    return content


if __name__ == "__main__":
    if sys.argv[1:]:
        as_rank(Path(sys.argv[1]), Launch(**json.loads(sys.argv[2])))
    else:
        serve()
