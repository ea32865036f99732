"""``--log``: what reaches TensorBoard, Weights & Biases and Trackio, and that none of them can harm a run."""

from __future__ import annotations

import errno
import json
import math
import signal
import sqlite3
import struct
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_run import arguments, assert_same_run, history, refused, start, wait_for_steps

from nanokimi.cli import main
from nanokimi.errors import UserError
from nanokimi.training import loggers
from nanokimi.training.loggers import Loggers, Reported, check_loggers, scalars

needs_tensorboardx = pytest.mark.skipif(find_spec("tensorboardX") is None, reason="needs tensorboardX")

VALIDATED = ("--val_fraction", "0.1", "--eval_interval", "2")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def reported(tmp_path: Path) -> Callable[..., Reported]:
    """A run in ``tmp_path`` that is to be reported; what it says is kept in ``said.txt``."""
    (tmp_path / "logs").mkdir()

    def log(line: str) -> None:
        with (tmp_path / "said.txt").open("a") as file:
            file.write(line + "\n")

    return lambda step=0, continues=False: Reported(tmp_path, {"dim": 32, "seed": 1}, step, continues, log)


def said(folder: Path) -> str:
    path = folder / "said.txt"
    return path.read_text() if path.exists() else ""


class Memory:
    """A logger that remembers, and fails where it is told to."""

    def __init__(self, run: Reported, fail: str = "", at: int = 0) -> None:
        self.run, self.fail, self.at = run, fail, at
        self.steps: list[int] = []
        self.values: list[Mapping[str, float]] = []
        self.closed = 0
        if fail == "open":
            raise ConnectionError("no route\nto host")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.fail == "log" and step >= self.at:
            raise ConnectionError("no route\nto host")
        self.steps.append(step)
        self.values.append(values)

    def close(self) -> None:
        self.closed += 1
        if self.fail in ("log", "close"):
            raise OSError("the connection is closed")


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> dict[str, Memory]:
    """Replaces the three loggers; ``wandb`` fails at step 3. The dictionary fills as they are opened."""
    opened: dict[str, Memory] = {}

    def opener(name: str, **failing: Any) -> tuple[str, Callable[[Reported], Memory]]:
        def make(run: Reported) -> Memory:
            opened[name] = Memory(run, **failing)
            return opened[name]

        return "json", make

    for name, failing in {"tensorboard": {}, "wandb": {"fail": "log", "at": 3}, "trackio": {"fail": "close"}}.items():
        monkeypatch.setitem(loggers.LOGGERS, name, opener(name, **failing))
    return opened


# ---- values ---------------------------------------------------------------------------------------


def test_layers_become_one_largest_logit_and_one_imbalance_each() -> None:
    numbers = scalars({"max_logit": [1.0, 7.0, 2.0], "expert_load": [[0.25, 0.75], [0.5, 0.5]], "tokens": 5})
    assert numbers == {"max_logit": 7.0, "expert_imbalance/layer_1": 1.5, "expert_imbalance/layer_2": 1.0, "tokens": 5}


def test_what_is_no_finite_number_is_left_out() -> None:
    numbers = scalars(
        {"train_ce_loss": None, "train_aux_loss": None, "grad_norm": math.nan, "val_loss": math.inf, "tokens": 8}
        | {"max_logit": [math.nan, -math.inf], "expert_load": []}
    )
    assert numbers == {"tokens": 8}


def test_the_total_loss_is_that_of_the_history(text: Path, tmp_path: Path, memories: dict[str, Memory]) -> None:
    assert main(arguments(text, tmp_path, *VALIDATED, "--max_steps", "4", "--log", "tensorboard")) == 0
    memory, seen = memories["tensorboard"], history(tmp_path)
    assert memory.steps == [1, 2, 3, 4, 4], "the last evaluation comes after its step"
    assert [values["train_loss"] for values in memory.values[:4]] == seen["train_loss"]
    assert [values["val_loss"] for values in memory.values if "val_loss" in values] == seen["val_loss"]
    assert memory.values[-1]["val_bits_per_byte"] == seen["val_bits_per_byte"][-1]
    assert memory.run.config["max_steps"] == 4
    assert memory.run.config["dim"] == 32
    assert memory.closed == 1


