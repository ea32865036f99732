"""Which checkpoint a run goes on from, and which one it keeps while it writes the next."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import CheckpointError, file, shards
from nanokimi.checkpoint.lock import LOCK
from nanokimi.checkpoint.run import SAVE_NUMBER, Checkpoints
from nanokimi.config import ModelConfig
from nanokimi.errors import UserError
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip
from nanokimi.parallel.process_group import launcher
from nanokimi.parallel.ranks import Ranks, SingleDevice

WHOLE: dict[str, Any] = {"model": {"w": torch.ones(3)}, "optimizer": {}, "counters": {"step": 7}}
WEIGHTS: dict[str, Any] = {"model": {"w": torch.ones(3)}, "counters": {"step": 9}}


def save(path: Path, content: dict[str, Any], age: int, *, damaged: bool = False) -> None:
    """A checkpoint that was written ``age`` seconds ago."""
    checkpoint.save(path, content)
    if damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    at = 2_000_000_000 - age
    os.utime(path, (at, at))


def test_the_newest_readable_run_is_taken_and_what_is_wrong_with_newer_ones_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "latest.pt", WHOLE, 0, damaged=True)
    save(tmp_path / "final.pt", WEIGHTS, 1)
    save(tmp_path / "previous.pt", WHOLE, 2)
    path, content = Checkpoints(tmp_path).find()
    assert (path.name, content["counters"]["step"]) == ("previous.pt", 7)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "warning: " in warnings[0]
    assert "latest.pt: damaged" in warnings[0]


def test_where_none_can_be_read_every_reason_is_given(tmp_path: Path) -> None:
    save(tmp_path / "latest.pt", WHOLE, 0, damaged=True)
    save(tmp_path / "best.pt", WHOLE, 1, damaged=True)
    with pytest.raises(CheckpointError, match=r"latest\.pt: damaged.*; .*best\.pt: damaged"):
        Checkpoints(tmp_path).find()
    assert Checkpoints(tmp_path).has_run()


def test_weights_alone_are_no_run(tmp_path: Path) -> None:
    save(tmp_path / "latest.pt", WEIGHTS, 0)
    assert not Checkpoints(tmp_path).has_run()
    with pytest.raises(UserError, match="--resume: no checkpoint in"):
        Checkpoints(tmp_path).find()


@pytest.mark.fault(55)
def test_the_one_before_is_kept_and_a_damaged_file_never_takes_its_place(tmp_path: Path) -> None:
    model = SingleDevice(Transformer(ModelConfig.preset("debug")))
    optimizer = MuonClip(model.model)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save("latest.pt", step, {"counters": {"step": step}}, model, optimizer)
    steps = [checkpoint.read(tmp_path / name)["counters"]["step"] for name in ("latest.pt", "previous.pt")]
    assert steps == [3, 2]
    damaged = bytearray((tmp_path / "latest.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "latest.pt").write_bytes(damaged)
    Checkpoints(tmp_path).save("latest.pt", 4, {"counters": {"step": 4}}, model, optimizer)
    steps = [checkpoint.read(tmp_path / name)["counters"]["step"] for name in ("latest.pt", "previous.pt")]
    assert steps == [4, 2]


def test_each_file_is_read_once_while_a_run_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is hashed while it is written, and read back before its forerunner goes; not again when it becomes one."""
    digest, seen = file._digest, []

    def counted(path: Path) -> str:
        seen.append(path)
        return digest(path)

    monkeypatch.setattr(file, "_digest", counted)
    model = SingleDevice(Transformer(ModelConfig.preset("debug")))
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 5):
        checkpoints.save("latest.pt", step, {}, model, MuonClip(model.model))
    assert len(seen) == 4


