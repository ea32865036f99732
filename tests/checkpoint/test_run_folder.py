"""Which checkpoint a run goes on from, and which one it keeps while it writes the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import CheckpointError, file
from nanokimi.checkpoint.run import LOCK, Checkpoints
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