# ---- mistakes and failures ------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["tensorbord", "wandb,mlflow", "tensorboard;wandb"])
def test_an_unknown_logger_is_refused_before_anything_else(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, names: str
) -> None:
    line = refused(capsys, arguments(text, tmp_path / "run", "--log", names))
    assert all(word in line for word in ("--log", "tensorboard, wandb, trackio"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    line = refused(capsys, arguments(text, tmp_path / "run", "--log", name))
    assert f"pip install 'nanokimi[{name}]'" in line
    assert not (tmp_path / "run").exists()


def test_blanks_and_repetitions_among_the_names_do_no_harm(memories: dict[str, Memory]) -> None:
    assert check_loggers(" tensorboard, ,tensorboard") == ["tensorboard"]
    assert check_loggers("") == []


def test_a_logger_that_fails_is_switched_off_in_one_line_and_the_run_goes_on(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, memories: dict[str, Memory]
) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "6", "--log", "wandb,tensorboard,trackio")) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [word in line for word, line in zip(("no route to host", "is closed"), warnings, strict=True)] == [True] * 2
    assert "--log wandb" in warnings[0]
    assert memories["wandb"].steps == [1, 2]
    assert memories["wandb"].closed == 1, "it is given the chance to end its threads"
    assert memories["tensorboard"].steps == history(tmp_path)["steps"] == list(range(1, 7))


def test_a_logger_that_cannot_be_opened_is_left_out(
    reported: Callable[..., Reported], tmp_path: Path, memories: dict[str, Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", ("json", lambda run: Memory(run, "open")))
    with Loggers("wandb,tensorboard", reported()) as opened:
        assert list(opened.open) == ["tensorboard"]
    assert said(tmp_path).count("\n") == 1
    assert "--log wandb" in said(tmp_path)


def test_a_run_that_is_over_is_not_reported(text: Path, tmp_path: Path, memories: dict[str, Memory]) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "2")) == 0
    assert main(["train", "--resume", "--output_dir", str(tmp_path), "--log", "tensorboard"]) == 0
    assert memories == {}


# ---- TensorBoard ----------------------------------------------------------------------------------


