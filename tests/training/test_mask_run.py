"""Runs with ``--mask_documents``, from the command line to the checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.cli import main

FROZEN = ("--learning_rate", "0", "--adam_lr", "0", "--set", "bias_update_rate=0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A thousand documents of four words: several to every sequence."""
    words = Path(argparse.__file__).read_text(encoding="utf-8").split()[:4000]
    lines = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    path = tmp_path / "train.txt"
    path.write_text("\n<|endoftext|>\n".join(lines), encoding="utf-8")
    return path


def trained(text: Path, output: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """History and last checkpoint of a short run on ``text``."""
    quick = ("--preset", "debug", "--set", "max_seq_length=64", "--max_steps", "6", "--warmup_steps", "2")
    where = ("--data_path", str(text), "--output_dir", str(output), "--eval_interval", "3")
    assert main(["train", *quick, *where, *more]) == 0
    history: dict[str, Any] = json.loads((output / "logs" / "training_metrics.json").read_text())
    return history, checkpoint.read(output / "checkpoints" / "final.pt")


def test_a_masked_run_learns_and_its_checkpoint_remembers_the_mask(text: Path, tmp_path: Path) -> None:
    history, content = trained(text, tmp_path / "run", "--mask_documents")
    assert history["train_ce_loss"][-1] < history["train_ce_loss"][0] - 0.1
    assert content["train_config"]["mask_documents"] is True


def test_the_mask_holds_in_training_and_in_evaluation(text: Path, tmp_path: Path) -> None:
    masked, one = trained(text, tmp_path / "masked", "--mask_documents", *FROZEN)
    unmasked, other = trained(text, tmp_path / "unmasked", *FROZEN)
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for measure in ("train_ce_loss", "val_loss"):
        assert masked[measure][0] != unmasked[measure][0], measure
