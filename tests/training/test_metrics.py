"""The history of a run, in files and in checkpoints; and the bar and the lines that show it while it goes on."""

from __future__ import annotations

import io
import json
import math
from contextlib import closing, redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from nanokimi.errors import RunError
from nanokimi.training.metrics import STEP_COLUMNS, MetricsLog, ProgressDisplay, clock
from nanokimi.training.plots import plot_training


def one_step(**changes: object) -> dict[str, object]:
    losses = {"train_ce_loss": 4.0, "train_aux_loss": 0.5, "learning_rate": 0.02, "grad_norm": 1.5}
    speed = {"tokens": 512, "tokens_per_second": 3000.0}
    layers = {"max_logit": [8.0, 9.0, 10.0], "clipped_heads": 0, "expert_load": [[0.5, 0.5], [0.25, 0.75]]}
    return losses | speed | layers | changes


def read_strictly(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def log_of(folder: Path, steps: int) -> MetricsLog:
    log = MetricsLog(folder)
    for step in range(1, steps + 1):
        log.record(step, one_step(tokens=512 * step))
        if step % 2 == 0:
            log.record_validation(step, 3.0 / step, 2.0 / step)
    return log


def test_json_holds_parallel_lists_under_the_documented_names(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 5)) as log:
        log.write_json()
    history = read_strictly((tmp_path / "logs" / "training_metrics.json").read_bytes())
    assert list(history) == ["steps", *STEP_COLUMNS, "val_steps", "val_loss", "val_bits_per_byte"]
    assert {len(history[name]) for name in ("steps", *STEP_COLUMNS)} == {5}
    assert history["steps"] == [1, 2, 3, 4, 5]
    assert history["tokens"] == [512, 1024, 1536, 2048, 2560]
    assert (history["val_steps"], history["val_loss"], history["val_bits_per_byte"]) == (
        [2, 4],
        [1.5, 0.75],
        [1.0, 0.5],
    )
    assert history["expert_load"][0] == [[0.5, 0.5], [0.25, 0.75]]


def test_train_loss_is_cross_entropy_plus_auxiliary_loss(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 1)) as log:
        assert log.history()["train_loss"] == [4.5]


def test_non_finite_numbers_become_null_in_both_files(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        log.record(1, one_step(train_ce_loss=math.nan, grad_norm=math.inf, max_logit=[1.0, -math.inf, 2.0]))
        log.record_validation(1, math.nan, math.inf)
        log.write_json()
    first, second = map(read_strictly, log.jsonl_path.read_text().splitlines())
    assert (first["train_loss"], first["grad_norm"], first["max_logit"]) == (None, None, [1.0, None, 2.0])
    assert second == {"val_step": 1, "val_loss": None, "val_bits_per_byte": None}
    assert read_strictly(log.json_path.read_bytes())["train_ce_loss"] == [None]


def test_a_skipped_step_stands_in_every_list(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 1)) as log:
        log.record(2, {"learning_rate": 0.02, "tokens": 1024})
        history = log.history()
    assert {len(history[name]) for name in ("steps", *STEP_COLUMNS)} == {2}
    assert (history["train_loss"], history["max_logit"][1], history["tokens"]) == ([4.5, None], None, [512, 1024])


@pytest.mark.fault(50)
def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 3)) as log:
        assert len(log.jsonl_path.read_text().splitlines()) == 4


def test_a_misspelt_column_is_refused(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log, pytest.raises(ValueError, match="gradnorm"):
        log.record(1, {"gradnorm": 1.0})


def test_a_resume_rewrites_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 3)) as log:
        state = log.state()
        log.record(4, one_step(train_ce_loss=99.0))
    with log.jsonl_path.open("a") as file:
        file.write('{"step": 5, "tr')  # the line that a kill cut short
    with closing(MetricsLog(tmp_path, state=state)) as resumed:
        resumed.record(4, one_step())
        resumed.write_json()
    steps = [
        record["step"] for record in map(read_strictly, log.jsonl_path.read_text().splitlines()) if "step" in record
    ]
    assert steps == [1, 2, 3, 4]
    assert read_strictly(log.json_path.read_bytes())["train_ce_loss"] == [4.0] * 4
    assert [path.name for path in log.jsonl_path.parent.glob("*.jsonl*")] == ["training_metrics.jsonl"]


@pytest.mark.parametrize("column", ["expert_load", "val_bits_per_byte"])
def test_a_column_that_an_older_history_lacks_is_filled_with_null(tmp_path: Path, column: str) -> None:
    with closing(log_of(tmp_path / "old", 4)) as log:
        records = [json.loads(line) for line in log.state().splitlines()]
    old = "".join(json.dumps({n: v for n, v in record.items() if n != column}) + "\n" for record in records)
    with closing(MetricsLog(tmp_path / "new", state=old)) as resumed:
        resumed.record(5, one_step())
        resumed.record_validation(5, 3.0, 2.0)
        history = resumed.write_json()
        assert resumed.state().startswith(old), "what was saved stays as it is"
    assert {len(history[name]) for name in ("steps", *STEP_COLUMNS)} == {5}
    assert {len(history[name]) for name in ("val_steps", "val_loss", "val_bits_per_byte")} == {3}
    assert history[column][:-1] == [None] * len(history[column][:-1])
    assert history[column][-1] is not None
    plot_training(history, tmp_path / "plot.png", tau=100.0)
    plot_training({n: v for n, v in history.items() if n != column}, tmp_path / "plot.png", tau=100.0)


def test_a_restored_history_equals_the_one_saved(tmp_path: Path) -> None:
    with (
        closing(log_of(tmp_path / "first", 4)) as log,
        closing(MetricsLog(tmp_path / "second", state=log.state())) as restored,
    ):
        assert restored.history() == log.history()
        assert restored.jsonl_path.read_bytes() == log.jsonl_path.read_bytes()


def test_a_fresh_run_keeps_the_files_of_earlier_ones(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        log_of(tmp_path, steps).close()
    counts = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "logs").iterdir()}
    assert counts == {"training_metrics.jsonl.1": 1, "training_metrics.jsonl.2": 3, "training_metrics.jsonl": 4}


def test_a_resume_keeps_the_history_of_another_run(tmp_path: Path) -> None:
    with closing(log_of(tmp_path / "elsewhere", 2)) as other:
        state = other.state()
    with closing(MetricsLog(tmp_path)) as log:
        log.record(1, one_step(train_ce_loss=7.0))
    MetricsLog(tmp_path, state=state).close()
    kept = log.jsonl_path.with_name("training_metrics.jsonl.1")
    assert read_strictly(kept.read_text())["train_ce_loss"] == 7.0


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot write .*training_metrics\.jsonl.*--output_dir"):
        MetricsLog(tmp_path)


# ---- what the user watches ----------------------------------------------------------------------

VALUES = {"train_ce_loss": 4.25, "tokens_per_second": 3012.4, "max_logit": [1.0, 12.34, None], "clipped_heads": 2}


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr("nanokimi.training.metrics.time", fake)
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
