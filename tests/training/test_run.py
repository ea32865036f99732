"""Whole runs through the command line: what they leave behind, and what goes wrong on the way."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import file
from nanokimi.cli import main
from nanokimi.interop.loading import load
from nanokimi.training.verify_resume import contents, differences

TIMES = {"tokens_per_second"}
# A run that is stopped on its way: evaluations, clipped heads and two saves before its end.
STOPPED = ("--max_steps", "60", "--eval_interval", "10", "--save_interval", "20", "--val_fraction", "0.1")
STOPPED += ("--qk_clip_tau", "0.5")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real text: a module of the standard library."""
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return path


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    quick = (
        "--preset",
        "debug",
        "--batch_size",
        "2",
        "--warmup_steps",
        "4",
        "--eval_interval",
        "0",
        "--save_interval",
        "4",
    )
    return ["train", *quick, "--data_path", str(text), "--output_dir", str(output), "--set", "max_seq_length=64", *more]


def start(text: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from nanokimi.cli import main; sys.exit(main(sys.argv[1:]))"]
    return subprocess.Popen(
        [*command, *arguments(text, output, *more)], stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_steps(process: subprocess.Popen[str], output: Path, steps: int) -> None:
    """Until the run has logged ``steps`` steps."""
    path = output / "logs" / "training_metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended or hung before step {steps}: {process.stderr and process.stderr.read()}")


def history(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "logs" / "training_metrics.json").read_text())
    return content


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, data position and every metric but the clock's, to the bit."""
    assert not [*differences(contents(a), contents(b), "run")]
    assert {k: v for k, v in history(a).items() if k not in TIMES} == {
        k: v for k, v in history(b).items() if k not in TIMES
    }


# ---- what a run leaves ----------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_metrics_and_a_plot(text: Path, tmp_path: Path) -> None:
    more = ("--max_steps", "6", "--eval-interval", "3", "--val_fraction", "0.1")  # dashes work as underscores do
    assert main(arguments(text, tmp_path, *more)) == 0
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"latest.pt", "best.pt", "final.pt", "previous.pt"}
    assert (tmp_path / "logs" / "training_metrics.png").read_bytes().startswith(b"\x89PNG")
    seen = history(tmp_path)
    assert seen["steps"] == [1, 2, 3, 4, 5, 6]
    assert seen["val_steps"] == [3, 6]
    assert seen["tokens"] == [2 * 2 * 64 * (i + 1) for i in range(6)]
    factors = [1 / 4, 2 / 4, 3 / 4, 1, (1 - 4 / 6) / 0.4, (1 - 5 / 6) / 0.4]  # warm-up, then the decay of the last 40 %
    assert seen["learning_rate"] == pytest.approx([0.02 * factor for factor in factors])
    assert all(len(load) == 2 and sum(load[0]) == pytest.approx(1) for load in seen["expert_load"])
    assert all(len(logits) == 3 and min(logits) > 0 for logits in seen["max_logit"])


def test_the_loss_falls(text: Path, tmp_path: Path) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "40", "--eval_interval", "20", "--val_fraction", "0.1")) == 0
    seen = history(tmp_path)
    assert seen["train_ce_loss"][0] == pytest.approx(5.55, abs=0.1)  # ln 257: nothing is known yet
    assert seen["train_ce_loss"][-1] < 4.0
    assert seen["val_bits_per_byte"][-1] == pytest.approx(seen["val_loss"][-1] / 0.6931, rel=1e-3)  # one byte a token


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
def test_accumulated_micro_batches_equal_the_large_batch(text: Path, tmp_path: Path) -> None:
    """In fp64: in fp32 Newton-Schulz enlarges the rounding of a sum in another order, on some processors too far."""
    for name, batch, accumulation in (("large", "4", "1"), ("small", "1", "4")):
        sizes = ("--batch_size", batch, "--gradient_accumulation", accumulation, "--max_steps", "3")
        assert main(arguments(text, tmp_path / name, *sizes)) == 0
    large, small = history(tmp_path / "large"), history(tmp_path / "small")
    for column in ("train_ce_loss", "train_aux_loss", "grad_norm"):
        assert small[column] == pytest.approx(large[column], rel=1e-4), column
    assert small["expert_load"] == large["expert_load"]


def test_a_fresh_run_never_overwrites_an_earlier_one(text: Path, tmp_path: Path) -> None:
    for steps in ("2", "3"):
        assert main(arguments(text, tmp_path, "--max_steps", steps)) == 0
    assert checkpoint.read(tmp_path / "checkpoints.1" / "final.pt")["counters"]["step"] == 2
    assert checkpoint.read(tmp_path / "checkpoints" / "final.pt")["counters"]["step"] == 3