def events(folder: Path) -> list[list[Any]]:
    """The events of each file, in TensorBoard's order; checksums are verified."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: list[list[Any]] = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        found.append([])
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            body = content[at + 12 : at + 12 + length]
            checksums = struct.unpack_from("<I", content, at + 8) + struct.unpack_from("<I", content, at + 12 + length)
            assert checksums == (masked_crc32c(content[at : at + 8]), masked_crc32c(body))
            found[-1].append(Event.FromString(body))
            at += 16 + length
    return found


def curve(written: list[Any], name: str) -> dict[int, float]:
    return {event.step: value.simple_value for event in written for value in event.summary.value if value.tag == name}


@needs_tensorboardx
def test_tensorboard_holds_the_history_and_a_resume_hides_what_it_repeats(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "tensorboard"
    assert main(arguments(text, tmp_path, *VALIDATED, "--max_steps", "4", "--log", "tensorboard")) == 0
    assert main(["train", "--resume", "--output_dir", str(tmp_path), "--max_steps", "6"]) == 0
    first, second = events(folder)
    seen = history(tmp_path)
    for name in ("train_loss", "learning_rate", "grad_norm", "tokens"):
        expected = dict(zip(seen["steps"], seen[name], strict=True))
        assert curve(first, name) | curve(second, name) == pytest.approx(expected), name
    assert list(curve(first, "val_bits_per_byte")) == [2, 4]
    assert list(curve(second, "max_logit")) == [5, 6]
    restarts = [event.step for event in second if event.HasField("session_log")]
    assert restarts == [5], "of earlier files nothing from step 5 on is shown"
    assert any("| dim | 32 |" in str(value.tensor.string_val) for event in first for value in event.summary.value)


@needs_tensorboardx
def test_a_fresh_run_keeps_the_earlier_runs_events_apart(text: Path, tmp_path: Path) -> None:
    for steps in (2, 3, 4):
        assert main(arguments(text, tmp_path, "--max_steps", str(steps), "--log", "tensorboard")) == 0
    folders = ["tensorboard.1", "tensorboard.2", "tensorboard"]
    assert [len(curve(events(tmp_path / "logs" / name)[0], "tokens")) for name in folders] == [2, 3, 4]


@needs_tensorboardx
def test_events_reach_the_disk_while_the_run_goes_on(reported: Callable[..., Reported], tmp_path: Path) -> None:
    with Loggers("tensorboard", reported()) as opened:
        opened.log(1, {"grad_norm": 0.5})
        assert curve(events(tmp_path / "logs" / "tensorboard")[0], "grad_norm") == {1: 0.5}


@needs_tensorboardx
def test_a_full_disk_switches_tensorboard_off(
    reported: Callable[..., Reported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk is full")

    with Loggers("tensorboard", reported()) as opened:
        for name in ("write_event", "close"):
            monkeypatch.setattr(f"tensorboardX.event_file_writer.EventsWriter.{name}", full_disk)
        opened.log(1, {"grad_norm": 0.5})
        opened.log(2, {"grad_norm": 0.5})
        assert opened.open == {}
    assert said(tmp_path).count("disk is full") == 1


# ---- the run of a service -------------------------------------------------------------------------


def test_a_resume_goes_on_in_the_same_run(reported: Callable[..., Reported], tmp_path: Path) -> None:
    first = reported().run_id("wandb")
    assert reported(step=2, continues=True).run_id("wandb") == first
    assert reported(continues=True).run_id("trackio") != first
    assert reported().run_id("wandb") != first, "a fresh run is another run"
    (tmp_path / "logs" / "wandb.run").write_text("12ab34cd 000000000007\n")  # as it was before, with the last step
    assert reported(continues=True).run_id("wandb") == "12ab34cd"
    (tmp_path / "logs" / "wandb.run").write_text("")  # the machine died while it was written
    assert len(reported(continues=True).run_id("wandb")) == 8


@pytest.fixture
def online_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the package where there is a network: notes what it is given."""
    seen = SimpleNamespace(settings={}, steps=[], ended=[], logged_in=True)

    class UsageError(Exception):
        pass

    def init(**settings: Any) -> SimpleNamespace:
        if not seen.logged_in:
            raise UsageError("No API key configured.")
        seen.settings = settings
        return SimpleNamespace(
            log=lambda values, step: seen.steps.append(step), finish=lambda: seen.ended.append("finish")
        )

    module: Any = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init, module.Settings, module.errors = init, dict, SimpleNamespace(UsageError=UsageError)
    module.teardown = lambda: seen.ended.append("teardown")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_wandb_is_told_which_run_goes_on(
    reported: Callable[..., Reported], tmp_path: Path, online_wandb: SimpleNamespace
) -> None:
    with Loggers("wandb", reported()) as opened:
        for step in (1, 2, 3):
            opened.log(step, {"grad_norm": 1.0})
    begun = online_wandb.settings
    assert (begun["project"], begun["name"], begun["resume"]) == ("nanokimi", tmp_path.name, "allow")
    assert begun["config"] == {"dim": 32, "seed": 1}
    with Loggers("wandb", reported(step=1, continues=True)) as opened:
        opened.log(4, {"grad_norm": 1.0})
    assert online_wandb.settings["id"] == begun["id"]
    assert online_wandb.steps == [1, 2, 3, 4]
    assert online_wandb.ended == ["finish", "teardown"] * 2