class Run:
    """A run that saves into ``checkpoints`` without training."""

    def __init__(self, folder: Path, *, asynchronous: bool = False) -> None:
        self.checkpoints = Checkpoints(folder, asynchronous=asynchronous)
        self.model = SingleDevice(Transformer(ModelConfig.preset("debug")))
        self.optimizer = MuonClip(self.model.model)

    def save(self, step: int, *, final: bool = False) -> None:
        self.checkpoints.save("latest.pt", step, {}, self.model, self.optimizer, final=final)


@pytest.mark.fault("A7")
def test_a_removed_output_folder_is_locked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = Run(tmp_path / "run" / "checkpoints"), tmp_path / "run"
    try_to_lock = f"import fcntl; fcntl.lockf(open({str(output / LOCK)!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other_run = [sys.executable, "-c", try_to_lock]
    with run.checkpoints.locked():
        run.save(4)
        shutil.rmtree(output)
        run.save(8)
        assert subprocess.run(other_run, stderr=subprocess.DEVNULL, check=False).returncode == 1
    assert subprocess.run(other_run, check=False).returncode == 0
    assert capsys.readouterr().err.count("was removed while the run goes on: made again") == 1


@pytest.mark.fault("A7")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_whose_file_was_removed_is_written_again(tmp_path: Path, asynchronous: bool) -> None:
    run = Run(tmp_path / "checkpoints", asynchronous=asynchronous)
    run.save(8)
    run.checkpoints.finish()
    shutil.rmtree(tmp_path / "checkpoints")
    run.save(8, final=True)
    run.checkpoints.finish()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["final.pt", "latest.pt"]


def shards_of(folder: Path, step: int, number: int) -> Path:
    about = {SAVE_NUMBER: number, "optimizer_groups": []}
    path = shards.step_folder(folder, step)
    shards.begin_save(path, {"x": torch.ones(1)}, about, None, asynchronous=False).result()
    return path


@pytest.mark.fault("A3")
def test_the_shards_of_a_save_come_before_the_weights_of_it_alone(tmp_path: Path) -> None:
    newest = shards_of(tmp_path, 40, 2)
    checkpoint.save(tmp_path / "latest.pt", {SAVE_NUMBER: 2, **WEIGHTS})
    assert [path.name for path in Checkpoints(tmp_path).candidates()] == ["step_00000040", "latest.pt"]
    assert not Checkpoints(tmp_path).put_aside(unless_newest=newest)  # ``--resume --checkpoint_path .../step_00000040``


@pytest.mark.fault("A3")
def test_of_shards_too_the_last_saves_are_kept_and_not_the_highest_steps(tmp_path: Path) -> None:
    for number, step in enumerate((30, 40, 25), start=1):  # the run went back, and saved step 25
        shards_of(tmp_path, step, number)
    checkpoints = Checkpoints(tmp_path)
    checkpoints._pending = Future()
    checkpoints._pending.set_result(None)
    checkpoints.finish()
    assert sorted(os.listdir(tmp_path)) == ["step_00000025", "step_00000040"]


# ---- started again ------------------------------------------------------------------------------


def launched_here(folder: Path) -> Checkpoints:
    """As one rank has them that ``torchrun`` started."""
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.ranks = Ranks(launched=True)
    return checkpoints


def test_what_the_same_torchrun_starts_again_goes_on_and_what_another_starts_begins_afresh(tmp_path: Path) -> None:
    with launched_here(tmp_path).locked():
        save(tmp_path / "checkpoints" / "latest.pt", WHOLE, 0)
    assert launched_here(tmp_path).started_again()
    (tmp_path / LOCK).write_text("node7 4711 815\n")
    assert not launched_here(tmp_path).started_again()


def test_a_run_that_was_never_saved_begins_afresh(tmp_path: Path) -> None:
    with launched_here(tmp_path).locked():
        assert (tmp_path / LOCK).read_text() == f"{launcher()}\n"
    assert not launched_here(tmp_path).started_again()


def test_a_process_without_torchrun_leaves_no_name(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints").locked():
        assert (tmp_path / LOCK).read_text() == ""
