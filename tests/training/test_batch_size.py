"""--batch_size auto: the largest cut of a step that fits, recorded; the step itself stays as large as it was."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.errors import UserError
from nanokimi.training import batch_size
from nanokimi.training.batch_size import largest_fitting, with_fitting_batch

CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


def flags(text: Path, *more: str) -> list[str]:
    quick = ("--preset", "debug", "--eval_interval", "0", "--set", "max_seq_length=32", "--max_steps", "2")
    return ["train", *quick, "--data_path", str(text), "--output_dir", str(text.parent), "--batch_size", "auto", *more]


def saved_cut(text: Path) -> tuple[int, int]:
    config = checkpoint.read(text.parent / "checkpoints" / "latest.pt")["train_config"]
    return config["batch_size"], config["gradient_accumulation"]


def test_the_largest_size_that_fits_is_taken_and_no_larger_one_is_tried_after_the_first_failure() -> None:
    tried = []

    def need(size: int) -> float:
        tried.append(size)
        return float("inf") if size > 3 else 10.0 * size

    assert largest_fitting([1, 2, 3, 4, 6, 12], need, 100.0) == 3
    assert tried == [1, 2, 3, 4]
    assert largest_fitting([1, 2, 3], need, 20.0) == 2


def test_not_even_one_sequence_is_a_mistake_with_its_remedies() -> None:
    with pytest.raises(UserError, match=r"one sequence needs more than the 0.5 GB .*--activation_checkpointing"):
        largest_fitting([1, 2], lambda size: 6e8 * size, 5e8)


@pytest.mark.parametrize(("free", "expected"), [(1.0, (1, 12)), (5.5, (4, 3)), (100.0, (12, 1))])
def test_a_step_keeps_its_sequences(
    monkeypatch: pytest.MonkeyPatch, debug_config: ModelConfig, free: float, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(batch_size, "_free_on_host", lambda: free / batch_size.CPU_SHARE * 1.01)
    monkeypatch.setattr(batch_size, "_cpu_need", lambda *_: float)
    said: list[str] = []
    config = with_fitting_batch(TrainConfig(gradient_accumulation=6), debug_config, CPU, said.append)
    assert (config.batch_size, config.gradient_accumulation) == expected
    assert len(said) == 1
    assert f"batch size {expected[0]}: a step's 12 sequences in {expected[1]} pass" in said[0]


# In a process of its own, as a run measures it: what a process has kept of freed memory takes no room anew.
MEASURE = """
import torch
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.training import batch_size
torch.set_num_threads(1)
config = TrainConfig(gradient_accumulation=1, batch_size=1, compile="off")
wide = ModelConfig.preset("debug", vocab_size=4096, inter_dim=8192, n_dense_layers=3)  # megabytes per sequence
need = batch_size._cpu_need(config, wide)
print(need(1), need(9), batch_size._free_on_host())
"""


def test_memory_is_measured_on_this_machine_and_grows_with_the_batch() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    one, nine, free = map(int, done.stdout.split())
    activations = 3 * 128 * 8192 * 4 * 3  # of the three layers' MLPs: two projections and their product
    assert nine - one > 8 * activations / 2
    assert one < free


def test_a_run_records_the_choice_and_a_resume_keeps_it(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(text, "--gradient_accumulation", "4")) == 0
    assert saved_cut(text) == (8, 1)
    said = capsys.readouterr().err
    assert said.count("batch size 8: a step's 8 sequences in 1 pass") == 1

    def again(*_: Any) -> None:
        raise AssertionError("a resume does not look at the memory")

    monkeypatch.setattr(batch_size, "_cpu_need", again)
    assert main(flags(text, "--gradient_accumulation", "4", "--resume", "--max_steps", "3")) == 0
    assert saved_cut(text) == (8, 1)
    assert main(flags(text, "--gradient_accumulation", "3", "--resume", "--max_steps", "4")) == 2
    assert "gradient_accumulation (saved 1, now 3)" in capsys.readouterr().err


def test_a_settings_file_may_say_auto_and_other_words_are_refused(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = text.parent / "run.toml"
    settings.write_text('batch_size = "auto"\n')
    given = flags(text)
    without = [word for word in given if word not in ("--batch_size", "auto")]
    assert main([*without, "--config", str(settings)]) == 0
    assert saved_cut(text) == (4, 1)
    settings.write_text('batch_size = "many"\n')
    assert main([*without, "--config", str(settings)]) == 2
    assert "--batch_size takes a whole number, got 'many'" in capsys.readouterr().err


def test_a_device_whose_memory_cannot_be_seen_is_a_mistake(debug_config: ModelConfig) -> None:
    with pytest.raises(UserError, match="--batch_size auto cannot measure the memory of mps: name a number"):
        with_fitting_batch(TrainConfig(), debug_config, torch.device("mps"), print)