def test_the_services_own_variables_win(
    reported: Callable[..., Reported], monkeypatch: pytest.MonkeyPatch, online_wandb: SimpleNamespace
) -> None:
    for name in ("PROJECT", "NAME", "RUN_ID", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    Loggers("wandb", reported()).close()
    assert [online_wandb.settings[key] for key in ("project", "name", "id", "dir")] == [
        "project",
        "name",
        "run_id",
        "dir",
    ]


def test_not_being_logged_in_is_told_before_the_training(
    reported: Callable[..., Reported], memories: dict[str, Memory], online_wandb: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(loggers.LOGGERS, "wandb", ("wandb", loggers.wandb))
    online_wandb.logged_in = False
    with pytest.raises(UserError, match=r"--log wandb: No API key configured.* WANDB_MODE=offline"):
        Loggers("tensorboard,wandb", reported())
    assert memories["tensorboard"].closed == 1
    assert online_wandb.ended == ["teardown"]


# ---- the packages themselves, in whole runs -------------------------------------------------------


def wandb_steps(folder: Path) -> list[int]:
    """Steps in the offline file under ``folder``: LevelDB's log format, behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    content, at, body, steps = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        body += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record, body = Record.FromString(body), b""
            steps += [record.history.step.num] if record.HasField("history") else []
    return steps


@pytest.mark.slow
def test_all_three_together_change_nothing_and_hold_every_step_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a SIGTERM and a resume on the way, without a network; equal to the run without ``--log`` to the bit."""
    for package in ("wandb", "trackio", "tensorboardX"):
        pytest.importorskip(package)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "db")}.items():
        monkeypatch.setenv(name, value)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = (*VALIDATED, "--max_steps", "40", "--save_interval", "0")
    reference = start(text, whole, *options)
    process = start(text, stopped, *options, "--log", "tensorboard,wandb,trackio")
    wait_for_steps(process, stopped, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert start(text, stopped, *options, "--log", "wandb,trackio,tensorboard", "--resume").wait() == 0
    assert reference.wait() == 0
    assert_same_run(whole, stopped)

    everything = list(range(1, 41))
    offline = sorted((stopped / "logs" / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert sorted(step for folder in offline for step in wandb_steps(folder)) == everything
    rows = sqlite3.connect(tmp_path / "db" / "nanokimi.db").execute("SELECT run_name, step, metrics FROM metrics")
    steps: set[int] = set()
    for name, step, metrics in rows.fetchall():
        assert name.startswith("stopped-")
        steps.add(step)
        values = json.loads(metrics)
        assert values.keys() & {"train_loss", "val_loss"}, "a step, or the last evaluation"
    assert sorted(steps) == everything
    first, second = events(stopped / "logs" / "tensorboard")
    assert [*curve(first, "train_loss"), *curve(second, "train_loss")] == everything


@pytest.mark.slow
def test_trackio_holds_a_repeated_step_once(
    reported: Callable[..., Reported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: the checkpoint is of step 1, and the database has steps 2 and 3 already."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    for name, value in {"TRACKIO_DIR": tmp_path / "db", "MEDIA_DIR": tmp_path / "db" / "media"}.items():
        for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "trackio"]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    for run, steps in ((reported(), (1, 2, 3)), (reported(step=1, continues=True), (2, 3, 4))):
        with Loggers("trackio", run) as opened:
            for step in steps:
                opened.log(step, {"grad_norm": 1.0 * step})
    (name,) = storage.SQLiteStorage.get_runs("nanokimi")
    assert [entry["step"] for entry in storage.SQLiteStorage.get_logs("nanokimi", name)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_trackio_asks_the_hub_for_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package by itself asks for the user's name where a token is stored."""
    pytest.importorskip("trackio")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    hub = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=hub.serve_forever, daemon=True).start()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
    for name, value in {**settings, "TRACKIO_DIR": str(tmp_path / "db")}.items():
        monkeypatch.setenv(name, value)
    assert start(text, tmp_path / "run", "--max_steps", "2", "--log", "trackio").wait() == 0
    hub.shutdown()
    assert (tmp_path / "db" / "nanokimi.db").exists()
    assert asked == []
