"""Sharded and expert-parallel training on NCCL: one rank, compiled, in bf16, against one process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.gpu

SETTINGS = [
    "--preset", "tiny", "--set", "tokenizer_name=byte", "--device", "cuda", "--compile", "on",
    "--mixed_precision", "on", "--batch_size", "4", "--gradient_accumulation", "2", "--max_steps", "12",
    "--warmup_steps", "3", "--save_interval", "6", "--eval_interval", "6", "--qk_clip_tau", "3",
    "--learning_rate", "0.005", "--adam_lr", "0.005",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
LAYOUTS = {
    "ddp": ["--parallel", "ddp"],
    "fsdp": ["--parallel", "fsdp"],
    "experts": ["--parallel", "fsdp", "--expert_parallel", "1", "--activation_checkpointing", "--async_checkpoints"],
}


def trained(folder: Path, before: list[str], more: list[str]) -> dict[str, list[float]]:
    """The history of a run in ``folder`` on a part of the standard library."""
    text = folder.parent / "text.txt"
    text.write_text("".join(Path(module.__file__).read_text() for module in (argparse, subprocess, json)))
    command = [*before, str(ROOT / "train.py"), "--data_path", str(text), "--output_dir", str(folder), *SETTINGS]
    done = subprocess.run(
        [sys.executable, *command, *more], env=os.environ | {"OMP_NUM_THREADS": "4"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    history: dict[str, list[float]] = json.loads((folder / "logs" / "training_metrics.json").read_text())
    return history


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return trained(tmp_path_factory.mktemp("alone") / "run", [], [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_compiled_in_bf16_trains_as_one_process_does(
    layout: str, alone: dict[str, list[float]], tmp_path: Path
) -> None:
    history = trained(tmp_path / "run", TORCHRUN, LAYOUTS[layout])
    assert history["train_loss"] == pytest.approx(alone["train_loss"], rel=2e-2)
    assert history["val_loss"] == pytest.approx(alone["val_loss"], rel=2e-2)
    assert history["clipped_heads"][0] == alone["clipped_heads"][0]
    assert history["tokens"] == alone["tokens"]
    assert history["train_loss"][-1] < history["train_loss"][0] - 0.5
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"latest.pt", "final.pt"} <= names
    assert ("step_00000012" in names) == (layout != "ddp")
