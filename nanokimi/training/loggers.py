"""``--log``: reports a run to TensorBoard, Weights & Biases and Trackio; none of them can end or change the run."""

from __future__ import annotations

import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from nanokimi.console import one_line
from nanokimi.errors import UserError
from nanokimi.files import put_aside

PROJECT = "nanokimi"


@dataclass(frozen=True)
class Reported:
    """The run that is reported; ``continues`` says that it goes on with the one in ``output`` and is not a new one."""

    output: Path
    config: Mapping[str, Any]
    step: int
    continues: bool
    log: Callable[[str], None]

    def run_id(self, service: str) -> str:
        """The id of this run at a service; kept in ``logs/SERVICE.run``, so that a resume has the same one."""
        path = self.output / "logs" / f"{service}.run"
        found = path.read_text().split() if self.continues and path.exists() else []
        if not found:
            found = [secrets.token_hex(4)]
            path.write_text(found[0])
        return found[0]


class Service(NamedTuple):
    """Where a run is reported to; both functions may fail with any exception."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def tensorboard(run: Reported) -> Service:
    """Event files under ``logs/tensorboard``; a fresh run keeps an earlier run's files as ``tensorboard.1``.

    A resume adds a file that begins with TensorBoard's restart mark, which hides what earlier files say of later steps.
    The package's ``SummaryWriter`` is not used: its thread dies of a full disk, and its queue then blocks the training.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import text

    folder = run.output / "logs" / "tensorboard"
    if folder.exists() and not run.continues:
        put_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))  # TensorBoard reads the files in the order of their names
    writer = EventsWriter(str(folder / "events"), f".{number:04d}")

    def write(step: int, **content: Any) -> None:
        writer.write_event(Event(wall_time=time.time(), step=step, **content))
        writer.flush()

    def log(step: int, values: Mapping[str, float]) -> None:
        write(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=x) for name, x in values.items()]))

    write(run.step + 1, session_log=SessionLog(status=SessionLog.START))
    table = "".join(f"| {name} | {value} |\n" for name, value in run.config.items())
    write(run.step, summary=text("settings", "| field | value |\n|---|---|\n" + table))
    return Service(log, writer.close)


def wandb(run: Reported) -> Service:
    """Weights & Biases, set up by its own variables: ``WANDB_MODE=offline``, ``WANDB_PROJECT``, and so on.

    Raises:
        UserError: nobody is logged in.
    """
    import wandb

    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", PROJECT),
        "name": os.environ.get("WANDB_NAME", run.output.resolve().name),
        "id": os.environ.get("WANDB_RUN_ID") or run.run_id("wandb"),
        "dir": os.environ.get("WANDB_DIR", str(run.output / "logs")),
        "settings": wandb.Settings(quiet=True, console="off"),
    }
    try:
        opened = wandb.init(config=dict(run.config), allow_val_change=True, resume="allow", **options)
    except wandb.errors.UsageError as error:
        wandb.teardown()
        raise UserError(f"--log wandb: {one_line(error)} Or set WANDB_MODE=offline") from error

    def log(step: int, values: Mapping[str, float]) -> None:
        opened.log(dict(values), step=step)  # it ignores steps that the service has already

    def close() -> None:
        opened.finish()
        wandb.teardown()  # ends its child process now, not when the interpreter ends

    return Service(log, close)


def trackio(run: Reported) -> Service:
    """Trackio's database, on this machine unless ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` is set."""
    import trackio
    from huggingface_hub import constants

    name = f"{run.output.resolve().name}-{run.run_id('trackio')}"
    options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    is_remote = "TRACKIO_SPACE_ID" in os.environ or "TRACKIO_SERVER_URL" in os.environ
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not is_remote  # otherwise it asks the hub for the user's name
        with redirect_stdout(sys.stderr):
            opened = trackio.init(PROJECT, name=name, config=dict(run.config), resume="allow", **options)
    finally:
        constants.HF_HUB_OFFLINE = offline
    first_step = getattr(opened, "_next_step", 0)  # the database would keep a repeated step twice

    def log(step: int, values: Mapping[str, float]) -> None:
        if step >= first_step:
            opened.log(dict(values), step=step)

    def close() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    return Service(log, close)


LOGGERS: dict[str, tuple[str, Callable[[Reported], Service]]] = {
    "tensorboard": ("tensorboardX", tensorboard),
    "wandb": ("wandb", wandb),
    "trackio": ("trackio", trackio),
}


class Loggers(AbstractContextManager["Loggers"]):
    """Opens the services in the comma-separated ``names``; one that fails is switched off with a warning.

    Raises:
        UserError: as ``check_loggers``, or nobody is logged in to a service.
    """

    def __init__(self, names: str, run: Reported) -> None:
        self.open: dict[str, Service] = {}
        self._tell = run.log
        for name in check_loggers(names):
            try:
                self.open[name] = LOGGERS[name][1](run)
            except UserError:
                self.close()
                raise
            except Exception as error:
                self._warn(name, error)

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Reports what ``MetricsLog.record`` or ``record_validation`` took for ``step``."""
        numbers = scalars(values)
        for name, service in list(self.open.items()):
            try:
                service.log(step, numbers)
            except Exception as error:
                self._warn(name, error)
                del self.open[name]
                with suppress(Exception):
                    service.close()

    def close(self) -> None:
        """Closes them all; may be called twice."""
        while self.open:
            name, service = self.open.popitem()
            try:
                service.close()
            except Exception as error:
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self._tell(f"warning: --log {name} is switched off ({one_line(error)}); the run itself is not affected")


def check_loggers(names: str) -> list[str]:
    """The services in the comma-separated ``names``, each once.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in LOGGERS:
            raise UserError(f"--log {name}: unknown: choose from {', '.join(LOGGERS)}; several with commas")
        if find_spec(LOGGERS[name][0]) is None:
            raise UserError(f"--log {name} needs the package {LOGGERS[name][0]}: pip install 'nanokimi[{name}]'")
    return chosen


def scalars(values: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers among ``values``, with the names of the history.

    ``max_logit`` is the largest of all layers. ``expert_imbalance/layer_i`` is the load of a layer's busiest expert
    over the mean load: 1 when all are equally busy.
    """
    numbers = dict(values)
    cross_entropy, balance_loss = values.get("train_ce_loss"), values.get("train_aux_loss")
    if isinstance(cross_entropy, float) and isinstance(balance_loss, float):
        numbers["train_loss"] = cross_entropy + balance_loss
    logits, load = values.get("max_logit"), values.get("expert_load")
    if isinstance(logits, list) and isinstance(load, list):
        numbers["max_logit"] = max(filter(math.isfinite, logits), default=None)
        for layer, shares in enumerate(load, start=len(logits) - len(load)):  # dense layers come first
            numbers[f"expert_imbalance/layer_{layer}"] = max(shares) * len(shares)
    return {name: x for name, x in numbers.items() if isinstance(x, (int, float)) and math.isfinite(x)}