# ---- stopping and going on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run leaves that nobody stops."""
    output = tmp_path_factory.mktemp("whole")
    assert main(arguments(text, output, *STOPPED)) == 0
    assert sum(history(output)["clipped_heads"]) > 0
    return output


@pytest.mark.fault(68)
@pytest.mark.slow
def test_kill_9_and_resume_equal_the_uninterrupted_run_to_the_bit(text: Path, whole: Path, tmp_path: Path) -> None:
    """In fresh processes, evaluations and balance biases included."""
    killed = start(text, tmp_path, *STOPPED)
    wait_for_steps(killed, tmp_path, 25)  # lines: 22 steps and two evaluations, of which the first 20 are saved
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    resumed = start(text, tmp_path, *STOPPED, "--resume")
    assert resumed.wait() == 0, resumed.stderr and resumed.stderr.read()
    assert_same_run(whole, tmp_path)


@pytest.mark.fault(66, 67)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_the_step_boundary(
    text: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The rest of the run is as if nothing had happened."""
    process = start(text, tmp_path, *STOPPED, "--save_interval", "0")
    wait_for_steps(process, tmp_path, 5)
    process.send_signal(number)
    assert process.wait() == code
    assert 5 <= checkpoint.read(tmp_path / "checkpoints" / "latest.pt")["counters"]["step"] < 60
    assert not (tmp_path / "checkpoints" / "final.pt").exists()
    assert main(arguments(text, tmp_path, *STOPPED, "--save_interval", "0", "--resume")) == 0
    assert history(tmp_path)["steps"] == list(range(1, 61))
    assert_same_run(whole, tmp_path)


@pytest.mark.fault(67)
def test_sigusr1_saves_and_goes_on(text: Path, tmp_path: Path) -> None:
    process = start(text, tmp_path, "--max_steps", "2000", "--save_interval", "0")
    wait_for_steps(process, tmp_path, 3)
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "latest.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    step = checkpoint.read(tmp_path / "checkpoints" / "latest.pt")["counters"]["step"]
    wait_for_steps(process, tmp_path, step + 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


@pytest.mark.fault(66)
@pytest.mark.serial
def test_ctrl_c_twice_ends_at_once(text: Path, tmp_path: Path) -> None:
    """The second one does not wait for the step, nor for a save."""
    slow = ("--max_steps", "100000", "--batch_size", "64", "--gradient_accumulation", "1000000", "--save_interval", "0")
    process = start(text, tmp_path, *slow)
    wait_for_steps(process, tmp_path, 0)
    time.sleep(2)  # inside the first step, which never ends
    process.send_signal(signal.SIGINT)
    time.sleep(2)  # two signals that come too soon after one another are one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert not (tmp_path / "checkpoints" / "latest.pt").exists()


def test_a_resume_may_lengthen_the_run(text: Path, tmp_path: Path) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "4")) == 0
    assert main(["train", "--resume", "--output_dir", str(tmp_path), "--max_steps", "6"]) == 0
    assert history(tmp_path)["steps"] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_as_it_is(text: Path, tmp_path: Path) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "4")) == 0
    before = (tmp_path / "checkpoints" / "final.pt").read_bytes()
    assert main(["train", "--resume", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "checkpoints" / "final.pt").read_bytes() == before


# ---- mistakes: one line, exit code 2 --------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanokimi: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.fault(2, 3, 4, 27, 32, 34, 35, 38, 42, 43, 45)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "-1"], "--learning_rate"),  # fault 32
        (["--max_steps", "0"], "--max_steps"),  # fault 34
        (["--batch_size", "0"], "--batch_size"),  # fault 35
        (["--max_grad_norm", "-1"], "--max_grad_norm"),  # fault 38
        (["--batch_size", "two"], "batch_size takes a whole number"),
        (["--set", "n_activated_experts=9"], "n_activated_experts"),  # fault 42
        (["--set", "qk_rope_head_dim=7"], "qk_rope_head_dim"),
        (["--set", "n_expert_groups=3"], "n_expert_groups"),
        (["--set", "score_func=relu"], "score_func"),  # fault 43
        (["--set", "n_layers=-1"], "n_layers"),
        (["--set", "n_layer=3"], "did you mean n_layers"),
        (["--set", "dim"], "write it as FIELD=VALUE"),
        (["--seed", "99999999999999999999"], "--seed must be 0 or more"),
        (["--dataset", "fineweb"], "the Hugging Face hub cannot be reached"),  # fault 27
        (["--samples", "1", "--sample_prompt", "x" * 200], "--sample_prompt has 200 tokens and the context holds 64"),
        (["--set", "vocab_size=100"], "vocab_size 100 is below the tokenizer's 257"),
        (["--device", "cuda:99"], "--device cuda:99: not available on this machine"),  # fault 45
        (["--device", "quantum"], "--device quantum: unknown"),
        (["--data_path", "nowhere.txt"], "nowhere.txt"),  # fault 4
        (["--checkpoint_path", "x.pt"], "add --resume"),
        (["--batch_size", "5000"], "--batch_size is 5000"),  # fault 3
        (["--set", "max_seq_length=60000"], "too short"),  # fault 2
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in refused(capsys, [*arguments(text, tmp_path / "run"), *flags])
    assert not (tmp_path / "run" / "logs" / "training_metrics.json").exists()


@pytest.mark.fault(52)
def test_resume_without_a_checkpoint_is_an_error_and_no_silent_restart(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    assert "--resume: no checkpoint in" in refused(capsys, arguments(text, tmp_path, "--resume"))


@pytest.mark.fault(53)
def test_a_mistyped_checkpoint_is_an_error(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "latets.pt"
    flags = arguments(text, tmp_path, "--resume", "--checkpoint_path", str(wrong))
    assert f"{wrong}: no such checkpoint" in refused(capsys, flags)


@pytest.mark.fault(55)
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, damage: bytes | None
) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "9")) == 0
    folder = tmp_path / "checkpoints"
    (folder / "final.pt").unlink()
    good = (folder / "latest.pt").read_bytes()
    (folder / "latest.pt").write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert main(["train", "--resume", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert f"warning: {folder / 'latest.pt'}" in said
    assert f"resuming {folder / 'previous.pt'} at step 8 of 9" in said
    assert history(tmp_path)["steps"] == list(range(1, 10))


@pytest.mark.fault(57)
def test_a_checkpoint_of_another_config_lists_what_differs(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "2")) == 0
    changed = ("--resume", "--set", "dim=48", "--learning_rate", "0.5", "--seed", "1337")
    line = refused(capsys, arguments(text, tmp_path, *changed))
    assert "learning_rate (saved 0.02, now 0.5)" in line
    assert "dim (saved 32, now 48)" in line
    assert "seed" not in line
    more = ("--resume", "--learning_rate", "0", "--adam_lr", "0", "--weight_decay", "0", "--max_steps", "3")
    before = checkpoint.read(tmp_path / "checkpoints" / "final.pt")["model"]["embed.weight"].clone()
    assert main(arguments(text, tmp_path, *more, "--override", "learning_rate,adam_lr,weight_decay")) == 0
    after = checkpoint.read(tmp_path / "checkpoints" / "final.pt")
    assert after["counters"]["step"] == 3
    assert torch.equal(after["model"]["embed.weight"], before), "the new rate of 0 rules"
    assert "no such field" in refused(capsys, arguments(text, tmp_path, *more, "--override", "learning"))
    assert "none that a resume can change" in refused(capsys, arguments(text, tmp_path, *more, "--override", "preset"))


def test_another_text_under_the_same_name_is_noticed(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "train.txt"
    copy.write_bytes(text.read_bytes())
    assert main(arguments(copy, tmp_path, "--max_steps", "2")) == 0
    copy.write_bytes(text.read_bytes()[10:])
    flags = arguments(copy, tmp_path, "--resume", "--max_steps", "3")
    assert "was trained on another text" in refused(capsys, flags)
    assert main([*flags, "--override", "data_path"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(extra=torch.zeros(1)), "has the unknown extra"),  # fault 58
        (lambda c: c["optimizer"]["param_groups"].pop(), "the optimizer state does not fit"),  # fault 59
        (
            lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3)),
            "the optimizer state does not fit",
        ),
        (lambda c: c["optimizer"]["state"].pop(0), "the optimizer state does not fit"),
    ],
)
def test_foreign_contents_are_an_error(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, change: Any, message: str
) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "2")) == 0
    path = tmp_path / "checkpoints" / "latest.pt"
    content = checkpoint.read(path)
    change(content)
    checkpoint.save(path, content)
    named = ("--resume", "--checkpoint_path", str(path))
    assert message in refused(capsys, arguments(text, tmp_path, *named, "--max_steps", "3"))


@pytest.mark.fault(64)
def test_an_output_folder_that_cannot_be_written_fails_at_the_start(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "--output_dir" in refused(capsys, arguments(text, tmp_path / "file"))


def test_resuming_another_runs_checkpoint_keeps_the_one_that_is_there(text: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, steps in ((here, "3"), (there, "2")):
        assert main(arguments(text, folder, "--max_steps", steps)) == 0
    named = str(there / "checkpoints" / "latest.pt")
    flags = arguments(text, here, "--resume", "--checkpoint_path", named, "--max_steps", "4")
    assert main(flags) == 0
    assert checkpoint.read(here / "checkpoints.1" / "final.pt")["counters"]["step"] == 3
    assert checkpoint.read(here / "checkpoints" / "final.pt")["counters"]["step"] == 4
    assert checkpoint.read(there / "checkpoints" / "final.pt")["counters"]["step"] == 2


@pytest.mark.fault(44)
def test_overriding_the_seed_goes_on_in_another_order(text: Path, tmp_path: Path) -> None:
    assert main(arguments(text, tmp_path, "--max_steps", "2")) == 0
    assert main(arguments(text, tmp_path, "--resume", "--max_steps", "3", "--seed", "5", "--override", "seed")) == 0
    assert checkpoint.read(tmp_path / "checkpoints" / "final.pt")["data"]["samples"] == 3 * 4


def test_two_runs_never_share_a_folder(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> None:
    process = start(text, tmp_path, "--max_steps", "100000")
    wait_for_steps(process, tmp_path, 1)
    assert "another run is writing there" in refused(capsys, arguments(text, tmp_path))
    process.terminate()
    assert process.wait() == 143


def test_settings_come_from_the_file_and_flags_win(text: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text("max_steps = 5\n[model]\nmax_seq_length = 32\n[training]\nbatch_size = 3\nseed = 5\n")
    flags = ["train", "--preset", "debug", "--config", str(settings), "--data_path", str(text), "--eval_interval", "0"]
    assert main([*flags, "--output_dir", str(tmp_path), "--max_steps", "2"]) == 0
    content = checkpoint.read(tmp_path / "checkpoints" / "final.pt")
    assert content["model_config"]["max_seq_length"] == 32
    assert [content["train_config"][name] for name in ("max_steps", "batch_size", "seed")] == [2, 3, 5]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("steps = 5", "no field 'steps'"),
        ("[model.heads]\ndim = 3", "no field 'heads'"),
        ("max_steps = ", "--config"),
        ('max_steps="5"', "number"),
    ],
)
def test_mistakes_in_the_settings_file_are_one_line(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, contents: str, message: str
) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(contents)
    assert message in refused(capsys, [*arguments(text, tmp_path), "--config", str(settings)])


def test_an_unknown_flag_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--batchsize", "2"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_compiled_training_gives_a_checkpoint_that_loads(text: Path, tmp_path: Path) -> None:
    one_layer = ("--set", "n_layers=1")
    assert main(arguments(text, tmp_path, "--max_steps", "1", "--compile", "on", *one_layer)) == 0
    model, tokenizer = load(tmp_path / "checkpoints" / "final.pt")
    assert model(torch.tensor([tokenizer.encode("x")])).isfinite().all()


@pytest.mark.fault(1, 5, 6)
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),  # fault 1
        (b" \n\n", "the text is blank"),
        (None, "is a directory"),  # fault 5
        (b"caf\xe9", "not UTF-8 at byte 3"),  # fault 6
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, contents: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if contents is None:
        path.mkdir()
    else:
        path.write_bytes(contents)
    line = refused(capsys, arguments(path, tmp_path / "run"))
    assert message in line
    assert str(path) in line


@pytest.mark.fault(63)
def test_a_full_disk_ends_the_run_in_one_line_and_the_last_save_is_resumed(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy, saves = file._write, []

    def write(*args: Any) -> str:
        saves.append(args)
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return healthy(*args)

    with monkeypatch.context() as full:
        full.setattr(file, "_write", write)
        assert main(arguments(text, tmp_path, "--max_steps", "5")) == 1
    said = capsys.readouterr().err
    assert "the disk is full; the earlier checkpoint is intact: free space and resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert main(["train", "--resume", "--output_dir", str(tmp_path)]) == 0
    assert "latest.pt at step 4 of 5" in capsys.readouterr().err
    assert history(tmp_path)["steps"] == list(range(1, 6))
