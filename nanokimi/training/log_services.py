"""TensorBoard, Weights & Biases and Trackio behind one small interface."""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanokimi.errors import UserError
from nanokimi.files import atomic_write

PROJECT = "nanokimi"
FLUSH_SECONDS = 5.0


class Logger(Protocol):
    """One place that scalars are reported to. Either method may fail, with any exception."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Reports finite numbers of optimizer step ``step``; more of the same step may follow."""

    def close(self) -> None:
        """Hands on what is not yet handed on, and lets go of threads and child processes."""


@dataclass(frozen=True)
class Reported:
    """The run that is reported.

    Attributes:
        output: its output folder.
        config: every field of both configs.
        step: optimizer steps done so far.
        continues: it goes on with what ``output`` holds, and is not begun there or brought there from elsewhere.
        say: takes lines for the user.
    """

    output: Path
    config: Mapping[str, Any]
    step: int
    continues: bool
    log: Callable[[str], None]

    @property
    def name(self) -> str:
        """The output folder's name."""
        return self.output.resolve().name

    @property
    def logs(self) -> Path:
        """Where the files of loggers belong."""
        return self.output / "logs"


class TensorBoard:
    """Event files under ``logs/tensorboard``.

    A resume adds a file that begins with TensorBoard's own restart mark: what earlier files say of later steps than
    the checkpoint's is hidden. A fresh run in the same folder keeps the earlier run's files as ``tensorboard.1``.

    Written by the package's ``EventsWriter`` and not by its ``SummaryWriter``: the thread of that one dies of a full
    disk, after which its queue holds up the training for ever.
    """

    def __init__(self, run: Reported) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        folder = run.logs / "tensorboard"
        if folder.exists() and not run.continues:
            others = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 1 << 20))
            folder.rename(next(other for other in others if not other.exists()))
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.iterdir())  # TensorBoard reads the files in the order of their names
        self._writer = EventsWriter(str(folder / "events"), f".{number:04d}")
        self._event, self._summary, self._flushed = Event, Summary, time.monotonic()
        self._write(run.step + 1, session_log=SessionLog(status=SessionLog.START))
        table = "".join(f"| {name} | {value} |\n" for name, value in run.config.items())
        self._write(run.step, summary=text("settings", "| field | value |\n|---|---|\n" + table))
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all values."""
        pairs = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self._summary(value=pairs))

    def close(self) -> None:
        """Hands everything to the disk."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()


class Wandb:
    """Weights & Biases, set up by its own variables: ``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``WANDB_ENTITY``, ...

    Files go to ``logs/wandb``. A resume has the same run id. The service takes steps in rising order only, so those
    that it holds already (of a run that was killed after its last checkpoint) are not sent again. Offline each
    process leaves a folder of its own, with the same id and without a step that an earlier one holds.

    Raises:
        UserError: nobody is logged in.
    """

    def __init__(self, run: Reported) -> None:
        import wandb

        self._mark = RunMark("wandb", run)
        self._teardown = wandb.teardown
        given = os.environ
        try:
            self._run = wandb.init(
                project=given.get("WANDB_PROJECT", PROJECT), name=given.get("WANDB_NAME", run.name),
                id=given.get("WANDB_RUN_ID", self._mark.id), dir=given.get("WANDB_DIR", str(run.logs)),
                config=dict(run.config), allow_val_change=True, resume="allow",
                settings=wandb.Settings(quiet=True, console="off"),
            )  # fmt: skip
        except wandb.errors.UsageError as error:
            self._teardown()
            raise UserError(f"--log wandb: {one_line(error)} Or set WANDB_MODE=offline") from error
        except BaseException:
            self._teardown()
            raise

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values, unless the service holds the step already."""
        if self._mark.takes(step):
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is sent; ends the package's child process now, not when the interpreter ends."""
        try:
            self._run.finish()
        finally:
            self._teardown()
            self._mark.close()


class Trackio:
    """Trackio's local database: ``TRACKIO_DIR``, by default ``trackio`` in the folder of the Hugging Face cache.

    Nothing leaves the machine, unless ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` says so. A resume goes on in the
    run of the same name. The database would keep a repeated step twice, so steps that it holds already are not
    logged again. What fails inside the package's own thread it reports itself, in a warning; a kill takes what waits
    there, half a second.
    """

    def __init__(self, run: Reported) -> None:
        import trackio

        self._mark = RunMark("trackio", run)
        folder = Path(trackio.TRACKIO_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written: set TRACKIO_DIR")
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        with redirect_stdout(io.StringIO()), nullcontext() if remote else hub_out_of_reach():
            self._run = trackio.init(
                PROJECT, name=f"{run.name}-{self._mark.id}", config=dict(run.config), resume="allow",
                embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self._finish = trackio.finish
        look = "" if remote else f"; to look at it: trackio show --project {PROJECT}"
        where = remote.partition("?")[0] if remote else folder  # an address may carry a token
        run.log(f"trackio: {self._run.name} in {where}{look}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queues the values, unless the database holds the step already."""
        if self._mark.takes(step):
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is in the database."""
        with redirect_stdout(io.StringIO()):
            self._finish()
        self._mark.close()


@contextmanager
def hub_out_of_reach() -> Iterator[None]:
    """Keeps Trackio from asking the Hugging Face hub for the user's name, as it does where a token is stored."""
    from huggingface_hub import constants

    earlier, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = earlier


class RunMark:
    """Which run of a service an output folder belongs to, and the last step sent to it: ``logs/SERVICE.run``.

    Written over in place at each step, which costs microseconds and survives a kill.
    """

    def __init__(self, service: str, run: Reported) -> None:
        path = run.logs / f"{service}.run"
        self.id, self.held = secrets.token_hex(4), 0
        if run.continues:
            with suppress(OSError, ValueError):  # none yet
                self.id, self.held = _read_mark(path)
        with atomic_write(path) as file:
            file.write(self._line(self.held))
        self._file = path.open("r+b", buffering=0)
        if self.held > run.step:
            run.log(f"note: {service} has steps {run.step + 1} to {self.held} of this run: they stay as they are")

    def takes(self, step: int) -> bool:
        """Whether ``step`` is new to the service; from then on the file says that it has it."""
        if step <= self.held:
            return False
        os.pwrite(self._file.fileno(), self._line(step), 0)
        return True

    def close(self) -> None:
        """Closes the file, which stays for a resume."""
        self._file.close()

    def _line(self, step: int) -> bytes:
        return f"{self.id} {step:012d}\n".encode()


def _read_mark(path: Path) -> tuple[str, int]:
    name, step = path.read_text(encoding="utf-8").split()
    return name, int(step)


def one_line(error: Exception) -> str:
    """What went wrong, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
