"""Whole runs under torchrun: what they leave, and what becomes of them when something happens to a rank."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import ALONE, Job, Launch, free_port, history, launched, real_text, run, wait_until

from nanokimi import checkpoint
from nanokimi.checkpoint import shards
from nanokimi.cli import main
from nanokimi.interop.loading import load

pytestmark = pytest.mark.serial

STEPS = 12
FSDP = ("--parallel", "fsdp")
RESTARTS = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
MINUTE = 60  # in which a job must end that has lost a rank


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(real_text(40_000))
    return folder


def arguments(place: Path, name: str, *more: str) -> tuple[str, ...]:
    return (
        "train", "--preset", "debug", "--data_path", str(place / "text.txt"), "--output_dir", str(place / name),
        "--device", "cpu", "--batch_size", "4", "--max_steps", str(STEPS), "--schedule", "constant",
        "--warmup_steps", "3", "--eval_interval", "6", "--val_tokens", "640", "--save_interval", "4",
        "--timeout", "60", "--set", "max_seq_length=32", *more,
    )  # fmt: skip


def losses(place: Path, name: str) -> list[float]:
    """By which runs are compared: of training and of evaluation."""
    seen = history(place / name)
    assert seen["steps"] == list(range(1, STEPS + 1))
    return [*seen["train_ce_loss"], *seen["val_loss"]]


def completes(place: Path, launch: Launch) -> str:
    code, job = run(launch, place)
    assert code == 0, job.said()
    return job.said()


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Any:
    said = completes(place, Launch(arguments(place, "undisturbed", *FSDP, "--samples", "2")))
    (place / "undisturbed" / "said").write_text(said)
    return pytest.approx(losses(place, "undisturbed"), abs=1e-4)


def checkpoints(place: Path, name: str) -> Path:
    return place / name / "checkpoints"


# ---- what a run leaves --------------------------------------------------------------------------


@pytest.mark.usefixtures("undisturbed")
def test_only_the_leader_speaks_and_writes(place: Path) -> None:
    said = (place / "undisturbed" / "said").read_text()
    assert said.count("2 ranks, fsdp") == 1
    assert said.count("--- sample at step 6 ---") == 1
    assert {path.name for path in (place / "undisturbed" / "logs").iterdir()} == {
        "training_metrics.json", "training_metrics.jsonl",
    }  # fmt: skip
    lines = (place / "undisturbed" / "logs" / "training_metrics.jsonl").read_text().splitlines()
    assert sum("train_ce_loss" in line for line in lines) == STEPS


@pytest.mark.usefixtures("undisturbed")
def test_files_and_folders_of_a_sharded_run_are_the_same_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoints(place, "undisturbed")
    names = {path.name for path in folder.iterdir()}
    assert names == {"latest.pt", "best.pt", "final.pt", "previous.pt", "step_00000008", "step_00000012"}
    logits, texts = [], []
    for name in ("latest.pt", "final.pt", "best.pt", "step_00000012"):
        model, tokenizer = load(folder / name)
        with torch.no_grad():
            logits.append(model(torch.tensor([tokenizer.encode("def main(")])))
    for name in ("final.pt", "step_00000012"):
        assert main(["generate", str(folder / name), "--prompt", "def", "--max_tokens", "8", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert all(torch.equal(found, logits[0]) for found in logits)
    assert texts[0] == texts[1] != ""


@pytest.mark.usefixtures("undisturbed")
def test_weights_alone_are_no_run_to_go_on_with(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = str(checkpoints(place, "undisturbed") / "latest.pt")
    assert main([*arguments(place, "other"), "--resume", "--checkpoint_path", named]) == 2
    assert "step_N beside it, or begin a run with --init_from" in capsys.readouterr().err


# ---- the loss of a rank -------------------------------------------------------------------------


def test_a_killed_rank_ends_the_job_and_resume_completes_it(place: Path, undisturbed: Any) -> None:
    killed = Launch(arguments(place, "killed", *FSDP), stumble=(1, 6, signal.SIGKILL))
    with launched(killed, place) as job:
        assert job.wait(MINUTE) != 0
    assert len(job.lines()) == 1
    assert "lost contact with another rank" in job.lines()[0]
    assert "start again with --resume" in job.lines()[0]
    shards.verify(checkpoints(place, "killed") / "step_00000004")
    assert checkpoint.read(checkpoints(place, "killed") / "latest.pt")["counters"]["step"] == 4
    said = completes(place, Launch(arguments(place, "killed", *FSDP, "--resume")))
    assert "step_00000004 at step 4 of 12" in said
    assert losses(place, "killed") == undisturbed


@pytest.mark.parametrize(
    ("name", "more", "stumble", "second"),
    [
        ("leader", FSDP, (0, 6, signal.SIGKILL), "step_00000004 at step 4 of"),
        ("nothing", FSDP, (1, 3, signal.SIGKILL), "step 1/12"),
        ("weights", (*FSDP, "--save_interval", "8"), (1, 7, signal.SIGKILL), "step 1/12"),  # of an evaluation, alone
    ],
)
def test_torchrun_starts_a_killed_run_again_and_it_ends_as_if_nothing_had_happened(
    place: Path, undisturbed: Any, name: str, more: tuple[str, ...], stumble: tuple[int, int, int], second: str
) -> None:
    said = completes(place, Launch(arguments(place, name, *more), RESTARTS, stumble=stumble))
    assert said.count("lost contact with another rank") == 1
    assert re.search(f"lost contact with another rank.*{second}", said, re.DOTALL)
    assert losses(place, name) == undisturbed


@pytest.mark.slow
def test_replicas_are_started_again_as_well(place: Path) -> None:
    """Under the other kind of rendezvous, and as users have it: nothing is forked."""
    kind = ("--parallel", "ddp")
    completes(place, Launch(arguments(place, "replicas", *kind)))
    flags = (f"--master-port={free_port()}", "--nproc_per_node=2", "--max-restarts=1")
    launch = Launch(arguments(place, "again", *kind), flags, afresh=True, stumble=(1, 6, signal.SIGKILL))
    said = completes(place, launch)
    assert re.search("lost contact with another rank.*latest.pt at step 4 of", said, re.DOTALL)
    assert losses(place, "again") == pytest.approx(losses(place, "replicas"), abs=1e-4)


@pytest.mark.fault(51)
@pytest.mark.slow
def test_a_hang_ends_the_job_and_leaves_the_stacks_of_those_that_waited(place: Path) -> None:
    hangs = Launch(arguments(place, "hangs", *FSDP, "--timeout", "6"), stumble=(1, 6, signal.SIGSTOP))
    with launched(hangs, place) as job:
        wait_until(job.lines, job, MINUTE)
        os.kill(job.rank(1), signal.SIGKILL)  # torchrun would, half a minute later
        assert job.wait() != 0
    assert "lost contact with another rank" in job.lines()[0]
    stacks = (place / "hangs" / "logs" / "stacks_rank_0.txt").read_text()
    assert "in _train_step" in stacks


# ---- signals ------------------------------------------------------------------------------------


def steps_of(place: Path, name: str) -> int:
    path = place / name / "logs" / "training_metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.fault(67)
def test_signals_save_on_all_ranks_at_one_step(place: Path) -> None:
    """SIGUSR1 to one rank saves and goes on; SIGTERM to torchrun saves and ends; then --resume."""
    quiet = (*FSDP, "--save_interval", "0", "--eval_interval", "0")
    with launched(Launch(arguments(place, "signals", *quiet, "--max_steps", "100000")), place) as job:
        wait_until(lambda: steps_of(place, "signals") >= 3, job)
        os.kill(job.rank(1), signal.SIGUSR1)
        saved = wait_for_folders(place, job, 1)
        passed = steps_of(place, "signals")
        wait_until(lambda: steps_of(place, "signals") > passed + 1, job)
        assert shards.step_folders(checkpoints(place, "signals")) == saved
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait() != 0
    newest = shards.step_folders(checkpoints(place, "signals"))[-1]
    shards.verify(newest)
    step = shards.read_about(newest)["counters"]["step"]
    assert checkpoint.read(checkpoints(place, "signals") / "latest.pt")["counters"]["step"] == step > passed
    assert not (checkpoints(place, "signals") / "final.pt").exists()
    more = ("--max_steps", str(step + 2), "--resume")
    assert f"at step {step} of" in completes(place, Launch(arguments(place, "signals", *quiet, *more)))
    assert history(place / "signals")["steps"] == list(range(1, step + 3))


def wait_for_folders(place: Path, job: Job, count: int) -> list[Path]:
    def there() -> list[Path]:
        return shards.step_folders(checkpoints(place, "signals"))

    wait_until(lambda: len(there()) == count, job)
    return there()


# ---- saving beside the training -----------------------------------------------------------------


@pytest.mark.fault(62)
def test_saving_beside_the_training_survives_the_end_of_the_whole_job(place: Path, undisturbed: Any) -> None:
    """Killed in the save of step 8, it goes on from step 4, to the same end."""
    beside = (*FSDP, "--async_checkpoints")
    assert run(Launch(arguments(place, "async", *beside), end_in_save=8), place)[0] == -signal.SIGKILL
    assert [path.name for path in shards.step_folders(checkpoints(place, "async"))] == ["step_00000004"]
    said = completes(place, Launch(arguments(place, "async", *beside, "--resume")))
    assert "step_00000004 at step 4 of 12" in said
    assert losses(place, "async") == undisturbed
    kept = sorted(path.name for path in checkpoints(place, "async").iterdir() if path.is_dir())
    assert kept == ["step_00000008", "step_00000012"]
    expected, found = (load(checkpoints(place, name) / "step_00000012")[0] for name in ("undisturbed", "async"))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "-1"], "--learning_rate"),
        (["--batch_size", "two"], "batch_size takes a whole number"),
        (["--timeout", "0"], "--timeout"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--data_path", "nowhere.txt"], "nowhere.txt"),
        (["--batch_size", "3", "--gradient_accumulation", "1"], "3 sequences .* does not divide over 2 ranks"),
        (["--parallel", "fsdp", "--replicate", "3"], "--replicate 3 does not divide the 2 ranks"),
        (["--output_dir", "/proc/self/run"], "--output_dir /proc/self/run: cannot be written"),  # fault 64
    ],
)
def test_a_mistake_is_one_line_over_all_ranks(place: Path, flags: list[str], message: str) -> None:
    """Also when the rank that tells is the last to find it, and torchrun ends all with the first that ends."""
    code, job = run(Launch(arguments(place, "mistakes", *flags), late=0.5), place)
    assert code != 0
    told = [line for line in job.said().splitlines() if line.startswith("nanokimi")]
    assert len(told) == 1, job.said()
    assert re.search(message, told[0])
    assert "exitcode  : 2" in job.said()


@pytest.mark.slow
@pytest.mark.fault("A13")
def test_data_that_fail_on_one_rank_end_all_with_the_run_saved(place: Path) -> None:
    lines = [json.dumps({"text": f"row {number} ".ljust(1000, "x")}) for number in range(220)]
    lines[200] = "no JSON"  # in the second part, after a first chunk of it
    (place / "late.jsonl").write_text("\n".join(lines))
    streamed = ("--dataset", "localstreaming", "--data_path", str(place / "late.jsonl"), "--shuffle_buffer", "8")
    more = (
        *streamed,
        "--max_steps",
        "500",
        "--batch_size",
        "32",
        "--eval_interval",
        "0",
        "--save_interval",
        "0",
        "--val_fraction",
        "0",
    )
    code, job = run(Launch(arguments(place, "late", *more), part_bytes=120_000), place)
    said = job.said()
    assert code != 0
    step = checkpoint.read(place / "late" / "checkpoints" / "latest.pt")["counters"]["step"]
    assert step > 0
    assert said.count("is not JSON") == 1
    assert f"the run is saved as it was after step {step}" in said


def test_sharing_out_needs_torchrun(place: Path) -> None:
    code, job = run(Launch(arguments(place, "mistakes", "--expert_parallel", "2"), ALONE), place)
    assert code == 2
    assert [line.split(": start them with")[0] for line in job.lines()] == [
        "nanokimi: --parallel, --replicate and --expert_parallel need several processes"
    ]
