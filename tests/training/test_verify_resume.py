"""``--verify_resume``: what is equal to the bit is said to be, and what is not is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanokimi.cli import main
from nanokimi.training import verify_resume
from nanokimi.training.verify_resume import differences

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.fault("B2")


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    small = ["--preset", "debug", "--set", "max_seq_length=32", "--device", "cpu", "--eval_interval", "3"]
    clips = ["--qk_clip_tau", "2", "--val_tokens", "300", "--save_interval", "1", "--max_steps", "99"]
    return ["train", *small, *clips, "--data_path", str(text), "--output_dir", str(output), *more]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The runs do without processes of their own; their commands."""
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        ran.append(command[len(verify_resume.NANOKIMI) :])
        return SimpleNamespace(returncode=main(ran[-1]))

    monkeypatch.setattr(verify_resume, "subprocess", SimpleNamespace(run=run))
    return ran


def test_a_command_that_resumes_to_the_bit_is_said_to_and_leaves_nothing(
    library_text: Path, tmp_path: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    assert main(arguments(library_text, output, "--verify_resume", "2")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "4 steps at once, and 2 + 2 in two processes:"
    parts = ("model", "optimizer", "data", "random", "tokenizer", "counters", "exact_logits", "history")
    assert said[1:] == [f"  {part}: equal to the bit" for part in parts]
    assert [command[-1] for command in in_this_process[1:]] == ["--stop_after=2", "--resume"]
    assert not output.exists()
    assert not Path(in_this_process[0][-1]).exists()


def test_what_a_resume_changes_is_listed(
    library_text: Path,
    tmp_path: Path,
    in_this_process: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the random state is lost, and a bit of the optimizer."""
    monkeypatch.setattr("nanokimi.training.trainer.torch.set_rng_state", lambda state: torch.manual_seed(99))
    load = verify_resume.contents

    def spoilt(output: Path) -> Any:
        found = load(output)
        if output.name == "halves":
            found["optimizer"]["state"][0]["exp_avg"].view(-1)[3] += 1e-7
        return found

    monkeypatch.setattr(verify_resume, "contents", spoilt)
    assert main(arguments(library_text, tmp_path, "--verify_resume", "2")) == 1
    said = capsys.readouterr().out
    assert "  optimizer: 1 difference\n    optimizer.state.0.exp_avg: 1 of " in said
    assert "  random: 1 difference\n    random.cpu: " in said
    assert "  model: equal to the bit" in said


def test_a_mistake_ends_it_with_the_code_of_the_run_that_made_it(
    library_text: Path, tmp_path: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(library_text, tmp_path, "--verify_resume", "2", "--batch_size", "5000")) == 2
    assert len(in_this_process) == 1
    for flags, message in ((["--resume"], "leave out --resume"), (["--stop_after", "1"], "leave out --resume")):
        assert main(arguments(library_text, tmp_path, "--verify_resume", "2", *flags)) == 2
        assert message in capsys.readouterr().err
    assert main(arguments(library_text, tmp_path, "--verify_resume", "0")) == 2
    assert "--verify_resume 0: name a number of steps" in capsys.readouterr().err
    assert main(arguments(library_text, tmp_path, "--stop_after", "-1")) == 2


def test_a_bit_is_enough_and_not_a_number_equals_itself() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert not [*differences({"a": [nan, 1]}, {"a": [nan.clone(), 1]}, "x")]
    (told,) = differences(nan, torch.tensor([float("nan"), -0.0]), "x")
    assert told.startswith("x: ")
    assert [*differences({"a": 1}, {"b": 1}, "x")] == ["x.a: int and NoneType", "x.b: NoneType and int"]
    assert [*differences([1, 2], [1, 3], "x")] == ["x[1]: 2 and 3"]
    assert [*differences([1], [1, 3], "x")] == ["x: [1] and [1, 3]"]
    assert [*differences(torch.zeros(2), torch.zeros(2, dtype=torch.int32), "x")]


@pytest.mark.slow
@pytest.mark.serial
def test_two_ranks_with_a_mixture_resume_to_the_bit_in_fresh_processes(library_text: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    mixture = ["--mix", f"{library_text}=0.6,localstreaming:{library_text}=0.4", "--parallel", "fsdp", "--spike_guard"]
    command = [*torchrun, str(ROOT / "train.py"), *arguments(library_text, tmp_path / "mine", *mixture)[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--verify_resume", "2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:4] == [f"  {part}: equal to the bit" for part in ("model", "shards", "data")]
    assert "differ" not in done.stdout
    assert not (tmp_path / "mine").exists()


def test_the_record_covers_every_source_a_mixture_and_two_ranks() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "verify-resume.json").read_text())
    names = " ".join(record["cases"])
    for name in ("local", "localstreaming", "tokenbin", "hfstreaming", "fineweb", "mixture", "two ranks"):
        assert name in names
    assert {case["exit code"] for case in record["cases"].values()} == {0}
