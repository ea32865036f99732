from __future__ import annotations

import io
import math
from contextlib import redirect_stderr

import pytest

from nanokimi.training.progress import ProgressDisplay, clock

VALUES = {"train_ce_loss": 4.25, "tokens_per_second": 3012.4, "max_logit": [1.0, 12.34, None], "clipped_heads": 2}


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr("nanokimi.training.progress.time", fake)
    return fake


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_plain_lines_come_at_the_first_step_every_interval_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(25, 0, interval=10, plain=True) as display:
        for step in range(1, 26):
            display.step(step, VALUES)
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in err.splitlines()] == ["1/25", "10/25", "20/25", "25/25"]
    assert out == ""


def test_a_plain_line_tells_everything(capsys: pytest.CaptureFixture[str], fake_time: Clock) -> None:
    with ProgressDisplay(1000, 0, interval=2, plain=True) as display:
        display.step(1, VALUES)
        fake_time.now += 0.5
        display.step(2, VALUES | {"val_bits_per_byte": 2.071})
    assert capsys.readouterr().err.splitlines()[1] == (
        "step 2/1,000  loss 4.250  bits/byte 2.071  3,012 tok/s  max logit 12.3  heads clipped 4  ETA 8:19"
    )


def test_the_last_line_waits_for_the_last_validation(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(2, 0, interval=1, plain=True) as display:
        display.step(1, VALUES)
        display.step(2, VALUES)
        display.step(2, {"val_bits_per_byte": 1.875})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "bits/byte 1.875" in lines[1]


def test_an_interrupted_run_still_shows_its_last_step_once(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(100, 0, interval=0, plain=True) as display:
        for step in range(1, 8):
            display.step(step, VALUES)
        display.close()
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/100", "7/100"]


def test_nothing_is_printed_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(100, 50, interval=1, plain=True).close()
    assert capsys.readouterr().err == ""


def test_values_that_are_missing_or_not_finite_do_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(2, 0, interval=1, plain=True) as display:
        display.step(1, {})
        display.step(2, {"train_ce_loss": math.nan, "max_logit": [None]})
    first, second = capsys.readouterr().err.splitlines()
    assert "loss -  bits/byte -  - tok/s  max logit -  heads clipped 0" in first
    assert "loss nan" in second


def test_without_a_terminal_the_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(1, 0, interval=1) as display:
        display.log("a [sample] \x3a")
        display.step(1, VALUES)
    err = capsys.readouterr().err
    assert err.startswith("a [sample] :\nstep 1/1 ")
    assert "\x1b" not in err


def test_eta_leaves_out_the_first_step_and_what_came_before_a_resume(fake_time: Clock) -> None:
    display = ProgressDisplay(110, 100, interval=0, plain=True)
    assert display._seconds_left() is None
    fake_time.now += 60
    display.step(101, VALUES)
    fake_time.now += 4
    display.step(103, VALUES)
    assert display._seconds_left() == 14.0


def test_eta_and_bar_follow_the_time_budget_when_it_ends_first(fake_time: Clock) -> None:
    display = ProgressDisplay(1_000_000, 0, interval=0, plain=True, max_seconds=180)
    display.step(1, VALUES)
    fake_time.now += 45
    display.step(2, VALUES)
    assert display._seconds_left() == 135.0
    assert display._done() == 0.25


def test_eta_follows_the_steps_when_they_end_before_the_budget(fake_time: Clock) -> None:
    display = ProgressDisplay(10, 0, interval=0, plain=True, max_seconds=1000)
    display.step(1, VALUES)
    fake_time.now += 10
    display.step(6, VALUES)
    assert display._seconds_left() == 8.0
    assert display._done() == 0.6


def test_a_terminal_gets_a_live_bar(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressDisplay(10, 0, interval=1) as display:
        display.step(5, VALUES | {"val_bits_per_byte": 2.071})
    shown = terminal.getvalue()
    for part in (
        "step 5/10",
        "50%",
        "━",
        "loss 4.250",
        "bits/byte 2.071",
        "3,012 tok/s",
        "max logit 12.3",
        "clipped 2",
    ):
        assert part in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_an_error_inside_gives_the_terminal_back(terminal: Terminal) -> None:
    def fail() -> None:
        with redirect_stderr(terminal), ProgressDisplay(10, 0, interval=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_text_above_the_bar_is_taken_literally(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressDisplay(10, 0, interval=1) as display:
        display.log("x = [red]1[/red] :smile:")
    assert "x = [red]1[/red] :smile:" in terminal.getvalue()


def test_a_redirected_stdout_keeps_what_is_printed(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with redirect_stderr(terminal), ProgressDisplay(10, 0, interval=1):
        print("to the file")
    assert capsys.readouterr().out == "to the file\n"
    assert "to the file" not in terminal.getvalue()


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal), ProgressDisplay(1, 0, interval=1) as display:
        display.step(1, VALUES)
    assert terminal.getvalue().startswith("step 1/1 ")


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text
