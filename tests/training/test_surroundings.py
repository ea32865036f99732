"""A run goes on whatever becomes of its terminal, its pictures and its logs, and wherever it was started."""

from __future__ import annotations

import fcntl
import getpass
import os
import pty
import pwd
import signal
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from nanokimi import checkpoint, files
from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.console import protect_streams
from nanokimi.training.advice import doubts
from nanokimi.training.metrics import MetricsLog

COMMAND = [sys.executable, "-c", "from nanokimi.cli import entry; entry()"]


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    quick = [
        "--preset",
        "debug",
        "--max_steps",
        "4",
        "--save_interval",
        "2",
        "--warmup_steps",
        "2",
        "--eval_interval",
        "0",
    ]
    return ["train", *quick, "--data_path", str(text), "--output_dir", str(output), "--set", "max_seq_length=64", *more]


def step_of(output: Path, name: str = "latest.pt") -> int:
    step: int = checkpoint.read(output / "checkpoints" / name)["counters"]["step"]
    return step


# ---- pictures and logs --------------------------------------------------------------------------


@pytest.mark.fault("A5")
def test_a_backend_that_is_not_installed_is_no_matter(library_text: Path, tmp_path: Path) -> None:
    """As in every process that a notebook starts."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [*COMMAND, *arguments(library_text, tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert (tmp_path / "logs" / "training_metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.fault("A5")
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("drawing the metrics", "nanokimi.training.plots.plot_training"),
        ("writing a sample", "nanokimi.training.trainer.generate"),
        ("showing the step", "nanokimi.training.trainer.ProgressDisplay.step"),
        ("writing the metrics", "nanokimi.training.trainer.MetricsLog.write_json"),
    ],
)
def test_what_only_shows_costs_a_warning_and_not_the_run(
    library_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    name: str,
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ValueError("no such font")

    monkeypatch.setattr(name, fail)
    assert main(arguments(library_text, tmp_path, "--samples", "3")) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "no such font" in line]
    assert told == [f"warning: {what} failed (no such font); nothing else is affected"]
    assert step_of(tmp_path, "final.pt") == 4


@pytest.mark.fault("A5")
def test_data_are_inspected_without_a_picture_too(
    library_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr("nanokimi.insight.inspect_data.plot_lengths", fail)
    flags = [
        "--preset",
        "debug",
        "--data_path",
        str(library_text),
        "--sequences",
        "9",
        "--output",
        str(tmp_path / "x.png"),
    ]
    assert main(["inspect", "data", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "No picture: matplotlib failed: no such font"


@pytest.mark.fault("A5")
def test_a_log_on_a_full_disk_is_made_up_for_when_there_is_room(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    assert log._file is not None
    log.record(1, {})
    log._file.close()
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(Exception, match="No space left"):
        log.record(2, {})
    log.record(3, {})
    log.write_json()
    log.record(4, {})
    log.close()
    assert log.jsonl_path.read_text() == log.state()
    assert log.state().count("\n") == 4


# ---- terminals and pipes ------------------------------------------------------------------------


@pytest.mark.fault("A8")
def test_a_run_needs_no_standard_streams(library_text: Path, tmp_path: Path) -> None:
    """With nothing at 0, 1 and 2 the files that it opens would get these numbers, and its messages."""
    close = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert subprocess.run([*close, *COMMAND, *arguments(library_text, tmp_path)]).returncode == 0
    assert step_of(tmp_path, "final.pt") == 4
    assert (tmp_path / "logs" / "training_metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.fault("A8")
@pytest.mark.parametrize(("hang_up", "code"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)], ids=["plain", "nohup"])
def test_a_terminal_that_is_closed_costs_no_step(library_text: Path, tmp_path: Path, hang_up: Any, code: int) -> None:
    controller, terminal = pty.openpty()

    def adopt() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, hang_up)

    command = [*COMMAND, *arguments(library_text, tmp_path, "--max_steps", "40", "--save_interval", "0")]
    streams: dict[str, Any] = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    run = subprocess.Popen(command, preexec_fn=adopt, **streams)
    os.close(terminal)
    log = tmp_path / "logs" / "training_metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3) and run.poll() is None:
        os.read(controller, 1 << 16)
        time.sleep(0.002)
    os.close(controller)
    assert run.wait() == code
    steps = log.read_text().count("\n")
    assert step_of(tmp_path) == steps
    assert (steps == 40) == (code == 0)


def redirect_stdout(monkeypatch: pytest.MonkeyPatch, descriptor: int) -> None:
    stdout = os.fdopen(descriptor, "w", closefd=False)
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, stdout)


COMMANDS = {
    "plan": ["--preset", "tiny", "--ranks", "1"],
    "tokenizer train": ["TEXT", "--vocab_size", "300", "--output", "FOLDER/tokenizer.json"],
    "prepare tokens": ["--preset", "debug", "--data_path", "TEXT", "--output", "FOLDER/tokens"],
    "inspect data": ["--preset", "debug", "--data_path", "TEXT", "--output", "FOLDER/lengths.png"],
}


@pytest.mark.fault("A8")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("full", [False, True], ids=["closed pipe", "full disk"])
def test_a_reader_who_leaves_is_no_error_and_a_full_disk_is(
    library_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    full: bool,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    redirect_stdout(monkeypatch, os.open("/dev/full", os.O_WRONLY) if full else writing)
    places = {"TEXT": str(library_text), "FOLDER": str(tmp_path)}
    words = [places.get(word, word.replace("FOLDER", str(tmp_path))) for word in COMMANDS[command]]
    assert main([*command.split(), *words]) == full
    sys.stdout.flush()
    told = [line for line in capsys.readouterr().err.splitlines() if "nanokimi: " in line]
    line = "nanokimi: the result cannot be written to stdout: [Errno 28] No space left on device"
    assert told == [line] * full


@pytest.mark.fault("A8")
def test_not_even_python_complains_of_a_closed_pipe_when_it_ends(library_text: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    train = ["tokenizer", "train", str(library_text), "--vocab_size", "300", "--output", str(tmp_path / "t.json")]
    done = subprocess.run([*COMMAND, *train], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0
    assert not [line for line in done.stderr.splitlines() if not line.startswith(("reading", "training"))]


@pytest.mark.fault("A8")
def test_a_stream_that_does_not_wait_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    redirect_stdout(monkeypatch, writing)
    protect_streams()
    slow = subprocess.Popen(["sh", "-c", "sleep 0.2; wc -c"], stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    print("x" * 1_000_000, flush=True)
    os.close(writing)
    assert int(slow.communicate()[0]) == 1_000_001


# ---- users and settings -------------------------------------------------------------------------


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process belongs to a user without a home and without an entry in the password file."""

    def unknown(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"nanokimi-home-{os.getuid()}"


@pytest.mark.fault("A9")
def test_a_user_without_a_home_trains(library_text: Path, tmp_path: Path, nobody: Path) -> None:
    assert main(arguments(library_text, tmp_path / "run")) == 0
    assert step_of(tmp_path / "run", "final.pt") == 4
    assert Path.home() == Path(os.path.expanduser("~")) == nobody
    assert files.cache_home() == nobody / ".cache" / "nanokimi"
    assert getpass.getuser() == str(os.getuid())
    assert nobody.stat().st_mode & 0o777 == 0o700


@pytest.mark.fault("A9")
def test_a_home_that_others_can_write_is_not_used(tmp_path: Path, nobody: Path) -> None:
    """Libraries are loaded from the cache below it."""
    nobody.mkdir()
    nobody.chmod(0o777)
    assert files.home() != nobody
    assert files.home().stat().st_mode & 0o777 == 0o700


@pytest.mark.fault("A15")
@pytest.mark.parametrize("flags", [["--output_dir", "~/x"], ["--set", "output_dir=~/x"], ["--config", "~/run.toml"]])
def test_a_tilde_is_the_home(
    library_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "run.toml").write_text('output_dir = "~/x"\n')
    command = arguments(library_text, tmp_path)
    at = command.index("--output_dir")
    assert main([*command[:at], *command[at + 2 :], "--max_steps", "1", *flags]) == 0
    assert step_of(tmp_path / "home" / "x") == 1
    assert not (tmp_path / "~").exists()


@pytest.mark.fault("A15")
def test_every_path_of_a_list_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert files.expand_home("a~.txt,~/b.txt,./~") == "a~.txt,/h/b.txt,./~"
    assert files.expand_home("~/a.txt=0.7,tokenbin:~/b=0.3") == "/h/a.txt=0.7,tokenbin:/h/b=0.3"


@pytest.mark.fault("A15")
def test_a_warm_up_that_is_longer_than_the_run_is_told_with_its_figures() -> None:
    (told,) = doubts(TrainConfig(warmup_steps=96, max_steps=12, schedule="constant"))
    assert told == (
        "--warmup_steps 96 is long for a run of 12 steps: its learning rate gets no further than 12.5% of "
        "--learning_rate 0.02: lower it, or raise --max_steps"
    )
    assert not [*doubts(TrainConfig())]
    assert not [*doubts(TrainConfig(schedule="cosine", warmup_steps=200))]


@pytest.mark.fault("A15")
def test_more_workers_than_cores_are_one_line_of_ours(
    library_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        assert main(arguments(library_text, tmp_path, "--num_workers", "2", "--max_steps", "2")) == 0
    assert not [str(warning.message) for warning in raw if "worker" in str(warning.message)]
    told = [line for line in capsys.readouterr().err.splitlines() if "_workers" in line]
    assert told == ["warning: --num_workers 2: there is work for 1, as many as this process has cores"]
