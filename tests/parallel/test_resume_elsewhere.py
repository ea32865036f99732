"""Runs that go on with another number of ranks, laid out in another way: as if nothing had happened."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrun import ALONE, Launch, history, real_text, run

from nanokimi import checkpoint
from nanokimi.interop.loading import load

pytestmark = pytest.mark.serial

LENGTH, PER_STEP, STEPS = 32, 8, 12
EPOCH = STEPS * PER_STEP  # sequences
FILE = EPOCH // 8 * LENGTH  # bytes of each of eight files, of which every rank reads some
DDP = (2, "--parallel", "ddp")
FSDP = (2, "--parallel", "fsdp")
ONE = (1,)
EXPERTS = (4, "--expert_parallel", "2")


def train(folder: Path, name: str, steps: int, ranks: int, *more: str) -> str:
    """A run, or the next part of it, in fp64; what it said."""
    arguments = (
        "train", "--preset", "debug", "--data_path", str(folder / "text"), "--output_dir", str(folder / name),
        "--device", "cpu", "--max_steps", str(steps), "--batch_size", str(PER_STEP // 2), "--schedule", "constant",
        "--warmup_steps", "3", "--learning_rate", "0.05", "--qk_clip_tau", "0.1", "--val_fraction", "0",
        "--eval_interval", "0", "--save_interval", "0", "--set", f"max_seq_length={LENGTH}", *more,
    )  # fmt: skip
    record = folder / f"{name}-sequences"
    record.mkdir(exist_ok=True)
    flags = ("--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ALONE
    launch = Launch(arguments, flags, fp64=True, record=str(record), part_bytes=FILE)
    code, job = run(launch, folder)
    assert code == 0, job.said()
    return job.said()


def sequences(folder: Path, name: str) -> Counter[tuple[int, ...]]:
    """How often each sequence was trained on, in all parts of a run and on all ranks."""
    rows = np.concatenate([np.fromfile(path, np.int32) for path in (folder / f"{name}-sequences").iterdir()])
    return Counter(map(tuple, rows.reshape(-1, LENGTH + 1).tolist()))


@pytest.mark.fault(69)
@pytest.mark.slow
def test_a_run_goes_on_as_replicas_shards_alone_and_with_experts_dealt_out(tmp_path: Path) -> None:
    """The losses and weights of one process, and every sequence of an epoch once."""
    (tmp_path / "text").write_text(real_text(EPOCH * LENGTH))
    train(tmp_path, "whole", STEPS, *ONE)
    train(tmp_path, "moved", 3, *DDP)
    checkpoints = tmp_path / "moved" / "checkpoints"
    assert f"resuming {checkpoints}/latest.pt at step 3 of 6" in train(tmp_path, "moved", 6, *FSDP, "--resume")
    assert f"resuming {checkpoints}/step_00000006 at step 6" in train(tmp_path, "moved", 9, *ONE, "--resume")
    assert f"resuming {checkpoints}/latest.pt at step 9" in train(tmp_path, "moved", STEPS, *EXPERTS, "--resume")
    whole, moved = history(tmp_path / "whole"), history(tmp_path / "moved")
    assert moved["steps"] == list(range(1, STEPS + 1))
    assert sum(whole["clipped_heads"]) > 0
    for column in ("train_ce_loss", "train_aux_loss", "grad_norm", "learning_rate", "tokens", "clipped_heads"):
        assert moved[column] == pytest.approx(whole[column], rel=1e-9), column
    expected, found = (checkpoint.read(tmp_path / name / "checkpoints" / "final.pt") for name in ("whole", "moved"))
    for name, weight in expected["model"].items():
        torch.testing.assert_close(found["model"][name], weight, rtol=0, atol=1e-8 * float(weight.abs().max()))
    seen = sequences(tmp_path, "moved")
    assert seen == sequences(tmp_path, "whole")
    assert len(seen) == EPOCH
    assert set(seen.values()) == {1}


@pytest.mark.fault(69)
@pytest.mark.slow
def test_a_stream_gives_every_sequence_once_whoever_reads_it(tmp_path: Path) -> None:
    """With what waits in the shuffle buffers."""
    (tmp_path / "text").mkdir()
    texts = [real_text(8 * FILE)[i * FILE : (i + 1) * FILE] for i in range(8)]
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    stream = ("--dataset", "localstreaming", "--shuffle_buffer", "16")
    train(tmp_path, "moved", 4, *FSDP, *stream)
    train(tmp_path, "moved", 8, *ONE, *stream, "--resume")
    train(tmp_path, "moved", STEPS + 2, *EXPERTS, *stream, "--resume")  # so that every rank has ended the epoch
    seen, tokenizer = sequences(tmp_path, "moved"), load(tmp_path / "moved" / "checkpoints" / "final.pt")[1]
    for text in texts:
        tokens = [*tokenizer.encode(text), tokenizer.eot_id]
        for at in range(0, FILE, LENGTH):
            assert seen[tuple(tokens[at : at + LENGTH + 1])] == 1
    assert seen.total() == (STEPS + 2) * PER_STEP
